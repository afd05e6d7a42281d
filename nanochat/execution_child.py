"""The two sealed processes of one check (see execution.py). This file runs as a script of a bare Python:

    python -I -S execution_child.py ROLE READ WRITE MEMORY TIMEOUT

ROLE is program or judge, READ and WRITE are the pipes between the two. Both seal themselves first. Then the program
reports what the kernel did not grant, the judge reads its task from standard input, has the other side run the
program, runs the tests, and writes one line of JSON: the verdict.
"""

import builtins
import contextlib
import ctypes
import json
import math
import os
import resource
import signal
import struct
import sys
import types
from collections.abc import Callable
from fractions import Fraction
from typing import Any, BinaryIO, NoReturn

# --- sealing: what a process gives up ---------------------------------------------------------------------------------

OUTPUT_BYTES = 1 << 20  # of what both sides print, and of any file
OPEN_FILES = 32

# The system calls that Python needs to compute and to import, by number on x86_64 and on aarch64 (a dash where there is
# none). All others give ENOSYS: sockets, fork, exec, threads, signals to others, ptrace, changes of files, modes and
# owners, limits, mounts, namespaces, io_uring, bpf, and whatever the kernel learns next. No argument is looked at, so
# a call of which one form is dangerous (fcntl, ioctl, prctl, clone) is not here at all.
SYSTEM_CALLS = """
read 0 63, write 1 64, pread64 17 67, readv 19 65, writev 20 66, lseek 8 62, close 3 57,
open 2 -, openat 257 56, stat 4 -, fstat 5 80, lstat 6 -, newfstatat 262 79, statx 332 291, getdents64 217 61,
access 21 -, faccessat 269 48, faccessat2 439 439, readlink 89 -, readlinkat 267 78, getcwd 79 17,
mmap 9 222, mprotect 10 226, munmap 11 215, mremap 25 216, madvise 28 233, brk 12 214, futex 202 98,
rt_sigaction 13 134, rt_sigprocmask 14 135, rt_sigreturn 15 139, sigaltstack 131 132, restart_syscall 219 128,
poll 7 -, ppoll 271 73, select 23 -, pselect6 270 72, nanosleep 35 101, clock_nanosleep 230 115, sched_yield 24 124,
clock_gettime 228 113, clock_getres 229 114, gettimeofday 96 169, time 201 -, times 100 153, getrusage 98 165,
setitimer 38 103, getpid 39 172, gettid 186 178, getuid 102 174, geteuid 107 175, getgid 104 176, getegid 108 177,
uname 63 160, sysinfo 99 179, sched_getaffinity 204 123, getcpu 309 168, getrandom 318 278, membarrier 324 283,
rseq 334 293, set_robust_list 273 99, exit 60 93, exit_group 231 94
"""
ARCHITECTURES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}  # AUDIT_ARCH_* of linux/audit.h
ENOSYS = 38


def call(name: str, *args: Any) -> int:
    """Call a function of the C library. Raises OSError when it fails."""
    result = getattr(ctypes.CDLL(None, use_errno=True), name)(*args)
    if result < 0:
        raise OSError(ctypes.get_errno(), name)
    return result


def prctl(option: int, value: int) -> None:
    """Call prctl(2) with one argument."""
    call("prctl", option, ctypes.c_ulong(value), ctypes.c_ulong(0), ctypes.c_ulong(0), ctypes.c_ulong(0))


def limit_resources(memory: int, seconds: int) -> None:
    """Lower the hard limits too, so that the program cannot raise them again."""
    limits = {
        resource.RLIMIT_AS: memory,
        resource.RLIMIT_CPU: seconds,  # should the judge's timer not end it
        resource.RLIMIT_FSIZE: OUTPUT_BYTES,
        resource.RLIMIT_NOFILE: OPEN_FILES,
        resource.RLIMIT_CORE: 0,
    }
    for kind, value in limits.items():
        hard = resource.getrlimit(kind)[1]
        if hard != resource.RLIM_INFINITY:
            value = min(value, hard)
        resource.setrlimit(kind, (value, value))


def restrict_files() -> None:
    """Landlock: files of the interpreter's library and the (empty) working directory can be read, nothing else.

    https://docs.kernel.org/userspace-api/landlock.html. Where the kernel knows them (versions 4 and 6) TCP and signals
    and abstract sockets of other processes are forbidden here too, beside the filter below.
    """
    create_ruleset, add_rule, restrict_self = 444, 445, 446  # the same numbers on x86_64 and aarch64
    version = call("syscall", create_ruleset, None, 0, 1)
    # One bit per right to files; each version knows more of them. What is handled and not allowed is forbidden.
    rights = {1: 13, 2: 14, 3: 15, 4: 15}.get(version, 16)
    attributes = struct.pack("=QQQ", (1 << rights) - 1, 0b11, 0b11)  # struct landlock_ruleset_attr: files, TCP, scopes
    size = 8 if version < 4 else 16 if version < 6 else 24
    ruleset = call("syscall", create_ruleset, attributes[:size], size, 0)
    read_files_and_folders = 0b1100
    library = os.path.dirname(os.path.dirname(os.__file__))
    for path in {"/lib", "/lib64", "/usr/lib", "/usr/lib64", f"{sys.base_exec_prefix}/lib", library, "."}:
        if os.path.isdir(path):
            descriptor = os.open(path, os.O_PATH | os.O_CLOEXEC)
            call("syscall", add_rule, ruleset, 1, struct.pack("=Qi", read_files_and_folders, descriptor), 0)
            os.close(descriptor)
    call("syscall", restrict_self, ruleset, 0)
    os.close(ruleset)


def filter_system_calls() -> None:
    """seccomp: only SYSTEM_CALLS reach the kernel. The filter is a program of classic BPF.

    https://docs.kernel.org/userspace-api/seccomp_filter.html. An instruction is (code, jump if true, if false, value).
    The architecture is checked first: the same number means another call in 32-bit mode.
    """
    load, jump_if_equal, answer = 0x20, 0x15, 0x06
    allow, deny = 0x7FFF0000, 0x00050000 | ENOSYS
    machine = os.uname().machine
    column = 1 + list(ARCHITECTURES).index(machine)
    program = [
        (load, 0, 0, 4),  # the architecture
        (jump_if_equal, 1, 0, ARCHITECTURES[machine]),
        (answer, 0, 0, deny),
        (load, 0, 0, 0),  # the number of the call
    ]
    for entry in SYSTEM_CALLS.split(","):
        number = entry.split()[column]
        if number != "-":
            program.append((jump_if_equal, 0, 1, int(number)))
            program.append((answer, 0, 0, allow))
    program.append((answer, 0, 0, deny))
    install_filter(program)
    try:
        os.kill(os.getpid(), 0)
    except OSError:
        return
    raise OSError("the filter was accepted and filters nothing")


def install_filter(program: list[tuple[int, int, int, int]]) -> None:
    """Put this process and its children under a program of seccomp."""
    code = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *instruction) for instruction in program))
    filter = ctypes.create_string_buffer(struct.pack("@HP", len(program), ctypes.addressof(code)))
    call("prctl", 22, ctypes.c_ulong(2), filter)  # PR_SET_SECCOMP, SECCOMP_MODE_FILTER


def seal(memory: int, seconds: int) -> list[str]:
    """Give up all that this process does not need; returns the names of what this system did not grant."""
    os.environ.clear()
    steps: dict[str, Callable[[], None]] = {
        "resource limits": lambda: limit_resources(memory, seconds),
        "end with its parent": lambda: prctl(1, signal.SIGKILL),  # PR_SET_PDEATHSIG
        "no new privileges": lambda: prctl(38, 1),  # PR_SET_NO_NEW_PRIVS, which the last two demand
        "Landlock": restrict_files,
        "seccomp": filter_system_calls,  # last, for it forbids what the others need
    }
    missing = []
    for name, step in steps.items():
        try:
            step()
        except (OSError, AttributeError, ValueError):  # not on this kernel, C library or machine
            missing.append(name)
    return missing


# --- messages between the two -----------------------------------------------------------------------------------------

MESSAGE_BYTES = 16 << 20  # of one call or result


class ProgramError(Exception):
    """What the program raised, in a line."""


def send(descriptor: int, message: Any) -> None:
    """Write one message: a line of JSON."""
    data = memoryview(json.dumps(message).encode() + b"\n")
    while data:
        written = os.write(descriptor, data)
        data = data[written:]


def receive(stream: BinaryIO) -> Any:
    """Read the next message. Raises EOFError when there is none, ValueError when it is too long or no JSON."""
    line = stream.readline(MESSAGE_BYTES)
    if not line:
        raise EOFError
    return json.loads(line)


def _ratio(value: Any) -> list[int]:
    return list(value.as_integer_ratio())


# JSON has no tuples, sets or complex numbers. They travel as [kind, *parts]: kind -> (value -> parts, parts -> value).
KINDS: dict[str, tuple[Callable[[Any], Any], Callable[[Any], Any]]] = {
    "int": (lambda x: [hex(x)], lambda parts: int(parts[0], 16)),
    "complex": (lambda x: [x.real, x.imag], lambda parts: complex(*parts)),
    "bytes": (lambda x: [x.hex()], lambda parts: bytes.fromhex(*parts)),
    "range": (lambda x: [x.start, x.stop, x.step], lambda parts: range(*parts)),
    "Decimal": (_ratio, lambda parts: Fraction(*parts)),
    "Fraction": (_ratio, lambda parts: Fraction(*parts)),
    "list": (list, list),
    "tuple": (list, tuple),
    "set": (list, set),
    "frozenset": (list, frozenset),
    "dict": (lambda x: list(x.items()), dict),
    "iterator": (list, iter),
}


def pack(value: Any) -> Any:
    """Write a value in JSON's terms. Of a subclass only the built-in part travels, of an iterator what it yields.

    Raises TypeError for anything that is not a value, such as a function or an object.
    """
    if value is None or isinstance(value, bool | float | str):
        return value
    if isinstance(value, int) and abs(value) < 1 << 62:
        return value
    kind = next((base.__name__ for base in type(value).__mro__ if base.__name__ in KINDS), None)
    if kind is None and hasattr(value, "__iter__"):
        kind = "iterator"
    if kind is None:
        raise TypeError(f"a {type(value).__name__} is not a value that can be compared from outside")
    to_parts = KINDS[kind][0]
    return [kind, *(pack(part) for part in to_parts(value))]


def unpack(node: Any) -> Any:
    """Read what `pack` wrote. The result has exact built-in types only, whatever the sender is."""
    if not isinstance(node, list):
        return node
    from_parts = KINDS[node[0]][1]
    return from_parts([unpack(part) for part in node[1:]])


def describe(error: BaseException, source: str, name: str) -> str:
    """Put an error and the line of `source`, compiled under `name`, that it came from into one line."""
    number = None
    step = error.__traceback__
    while step:
        if step.tb_frame.f_code.co_filename == name:
            number = step.tb_lineno
        step = step.tb_next
    where = f" at line {number}: {source.splitlines()[number - 1].strip()[:200]}" if number else ""
    kind = "" if isinstance(error, ProgramError) else f"{type(error).__name__}: "
    return f"{kind}{str(error)[:300]}".rstrip(": ") + where


# --- the program's side -----------------------------------------------------------------------------------------------


def serve(requests: BinaryIO, replies: int) -> NoReturn:
    """Run the source that comes first, then answer calls of its functions."""
    source = receive(requests)
    module = types.ModuleType("program")
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


# --- the judge's side -------------------------------------------------------------------------------------------------


class Program:
    """The other process, as the judge sees it."""

    def __init__(self, replies: BinaryIO, requests: int, verdicts: int) -> None:
        self.replies = replies
        self.requests = requests
        self.verdicts = verdicts

    def ask(self, message: Any) -> Any:
        """Send a message and return the value that comes back. Raises ProgramError for an error that comes back.

        Where no answer comes back the check ends here: a test that expects an exception must not see one.
        """
        try:
            with contextlib.suppress(BrokenPipeError):  # it has ended: reading says so, too
                send(self.requests, message)
            reply = receive(self.replies)
            if "error" not in reply:
                return unpack(reply["value"])
            error = str(reply["error"])
        except Exception as problem:
            outcome = "ended" if isinstance(problem, EOFError) else "failed"
            give_verdict(self.verdicts, outcome, f"no answer from the program: {problem!r}"[:500])
        raise ProgramError(error)


class TestGlobals(dict[str, Any]):
    """Globals of the tests, in which names that nobody defined are functions of the program."""

    def __init__(self, program: Program) -> None:
        super().__init__(__name__="test")
        self.program = program

    def __missing__(self, name: str) -> Callable[..., Any]:
        if hasattr(builtins, name):
            raise KeyError(name)
        return lambda *args, **kwargs: self.program.ask(pack([name, args, kwargs]))


def give_verdict(descriptor: int, outcome: str, error: str) -> NoReturn:
    """Write the verdict and end, without a way back for anything that a test may catch."""
    send(descriptor, {"outcome": outcome, "error": error})
    os._exit(0)


def judge(task: dict[str, str], program: Program) -> NoReturn:
    """Let the program run, then run the tests, and give the verdict."""
    test_globals = TestGlobals(program)
    try:
        program.ask(task["program"])
        exec(compile(task["prelude"], "<prelude>", "exec"), test_globals)
        exec(compile(task["test"], "<test>", "exec"), test_globals)
    except BaseException as error:
        give_verdict(program.verdicts, "failed", describe(error, task["test"], "<test>"))
    give_verdict(program.verdicts, "passed", "")


def main() -> None:
    """Seal this process and play its role."""
    role = sys.argv[1]
    reading, writing, memory = map(int, sys.argv[2:5])
    timeout = float(sys.argv[5])
    # The verdict goes where standard output led at the start; the program's process never has that pipe.
    verdicts = os.dup(1)
    os.dup2(2, 1)  # what tests print goes where the program's output goes
    stream = os.fdopen(reading, "rb")
    missing = seal(memory, seconds=math.ceil(timeout) + 1)
    if role == "program":
        os.close(verdicts)
        with contextlib.suppress(EOFError, BrokenPipeError):
            send(writing, missing)
            serve(stream, writing)
        return
    missing = sorted({*missing, *receive(stream)})
    task = receive(sys.stdin.buffer)
    if missing and not task["unsafe"]:
        send(verdicts, {"outcome": "refused", "missing": missing})
        return
    # SIGALRM is left to its default, which ends this process even inside of a long computation in C.
    signal.setitimer(signal.ITIMER_REAL, timeout)
    judge(task, Program(stream, writing, verdicts))


if __name__ == "__main__":
    main()
