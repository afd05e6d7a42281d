"""Run code that a model wrote: does a program pass its tests? It can neither lie about it nor do harm.

One check starts two processes of `execution_child.py`, each sealed before it sees a line of the model's code:

    program   runs what the model wrote, and answers calls of its functions
    judge     runs the tests; a name that they do not define is a call to the other process

Arguments and results cross a pipe by value, as exact built-in types. Whatever a program does to its interpreter
(`os._exit(0)`, a patched `assert`, results that equal everything), it does to itself: tests and verdict live in the
judge, and the verdict goes through a pipe that only this process and the judge hold.

Sealed means: resource limits, no environment, an empty directory, Landlock (only the interpreter's library can be
read, nothing can be written) and seccomp (no sockets, processes, threads or signals). Where the kernel lacks
Landlock or seccomp nothing runs, unless the user says --unsafe.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

MEMORY = 256 << 20  # bytes of address space of each process
OUTPUT_TAIL = 4096  # bytes kept of what was printed
START_SECONDS = 30.0  # for two Pythons to start on a busy machine
CHILD = Path(__file__).with_name("execution_child.py")


@dataclass(frozen=True)
class Result:
    """How a check ended: passed | failed | timeout | memory | output (too much of it) | killed.

    output: the end of what was printed, and the error. seconds: of the whole check.
    """

    outcome: str
    output: str
    seconds: float

    @property
    def passed(self) -> bool:
        """True if the program ran to its end and all tests held."""
        return self.outcome == "passed"


def require_isolation(unsafe: bool = False) -> None:
    """Raise ValueError if this machine cannot isolate model-written code, unless `unsafe`."""
    check(program="", test="", unsafe=unsafe)


def check(
    program: str, test: str, timeout: float = 5.0, memory: int = MEMORY, unsafe: bool = False, prelude: str = ""
) -> Result:
    """Run `program` against `test`, both Python source; a HumanEval test ends in "check(entry_point)".

    A name that the test does not define is a function of the program. Arguments are passed by value: a change that the
    function makes in them stays on its side. `prelude` is source of the test's side: HumanEval's prompt before the
    function, whose helpers the program then cannot redefine for the test. `timeout` is in seconds from when both sides
    are ready, `memory` in bytes of address space of each. Raises ValueError if this machine cannot isolate programs;
    with `unsafe` they then run as isolated as it can.
    """
    if timeout <= 0 or memory < 64 << 20:
        raise ValueError("a check needs a timeout above 0 seconds and at least 64 MiB of memory")
    if os.name != "posix":
        raise ValueError("model-written code runs on Linux only, or with --unsafe on another POSIX system")
    began = time.monotonic()
    task = {"program": program, "prelude": prelude, "test": test, "unsafe": unsafe}
    with tempfile.TemporaryDirectory(prefix="nanochat-") as parent:
        printed = Path(parent, "output")
        verdict = _run_both(task, printed, Path(parent, "empty"), memory, timeout)
        text = printed.read_bytes()[-OUTPUT_TAIL:].decode(errors="replace").rstrip()
    if verdict["outcome"] == "refused":
        raise ValueError(
            f"this machine cannot isolate model-written code (no {', no '.join(verdict['missing'])}): use Linux 5.13 "
            "or newer on x86_64 or aarch64, in no container that forbids seccomp and Landlock, or accept the risk with "
            "--unsafe"
        )
    if verdict["outcome"] == "none":
        raise OSError(f"isolated Python did not start: {text}")
    outcome = verdict["outcome"]
    error = verdict["error"]
    if outcome == "failed" and error.startswith(("MemoryError", "OSError: [Errno 12]")):  # ENOMEM
        outcome = "memory"
    if outcome == "failed" and error.startswith("OSError: [Errno 27]"):  # EFBIG
        outcome = "output"
    return Result(outcome, "\n".join(filter(None, (text, error))), time.monotonic() - began)


def _run_both(task: dict[str, Any], printed: Path, folder: Path, memory: int, timeout: float) -> dict[str, Any]:
    """Start program and judge, wait for the verdict, and end both; returns the verdict."""
    folder.mkdir()
    requests_out, requests_in = os.pipe()
    replies_out, replies_in = os.pipe()
    with open(printed, "ab") as output, contextlib.ExitStack() as running:
        try:
            program = _start("program", (requests_out, replies_in), subprocess.DEVNULL, output, folder, memory, timeout)
            running.callback(_end, program)
            judge = _start("judge", (replies_out, requests_in), subprocess.PIPE, output, folder, memory, timeout)
            running.callback(_end, judge)
        finally:
            # The children hold these now. A pipe ends when its last writer does, so our copies must go.
            for descriptor in (requests_out, requests_in, replies_out, replies_in):
                os.close(descriptor)
        try:
            answer, _ = judge.communicate(json.dumps(task).encode() + b"\n", START_SECONDS + timeout)
        except subprocess.TimeoutExpired as error:
            raise OSError(f"isolated Python did not start within {START_SECONDS:g} s") from error
        if judge.returncode == -signal.SIGALRM:  # the judge's own timer, which started when both sides were ready
            return {"outcome": "timeout", "error": f"no verdict within {timeout:g} s"}
        if judge.returncode < 0:
            return {"outcome": "killed", "error": "no verdict"}
        if not answer.endswith(b"\n"):
            return {"outcome": "none"}
        verdict = json.loads(answer)
        if verdict["outcome"] == "ended":  # the program's end of the pipes closed before the tests were through
            with contextlib.suppress(subprocess.TimeoutExpired):
                program.wait(timeout)
            killed = program.returncode is not None and program.returncode < 0
            verdict["outcome"] = "killed" if killed else "failed"
        return verdict


def _start(
    role: str, pipes: tuple[int, int], stdin: int, output: IO[bytes], folder: Path, memory: int, timeout: float
) -> subprocess.Popen[bytes]:
    """Start one side: `pipes` are what it reads from and writes to, `folder` its empty working directory."""
    settings = [role, *pipes, memory, timeout]
    return subprocess.Popen(
        # -I and -S: no PYTHON* variables, no site-packages, nothing of this project on the path.
        [sys.executable, "-I", "-S", "-u", str(CHILD), *map(str, settings)],
        stdin=stdin,
        stdout=subprocess.PIPE if role == "judge" else output,
        stderr=output,
        cwd=folder,
        # What the loader needs to find Python's own library; the child clears even that.
        env={name: os.environ[name] for name in ("LD_LIBRARY_PATH",) if name in os.environ},
        pass_fds=pipes,
        start_new_session=True,
    )


def _end(process: subprocess.Popen[bytes]) -> None:
    """Kill a side if it still runs. It could not fork, so nothing else is left of it."""
    process.kill()
    process.wait()
    for stream in (process.stdin, process.stdout):
        if stream is not None:
            with contextlib.suppress(BrokenPipeError):
                stream.close()
