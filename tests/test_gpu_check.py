"""dev.gpu_check, rehearsed on a CPU: every row is there; what fails or is late becomes a row, too."""

import contextlib
import dataclasses
import io
import json
import math
import os
import runpy
import signal
import sys
import time
from types import SimpleNamespace
from unittest import mock

import pytest
import tiny_run
import torch
from on_null_cuda import on_null_cuda
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity

from dev import gpu_check, gpu_training, train_clock
from dev.fake_gpu import FakeGpu
from dev.gpu_bench import REHEARSAL, Bench, Check, Stopped
from nanochat.compute import Compute

# What the machine that is lent lacks of our dependencies; nor does it have a network.
ABSENT = ("cachetools", "flask", "kernels", "liger_kernel", "pydantic", "rustbpe", "waitress", "wandb")

ROWS = """bf16 128x128x128|bf16 256x128x512|bf16 256x512x128|bf16 512x256x128
fp8 128x128x128|fp8 256x128x512|fp8 256x512x128|fp8 512x256x128|memory, copy|memory, read
attention blocks, window 256|attention blocks, window 128|attention sdpa, window 256|attention sdpa, window 128
head's loss, compiled|head's loss, fp8|MLP, compiled|fp8 linear, q, k, v|fp8 linear, up|fp8 linear, down|norm|Muon|AdamW
d2 bf16, ours|d2 fp8, ours
decoding batch 1, graphs on|decoding batch 32, graphs on|decoding batch 1, graphs off|decoding batch 32, graphs off
engine against model|loader under compute|accumulation against rows at once|recomputation against rows at once"""


def no_network(event, arguments):
    assert event != "socket.connect", arguments


def rehearse(out):
    for name in ABSENT:
        sys.modules[name] = None
    sys.addaudithook(no_network)
    sys.argv = ["dev.gpu_check", "--device-type=cpu", f"--out={out}"]
    runpy.run_module("dev.gpu_check", run_name="__main__")


def test_rehearsal_measures_every_row(tmp_path, monkeypatch):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "base"))
    monkeypatch.setenv("NANOCHAT_DTYPE", "bfloat16")
    out = tmp_path / "gpu_check.jsonl"
    result = tiny_run.start(rehearse, str(out)).wait()
    assert result.code == 0, result
    machine, *rows = map(json.loads, out.read_text().splitlines())
    assert machine["versions"]["torch"] == torch.__version__
    assert [row["row"] for row in rows] == ROWS.replace("\n", "|").split("|")
    for row in rows:
        assert "failed" not in row and "skipped" not in row, row
        assert all(math.isfinite(value) for value in row.values() if isinstance(value, float | int)), row
        # Of bf16, of fp8, and of the inverse roots that Muon computes in bf16.
        assert row.get("error", 0) < 0.1 and row.get("gradient error", 0) < 0.1, row
        assert f"| {row['row']} |" in result.out
    bf16, in_fp8 = (row for row in rows if "tokens/s" in row and "first loss" in row)
    for row in (bf16, in_fp8):
        assert row["last loss"] < row["first loss"]
        assert row["forward ms"] + row["backward ms"] + row["optimizer ms"] <= 1.001 * row["ms"]
        assert row["tokens/s"] * row["ms"] / 1e3 == pytest.approx(2 * 256 * (2 if row is bf16 else 1))
        assert f"{row['row']} ran with {row['kernels']}" in result.out
    assert in_fp8["first loss"] == pytest.approx(bf16["first loss"], rel=1e-2)


@pytest.fixture
def bench(tmp_path):
    return Bench(Compute(torch.device("cpu"), torch.float32), REHEARSAL, tmp_path, None)


def good(bench):
    return [{"ms": 1.0}]


def out_of_memory(bench):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")


def interrupted(bench):
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(60)


def late(bench):
    time.sleep(60)


GOOD = Check("good", good)
OUT_OF_MEMORY = Check("large", out_of_memory)
INTERRUPTED = Check("interrupted", interrupted)
LATE = Check("late", late)


def run(bench, *checks, minutes=1.0):
    file = io.StringIO()
    rows, ended = gpu_check.run(checks, bench, minutes, file)
    assert rows == [json.loads(line) for line in file.getvalue().splitlines()]
    gpu_check.show(rows)
    return [(row["row"], row.get("failed") or row.get("skipped")) for row in rows], ended


def test_a_failed_row_says_why_and_the_rest_goes_on(bench, capsys):
    rows, ended = run(bench, GOOD, OUT_OF_MEMORY, GOOD)
    failed = "OutOfMemoryError: CUDA out of memory. Tried to allocate 20.00 MiB"
    assert rows == [("good", None), ("large", failed), ("good", None)]
    assert ended is None
    assert failed in capsys.readouterr().out.split("| row |")[1]


@pytest.mark.parametrize("check, minutes, why", [(LATE, 5e-3, "time is up"), (INTERRUPTED, 1.0, "SIGTERM")])
def test_what_there_is_no_time_for_is_named(bench, check, minutes, why):
    before = signal.getsignal(signal.SIGTERM)
    rows, ended = run(bench, GOOD, check, GOOD, minutes=minutes)
    assert rows == [("good", None), (check.name, why), ("good", why)]
    assert ended == why
    assert signal.getsignal(signal.SIGTERM) == before and signal.getitimer(signal.ITIMER_REAL) == (0, 0)


def test_turns_that_were_over_count(bench, monkeypatch):
    """A reference that compiles until time is up must not cost what is known of our side."""
    known = {"ms": 10.0, "forward ms": 3.0, "backward ms": 5.0, "optimizer ms": 2.0, "losses": [6.0, 5.0]}
    known |= {"graphs": 4, "peak bytes": None, "kernels": "plain"}
    answers = iter([known, known])

    def receive(side):
        if found := next(answers, None):
            return found
        raise Stopped("time is up")

    monkeypatch.setattr(gpu_training.OurSide, "receive", receive)
    rows, ended = run(bench, gpu_training.training(bench)[0])
    assert rows == [("d2 bf16, ours", None), ("training in bf16", "time is up")] and ended == "time is up"


def event(began, ended, device=DeviceType.CUDA, named=False):
    """As the profiler lists one; times are microseconds."""
    span = SimpleNamespace(start=began, end=ended)
    return SimpleNamespace(time_range=span, device_type=device, is_user_annotation=named)


EVENTS = [event(0, 1000), event(500, 700), event(900, 1500), event(3000, 4000)]
EVENTS += [event(0, 9000, DeviceType.CPU), event(0, 9000, named=True)]


def test_idle_time_counts_kernels_at_once_one_time_and_named_ranges_not_at_all():
    assert train_clock.covered_milliseconds(EVENTS) == 2.5


def test_bad_flags(tmp_path, monkeypatch):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "base"))
    cpu = "--device-type=cpu"
    assert "--parts" in tiny_run.call("dev.gpu_check", cpu, "--parts=6").error_line
    assert "--reference" in tiny_run.call("dev.gpu_check", cpu, f"--reference={tmp_path / 'none'}").error_line
    (tmp_path / "text.tar.gz").write_text("no archive")
    assert "--reference" in tiny_run.call("dev.gpu_check", cpu, f"--reference={tmp_path / 'text.tar.gz'}").error_line


class Event:
    """Stands in for torch.cuda.Event: whatever happens between two of them takes a millisecond."""

    def __init__(self, enable_timing):
        assert enable_timing

    def record(self):
        pass

    def synchronize(self):
        pass

    def elapsed_time(self, end):
        return 1.0


@contextlib.contextmanager
def profiled(activities):
    """Stands in for torch.profiler.profile."""
    assert ProfilerActivity.CUDA in activities
    yield SimpleNamespace(events=lambda: EVENTS)


@on_null_cuda
def test_what_only_a_gpu_runs(tmp_path):
    """On paper: attention and training, timed by events and profiled."""
    with FakeGpu() as gpu, gpu.watch, mock.patch.object(torch.cuda, "Event", Event):
        torch.compile = lambda function, **options: function  # what it makes of our code: test_cuda_graphs.py
        torch.nn.Module.compile = lambda module, **options: None
        sizes = dataclasses.replace(REHEARSAL, rounds=1)
        bench = Bench(Compute(gpu.device, torch.bfloat16), sizes, tmp_path, None)
        checks = [*gpu_check.kernels(bench)[:6], gpu_check.training(bench)[0]]
        with mock.patch.object(gpu_check.gc, "collect"), mock.patch.object(train_clock, "profile", profiled):
            rows = [row for check in checks for row in gpu_check.attempt(check, bench)]
    assert not [row for row in rows if "failed" in row]
    *attention, training = rows
    forms = ["flash-attention-3", "flash-attention-3", "flex", "cudnn", "sdpa", "sdpa"]
    assert [row["row"].split()[1].strip(",") for row in attention] == forms
    assert training["row"] == "d2 bf16, ours"
    assert training["ms"] == 6.0  # of rows, forward and backward twice, and optimizer
    assert training["idle share"] == pytest.approx(1 - 2.5 / 6)
    assert training["MFU"] > 0 and "attention flash-attention-3" in training["kernels"]
