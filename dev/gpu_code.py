"""The code that a training step runs on an H100, inspected without one: python -m dev.gpu_code

Models take a micro-step and an optimizer step on tensors without values (fake_gpu.py), and torch.compile makes its code
for them (graph_count.py). Two tables come of that:

1. The bytes that the generated kernels move, which is what they cost, beside the most that they may (gpu_workload.py).
   The model of a step, `python -m dev.bench plan`, rests on these numbers.
2. The kernels that move most of them, and our own, as machine code (triton_code.py): registers, bytes that do not fit
   into registers, and the widest load and store of a thread. Inductor writes some kernels in several tilings, and
   measures on the GPU which is the fastest; the row is that of the best one here.

Ends with status 1 if a part moves more than it may, or if a kernel spills in each of its tilings. Needs g++, a build of
PyTorch without CUDA, and Triton: `pip install triton`. Takes some minutes.
"""

import importlib.util
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

from dev import null_cuda
from nanochat import cli
from nanochat.table import to_table

LISTED = 0.02  # kernels that move less than this share of a run's bytes are in the record alone


@dataclass(frozen=True)
class Config:
    """Flags of this command."""

    out: str | None = cli.option(None, "JSON record to write; unset: bench/gpu_code.json in the base directory")


def main() -> None:
    config = cli.parse(Config, description=__doc__)
    if problem := null_cuda.missing():
        raise ValueError(f"dev.gpu_code cannot run here: {problem}")
    if importlib.util.find_spec("triton") is None:
        raise ValueError("dev.gpu_code compiles Triton kernels: pip install triton")
    with tempfile.TemporaryDirectory() as folder:
        null_cuda.load(null_cuda.compile_library(Path(folder)))
    # These import PyTorch, which finds a GPU from now on.
    from dev import triton_code
    from dev.gpu_workload import WORKLOADS, count_step, part_row
    from dev.graph_count import GraphCount
    from dev.measure import write

    triton_code.use_h100()
    parts = []
    kernels = []
    for workload in WORKLOADS:
        graphs = GraphCount(with_sources=True)
        parts += count_step(workload, graphs)
        kernels += [(workload.name, kernel) for kernel in triton_code.generated_kernels(graphs)]
    for backward in (False, True):
        code = triton_code.disassemble(triton_code.compile_fused_mlp(backward))
        name = "nanochat/fused_mlp.py, backward" if backward else "nanochat/fused_mlp.py"
        kernels.append(("bf16, fused MLP", triton_code.Kernel(name, 0.0, [code])))

    rows = []
    for run, kernel in kernels:
        code = kernel.best()
        row = {
            "run": run,
            "kernel": kernel.name[:70],
            "GB": kernel.moved_bytes * kernel.runs / 1e9,
            "registers": code.registers,
            "spilled": code.spilled_bytes,
            "load bits": code.load_bits,
            "store bits": code.store_bits,
            "tilings that spill": f"{sum(tiling.spilled_bytes > 0 for tiling in kernel.tilings)}/{len(kernel.tilings)}",
        }
        rows.append(row)
    print(to_table([part_row(part) for part in parts]))
    print(to_table([row for row in rows if is_listed(row, rows)]))
    for workload in WORKLOADS:
        own = [row for row in rows if row["run"] == workload.name]
        wide = sum(row["GB"] for row in own if row["load bits"] >= 128 or row["store bits"] >= 128)
        print(
            f"{workload.name}: {wide / sum(row['GB'] for row in own):.0%} of the bytes by kernels with 128-bit accesses"
        )
    write(config.out, "gpu_code", {"parts": [asdict(part) for part in parts], "kernels": rows})

    too_many = [f"{part.run}, {part.part}" for part in parts if part.bytes > part.limit]
    spilling = [f"{row['run']}, {row['kernel']}" for row in rows if row["spilled"]]
    for problem in too_many:
        print(f"moves more than it may: {problem}", file=sys.stderr)
    for problem in spilling:
        print(f"spills in each of its tilings: {problem}", file=sys.stderr)
    if too_many or spilling:
        sys.exit(1)


def is_listed(row: dict, rows: list[dict]) -> bool:
    """Return whether to print a kernel: it moves a good share of its run's bytes, or spills, or is ours."""
    total = sum(other["GB"] for other in rows if other["run"] == row["run"])
    return row["spilled"] > 0 or row["GB"] >= LISTED * total


if __name__ == "__main__":
    cli.run(main)
