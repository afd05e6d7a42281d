"""Run code that a model wrote: does a program pass its tests? It can neither lie about it nor do harm.

One check is a family of three processes, all of them `execution_child.py`:

    launcher      starts the two others, waits for the judge, ends the program
      program     runs what the model wrote, and answers calls of its function
      judge       runs the tests, in which that function is a call to the program's process

The two are sealed before they see a line of the model's code: a memory limit, an empty working directory, Landlock
(only Python's own library can be read, nothing can be written) and seccomp (no sockets, processes, threads or signals).

Arguments and results cross a pipe by value, as exact built-in types. So whatever a program does to its interpreter
(`os._exit(0)`, a patched `assert`, results that equal everything), it does to itself. The verdict is the exit status of
the judge, which no other process can set. An exit status of the program itself, the usual grader, is passed by
`os._exit(0)`.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

from nanochat.execution_child import FAILED, PASSED, REFUSED

OUTPUT_TAIL = 4096  # bytes kept of what was printed
START_SECONDS = 30.0  # for Python to start on a busy machine
CHILD = Path(__file__).with_name("execution_child.py")


class Result(NamedTuple):
    """Verdict of one check, and the end of what was printed; the error that decided it comes last."""

    passed: bool
    output: str


def require_isolation(unsafe: bool = False) -> None:
    """Raise ValueError if this machine cannot isolate model-written code, unless `unsafe`."""
    check(program="", entry_point="f", test="", unsafe=unsafe)


def check(
    program: str, entry_point: str, test: str, prelude: str = "", timeout: float = 5.0, unsafe: bool = False
) -> Result:
    """Run `test` on the function `entry_point` of `program`; all are Python source.

    The test calls the function by its name. Arguments are passed by value: a change that the function makes in them
    stays on its side. prelude: source that the test needs, such as the helpers in HumanEval's prompt, which the program
    then cannot redefine. timeout: seconds, without Python's start.
    Raises ValueError if this machine cannot isolate programs, unless `unsafe`: then they run as isolated as it can.
    Windows, which cannot fork, runs none.
    """
    if sys.platform == "win32":
        raise ValueError(
            "Windows cannot run model-written code (humaneval) as this does: use WSL, or leave humaneval out"
        )
    task = {"program": program, "entry_point": entry_point, "test": test, "prelude": prelude}
    # -I and -S: no PYTHON* variables, no site-packages, nothing of this project on the path. -u: nothing that was
    # printed before a crash is lost.
    command = [sys.executable, "-I", "-S", "-u", str(CHILD), str(timeout), "unsafe" if unsafe else "sealed"]
    # No environment, which may hold secrets, but for what the loader needs to find Python's own library.
    environment = {name: value for name, value in os.environ.items() if name == "LD_LIBRARY_PATH"}
    with tempfile.TemporaryDirectory(prefix="nanochat-") as empty, tempfile.TemporaryFile() as printed:
        try:
            status = subprocess.run(
                command,
                input=json.dumps(task).encode(),
                stdout=printed,
                stderr=printed,
                cwd=empty,
                env=environment,
                timeout=START_SECONDS + timeout,
                start_new_session=True,  # Ctrl-C reaches us alone, and we end the launcher
            ).returncode
        except subprocess.TimeoutExpired as error:
            raise OSError(f"isolated Python did not start within {START_SECONDS:g} s") from error
        printed.seek(0)
        output = printed.read()[-OUTPUT_TAIL:].decode(errors="replace").rstrip()
    if status == REFUSED:
        raise ValueError(
            f"this machine cannot isolate model-written code ({output}): use Linux 5.13 or newer on x86_64 or aarch64, "
            "in no container that forbids seccomp and Landlock, or accept the risk with --unsafe"
        )
    if status not in (PASSED, FAILED):
        raise OSError(f"isolated Python did not start: {output}")
    return Result(status == PASSED, output)
