"""The CUDA path on a machine without a GPU: a test runs in a process that has a cuda:0 on which nothing is computed.

    @on_null_cuda
    def test_something(depth):
        with fake_gpu.FakeGpu("H100"):  # fake_gpu.py: what the device says of itself, and tensors without values
            ...

PyTorch asks once, at the start of a process, whether there is a device. So `on_null_cuda` starts another process,
in which pytest loads this file, and with it null_cuda.cpp, before PyTorch, and runs that one test. The library is
compiled once for a run of pytest, in about two seconds. Tests are skipped where g++ or PyTorch's headers are missing.

This file must not import torch.
"""

import atexit
import ctypes
import functools
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

TESTS = Path(__file__).parent
SOURCE = TESTS / "null_cuda.cpp"
LOADED = "NANOCHAT_TEST_NULL_CUDA"  # the variable that tells the other process which library to load


def torch_folder() -> Path:
    """Return the folder of PyTorch, which is found without importing it."""
    spec = importlib.util.find_spec("torch")
    assert spec is not None and spec.origin is not None
    return Path(spec.origin).parent


def missing() -> str | None:
    """Say what the library cannot be compiled without on this machine; None if all is there."""
    if sys.platform != "linux":
        return "null_cuda.cpp is loaded as a Linux library"
    if shutil.which("g++") is None:
        return "no g++"
    if not (torch_folder() / "include" / "ATen" / "detail" / "CUDAHooksInterface.h").exists():
        return "this build of PyTorch comes without its C++ headers"
    return None


@functools.cache
def library() -> Path:
    """Compile null_cuda.cpp and return the library, which is deleted when this process ends."""
    folder = tempfile.mkdtemp(prefix="null_cuda_")
    atexit.register(shutil.rmtree, folder)
    path = Path(folder) / "null_cuda.so"
    torch = torch_folder()
    command = ["g++", "-O0", "-std=c++20", "-shared", "-fPIC", str(SOURCE), "-o", str(path)]
    command += [f"-I{torch / 'include'}", f"-L{torch / 'lib'}", f"-Wl,-rpath,{torch / 'lib'}", "-lc10", "-ltorch_cpu"]
    subprocess.run(command, check=True, capture_output=True, text=True)
    return path


def load() -> None:
    """Load the library, and with it PyTorch's own libraries."""
    assert "torch" not in sys.modules, "PyTorch has asked already whether there is a GPU"
    ctypes.CDLL(os.environ[LOADED], mode=ctypes.RTLD_GLOBAL)


if LOADED in os.environ:
    load()


def on_null_cuda(test: Callable[..., None]) -> Callable[..., None]:
    """Run a test in a process of its own, in which cuda:0 exists."""

    @functools.wraps(test)
    def run(*args: Any, **kwargs: Any) -> None:
        if LOADED in os.environ:
            return test(*args, **kwargs)
        if reason := missing():
            pytest.skip(reason)
        this_test, _, _ = os.environ["PYTEST_CURRENT_TEST"].rpartition(" ")
        command = [sys.executable, "-m", "pytest", "-p", "null_cuda", "-p", "no:cacheprovider", "--tb=short", this_test]
        command += ["-p", "no:logging"]  # with it torch.compile formats thousands of messages that nobody reads
        environment = {
            **os.environ,
            LOADED: str(library()),
            "PYTHONPATH": f"{TESTS}{os.pathsep}{TESTS.parent}",
            "OMP_NUM_THREADS": "1",
        }
        environment.pop("NANOCHAT_DTYPE", None)
        result = subprocess.run(command, cwd=TESTS.parent, env=environment, capture_output=True, text=True)
        assert result.returncode == 0, f"{result.stdout}\n{result.stderr}"

    return run
