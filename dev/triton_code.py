"""Triton kernels compiled for an H100 that is not here: registers, spills, and how wide they read and write memory.

    use_h100()
    for kernel in generated_kernels(graphs):          # those that Inductor wrote (graph_count.py)
        kernel.best().registers, kernel.best().spilled_bytes, kernel.best().load_bits

Triton brings its own assembler and disassembler, so neither CUDA nor a driver is needed. What is read here is the
machine code itself. A kernel whose values do not fit into registers spills them: it writes to memory, and reads back,
what it was made to keep from memory. And a thread that asks for 128 bits at once needs a quarter of the instructions
that it would need for 32, which is what lets a kernel that only moves data come near to the memory's bandwidth.
"""

import subprocess
import tempfile
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch._inductor.codecache import PyCodeCache
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from dev.graph_count import GraphCount
from dev.machine_code import MachineCode, read
from nanochat import fused_mlp

H100 = GPUTarget("cuda", 90, warp_size=32)


@dataclass
class Kernel:
    """A kernel: the bytes that a run of it moves, how often it ran, and its code in each of its tilings."""

    name: str
    moved_bytes: float
    tilings: list[MachineCode]
    runs: int = 0

    def best(self) -> MachineCode:
        """Return the tiling with the fewest spills, and of those the one with the widest accesses."""
        return min(self.tilings, key=lambda code: (code.spilled_bytes, -code.load_bits - code.store_bits))


class NoDriver:
    """Stands in for the driver of a GPU: it knows the GPU's kind, and can launch nothing."""

    def get_current_target(self) -> GPUTarget:
        return H100


def use_h100() -> None:
    """Let Triton compile in this process without a driver."""
    triton.runtime.driver.set_active(NoDriver())
    # Inductor would look for a real driver again, because `torch.cuda` says that there is a GPU.
    torch._inductor.runtime.triton_helpers.set_driver_to_gpu = lambda: None
    # PyTorch's own launcher would keep nothing of a kernel but the address of its code.
    torch._inductor.config.use_static_cuda_launcher = False


def generated_kernels(graphs: GraphCount) -> list[Kernel]:
    """Compile the kernels of all graphs that ran, and return those that move most bytes first."""
    kernels: dict[str, Kernel] = {}
    for graph in graphs.compiled:
        for name, source in graph.sources.items() if graph.runs else ():
            nameless = source.replace(name, "")  # graphs may share a kernel, and number it differently
            if nameless not in kernels:
                kernels[nameless] = compile_generated(name, source)
            kernels[nameless].runs += graph.runs
    return sorted(kernels.values(), key=lambda kernel: -kernel.moved_bytes * kernel.runs)


def compile_generated(name: str, source: str) -> Kernel:
    """Compile a kernel that Inductor wrote, in each of the tilings among which it would choose by measuring."""
    tuner = PyCodeCache.load(source).triton_
    tuner.precompile(warm_cache_only=True)
    tilings = [disassemble(result.kernel) for result in tuner.compile_results]
    return Kernel(name, 1e9 * tuner.inductor_meta["kernel_num_gb"], tilings)


def compile_fused_mlp(backward: bool) -> Any:
    """Compile our own kernel as fused_mlp.py launches it, and return what Triton returns."""
    M = fused_mlp.BLOCK_M
    N = fused_mlp.BLOCK_N
    K = fused_mlp.BLOCK_K
    types = {
        "a": f"tensordesc<bf16[{M},{K}]>",
        "b": f"tensordesc<bf16[{K},{N}]>" if backward else f"tensordesc<bf16[{N},{K}]>",
        "saved": f"tensordesc<bf16[{M},{N}]>",
        "out": f"tensordesc<bf16[{M},{N}]>",
        "M": "i32",
        "N": "i32",
        "K": "i32",
    }
    constants = {"BACKWARD": backward, "BLOCK_M": M, "BLOCK_N": N, "BLOCK_K": K}
    kernel = fused_mlp._relu2_kernel
    signature = {name: "constexpr" if name in constants else types[name] for name in kernel.arg_names}
    values = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    return triton.compile(ASTSource(kernel, signature, values), target=H100, options={"num_warps": 8, "num_stages": 4})


def disassemble(compiled: Any) -> MachineCode:
    """Read the machine code of a kernel that Triton has compiled."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", "-sass", file.name]
        return read(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
