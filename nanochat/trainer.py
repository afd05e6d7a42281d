"""The one training loop, for pretraining, midtraining and fine-tuning: step, schedule, evaluate, log, save, resume."""

import contextlib
import dataclasses
import json
import math
import os
import re
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from nanochat import checkpoint, recipe
from nanochat.cli import option
from nanochat.common import atomic_write, get_base_dir, print0, write_record
from nanochat.compute import Compute
from nanochat.dataloader import MicroBatch, RowLoader, TokenShard
from nanochat.gpt import GPT
from nanochat.loss_eval import evaluate_bpb
from nanochat.optim import MuonAdamW
from nanochat.tokenizer import Tokenizer

# what a checkpoint must share with the run that goes on from it
_IDENTITY = ("model_config", "total_batch_size", "num_iterations", "dataset", "source")


@dataclass(frozen=True)
class TrainConfig:
    """Flags that every training stage has."""

    run: str | None = option(None, "name of a wandb run (WANDB_MODE=offline works); unset = no wandb")
    device_type: str | None = option(None, "cuda | mps | cpu; unset = the fastest there is", ("cuda", "mps", "cpu"))
    seed: int = option(1337, "seed of weights and data order")
    model_tag: str | None = option(None, "name of the run's checkpoints")
    device_batch_size: int | None = option(None, "rows a device takes at once; unset = up to 32 that divide the batch")
    total_batch_size: int | None = option(None, "tokens a step over all devices and accumulation steps")
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
        None, "go on from a step; alone: from the newest whole checkpoint; auto: if there is one", bare="newest"
    )
    compile: bool = option(True, "fuse with torch.compile where a compiler is there")

    def __post_init__(self) -> None:
        positive = ("device_batch_size", "total_batch_size", "num_iterations", "grad_clip", "save_every", "keep")
        self.require_positive(*positive, "eval_tokens")
        self.require_positive("eval_every", "sample_every", "warmup_steps", "seed", "weight_decay", zero=True)
        self.require_positive("embedding_lr", "unembedding_lr", "matrix_lr", "scalar_lr", zero=True)
        if self.seed >= 2**63:
            raise ValueError(f"--seed {self.seed}: must be below 2**63")
        if self.model_tag is not None and not re.fullmatch(r"\w[\w.-]*", self.model_tag):
            raise ValueError(f"--model-tag {self.model_tag!r}: use letters, digits, '_', '-' and '.' only")
        if not 0 <= self.warmdown_ratio <= 1 or not 0 <= self.final_lr_frac <= 1:
            raise ValueError("--warmdown-ratio and --final-lr-frac must be between 0 and 1")
        if self.resume is not None and self.resume not in ("newest", "auto") and not self.resume.isdigit():
            raise ValueError(f"--resume {self.resume}: give a step, or nothing for the newest checkpoint, or auto")

    def require_positive(self, *names: str, zero: bool = False) -> None:
        """Raise ValueError for the first of these flags that is set to 0 or less (with `zero`: less than 0) or NaN."""
        for name in names:
            value = getattr(self, name)
            if value is not None and not (value > 0 or (zero and value == 0)):
                wanted = "0 or more" if zero else "above 0"
                raise ValueError(f"--{name.replace('_', '-')} {value}: must be {wanted}")


def can_compile(device: torch.device) -> bool:
    """Whether torch.compile has what it needs: a C++ compiler on CPU, Triton on CUDA."""
    if device.type == "cpu":
        return any(shutil.which(name) for name in (os.environ.get("CXX") or "g++", "clang++"))
    return device.type == "cuda"


def _start_wandb(name: str, config: dict[str, Any], folder: Path) -> Any:
    try:
        import wandb

        wandb.init(project="nanochat", name=name, config=config, dir=str(folder))
    except ImportError as error:
        raise ValueError(f"--run {name} needs wandb: pip install wandb, or leave --run out") from error
    except wandb.Error as error:
        raise ValueError(f"--run {name}: {error}: log in to wandb, or set WANDB_MODE=offline") from error
    return wandb


def rows_per_device(wanted: int | None, total_tokens: int, sequence_len: int, world_size: int) -> tuple[int, int]:
    """(rows a step, rows a device takes at once). Raises ValueError when the sizes do not divide."""
    rows, rest = divmod(total_tokens, sequence_len)
    if rest or rows % world_size:
        raise ValueError(
            f"--total-batch-size {total_tokens} is not a whole number of rows of {sequence_len} tokens on each of "
            f"{world_size} processes: make it a multiple of {sequence_len * world_size}"
        )
    share = rows // world_size
    device_rows = wanted or max(n for n in range(1, min(32, share) + 1) if share % n == 0)
    return rows, device_rows


class Trainer:
    """Trains `model` on `shards` for `config.num_iterations` steps and leaves checkpoints and metrics behind."""

    def __init__(
        self,
        stage: str,
        tag: str,
        config: TrainConfig,
        model: GPT,
        tokenizer: Tokenizer,
        train_shards: list[TokenShard],
        val_shards: list[TokenShard],
        compute: Compute,
        total_batch_size: int,
        num_iterations: int,
        weight_decay: float,
        lr_scale: float,
        meta: dict[str, Any],
        evaluate: Callable[[int], dict[str, Any]] | None = None,
        sample: Callable[[], None] | None = None,
    ) -> None:
        """`meta` goes into every checkpoint; `evaluate(step)` adds metrics to an evaluation; `sample()` prints some."""
        self.stage, self.tag, self.config, self.model, self.compute = stage, tag, config, model, compute
        self.tokenizer, self.steps, self.evaluate, self.sample = tokenizer, num_iterations, evaluate, sample
        T = model.config.sequence_len
        rows, device_rows = rows_per_device(config.device_batch_size, total_batch_size, T, compute.world_size)
        place = {"rank": compute.rank, "world_size": compute.world_size, "device": compute.device}
        self.loader = RowLoader(train_shards, T, rows, device_rows, config.seed, **place)
        self.val_loader = RowLoader(val_shards, T, device_rows * compute.world_size, device_rows, 0, **place)
        lrs = {
            name: getattr(config, f"{name}_lr") * lr_scale for name in ("matrix", "embedding", "unembedding", "scalar")
        }
        self.optimizer = MuonAdamW(model, lrs, weight_decay, compute)
        self.meta = {
            **meta,
            "model_config": dataclasses.asdict(model.config),
            "tokenizer_hash": tokenizer.hash,
            "config": dataclasses.asdict(config),
            "total_batch_size": total_batch_size,
            "num_iterations": num_iterations,
            "val_bpb": None,
        }
        self.token_bytes = torch.tensor(tokenizer.token_bytes, device=compute.device)
        self.tokens_per_step = total_batch_size
        self.run_dir = get_base_dir() / "runs" / stage / tag
        self.step, self.saved_step, self.seconds = 0, 0, 0.0
        self.stopped: int | None = None

    # The loop.

    def run(self) -> None:
        """Train to the end. Raises KeyboardInterrupt after saving when told to stop by SIGINT or SIGTERM."""
        config = self.config
        self._begin()
        self.model.train()
        if config.compile and can_compile(self.compute.device):
            self.model.compile_blocks()
        elif config.compile:
            print0("torch.compile is off: no C++ compiler (installing g++ makes it faster)")
        first = self.step
        with self._signals(), self._log() as log, contextlib.closing(self.loader):
            rows = self.loader.iterate(self.step)
            while True:
                last = self.step == self.steps

                def due(every: int | None) -> bool:
                    return self.step == self.steps or bool(self.step and every and self.step % every == 0)

                if due(config.save_every or config.eval_every):
                    self._save()  # before evaluating: a crash there costs nothing
                if due(config.eval_every) and not (self.step == first and self.meta["val_bpb"] is not None):
                    log({"step": self.step, **self._evaluate()})
                if self.step == self.saved_step and self.compute.rank == 0:
                    checkpoint.prune(self.stage, self.tag, config.keep)
                if self.sample and due(config.sample_every) and (last or self.step != first):
                    self.sample()
                if last:
                    break
                if self.compute.any_rank(self.stopped is not None):
                    self._save()
                    raise KeyboardInterrupt
                log(self._train_step(rows))
        self._record()

    def _train_step(self, rows: Iterator[tuple[int, list[MicroBatch]]]) -> dict[str, Any]:
        """One optimizer step on this rank's next rows; the gradient is of the mean loss over all ranks' targets."""
        config, began = self.config, time.perf_counter()  # the wait for rows is part of a step
        _, micro_batches = next(rows)
        if self.model.config.dropout:
            torch.manual_seed(((config.seed << 40) + (self.step << 10) + self.compute.rank) % 2**63)
        counted = torch.stack([(targets >= 0).sum() for _, targets in micro_batches]).sum()
        counted = self.compute.all_reduce_sum(counted.float()).clamp(min=1)
        losses = []
        for idx_BT, targets_BT in micro_batches:
            loss = self.model(idx_BT, targets_BT, loss_reduction="sum") / counted
            losses.append(loss.detach())
            loss.backward()
        loss = self.compute.all_reduce_sum(torch.stack(losses).sum()).item()
        if not math.isfinite(loss):
            bad = [i for i, part in enumerate(losses) if not torch.isfinite(part)]
            raise self._diverged(
                f"loss is {loss} at step {self.step}, rows {self.step * self.loader.rows_per_step} to "
                f"{(self.step + 1) * self.loader.rows_per_step - 1} (micro-batch {bad} of rank {self.compute.rank})"
            )
        schedule = (config.warmup_steps, config.warmdown_ratio, config.final_lr_frac, config.schedule)
        lr_mult = recipe.learning_rate_multiplier(self.step, self.steps, *schedule)
        momentum = recipe.muon_momentum(self.step, self.steps, config.warmdown_ratio)
        decay_mult = recipe.weight_decay_multiplier(self.step, self.steps)
        norm = self.optimizer.step(self.step, lr_mult, momentum, decay_mult, config.grad_clip)
        self.compute.synchronize()
        dt = time.perf_counter() - began
        self.step, self.seconds = self.step + 1, self.seconds + dt
        speed, peak = self.tokens_per_step / dt, self.compute.peak_flops
        mfu = speed * self.model.flops_per_token() / (peak * self.compute.world_size) if peak else None
        record = {
            "step": self.step,
            "loss": loss,
            "lr_mult": lr_mult,
            "tokens": self.step * self.tokens_per_step,
            "tok_per_sec": speed,
            "mfu": mfu,
            "dt": dt,
            "peak_mem_bytes": self.compute.peak_memory(),
            "epoch": self.loader.epoch(self.step - 1),
        }
        return record if norm is None else {**record, "grad_norm": norm}

    def _diverged(self, what: str) -> ValueError:
        """The error that ends a run: a checkpoint of this very step is spoilt, one before it led to a finite loss."""
        sound = [step for step in checkpoint.list_steps(self.stage, self.tag) if step < self.step]
        again = f"--resume {sound[-1]}" if sound else "begin again"
        return ValueError(f"{what}: lower the learning rates or set --grad-clip, then {again}")

    def _evaluate(self) -> dict[str, Any]:
        """Bits per byte of the validation rows, and what `evaluate` adds."""
        rows = min(-(-self.config.eval_tokens // self.loader.sequence_len), self.val_loader.rows_in_epoch)
        batches = self.val_loader.first_rows(rows)
        self.model.eval()
        # on CPU one more graph costs more seconds to compile than its evaluations save
        stance = "force_eager" if self.compute.device.type == "cpu" else "default"
        with torch.compiler.set_stance(stance):
            bpb = evaluate_bpb(self.model, batches, self.token_bytes, self.compute)
            metrics = {"val_bpb": bpb, **(self.evaluate(self.step) if self.evaluate else {})}
        if not math.isfinite(bpb):
            raise self._diverged(f"validation bits per byte are {bpb} after step {self.step}")
        self.model.train()
        self.meta["val_bpb"] = bpb
        if self.compute.rank == 0 and self.step == self.saved_step:
            checkpoint.update_meta(self.stage, self.tag, self.step, **metrics)
        return metrics

    # Beginning, saving, ending.

    def _begin(self) -> None:
        wanted = self.config.resume
        if wanted is None or (wanted == "auto" and not self._has_own_checkpoint()):
            if self.compute.rank == 0:
                checkpoint.set_aside(self.stage, self.tag)
                self.run_dir.mkdir(parents=True, exist_ok=True)
            self.compute.barrier()
            return
        self.step = int(wanted) if wanted.isdigit() else checkpoint.newest_whole(self.stage, self.tag)
        meta = checkpoint.read_meta(self.stage, self.tag, self.step)
        checkpoint.check_tokenizer(meta, self.tokenizer)
        for name in _IDENTITY:
            if meta.get(name) != self.meta.get(name):
                began, now = meta.get(name), self.meta.get(name)
                raise ValueError(f"--resume: this run began with {name} {began}, now it is {now}: give the same flags")
        checkpoint.load_state(self.stage, self.tag, self.step, self.model)
        checkpoint.load_optimizer(self.stage, self.tag, self.step, self.optimizer)
        self.saved_step, self.seconds, self.meta["val_bpb"] = self.step, meta["seconds"], meta["val_bpb"]
        if self.compute.rank == 0:
            self._forget_after(self.step)
        print0(f"resumed {self.stage}/{self.tag} at step {self.step} of {self.steps}")

    def _has_own_checkpoint(self) -> bool:
        """Whether this very run, and not another one of the same tag, has left a whole checkpoint."""
        try:
            meta = checkpoint.read_meta(self.stage, self.tag, checkpoint.newest_whole(self.stage, self.tag))
        except ValueError:
            return False
        same = all(meta.get(name) == self.meta.get(name) for name in _IDENTITY)
        return same and meta["tokenizer_hash"] == self.tokenizer.hash

    def _forget_after(self, step: int) -> None:
        """Drop the metrics of steps that will be made again, and a line that a kill cut short."""
        path = self.run_dir / "metrics.jsonl"
        kept = []
        for line in path.read_text().splitlines() if path.exists() else ():
            with contextlib.suppress(json.JSONDecodeError):
                if json.loads(line)["step"] <= step:
                    kept.append(line + "\n")
        atomic_write(path, "".join(kept))

    def _save(self) -> None:
        if self.step == self.saved_step:
            return
        meta = {**self.meta, "val_bpb": None, "seconds": self.seconds}
        checkpoint.save(self.stage, self.tag, self.step, self.model, self.optimizer, meta, self.compute)
        self.saved_step = self.step

    def _record(self) -> None:
        if self.compute.rank == 0:
            parameters = sum(p.numel() for p in self.model.parameters())
            record = {"stage": self.stage, "tag": self.tag, **self.meta, "parameters": parameters}
            write_record(self.run_dir / "run.json", {**record, "wall_seconds": self.seconds})

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        """The first SIGINT or SIGTERM ends the run after the step in hand, with a checkpoint; a second one at once."""

        def stop(signum: int, frame: Any) -> None:
            if self.stopped is not None and "TORCHELASTIC_RUN_ID" not in os.environ:  # torchrun repeats signals
                raise KeyboardInterrupt
            self.stopped = signum
            print0(f"\n{signal.Signals(signum).name}: saving after this step, once more ends at once", file=sys.stderr)

        old = {signum: signal.signal(signum, stop) for signum in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for signum, handler in old.items():
                signal.signal(signum, handler)

    # Telling what happens.

    @contextlib.contextmanager
    def _log(self) -> Iterator[Callable[[dict[str, Any]], None]]:
        """A function that takes a line of metrics: to metrics.jsonl, to wandb, and to the screen."""
        if self.compute.rank:
            yield lambda line: None
            return
        bar, wandb = None, None
        if sys.stderr.isatty():
            with contextlib.suppress(ImportError):
                from tqdm import tqdm

                bar = tqdm(total=self.steps, initial=self.step, desc=f"{self.stage} {self.tag}", dynamic_ncols=True)
        if self.config.run is not None:
            wandb = _start_wandb(self.config.run, self.meta, self.run_dir)
        with open(self.run_dir / "metrics.jsonl", "a", buffering=1) as file:

            def log(line: dict[str, Any]) -> None:
                file.write(json.dumps(line) + "\n")
                if wandb is not None:
                    wandb.log(line, step=line["step"])
                if "loss" not in line:
                    scores = ", ".join(f"{k} {v:.4f}" for k, v in line.items() if isinstance(v, float))
                    (bar.write if bar is not None else print0)(f"step {line['step']}: {scores}")
                elif bar is not None:
                    bar.set_postfix_str(f"loss {line['loss']:.4f}, {line['tok_per_sec']:,.0f} tok/s")
                    bar.update()
                elif line["step"] <= 3 or line["step"] % max(1, self.steps // 50) == 0:
                    print0(self._plain(line))

            try:
                yield log
            finally:
                if bar is not None:
                    bar.close()
                if wandb is not None:
                    wandb.finish()

    def _plain(self, line: dict[str, Any]) -> str:
        mfu = "n/a" if line["mfu"] is None else f"{line['mfu']:.1%}"
        left = (self.steps - line["step"]) * line["dt"] / 60
        return (
            f"step {line['step']:5d}/{self.steps} | loss {line['loss']:.4f} | lr x{line['lr_mult']:.3f} | "
            f"{line['tok_per_sec']:,.0f} tok/s | mfu {mfu} | epoch {line['epoch']} | {left:.1f} min left"
        )
