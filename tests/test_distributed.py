"""Several processes on this CPU (gloo on 127.0.0.1) do what one does: the same losses, one log, one share each."""

import os
import re
import shutil
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
from nanochat.common import get_base_dir

ROOT = Path(__file__).resolve().parent.parent
FLAGS = [*BASE, *STEPS, "--num-iterations", "20", "--eval-every", "10"]


@pytest.fixture(autouse=True)
def fp32(monkeypatch):
    monkeypatch.setenv("NANOCHAT_DTYPE", "float32")


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


@pytest.fixture(scope="module")
def runs(module_world):
    """{number of ranks: what each of them printed} of the runs r1, r2 and r4, with checkpoints at steps 10 and 20."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NANOCHAT_DTYPE", "float32")
        return {ranks: train(ranks, f"r{ranks}") for ranks in (1, 2, 4)}


def shares(tag, step=20):
    return sorted((checkpoint.checkpoint_dir("base", tag) / f"step_{step:06d}").glob("optim*"))


@pytest.mark.parametrize("ranks", [2, 4])
def test_several_ranks_reach_the_losses_of_one(runs, ranks):
    assert difference("r1", f"r{ranks}") < 1e-4


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_one_rank_speaks_and_each_saves_its_share(runs, ranks):
    first, *others = runs[ranks]
    assert not any(re.search("^(step|d2:)", result.out, re.M) for result in others)
    assert all("Warning" not in result.err for result in runs[ranks])
    lines = Counter(re.findall(r"step +(\d+)/20", first.out))
    assert lines and set(lines.values()) == {1}
    assert [path.name for path in shares(f"r{ranks}")] == [f"optim.{rank:03d}.safetensors" for rank in range(ranks)]


def test_shares_of_two_ranks_make_one_whole(runs):
    """Each rank holds half the state of what is sharded, and nothing is held twice that need not be."""
    halves = [load_file(path) for path in shares("r2")]
    whole = load_file(shares("r1")[0])
    elements = sum(value.numel() for value in whole.values())
    assert halves[0].keys() == whole.keys() > halves[1].keys()
    for half in halves:
        assert sum(value.numel() for value in half.values()) < 0.6 * elements


@pytest.mark.parametrize("ranks", [1, 2])
def test_accumulation_is_another_division_of_the_same_rows(runs, ranks):
    train(ranks, f"accumulated{ranks}", "--device-batch-size", "2")
    assert difference("r1", f"accumulated{ranks}") < 1e-4


@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 4), (4, 2)])
def test_resumed_on_another_number_of_ranks(runs, before, after):
    tag = f"from{before}to{after}"
    for folder in ("checkpoints", "runs"):
        shutil.copytree(get_base_dir() / folder / "base" / f"r{before}", get_base_dir() / folder / "base" / tag)
    train(after, tag, "--resume", "10")
    assert difference(f"r{before}", tag) < 1e-4
    assert len(shares(tag)) == after, "no share of the former ranks is left"


def test_finetuning_on_two_ranks(trained_world):
    flags = [*STEPS, *SKILLS, "--num-iterations", "10", "--model-tag"]
    run("scripts.mid_train", *flags, "one")
    for result in run_ranks(2, "scripts.mid_train", *flags, "two"):
        assert result.code == 0, result
    assert difference("one", "two", "mid") < 1e-4


# --- under torchrun itself


def torchrun(ranks, *argv):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    return subprocess.Popen(
        [*command, "-m", "scripts.base_train", *argv],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for(job, condition, seconds=120):
    """Wait until `condition()` holds while `job` runs."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert job.poll() is None and time.monotonic() < deadline, job.communicate()
        time.sleep(0.02)


def test_torchrun_told_to_stop_saves(tiny_world):
    """Each in the middle of a step of four micro-batches, which both discard."""
    job = torchrun(2, *BASE, *STEPS, "--num-iterations", "4000", "--eval-every", "0", "--device-batch-size", "1")
    try:
        wait_for(job, lambda: len(metrics("base", "d2")) >= 5)
        job.send_signal(signal.SIGTERM)
        job.communicate(timeout=60)
    finally:
        job.kill()
    step = checkpoint.newest("base", "d2")["step"]
    assert step == max(losses("base", "d2")) < 4000
    assert len(shares("d2", step)) == 2
