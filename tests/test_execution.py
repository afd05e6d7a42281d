"""Model-written code: right programs pass, nothing else does, and nothing gets out."""

import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from decimal import Decimal
from fractions import Fraction
from pathlib import Path

import pytest

from dev import escape_suite
from nanochat import execution, execution_child, sandbox

ROOT = Path(__file__).resolve().parent.parent
HUMANEVAL = ROOT.parent / "shared" / "data" / "tasks" / "humaneval" / "test.parquet"
DOUBLE = "def f(x):\n    return x * 2"
TEST = "def check(candidate):\n    assert candidate(2) == 4\n    assert candidate([1]) == [1, 1]\ncheck(f)"

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="isolation is Linux's")


def python_of_everybody():
    """An interpreter that nobody may run, too."""
    for python in (sys.executable, "/usr/bin/python3"):
        command = [python, "-c", "import sys; assert sys.version_info >= (3, 10)"]
        user = {"user": sandbox.NOBODY, "group": sandbox.NOBODY, "extra_groups": []} if os.getuid() == 0 else {}
        try:
            if subprocess.run(command, cwd="/", capture_output=True, **user).returncode == 0:
                return python, user
        except OSError:
            pass
    pytest.skip("no Python 3.10 that an ordinary user may run")


def test_right_passes_and_wrong_fails_with_the_line_that_shows_it():
    result = execution.check(DOUBLE, TEST)
    assert (result.passed, result.outcome, result.output) == (True, "passed", "")
    result = execution.check("print('hello')\ndef f(x):\n    return x + x + 1", TEST)
    assert (result.passed, result.outcome) == (False, "failed")
    assert result.output == "hello\nAssertionError at line 2: assert candidate(2) == 4"
    assert (
        "ZeroDivisionError: division by zero at line 2: return 1 / 0"
        in execution.check("def f(x):\n    return 1 / 0", TEST).output
    )
    assert "SyntaxError" in execution.check("def f(", TEST).output
    assert "no attribute 'f'" in execution.check("g = 1", TEST).output


def test_a_program_that_is_broken_passes_no_test_that_calls_nothing():
    assert execution.check("x = 1", "assert True").passed
    assert not execution.check("x = 1 / 0", "assert True").passed
    assert not execution.check("import os; os._exit(0)", "assert True").passed


def humaneval_jobs(change):
    """(program, test, prelude) of each real row, its reference solution changed by `change`."""
    if not HUMANEVAL.exists():
        pytest.skip("shared/data/tasks/humaneval is not here")
    import pyarrow.parquet as pq

    for row in pq.read_table(HUMANEVAL).to_pylist():
        prelude = row["prompt"][: row["prompt"].index(f"def {row['entry_point']}(")]
        yield row["prompt"] + change(row["canonical_solution"]), f"{row['test']}\ncheck({row['entry_point']})", prelude


@pytest.mark.parametrize(
    "change, passing", [(lambda body: body, 1.0), (lambda body: "    return {'wrong': 0}\n" + body, 0.0)]
)
def test_humaneval_references_pass_and_with_a_wrong_line_fail(change, passing):
    jobs = list(humaneval_jobs(change))
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        results = list(pool.map(lambda job: execution.check(*job[:2], timeout=20.0), jobs))
    assert sum(result.passed for result in results) / len(jobs) == passing


def test_a_program_cannot_redefine_the_helper_that_its_test_uses():
    program = "def poly(xs, x):\n    return 0.0\ndef find_zero(xs):\n    return 0.0"
    test = "def check(candidate):\n    assert abs(poly([1, 2], candidate([1, 2]))) < 1e-4\ncheck(find_zero)"
    prelude = "import math\ndef poly(xs, x):\n    return sum(c * math.pow(x, i) for i, c in enumerate(xs))\n"
    assert execution.check(program, test).passed  # the program's own helper
    assert not execution.check(program, test, prelude=prelude).passed
    assert execution.check(program.replace("return 0.0", "return -0.5"), test, prelude=prelude).passed


def test_checks_at_the_same_time_keep_apart():
    programs = [f"def f(x):\n    return x * {2 if i % 3 else 5}" for i in range(9)]
    with ThreadPoolExecutor(3) as pool:
        results = list(pool.map(lambda program: execution.check(program, TEST), programs))
    assert [result.passed for result in results] == [bool(i % 3) for i in range(9)]


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


@pytest.fixture
def world():
    with escape_suite.outside() as world:
        yield world


PROGRAMS = escape_suite.programs()
SLOW = ("loop", "sleep", "power", "errors", "blow", "ignore", "at exit", "stop oneself", "closed", "full", "recursion")
SLOW += ("timers", "compute", "touched", "half", "endless", "huge", "regular", "past", "compression")
QUICK = [name for name in PROGRAMS if name.startswith("forge: ") or not any(word in name for word in SLOW)]
SAMPLE = QUICK[::2]


def test_the_suite_is_as_large_as_it_says():
    assert len(PROGRAMS) >= 60 and len(set(PROGRAMS.values())) == len(PROGRAMS)
    for name, source in PROGRAMS.items():
        compile(source, name, "exec")


@pytest.mark.parametrize("name", SAMPLE)
def test_hostile_programs_stay_inside(name, world):
    row = escape_suite.attempt(PROGRAMS[name], world, 1.0)
    assert row["escape"] == "", row
    assert "NameError" not in row["output"]  # the program tried what it says


@pytest.mark.parametrize(
    "name, outcome",
    [
        ("exhaust: loop in f", "timeout"),
        ("signal: ignore them all", "timeout"),
        ("exhaust: output past errors", "timeout"),
        ("exhaust: ratio that blows up the judge", "timeout"),
        ("exhaust: gigabyte of output", "output"),
        ("exhaust: memory at once", "memory"),
        ("exhaust: crash", "killed"),
    ],
)
def test_limits_have_their_outcome(name, outcome, world):
    row = escape_suite.attempt(PROGRAMS[name], world, 1.0)
    assert (row["outcome"], row["escape"]) == (outcome, "")


def naive(program, test, limit):
    """The grader that this one is not: the same process for program and test, and its exit status for a verdict."""
    run = subprocess.run([sys.executable, "-c", f"{program}\n{test}"], capture_output=True, text=True, timeout=20)
    return execution.Result("passed" if run.returncode == 0 else "failed", run.stdout + run.stderr, 0.0)


@pytest.mark.parametrize(
    "name, escape",
    [
        ("read: canary", "secret read"),
        ("read: own environment", "secret read"),
        ("write: outside", "files changed"),
        ("network: tcp", "gained something, tcp reached"),
        ("network: abstract unix", "abstract reached"),
        ("signal: parent", "gained something, signal sent"),
        ("process: fork", "gained something"),
        ("forge: exit at once", "passed"),
        ("forge: equal to everything", "passed"),
        ("forge: exception hook", "passed"),
    ],
)
def test_the_same_programs_escape_a_naive_grader(name, escape, monkeypatch):
    monkeypatch.setattr(execution, "check", naive)
    with escape_suite.outside() as world:
        row = escape_suite.attempt(PROGRAMS[name], world, 20.0)
        assert all(word in row["escape"] for word in escape.split(", ")), row


# What a program finds when it looks around, in the terms of the layers.
PROBE = """
import ctypes, os, resource, socket
def refused(action):
    try:
        action()
    except OSError as error:
        return error.errno
def look():
    limit = lambda name: resource.getrlimit(getattr(resource, 'RLIMIT_' + name))[1]
    return {
        'process namespace': os.getpid() == 2,
        'private root': not os.path.exists('/etc') and os.getcwd() == '/private',
        'unprivileged user': os.getuid() != 0 and os.geteuid() != 0,
        'no environment': not os.environ,
        'empty directory': os.listdir('.') == [],
        'memory limit': limit('AS') == 256 << 20,
        'CPU limit': limit('CPU') == 6,
        'file size limit': limit('FSIZE') == 1 << 20,
        'open file limit': limit('NOFILE') == 32,
        'process limit': limit('NPROC') <= 64,
        'no core dumps': limit('CORE') == 0,
        'system call filter': refused(socket.socket) == refused(os.fork) == 38,
    }
"""


def test_the_report_is_what_a_program_finds():
    layers = execution.isolation()
    execution.require_isolation()
    reported = {name: layers[name] for name in re.findall(r"^        '(.*?)':", PROBE, re.MULTILINE)}
    assert len(reported) == 12
    result = execution.check(PROBE, f"found = look()\nassert found == {reported}, found")
    assert result.passed, result.output


def test_another_kernel_gets_no_silent_yes(monkeypatch):
    monkeypatch.setattr(execution, "isolation", lambda: dict.fromkeys(execution.LIMITS, True))  # as on macOS
    with pytest.raises(ValueError, match=r"no private root or Landlock, no system call filter.*--unsafe"):
        execution.require_isolation()
    execution.require_isolation(unsafe=True)


# A kernel that does not know some calls (x86_64 numbers, aarch64 numbers): children live with that, too.
UNSHARE, LANDLOCK = (272, 97), (444, 444)
LESS = """
import json, os
from nanochat import execution, sandbox
code = [(0x20, 0, 0, 0)]
for numbers in {numbers}:
    code += [(0x15, 0, 1, numbers[os.uname().machine != "x86_64"]), (0x06, 0, 0, 0x00050001)]
sandbox.prctl(38, 1)
sandbox.install_filter([*code, (0x06, 0, 0, 0x7FFF0000)])
results = []
for unsafe in (False, True):
    try:
        results.append(execution.check({program!r}, {test!r}, unsafe=unsafe).outcome)
    except ValueError as error:
        results.append(str(error))
print(json.dumps([results, execution.isolation()]))
"""


@pytest.mark.parametrize("missing", [[], [UNSHARE], [LANDLOCK], [UNSHARE, LANDLOCK]])
def test_lesser_kernels(missing):
    python, user = python_of_everybody()
    script = LESS.format(numbers=missing, program=DOUBLE, test=TEST)
    run = subprocess.run([python, "-c", script], capture_output=True, text=True, cwd=ROOT, timeout=60, **user)
    results, layers = json.loads(run.stdout)
    assert layers["private root"] == layers["process namespace"] == layers["user namespace"] == (UNSHARE not in missing)
    assert layers["Landlock"] == (LANDLOCK not in missing)
    assert layers["system call filter"] and layers["unprivileged user"] and layers["no capabilities"]
    assert results[1] == "passed"  # unsafe
    assert ("--unsafe" in results[0]) if len(missing) == 2 else (results[0] == "passed")


def test_nothing_is_left_when_the_harness_is_killed(world):
    script = f"from nanochat import execution\nexecution.check('import time; print(1); time.sleep(99)', {TEST!r}, 99.0)"
    harness = subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, env={**os.environ, "TMPDIR": str(world.open)})
    try:
        end = time.monotonic() + 30
        while not any(output.stat().st_size for output in world.open.glob("*/output")) and time.monotonic() < end:
            time.sleep(0.05)
        assert list(world.open.glob("*/output"))
        harness.send_signal(signal.SIGKILL)
        harness.wait()
        assert not escape_suite.children_left(world.children)  # its orphans are ours
    finally:
        harness.kill()
        for folder in world.open.iterdir():
            shutil.rmtree(folder)


def test_bad_arguments():
    for wrong in ({"timeout": 0.0}, {"memory": 1 << 20}):
        with pytest.raises(ValueError, match="timeout above 0"):
            execution.check(DOUBLE, TEST, **wrong)


def test_nothing_is_left_in_the_temporary_directory(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    execution.check("open('a', 'w').write('x')\n" + DOUBLE, TEST)
    execution.check("while True: pass", TEST, timeout=0.2)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "header, column",
    [("/usr/include/x86_64-linux-gnu/asm/unistd_64.h", 1), ("/usr/include/asm-generic/unistd.h", 2)],
    ids=["x86_64", "aarch64"],
)
def test_numbers_of_system_calls_are_the_kernels(header, column):
    if not Path(header).exists():
        pytest.skip(f"{header} is not here")
    numbers = dict(re.findall(r"#define __NR(?:3264)?_(\w+)\s+(\d+)", Path(header).read_text()))
    aliases = {"newfstatat": "fstatat"} if column == 2 else {}
    table = [entry.split() for entry in sandbox.SYSTEM_CALLS.split(",")]
    table += [[name, str(x86), str(arm)] for name, x86, arm, *_ in sandbox.GUARDED_CALLS]
    for entry in table:
        name = aliases.get(entry[0], entry[0])
        assert entry[column] == numbers.get(name, "-"), entry
