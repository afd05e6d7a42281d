"""Forward and backward pass by depth, against this machine's roofline. The bound counts the FLOPs and the operands'
bytes of every matrix product and of attention, each at its slower side: the measured matrix product rate or the
measured copy bandwidth. Elementwise work is taken to cost nothing. For example: python -m dev.bench_model --depths
2,4,6
"""

import dataclasses
import itertools
import re
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from dev import bench_old as bench
from nanochat import cli, recipe
from nanochat.common import get_base_dir
from nanochat.compute import Compute, can_compile
from nanochat.gpt import GPT, GPTConfig, build_model
from nanochat.loss import softcap_cross_entropy


@dataclass(frozen=True)
class Config:
    """Flags of the benchmark."""

    depths: str = cli.option("2,4,6", "depths to measure, as 4,6")
    device_type: str | None = cli.option(None, "cuda | mps | cpu; unset = the fastest there is", ("cuda", "mps", "cpu"))
    rows: int = cli.option(16, "rows a pass takes")
    seq_len: int = cli.option(512, "context in tokens")
    vocab_size: int = cli.option(4096, "size of the vocabulary")
    head_dim: int = cli.option(128, "channels of an attention head")
    window_pattern: str = cli.option("L", "attention windows tiled over layers: S a quarter of the context, L all")
    repeats: int = cli.option(8, "timed passes of each depth")
    compile: bool = cli.option(True, "fuse with torch.compile where a compiler is there")
    out: str | None = cli.option(None, "record to write, without suffix; unset = bench/model in the base directory")

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[1-9]\d*(,[1-9]\d*)*", self.depths):
            raise ValueError(f"--depths {self.depths}: give numbers, as 4,6")
        for name in ("rows", "seq_len", "vocab_size", "head_dim", "repeats"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} {getattr(self, name)}: must be above 0")


@dataclass(frozen=True)
class Work:
    """A piece of work: FLOPs, and bytes that cross the memory bus at the least."""

    flops: float
    moved: float

    def seconds(self, flop_rate: float, byte_rate: float) -> float:
        """The least time it takes on a machine of these rates (roofline, Williams et al. 2009)."""
        return max(self.flops / flop_rate, self.moved / byte_rate)


def product(m: int, k: int, n: int, size: int, times: int = 1) -> Work:
    """`times` products of (m, k) by (k, n), or of their gradients, with elements of `size` bytes."""
    return Work(times * 2 * m * k * n, times * (m * k + k * n + m * n) * size)


def block_shapes(config: GPTConfig) -> list[tuple[int, int]]:
    """(inputs, outputs) of a block's matrices; the gates, which are tiny, left out."""
    C, kv = config.n_embd, config.n_kv_head * config.head_dim
    return [(C, C), (C, kv), (C, kv), (C, C), (C, 4 * C), (4 * C, C)]


def attended_pairs(T: int, window: int) -> int:
    """Pairs of a query and a key at or before it within the window, its own included."""
    window = min(window, T)
    return window * (window + 1) // 2 + (T - window) * window


def count_work(config: GPTConfig, rows: int, size: int) -> dict[str, list[Work]]:
    """What `forward`, `backward` (the residual stream's) and `loss` (the head's, both ways) have to do.

    Of a product y = xW, the backward pass makes two like it. Of attention's two products it makes four; making the
    weights again, as flash kernels do, is not counted. size: bytes of an element of the compute dtype.
    """
    T, N = config.sequence_len, rows * config.sequence_len
    kv = config.n_kv_head * config.head_dim
    forward, backward = [], []
    for window in config.windows:
        forward += [product(N, k, n, size) for k, n in block_shapes(config)]
        backward += [product(N, k, n, size, 2) for k, n in block_shapes(config)]
        flops = 4 * rows * config.n_embd * attended_pairs(T, window)
        forward.append(Work(flops, N * (2 * config.n_embd + 2 * kv) * size))
        backward.append(Work(2 * flops, N * (4 * config.n_embd + 4 * kv) * size))
    # the chunked loss never writes its logits to memory: what must move is x, dx, and the head with its gradient
    head = 3 * 2 * N * config.n_embd * config.vocab_size
    moved = 2 * (N * config.n_embd + config.vocab_size * config.n_embd) * size
    return {"forward": forward, "backward": backward, "loss": [Work(head, moved)]}


def gemm_rate(compute: Compute, config: GPTConfig, rows: int) -> float:
    """The greatest FLOP/s of the products that dominate this model: MLP, head, and a large square."""
    N, C = rows * config.sequence_len, config.n_embd
    shapes = ((N, C, 4 * C), (N, 4 * C, C), (N, C, config.padded_vocab_size), (2048, 2048, 2048))
    return max(bench.gemm_rate(*shape, compute.dtype, compute.device, 0.2) for shape in shapes)


def time_passes(model: GPT, rows: int, repeats: int, compute: Compute) -> dict[str, float]:
    """Median seconds of the three parts, after two rounds that are not counted."""
    config = model.config
    generator = torch.Generator().manual_seed(0)
    shape = (rows, config.sequence_len)
    idx_BT, targets_BT = (
        torch.randint(config.vocab_size, shape, generator=generator).to(compute.device) for _ in range(2)
    )
    grad_BTC = torch.randn((*shape, config.n_embd), generator=generator).to(compute.device, compute.dtype)
    times: dict[str, list[float]] = {"forward": [], "backward": [], "loss": []}

    def lap(part: str, began: float) -> float:
        compute.synchronize()
        now = time.perf_counter()
        times[part].append(now - began)
        return now

    for _ in range(repeats + 2):
        compute.synchronize()
        began = time.perf_counter()
        x_BTC = model.hidden(idx_BT)
        began = lap("forward", began)
        x_BTC.backward(grad_BTC)
        began = lap("backward", began)
        x_NC = x_BTC.detach().flatten(0, 1).requires_grad_()
        head_VC = model.head.weight[: config.vocab_size]
        arguments = (targets_BT.flatten(), config.softcap, "sum")
        softcap_cross_entropy(x_NC, head_VC, *arguments, compiled=model.compiled).backward()
        lap("loss", began)
        model.zero_grad(set_to_none=True)
    return {part: statistics.median(seconds[2:]) for part, seconds in times.items()}


def to_rows(
    depth: int, work: dict[str, list[Work]], seconds: dict[str, float], tokens: int, flop_rate: float, byte_rate: float
) -> list[dict[str, Any]]:
    """Lines of the table: each part, and all of them."""
    work, seconds = dict(work), dict(seconds)
    work["all"], seconds["all"] = list(itertools.chain(*work.values())), sum(seconds.values())
    rows = []
    for part, pieces in work.items():
        flops, moved = sum(piece.flops for piece in pieces), sum(piece.moved for piece in pieces)
        bound = sum(piece.seconds(flop_rate, byte_rate) for piece in pieces)
        compute = sum(p.flops for p in pieces if p.flops / flop_rate >= p.moved / byte_rate)
        rows.append(
            {
                "depth": depth,
                "part": part,
                "ms": seconds[part] * 1e3,
                "GFLOP": flops / 1e9,
                "MB": moved / 1e6,
                "FLOP a byte": flops / moved,
                "roofline ms": bound * 1e3,
                "share of it": f"{bound / seconds[part]:.1%}",
                "bound by compute": f"{compute / flops:.0%}",
                "GFLOP/s": flops / seconds[part] / 1e9,
                "tokens/s": tokens / seconds[part],
            }
        )
    return rows


def measure_depth(depth: int, config: Config, compute: Compute, byte_rate: float) -> tuple[list[dict[str, Any]], float]:
    """A depth's lines of the table, and the matrix product rate that they are held against."""
    windows = {"window_pattern": config.window_pattern}
    shape = recipe.model_config(depth, config.vocab_size, config.seq_len, head_dim=config.head_dim, **windows)
    model = build_model(shape, compute.device, train=True)
    model.init_weights(torch.Generator(compute.device).manual_seed(0))
    with torch.no_grad():
        for block in model.blocks:  # zero at first: zeros would make products faster than they are in training
            for matrix in (block.attn.out, block.mlp.down):
                matrix.weight.normal_(std=0.02)
    if config.compile and can_compile(compute.device):
        model.compile_blocks()
    before = gemm_rate(compute, shape, config.rows)
    seconds = time_passes(model, config.rows, config.repeats, compute)
    flop_rate = max(before, gemm_rate(compute, shape, config.rows))
    work = count_work(shape, config.rows, compute.dtype.itemsize)
    return to_rows(depth, work, seconds, config.rows * config.seq_len, flop_rate, byte_rate), flop_rate


def ceilings_line(byte_rate: float, flop_rates: Sequence[float]) -> str:
    """What was measured of the machine, in words; the ridge is the intensity at which compute takes over."""
    rate = max(flop_rates)
    return (
        f"Matrix products {min(flop_rates) / 1e9:,.0f} to {rate / 1e9:,.0f} GFLOP/s, before and after each depth; "
        f"copies {byte_rate / 1e9:,.1f} GB/s; ridge at {rate / byte_rate:,.0f} FLOP a byte."
    )


def main() -> None:
    config = cli.parse(Config, description=__doc__)
    compute = Compute.create(config.device_type)
    size = (256 << 20) if compute.device.type == "cpu" else (2 << 30)
    byte_rate = bench.copy_bandwidth(compute.device, size)
    rows, rates = [], []
    for depth in map(int, config.depths.split(",")):
        print(f"d{depth}", flush=True)
        found, rate = measure_depth(depth, config, compute, byte_rate)
        rows, rates = rows + found, [*rates, rate]
    where = f"{compute.name}, {str(compute.dtype).removeprefix('torch.')}, {torch.get_num_threads()} threads"
    page = (
        f"# Forward and backward by depth\n\n{where}; {config.rows} rows of {config.seq_len} tokens, "
        f"V={config.vocab_size}. {ceilings_line(byte_rate, rates)} The loss is the head both ways.\n\n"
        f"{bench.markdown_table(rows)}"
    )
    record = {"config": dataclasses.asdict(config), "byte_rate": byte_rate, "flop_rates": rates, "rows": rows}
    bench.write_report(config.out or get_base_dir() / "bench" / "model", record, page)


if __name__ == "__main__":
    cli.run(main)
