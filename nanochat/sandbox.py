"""What a process can give up on Linux without being root, layer by layer, each asked of the kernel and reported.

Three steps, for each needs what the next one takes: `enter_namespaces` (the process that calls it stays in some of the
old ones, what it forks does not), `confine` (files, user, capabilities, limits), `seal` (processes and system calls).
What a kernel refuses or does not know is False in the report and no error. On other systems than Linux little is True.
"""

import contextlib
import ctypes
import os
import signal
import struct
import sys
from collections.abc import Callable
from typing import Any

NOBODY = 65534
WORKPLACE = "/private"  # the empty working directory in the private root: a tmpfs, gone with its namespace
WORKPLACE_BYTES, FILE_BYTES, OPEN_FILES, THREADS = 16 << 20, 1 << 20, 32, 64  # a file is also what is printed

NAMESPACES = {  # linux/sched.h; processes last, for it holds from the next fork on
    "mount namespace": 0x00020000,
    "network namespace": 0x40000000,
    "IPC namespace": 0x08000000,
    "host name namespace": 0x04000000,
    "control group namespace": 0x02000000,
    "process namespace": 0x20000000,
}

# Numbers on x86_64 and aarch64 (asm/unistd_64.h, asm-generic/unistd.h) of what Python needs to compute, to keep files
# in its directory and to start threads. What is not here gives ENOSYS: sockets, fork, exec, signals to others, ptrace,
# links, modes and owners of files, mounts, namespaces, io_uring, keys, bpf, and whatever the kernel learns next.
SYSTEM_CALLS = """
read 0 63, write 1 64, open 2 -, close 3 57, stat 4 -, fstat 5 80, lstat 6 -, poll 7 -, lseek 8 62, mmap 9 222,
mprotect 10 226, munmap 11 215, brk 12 214, rt_sigaction 13 134, rt_sigprocmask 14 135, rt_sigreturn 15 139,
pread64 17 67, pwrite64 18 68, readv 19 65, writev 20 66, access 21 -, pipe 22 -, select 23 -, sched_yield 24 124,
mremap 25 216, madvise 28 233, dup 32 23, dup2 33 -, pause 34 -, nanosleep 35 101, getitimer 36 102, alarm 37 -,
setitimer 38 103, getpid 39 172, sendfile 40 71, exit 60 93, uname 63 160, fsync 74 82, fdatasync 75 83,
ftruncate 77 46, getcwd 79 17, chdir 80 49, rename 82 -, mkdir 83 -, rmdir 84 -, creat 85 -, unlink 87 -,
readlink 89 -, umask 95 166, gettimeofday 96 169, getrlimit 97 163, getrusage 98 165, sysinfo 99 179, times 100 153,
getuid 102 174, getgid 104 176, geteuid 107 175, getegid 108 177, getppid 110 173, getgroups 115 158,
rt_sigpending 127 136, rt_sigtimedwait 128 137, rt_sigsuspend 130 133, sigaltstack 131 132, statfs 137 43,
fstatfs 138 44, gettid 186 178, time 201 -, futex 202 98, sched_getaffinity 204 123, getdents64 217 61,
restart_syscall 219 128, wait4 61 260, clock_gettime 228 113, clock_getres 229 114, clock_nanosleep 230 115,
exit_group 231 94, openat 257 56, mkdirat 258 34, newfstatat 262 79, unlinkat 263 35, renameat 264 38,
readlinkat 267 78, faccessat 269 48, pselect6 270 72, ppoll 271 73, set_robust_list 273 99, dup3 292 24, pipe2 293 59,
getcpu 309 168, renameat2 316 276, getrandom 318 278, membarrier 324 283, copy_file_range 326 285, statx 332 291,
rseq 334 293, close_range 436 436, faccessat2 439 439
"""
# These only where argument number A, masked, has a value: threads but no processes, limits of oneself, descriptors
# without their owners and signals.   name, x86_64, aarch64, A, mask, value
GUARDED_CALLS = (
    ("clone", 56, 220, 0, 0x10000, 0x10000),  # CLONE_THREAD
    ("prlimit64", 302, 261, 0, 0xFFFFFFFF, 0),
    ("fcntl", 72, 25, 1, 0xFFFFFFFC, 0),  # F_DUPFD, F_GETFD, F_SETFD, F_GETFL
    ("fcntl", 72, 25, 1, 0xFFFFFFFF, 1030),  # F_DUPFD_CLOEXEC
    ("ioctl", 16, 29, 1, 0xFFFFFFFE, 0x5450),  # FIONCLEX, FIOCLEX
)
MACHINES = {"x86_64": (0xC000003E, 155), "aarch64": (0xC00000B7, 41)}  # AUDIT_ARCH_*, number of pivot_root


def call(name: str, *args: Any) -> int:
    """A function of the C library; its failure raises OSError."""
    result = getattr(ctypes.CDLL(None, use_errno=True), name)(*args)
    if result < 0:
        raise OSError(ctypes.get_errno(), name)
    return result


def prctl(option: int, value: int) -> None:
    """prctl(2) with one argument."""
    call("prctl", option, *(ctypes.c_ulong(x) for x in (value, 0, 0, 0)))


def end_with_parent(number: int) -> None:
    """Have the kernel send this signal when the process that started this one ends."""
    granted(prctl, 1, number)  # PR_SET_PDEATHSIG


def granted(action: Callable[..., Any], *args: Any) -> bool:
    """Whether `action` works here: another kernel may refuse it or not know it."""
    try:
        action(*args)
    except (OSError, AttributeError, KeyError, ValueError):
        return False
    return True


def enter_namespaces() -> dict[str, bool]:
    """Leave the machine's namespaces for new ones; an ordinary user needs a new one of users for that."""
    uid, gid = os.getuid(), os.getgid()
    layers = {"unprivileged user": uid != 0, "user namespace": False}
    if not granted(call, "unshare", NAMESPACES["mount namespace"]) and granted(call, "unshare", 0x10000000):
        layers["user namespace"] = True
        maps = {"setgroups": "deny", "uid_map": f"{NOBODY} {uid} 1", "gid_map": f"{NOBODY} {gid} 1"}
        for name, text in maps.items():
            with contextlib.suppress(OSError), open(f"/proc/self/{name}", "w") as f:
                f.write(text)
    return layers | {name: granted(call, "unshare", flag) for name, flag in NAMESPACES.items()}


def enter_private_root(folder: str, readable: list[str]) -> None:
    """Make `folder` the root of this mount namespace: the paths `readable`, read-only, and an empty working directory.

    No /proc, no /dev, nothing of the user's. Linux 5.12 or newer (mount_setattr).
    """
    rec, private, bind, detach, safe = 0x4000, 0x40000, 0x1000, 2, 2 | 4 | 8  # safe: no set-uid, devices, exec

    def mount(source: str, target: str, flags: int, kind: str | None = None, options: str | None = None) -> None:
        call("mount", *(x and x.encode() for x in (source, target, kind)), flags, options and options.encode())

    mount("none", "/", rec | private)
    mount("none", folder, safe, "tmpfs", "size=1m,mode=755")
    for path in sorted(readable):
        os.makedirs(folder + path, exist_ok=True)
        mount(path, folder + path, bind | rec)
    os.mkdir(folder + WORKPLACE)
    read_only = struct.pack("=QQQQ", 1 | 2 | 4, 0, 0, 0)  # struct mount_attr: read-only, no set-uid, no devices
    call("syscall", 442, -100, folder.encode(), 0x8000, read_only, len(read_only))
    mount("none", folder + WORKPLACE, safe, "tmpfs", f"size={WORKPLACE_BYTES},nr_inodes=1024,mode=1777")
    os.chdir(folder)
    call("syscall", MACHINES[os.uname().machine][1], b".", b".")  # pivot_root(2): the old root now lies over the new
    call("umount2", b".", detach)
    os.chdir(WORKPLACE)


def restrict_paths(readable: list[str], writable: list[str]) -> None:
    """Landlock: nothing outside these paths can be opened or changed, and no TCP; newer kernels: no signals outside."""
    abi = call("syscall", 444, None, 0, 1)
    known = (1 << (13, 14, 15, 15, 16)[min(abi, 5) - 1]) - 1
    rules = struct.pack("=QQQ", known, 3, 3)[: 8 if abi < 4 else 16 if abi < 6 else 24]
    ruleset = call("syscall", 444, rules, len(rules), 0)
    read, special = 0b1100, 0b1111001000001  # special: execute, make devices, sockets, FIFOs and symbolic links
    for path, rights in [(p, read) for p in readable] + [(p, known & ~special & 0x7FFF) for p in writable]:
        descriptor = os.open(path, os.O_PATH | os.O_CLOEXEC)
        call("syscall", 445, ruleset, 1, struct.pack("=Qi", rights, descriptor), 0)
        os.close(descriptor)
    call("syscall", 446, ruleset, 0)
    os.close(ruleset)


def drop_user(library: str) -> None:
    """Root becomes nobody, unless the interpreter's library lies where nobody cannot read it."""
    os.setgroups([])
    os.setresgid(NOBODY, NOBODY, NOBODY)
    os.seteuid(NOBODY)
    try:
        os.listdir(library)
    finally:
        os.seteuid(0)
    os.setresuid(NOBODY, NOBODY, NOBODY)


def filter_system_calls() -> None:
    """seccomp: a program in classic BPF that lets SYSTEM_CALLS and GUARDED_CALLS through and answers ENOSYS else."""
    machine = os.uname().machine
    column = list(MACHINES).index(machine) + 1
    load, equal, mask, answer, allow, deny = 0x20, 0x15, 0x54, 0x06, 0x7FFF0000, 0x00050000 | 38
    code = [(load, 0, 0, 4), (equal, 1, 0, MACHINES[machine][0]), (answer, 0, 0, deny), (load, 0, 0, 0)]
    for entry in SYSTEM_CALLS.split(","):
        if (number := entry.split()[column]) != "-":
            code += [(equal, 0, 1, int(number)), (answer, 0, 0, allow)]
    for call in GUARDED_CALLS:
        argument, bits, value = call[3:]
        code += [(equal, 0, 5, int(call[column])), (load, 0, 0, 16 + 8 * argument), (mask, 0, 0, bits)]
        code += [(equal, 0, 1, value), (answer, 0, 0, allow), (load, 0, 0, 0)]
    install_filter([*code, (answer, 0, 0, deny)])


def install_filter(code: list[tuple[int, int, int, int]]) -> None:
    """Put this process and its children under a program of seccomp: instructions (code, jump if true, if false, k)."""
    buffer = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *instruction) for instruction in code))
    program = ctypes.create_string_buffer(struct.pack("@HP", len(code), ctypes.addressof(buffer)))
    call("prctl", 22, ctypes.c_ulong(2), program)  # PR_SET_SECCOMP, SECCOMP_MODE_FILTER


def _limit(kind: int, value: int) -> None:
    import resource

    hard = resource.getrlimit(kind)[1]
    value = value if hard == resource.RLIM_INFINITY else min(value, hard)
    resource.setrlimit(kind, (value, value))


def confine(layers: dict[str, bool], folder: str, memory: int, seconds: int) -> dict[str, bool]:
    """Give up all but the right to fork, in an order where no step needs what an earlier one took.

    `layers` are the namespaces granted; returned is the list with what was granted here, layer -> in force.
    """
    import resource as r

    library = os.path.dirname(os.__file__)
    paths = {"/lib", "/lib64", "/usr/lib", "/usr/lib64", f"{sys.base_exec_prefix}/lib", os.path.dirname(library)}
    readable = [path for path in paths if os.path.isdir(path)]
    os.setsid()
    own_root = layers["mount namespace"] and granted(enter_private_root, folder, readable)
    layers = layers | {"private root": own_root, "no environment": not os.environ}
    layers["empty directory"] = not os.listdir(".")
    if os.geteuid() == 0:
        layers["unprivileged user"] = granted(drop_user, library)
    layers["no capabilities"] = granted(call, "capset", struct.pack("=Ii", 0x20080522, 0), bytes(24))
    end_with_parent(signal.SIGKILL)  # here, for a change of user forgets it
    granted(prctl, 4, 0)  # PR_SET_DUMPABLE: no other process of this user may look into this one
    layers["no new privileges"] = granted(prctl, 38, 1)
    layers["Landlock"] = granted(restrict_paths, *((readable, ["."]) if own_root else ([*readable, "."], [])))
    limits = {"memory limit": (r.RLIMIT_AS, memory), "CPU limit": (r.RLIMIT_CPU, seconds)}
    limits |= {"file size limit": (r.RLIMIT_FSIZE, FILE_BYTES), "open file limit": (r.RLIMIT_NOFILE, OPEN_FILES)}
    limits |= {"no core dumps": (r.RLIMIT_CORE, 0)}
    return layers | {name: granted(_limit, *limit) for name, limit in limits.items()}


def seal() -> dict[str, bool]:
    """Give up processes, and with the system call filter all that the kernel offers beyond computing."""
    import resource

    layers = {"process limit": granted(_limit, resource.RLIMIT_NPROC, THREADS)}
    return layers | {"system call filter": granted(filter_system_calls) and not granted(call, "socket", 1, 1, 0)}
