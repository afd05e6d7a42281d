"""A training run: what identifies it, how far it has come, and what it leaves on disk.

trainer.py and rl.py each have a loop of their own over one `Run`:

    run.start_or_resume()          step 0, or the checkpoint that --resume names
    run.save()                     checkpoints/<stage>/<tag>/step_<n>/
    run.record_evaluation(...)     a line of runs/<stage>/<tag>/metrics.jsonl
    run.record_step(...)           likewise, and the run is one step further
    run.finish(...)                runs/<stage>/<tag>/run.json

A checkpoint holds the weights, the optimizer's state and this object's progress, which is a handful of numbers. Data
order and random numbers follow from (seed, step), so a resumed run goes on to the bit.
"""

import dataclasses
import json
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nanochat import checkpoint
from nanochat.common import atomic_write, get_base_dir, print0, write_record
from nanochat.compute import Compute
from nanochat.gpt import GPT, GPTConfig
from nanochat.kernels import Kernels, choose_kernels, load_kernels
from nanochat.optim import MuonAdamW
from nanochat.recipe import TrainConfig
from nanochat.tokenizer import Tokenizer

WARMUP_STEPS = 10  # compile kernels and wait for the first rows; the reference's clock leaves them out

# A checkpoint must share these with the run that goes on from it; the rest, such as learning rates, may change.
IDENTITY = (
    "model_config",
    "tokenizer_hash",
    "total_batch_size",
    "num_iterations",
    "dataset",
    "data_hash",
    "source",
    "rollouts",
)


@dataclass
class Run:
    """One training run. The first fields never change; a checkpoint brings back the progress at the end."""

    stage: str  # base | mid | sft | rl
    tag: str
    config: TrainConfig
    model: GPT
    optimizer: MuonAdamW
    tokenizer: Tokenizer
    compute: Compute
    total_batch_size: int  # tokens per step
    num_iterations: int  # steps
    facts: dict[str, Any]  # what else a checkpoint says: dataset, depth, and the source that fine-tuning started from

    step: int = 0
    tokens: int = 0  # trained on so far
    seconds: float = 0.0  # of all training steps so far
    steady_seconds: float = 0.0  # of those after the first WARMUP_STEPS
    saved_step: int = 0  # a new run has nothing worth saving at step 0, so that counts as saved
    evaluated_step: int | None = None
    val_bpb: float | None = None  # of the newest evaluation
    stop_requested: bool = False  # by a signal
    abandonable: bool = False  # the work in progress may be abandoned at any moment: see `abandoned_on_signal`
    log: "RunLog | None" = None  # rank 0 has one, between start_or_resume and close

    @property
    def folder(self) -> Path:
        """The folder of metrics.jsonl and run.json."""
        return get_base_dir() / "runs" / self.stage / self.tag

    @property
    def meta(self) -> dict[str, Any]:
        """The facts that every checkpoint and run.json state about this run."""
        return {
            **self.facts,
            "model_config": dataclasses.asdict(self.model.config),
            "tokenizer_hash": self.tokenizer.hash,
            "config": dataclasses.asdict(self.config),
            "kernels": self.model.kernels.record,
            "total_batch_size": self.total_batch_size,
            "num_iterations": self.num_iterations,
        }

    # --- beginning

    def start_or_resume(self) -> None:
        """Begin at step 0, setting an earlier run of this name aside, or load the checkpoint that --resume names.

        Raises ValueError when there is no such checkpoint, or when it belongs to a run with other flags or tokenizer.
        """
        meta = self._meta_to_resume()
        self.compute.barrier()  # every rank has looked at the checkpoints before rank 0 moves them
        if meta is not None:
            self._load(meta)
        elif self.compute.rank == 0:
            checkpoint.set_aside(self.stage, self.tag)
            self.folder.mkdir(parents=True, exist_ok=True)
        if self.compute.rank == 0:
            self.log = RunLog(self)

    def _meta_to_resume(self) -> dict[str, Any] | None:
        """Return the meta of the checkpoint to go on from, or None to begin anew."""
        wanted = self.config.resume
        if wanted is None:
            return None
        if wanted == "newest":
            return checkpoint.newest(self.stage, self.tag)
        if wanted == "auto":
            try:
                meta = checkpoint.newest(self.stage, self.tag)
            except ValueError:
                return None
            # A checkpoint of another run with the same tag is no reason to stop: this run begins anew.
            return None if self._difference(meta) else meta
        return checkpoint.read_meta(self.stage, self.tag, int(wanted))

    def _difference(self, meta: dict[str, Any]) -> str:
        """Say in which part of its identity a checkpoint differs from this run; "" if in none."""
        mine = self.meta
        for name in IDENTITY:
            # A checkpoint of an older version does not say everything.
            if name in meta and meta[name] != mine.get(name):
                return f"this run began with {name} {meta[name]}, now it is {mine.get(name)}"
        return ""

    def _load(self, meta: dict[str, Any]) -> None:
        checkpoint.check_tokenizer(meta, self.tokenizer)
        if difference := self._difference(meta):
            raise ValueError(f"--resume: {difference}: give the same flags and text")
        step = meta["step"]
        checkpoint.load_weights(self.stage, self.tag, step, self.model)
        shares = checkpoint.load_optimizer_shares(self.stage, self.tag, step, self.compute.device)
        self.optimizer.load_state_dicts(shares)
        self.step = step
        self.saved_step = step
        self.seconds = meta["seconds"]
        # Checkpoints of older versions have one clock.
        self.steady_seconds = meta.get("steady_seconds", self.seconds)
        # Checkpoints of older versions do not count tokens.
        self.tokens = meta.get("tokens", step * self.total_batch_size)
        self.val_bpb = meta["val_bpb"]
        if self.val_bpb is not None:
            self.evaluated_step = step
        if self.compute.rank == 0:
            drop_lines_after(self.folder / "metrics.jsonl", step, evaluated=self.evaluated_step == step)
        print0(f"resumed {self.stage}/{self.tag} at step {step} of {self.num_iterations}")

    # --- under way

    def save(self) -> None:
        """Write a checkpoint of this step, unless it has one; every rank calls this. Raises OSError on a full disk."""
        if self.step == self.saved_step:
            return
        meta = {
            **self.meta,
            "val_bpb": None,
            "seconds": self.seconds,
            "steady_seconds": self.steady_seconds,
            "tokens": self.tokens,
        }
        state = self.optimizer.state_dict()
        checkpoint.save(self.stage, self.tag, self.step, self.model, state, meta, self.compute)
        self.saved_step = self.step

    def prune(self) -> None:
        """Delete old checkpoints if this step has a new one. Call it after evaluating, which may find a new best."""
        if self.step == self.saved_step and self.compute.rank == 0:
            checkpoint.prune(self.stage, self.tag, self.config.keep)

    def record_evaluation(self, metrics: dict[str, Any]) -> None:
        """Write an evaluation to the log and, if this step has a checkpoint, into its meta.json."""
        self.evaluated_step = self.step
        self.val_bpb = metrics["val_bpb"]
        if self.log is None:
            return
        # The log first: a run that is killed in between evaluates again, and drops the line of the first time. The
        # other way round the checkpoint would say that this step was evaluated, and the line would be missing for ever.
        self.log.write({"step": self.step, **metrics})
        if self.step > 0 and self.step == self.saved_step:
            checkpoint.update_meta(self.stage, self.tag, self.step, metrics)
        scores = [f"{name} {value:.4f}" for name, value in metrics.items() if isinstance(value, float)]
        self.log.say(f"step {self.step}: {', '.join(scores)}")

    def record_step(
        self,
        *,
        loss: float,
        lr_mult: float,
        tokens: int,
        flops: float | None,
        seconds: float,
        epoch: int,
        more: dict[str, Any],
    ) -> None:
        """Count the step just made, of `tokens` tokens and `flops` operations, and log it.

        `mfu`, model FLOPs utilization, is None where `flops` or the device's peak is unknown. more: further metrics.
        """
        self.step += 1
        self.tokens += tokens
        self.seconds += seconds
        if self.step > WARMUP_STEPS:
            self.steady_seconds += seconds
        peak = self.compute.peak_flops
        mfu = None
        if flops is not None and peak is not None:
            mfu = flops / seconds / (peak * self.compute.world_size)
        if self.log is None:
            return
        line = {
            "step": self.step,
            "loss": loss,
            "lr_mult": lr_mult,
            "tokens": self.tokens,
            "tok_per_sec": tokens / seconds,
            "mfu": mfu,
            "dt": seconds,
            "peak_mem_bytes": self.compute.peak_memory(),
            "epoch": epoch,
            **more,
        }
        self.log.write(line)
        self.log.show_step(line, self.num_iterations)

    def diverged(self, what: str) -> ValueError:
        """Return the error that ends a diverged run and names the newest checkpoint that is still sound.

        A checkpoint of this very step holds the weights that gave the loss, so only earlier ones are sound.
        """
        sound = [saved for saved in checkpoint.list_steps(self.stage, self.tag) if saved < self.step]
        again = f"--resume {sound[-1]}" if sound else "begin again"
        return ValueError(f"{what}: lower the learning rates or set --grad-clip, then {again}")

    # --- ending

    def finish(self, plan: dict[str, Any]) -> None:
        """Write run.json: configuration, result, time and memory of the whole run. plan: how a device took its rows."""
        if self.compute.rank != 0:
            return
        record = {
            "stage": self.stage,
            "tag": self.tag,
            **self.meta,
            "val_bpb": self.val_bpb,
            "parameters": sum(p.numel() for p in self.model.parameters()),
            "plan": plan,
            "peak_mem_bytes": self.compute.peak_memory(),
            "wall_seconds": self.seconds,
            "steady_seconds": self.steady_seconds,
        }
        write_record(self.folder / "run.json", record)

    def close(self) -> None:
        """Close the log."""
        if self.log is not None:
            self.log.close()


class RunLog:
    """The log of a run: metrics.jsonl for programs, wandb where --run asks for it, and lines on the screen for people.

    On a terminal the line of a step overwrites that of the step before; a file gets about fifty lines for a whole run.
    """

    def __init__(self, run: Run) -> None:
        """Open metrics.jsonl for appending. Raises ValueError when wandb is wanted and cannot be used."""
        self.wandb = start_wandb(run.config.run, run.meta, run.folder) if run.config.run else None
        self.live = sys.stdout.isatty()
        # Line buffering: a killed run loses at most the line in hand.
        self.file = open(run.folder / "metrics.jsonl", "a", encoding="utf-8", buffering=1)  # noqa: SIM115

    def write(self, line: dict[str, Any]) -> None:
        """Append a line to metrics.jsonl and wandb."""
        self.file.write(json.dumps(line) + "\n")
        if self.wandb is not None:
            self.wandb.log(line, step=line["step"])

    def show_step(self, line: dict[str, Any], num_iterations: int) -> None:
        """Show a step's metrics on the screen."""
        step = line["step"]
        scores = [f"{name} {line[name]:.4f}" for name in ("loss", "reward") if name in line]
        mfu = "n/a" if line["mfu"] is None else f"{line['mfu']:.1%}"
        minutes_left = (num_iterations - step) * line["dt"] / 60
        text = (
            f"step {step:5d}/{num_iterations} | {', '.join(scores)} | lr x{line['lr_mult']:.3f} | "
            f"{line['tok_per_sec']:,.0f} tok/s | mfu {mfu} | epoch {line['epoch']} | {minutes_left:.1f} min left"
        )
        # The first three steps show that a run has begun.
        if step <= 3 or step == num_iterations or step % max(1, num_iterations // 50) == 0:
            self.say(text)
        elif self.live:
            width = shutil.get_terminal_size().columns - 1
            print(f"{text[:width]}\x1b[K", end="\r", flush=True)

    def say(self, text: str) -> None:
        """Print a line. \\x1b[K clears what a longer live line has left on its right."""
        print(f"{text}\x1b[K" if self.live else text, flush=True)

    def close(self) -> None:
        """Close the file and the wandb run."""
        self.file.close()
        if self.wandb is not None:
            self.wandb.finish()


def start_wandb(name: str, config: dict[str, Any], folder: Path) -> Any:
    """Start the wandb run `name`; raises ValueError when wandb is not installed or refuses."""
    try:
        import wandb
    except ImportError as error:
        raise ValueError(f"--run {name} needs wandb: pip install wandb, or leave --run out") from error
    try:
        wandb.init(project="nanochat", name=name, config=config, dir=str(folder))
    except wandb.Error as error:
        raise ValueError(f"--run {name}: {error}: log in to wandb, or set WANDB_MODE=offline") from error
    return wandb


def drop_lines_after(path: Path, step: int, evaluated: bool) -> None:
    """Remove the metrics that a run resumed at `step` will write again, and a line that a kill has cut short.

    evaluated: the checkpoint has the evaluation of its step; otherwise that will be repeated too.
    """
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    kept = []
    for text in lines:
        try:
            line = json.loads(text)
        except json.JSONDecodeError:
            continue
        is_evaluation = "dt" not in line  # only the line of a training step has the time that it took
        if line["step"] < step or (line["step"] == step and (evaluated or not is_evaluation)):
            kept.append(text + "\n")
    atomic_write(path, "".join(kept))


def agreed_kernels(stage: str, tag: str, config: TrainConfig, model_config: GPTConfig, compute: Compute) -> Kernels:
    """Return the kernels that all ranks of a run train with: those that it began with if it is resumed, else new ones.

    Rank 0 chooses for all, because timings differ between ranks. Raises what `choose_kernels` raises.
    """

    def choose() -> dict[str, Any]:
        recorded = None
        if config.resume is not None:
            step = int(config.resume) if config.resume.isdigit() else None
            # Checkpoints of older versions do not record their kernels.
            recorded = checkpoint.peek_meta(stage, tag, step).get("kernels")
        kernels = choose_kernels(
            compute.device,
            width=model_config.n_embd,
            head_dim=model_config.head_dim,
            windowed=model_config.has_windows,
            compiled=config.compile,
            fp8_products=config.fp8,
            recorded=recorded,
        )
        return kernels.record

    return load_kernels(compute.from_rank_0(choose), compute.device)
