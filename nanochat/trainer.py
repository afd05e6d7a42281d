"""The training loop of pretraining, midtraining and fine-tuning.

Read `train` from top to bottom: it prepares the model and the optimizer, divides a step over ranks and micro-batches,
goes on from a checkpoint if asked to, and then repeats until the last step: save, evaluate, sample, update, log.
The functions after it stand in the order in which it calls them; what rl.py's own loop shares with it is in run.py.
"""

import contextlib
import dataclasses
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from nanochat import attention, checkpoint, fp8, loss, recipe
from nanochat.common import print0
from nanochat.compute import Compute, can_compile
from nanochat.dataloader import MicroBatch, RowLoader
from nanochat.gpt import GPT
from nanochat.loss_eval import evaluate_bpb
from nanochat.optim import MuonAdamW
from nanochat.run import (
    Progress,
    Run,
    TrainConfig,
    describe,
    diverged,
    finish_step,
    open_log,
    record_evaluation,
    save,
    start_or_resume,
    stop_signals,
    write_run_record,
)
from nanochat.run_log import RunLog
from nanochat.token_shards import PackedRows
from nanochat.tokenizer import Tokenizer

# Rows that a device takes at once unless it is told. A GPU is busy with 2^16 tokens, so more rows gain nothing; on a
# CPU more rows only need more memory.
CPU_ROWS = 32
CUDA_TOKENS = 2**16
ASSUMED_MFU = 0.4  # of a GPU's peak, for the estimate before the first step
TIMED_STEPS = 10  # steps after which the estimate is replaced by a measurement; the first ones compile and warm up


def train(
    config: TrainConfig,
    *,
    stage: str,
    tag: str,
    model: GPT,
    tokenizer: Tokenizer,
    train_rows: PackedRows,
    val_rows: PackedRows,
    compute: Compute,
    total_batch_size: int,
    num_iterations: int,
    weight_decay: float,
    lr_scales: dict[str, float],
    meta: dict[str, Any],
    sample: Callable[[], None] | None = None,
) -> None:
    """Train `model` up to step `num_iterations`, leaving checkpoints, metrics.jsonl and run.json behind.

    lr_scales: a factor for each learning rate. meta: what checkpoints say of the run besides. sample: prints samples.
    Raises ValueError for flags that do not fit together and when training diverges, and KeyboardInterrupt, after
    saving, on SIGINT or SIGTERM.
    """
    prepare_model(model, config, compute)
    described = describe(config, model, tokenizer, total_batch_size, num_iterations, meta)
    run = Run(
        stage=stage,
        tag=tag,
        config=config,
        model=model,
        optimizer=make_optimizer(model, config, lr_scales, weight_decay, compute),
        tokenizer=tokenizer,
        compute=compute,
        num_iterations=num_iterations,
        meta=described,
    )
    T = model.config.sequence_len
    rows = rows_per_step(total_batch_size, T, compute.world_size)
    batch = choose_device_batch(run, rows // compute.world_size)
    place: dict[str, Any] = {"rank": compute.rank, "world_size": compute.world_size, "device": compute.device}
    train_loader = RowLoader(train_rows, rows, batch.rows, config.seed, **place)
    val_loader = RowLoader(val_rows, batch.rows * compute.world_size, batch.rows, 0, **place)
    progress = start_or_resume(run)
    first_step = progress.step
    if compute.rank == 0:
        announce(run, batch, steps=num_iterations - first_step, tokens_per_step=total_batch_size)

    model.train()
    step_seconds: list[float] = []
    with (
        stop_signals() as stop,
        contextlib.closing(open_log(run, first_step)) as log,
        contextlib.closing(train_loader.iterate(first_step)) as steps,
    ):
        while True:
            step = progress.step
            last = step == num_iterations

            # Save before evaluating: a crash in the evaluation or in sampling then costs no training.
            if last or is_due(step, config.save_every or config.eval_every):
                save(run, progress)
            evaluated_before = step == first_step and progress.val_bpb is not None  # by the run that we resume
            if (last or is_due(step, config.eval_every)) and not evaluated_before:
                record_evaluation(run, progress, log, {"val_bpb": validation_bpb(run, step, val_loader)})
            # Prune after evaluating, which may have found a new best checkpoint.
            if step == progress.saved_step and compute.rank == 0:
                checkpoint.prune(stage, tag, config.keep)
            if sample is not None and (last or (is_due(step, config.sample_every) and step != first_step)):
                sample()
            if last:
                break
            # Signals reach ranks at different times; they stop together, at the same step.
            if compute.any_rank(stop.requested):
                save(run, progress)
                raise KeyboardInterrupt

            began = time.perf_counter()  # waiting for rows is part of a step
            _, micro_batches = next(steps)
            line = train_step(run, progress, micro_batches, rows, began)
            log.write({**line, "epoch": train_loader.epoch(step)})
            step_seconds.append(line["dt"])
            if len(step_seconds) == TIMED_STEPS:
                announce_measured_time(run, log, progress, step_seconds)
    write_run_record(run, progress, plan=dataclasses.asdict(batch))


def prepare_model(model: GPT, config: TrainConfig, compute: Compute) -> None:
    """Convert the model to fp8 and compile it, as the flags say. Raises ValueError for --fp8 without a GPU."""
    if config.fp8:
        if compute.device.type != "cuda":
            raise ValueError("--fp8 needs a GPU with fp8 products (Ada, Hopper or later): leave it out")
        fp8.convert(model)
    if config.compile and can_compile(compute.device):
        model.compile_blocks()
    elif config.compile:
        print0("torch.compile is off: no C++ compiler (installing g++ makes training faster)")


def make_optimizer(
    model: GPT, config: TrainConfig, lr_scales: dict[str, float], weight_decay: float, compute: Compute
) -> MuonAdamW:
    """Make the optimizer with the learning rates of the flags, each times its factor in `lr_scales`."""
    learning_rates = {
        "matrix": config.matrix_lr * lr_scales["matrix"],
        "embedding": config.embedding_lr * lr_scales["embedding"],
        "unembedding": config.unembedding_lr * lr_scales["unembedding"],
        "scalar": config.scalar_lr * lr_scales["scalar"],
    }
    return MuonAdamW(model, learning_rates, weight_decay, compute)


def rows_per_step(total_tokens: int, sequence_len: int, world_size: int) -> int:
    """Return the rows of a step over all ranks. Raises ValueError when they do not divide evenly."""
    rows, rest = divmod(total_tokens, sequence_len)
    if rest or rows % world_size:
        raise ValueError(
            f"--total-batch-size {total_tokens} is not a whole number of rows of {sequence_len} tokens on each of "
            f"{world_size} processes: make it a multiple of {sequence_len * world_size}"
        )
    return rows


@dataclass(frozen=True)
class DeviceBatch:
    """How a device takes its share of a step: `accumulation` micro-batches of `rows` rows."""

    rows: int
    accumulation: int
    checkpointing: bool  # recompute activations in the backward pass (arXiv 1604.06174)
    peak: int | None  # bytes, measured on CUDA; None elsewhere


def choose_device_batch(run: Run, share: int) -> DeviceBatch:
    """Choose how many of its `share` of a step's rows each device takes at once, and set model.checkpointing.

    A given --device-batch-size is taken as it is. On CUDA the choice is tried: rows are halved until a forward and
    backward pass fits, then once more with recomputation. All ranks choose the same. Raises ValueError if nothing fits.
    """
    config = run.config
    compute = run.compute
    model = run.model
    cuda = compute.device.type == "cuda"
    most_rows = max(1, CUDA_TOKENS // model.config.sequence_len) if cuda else CPU_ROWS
    if isinstance(config.device_batch_size, int):
        candidates = [config.device_batch_size]
    else:
        candidates = halvings(share, most_rows)
    recompute_options = [False, True] if config.activation_checkpointing is None else [config.activation_checkpointing]
    if not cuda:
        candidates = candidates[:1]
        recompute_options = recompute_options[:1]
    for recompute in recompute_options:
        model.checkpointing = recompute
        for rows in candidates:
            peak = try_device_batch(run, rows) if cuda else None
            # Memory may differ between devices, but the number of rows must not.
            if not compute.any_rank(cuda and peak is None):
                return DeviceBatch(rows=rows, accumulation=max(1, share // rows), checkpointing=recompute, peak=peak)
    raise out_of_memory(candidates[-1])


def halvings(share: int, most: int) -> list[int]:
    """Return divisors of `share`: the largest up to `most`, then each time the largest up to half the one before."""
    result = []
    while most >= 1:
        rows = next(n for n in range(min(share, most), 0, -1) if share % n == 0)
        result.append(rows)
        most = rows // 2
    return result


def try_device_batch(run: Run, rows: int) -> int | None:
    """Run two forward and backward passes on `rows` rows; return the peak in bytes, or None when out of memory."""
    compute = run.compute
    model = run.model
    n_parameters = sum(p.numel() for p in model.parameters())
    if compute.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(compute.device)
    model.train()
    try:
        # It stands in for the optimizer's state, at most two fp32 moments per parameter, sharded over the ranks.
        state = torch.empty(8 * n_parameters // compute.world_size, dtype=torch.uint8, device=compute.device)
        idx_BT = torch.zeros(rows, model.config.sequence_len, dtype=torch.int64, device=compute.device)
        # The second pass runs beside the gradients of the first, as it does when micro-batches accumulate.
        for _ in range(2):
            model(idx_BT, idx_BT, loss_reduction="sum").backward()
        compute.synchronize()
        peak = compute.peak_memory()
        del state, idx_BT
    except torch.OutOfMemoryError:
        peak = None
    for parameter in model.parameters():
        parameter.grad = None
    if compute.device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(compute.device)
    return peak


def announce(run: Run, batch: DeviceBatch, *, steps: int, tokens_per_step: int) -> None:
    """Print what the run will do, how, and where the GPU's peak is known the time and cost to expect."""
    config = run.config
    compute = run.compute
    model = run.model
    flops = model.flops_per_token()
    tokens = steps * tokens_per_step
    shape = model.config
    attention_kernel, _ = attention.choose(
        compute.device, model.dtype, shape.head_dim, min(shape.windows) < shape.sequence_len
    )
    loss_kernel, _ = loss.choose(compute.device, model.dtype, model.compiled)
    how = [f"attention {attention_kernel}", f"loss {loss_kernel}", "compiled" if model.compiled else "eager"]
    if config.fp8:
        how.append("fp8")
    if batch.checkpointing:
        how.append("activations recomputed")
    if batch.peak is not None:
        how.append(f"{batch.peak / 1e9:.2f} GB of GPU memory at the peak")
    print0(
        f"{run.stage} {run.tag}: {sum(p.numel() for p in model.parameters()):,} parameters, "
        f"{flops / 1e6:,.1f} MFLOPs per token, {compute.world_size} x {compute.name}, {compute.dtype}; "
        f"{steps} steps of {tokens_per_step:,} tokens = {tokens:,}"
    )
    print0(f"  {batch.accumulation} x {batch.rows} rows per step and device, {', '.join(how)}")
    if compute.peak_flops is not None:
        seconds = tokens * flops / (compute.peak_flops * ASSUMED_MFU * compute.world_size)
        print0(f"  {time_and_cost(seconds, config.price)} if it reaches {ASSUMED_MFU:.0%} of the GPU's peak")


def announce_measured_time(run: Run, log: RunLog, progress: Progress, step_seconds: list[float]) -> None:
    """Say what the rest of the run will take at the measured speed, leaving out the steps that warmed up."""
    timed = step_seconds[len(step_seconds) // 2 :]
    seconds = (run.num_iterations - progress.step) * sum(timed) / len(timed)
    log.say(f"  {time_and_cost(seconds, run.config.price)} left at the speed of the first {len(step_seconds)} steps")


def time_and_cost(seconds: float, price: float | None) -> str:
    """Return "about 1.5 h and $12.00"; price: dollars per hour, None = no cost."""
    hours = seconds / 3600
    time_text = f"{hours:.1f} h" if hours >= 1 else f"{hours * 60:.1f} min"
    return f"about {time_text}" if price is None else f"about {time_text} and ${hours * price:,.2f}"


def is_due(step: int, every: int | None) -> bool:
    """Return whether something that happens every `every` steps happens at `step`; never at step 0."""
    return every is not None and every > 0 and step > 0 and step % every == 0


def validation_bpb(run: Run, step: int, val_loader: RowLoader) -> float:
    """Return the bits per byte of the validation rows. Raises ValueError when they are not finite."""
    wanted_rows = -(-run.config.eval_tokens // val_loader.sequence_len)
    micro_batches = val_loader.first_rows(min(wanted_rows, val_loader.rows_in_epoch))
    token_bytes = torch.tensor(run.tokenizer.token_bytes, device=run.compute.device)
    # On CPU compiling one more graph, for this batch without gradients, takes longer than all evaluations gain by it.
    stance = "force_eager" if run.compute.device.type == "cpu" else "default"
    was_training = run.model.training
    run.model.eval()
    with torch.compiler.set_stance(stance):
        bpb = evaluate_bpb(run.model, micro_batches, token_bytes, run.compute)
    run.model.train(was_training)
    if not math.isfinite(bpb):
        raise diverged(run, step, f"validation bits per byte are {bpb} after step {step}")
    return bpb


def train_step(
    run: Run, progress: Progress, micro_batches: list[MicroBatch], rows: int, began: float
) -> dict[str, Any]:
    """Make one step of `rows` rows over all ranks, of which this rank has `micro_batches`; return its metrics.

    began: when the wait for the rows began. Raises ValueError when the loss is not finite or memory runs out.
    """
    step = progress.step
    compute = run.compute
    model = run.model
    if model.config.dropout:
        # Dropout that follows from (seed, step, rank) is the same after a resume.
        torch.manual_seed(((run.config.seed << 40) + (step << 10) + compute.rank) % 2**63)
    with explain_out_of_memory(len(micro_batches[0][0])):
        # Rows may differ in how many targets count. Dividing by the number of all ranks' targets, each rank's loss is
        # its part of the mean over all, and gradients are summed over ranks, not averaged.
        counts = torch.stack([(targets_BT >= 0).sum() for _, targets_BT in micro_batches])
        n_targets = compute.all_reduce_sum(counts.sum().float()).clamp(min=1)
        part_losses = []
        for idx_BT, targets_BT in micro_batches:
            part_loss = model(idx_BT, targets_BT, loss_reduction="sum") / n_targets
            part_loss.backward()  # adds to the gradients of the micro-batches before
            part_losses.append(part_loss.detach())
        # `item` waits for the device. The loss is looked at before it can spoil the weights.
        mean_loss = compute.all_reduce_sum(torch.stack(part_losses).sum()).item()
        if not math.isfinite(mean_loss):
            bad = [i for i, part in enumerate(part_losses) if not torch.isfinite(part)]
            where = f"rows {step * rows} to {(step + 1) * rows - 1} (micro-batch {bad} of rank {compute.rank})"
            raise diverged(run, step, f"loss is {mean_loss} at step {step}, {where}")
        lr_mult = learning_rate_multiplier(run, step)
        grad_norm = update_weights(run, step, lr_mult)
    compute.synchronize()
    tokens = rows * model.config.sequence_len
    line = finish_step(run, progress, loss=mean_loss, lr_mult=lr_mult, tokens=tokens, dt=time.perf_counter() - began)
    if grad_norm is not None:
        line["grad_norm"] = grad_norm
    return line


def learning_rate_multiplier(run: Run, step: int) -> float:
    """Return the factor on all learning rates at `step`."""
    return recipe.learning_rate_multiplier(
        step,
        run.num_iterations,
        warmup=run.config.warmup_steps,
        warmdown=run.config.warmdown_ratio,
        final=run.config.final_lr_frac,
        schedule=run.config.schedule,
    )


def update_weights(run: Run, step: int, lr_mult: float) -> float | None:
    """Take one optimizer step with the momentum and weight decay of `step`; return the gradient norm if it clips."""
    return run.optimizer.step(
        step,
        lr_mult=lr_mult,
        momentum=recipe.muon_momentum(step, run.num_iterations, run.config.warmdown_ratio),
        wd_mult=recipe.weight_decay_multiplier(step, run.num_iterations),
        clip=run.config.grad_clip,
    )


def out_of_memory(rows: int) -> ValueError:
    """Return the error for a device that cannot take `rows` rows at once."""
    less = "--device-batch-size, --depth or --max-seq-len, or --activation-checkpointing"
    return ValueError(f"out of memory with {rows} rows at once: try a smaller {less}")


@contextlib.contextmanager
def explain_out_of_memory(rows: int) -> Iterator[None]:
    """Turn the device's out-of-memory error into a ValueError that names the remedy."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise out_of_memory(rows) from error
