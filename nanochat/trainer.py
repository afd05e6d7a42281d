"""The one training loop, for pretraining, midtraining and fine-tuning: step, schedule, evaluate, log, save, resume."""

import contextlib
import dataclasses
import math
import os
import re
import shutil
import signal
import sys
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch

from nanochat import checkpoint, fp8, preflight, recipe, run_log, sharding
from nanochat.cli import option, require_positive
from nanochat.common import get_base_dir, print0, write_record
from nanochat.compute import Compute
from nanochat.dataloader import RowLoader
from nanochat.gpt import GPT
from nanochat.loss_eval import evaluate_bpb
from nanochat.token_shards import TokenShard
from nanochat.tokenizer import Tokenizer

# what a checkpoint must share with the run that goes on from it
_IDENTITY = ("model_config", "total_batch_size", "num_iterations", "dataset", "source", "rollouts")


@dataclass(frozen=True)
class TrainConfig:
    """Flags that every training stage has."""

    run: str | None = option(None, "name of a wandb run (WANDB_MODE=offline works); unset = no wandb")
    device_type: str | None = option(None, "cuda | mps | cpu; unset = the fastest there is", ("cuda", "mps", "cpu"))
    seed: int = option(1337, "seed of weights and data order")
    model_tag: str | None = option(None, "name of the run's checkpoints")
    device_batch_size: int | Literal["auto"] | None = option(
        None, "rows a device takes at once; auto: as many as fit in memory; unset = auto on CUDA, else up to 32"
    )
    activation_checkpointing: bool | None = option(None, "make activations again backward; unset = if memory needs it")
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
    resume: str | None = option(None, "go on from a step; alone: the newest; auto: if there is one", bare="newest")
    compile: bool = option(True, "fuse with torch.compile where a compiler is there")
    overlap: bool = option(True, "send gradients while the backward pass goes on; the results are the same to the bit")
    fp8: bool = option(False, "matrix products of the blocks in fp8 (Ada, Hopper or later)")
    price: float | None = option(None, "dollars an hour of all machines together, to say what the run will cost")

    def __post_init__(self) -> None:
        positive = ("total_batch_size", "num_iterations", "grad_clip", "save_every", "keep", "eval_tokens")
        require_positive(self, *positive, *("device_batch_size",) * (self.device_batch_size != "auto"))
        require_positive(self, "eval_every", "sample_every", "warmup_steps", "seed", "weight_decay", "price", zero=True)
        require_positive(self, "embedding_lr", "unembedding_lr", "matrix_lr", "scalar_lr", zero=True)
        if self.seed >= 2**63:
            raise ValueError(f"--seed {self.seed}: must be below 2**63")
        if self.model_tag is not None and not re.fullmatch(r"\w[\w.-]*", self.model_tag):
            raise ValueError(f"--model-tag {self.model_tag!r}: use letters, digits, '_', '-' and '.' only")
        if not 0 <= self.warmdown_ratio <= 1 or not 0 <= self.final_lr_frac <= 1:
            raise ValueError("--warmdown-ratio and --final-lr-frac must be between 0 and 1")
        if self.resume is not None and self.resume not in ("newest", "auto") and not self.resume.isdigit():
            raise ValueError(f"--resume {self.resume}: give a step, or nothing for the newest checkpoint, or auto")


def can_compile(device: torch.device) -> bool:
    """Whether torch.compile has what it needs: a C++ compiler on CPU, Triton on CUDA."""
    if device.type == "cpu":
        return any(shutil.which(name) for name in (os.environ.get("CXX") or "g++", "clang++"))
    return device.type == "cuda"


def rows_per_step(total_tokens: int, sequence_len: int, world_size: int) -> int:
    """Rows of a step over all ranks. Raises ValueError when the sizes do not divide."""
    rows, rest = divmod(total_tokens, sequence_len)
    if rest or rows % world_size:
        raise ValueError(
            f"--total-batch-size {total_tokens} is not a whole number of rows of {sequence_len} tokens on each of "
            f"{world_size} processes: make it a multiple of {sequence_len * world_size}"
        )
    return rows


MicroBatch = tuple[torch.Tensor, ...]


class Batch(NamedTuple):
    """A step's work for this rank, and what the step's line of metrics says of it.

    A micro-batch is (inputs_BT, targets_BT), of which the mean loss over all ranks' targets counts, or (inputs_BT,
    targets_BT, weights_BT): the sum of weights times losses. With none, on all ranks, the step changes nothing.
    """

    micro_batches: Sequence[MicroBatch]
    tokens: int  # over all ranks
    line: dict[str, Any]


class Trainer:
    """Trains `model` for `config.num_iterations` steps and leaves checkpoints and metrics behind."""

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
        lr_scales: dict[str, float],
        meta: dict[str, Any],
        evaluate: Callable[[int], dict[str, Any]] | None = None,
        sample: Callable[[], None] | None = None,
        batches: Callable[[int, int], Generator[Batch, None, None]] | None = None,
    ) -> None:
        """`meta` goes into every checkpoint; `evaluate(step)` adds metrics to an evaluation; `sample()` prints some.

        batches(step, rows): the steps from `step` on, in micro-batches of at most `rows` rows; None = the rows of
        `train_shards`. Where it is given there is an evaluation before the first step, too. Raises ValueError.
        """
        self.stage, self.tag, self.config, self.model, self.compute = stage, tag, config, model, compute
        self.tokenizer, self.steps, self.evaluate, self.sample = tokenizer, num_iterations, evaluate, sample
        if config.fp8:
            if compute.device.type != "cuda":
                raise ValueError("--fp8 needs a GPU with fp8 products (Ada, Hopper or later): leave it out")
            fp8.convert(model)
        if config.compile and can_compile(compute.device):
            model.compile_blocks()
        elif config.compile:
            print0("torch.compile is off: no C++ compiler (installing g++ makes it faster)")
        T = model.config.sequence_len
        rows = rows_per_step(total_batch_size, T, compute.world_size)
        wanted = (config.device_batch_size, config.activation_checkpointing)
        self.plan = preflight.plan(model, rows // compute.world_size, *wanted, compute)
        device_rows, model.checkpointing = self.plan.rows, self.plan.checkpointing
        place: dict[str, Any] = {"rank": compute.rank, "world_size": compute.world_size, "device": compute.device}
        self.loader = None if batches else RowLoader(train_shards, T, rows, device_rows, config.seed, **place)
        self.batches, self.rows_per_step = batches or self._rows, rows
        self.val_loader = RowLoader(val_shards, T, device_rows * compute.world_size, device_rows, 0, **place)
        lrs = {name: getattr(config, f"{name}_lr") * scale for name, scale in lr_scales.items()}
        self.optimizer = sharding.make_optimizer(model, lrs, weight_decay, compute, overlap=config.overlap)
        asdict = dataclasses.asdict
        self.meta = {**meta, "model_config": asdict(model.config), "tokenizer_hash": tokenizer.hash}
        self.meta |= {"config": asdict(config), "total_batch_size": total_batch_size, "num_iterations": num_iterations}
        self.meta["val_bpb"] = None
        self.token_bytes = torch.tensor(tokenizer.token_bytes, device=compute.device)
        self.tokens_per_step = total_batch_size
        self.run_dir = get_base_dir() / "runs" / stage / tag
        self.step, self.saved_step, self.tokens, self.seconds = 0, 0, 0, 0.0
        self.stopped: int | None = None

    def run(self) -> None:
        """Train to the end. Raises KeyboardInterrupt after saving when told to stop by SIGINT or SIGTERM."""
        config = self.config
        self._begin()
        self.model.train()
        first, title = self.step, f"{self.stage} {self.tag}"
        if self.loader:
            size = (self.steps - first, self.tokens_per_step)
            preflight.announce(title, self.model, self.plan, self.compute, *size, config.price)
        log_to = (self.run_dir, title, first, self.steps, config.run, self.meta)
        steps = contextlib.closing(self.batches(self.step, self.plan.rows))
        with self._signals(), run_log.open_log(*log_to, self.compute.rank) as log, steps as batches:
            while True:
                last = self.step == self.steps

                def due(every: int | None) -> bool:
                    return self.step == self.steps or bool(self.step and every and self.step % every == 0)

                if due(config.save_every or config.eval_every):
                    self._save()  # before evaluating: a crash there costs nothing
                known = self.step == first and self.meta["val_bpb"] is not None
                if (due(config.eval_every) or (self.step == 0 and not self.loader)) and not known:
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
                try:
                    log(self._train_step(batches))
                except torch.OutOfMemoryError as error:
                    less = "a smaller --device-batch-size or --activation-checkpointing"
                    raise ValueError(f"out of memory with {self.plan.rows} rows at once: try {less}") from error
        self._record()

    def _rows(self, step: int, rows: int) -> Generator[Batch, None, None]:
        """The rows of the training shards."""
        assert self.loader is not None, "only a trainer of rows is asked for them"
        with contextlib.closing(self.loader.iterate(step)) as steps:
            for number, micro_batches in steps:
                yield Batch(micro_batches, self.tokens_per_step, {"epoch": self.loader.epoch(number)})

    def _train_step(self, batches: Iterator[Batch]) -> dict[str, Any]:
        """One optimizer step on this rank's next rows."""
        config, began = self.config, time.perf_counter()  # the wait for rows is part of a step
        batch = next(batches)
        schedule = (config.warmup_steps, config.warmdown_ratio, config.final_lr_frac, config.schedule)
        lr_mult = recipe.learning_rate_multiplier(self.step, self.steps, *schedule)
        scores = {"loss": 0.0}
        if batch.micro_batches:
            scores = self._backward(batch.micro_batches)
            momentum = recipe.muon_momentum(self.step, self.steps, config.warmdown_ratio)
            wd_mult = recipe.weight_decay_multiplier(self.step, self.steps)
            norm = self.optimizer.step(self.step, lr_mult, momentum, wd_mult, config.grad_clip)
            scores |= {} if norm is None else {"grad_norm": norm}
        self.compute.synchronize()
        dt = time.perf_counter() - began
        self.step, self.tokens, self.seconds = self.step + 1, self.tokens + batch.tokens, self.seconds + dt
        speed, peak = batch.tokens / dt, self.compute.peak_flops
        mfu = speed * self.model.flops_per_token() / (peak * self.compute.world_size) if peak else None
        made = {"step": self.step, "loss": scores.pop("loss"), "lr_mult": lr_mult, "tokens": self.tokens}
        took = {"tok_per_sec": speed, "mfu": mfu, "dt": dt, "peak_mem_bytes": self.compute.peak_memory()}
        return {**made, **took, **batch.line, **scores}

    def _backward(self, micro_batches: Sequence[MicroBatch]) -> dict[str, float]:
        """Gradients of the step's loss; the loss, and of weighted rows the mean of their targets' own, in nats."""
        if self.model.config.dropout:
            torch.manual_seed(((self.config.seed << 40) + (self.step << 10) + self.compute.rank) % 2**63)
        counted = torch.stack([(targets >= 0).sum() for _, targets, *_ in micro_batches]).sum()
        counted = self.compute.all_reduce_sum(counted.float()).clamp(min=1)
        losses, nlls = [], []
        for idx_BT, targets_BT, *weights in micro_batches:
            if weights:
                nll_BT = self.model(idx_BT, targets_BT, loss_reduction="none")
                nlls.append(nll_BT.detach().sum() / counted)
                loss = (nll_BT * weights[0]).sum()
            else:
                loss = self.model(idx_BT, targets_BT, loss_reduction="sum") / counted
            losses.append(loss.detach())
            if len(losses) == len(micro_batches):
                self.optimizer.overlap_next_backward()
            loss.backward()
        loss = self.compute.all_reduce_sum(torch.stack(losses).sum()).item()
        if not math.isfinite(loss):
            bad = [i for i, part in enumerate(losses) if not torch.isfinite(part)]
            raise self._diverged(
                f"loss is {loss} at step {self.step}, rows {self.step * self.rows_per_step} to "
                f"{(self.step + 1) * self.rows_per_step - 1} (micro-batch {bad} of rank {self.compute.rank})"
            )
        if not nlls:
            return {"loss": loss}
        return {"loss": loss, "nll": self.compute.all_reduce_sum(torch.stack(nlls).sum()).item()}

    def _diverged(self, what: str) -> ValueError:
        """The error that ends a run: a checkpoint of this very step is spoilt, one before it led to a finite loss."""
        sound = [step for step in checkpoint.list_steps(self.stage, self.tag) if step < self.step]
        again = f"--resume {sound[-1]}" if sound else "begin again"
        return ValueError(f"{what}: lower the learning rates or set --grad-clip, then {again}")

    def _evaluate(self) -> dict[str, Any]:
        """Bits per byte of the validation rows, and what `evaluate` adds."""
        rows = min(-(-self.config.eval_tokens // self.val_loader.sequence_len), self.val_loader.rows_in_epoch)
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
        if self.compute.rank == 0 and self.step and self.step == self.saved_step:
            checkpoint.update_meta(self.stage, self.tag, self.step, **metrics)
        return metrics

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
        self.tokens = meta.get("tokens", self.step * self.tokens_per_step)
        if self.compute.rank == 0:
            run_log.forget_after(self.run_dir, self.step)
        print0(f"resumed {self.stage}/{self.tag} at step {self.step} of {self.steps}")

    def _has_own_checkpoint(self) -> bool:
        """Whether this very run, and not another one of the same tag, has left a whole checkpoint."""
        try:
            meta = checkpoint.read_meta(self.stage, self.tag, checkpoint.newest_whole(self.stage, self.tag))
        except ValueError:
            return False
        same = all(meta.get(name) == self.meta.get(name) for name in _IDENTITY)
        return same and meta["tokenizer_hash"] == self.tokenizer.hash

    def _save(self) -> None:
        if self.step == self.saved_step:
            return
        meta = {**self.meta, "val_bpb": None, "seconds": self.seconds, "tokens": self.tokens}
        checkpoint.save(self.stage, self.tag, self.step, self.model, self.optimizer, meta, self.compute)
        self.saved_step = self.step

    def _record(self) -> None:
        if self.compute.rank == 0:
            parameters = sum(p.numel() for p in self.model.parameters())
            record = {"stage": self.stage, "tag": self.tag, **self.meta, "parameters": parameters}
            record |= {"plan": dataclasses.asdict(self.plan), "peak_mem_bytes": self.compute.peak_memory()}
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
