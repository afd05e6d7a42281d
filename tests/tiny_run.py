"""Runs the project's scripts as processes of their own, quickly: forked from one that has imported torch already."""

import contextlib
import importlib
import io
import itertools
import json
import multiprocessing
import os
import runpy
import socket
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing import forkserver
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest

from nanochat import cli

_PRELOAD = ("pytest", "torch._dynamo", "pyarrow.parquet", "yaml", "tqdm", "nanochat.trainer", "nanochat.engine")
_NUMBERS = itertools.count()
_FORK = multiprocessing.get_context("forkserver")

# A model that learns in milliseconds, and a batch of eight rows that 1, 2 and 4 ranks divide.
SHAPE = ["--depth", "2", "--aspect-ratio", "16", "--head-dim", "16", "--max-seq-len", "64"]
BASE = ["--dataset", "corpus", *SHAPE]
STEPS = ["--no-compile", "--total-batch-size", "512", "--eval-tokens", "1024", "--sample-every", "0"]
SKILLS = ["--scale", "0.05"]  # small mixtures for mid_train and chat_sft


@dataclass(frozen=True)
class Result:
    """How a process ended: its exit code (negative: killed by that signal) and what it wrote."""

    code: int
    out: str
    err: str

    @property
    def error_line(self) -> str:
        """The one line that a user's mistake leaves on stderr."""
        assert self.code == 2, f"exit code {self.code}\n{self.out}\n{self.err}"
        lines = [line for line in self.err.splitlines() if line.strip()]
        assert len(lines) == 1, self.err
        assert "Traceback" not in self.err + self.out
        return lines[0]


@dataclass(frozen=True)
class Running:
    """A process under way."""

    process: BaseProcess
    out: Path
    err: Path

    @property
    def pid(self) -> int:
        assert self.process.pid is not None
        return self.process.pid

    def written(self) -> str:
        """What is on its stdout so far."""
        return self.out.read_text() if self.out.exists() else ""

    def wait(self, seconds: float = 120) -> Result:
        self.process.join(seconds)
        if self.process.exitcode is None:
            self.process.kill()
            self.process.join()
            raise AssertionError(f"still running after {seconds} s\n{self.written()}")
        return Result(self.process.exitcode, self.out.read_text(), self.err.read_text())


def _start_server() -> None:
    """Start the process that the others are forked from, once: one thread each, whatever this machine has."""
    before = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = "1"
    _FORK.set_forkserver_preload(list(_PRELOAD))
    forkserver.ensure_running()
    if before is None:
        del os.environ["OMP_NUM_THREADS"]
    else:
        os.environ["OMP_NUM_THREADS"] = before


def _child(
    environment: dict[str, str], files: tuple[Path, Path, Path], target: Callable[..., None], args: tuple
) -> None:
    os.environ.clear()
    os.environ.update(environment)
    for fd, path in enumerate(files):
        file = os.open(path, os.O_RDONLY if fd == 0 else os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, fd)
        os.close(file)
    sys.stdin = os.fdopen(0, encoding="utf-8")  # multiprocessing has replaced it
    target(*args)


def _run_module(module: str, argv: list[str]) -> None:
    warnings.filterwarnings("ignore", message=".*found in sys.modules")  # it was imported before the fork
    sys.argv = [module, *argv]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def start(target: Callable[..., None], *args: Any, stdin: bytes = b"", **environment: str) -> Running:
    """Start `target(*args)`, a function of a module, in a process of its own, with more variables if given."""
    _start_server()
    folder = Path(os.environ["NANOCHAT_BASE_DIR"]).parent / "output"
    folder.mkdir(exist_ok=True)
    number = next(_NUMBERS)
    out, err = folder / f"{number}.out", folder / f"{number}.err"
    given = folder / f"{number}.in"
    given.write_bytes(stdin)
    variables = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    process = _FORK.Process(target=_child, args=(variables, (given, out, err), target, args))
    process.start()
    return Running(process, out, err)


def start_script(module: str, *argv: str, stdin: bytes = b"", **environment: str) -> Running:
    """Start `python -m module argv`."""
    return start(_run_module, module, list(argv), stdin=stdin, **environment)


def script(module: str, *argv: str, stdin: bytes = b"", **environment: str) -> Result:
    """`python -m module argv`, to its end."""
    return start_script(module, *argv, stdin=stdin, **environment).wait()


def call(module: str, *argv: str) -> Result:
    """`python -m module argv` in this process: for mistakes that end a script before it has done anything."""
    out, err = io.StringIO(), io.StringIO()
    before = sys.argv
    sys.argv = [module, *argv]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), pytest.raises(SystemExit) as end:
            cli.run(importlib.import_module(module).main)
    finally:
        sys.argv = before
    return Result(end.value.code, out.getvalue(), err.getvalue())


def run(module: str, *argv: str, **environment: str) -> Result:
    """`script` that must succeed."""
    result = script(module, *argv, **environment)
    assert result.code == 0, f"exit code {result.code}\n{result.out}\n{result.err}"
    return result


def run_ranks(count: int, module: str, *argv: str, **environment: str) -> list[Result]:
    """The same script on `count` ranks that talk over 127.0.0.1, with the variables that torchrun sets."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
    ranks = [
        start_script(module, *argv, **place, RANK=str(rank), LOCAL_RANK=str(rank), **environment)
        for rank in range(count)
    ]
    return [rank.wait() for rank in ranks]


def metrics(stage: str, tag: str) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl; one that is being written is left out."""
    path = Path(os.environ["NANOCHAT_BASE_DIR"]) / "runs" / stage / tag / "metrics.jsonl"
    text = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in text.split("\n")[:-1]]


def losses(stage: str, tag: str) -> dict[int, float]:
    """Loss by step, each step once."""
    lines = [line for line in metrics(stage, tag) if "loss" in line]
    result = {line["step"]: line["loss"] for line in lines}
    assert len(result) == len(lines), "a step was logged twice"
    return result


def wait_for(condition: Callable[[], bool], running: Running, seconds: float = 60) -> None:
    """Poll until `condition()` holds; the process must not end before."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert running.process.is_alive(), running.wait()
        assert time.monotonic() < deadline, "it does not happen"
        time.sleep(0.002)


@contextlib.contextmanager
def base_dir(path: Path) -> Iterator[Path]:
    """NANOCHAT_BASE_DIR for a while."""
    before = os.environ.get("NANOCHAT_BASE_DIR")
    os.environ["NANOCHAT_BASE_DIR"] = str(path)
    try:
        yield path
    finally:
        os.environ.pop("NANOCHAT_BASE_DIR")
        if before is not None:
            os.environ["NANOCHAT_BASE_DIR"] = before
