"""A training run: its flags, what identifies it, how far it has come, and how it starts, stops and is recorded.

trainer.py and rl.py have a loop each and share this. `Run` holds what stays the same during a run, `Progress` what
changes; together they are all that a checkpoint must bring back, so that a resumed run goes on to the bit.
"""

import contextlib
import dataclasses
import os
import re
import signal
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from nanochat import checkpoint, recipe
from nanochat.cli import option, require_positive
from nanochat.common import get_base_dir, print0, write_record
from nanochat.compute import Compute
from nanochat.gpt import GPT
from nanochat.optim import MuonAdamW
from nanochat.run_log import RunLog, drop_lines_after
from nanochat.tokenizer import Tokenizer

# What a checkpoint must share with the run that goes on from it; the rest, such as learning rates, may change.
IDENTITY = ("model_config", "total_batch_size", "num_iterations", "dataset", "source", "rollouts")


@dataclass(frozen=True)
class TrainConfig:
    """Flags that every training stage has."""

    run: str | None = option(None, "name of a wandb run (WANDB_MODE=offline works); unset = no wandb")
    device_type: str | None = option(None, "cuda | mps | cpu; unset = the fastest there is", ("cuda", "mps", "cpu"))
    seed: int = option(1337, "seed of weights and data order")
    model_tag: str | None = option(None, "name of the run's checkpoints")
    device_batch_size: int | Literal["auto"] | None = option(
        None, "rows a device takes at once; auto or unset: on CUDA the most of 65,536 tokens that fit, else up to 32"
    )
    activation_checkpointing: bool | None = option(
        None, "recompute activations in the backward pass; unset = only if they do not fit"
    )
    total_batch_size: int | None = option(None, "tokens per step over all devices and micro-batches")
    num_iterations: int | None = option(None, "steps")
    embedding_lr: float = option(recipe.LEARNING_RATES["embedding"], "AdamW learning rate of the embeddings")
    unembedding_lr: float = option(recipe.LEARNING_RATES["unembedding"], "AdamW learning rate of the head")
    matrix_lr: float = option(recipe.LEARNING_RATES["matrix"], "Muon learning rate of the matrices")
    scalar_lr: float = option(recipe.LEARNING_RATES["scalar"], "AdamW learning rate of the scalars")
    weight_decay: float | None = option(None, "Muon weight decay; unset = from the recipe")
    schedule: str = option("linear", "how the learning rate falls", ("linear", "cosine"))
    warmup_steps: int = option(40, "steps of linear warmup, at most a tenth of the run")
    warmdown_ratio: float = option(0.65, "share of the run over which the linear schedule falls")
    final_lr_frac: float = option(0.05, "learning rate at the end, as a fraction")
    grad_clip: float | None = option(None, "largest gradient norm; unset = no clipping")
    eval_every: int = option(250, "steps between evaluations (0 = only at the end)")
    eval_tokens: int = option(20 * 2**19, "validation tokens, at most one pass over the validation set")
    sample_every: int = option(2000, "steps between samples (0 = only at the end)")
    save_every: int | None = option(None, "steps between checkpoints; unset = before every evaluation")
    keep: int = option(2, "newest checkpoints kept, beside the one with the best validation")
    resume: str | None = option(
        None, "continue from a step; alone: from the newest; auto: from the newest if there is one", bare="newest"
    )
    compile: bool = option(True, "fuse with torch.compile where a compiler is there")
    fp8: bool = option(False, "matrix products of the blocks in fp8 (Ada, Hopper or later)")
    price: float | None = option(None, "dollars per hour of all machines together, to say what the run will cost")

    def __post_init__(self) -> None:
        require_positive(self, "total_batch_size", "num_iterations", "grad_clip", "save_every", "keep", "eval_tokens")
        require_positive(self, "eval_every", "sample_every", "warmup_steps", "seed", "weight_decay", "price", zero=True)
        require_positive(self, "embedding_lr", "unembedding_lr", "matrix_lr", "scalar_lr", zero=True)
        if self.device_batch_size != "auto":
            require_positive(self, "device_batch_size")
        if self.seed >= 2**63:
            raise ValueError(f"--seed {self.seed}: must be below 2**63")
        if self.model_tag is not None and not re.fullmatch(r"\w[\w.-]*", self.model_tag):
            raise ValueError(f"--model-tag {self.model_tag!r}: use letters, digits, '_', '-' and '.' only")
        if not 0 <= self.warmdown_ratio <= 1 or not 0 <= self.final_lr_frac <= 1:
            raise ValueError("--warmdown-ratio and --final-lr-frac must be between 0 and 1")
        if self.resume is not None and self.resume not in ("newest", "auto") and not self.resume.isdigit():
            raise ValueError(f"--resume {self.resume}: give a step, or nothing for the newest checkpoint, or auto")


@dataclass(frozen=True)
class Run:
    """What stays the same during a run. `meta` goes into every checkpoint and into run.json."""

    stage: str
    tag: str
    config: TrainConfig
    model: GPT
    optimizer: MuonAdamW
    tokenizer: Tokenizer
    compute: Compute
    num_iterations: int
    meta: dict[str, Any]

    @property
    def folder(self) -> Path:
        """The folder of metrics.jsonl and run.json."""
        return get_base_dir() / "runs" / self.stage / self.tag


@dataclass
class Progress:
    """How far a run has come. A new run has nothing worth saving at step 0, so that counts as saved."""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    saved_step: int = 0
    val_bpb: float | None = None  # of the newest evaluation


def describe(
    config: TrainConfig,
    model: GPT,
    tokenizer: Tokenizer,
    total_batch_size: int,
    num_iterations: int,
    meta: dict[str, Any],
) -> dict[str, Any]:
    """Return what every checkpoint of a run says of it: `meta`, and what can be read off the other arguments."""
    return {
        **meta,
        "model_config": dataclasses.asdict(model.config),
        "tokenizer_hash": tokenizer.hash,
        "config": dataclasses.asdict(config),
        "total_batch_size": total_batch_size,
        "num_iterations": num_iterations,
    }


def start_or_resume(run: Run) -> Progress:
    """Begin at step 0, setting an earlier run of this name aside, or load the checkpoint that --resume names.

    Raises ValueError when there is no such checkpoint, or when it belongs to a run with other flags or tokenizer.
    """
    wanted = run.config.resume
    if wanted is None or (wanted == "auto" and not has_own_checkpoint(run)):
        if run.compute.rank == 0:
            checkpoint.set_aside(run.stage, run.tag)
            run.folder.mkdir(parents=True, exist_ok=True)
        run.compute.barrier()
        return Progress()
    step = int(wanted) if wanted.isdigit() else checkpoint.newest_whole(run.stage, run.tag)
    meta = checkpoint.read_meta(run.stage, run.tag, step)
    checkpoint.check_tokenizer(meta, run.tokenizer)
    for name in IDENTITY:
        before, now = meta.get(name), run.meta.get(name)
        if before != now:
            raise ValueError(f"--resume: this run began with {name} {before}, now it is {now}: give the same flags")
    checkpoint.load_weights(run.stage, run.tag, step, run.model)
    run.optimizer.load_state_dicts(checkpoint.load_optimizer_shares(run.stage, run.tag, step, run.compute.device))
    if run.compute.rank == 0:
        drop_lines_after(run.folder, step)
    print0(f"resumed {run.stage}/{run.tag} at step {step} of {run.num_iterations}")
    return Progress(
        step=step,
        # checkpoints of older versions do not count tokens
        tokens=meta.get("tokens", step * run.meta["total_batch_size"]),
        seconds=meta["seconds"],
        saved_step=step,
        val_bpb=meta["val_bpb"],
    )


def has_own_checkpoint(run: Run) -> bool:
    """Return whether this very run, and not another one of the same tag, has left a whole checkpoint."""
    try:
        step = checkpoint.newest_whole(run.stage, run.tag)
        meta = checkpoint.read_meta(run.stage, run.tag, step)
    except ValueError:
        return False
    same = all(meta.get(name) == run.meta.get(name) for name in IDENTITY)
    return same and meta["tokenizer_hash"] == run.tokenizer.hash


def open_log(run: Run, first_step: int) -> RunLog:
    """Open the run's log at step `first_step`."""
    return RunLog(
        run.folder,
        title=f"{run.stage} {run.tag}",
        first_step=first_step,
        num_iterations=run.num_iterations,
        wandb_name=run.config.run,
        config=run.meta,
        rank=run.compute.rank,
    )


@dataclass
class StopRequest:
    """Whether a signal has asked the run to stop."""

    requested: bool = False


@contextlib.contextmanager
def stop_signals() -> Iterator[StopRequest]:
    """Turn the first SIGINT or SIGTERM into a request to stop after the step in hand; a second one ends at once."""
    stop = StopRequest()

    def handle(signum: int, frame: Any) -> None:
        # torchrun sends its workers a signal twice, which is not the user's impatience
        if stop.requested and "TORCHELASTIC_RUN_ID" not in os.environ:
            raise KeyboardInterrupt
        stop.requested = True
        print0(f"\n{signal.Signals(signum).name}: saving after this step, once more ends at once", file=sys.stderr)

    previous = {signum: signal.signal(signum, handle) for signum in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for signum, handler in previous.items():
            signal.signal(signum, handler)


def save(run: Run, progress: Progress) -> None:
    """Write a checkpoint of this step, unless it has one; every rank calls this. Raises OSError on a full disk."""
    if progress.step == progress.saved_step:
        return
    meta = {**run.meta, "val_bpb": None, "seconds": progress.seconds, "tokens": progress.tokens}
    checkpoint.save(run.stage, run.tag, progress.step, run.model, run.optimizer.state_dict(), meta, run.compute)
    progress.saved_step = progress.step


def record_evaluation(run: Run, progress: Progress, log: RunLog, metrics: dict[str, Any]) -> None:
    """Write an evaluation to the log and, if this step has a checkpoint, into its meta.json."""
    progress.val_bpb = metrics["val_bpb"]
    if run.compute.rank == 0 and progress.step > 0 and progress.step == progress.saved_step:
        checkpoint.update_meta(run.stage, run.tag, progress.step, metrics)
    log.write({"step": progress.step, **metrics})


def finish_step(run: Run, progress: Progress, *, loss: float, lr_mult: float, tokens: int, dt: float) -> dict[str, Any]:
    """Count the step just made, of `tokens` tokens in `dt` seconds, and return its line of metrics.jsonl.

    `mfu`, model FLOPs utilization, is None where the device's peak is unknown.
    """
    progress.step += 1
    progress.tokens += tokens
    progress.seconds += dt
    tok_per_sec = tokens / dt
    peak = run.compute.peak_flops
    mfu = None if peak is None else tok_per_sec * run.model.flops_per_token() / (peak * run.compute.world_size)
    return {
        "step": progress.step,
        "loss": loss,
        "lr_mult": lr_mult,
        "tokens": progress.tokens,
        "tok_per_sec": tok_per_sec,
        "mfu": mfu,
        "dt": dt,
        "peak_mem_bytes": run.compute.peak_memory(),
    }


def diverged(run: Run, step: int, what: str) -> ValueError:
    """Return the error that ends a diverged run and names the newest checkpoint that is still sound.

    A checkpoint of this very step holds the weights that gave the loss, so only earlier ones are.
    """
    sound = [saved for saved in checkpoint.list_steps(run.stage, run.tag) if saved < step]
    again = f"--resume {sound[-1]}" if sound else "begin again"
    return ValueError(f"{what}: lower the learning rates or set --grad-clip, then {again}")


def write_run_record(run: Run, progress: Progress, plan: dict[str, Any]) -> None:
    """Write run.json: configuration, result, time and memory of the whole run. plan: how a device took its rows."""
    if run.compute.rank != 0:
        return
    record = {
        "stage": run.stage,
        "tag": run.tag,
        **run.meta,
        "val_bpb": progress.val_bpb,
        "parameters": sum(p.numel() for p in run.model.parameters()),
        "plan": plan,
        "peak_mem_bytes": run.compute.peak_memory(),
        "wall_seconds": progress.seconds,
    }
    write_record(run.folder / "run.json", record)
