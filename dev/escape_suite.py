"""Programs that try to get out of nanochat.execution, or to pass without being right: python -m dev.escape_suite

Each program of escape_programs.txt runs in `execution.check` against a test that none of them passes honestly. What it
did is judged from outside: was a secret read, anything written, a listener reached, a signal sent, a process or folder
left, more memory or time taken than allowed, a verdict forged? A program that gains what it must not have says so with
a marker. Two controls, right and wrong, show that verdicts are given at all. Status 1 on any escape. --without plays a
kernel that refuses some layers, to try what remains.
"""

import contextlib
import os
import platform
import resource
import secrets
import select
import signal
import socket
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from dev import bench_old as bench
from nanochat import cli, execution, sandbox
from nanochat.common import get_base_dir

TEST = "def check(candidate):\n    assert candidate(3) == 9\n    assert candidate(-4) == 16\ncheck(f)"
CONTROLS = {"control: right": "def f(x):\n    return x * x", "control: wrong": "def f(x):\n    return x + x"}
MARKER = "ESCA" + "PED"
GRACE = 2.0  # seconds a check may take beyond its limit
STRAYS = [f"{folder}/escape" for folder in ("/dev/shm", "/tmp", "/var/tmp", "/run", "")]
SIGNALS = (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM, signal.SIGHUP, signal.SIGIO)
LAYERS = {"namespaces": ("unshare", 272, 97), "Landlock": ("landlock_create_ruleset", 444, 444)}  # x86_64, aarch64

PREFIX = """
import ctypes, os, signal, socket, struct, subprocess, sys, threading, time
libc = ctypes.CDLL(None, use_errno=True)
def gain(*actions):
    for action in actions:
        try:
            result = action()
        except BaseException as error:
            print(type(error).__name__, str(error)[:80])
        else:
            print('ESCA' + 'PED', repr(result)[:200])
frame = sys._getframe()
while frame and 'replies' not in frame.f_locals:
    frame = frame.f_back
REPLIES = frame.f_locals['replies'] if frame else 1
def syscall(*args):
    if libc.syscall(*args) < 0:
        raise OSError(ctypes.get_errno(), 'system call')
"""
CALL = "if libc.syscall({}) != -1 or ctypes.get_errno() not in (1, 38): print('ESCA' + 'PED', ctypes.get_errno())"
# On x86_64 one program each, in which the system call must not even reach the kernel. name: number and arguments.
CALLS = {
    "ptrace": "101, 16, PARENT, 0, 0",
    "memory of another": "310, PARENT, 0, 0, 0, 0, 0",
    "mount": "165, b'none', b'/', b'tmpfs', 0, 0",
    "unmount": "166, b'/', 2",
    "pivot_root": "155, b'.', b'.'",
    "chroot": "161, b'.'",
    "unshare": "272, 0x10000000",
    "setns": "308, 0, 0",
    "clone a sibling": "56, 0x8000 | 17, 0, 0, 0, 0",
    "clone3": "435, bytes([0] * 32 + [17] + [0] * 31), 64",
    "x32 fork": "0x40000000 | 57",
    "setuid": "105, 0",
    "capset": "126, struct.pack('=Ii', 0x20080522, 0), b'\\xff' * 24",
    "bpf": "321, 0, b'\\x01\\0\\0\\0\\x04\\0\\0\\0\\x04\\0\\0\\0\\x01\\0\\0\\0' + bytes(100), 116",
    "io_uring": "425, 4, bytes(120)",
    "perf_event": "298, bytes(128), 0, -1, -1, 0",
    "keys": "250, 0, -3, 0",
    "userfaultfd": "323, 1",
    "kexec": "246, 0, 0, 0, 0",
    "reboot": "169, 0xFEE1DEAD, 672274793, 0, 0",
    "module": "313, -1, b'', 0",
    "swap": "168, b'/x'",
    "host name": "170, b'vm', 2",
    "clock": "227, 0, struct.pack('=qq', int(time.time()), 0)",
    "shared memory": "29, 0, 4096, 0o1600",
    "message queue": "240, b'escape', 0o102, 0o600, 0",
    "personality": "135, 0x0040000",
    "file handles": "303, -100, b'/', bytes(200), bytes(8), 0",
    "openat2": "437, -100, b'/', bytes(24), 24",
    "open_tree": "428, -100, b'/', 1",
    "ports": "172, 3",
    "lock memory": "151, 1",
    "accounting": "163, b'/x'",
    "watch files": "253",
}


def programs() -> dict[str, str]:
    """ "category: name" -> source of every hostile program."""
    text = Path(__file__).with_name("escape_programs.txt").read_text(encoding="utf-8")
    parts = (part.split("\n", 1) for part in text.split("\n### ")[1:])
    calls = {f"call: {name}": CALL.format(arguments) for name, arguments in CALLS.items()}
    return {name: source.strip() for name, source in parts} | (calls if platform.machine() == "x86_64" else {})


@dataclass(frozen=True)
class Config:
    """Flags of the suite."""

    only: str = cli.option("", "run programs whose 'category: name' contains this")
    limit: float = cli.option(2.0, "seconds a program may take")
    without: str = cli.option("", "layers to do without, as namespaces,Landlock")
    out: str | None = cli.option(
        None, "record to write, without suffix; unset = bench/escape_suite in the base directory"
    )

    def __post_init__(self) -> None:
        if unknown := set(filter(None, self.without.split(","))) - set(LAYERS):
            raise ValueError(f"--without {', '.join(sorted(unknown))}: choose among {', '.join(LAYERS)}")


def do_without(layers: list[str]) -> None:
    """Make this process and its children live with a kernel that does not grant these of `LAYERS`."""
    column = 1 if platform.machine() == "x86_64" else 2
    code = [(0x20, 0, 0, 0)]  # load the number; where it is one of these, answer EPERM
    for layer in layers:
        code += [(0x15, 0, 1, LAYERS[layer][column]), (0x06, 0, 0, 0x00050001)]
    sandbox.prctl(38, 1)
    sandbox.install_filter([*code, (0x06, 0, 0, 0x7FFF0000)])


class Outside:
    """The world that a program must not touch, and what has happened to it."""

    def __init__(self, folder: Path) -> None:
        self.secret, self.signals = secrets.token_hex(16), []
        self.canary, self.open, self.temporary = folder / "canary.py", folder / "open", folder / "temporary"
        self.canary.write_text(f"SECRET = '{self.secret}'\n")
        self.open.mkdir()
        self.temporary.mkdir()
        for path, mode in ((folder, 0o755), (self.canary, 0o644), (self.open, 0o777), (self.temporary, 0o755)):
            path.chmod(mode)
        self.abstract = f"escape-{self.secret[:8]}"
        self.listeners = {}
        for name, address in (("unix", str(folder / "socket")), ("abstract", "\0" + self.abstract)):
            self.listeners[name] = socket.socket(socket.AF_UNIX)
            self.listeners[name].bind(address)
        (folder / "socket").chmod(0o777)
        self.listeners["tcp"], self.listeners["udp"] = socket.socket(), socket.socket(type=socket.SOCK_DGRAM)
        self.listeners["tcp"].bind(("127.0.0.1", 0))
        port = self.listeners["tcp"].getsockname()[1]
        self.listeners["udp"].bind(("127.0.0.1", port))
        for name in ("unix", "abstract", "tcp"):
            self.listeners[name].listen()
        names = ("CANARY", "OUTSIDE", "SOCKET", "ABSTRACT", "PORT", "PARENT")
        values = (str(self.canary), str(self.open), str(folder / "socket"), self.abstract, port, os.getpid())
        self.head = "".join(f"{name} = {value!r}\n" for name, value in zip(names, values)) + PREFIX
        self.before, self.children = self._state(), children()

    def _state(self) -> dict[str, Any]:
        return {
            "files": sorted(self.open.iterdir()),
            "canary": (self.canary.read_text(), self.canary.stat().st_mode, self.canary.stat().st_uid),
            "strays": [path for path in STRAYS if os.path.lexists(path)],
            "host name": socket.gethostname(),
            "limits": resource.getrlimit(resource.RLIMIT_NOFILE),
            "priority": os.getpriority(os.PRIO_PROCESS, 0),
        }

    def harm(self, result: execution.Result, seconds: float, limit: float, peak: int) -> list[str]:
        """What a program did: words for each thing it must not do."""
        found = {
            "passed": result.passed,
            "secret read": self.secret in result.output,
            "gained something": MARKER in result.output,
            "too long": seconds > limit + GRACE,
            "too much memory": peak > execution.MEMORY + (64 << 20),
            "signal sent": bool(self.signals),
            "process left": bool(children_left(self.children)),
            "folder left": bool(list(self.temporary.iterdir())),
        }
        now = self._state()
        found |= {f"{name} changed": now[name] != self.before[name] for name in now}
        reached = select.select(list(self.listeners.values()), [], [], 0)[0]
        found |= {f"{name} reached": listener in reached for name, listener in self.listeners.items()}
        return [name for name, happened in found.items() if happened]


def children() -> set[int]:
    """Process ids of this process's children; orphans of our checks become our children."""
    return set(map(int, Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()))


def children_left(before: Set[int] = frozenset()) -> set[int]:
    """Children that were not there `before` and are there still after half a second."""
    end = time.monotonic() + 0.5
    while True:
        for process in children() - before:
            with contextlib.suppress(ChildProcessError):
                os.waitpid(process, os.WNOHANG)
        left = children() - before
        if not left or time.monotonic() > end:
            return left
        time.sleep(0.01)


@contextlib.contextmanager
def outside() -> Iterator[Outside]:
    """A world to keep whole, with this process as the parent that programs aim at."""
    with tempfile.TemporaryDirectory(prefix="escape-") as folder:
        world = Outside(Path(folder))
        handlers = {number: signal.signal(number, lambda n, _: world.signals.append(n)) for number in SIGNALS}
        sandbox.prctl(36, 1)  # PR_SET_CHILD_SUBREAPER
        os.environ["NANOCHAT_CANARY"], tempfile.tempdir = world.secret, str(world.temporary)
        try:
            yield world
        finally:
            del os.environ["NANOCHAT_CANARY"]
            tempfile.tempdir = None
            sandbox.prctl(36, 0)
            for number, handler in handlers.items():
                signal.signal(number, handler)
            for listener in world.listeners.values():
                listener.close()


def attempt(source: str, world: Outside, limit: float = 2.0) -> dict[str, Any]:
    """One program's row: outcome, seconds, and how it escaped ("" when it did not)."""
    begin, peak = time.monotonic(), max_rss()
    result = execution.check(world.head + source, TEST, limit)
    seconds = time.monotonic() - begin
    harm = world.harm(result, seconds, limit, max_rss() if max_rss() > peak else 0)
    return {"outcome": result.outcome, "seconds": seconds, "escape": ", ".join(harm), "output": result.output[-300:]}


def max_rss() -> int:
    """Bytes of the largest descendant so far; a child counts with what its parent held when it was started."""
    ours, theirs = (resource.getrusage(who).ru_maxrss << 10 for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return theirs if theirs > ours else 0


def main() -> None:
    """Run the suite, print its table, write the record; SystemExit(1) when anything escaped."""
    config = cli.parse(Config, description=__doc__.splitlines()[0])
    if config.without:
        do_without(config.without.split(","))
    layers = execution.isolation()
    execution.require_isolation()
    rows = []
    with outside() as world:
        for name, source in tqdm({**CONTROLS, **programs()}.items()):
            if config.only in name:
                rows.append({"program": name, **attempt(source, world, config.limit)})
                world.signals.clear()
                if name == "control: right":
                    rows[-1]["escape"] = "" if rows[-1]["outcome"] == "passed" else "a right program does not pass"
    escapes = [row for row in rows if row["escape"]]
    counts = Counter(row["outcome"] for row in rows)
    record = {"user": os.getuid(), "limit": config.limit, "layers": layers, "outcomes": counts, "escapes": len(escapes)}
    table = bench.markdown_table(
        [{key: row[key] for key in ("program", "outcome", "seconds", "escape")} for row in rows]
    )
    granted = ", ".join(name for name, granted in layers.items() if granted)
    lines = f"{len(rows)} programs as user {os.getuid()}: {len(escapes)} escapes; {dict(counts)}\nLayers: {granted}"
    path = Path(config.out or get_base_dir() / "bench" / "escape_suite")
    bench.write_report(path, {**record, "programs": rows}, f"{table}\n{lines}\n")
    if escapes:
        raise SystemExit(1)


if __name__ == "__main__":
    cli.run(main)
