"""A CUDA device that computes nothing, for a machine without one: what the GPU's path does is then seen without a GPU.

    null_cuda.load(null_cuda.compile_library(folder))    # before PyTorch is imported
    with fake_gpu.FakeGpu("H100"):                       # fake_gpu.py: what the device says of itself, and its tensors
        ...

PyTorch asks once, at the start of a process, whether there is a device, so null_cuda.cpp is compiled to a library that
is loaded before it. Tests run in processes of their own for that (tests/on_null_cuda.py), and so does dev/gpu_code.py.

This file must not import torch.
"""

import ctypes
import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path

SOURCE = Path(__file__).parent / "null_cuda.cpp"


def torch_folder() -> Path:
    """Return the folder of PyTorch, which is found without importing it."""
    spec = importlib.util.find_spec("torch")
    assert spec is not None and spec.origin is not None
    return Path(spec.origin).parent


def missing() -> str | None:
    """Say what the library cannot be compiled without on this machine; None if all is there."""
    torch = torch_folder()
    if sys.platform != "linux":
        return "null_cuda.cpp is loaded as a Linux library"
    if shutil.which("g++") is None:
        return "no g++"
    if not (torch / "include" / "ATen" / "detail" / "CUDAHooksInterface.h").exists():
        return "this build of PyTorch comes without its C++ headers"
    if (torch / "lib" / "libtorch_cuda.so").exists():
        return "this build of PyTorch has a CUDA device of its own; its +cpu build has not"
    return None


def compile_library(folder: Path) -> Path:
    """Compile null_cuda.cpp into a library in `folder`, in about two seconds, and return its path."""
    path = folder / "null_cuda.so"
    torch = torch_folder()
    command = ["g++", "-O0", "-std=c++20", "-shared", "-fPIC", str(SOURCE), "-o", str(path)]
    command += [f"-I{torch / 'include'}", f"-L{torch / 'lib'}", f"-Wl,-rpath,{torch / 'lib'}", "-lc10", "-ltorch_cpu"]
    subprocess.run(command, check=True, capture_output=True, text=True)
    return path


def load(library: Path) -> None:
    """Load the library, and with it PyTorch's own libraries."""
    assert "torch" not in sys.modules, "PyTorch has asked already whether there is a GPU"
    ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
