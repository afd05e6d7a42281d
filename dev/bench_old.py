"""What every benchmark shares: timing, measured ceilings of the machine, tables, and a record of JSON and Markdown."""

import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from nanochat.common import atomic_write, write_record


def synchronize(device: torch.device | str) -> None:
    """Wait until the device has done what it was given."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def time_calls(
    call: Callable[[], Any], device: torch.device | str = "cpu", seconds: float = 0.5, least: int = 5, warmup: int = 2
) -> list[float]:
    """Seconds of each call after `warmup` of them: as many as fit in `seconds`, but no fewer than `least`."""
    for _ in range(warmup):
        call()
    synchronize(device)
    times: list[float] = []
    while len(times) < least or sum(times) < seconds:
        began = time.perf_counter()
        call()
        synchronize(device)
        times.append(time.perf_counter() - began)
    return times


def gemm_rate(
    m: int, k: int, n: int, dtype: torch.dtype, device: torch.device | str = "cpu", seconds: float = 0.5
) -> float:
    """Median FLOP/s of an (m, k) by (k, n) matrix product; on random data, since zeros and constants flatter it."""
    a, b = (torch.randn(shape, device=device).to(dtype) for shape in ((m, k), (k, n)))
    out = torch.empty(m, n, dtype=dtype, device=device)
    times = time_calls(lambda: torch.mm(a, b, out=out), device, seconds)
    return 2 * m * k * n / statistics.median(times)


def copy_bandwidth(device: torch.device | str = "cpu", size: int = 256 << 20, seconds: float = 0.5) -> float:
    """Median byte/s of a copy of `size` bytes, read and written bytes both counted."""
    source = torch.randint(256, (size,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * size / statistics.median(time_calls(lambda: target.copy_(source), device, seconds))


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, least and greatest of repeated measurements."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def show(value: Any) -> str:
    """A cell of a table: numbers to four digits, None as not measured."""
    if value is None:
        return "not measured"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def markdown_table(rows: Sequence[dict[str, Any]]) -> str:
    """A Markdown table with the keys of the first row as its head; every row has the same keys."""
    head = list(rows[0])
    lines = [head, ["---"] * len(head), *([show(row[key]) for key in head] for row in rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def write_report(path: Path | str, record: dict[str, Any], markdown: str) -> None:
    """Write PATH.json (the record with its provenance) and PATH.md beside it, and print the latter."""
    path = Path(path)
    write_record(path.with_name(path.name + ".json"), record)
    atomic_write(path.with_name(path.name + ".md"), markdown)
    print(f"{markdown}\n{path}.json and {path}.md written", flush=True)
