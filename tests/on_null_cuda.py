"""Tests of the CUDA path on a machine without a GPU: each runs in a process that has a cuda:0 of dev/null_cuda.py.

    @on_null_cuda
    def test_something(depth):
        with FakeGpu("H100"):
            ...

`on_null_cuda` starts another process, in which pytest loads this file, and with it the library, before PyTorch, and
runs that one test. The library is compiled once for a run of pytest. Tests are skipped where it cannot be.

This file must not import torch.
"""

import atexit
import functools
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dev import null_cuda

TESTS = Path(__file__).parent
LOADED = "NANOCHAT_TEST_NULL_CUDA"  # the variable that tells the other process which library to load

if LOADED in os.environ:
    null_cuda.load(Path(os.environ[LOADED]))


@functools.cache
def library() -> Path:
    """Compile the library, which is deleted when this process ends."""
    folder = tempfile.mkdtemp(prefix="null_cuda_")
    atexit.register(shutil.rmtree, folder)
    return null_cuda.compile_library(Path(folder))


def on_null_cuda(test: Callable[..., None]) -> Callable[..., None]:
    """Run a test in a process of its own, in which cuda:0 exists."""

    @functools.wraps(test)
    def run(*args: Any, **kwargs: Any) -> None:
        if LOADED in os.environ:
            return test(*args, **kwargs)
        if reason := null_cuda.missing():
            pytest.skip(reason)
        this_test, _, _ = os.environ["PYTEST_CURRENT_TEST"].rpartition(" ")
        plugins = ["-p", "on_null_cuda", "-p", "no:cacheprovider"]
        plugins += ["-p", "no:logging"]  # with it torch.compile formats thousands of messages that nobody reads
        environment = {
            **os.environ,
            LOADED: str(library()),
            "PYTHONPATH": f"{TESTS}{os.pathsep}{TESTS.parent}",
            "OMP_NUM_THREADS": "1",
        }
        environment.pop("NANOCHAT_DTYPE", None)
        command = [sys.executable, "-m", "pytest", *plugins, "--tb=short", this_test]
        result = subprocess.run(command, cwd=TESTS.parent, env=environment, capture_output=True, text=True)
        assert result.returncode == 0, f"{result.stdout}\n{result.stderr}"

    return run
