"""The processes of one check (see execution.py). This file runs as a script of a bare Python:

    python -I -S execution_child.py TIMEOUT sealed|unsafe < task.json; echo $?      10 passed, 11 failed, 12 refused

It starts as the launcher, which forks the program's process and the judge's and connects them by two pipes:

    judge    {"call": ["f", [[1, 2]], {}]}  --requests-->    program
    judge    <--replies--  {"value": 3} or {"error": "ZeroDivisionError: ..."}

The task arrives on standard input, which the judge reads after the program's process has closed it. So no memory, file
or frame that the model's code can reach holds the tests.
"""

import contextlib
import ctypes
import json
import os
import signal
import struct
import sys
import types
from collections.abc import Callable, Iterable
from fractions import Fraction
from typing import Any, NoReturn, TextIO

# Exit statuses that Python never gives by itself.
PASSED = 10
FAILED = 11
REFUSED = 12

# --- sealing: what a process gives up ---------------------------------------------------------------------------------

MEMORY_BYTES = 256 << 20  # address space of each process
OUTPUT_BYTES = 1 << 20  # of what the processes print together

# All system calls that a sealed process may make: "name number-on-x86_64 number-on-aarch64", a dash for none. They are
# what Python needs to compute and to import. No argument is looked at, so a call of which one form is dangerous (fcntl,
# ioctl, prctl, clone) is not here at all. What is not here fails with ENOSYS, "the kernel has no such call": sockets,
# fork, exec, threads, signals, ptrace, changes of files, modes and owners, limits, mounts, namespaces, io_uring, bpf,
# and whatever the kernel learns next. Numbers: asm/unistd_64.h and asm-generic/unistd.h.
SYSTEM_CALLS = {
    "read and write what is open": "read 0 63, pread64 17 67, readv 19 65, write 1 64, writev 20 66, lseek 8 62, "
    "close 3 57, poll 7 -, ppoll 271 73, select 23 -, pselect6 270 72",
    "open and look at files, where Landlock allows it": "open 2 -, openat 257 56, stat 4 -, fstat 5 80, lstat 6 -, "
    "newfstatat 262 79, statx 332 291, getdents64 217 61, access 21 -, faccessat 269 48, faccessat2 439 439, "
    "readlink 89 -, readlinkat 267 78, getcwd 79 17",
    "memory of its own": "mmap 9 222, mprotect 10 226, munmap 11 215, mremap 25 216, madvise 28 233, brk 12 214",
    "locks and signal handlers of its own": "futex 202 98, set_robust_list 273 99, rseq 334 293, membarrier 324 283, "
    "rt_sigaction 13 134, rt_sigprocmask 14 135, rt_sigreturn 15 139, sigaltstack 131 132, restart_syscall 219 128",
    "time": "clock_gettime 228 113, clock_getres 229 114, gettimeofday 96 169, time 201 -, times 100 153, "
    "nanosleep 35 101, clock_nanosleep 230 115, setitimer 38 103, sched_yield 24 124",
    "facts and random numbers": "getpid 39 172, gettid 186 178, getuid 102 174, geteuid 107 175, getgid 104 176, "
    "getegid 108 177, getrusage 98 165, uname 63 160, sysinfo 99 179, sched_getaffinity 204 123, getcpu 309 168, "
    "getrandom 318 278",
    "the end": "exit 60 93, exit_group 231 94",
}
ARCHITECTURES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}  # AUDIT_ARCH_* of linux/audit.h
ENOSYS = 38

# Options of prctl(2), from linux/prctl.h
PR_SET_PDEATHSIG = 1
PR_SET_SECCOMP = 22
PR_SET_NO_NEW_PRIVS = 38


def kernel(function: str, *arguments: Any) -> int:
    """Call a function of the C library. Raises OSError when it fails."""
    result = getattr(ctypes.CDLL(None, use_errno=True), function)(*arguments)
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result


def prctl(option: int, value: int) -> None:
    """Call prctl(2) with one argument; the unused ones must be 0 and as wide as a long."""
    kernel("prctl", option, ctypes.c_ulong(value), ctypes.c_ulong(0), ctypes.c_ulong(0), ctypes.c_ulong(0))


def end_with_parent() -> None:
    """Ask the kernel to kill this process when the one that started it ends, however that ends."""
    prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def limit_resources() -> None:
    """Bound memory and output. The hard limits are lowered too, so that the program cannot raise them again."""
    import resource  # Windows lacks it, where this file is imported and not run

    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_FSIZE, (OUTPUT_BYTES, OUTPUT_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a crash leaves no file


def restrict_files() -> None:
    """Landlock: Python's own library can be read, and no other file, folder or device can be touched.

    https://docs.kernel.org/userspace-api/landlock.html
    """
    # System calls, with the same numbers on both machines.
    create_ruleset = 444
    add_rule = 445
    restrict_self = 446
    version = kernel("syscall", create_ruleset, None, 0, 1)  # 1: LANDLOCK_CREATE_RULESET_VERSION
    # A ruleset names the rights that it handles, one bit each; what is handled and not allowed below is forbidden. Each
    # version knew more rights to files: 13, then moving (REFER), TRUNCATE, and IOCTL_DEV since the fifth. All of them.
    rights = {1: 13, 2: 14, 3: 15, 4: 15}.get(version, 16)
    attributes = struct.pack("=Q", (1 << rights) - 1)  # struct landlock_ruleset_attr: handled_access_fs
    ruleset = kernel("syscall", create_ruleset, attributes, len(attributes), 0)
    read_file = 1 << 2  # LANDLOCK_ACCESS_FS_READ_FILE
    read_dir = 1 << 3  # LANDLOCK_ACCESS_FS_READ_DIR
    path_beneath = 1  # LANDLOCK_RULE_PATH_BENEATH
    standard_library = os.path.dirname(os.path.dirname(os.__file__))
    for path in ("/lib", "/lib64", "/usr/lib", "/usr/lib64", f"{sys.base_exec_prefix}/lib", standard_library):
        if os.path.isdir(path):
            folder = os.open(path, os.O_PATH)
            rule = struct.pack("=Qi", read_file | read_dir, folder)  # struct landlock_path_beneath_attr
            kernel("syscall", add_rule, ruleset, path_beneath, rule, 0)
            os.close(folder)
    kernel("syscall", restrict_self, ruleset, 0)
    os.close(ruleset)


def filter_system_calls() -> None:
    """seccomp: only SYSTEM_CALLS reach the kernel.

    https://docs.kernel.org/userspace-api/seccomp_filter.html. The filter is a program of classic BPF, which sees the
    system call as a record: its number at byte 0, the machine's architecture at byte 4.
    """
    # Codes of BPF (linux/bpf_common.h), and the two answers (linux/seccomp.h)
    load = 0x20  # BPF_LD | BPF_W | BPF_ABS: fetch the word at a byte of the record
    # BPF_JMP | BPF_JEQ | BPF_K. An instruction (jump_if_equal, m, n, value) skips the next m instructions if the word
    # that was loaded equals the value, and the next n if it does not.
    jump_if_equal = 0x15
    answer = 0x06  # BPF_RET | BPF_K
    allow = 0x7FFF0000  # SECCOMP_RET_ALLOW
    deny = 0x00050000 | ENOSYS  # SECCOMP_RET_ERRNO
    machine = os.uname().machine
    if machine not in ARCHITECTURES:
        raise OSError(f"no numbers of system calls for {machine}")
    # The architecture first: the same number means another call in 32-bit mode, which a program can switch to.
    program = [(load, 0, 0, 4), (jump_if_equal, 1, 0, ARCHITECTURES[machine]), (answer, 0, 0, deny), (load, 0, 0, 0)]
    for entry in ", ".join(SYSTEM_CALLS.values()).split(", "):
        _, on_x86_64, on_aarch64 = entry.split()
        number = on_x86_64 if machine == "x86_64" else on_aarch64
        if number != "-":
            program.append((jump_if_equal, 0, 1, int(number)))
            program.append((answer, 0, 0, allow))
    program.append((answer, 0, 0, deny))
    install_filter(program)
    try:
        os.kill(os.getpid(), 0)
    except OSError:
        return
    raise OSError("the filter was accepted and filters nothing")  # as some emulated kernels do


def install_filter(program: list[tuple[int, int, int, int]]) -> None:
    """Put this process and its children under BPF instructions: (code, jump if true, jump if false, value)."""
    code = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *instruction) for instruction in program))
    header = ctypes.create_string_buffer(struct.pack("@HP", len(program), ctypes.addressof(code)))  # struct sock_fprog
    kernel("prctl", PR_SET_SECCOMP, ctypes.c_ulong(2), header)  # 2: SECCOMP_MODE_FILTER


def seal(name: str, step: Callable[[], None], unsafe: bool) -> None:
    """Take one step of sealing. Where this system does not grant it, the process ends here, unless `unsafe`."""
    try:
        step()
    except (OSError, AttributeError, ValueError) as error:  # not on this kernel, C library or machine
        if not unsafe:
            print(f"cannot set up {name}: {error}", file=sys.stderr)
            os._exit(REFUSED)


# --- messages between program and judge -------------------------------------------------------------------------------

MESSAGE_LENGTH = 16 << 20  # characters of one call or result


def send(stream: TextIO, message: Any) -> None:
    """Write one message: a line of JSON."""
    print(json.dumps(message), file=stream, flush=True)


def receive(stream: TextIO) -> Any:
    """Read the next message. Raises ValueError when it is no JSON, too long, or not there any more."""
    return json.loads(stream.readline(MESSAGE_LENGTH))


def _ratio(value: Any) -> list[int]:
    return list(value.as_integer_ratio())


# JSON has no tuples, sets or complex numbers. They travel as [kind, *parts]: kind -> (value -> parts, parts -> value).
KINDS: dict[str, tuple[Callable[[Any], Any], Callable[[Any], Any]]] = {
    "list": (list, list),
    "tuple": (list, tuple),
    "set": (list, set),
    "frozenset": (list, frozenset),
    "dict": (lambda table: list(table.items()), dict),
    "bytes": (list, bytes),
    "range": (lambda x: [x.start, x.stop, x.step], lambda parts: range(*parts)),
    "complex": (lambda x: [x.real, x.imag], lambda parts: complex(*parts)),
    "Decimal": (_ratio, lambda parts: Fraction(*parts)),
    "Fraction": (_ratio, lambda parts: Fraction(*parts)),
    "iterator": (list, iter),
}


def pack(value: Any) -> Any:
    """Write a value in JSON's terms. Of a subclass only the built-in part travels, of an iterator what it yields.

    Raises TypeError for anything that is not a value, such as a function or an object.
    """
    if value is None or isinstance(value, bool | int | float | str):
        return value
    kind = next((base.__name__ for base in type(value).__mro__ if base.__name__ in KINDS), "iterator")
    if kind == "iterator" and not isinstance(value, Iterable):
        raise TypeError(f"a {type(value).__name__} is not a value that can be compared from outside")
    to_parts, _ = KINDS[kind]
    return [kind, *map(pack, to_parts(value))]


def unpack(node: Any) -> Any:
    """Read what `pack` wrote.

    Whatever was sent, the result is made of the types in KINDS themselves, never of a subclass; a Decimal comes back as
    the Fraction of equal value.
    """
    if not isinstance(node, list):
        return node
    kind, *parts = node
    _, from_parts = KINDS[kind]
    return from_parts([unpack(part) for part in parts])


def describe(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"[:500].rstrip(": ")


# --- the program's side -----------------------------------------------------------------------------------------------


def serve(requests: TextIO, replies: TextIO) -> None:
    """Run the source that comes first, then answer calls of its functions until the judge is gone."""
    module = types.ModuleType("program")
    sys.modules["program"] = module  # where dataclasses and pickle look for it

    def run(request: dict[str, Any]) -> Any:
        if "source" in request:
            return exec(compile(request["source"], "<program>", "exec"), module.__dict__)
        name, arguments, keywords = unpack(request["call"])
        return getattr(module, name)(*arguments, **keywords)

    while True:
        request = receive(requests)
        try:
            reply = {"value": pack(run(request))}
        except Exception as error:
            reply = {"error": describe(error)}
        send(replies, reply)


# --- the judge's side -------------------------------------------------------------------------------------------------


class ProgramError(Exception):
    """What the program raised, in a line."""


def give_verdict(status: int, error: str = "") -> NoReturn:
    """End the judge with a verdict, without a way back for anything that a test may catch."""
    with contextlib.suppress(OSError):  # the program may have printed all that may be printed
        if error:
            print(error, file=sys.stderr)
    os._exit(status)


def judge(requests: TextIO, replies: TextIO, timeout: float) -> NoReturn:
    """Let the program run, then run the tests on it, and give the verdict."""

    def ask(request: dict[str, Any]) -> Any:
        try:
            send(requests, request)
            reply = receive(replies)
            value = None if "error" in reply else unpack(reply["value"])
        except Exception as error:
            # The check ends here: a test that expects an exception must not see one.
            give_verdict(FAILED, f"no answer from the program: {describe(error)}")
        if "error" in reply:
            raise ProgramError(reply["error"])
        return value

    task = json.load(sys.stdin)
    # SIGALRM is left to its default, which ends this process even inside of a long computation in C.
    signal.setitimer(signal.ITIMER_REAL, timeout)
    try:
        ask({"source": task["program"]})
        names: dict[str, Any] = {"__name__": "test"}
        exec(compile(task["prelude"], "<prelude>", "exec"), names)
        entry_point = task["entry_point"]
        names[entry_point] = lambda *args, **kwargs: ask({"call": pack([entry_point, args, kwargs])})
        exec(compile(task["test"], "<test>", "exec"), names)
    except BaseException as error:
        give_verdict(FAILED, describe(error))
    give_verdict(PASSED)


# --- the launcher -----------------------------------------------------------------------------------------------------


def start(role: Callable[[], None], keep: tuple[int, ...], unsafe: bool) -> int:
    """Fork a process that has the descriptors `keep`, is sealed, and plays a role; return its id."""
    launcher = os.getpid()
    process = os.fork()
    if process:
        return process
    try:
        # The launcher was started with 0, 1 and 2 alone (subprocess closes the others) and has opened two pipes since,
        # so no descriptor is near 64. /proc, which lists them, is sealed off already.
        for descriptor in set(range(64)) - {1, 2, *keep}:
            with contextlib.suppress(OSError):
                os.close(descriptor)
        seal("the end with its parent", end_with_parent, unsafe)
        if os.getppid() != launcher:  # which was killed before we had asked for that
            os._exit(FAILED)
        seal("seccomp", filter_system_calls, unsafe)  # last, since it forbids what the other steps need
        role()
    finally:
        os._exit(FAILED)


def main() -> None:
    """Start the program and the judge, wait for the judge, end the program, and exit as the judge did."""
    timeout = float(sys.argv[1])
    unsafe = sys.argv[2] == "unsafe"
    # What children inherit is sealed here, once.
    seal("the end with its parent", end_with_parent, unsafe)
    seal("resource limits", limit_resources, unsafe)
    seal("no new privileges", lambda: prctl(PR_SET_NO_NEW_PRIVS, 1), unsafe)  # Landlock and seccomp demand it
    seal("Landlock", restrict_files, unsafe)
    requests_out, requests_in = os.pipe()
    replies_out, replies_in = os.pipe()
    program = start(
        lambda: serve(os.fdopen(requests_out), os.fdopen(replies_in, "w")),
        keep=(requests_out, replies_in),
        unsafe=unsafe,
    )
    judging = start(
        lambda: judge(os.fdopen(requests_in, "w"), os.fdopen(replies_out), timeout),
        keep=(0, requests_in, replies_out),  # 0: the task, which the program must not see
        unsafe=unsafe,
    )
    # A pipe ends when its last writer does, so the launcher must hold none.
    for descriptor in (requests_out, requests_in, replies_out, replies_in):
        os.close(descriptor)
    _, status = os.waitpid(judging, 0)
    os.kill(program, signal.SIGKILL)
    os.waitpid(program, 0)
    code = os.waitstatus_to_exitcode(status)
    if code == -signal.SIGALRM:
        give_verdict(FAILED, f"no verdict within {timeout:g} s")
    if code < 0:
        give_verdict(FAILED, f"the judge was ended by signal {-code}")
    give_verdict(code)


if __name__ == "__main__":
    main()
