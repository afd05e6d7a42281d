"""Several processes on this CPU (gloo on 127.0.0.1) do what one does: the same losses, one log, one share each."""

import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
from safetensors.torch import load_file
from tiny_run import BASE, SKILLS, STEPS, losses, metrics, run, run_ranks

from nanochat import checkpoint

ROOT = Path(__file__).resolve().parent.parent
FLAGS = [*BASE, *STEPS, "--num-iterations", "20", "--eval-every", "10"]


def train(ranks, tag, *flags):
    results = run_ranks(ranks, "scripts.base_train", *FLAGS, "--model-tag", tag, *flags)
    for rank, result in enumerate(results):
        assert result.code == 0, f"rank {rank}\n{result.out}\n{result.err}"
    return results


def difference(one, other, stage="base"):
    """The largest of two runs' losses, step by step, and of their validation scores."""
    a, b = losses(stage, one), losses(stage, other)
    assert a.keys() == b.keys() and a
    scores = [[line["val_bpb"] for line in metrics(stage, tag) if "val_bpb" in line] for tag in (one, other)]
    assert len(scores[0]) == len(scores[1]) > 0
    return max(abs(x - y) for x, y in [*((a[step], b[step]) for step in a), *zip(*scores)])


@pytest.fixture(autouse=True)
def fp32(monkeypatch):
    monkeypatch.setenv("NANOCHAT_DTYPE", "float32")


# With bf16 the same micro-batches, here of one row, must make the gradients: those of others are rounded otherwise.
@pytest.mark.parametrize(("dtype", "flags"), [("float32", []), ("bfloat16", ["--device-batch-size", "1"])])
def test_one_two_and_four_ranks_reach_the_same_losses(tiny_world, monkeypatch, dtype, flags):
    monkeypatch.setenv("NANOCHAT_DTYPE", dtype)
    for ranks in (1, 2, 4):
        results = train(ranks, f"r{ranks}", *flags)
        assert not any(re.search("^(step|d2:)", result.out, re.M) for result in results[1:]), "one rank speaks"
        assert all("Warning" not in result.err for result in results)
        lines = Counter(re.findall(r"step +(\d+)/20", results[0].out))
        assert lines and set(lines.values()) == {1}
        shares = sorted(
            path.name for path in (checkpoint.checkpoint_dir("base", f"r{ranks}") / "step_000020").glob("optim*")
        )
        assert shares == [f"optim.{rank:03d}.safetensors" for rank in range(ranks)]
    for ranks in (2, 4):
        found = difference("r1", f"r{ranks}")
        print(f"{dtype}, {ranks} ranks: largest difference {found:.1e}")
        assert found < 1e-4


def test_accumulation_is_another_division_of_the_same_rows(tiny_world):
    train(1, "one", "--device-batch-size", "2")
    train(2, "two", "--device-batch-size", "2")
    train(4, "four", "--device-batch-size", "2")
    assert max(difference("one", "two"), difference("one", "four")) < 1e-4


def test_shares_of_two_ranks_make_one_whole(tiny_world):
    """Each rank holds half the state of what is sharded, and nothing is held twice that need not be."""
    train(1, "one")
    train(2, "two")
    folder = checkpoint.checkpoint_dir("base", "two") / "step_000020"
    halves = [load_file(folder / f"optim.{rank:03d}.safetensors") for rank in (0, 1)]
    whole = load_file(checkpoint.checkpoint_dir("base", "one") / "step_000020" / "optim.000.safetensors")
    elements = sum(value.numel() for value in whole.values())
    assert halves[0].keys() == whole.keys() > halves[1].keys()
    for half in halves:
        assert sum(value.numel() for value in half.values()) < 0.6 * elements


@pytest.mark.parametrize(("before", "after"), [(2, 1), (2, 4), (1, 2), (4, 2)])
def test_resumed_on_another_number_of_ranks(tiny_world, before, after):
    train(before, "whole")
    train(before, "moved")
    folder = checkpoint.checkpoint_dir("base", "moved")
    assert checkpoint.list_steps("base", "moved") == [10, 20]
    train(after, "moved", "--resume", "10")
    assert difference("whole", "moved") < 1e-4
    assert len(list((folder / "step_000020").glob("optim*"))) == after, "no share of the former ranks is left"


def test_finetuning_on_two_ranks(trained_world):
    flags = [*STEPS, *SKILLS, "--num-iterations", "10", "--model-tag"]
    run("scripts.mid_train", *flags, "one")
    for result in run_ranks(2, "scripts.mid_train", *flags, "two"):
        assert result.code == 0, result
    assert difference("one", "two", "mid") < 1e-4


def torchrun(ranks, *argv):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}", *argv]
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_under_torchrun_itself(tiny_world):
    train(1, "one")
    process = torchrun(2, "-m", "scripts.base_train", *FLAGS, "--model-tag", "two")
    out, err = process.communicate(timeout=240)
    assert process.returncode == 0, err
    assert difference("one", "two") < 1e-4
    assert out.count("step 20: val_bpb") == 1


def test_torchrun_told_to_stop_saves(tiny_world):
    flags = [*BASE, *STEPS, "--num-iterations", "4000", "--eval-every", "0"]
    process = torchrun(2, "-m", "scripts.base_train", *flags)
    try:
        deadline = time.monotonic() + 120
        while len(metrics("base", "d2")) < 5:
            assert process.poll() is None and time.monotonic() < deadline, process.communicate()
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=60)
    finally:
        process.kill()
    step = checkpoint.newest_whole("base", "d2")
    assert step == max(losses("base", "d2")) < 4000
    assert len(list((checkpoint.checkpoint_dir("base", "d2") / f"step_{step:06d}").glob("optim*"))) == 2
