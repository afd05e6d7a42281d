"""Windows and macOS, as far as Linux can tell. Oracles: mypy, which knows what each system's Python has; a Python from
which what Windows lacks was taken away.

That no module imports what Windows lacks is test_imports.py's.
"""

import io
import os
import re
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

from nanochat import cli, common, execution
from nanochat.compute import Compute, free_memory, usable_cores

ROOT = Path(__file__).resolve().parent.parent


def test_every_name_exists_on_windows():
    """Outside execution_child.py, which is a program for Linux. What macOS lacks, Windows lacks, too."""
    # Without what is imported mypy takes two seconds, and says more than is true about types, but not about names.
    flags = ["--platform", "win32", "--follow-imports", "skip", "--cache-dir", os.devnull, "--config-file", os.devnull]
    command = [sys.executable, "-m", "mypy", "--ignore-missing-imports", *flags, "nanochat", "scripts", "tasks"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert re.search(r"checked \d+ source files|no issues found", result.stdout), result.stdout + result.stderr
    absent = [line for line in result.stdout.splitlines() if "Module has no attribute" in line]
    assert [line for line in absent if "execution_child.py" not in line] == []


@pytest.fixture
def windows(monkeypatch):
    """Take away what Windows lacks, and put a psutil there that answers as the one of Windows does."""
    monkeypatch.setattr(sys, "platform", "win32")
    for name in ("fork", "sysconf", "sched_getaffinity", "uname"):
        monkeypatch.delattr(os, name)
    for name in ("fcntl", "resource", "readline"):
        monkeypatch.setitem(sys.modules, name, None)
    psutil = types.ModuleType("psutil")
    psutil.Process = lambda: types.SimpleNamespace(memory_info=lambda: types.SimpleNamespace(peak_wset=123))
    psutil.virtual_memory = lambda: types.SimpleNamespace(available=1 << 20)
    monkeypatch.setitem(sys.modules, "psutil", psutil)
    opens = os.open

    def open_no_folder(path, *arguments, **named):
        if os.path.isdir(path):
            raise PermissionError(13, "Permission denied", path)
        return opens(path, *arguments, **named)

    monkeypatch.setattr(os, "open", open_no_folder)


def test_files_and_memory_on_windows(windows, tmp_path):
    common.atomic_write_json(tmp_path / "a.json", {"a": "ü"})
    assert common.read_json(tmp_path / "a.json") == {"a": "ü"}
    compute = Compute(device=torch.device("cpu"), dtype=torch.float32, rank=0, world_size=1)
    assert compute.peak_memory() == 123
    assert free_memory(compute.device) <= 1 << 20
    assert usable_cores() == os.cpu_count()
    with pytest.raises(ValueError, match="Windows cannot run model-written code"):
        execution.require_isolation(unsafe=True)


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_a_character_that_a_pipe_lacks_ends_nothing(encoding, monkeypatch):
    pipe = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    monkeypatch.setattr(sys, "stdout", pipe)
    with pytest.raises(SystemExit) as end:
        cli.run(lambda: print("from 37 to 1776: →, 😀"))
    assert end.value.code == 0
    assert pipe.buffer.getvalue().decode(encoding).rstrip() == "from 37 to 1776: ?, ?"
