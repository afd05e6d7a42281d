"""Isolated execution of model-written code: does a program pass its tests? It can neither lie about it nor do harm.

Two processes serve one check. The *program* runs what the model wrote. The *judge* runs the tests, where the names of
the program's functions are calls to the other process: arguments and results cross a pipe by value, as exact built-in
types. What a program does to its interpreter (`os._exit(0)`, a patched `assert`, a look at frames, results that equal
everything) it does to itself: tests, verdict, and the nonce that makes it one, written last, are never in its reach.

Both live in `execution_child.py`, under every layer of `sandbox.py` that the kernel grants without root: namespaces
(mounts, processes, network, ...), a private read-only root with an empty working directory, no capabilities, Landlock,
a list of allowed system calls, no environment, limits. Root becomes nobody. No program runs without `MINIMUM`: the
filter leaves no sockets, processes and signals to others; a private root or Landlock no file but the interpreter's.
"""

import functools
import hmac
import json
import os
import secrets
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nanochat import execution_child as child

MEMORY = 256 << 20  # bytes of address space of each process
START = (  # of a Python that has no site-packages, nor this project on its path for long
    f"import sys; sys.path.append({str(Path(__file__).parents[1])!r}); from nanochat import execution_child; "
    "sys.path.pop(); execution_child.main"
)
TAIL_BYTES = 4096  # kept of what was printed
START_SECONDS = 30.0  # for Python to start on a busy machine
LIMITS = ("memory limit", "CPU limit", "file size limit", "open file limit", "process limit")  # a file: also output
RIGHTS = ("system call filter", "no capabilities", "no new privileges", "no environment", "empty directory")
MINIMUM = [("private root", "Landlock"), *((layer,) for layer in RIGHTS + LIMITS)]  # one of each


@dataclass(frozen=True)
class Result:
    """How a check ended: outcome is passed | failed | timeout | memory | output | killed; output is the end of what was
    printed, and the error; seconds are those of the whole check."""

    outcome: str
    output: str
    seconds: float

    @property
    def passed(self) -> bool:
        """Whether the program ran to its end and all tests held."""
        return self.outcome == "passed"


def _run(task: dict[str, str], memory: int, timeout: float, needs: list[Any]) -> tuple[dict[str, bool], Any, str]:
    """What a judge started for `task` says: layers in force and, where these meet `needs`, a verdict; the output."""
    if os.name != "posix":
        raise ValueError("model-written code runs on Linux only, or with --unsafe on another POSIX system")
    settings = {"memory": memory, "timeout": timeout, "needs": needs}
    with tempfile.TemporaryDirectory(prefix="nanochat-", ignore_cleanup_errors=True) as parent:
        output, folder = Path(parent, "output"), Path(parent, "empty")
        folder.mkdir()
        for path in (parent, folder):
            os.chmod(path, 0o755)  # for nobody
        with (
            open(output, "ab") as printed,
            subprocess.Popen(
                [sys.executable, "-I", "-S", "-u", "-c", f"{START}({settings | {'folder': str(folder)}})"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=printed,
                cwd=folder,
                env={name: os.environ[name] for name in ("LD_LIBRARY_PATH",) if name in os.environ},  # the loader's
                start_new_session=True,
            ) as guard,
        ):
            try:
                answers, _ = guard.communicate(json.dumps(task).encode() + b"\n", START_SECONDS + timeout)
            except subprocess.TimeoutExpired as error:
                raise TimeoutError(f"isolated Python did not start within {START_SECONDS:g} s") from error
            finally:
                guard.terminate()
        text = output.read_bytes()[-TAIL_BYTES:].decode(errors="replace").rstrip()
    lines = answers.split(b"\n")[:-1]  # without one that its writer's end cut short
    if not lines:
        raise OSError(f"isolated Python did not start: {text}")
    late = {"outcome": "timeout", "error": f"no verdict within {timeout:g} s"}
    none = late if guard.returncode == child.TIMED_OUT else {"outcome": "killed", "error": "no verdict"}
    layers, verdict = [*map(json.loads, lines), none][:2]
    return layers, verdict, text


@functools.cache
def isolation() -> dict[str, bool]:
    """Layer -> whether it is in force here: what the kernel answered processes started for the question, once."""
    if os.name != "posix":
        return {}
    return _run({}, MEMORY, 1.0, [()])[0]  # a need that nothing meets: the judge reports and ends


def _refuse(layers: dict[str, bool]) -> None:
    missing = [" or ".join(choice) for choice in MINIMUM if not any(layers.get(name) for name in choice)]
    if missing:
        raise ValueError(
            f"this machine cannot isolate model-written code (no {', no '.join(missing)}): use Linux 5.13 or newer on "
            "x86_64 or aarch64, in no container that forbids seccomp and Landlock, or accept the risk with --unsafe"
        )


def require_isolation(unsafe: bool = False) -> None:
    """ValueError when less than `MINIMUM` is in force here, unless `unsafe`."""
    if not unsafe:
        _refuse(isolation())


def check(
    program: str, test: str, timeout: float = 5.0, memory: int = MEMORY, unsafe: bool = False, prelude: str = ""
) -> Result:
    """Whether `program` passes `test`, both of them Python source; a HumanEval test ends in "check(entry_point)".

    A name that the test does not define is a function of the program. Arguments are passed by value: a change that the
    function makes in them stays on its side. `prelude` is source of the test's side: HumanEval's prompt up to the
    function to be written, whose helpers the program then cannot redefine for the test. `timeout` is in seconds from
    when both sides are ready, `memory` in bytes of address space of each. Without site-packages, sockets or asyncio.
    Raises ValueError when less than the minimum of isolation is in force, unless `unsafe`, which takes what there is.
    """
    if timeout <= 0 or memory < 64 << 20:
        raise ValueError("a check needs a timeout above 0 seconds and at least 64 MiB of memory")
    begin, token = time.monotonic(), secrets.token_hex(16)
    task = {"program": program, "prelude": prelude, "test": test, "token": token}
    layers, verdict, text = _run(task, memory, timeout, [] if unsafe else MINIMUM)
    if not unsafe:
        _refuse(layers)
    outcome, error = verdict["outcome"], verdict["error"]
    if outcome == "passed" and not hmac.compare_digest(str(verdict["token"]), token):
        outcome, error = "failed", "a verdict without the token"
    if outcome == "failed" and error.startswith(("MemoryError", "OSError: [Errno 12]")):
        outcome = "memory"
    elif outcome == "failed" and error.startswith("OSError: [Errno 27]"):
        outcome = "output"
    return Result(outcome, "\n".join(filter(None, (text, error))), time.monotonic() - begin)
