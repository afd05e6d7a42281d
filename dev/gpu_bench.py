"""What the parts of dev/gpu_check.py share: the sizes they measure at, and the machine that they run on."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch

from nanochat import recipe
from nanochat.compute import Compute
from nanochat.gpt import GPTConfig

Row = dict[str, Any]  # what was measured, by name


@dataclass(frozen=True)
class Sizes:
    """How large everything is."""

    depth: int  # of the model in bf16
    rows: int  # of its micro-batches
    fp8_depth: int
    fp8_rows: int
    sequence_len: int
    vocab_size: int
    head_dim: int
    micro_batches: int  # of a training step
    warmup: int  # steps of training that compile, and fill the allocator's memory
    steps: int  # of training that are timed at once, before it is the other side's turn
    rounds: int  # of turns
    square: int  # side of the largest square matrix
    copied: int  # bytes
    prompt_tokens: int
    new_tokens: int

    def model(self, depth: int) -> GPTConfig:
        """Return the model of a depth."""
        return recipe.model_config(depth, self.vocab_size, self.sequence_len, head_dim=self.head_dim)


# 65,536 tokens keep a GPU busy in bf16, and 32,768 of a model twice as wide do. A step of 8 GPUs has one such
# micro-batch per GPU; four make the step of one GPU long beside its update. Measuring takes about eight minutes.
ON_GPU = Sizes(
    depth=12,
    rows=32,
    fp8_depth=24,
    fp8_rows=16,
    sequence_len=2048,
    vocab_size=32768,
    head_dim=128,
    micro_batches=4,
    warmup=3,
    steps=3,
    rounds=3,
    square=8192,
    copied=4 << 30,
    prompt_tokens=128,
    new_tokens=64,
)
# Heads of 64 and two of them: the smallest matrices that fp8 takes are 128 wide.
REHEARSAL = Sizes(
    depth=2,
    rows=2,
    fp8_depth=2,
    fp8_rows=1,
    sequence_len=256,
    vocab_size=320,
    head_dim=64,
    micro_batches=2,
    warmup=1,
    steps=1,
    rounds=2,
    square=128,
    copied=1 << 20,
    prompt_tokens=16,
    new_tokens=4,
)


@dataclass(frozen=True)
class Bench:
    """The machine, the sizes, and the ceilings that were measured so far."""

    compute: Compute
    sizes: Sizes
    folder: Path  # for files that are needed for a while
    reference: Path | None  # a checkout of karpathy/nanochat
    ceilings: dict[str, float] = field(default_factory=dict)  # the best rates that part 1 has seen, per second

    @property
    def device(self) -> torch.device:
        return self.compute.device

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    def compiled(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return a function as training uses it: compiled on a GPU. In a rehearsal compiling would take minutes."""
        return torch.compile(function, dynamic=False) if self.on_gpu else function

    def share(self, ceiling: str, rate: float) -> float | None:
        """Return a rate as a share of a ceiling, or None where that could not be measured."""
        return rate / self.ceilings[ceiling] if ceiling in self.ceilings else None


class Check(NamedTuple):
    """A thing to measure. It yields rows as soon as they are known; "row" in a row is its name, if not the check's."""

    name: str
    measure: Callable[[Bench], Iterable[Row]]


class Stopped(BaseException):
    """Time is up, or a signal came. Not an Exception, because those become failed rows (gpu_check.attempt)."""
