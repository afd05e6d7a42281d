"""Every GPU-only path against its plain form, on the day there is a GPU: python -m dev.gpu_check
Attention backends, the Triton head loss, the fused MLP and fp8 products are run forward and backward at the shapes of
the given depths: is the result right, how long does it take, and how long the plain form, compiled where training
compiles it. Then each depth trains through dev.bench train, in bf16 and with --fp8. Without a GPU the table says so.
"""

import functools
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from nanochat import attention, cli, fp8, fused_mlp, kernels, loss, recipe
from nanochat.common import get_base_dir, write_record
from nanochat.gpt import GPTConfig
from nanochat.report import to_table
from scripts.infer_bench import read_bandwidth, time_calls

PARTS = ("attention", "loss", "mlp", "fp8", "train")
Row = dict[str, Any]


@dataclass(frozen=True)
class Config:
    """Flags of the check."""

    depths: str = cli.option("12,20", "depths whose shapes are checked and trained, as 12,20")
    only: str = cli.option(",".join(PARTS), "parts to run")
    rows: int = cli.option(8, "sequences in a batch of the checks")
    seq_len: int = cli.option(2048, "context in tokens")
    vocab_size: int = cli.option(32768, "vocabulary of the head")
    batch_tokens: int = cli.option(2**19, "tokens a step of the training runs")
    steps: int = cli.option(30, "steps of each training run")
    data: str = cli.option("builtin", "training text, as of dev.bench train")
    out: str | None = cli.option(None, "JSON record to write; unset: bench/gpu_check.json in the base directory")

    def __post_init__(self) -> None:
        if set(self.only.split(",")) - set(PARTS):
            raise ValueError(f"--only {self.only}: choose from {', '.join(PARTS)}")
        if not all(depth.isdigit() and int(depth) for depth in self.depths.split(",")):
            raise ValueError(f"--depths {self.depths}: give numbers, as 12,20")

    def models(self) -> list[GPTConfig]:
        """The model of each depth."""
        return [recipe.model_config(int(d), self.vocab_size, self.seq_len) for d in self.depths.split(",")]


@dataclass(frozen=True)
class Check:
    """One path beside its plain form: a row of the table. Both take `inputs`; `right` says whether they agree."""

    part: str
    path: str
    shape: str
    flops: float  # of a forward and a backward pass
    right: Callable[[], bool]
    form: Callable[..., torch.Tensor]
    plain: Callable[..., torch.Tensor]
    inputs: Callable[[], list[torch.Tensor]]

    def row(self, device: torch.device | None) -> Row:
        """The row, with times as None (not measured) where there is no GPU or the path is refused."""
        empty = {"right": None, "ms": None, "plain ms": None, "speedup": None, "TFLOP/s": None}
        row = {"part": self.part, "path": self.path, "shape": self.shape, **empty}
        if device is None:
            return row
        row["right"] = "yes" if self.right() else "refused"
        times = {"plain ms": self.time(self.plain, device)}
        if row["right"] == "yes":
            times["ms"] = self.time(self.form, device)
            times |= {"speedup": times["plain ms"] / times["ms"], "TFLOP/s": self.flops / times["ms"] / 1e9}
        return {**row, **times}

    def time(self, form: Callable[..., torch.Tensor], device: torch.device) -> float | None:
        """Median milliseconds of a forward and a backward pass; None where it does not run, as for want of memory."""
        try:
            leaves = [x.to(device).requires_grad_() for x in self.inputs()]
            grad = torch.randn_like(form(*leaves))
            times = time_calls(lambda: torch.autograd.grad(form(*leaves), leaves, grad), device)
        except RuntimeError as error:
            print(f"{self.path}: {str(error).splitlines()[0]}", file=sys.stderr)
            return None
        return 1e3 * statistics.median(times)


def _normal(*shapes: tuple[int, ...]) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator).bfloat16() for shape in shapes]


def _attention(config: Config, model: GPTConfig, device: torch.device) -> Iterator[Check]:
    B, T, H, D = config.rows, config.seq_len, model.n_head, model.head_dim
    for windowed, window in ((False, T), (True, min(model.windows))):
        plain = attention.attend_sdpa if window >= T else torch.compile(attention.attend_naive, dynamic=False)
        attended = sum(min(t + 1, window) for t in range(T))
        others = {"flex": attention.flex} if windowed else {"cudnn": attention.cudnn}
        for name, load in {"flash-attention-3": attention.flash3, **others}.items():
            load = functools.cache(load)  # load or compile it once, not at each timed call
            yield Check(
                "attention",
                name,
                f"{B}x{T}x{H}x{D}, window {window}",
                3.5 * 4 * B * H * D * attended,
                lambda name=name, load=load, w=window: bool(
                    kernels.load_attention(name, load, device, torch.bfloat16, D, [128 if w < T else 512])
                ),
                lambda q, k, v, load=load, w=window: load()(q, k, v, w),
                lambda q, k, v, plain=plain, w=window: plain(q, k, v, w),
                lambda: _normal(*3 * [(B, T, H, D)]),
            )


def _loss(config: Config, model: GPTConfig, device: torch.device) -> Iterator[Check]:
    N, C, V = config.rows * config.seq_len, model.n_embd, config.vocab_size
    targets_N = torch.randint(0, V, (N,), generator=torch.Generator().manual_seed(0)).to(device)

    compiled = torch.compile(loss.make_chunk_gradients, dynamic=False)
    yield Check(
        "loss",
        "liger",
        f"{N}x{C}, vocabulary {V}",
        6 * N * C * V,
        lambda: kernels.loss_agrees(device, torch.bfloat16, loss.liger_loss_sum),
        lambda x, w: loss.liger_loss_sum(x, w, targets_N, model.softcap),
        lambda x, w: loss.chunked_loss_sum(x, w, targets_N, model.softcap, chunk_gradients=compiled),
        lambda: _normal((N, C), (V, C)),
    )


def _mlp(config: Config, model: GPTConfig, device: torch.device) -> Iterator[Check]:
    N, C = config.rows * config.seq_len, model.n_embd

    def inputs(N: int = N) -> list[torch.Tensor]:
        return [x / x.size(1) ** 0.5 for x in _normal((N, C), (4 * C, C), (C, 4 * C))]

    yield Check(
        "mlp",
        "fused",
        f"{N}x{C}",
        6 * N * 8 * C * C,
        lambda: kernels.agrees(
            "fused MLP", fused_mlp.fused_mlp, fused_mlp.eager_mlp, [x.to(device) for x in inputs(512)]
        ),
        fused_mlp.fused_mlp,
        torch.compile(fused_mlp.eager_mlp, dynamic=False),
        inputs,
    )


def _fp8(config: Config, model: GPTConfig, device: torch.device) -> Iterator[Check]:
    def right(C: int, D: int) -> bool:
        if not fp8.works(device):
            return False
        x, w = (t.to(device).requires_grad_() for t in _normal((512, C), (D, C)))
        results = []
        for form in (fp8.linear, F.linear):
            y = form(x, w)
            results.append((y, *torch.autograd.grad(y.float().square().sum(), (x, w))))
        return all((a - b).float().norm() < 0.1 * b.float().norm() for a, b in zip(*results, strict=True))

    N = config.rows * config.seq_len
    for C, D in ((model.n_embd, model.n_embd), (model.n_embd, 4 * model.n_embd), (4 * model.n_embd, model.n_embd)):
        forms = [torch.compile(f, dynamic=False) for f in (fp8.linear, F.linear)]
        yield Check(
            "fp8",
            "fp8",
            f"{N}x{C} to {D}",
            6 * N * C * D,
            lambda C=C, D=D: right(C, D),
            *forms,
            lambda C=C, D=D: _normal((N, C), (D, C)),
        )


def train(config: Config, precision: str) -> list[str]:
    """The command that trains each depth in bf16 or fp8 and writes its own record."""
    flags = {
        "depths": config.depths,
        "seq-len": config.seq_len,
        "vocab-size": config.vocab_size,
        "batch-tokens": config.batch_tokens,
        "steps": config.steps,
        "data": config.data,
        "out": f"{get_base_dir() / 'bench' / 'gpu_train'}_{precision}.json",
    }
    more = ["--", "--fp8"] if precision == "fp8" else []
    return [sys.executable, "-m", "dev.bench", "train", *(f"--{name}={value}" for name, value in flags.items()), *more]


def main() -> None:
    config = cli.parse(Config, description=__doc__)
    device = torch.device("cuda", 0) if torch.cuda.is_available() else None
    parts = {"attention": _attention, "loss": _loss, "mlp": _mlp, "fp8": _fp8}
    rows = []
    for part in config.only.split(","):
        for model in config.models() if part in parts else ():
            for check in parts[part](config, model, device or torch.device("cpu")):
                rows.append(check.row(device))
                print(to_table(rows[-1:]).splitlines()[-1], flush=True)
    ceilings = {"GEMM TFLOP/s": None, "memory TB/s": None}
    if device is not None:
        a, b = (torch.randn(8192, 8192, device=device).bfloat16() for _ in range(2))
        ceilings["GEMM TFLOP/s"] = 2 * 8192**3 / min(time_calls(lambda: a @ b, device)) / 1e12
        ceilings["memory TB/s"] = read_bandwidth(device) / 1e12
    trained = {}
    for precision in ("bf16", "fp8") if "train" in config.only.split(",") else ():
        trained[f"training, {precision}"] = None
        if device is not None:
            code = subprocess.run(train(config, precision), check=False).returncode
            trained[f"training, {precision}"] = f"bench/gpu_train_{precision}" if code == 0 else f"failed ({code})"
    name = torch.cuda.get_device_name(device) if device else "no GPU here: nothing was measured"
    print(f"{name}\n\n{to_table(rows) if rows else ''}\n{to_table([{**ceilings, **trained}])}")
    path = Path(config.out) if config.out else get_base_dir() / "bench" / "gpu_check.json"
    write_record(path, {"device": name, "checks": rows, **ceilings, **trained})


if __name__ == "__main__":
    cli.run(main)
