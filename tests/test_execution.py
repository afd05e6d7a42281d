"""Model-written code: right programs pass, nothing else does, and nothing gets out.

Oracle: an outside world (a secret file, listeners, a parent that counts signals) that hostile programs must leave as it
was. The same programs against a naive grader show that they bite. HumanEval's own reference solutions are judged in
test_public_tasks.py.
"""

import contextlib
import json
import math
import os
import re
import resource
import secrets
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from decimal import Decimal
from fractions import Fraction
from pathlib import Path

import pytest

from nanochat import execution, execution_child
from tests.hostile_programs import HEAD, MARKER, PROGRAMS

ROOT = Path(__file__).resolve().parent.parent
DOUBLE = "def f(x):\n    return x * 2"
TEST = "def check(candidate):\n    assert candidate(2) == 4\n    assert candidate([1]) == [1, 1]\ncheck(f)"
SQUARE_TEST = "def check(candidate):\n    assert candidate(3) == 9\n    assert candidate(-4) == 16\ncheck(f)"
LIMIT = 0.5  # seconds that a hostile program gets
GRACE = 2.0  # seconds that a check may take beyond its limit, on a busy machine
SIGNALS = (signal.SIGUSR1, signal.SIGTERM, signal.SIGHUP, signal.SIGIO)

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="isolation is Linux's")


# --- verdicts ---------------------------------------------------------------------------------------------------------


def check(program, test=TEST, **options):
    return execution.check(program, "f", test, **options)


def test_right_passes_and_wrong_fails_with_its_error():
    assert check(DOUBLE) == (True, "")
    assert check("print('hello')\ndef f(x):\n    return x + x + 1") == (False, "hello\nAssertionError")
    assert check("def f(x):\n    return 1 / 0") == (False, "ProgramError: ZeroDivisionError: division by zero")
    assert "SyntaxError" in check("def f(").output
    assert "no attribute 'f'" in check("g = 1").output


def test_a_program_that_is_broken_passes_no_test_that_calls_nothing():
    assert check("x = 1", "assert True").passed
    assert not check("x = 1 / 0", "assert True").passed
    assert not check("import os; os._exit(0)", "assert True").passed


def test_the_end_of_a_program_is_not_the_exception_that_a_test_expects():
    expects = "try:\n    f(1)\nexcept BaseException:\n    pass\nelse:\n    assert False"
    assert check("def f(x): raise ValueError", expects).passed
    assert not check("import os\ndef f(x): os._exit(0)", expects).passed


def test_a_program_cannot_redefine_the_helper_that_its_test_uses():
    program = "def poly(xs, x):\n    return 0.0\ndef f(xs):\n    return 0.0"
    test = "def check(candidate):\n    assert abs(poly([1, 2], candidate([1, 2]))) < 1e-4\ncheck(f)"
    prelude = "import math\ndef poly(xs, x):\n    return sum(c * math.pow(x, i) for i, c in enumerate(xs))\n"
    assert not check(program, test, prelude=prelude).passed
    assert check(program.replace("return 0.0", "return -0.5"), test, prelude=prelude).passed


def test_checks_at_the_same_time_keep_apart():
    programs = [f"def f(x):\n    return x * {2 if i % 3 else 5}" for i in range(9)]
    with ThreadPoolExecutor(3) as pool:
        results = list(pool.map(check, programs))
    assert [result.passed for result in results] == [bool(i % 3) for i in range(9)]


# --- values that cross the pipe ---------------------------------------------------------------------------------------

NUMBERS = [True, 0, -7, 1 << 62, -(1 << 5000), 0.5, -0.0, math.inf, -math.inf, 1e-320, 2 - 3j]
TEXTS = ["", "é\ud800\n", b"\0\xff"]
COLLECTIONS = [[[1, "a"], (2,)], (), (1, (2, [3])), set(), {1, "a"}, frozenset({2.5}), {1: {"a": [None]}, (1, 2): 3}]


def cross(value):
    return execution_child.unpack(json.loads(json.dumps(execution_child.pack(value))))


def test_values_cross_as_they_are_and_nothing_else_does():
    for value in [None, *NUMBERS, *TEXTS, *COLLECTIONS, range(3, 9, 2)]:
        back = cross(value)
        assert back == value and type(back) is type(value) and (repr(back) == repr(value) or value == -(1 << 5000))
    assert math.isnan(cross(math.nan))
    assert cross([Decimal("0.1"), Fraction(1, 3)]) == [Fraction(1, 10), Fraction(1, 3)]

    class Number(int):
        def __eq__(self, other):
            return True

    class Table(dict):
        pass

    assert type(cross(Number(3))) is int and type(cross(Number(1 << 99))) is int and type(cross(Table(a=1))) is dict
    assert list(cross(x * x for x in range(3))) == [0, 1, 4]
    for value in (object(), len, int, lambda: 0):
        with pytest.raises(TypeError, match="not a value"):
            cross(value)


# --- hostile programs -------------------------------------------------------------------------------------------------


class Outside:
    """The world that a program must not touch, and what has happened to it."""

    def __init__(self, folder: Path, signals: list[int]) -> None:
        self.secret = secrets.token_hex(16)
        self.signals = signals
        self.canary = folder / "canary.py"
        self.open = folder / "open"
        self.temporary = folder / "temporary"
        self.canary.write_text(f"SECRET = '{self.secret}'\n")
        self.open.mkdir()
        self.temporary.mkdir()
        for path, mode in ((folder, 0o755), (self.canary, 0o644), (self.open, 0o777), (self.temporary, 0o755)):
            path.chmod(mode)
        abstract = f"escape-{self.secret[:8]}"
        self.listeners = {}
        for name, address in (("unix", str(folder / "socket")), ("abstract", "\0" + abstract)):
            self.listeners[name] = socket.socket(socket.AF_UNIX)
            self.listeners[name].bind(address)
            self.listeners[name].listen()
        self.listeners["tcp"] = socket.create_server(("127.0.0.1", 0))
        port = self.listeners["tcp"].getsockname()[1]
        self.listeners["udp"] = socket.socket(type=socket.SOCK_DGRAM)
        self.listeners["udp"].bind(("127.0.0.1", port))
        known = {
            "CANARY": str(self.canary),
            "OUTSIDE": str(self.open),
            "SOCKET": str(folder / "socket"),
            "ABSTRACT": abstract,
            "PORT": port,
            "PARENT": os.getpid(),
        }
        self.head = "".join(f"{name} = {value!r}\n" for name, value in known.items()) + HEAD
        self.before = self.state()

    def state(self):
        status = self.canary.stat()
        return {
            "files": list(self.open.iterdir()),
            "canary": (self.canary.read_text(), status.st_mode, status.st_uid, status.st_mtime, status.st_nlink),
            "strays": [p for p in ("/dev/shm", "/tmp", "/var/tmp", "/run", "/") if os.path.lexists(f"{p}/escape")],
            "limits": resource.getrlimit(resource.RLIMIT_NOFILE),
            "priority": os.getpriority(os.PRIO_PROCESS, 0),
            "cores": os.sched_getaffinity(0),
            "processes": children(),
        }

    def attempt(self, source, limit=LIMIT):
        """Run a program; returns its result and words for each thing it must not do."""
        began = time.monotonic()
        result = execution.check(self.head + source, "f", SQUARE_TEST, timeout=limit)
        found = {
            "passed": result.passed,
            "secret read": self.secret in result.output,
            "gained something": MARKER in result.output,
            "too long": time.monotonic() - began > limit + GRACE,
            "signal sent": bool(self.signals),
            "folder left": bool(list(self.temporary.iterdir())),
        }
        now = self.state()
        found |= {f"{name} changed": now[name] != self.before[name] for name in now}
        reached = select.select(list(self.listeners.values()), [], [], 0)[0]
        found |= {f"{name} reached": listener in reached for name, listener in self.listeners.items()}
        return result, {name for name, happened in found.items() if happened}


def children():
    """Process ids of this process's children; orphans of our checks become our children."""
    return set(Path(f"/proc/self/task/{os.getpid()}/children").read_text(encoding="utf-8").split())


@pytest.fixture
def world(tmp_path, monkeypatch):
    """An outside world, with this process as the parent that programs aim at."""
    signals = []
    outside = Outside(tmp_path, signals)
    monkeypatch.setenv("NANOCHAT_CANARY", outside.secret)
    monkeypatch.setattr(tempfile, "tempdir", str(outside.temporary))
    handlers = {number: signal.signal(number, lambda n, _: signals.append(n)) for number in SIGNALS}
    execution_child.prctl(36, 1)  # PR_SET_CHILD_SUBREAPER
    yield outside
    execution_child.prctl(36, 0)
    for number, handler in handlers.items():
        signal.signal(number, handler)
    for listener in outside.listeners.values():
        listener.close()


SAYS = {
    "exhaust: loop in f": "no verdict within 0.5 s",
    "signal: ignore them all": "no verdict within 0.5 s",
    "exhaust: ratio that blows up the judge": "no verdict within 0.5 s",
    "exhaust: half an answer": "no verdict within 0.5 s",
    "exhaust: memory": "MemoryError",
    "exhaust: crash": "no answer from the program",
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_hostile_programs_stay_inside(name, world):
    result, escapes = world.attempt(PROGRAMS[name])
    assert not escapes, result
    assert "NameError" not in result.output  # the program tried what it says
    assert SAYS.get(name, "") in result.output


def test_a_right_program_passes_in_the_same_world(world):
    assert world.attempt("def f(x): return x * x")[1] == {"passed"}


def naive(program, entry_point, test, timeout):
    """The grader that this one is not: the same process for program and test, and its exit status for a verdict."""
    run = subprocess.run([sys.executable, "-c", f"{program}\n{test}"], capture_output=True, text=True, timeout=timeout)
    return execution.Result(run.returncode == 0, run.stdout + run.stderr)


@pytest.mark.parametrize(
    "name, escapes",
    [
        ("read: canary", {"secret read"}),
        ("read: own environment", {"secret read"}),
        ("write: outside", {"files changed"}),
        ("network: tcp", {"gained something", "tcp reached"}),
        ("network: unix", {"unix reached", "abstract reached"}),
        ("process: fork", {"gained something"}),
        ("forge: exit at once", {"passed"}),
        ("forge: equal to everything", {"passed"}),
        ("forge: exception hook", {"passed"}),
    ],
)
def test_the_same_programs_escape_a_naive_grader(name, escapes, world, monkeypatch):
    monkeypatch.setattr(execution, "check", naive)
    assert escapes <= world.attempt(PROGRAMS[name], 20.0)[1]


def descendants(process):
    """Process ids of all that a process has started, and that have started since."""
    found = set(Path(f"/proc/{process}/task/{process}/children").read_text(encoding="utf-8").split())
    return found.union(*map(descendants, found))


def test_nothing_is_left_when_the_harness_is_killed(world):
    script = (
        f"from nanochat import execution\nexecution.check('import time; time.sleep(99)', 'f', {TEST!r}, timeout=99)"
    )
    harness = subprocess.Popen([sys.executable, "-c", script], cwd=ROOT)
    try:
        end = time.monotonic() + 30
        while len(descendants(harness.pid)) < 3 and time.monotonic() < end:
            time.sleep(0.05)
        assert len(descendants(harness.pid)) == 3  # launcher, program and judge
    finally:
        harness.kill()
        harness.wait()
    end = time.monotonic() + 2
    while children() - world.before["processes"] and time.monotonic() < end:
        with contextlib.suppress(ChildProcessError):
            os.waitpid(-1, os.WNOHANG)  # its orphans are ours
        time.sleep(0.01)
    assert not children() - world.before["processes"]


# --- lesser kernels ---------------------------------------------------------------------------------------------------

# A kernel that does not know one call, played by a filter.
LACKING = """
import json
from nanochat import execution, execution_child as child
allow = (0x06, 0, 0, 0x7FFF0000)
code = [(0x20, 0, 0, 0), (0x15, 0, 1, {number}), (0x06, 0, 0, 0x00050026), allow]
child.prctl(38, 1)
child.install_filter(code)
results = []
for unsafe in (False, True):
    try:
        results.append(execution.check({program!r}, "f", {test!r}, unsafe=unsafe).passed)
    except ValueError as error:
        results.append(str(error))
print(json.dumps(results))
"""


@pytest.mark.parametrize("number, lacking", [(9999, None), (444, "Landlock")])  # there is no call 9999
def test_without_landlock_nothing_runs_unless_unsafe(number, lacking):
    script = LACKING.format(number=number, program=DOUBLE, test=TEST)
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, timeout=60)
    results = json.loads(run.stdout)
    assert results[1] is True
    if lacking is None:
        assert results[0] is True
    else:
        assert f"cannot set up {lacking}" in results[0] and "--unsafe" in results[0]


@pytest.mark.parametrize(
    "header, column",
    [("/usr/include/x86_64-linux-gnu/asm/unistd_64.h", 1), ("/usr/include/asm-generic/unistd.h", 2)],
    ids=["x86_64", "aarch64"],
)
def test_numbers_of_system_calls_are_the_kernels(header, column):
    if not Path(header).exists():
        pytest.skip(f"{header} is not here")
    numbers = dict(re.findall(r"#define __NR(?:3264)?_(\w+)\s+(\d+)", Path(header).read_text(encoding="utf-8")))
    aliases = {"newfstatat": "fstatat"} if column == 2 else {}
    for entry in ", ".join(execution_child.SYSTEM_CALLS.values()).split(", "):
        words = entry.split()
        name = aliases.get(words[0], words[0])
        assert words[column] == numbers.get(name, "-"), entry
