"""The training loop of pretraining, midtraining and fine-tuning.

`train` is the whole story, from top to bottom: divide a step's rows over ranks and micro-batches, go on from a
checkpoint if asked to, and then, step after step: save, evaluate, sample, compute gradients, update, log. The functions
below it stand in the order in which it calls them. How the learning rate rises and falls is in recipe.py
(`learning_rate_multiplier`); the optimizer is in optim.py; what is saved, resumed and logged is in run.py.
"""

import contextlib
import dataclasses
import gc
import math
import statistics
import time
from collections.abc import Iterator, Sequence

import torch

from nanochat import recipe
from nanochat.common import print0
from nanochat.compute import Compute
from nanochat.dataloader import MicroBatch, RowLoader
from nanochat.device_batch import DeviceBatch, choose_device_batch, explain_out_of_memory
from nanochat.fp8 import weights_quantised
from nanochat.loss import IGNORED
from nanochat.loss_eval import evaluate_loss
from nanochat.recipe import TrainConfig
from nanochat.run import Run
from nanochat.stopping import abandoned_on_signal, stop_if_requested, stop_on_signals
from nanochat.token_shards import PackedRows

ASSUMED_MFU = 0.4  # of a GPU's peak, for the estimate before the first step
CUDA_SAVE_STEPS = 1000  # fewest steps between checkpoints on CUDA, unless --save-every says otherwise
TIMED_STEPS = 10  # steps after which the estimate is replaced by a measurement; the first ones compile and warm up


def train(run: Run, train_rows: PackedRows, val_rows: PackedRows, prompts: Sequence[str] = ()) -> None:
    """Train `run.model` to the last step, leaving checkpoints, metrics.jsonl and run.json behind.

    prompts: texts that the model continues now and then, to show what it has learned. Raises ValueError when flags do
    not fit together, when training diverges and when memory runs out, and KeyboardInterrupt, after saving, on a signal.
    """
    config = run.config
    model = run.model
    compute = run.compute

    # The rows of a step are divided over the ranks, and the share of a rank over micro-batches of `batch.rows` rows.
    T = model.config.sequence_len
    rows = rows_per_step(run.total_batch_size, T, compute.world_size)
    batch = choose_device_batch(model, config, compute, share=rows // compute.world_size)
    train_loader = RowLoader(
        train_rows,
        rows_per_step=rows,
        device_rows=batch.rows,
        seed=config.seed,
        rank=compute.rank,
        world_size=compute.world_size,
        device=compute.device,
    )
    val_loader = validation_loader(val_rows, batch.rows, compute)

    run.start_or_resume()
    if compute.rank == 0:
        announce(run, batch)
    model.train()
    step_seconds: list[float] = []
    with (
        stop_on_signals(run),
        explain_out_of_memory(batch.rows),
        contextlib.closing(run),
        contextlib.closing(train_loader.iterate(run.step)) as steps,
        garbage_collector_restored(),
    ):
        while True:
            step = run.step
            last = step == run.num_iterations

            # Save before evaluating: a crash in the evaluation or in sampling then costs no training.
            if last or is_due(step, steps_between_checkpoints(config, compute)):
                run.save()

            # A resumed run does not evaluate again what its checkpoint has a score for.
            if (last or is_due(step, config.eval_every)) and run.evaluated_step != step:
                with abandoned_on_signal(run):
                    scores = validation_scores(run, val_loader)
                run.record_evaluation(scores)
            run.prune()
            if prompts and (last or is_due(step, config.sample_every)):
                with abandoned_on_signal(run):
                    print_samples(run, prompts)

            # The last step has been saved and evaluated like any other; only now does the loop end.
            if last:
                break

            began = time.perf_counter()  # waiting for rows is part of a step
            with abandoned_on_signal(run):
                _, micro_batches = next(steps)
                part_losses = accumulate_gradients(run, micro_batches, batch.recompute)
            lr_mult = recipe.learning_rate_multiplier(step, run.num_iterations, config)
            grad_norm = update_weights(run, lr_mult)
            # Reading a number waits for the GPU, so the loss is read when the update is under way. One that is not
            # finite has spoilt the weights by then, but only in memory: it ends the run before the next save.
            mean_loss = read_loss(run, part_losses)
            compute.synchronize()  # a GPU may still be busy with the update, which belongs to this step's time
            seconds = time.perf_counter() - began

            more_metrics = {} if grad_norm is None else {"grad_norm": grad_norm}
            run.record_step(
                loss=mean_loss,
                lr_mult=lr_mult,
                tokens=run.total_batch_size,
                flops=run.total_batch_size * model.flops_per_token(),
                seconds=seconds,
                epoch=train_loader.epoch(step),
                more=more_metrics,
            )
            step_seconds.append(seconds)
            rest_garbage_collector(len(step_seconds))
            if len(step_seconds) == TIMED_STEPS:
                announce_measured_time(run, step_seconds)
    run.finish(plan=dataclasses.asdict(batch))


def rows_per_step(total_tokens: int, sequence_len: int, world_size: int) -> int:
    """Return the rows of a step over all ranks. Raises ValueError when they do not divide evenly."""
    rows, rest = divmod(total_tokens, sequence_len)
    if rest or rows % world_size:
        raise ValueError(
            f"--total-batch-size {total_tokens} is not a whole number of rows of {sequence_len} tokens on each of "
            f"{world_size} processes: make it a multiple of {sequence_len * world_size}"
        )
    return rows


def is_due(step: int, every: int) -> bool:
    """Return whether something that happens every `every` steps (0 = never) happens at `step`; never at step 0."""
    return every > 0 and step > 0 and step % every == 0


def steps_between_checkpoints(config: TrainConfig, compute: Compute) -> int:
    """Return --save-every, or else how often there is an evaluation: then each checkpoint has a score.

    All GPUs wait while gigabytes are written. So on CUDA there is a checkpoint at every n-th evaluation only, at
    least 1,000 steps after the last. A crash at d24 then costs about 18 minutes of the 99 that 8 H100s take.
    """
    if config.save_every is not None:
        return config.save_every
    if compute.device.type != "cuda" or config.eval_every == 0:
        return config.eval_every
    return config.eval_every * math.ceil(CUDA_SAVE_STEPS / config.eval_every)


def validation_loader(val_rows: PackedRows, device_rows: int, compute: Compute) -> RowLoader:
    """Return a loader of the validation rows, `device_rows` at a time on each rank, in the same order for every run."""
    return RowLoader(
        val_rows,
        rows_per_step=device_rows * compute.world_size,
        device_rows=device_rows,
        seed=0,
        rank=compute.rank,
        world_size=compute.world_size,
        device=compute.device,
    )


def validation_scores(run: Run, val_loader: RowLoader) -> dict[str, float]:
    """Return the metrics of an evaluation on the validation rows. Raises ValueError when the loss is not finite."""
    wanted_rows = math.ceil(run.config.eval_tokens / val_loader.sequence_len)
    micro_batches = until_stopped(run, val_loader.first_rows(min(wanted_rows, val_loader.rows_in_epoch)))
    # On CPU compiling one more graph, for this batch without gradients, takes longer than all evaluations gain by it.
    stance = "force_eager" if run.compute.device.type == "cpu" else "default"
    was_training = run.model.training
    run.model.eval()
    with torch.compiler.set_stance(stance):
        loss = evaluate_loss(run.model, micro_batches, run.tokenizer.token_bytes, run.compute)
    run.model.train(was_training)
    if not math.isfinite(loss.nats_per_token):
        raise run.diverged(f"the validation loss is {loss.nats_per_token} after step {run.step}")
    return {
        "val_bpb": loss.bits_per_byte,
        "val_loss": loss.nats_per_token,
        "val_perplexity": loss.perplexity,
    }


def until_stopped(run: Run, micro_batches: Iterator[MicroBatch]) -> Iterator[MicroBatch]:
    """Yield the batches of an evaluation; between two of them, save and raise KeyboardInterrupt after a signal.

    After SIGTERM torchrun waits 30 seconds before it kills, less than an evaluation and a checkpoint may take. Ranks
    can agree between two batches because each has equally many.
    """
    for micro_batch in micro_batches:
        stop_if_requested(run)
        yield micro_batch


@torch.no_grad()
def print_samples(run: Run, prompts: Sequence[str]) -> None:
    """Print the likeliest 16 tokens after each prompt; rank 0 alone samples.

    Each token is computed from the whole text before it. The engine, which keeps keys and values, would gain nothing on
    so few tokens.
    """
    if run.compute.rank != 0:
        return
    run.model.eval()
    with torch.compiler.set_stance("force_eager"):  # texts of every length would each be compiled anew
        for prompt in prompts:
            ids = run.tokenizer.encode(prompt, prepend="<|bos|>")
            for _ in range(16):
                logits_BTV = run.model(torch.tensor([ids], device=run.compute.device))
                ids.append(int(logits_BTV[0, -1].argmax()))
            print0("  " + repr(run.tokenizer.decode(ids[1:])))
    run.model.train()


def accumulate_gradients(run: Run, micro_batches: list[MicroBatch], recompute: bool) -> torch.Tensor:
    """Run forward and backward over this rank's micro-batches; return their parts of the mean loss of all ranks' rows.

    A device rarely holds the activations of a whole step. The gradients of its micro-batches add up, which gives the
    same sum as if all rows had gone through at once, and the weights are updated once. recompute: activations in the
    backward pass.
    """
    compute = run.compute
    model = run.model
    if model.config.dropout:
        # Dropout that follows from (seed, step, rank) is the same after a resume.
        torch.manual_seed(((run.config.seed << 40) + (run.step << 10) + compute.rank) % 2**63)

    # Rows may differ in how many targets count. Dividing by the number of all ranks' targets, each rank's loss is its
    # part of the mean over all, and gradients are summed over ranks, not averaged.
    counts = torch.stack([(targets_BT > IGNORED).sum() for _, targets_BT in micro_batches])
    n_targets = compute.all_reduce_sum(counts.sum().float()).clamp(min=1)
    part_losses = []
    with weights_quantised(model):  # for --fp8: once for all micro-batches
        for idx_BT, targets_BT in micro_batches:
            # On CPU alone. On a GPU, asking all ranks waits for the previous micro-batch, and a step takes seconds.
            if compute.device.type == "cpu":
                stop_if_requested(run)
            part_loss = model(idx_BT, targets_BT, loss_reduction="sum", recompute=recompute) / n_targets
            part_loss.backward()  # adds to the gradients of the micro-batches before
            part_losses.append(part_loss.detach())
    return torch.stack(part_losses)


def update_weights(run: Run, lr_mult: float) -> float | None:
    """Take the optimizer's step; return the norm of the gradient if --grad-clip asks for it.

    The schedules of learning rate, momentum and weight decay are in recipe.py.
    """
    return run.optimizer.step(
        run.step,
        lr_mult=lr_mult,
        momentum=recipe.muon_momentum(run.step, run.num_iterations, run.config),
        wd_mult=recipe.weight_decay_multiplier(run.step, run.num_iterations),
        clip=run.config.grad_clip,
    )


def read_loss(run: Run, part_losses: torch.Tensor) -> float:
    """Return the mean loss over the rows of all ranks. Raises ValueError on all of them when it is not finite."""
    compute = run.compute
    mean_loss = compute.all_reduce_sum(part_losses.sum()).item()
    if not math.isfinite(mean_loss):
        bad = [i for i, part_loss in enumerate(part_losses.tolist()) if not math.isfinite(part_loss)]
        rows = run.total_batch_size // run.model.config.sequence_len
        where = f"rows {run.step * rows} to {(run.step + 1) * rows - 1} (micro-batch {bad} of rank {compute.rank})"
        raise run.diverged(f"loss is {mean_loss} at step {run.step}, {where}")
    return mean_loss


def rest_garbage_collector(steps_made: int) -> None:
    """Switch the garbage collector off once the first steps have made what stays.

    It looks for reference cycles, and each search walks all objects of the process: karpathy/nanochat (92d63d4) saw
    half a second in which the GPU got no work. Like it, we collect every 5,000 steps, because training leaves few
    cycles.
    """
    if steps_made == 3:
        gc.collect()
        gc.freeze()  # what is there now is not looked at again
        gc.disable()
    elif steps_made % 5000 == 0:
        gc.collect()


@contextlib.contextmanager
def garbage_collector_restored() -> Iterator[None]:
    """Give the process its garbage collector back when training ends."""
    try:
        yield
    finally:
        gc.unfreeze()
        gc.enable()


# --- what a run prints about its size, time and cost


def announce(run: Run, batch: DeviceBatch) -> None:
    """Print what the run will do, how, and, where the GPU's peak is known, the time and cost to expect."""
    config = run.config
    compute = run.compute
    model = run.model
    flops = model.flops_per_token()
    steps = run.num_iterations - run.step
    tokens = steps * run.total_batch_size
    n_parameters = sum(p.numel() for p in model.parameters())
    print0(
        f"{run.stage} {run.tag}: {n_parameters:,} parameters, {flops / 1e6:,.1f} MFLOPs per token, "
        f"{compute.world_size} x {compute.name}, {compute.dtype}; "
        f"{steps} steps of {run.total_batch_size:,} tokens = {tokens:,}"
    )

    how = model.kernels.names
    if batch.recompute:
        how.append("activations recomputed")
    if batch.peak is not None:
        how.append(f"{batch.peak / 1e9:.2f} GB of GPU memory at the peak")
    print0(f"  {batch.accumulation} x {batch.rows} rows per step and device, {', '.join(how)}")

    if compute.peak_flops is not None:
        seconds = tokens * flops / (compute.peak_flops * ASSUMED_MFU * compute.world_size)
        print0(f"  {time_and_cost(seconds, config.price)} if it reaches {ASSUMED_MFU:.0%} of the GPU's peak")


def announce_measured_time(run: Run, step_seconds: list[float]) -> None:
    """Print what the rest of the run will take at the measured speed, leaving out the steps that warmed up."""
    if run.log is None:
        return
    timed = step_seconds[len(step_seconds) // 2 :]
    seconds = (run.num_iterations - run.step) * statistics.fmean(timed)
    time_text = time_and_cost(seconds, run.config.price)
    run.log.say(f"  {time_text} left at the speed of the first {len(step_seconds)} steps")


def time_and_cost(seconds: float, price: float | None) -> str:
    """Return "about 1.5 h and $12.00"; price: dollars per hour, None = no cost."""
    hours = seconds / 3600
    time_text = f"{hours:.1f} h" if hours >= 1 else f"{hours * 60:.1f} min"
    return f"about {time_text}" if price is None else f"about {time_text} and ${hours * price:,.2f}"
