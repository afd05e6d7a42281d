"""Measures this project on one GPU in ten minutes: every number that no CPU can give, the most important first.

    python -m dev.gpu_check --minutes 9 --reference carried/nanochat.tar.gz
    python -m dev.gpu_check --device-type cpu           a rehearsal: every row at tiny sizes, in seconds

1. ceilings: products in bf16 and fp8, and memory
2. each kernel at its training shape against its definition in fp32: errors, milliseconds, share of the ceiling
3. training of d12 in bf16 and d24 in fp8, in turns with karpathy/nanochat, which --reference names: a folder, or an
   archive as `git archive HEAD nanochat | gzip > nanochat.tar.gz` makes it
4. decoding at batch 1 and 32, with CUDA graphs and without; the engine's numbers against the model's
5. whether the GPU waits for the loader; whether accumulation and recomputation change anything

Ids are synthetic and models are built here, so nothing is downloaded, and torch, numpy, safetensors and tiktoken are
all that is needed. Each row goes to a file of JSON lines, $OUT/gpu_check.jsonl or --out, as soon as it is known. A row
that fails says why, and the next one is measured; what --minutes leaves no time for is named. A signal ends the
measuring, not the table. On a machine that is lent for ten minutes, with the archive in an ignored folder:

    PYTHONUNBUFFERED=1 python3 -m dev.gpu_check --minutes 9 --reference carried/nanochat.tar.gz 2>&1 | tee $OUT/log
"""

import contextlib
import gc
import json
import os
import signal
import tarfile
import tempfile
import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import torch

from dev.gpu_bench import ON_GPU, REHEARSAL, Bench, Check, Row, Stopped
from dev.gpu_decoding import decoding
from dev.gpu_kernels import ceilings, kernels
from dev.gpu_training import equalities, training
from nanochat import cli
from nanochat.common import get_base_dir, provenance
from nanochat.compute import Compute
from nanochat.table import to_table, to_text

COLUMNS = ("row", "ms", "share", "error", "gradient error")  # of the table; what else a row has comes last
TIME_IS_UP = "time is up"


@dataclass(frozen=True)
class Config:
    """Flags of the check."""

    minutes: float = cli.option(9.0, "time to stop after; what is missing then is named")
    parts: str = cli.option("1,2,3,4,5", "parts to measure")
    reference: str | None = cli.option(None, "karpathy/nanochat: its folder, or a .tar.gz of it; unset: ours alone")
    device_type: str = cli.option("cuda", "cpu rehearses every row", choices=("cuda", "cpu"))
    out: str | None = cli.option(
        None, "file of JSON lines to append to; unset: gpu_check.jsonl in $OUT, or in bench/ of the base directory"
    )

    def __post_init__(self) -> None:
        cli.require_positive(self, "minutes")
        if set(self.parts.split(",")) - set("12345"):
            raise ValueError(f"--parts {self.parts}: choose from 1,2,3,4,5")
        if self.reference is not None and not Path(self.reference).exists():
            raise ValueError(f"--reference {self.reference} does not exist: name a folder or a .tar.gz")

    @property
    def path(self) -> Path:
        """The file of JSON lines."""
        if self.out is not None:
            return Path(self.out)
        folder = os.environ.get("OUT")
        return Path(folder or get_base_dir() / "bench") / "gpu_check.jsonl"


@contextlib.contextmanager
def stopped_after(minutes: float) -> Iterator[None]:
    """Raise Stopped in the block when time is up, and at SIGINT and SIGTERM."""

    def stop(signum: int, frame: Any) -> None:
        raise Stopped(TIME_IS_UP if signum == signal.SIGALRM else signal.Signals(signum).name)

    signals = (signal.SIGALRM, signal.SIGINT, signal.SIGTERM)
    previous = {signum: signal.signal(signum, stop) for signum in signals}
    # Again every few seconds: an exception that is raised in a callback of another program may get lost there.
    signal.setitimer(signal.ITIMER_REAL, 60 * minutes, 5.0)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        for signum, handler in previous.items():
            signal.signal(signum, handler)


def open_reference(given: str | None, folder: Path) -> Path | None:
    """Return the folder of the reference, after unpacking it into `folder` if it is an archive.

    Raises ValueError where there is no nanochat/gpt.py in it.
    """
    if given is None:
        return None
    root = Path(given)
    if not root.is_dir():
        root = folder / "reference"
        try:
            with tarfile.open(given) as archive:
                archive.extractall(root, filter="data")
        except tarfile.TarError as error:
            raise ValueError(f"--reference {given} is no archive that tar can read ({error})") from error
    found = sorted(root.glob("**/nanochat/gpt.py"))
    if not found:
        raise ValueError(f"--reference {given} has no nanochat/gpt.py: name a checkout of karpathy/nanochat")
    return found[0].parent.parent.resolve()


def run(checks: Sequence[Check], bench: Bench, minutes: float, file: TextIO) -> tuple[list[Row], str | None]:
    """Measure one check after the other; return the rows, and what ended this early, if something did."""
    rows: list[Row] = []

    def write(row: Row) -> None:
        rows.append(row)
        file.write(json.dumps(row) + "\n")
        file.flush()
        print(to_text(row), flush=True)

    n_done = 0
    ended = None
    try:
        with stopped_after(minutes):
            for check in checks:
                for row in attempt(check, bench):
                    write(row)
                n_done += 1
    except Stopped as stopped:
        ended = str(stopped)
    for check in checks[n_done:]:
        write({"row": check.name, "skipped": ended})
    return rows, ended


def attempt(check: Check, bench: Bench) -> Iterator[Row]:
    """Yield the rows of a check, and one that says why if it fails."""
    began = time.monotonic()
    try:
        for row in check.measure(bench):
            yield {"row": check.name, **row, "seconds": round(time.monotonic() - began, 1)}
    except Exception as error:  # such as no memory, or a kernel that is not installed: the next check goes on
        traceback.print_exc()
        yield {"row": check.name, "failed": f"{type(error).__name__}: {error}"[:300]}
    if bench.on_gpu:
        # The next check begins with all of the memory, and counts its own graphs.
        torch.compiler.reset()
        torch._dynamo.utils.counters.clear()
        gc.collect()
        with contextlib.suppress(RuntimeError):  # a GPU that faulted refuses all calls: then each row will say so
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(bench.device)


def show(rows: Sequence[Row]) -> None:
    """Print the table, and which kernels the models ran with."""
    lines = []
    for row in rows:
        line = {name: row.get(name) for name in COLUMNS}
        line["more"] = {name: value for name, value in row.items() if name not in (*COLUMNS, "kernels", "seconds")}
        lines.append(line)
    print(f"\n{to_table(lines)}\n")
    for row in rows:
        if "kernels" in row:
            print(f"{row['row']} ran with {row['kernels']}")


def main() -> None:
    config = cli.parse(Config, description=__doc__)
    compute = Compute.create(config.device_type)
    config.path.parent.mkdir(parents=True, exist_ok=True)
    with (
        tempfile.TemporaryDirectory(prefix="nanochat-gpu-") as temporary,
        open(config.path, "a", encoding="utf-8") as file,
    ):
        bench = Bench(
            compute=compute,
            sizes=ON_GPU if compute.device.type == "cuda" else REHEARSAL,
            folder=Path(temporary),
            reference=open_reference(config.reference, Path(temporary)),
        )
        parts = [ceilings, kernels, training, decoding, equalities]
        checks = []
        for part in config.parts.split(","):
            checks += parts[int(part) - 1](bench)
        file.write(json.dumps({"row": "machine", "device": compute.name, **provenance()}) + "\n")
        rows, ended = run(checks, bench, config.minutes, file)
    show(rows)
    print(f"{config.path} written")
    if ended is not None:
        print(f"ended early: {ended}")
    if ended not in (None, TIME_IS_UP):
        raise KeyboardInterrupt


if __name__ == "__main__":
    cli.run(main)
