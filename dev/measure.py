"""What the measuring tools of dev/ share: flags after --, lists of numbers, records, times, and rates of products."""

import re
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from nanochat import kernels
from nanochat.common import get_base_dir, write_record
from nanochat.compute import Compute
from nanochat.gpt import GPTConfig
from scripts.infer_bench import time_calls

ROOT = Path(__file__).resolve().parent.parent

Record = dict[str, Any]


def split_argv(argv: list[str]) -> tuple[list[str], list[str]]:
    """Return the flags before and after `--`: our own, and those of the script that is run."""
    at = argv.index("--") if "--" in argv else len(argv)
    return argv[:at], argv[at + 1 :]


def numbers(flag: str, text: str) -> list[int]:
    """Parse `4,6`. Raises ValueError naming the flag for anything else."""
    if not re.fullmatch(r"[1-9]\d*(,[1-9]\d*)*", text):
        raise ValueError(f"{flag} {text}: give numbers, as 4,6")
    return [int(part) for part in text.split(",")]


def product_rate(model: GPTConfig, rows: int, compute: Compute) -> float:
    """Measure the fastest of the products that dominate a model, in FLOP/s: the peak that its MFU is a share of."""
    C = model.n_embd
    up = time_product(rows, C, 4 * C, compute)
    down = time_product(rows, 4 * C, C, compute)
    head = time_product(rows, C, model.padded_vocab_size, compute)
    square = time_product(2048, 2048, 2048, compute)
    return max(up, down, head, square)


def time_product(M: int, K: int, N: int, compute: Compute) -> float:
    """Measure the rate of one product in FLOP/s, on random data: zeros and constants flatter it."""
    a_MK = torch.randn(M, K, device=compute.device).to(compute.dtype)
    b_KN = torch.randn(K, N, device=compute.device).to(compute.dtype)
    out_MN = torch.empty(M, N, dtype=compute.dtype, device=compute.device)
    ms = milliseconds(lambda: torch.mm(a_MK, b_KN, out=out_MN), compute.device)
    return 2 * M * K * N / ms * 1e3


def milliseconds(call: Callable[[], Any], device: torch.device) -> float:
    """Return the median time of a call; on a GPU by the GPU's own clock, which does not count launches and waiting."""
    if device.type == "cuda":
        return kernels.milliseconds(call)
    return 1e3 * statistics.median(time_calls(call, device))


def write(out: str | None, name: str, record: dict[str, Any]) -> None:
    """Write the record with its provenance and say where."""
    path = Path(out) if out else get_base_dir() / "bench" / f"{name}.json"
    write_record(path, record)
    print(f"{path} written")
