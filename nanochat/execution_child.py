"""What `execution.check` starts: a guard, a judge and a program, each in a process of its own.

    main(SETTINGS) < TASK > STATUS, without site-packages

The guard enters new namespaces, forks the judge, and kills it after its time or when told to end. The judge confines
itself and forks the program's process while it knows nothing yet; both seal themselves. Only now the judge says which
layers of `sandbox` are in force, reads its task, has the program run, and runs the tests.
"""

import builtins
import contextlib
import json
import math
import os
import signal
import sys
import types
from collections.abc import Callable
from typing import Any, BinaryIO, NoReturn

from nanochat import sandbox

MESSAGE_BYTES = 16 << 20  # of one call or result
TIMED_OUT = 124  # exit status


def guard(judge: int, ready: int, timeout: float) -> NoReturn:
    """Kill the judge `timeout` seconds after it is ready, or on SIGTERM, also from our parent's end; else await it."""
    signals: list[int] = []

    def kill(number: int, _: Any) -> None:
        signals.append(number)
        sandbox.granted(os.kill, judge, signal.SIGKILL)

    signal.signal(signal.SIGALRM, kill)
    signal.signal(signal.SIGTERM, kill)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
    sandbox.end_with_parent(signal.SIGTERM)
    os.read(ready, 1)
    signal.setitimer(signal.ITIMER_REAL, timeout)
    os.waitpid(judge, 0)
    sandbox.granted(os.killpg, judge, signal.SIGKILL)
    os._exit(TIMED_OUT if signals else 0)


def send(descriptor: int, message: Any) -> None:
    """Write one message: a line of JSON."""
    data = memoryview(json.dumps(message).encode() + b"\n")
    while data:
        data = data[os.write(descriptor, data) :]


def receive(stream: BinaryIO) -> Any:
    """The next message; EOFError when there is none, ValueError when it is too long or no JSON."""
    if not (line := stream.readline(MESSAGE_BYTES)):
        raise EOFError
    return json.loads(line)


_RATIO = (lambda x: x.as_integer_ratio(), lambda parts: __import__("fractions").Fraction(*parts))
_KINDS: dict[str, Any] = {  # kind -> (value -> parts, parts -> value)
    "int": (lambda x: [hex(x)], lambda parts: int(parts[0], 16)),
    "complex": (lambda x: [x.real, x.imag], lambda parts: complex(*parts)),
    "bytes": (lambda x: [x.hex()], lambda parts: bytes.fromhex(*parts)),
    "range": (lambda x: [x.start, x.stop, x.step], lambda parts: range(*parts)),
    "dict": (lambda x: list(x.items()), dict),
    "iterator": (list, iter),
    "Decimal": _RATIO,
    "Fraction": _RATIO,
    **{kind.__name__: (list, kind) for kind in (list, tuple, set, frozenset)},
}


def pack(value: Any) -> Any:
    """A value in JSON's terms. Of a subclass only the built-in part travels, of an iterator what it yields."""
    if value is None or isinstance(value, bool | float | str) or (isinstance(value, int) and abs(value) < 1 << 62):
        return value
    kind = next((base.__name__ for base in type(value).__mro__ if base.__name__ in _KINDS), None)
    if kind is None and hasattr(value, "__iter__"):
        kind = "iterator"
    if kind is None:
        raise TypeError(f"a {type(value).__name__} is not a value that can be compared from outside")
    return [kind, *(pack(part) for part in _KINDS[kind][0](value))]


def unpack(node: Any) -> Any:
    """The value that `pack` wrote: exact built-in types only, whatever the sender is."""
    if not isinstance(node, list):
        return node
    return _KINDS[node[0]][1]([unpack(part) for part in node[1:]])


def describe(error: BaseException, source: str, name: str) -> str:
    """One line: the error and the line of `source`, compiled under `name`, that it came from."""
    line, step = None, error.__traceback__
    while step:
        line = step.tb_lineno if step.tb_frame.f_code.co_filename == name else line
        step = step.tb_next
    where = f" at line {line}: {source.splitlines()[line - 1].strip()[:200]}" if line else ""
    kind = "" if isinstance(error, ProgramError) else f"{type(error).__name__}: "
    return f"{kind}{str(error)[:300]}".rstrip(": ") + where


class ProgramError(Exception):
    """What the program raised, in a line."""


def serve(requests: BinaryIO, replies: int) -> NoReturn:
    """The program's side: run the source that comes first, then answer calls of its functions."""
    source, module = receive(requests), types.ModuleType("program")
    sys.modules["program"] = module

    def answer(action: Callable[[], Any]) -> None:
        try:
            reply = {"value": pack(action())}
        except Exception as error:
            reply = {"error": describe(error, source, "<program>")}
        send(replies, reply)

    answer(lambda: exec(compile(source, "<program>", "exec"), module.__dict__))
    while True:
        name, args, kwargs = unpack(receive(requests))
        answer(lambda: getattr(module, name)(*args, **kwargs))  # noqa: B023 (called at once)


def judge(task: dict[str, str], ask: int, hear: BinaryIO, verdict: Callable[[str, str], NoReturn]) -> NoReturn:
    """The tests' side, where names that nobody here defines are calls of the program's functions."""

    def answer() -> Any:
        try:
            reply = receive(hear)
            if "error" not in reply:
                return unpack(reply["value"])
            error = str(reply["error"])
        except Exception as problem:
            verdict("ended" if isinstance(problem, EOFError) else "failed", f"no answer from the program: {problem!r}")
        raise ProgramError(error)

    class Namespace(dict[str, Any]):
        def __missing__(self, name: str) -> Callable[..., Any]:
            if hasattr(builtins, name):
                raise KeyError(name)

            def remote(*args: Any, **kwargs: Any) -> Any:
                with contextlib.suppress(BrokenPipeError):
                    send(ask, pack([name, args, kwargs]))
                return answer()

            return remote

    namespace = Namespace(__name__="test")
    try:
        send(ask, task["program"])
        answer()
        exec(compile(task["prelude"], "<prelude>", "exec"), namespace)
        exec(compile(task["test"], "<test>", "exec"), namespace)
    except BaseException as error:
        verdict("failed", describe(error, task["test"], "<test>"))
    verdict("passed", "")


def main(settings: dict[str, Any]) -> None:
    """Split into guard, judge and program; confine the last two; have the program judged."""
    os.environ.clear()
    os.umask(0o022)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})  # until the guard knows whom to kill
    layers = sandbox.enter_namespaces()
    ready, start = os.pipe()
    if worker := os.fork():
        for descriptor in (0, 1, 2, start):
            os.close(descriptor)
        guard(worker, ready, settings["timeout"])
    os.close(ready)
    layers = sandbox.confine(layers, settings["folder"], settings["memory"], math.ceil(settings["timeout"]) + 1)
    (requests, ask), (hear, replies), (empty, nobody) = os.pipe(), os.pipe(), os.pipe()
    program = os.fork()
    for descriptor in (ask, hear, nobody, start) if program == 0 else (requests, replies, empty, nobody):
        os.close(descriptor)
    with contextlib.suppress(EOFError, BrokenPipeError):
        if program == 0:
            os.dup2(empty, 0)
            os.dup2(2, 1)
            sandbox.end_with_parent(signal.SIGKILL)
            send(replies, sandbox.seal())
            serve(os.fdopen(requests, "rb"), replies)
        status, answers = os.dup(1), os.fdopen(hear, "rb")
        os.dup2(2, 1)
        ours, theirs = sandbox.seal(), receive(answers)
        layers |= {name: granted and theirs[name] for name, granted in ours.items()}
        send(status, layers)
        if not all(any(layers[name] for name in choice) for choice in settings["needs"]):
            return
        task = receive(sys.stdin.buffer)
        os.write(start, b".")

        def verdict(outcome: str, error: str) -> NoReturn:
            if outcome == "ended":
                outcome = "killed" if os.waitstatus_to_exitcode(os.waitpid(program, 0)[1]) < 0 else "failed"
            send(status, {"outcome": outcome, "error": error, "token": task["token"] if outcome == "passed" else None})
            os._exit(0)

        judge(task, ask, answers, verdict)
