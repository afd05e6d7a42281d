"""Every GPU-only path against its plain form, on the day there is a GPU.

    python -m dev.gpu_check --depths 12,20
    python -m dev.gpu_check --device-type cpu --only loss,fp8 --rows 1 --seq-len 128      a rehearsal of this script

Attention kernels, the Triton head loss, the fused MLP and fp8 products are run forward and backward at the shapes of
the given depths: is the result right, how long does it take, and how long the plain form, compiled where training
compiles it. Then each depth trains through dev.bench train, in bf16 and with --fp8.
"""

import functools
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from nanochat import attention, cli, fp8, fused_mlp, kernels, loss, recipe
from nanochat.common import get_base_dir, write_record
from nanochat.compute import Compute
from nanochat.gpt import GPTConfig
from nanochat.table import to_table
from scripts.infer_bench import read_bandwidth, time_calls

PARTS = ("attention", "loss", "mlp", "fp8", "train")

Row = dict[str, Any]
Form = Callable[..., torch.Tensor]  # of tensors that want gradients


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
    device_type: str = cli.option("cuda", "cpu rehearses the script", choices=("cuda", "cpu"))
    out: str | None = cli.option(None, "JSON record to write; unset: bench/gpu_check.json in the base directory")

    def __post_init__(self) -> None:
        if set(self.only.split(",")) - set(PARTS):
            raise ValueError(f"--only {self.only}: choose from {', '.join(PARTS)}")
        if not all(depth.isdigit() and int(depth) for depth in self.depths.split(",")):
            raise ValueError(f"--depths {self.depths}: give numbers, as 12,20")

    def models(self) -> list[GPTConfig]:
        """Return the model of each depth."""
        return [recipe.model_config(int(depth), self.vocab_size, self.seq_len) for depth in self.depths.split(",")]


def compare(
    part: str, path: str, shape: str, *, flops: float, form: Form | None, plain: Form, inputs: Sequence[torch.Tensor]
) -> Row:
    """Time a path beside its plain form on the same inputs: a row of the table.

    flops: of a forward and a backward pass. form: None where the path was refused, as wrong or not installed.
    """
    plain_ms = milliseconds(plain, inputs)
    ms = None if form is None else milliseconds(form, inputs)
    return {
        "part": part,
        "path": path,
        "shape": shape,
        "right": "refused" if form is None else "yes",
        "ms": ms,
        "plain ms": plain_ms,
        "speedup": plain_ms / ms if ms and plain_ms else None,
        "TFLOP/s": flops / ms / 1e9 if ms else None,
    }


def milliseconds(form: Form, inputs: Sequence[torch.Tensor]) -> float | None:
    """Return the median of a forward and a backward pass; None where it does not run, as for want of memory."""
    leaves = [x.clone().requires_grad_() for x in inputs]
    try:
        dy = torch.randn_like(form(*leaves))
        seconds = time_calls(lambda: torch.autograd.grad(form(*leaves), leaves, dy), leaves[0].device)
    except RuntimeError as error:
        print(str(error).splitlines()[0], file=sys.stderr)
        return None
    return 1e3 * statistics.median(seconds)


def random_tensors(device: torch.device, *shapes: tuple[int, ...]) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator).bfloat16().to(device) for shape in shapes]


def check_attention(config: Config, model: GPTConfig, device: torch.device) -> Iterator[Row]:
    B = config.rows
    T = config.seq_len
    H = model.n_head
    D = model.head_dim
    inputs = random_tensors(device, (B, T, H, D), (B, T, H, D), (B, T, H, D))
    for window in sorted({T, min(model.windows)}, reverse=True):
        if window < T:
            candidates = {"flash-attention-3": attention.flash3, "flex": attention.flex}
            plain = torch.compile(attention.attend_naive, dynamic=False)
            probed = 128  # a window of the probe, which has 300 positions
        else:
            candidates = {"flash-attention-3": attention.flash3, "cudnn": attention.cudnn}
            plain = attention.attend_sdpa
            probed = 512
        pairs = sum(min(t + 1, window) for t in range(T))  # of a query and a key that it sees
        for name, load in candidates.items():
            kernel = kernels.load_attention(name, load, device, torch.bfloat16, D, [probed])
            yield compare(
                "attention",
                name,
                f"{B}x{T}x{H}x{D}, window {window}",
                flops=3.5 * 4 * B * H * D * pairs,  # two products forward, five backward
                form=None if kernel is None else functools.partial(kernel, window=window),
                plain=functools.partial(plain, window=window),
                inputs=inputs,
            )


def check_loss(config: Config, model: GPTConfig, device: torch.device) -> Iterator[Row]:
    N = config.rows * config.seq_len
    C = model.n_embd
    V = config.vocab_size
    targets_N = torch.randint(0, V, (N,), generator=torch.Generator().manual_seed(0)).to(device)
    compiled = torch.compile(loss.make_chunk_gradients, dynamic=False)
    right = kernels.loss_agrees(device, torch.bfloat16, loss.liger_loss_sum)
    yield compare(
        "loss",
        "liger",
        f"{N}x{C}, vocabulary {V}",
        flops=6 * N * C * V,
        form=(lambda x, w: loss.liger_loss_sum(x, w, targets_N, model.softcap, V)) if right else None,
        plain=lambda x, w: loss.chunked_loss_sum(x, w, targets_N, model.softcap, V, loss.CUDA_CHUNK_COMPILED, compiled),
        inputs=random_tensors(device, (N, C), (V, C)),
    )


def check_mlp(config: Config, model: GPTConfig, device: torch.device) -> Iterator[Row]:
    N = config.rows * config.seq_len
    C = model.n_embd
    inputs = [x / x.size(1) ** 0.5 for x in random_tensors(device, (N, C), (4 * C, C), (C, 4 * C))]
    few_rows = [inputs[0][:512], *inputs[1:]]
    right = kernels.agrees("fused MLP", fused_mlp.fused_mlp, fused_mlp.eager_mlp, few_rows)
    yield compare(
        "mlp",
        "fused",
        f"{N}x{C}",
        flops=6 * N * 8 * C * C,
        form=fused_mlp.fused_mlp if right else None,
        plain=torch.compile(fused_mlp.eager_mlp, dynamic=False),
        inputs=inputs,
    )


def check_fp8(config: Config, model: GPTConfig, device: torch.device) -> Iterator[Row]:
    N = config.rows * config.seq_len
    C = model.n_embd
    form = torch.compile(fp8.linear, dynamic=False)
    plain = torch.compile(F.linear, dynamic=False)
    for n_in, n_out in ((C, C), (C, 4 * C), (4 * C, C)):
        inputs = random_tensors(device, (N, n_in), (n_out, n_in))
        yield compare(
            "fp8",
            "fp8",
            f"{N}x{n_in} to {n_out}",
            flops=6 * N * n_in * n_out,
            form=form if fp8_is_right(inputs[0][:512], inputs[1]) else None,
            plain=plain,
            inputs=inputs,
        )


def fp8_is_right(x_NC: torch.Tensor, w_DC: torch.Tensor) -> bool:
    """Return whether output and gradients are within a tenth, in norm, of those of a product in bf16."""
    if not fp8.works(x_NC.device):
        return False
    exact = output_and_gradients(F.linear, x_NC, w_DC)
    rounded = output_and_gradients(fp8.linear, x_NC, w_DC)
    return all((a - b).norm() < 0.1 * a.norm() for a, b in zip(exact, rounded, strict=True))


def output_and_gradients(form: Form, x_NC: torch.Tensor, w_DC: torch.Tensor) -> list[torch.Tensor]:
    x = x_NC.clone().requires_grad_()
    w = w_DC.clone().requires_grad_()
    y = form(x, w)
    dx, dw = torch.autograd.grad(y.float().square().sum(), (x, w))
    return [y.detach().float(), dx.float(), dw.float()]


CHECKS = {"attention": check_attention, "loss": check_loss, "mlp": check_mlp, "fp8": check_fp8}


def train(config: Config, precision: str) -> str:
    """Train each depth in bf16 or fp8 by dev.bench, which writes a record of its own; return where that is."""
    out = get_base_dir() / "bench" / f"gpu_train_{precision}.json"
    command = [
        *(sys.executable, "-m", "dev.bench", "train"),
        f"--depths={config.depths}",
        f"--seq-len={config.seq_len}",
        f"--vocab-size={config.vocab_size}",
        f"--batch-tokens={config.batch_tokens}",
        f"--steps={config.steps}",
        f"--data={config.data}",
        f"--out={out}",
        "--",
        f"--device-type={config.device_type}",
    ]
    if precision == "fp8":
        command.append("--fp8")
    status = subprocess.run(command, check=False).returncode
    return f"failed ({status})" if status else str(out)


def main() -> None:
    config = cli.parse(Config, description=__doc__)
    compute = Compute.create(config.device_type)
    device = compute.device
    parts = config.only.split(",")
    rows = []
    for part in parts:
        for model in config.models() if part in CHECKS else ():
            for row in CHECKS[part](config, model, device):
                rows.append(row)
                print(to_table([row]).splitlines()[-1], flush=True)
    size = 8192 if device.type == "cuda" else 256
    a, b = random_tensors(device, (size, size), (size, size))
    ceilings: Row = {
        "GEMM TFLOP/s": 2 * size**3 / min(time_calls(lambda: a @ b, device)) / 1e12,
        "memory TB/s": read_bandwidth(device) / 1e12,
    }
    if "train" in parts:
        ceilings["training, bf16"] = train(config, "bf16")
        ceilings["training, fp8"] = train(config, "fp8")
    print(f"{compute.name}\n\n{to_table(rows)}\n\n{to_table([ceilings])}")
    path = Path(config.out) if config.out else get_base_dir() / "bench" / "gpu_check.json"
    write_record(path, {"device": compute.name, "checks": rows, **ceilings})
    print(f"{path} written")


if __name__ == "__main__":
    cli.run(main)
