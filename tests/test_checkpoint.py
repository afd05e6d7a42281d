"""Checkpoints survive kills, full disks, damage and mistakes: each test looks at the files and loads them again."""

import copy
import dataclasses
import functools
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading

import pytest
import tiny_run
import torch
from tiny_run import BASE, STEPS, losses, run, script

from nanochat import checkpoint, recipe
from nanochat.compute import Compute
from nanochat.gpt import build_model
from nanochat.optim import MuonAdamW
from nanochat.tokenizer import Tokenizer, load_tokenizer

CPU = Compute(torch.device("cpu"), torch.float32)
CONFIG = recipe.model_config(2, 600, 64, 16, 16)


@functools.cache
def make(seed=0, steps=2):
    """A model and its optimizer after a few real steps."""
    model = build_model(CONFIG, CPU.device, train=True)
    model.init_weights(torch.Generator().manual_seed(seed))
    optimizer = MuonAdamW(model, recipe.LEARNING_RATES, 0.1, CPU)
    idx_BT = torch.randint(0, 600, (4, 65), generator=torch.Generator().manual_seed(seed))
    for step in range(steps):
        model(idx_BT[:, :-1], idx_BT[:, 1:]).backward()
        optimizer.step(step)
    return model, optimizer


def save(step, seed=0, tag="t", **meta):
    model, optimizer = make(seed)
    about = {"model_config": dataclasses.asdict(CONFIG), "tokenizer_hash": load_tokenizer().hash, "val_bpb": None}
    checkpoint.save("base", tag, step, model, optimizer.state_dict(), {**about, **meta}, CPU)
    return model, optimizer


def load_optimizer(step, optimizer):
    optimizer.load_state_dicts(checkpoint.load_optimizer_shares("base", "t", step, CPU.device))


def folder(step, tag="t"):
    return checkpoint.checkpoint_dir("base", tag) / f"step_{step:06d}"


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(autouse=True)
def fp32(tiny_world, monkeypatch):
    monkeypatch.setenv("NANOCHAT_DTYPE", "float32")


def test_what_is_saved_comes_back(tiny_world):
    model, optimizer = save(7, val_bpb=1.5)
    loaded, tokenizer, meta = checkpoint.load_model("base", "cpu")
    assert same(loaded.state_dict(), model.state_dict())
    assert not loaded.training and tokenizer.hash == load_tokenizer().hash
    assert (meta["stage"], meta["tag"], meta["step"], meta["val_bpb"]) == ("base", "t", 7, 1.5)
    other = make.__wrapped__(seed=1)[1]
    load_optimizer(7, other)
    assert same(other.state_dict(), optimizer.state_dict())
    names = {path.name for path in folder(7).iterdir()}
    assert names == {"model.safetensors", "optim.000.safetensors", "meta.json"}
    assert meta["files"].keys() == names - {"meta.json"}


def test_newest_run_and_step_are_taken_unless_named(tiny_world):
    for tag, step in (("old", 3), ("old", 12), ("new", 5)):
        save(step, tag=tag)
        os.utime(folder(step, tag) / "meta.json", ns=(0, 10**9 * (step if tag == "old" else 100)))
    assert checkpoint.load_model("base", "cpu")[2]["tag"] == "new"
    assert checkpoint.load_model("base", "cpu", "old")[2]["step"] == 12
    assert checkpoint.load_model("base", "cpu", "old", 3)[2]["step"] == 3
    with pytest.raises(ValueError, match=r"step_000004: steps there are 3, 12"):
        checkpoint.load_model("base", "cpu", "old", 4)


@pytest.mark.parametrize("world_size", [2, 3])
def test_each_rank_hashes_what_it_has_written(tiny_world, monkeypatch, world_size):
    """On a node one rank alone would need longer for all files than torchrun waits. Here the ranks are threads."""
    barrier = threading.Barrier(world_size)
    told = {}
    hashed = []

    class Rank(Compute):
        def gather(self, value):
            told[self.rank] = value
            barrier.wait()
            values = [told[rank] for rank in range(world_size)]
            barrier.wait()
            return values

        def any_rank(self, flag):
            return any(self.gather(flag))

    def sha256_file(path):
        hashed.append((threading.current_thread().name, path.name))
        return real(path)

    real = checkpoint.sha256_file
    monkeypatch.setattr(checkpoint, "sha256_file", sha256_file)
    model, optimizer = make()
    meta = {"model_config": dataclasses.asdict(CONFIG), "tokenizer_hash": load_tokenizer().hash}

    def save_share(rank):
        compute = Rank(CPU.device, CPU.dtype, rank, world_size)
        checkpoint.save("base", "t", 4, model, optimizer.state_dict(), meta, compute)

    threads = [threading.Thread(target=save_share, args=(rank,), name=f"{rank}") for rank in range(world_size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    own = [(f"{rank}", f"optim.{rank:03d}.safetensors") for rank in range(world_size)]
    assert sorted(hashed) == sorted([("0", "model.safetensors"), *own])
    assert checkpoint.read_meta("base", "t", 4)["files"].keys() == {name for _, name in hashed}


# --- kills


def save_and_die(step, fsyncs):
    """Save, and be killed at one of the calls that make files durable."""
    real, count = os.fsync, iter(range(fsyncs, -1, -1))

    def fsync(fd):
        if next(count) == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        real(fd)

    os.fsync = fsync
    save(step, seed=2)


def test_killed_at_any_moment_of_saving(tiny_world):
    first, _ = save(1)
    outcomes = []
    for fsyncs in range(20):
        result = tiny_run.start(save_and_die, 2, fsyncs).wait()
        assert result.code in (0, -signal.SIGKILL), result
        outcomes.append(checkpoint.list_steps("base", "t"))
        whole = checkpoint.newest("base", "t")["step"]
        assert whole == outcomes[-1][-1], "what has its final name is whole"
        assert same(checkpoint.load_model("base", "cpu", "t", 1)[0].state_dict(), first.state_dict())
        if result.code == 0:
            break
        shutil.rmtree(folder(2), ignore_errors=True)
    assert len(outcomes) > 4, "there were moments to be killed at"
    assert outcomes[0] == [1] and outcomes[-1] == [1, 2]
    assert sorted(path.name for path in folder(1).parent.iterdir()) == ["step_000001", "step_000002"], "no rest is left"


def test_killed_while_a_step_is_saved_again(tiny_world):
    """A run that went on from step 1 comes to step 2 again, which an earlier attempt has saved."""
    save(1)
    save(2)
    for fsyncs in range(20):
        code = tiny_run.start(save_and_die, 2, fsyncs).wait().code
        assert checkpoint.list_steps("base", "t") == [1, 2]
        assert checkpoint.newest("base", "t")["step"] == 2
        if code == 0:
            break
    assert code == 0, "a rest of an earlier kill is no obstacle"


def test_a_kill_while_old_checkpoints_are_deleted_leaves_no_half_one(tiny_world, monkeypatch):
    """Found by dev/crash_test.py: meta.json was still there, the optimizer's state was not."""
    for step in (1, 2, 3):
        save(step)
    whole = shutil.rmtree

    def killed(path, **options):
        if not options:
            (path / "optim.000.safetensors").unlink(missing_ok=True)
            raise KeyboardInterrupt
        whole(path, **options)

    for _ in range(2):  # the second time a rest is in the way
        monkeypatch.setattr(shutil, "rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            checkpoint.prune("base", "t", 1)
        for step in checkpoint.list_steps("base", "t"):
            checkpoint.load_model("base", "cpu", "t", step)
            load_optimizer(step, make()[1])
        monkeypatch.undo()
        monkeypatch.setenv("NANOCHAT_DTYPE", "float32")
        monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tiny_world))
        save(1)
        save(3)
    checkpoint.prune("base", "t", 1)
    assert [path.name for path in folder(1).parent.iterdir()] == ["step_000003"]


def test_leftovers_of_a_kill_are_no_checkpoints(tiny_world):
    for step in (1, 2, 3):
        save(step)
    for name in (".writing_step_000004", ".replaced_step_000001", "old_step_000009"):
        shutil.copytree(folder(1), folder(1).parent / name)
    assert checkpoint.list_steps("base", "t") == [1, 2, 3]
    checkpoint.prune("base", "t", 1)
    assert checkpoint.list_steps("base", "t") == [3]


# --- damage


def cut(path):
    path.write_bytes(path.read_bytes()[:-100])


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("damage", [cut, flip, os.remove])
@pytest.mark.parametrize("name", ["model.safetensors", "optim.000.safetensors"])
def test_a_damaged_file_is_named_and_the_step_skipped(tiny_world, name, damage, capsys):
    save(1)
    save(2)
    damage(folder(2) / name)
    with pytest.raises(ValueError, match=rf"step_000002/{name} is missing or damaged: delete .*use an earlier step"):
        checkpoint.load_model("base", "cpu", "t", 2)
    assert checkpoint.load_model("base", "cpu")[2]["step"] == 1
    assert name in capsys.readouterr().out, "skipping is said"
    damage(folder(1) / name)
    with pytest.raises(ValueError, match="no whole checkpoint"):
        checkpoint.load_model("base", "cpu")


@pytest.mark.parametrize("content", ["", "{", "{}", "[]", '{"files": 3}', "\x80"])
def test_a_damaged_meta_json_is_named_and_the_step_skipped(tiny_world, content):
    save(1)
    save(2)
    (folder(2) / "meta.json").write_text(content, encoding="latin-1")
    with pytest.raises(ValueError, match=r"step_000002/meta\.json"):
        checkpoint.load_model("base", "cpu", "t", 2)
    assert checkpoint.load_model("base", "cpu")[2]["step"] == 1
    assert checkpoint.newest("base", "t")["step"] == 1
    checkpoint.prune("base", "t", 1)


def test_weights_that_are_not_finite_are_said(tiny_world, capsys):
    model, _ = save(1)
    checkpoint.load_model("base", "cpu", "t")
    assert capsys.readouterr().err == ""
    meta = {"model_config": dataclasses.asdict(CONFIG), "tokenizer_hash": load_tokenizer().hash}
    diverged = copy.deepcopy(model)
    with torch.no_grad():
        diverged.blocks[1].mlp.up.weight[3, 3] = float("nan")
    checkpoint.save("base", "t", 2, diverged, None, meta, CPU)
    for train in (False, True):
        checkpoint.load_model("base", "cpu", "t", train=train)
        err = capsys.readouterr().err
        assert err.count("\n") == 1 and "blocks.1.mlp.up.weight" in err and "step_000002" in err


def test_another_tokenizer(tiny_world):
    save(1)
    old = load_tokenizer().hash
    new = Tokenizer.train_from_iterator(["other text"] * 9, 270)
    new.save(tiny_world / "tokenizer")
    assert load_tokenizer().hash == new.hash
    assert checkpoint.load_model("base", "cpu")[1].hash == old, "what a model was trained with is kept"
    (tiny_world / "tokenizer" / f"{old[:12]}.json").rename(tiny_world / "elsewhere.json")
    with pytest.raises(ValueError, match=f"base/t was trained with tokenizer {old[:12]}.*back as tokenizer.json"):
        checkpoint.load_model("base", "cpu")


@pytest.mark.parametrize(
    ("stage", "remedy"), [("base", "scripts.base_train"), ("mid", "scripts.mid_train"), ("sft", "scripts.chat_sft")]
)
def test_a_missing_stage_says_what_to_run(tiny_world, stage, remedy):
    with pytest.raises(ValueError, match=f"no '{stage}' checkpoint.*{remedy} first"):
        checkpoint.load_model(stage, "cpu")


def test_a_checkpoint_of_another_shape_does_not_load(tiny_world):
    save(1)
    other = build_model(recipe.model_config(3, 600, 64, 16, 16), CPU.device, train=True)
    with pytest.raises(ValueError, match=r"step_000001/model\.safetensors does not fit"):
        checkpoint.load_weights("base", "t", 1, other)
    with pytest.raises(ValueError, match="optimizer state"):
        load_optimizer(1, MuonAdamW(other, recipe.LEARNING_RATES, 0.1, CPU))


# --- which are kept


@pytest.mark.parametrize(
    ("losses", "keep", "left"),
    [
        ([3, 2, 1, 4, 5], 2, [3, 4, 5]),
        ([3, 2, 1], 1, [3]),
        ([1, 2, 3], 1, [1, 3]),
        ([3, None, None], 1, [1, 3]),
        ([None, None, None], 2, [2, 3]),
        ([1], 3, [1]),
        ([2, 2, 2], 1, [1, 3]),
    ],
)
def test_the_newest_and_the_best_are_kept(tiny_world, losses, keep, left):
    for step, loss in enumerate(losses, 1):
        save(step, val_bpb=loss)
    checkpoint.prune("base", "t", keep)
    assert checkpoint.list_steps("base", "t") == left


def test_training_keeps_the_newest_and_the_best(tiny_world):
    every = ["--num-iterations", "10", "--save-every", "2", "--eval-every", "4", "--keep", "2"]
    run("scripts.base_train", *BASE, *STEPS, *every)
    steps = checkpoint.list_steps("base", "d2")
    scores = {line["step"]: line["val_bpb"] for line in tiny_run.metrics("base", "d2") if "val_bpb" in line}
    assert list(scores) == [4, 8, 10]
    assert steps == sorted({8, 10, min(scores, key=scores.get)})
    for step in steps:
        assert checkpoint.read_meta("base", "d2", step)["val_bpb"] == scores[step]


def test_training_that_never_evaluates_keeps_no_more(tiny_world):
    result = tiny_run.start_script(
        "scripts.base_train", *BASE, *STEPS, "--num-iterations", "3000", "--save-every", "2", "--eval-every", "0"
    )
    tiny_run.wait_for(lambda: len(losses("base", "d2")) > 14, result)
    result.process.kill()
    result.wait()
    assert len(checkpoint.list_steps("base", "d2")) <= 3


def test_a_run_of_the_same_name_is_set_aside(tiny_world):
    def train(steps):
        return run("scripts.base_train", *BASE, *STEPS, "--num-iterations", str(steps))

    for steps in (3, 4, 5):
        out = train(steps).out
    assert "kept as" in out
    assert [checkpoint.list_steps("base", tag) for tag in ("d2~1", "d2~2", "d2")] == [[3], [4], [5]]
    for tag, steps in (("d2~1", 3), ("d2~2", 4), ("d2", 5)):
        assert list(losses("base", tag)) == list(range(1, steps + 1))
    os.utime(checkpoint.checkpoint_dir("base", "d2~1") / "step_000003" / "meta.json")
    assert checkpoint.load_model("base", "cpu")[2]["step"] == 5, "what was set aside is not the newest run"


# --- full disks


def train_with_limit(step, limit, module, argv):
    """Run a script, with no room for a file above `limit` bytes from the saving of `step` on."""
    real, (before, most) = checkpoint.save, resource.getrlimit(resource.RLIMIT_FSIZE)

    def save(stage, tag, at, *rest):
        if at == step:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, most))
        real(stage, tag, at, *rest)

    checkpoint.save = save
    try:
        tiny_run._run_module(module, argv)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (before, most))  # what measures coverage writes at the very end


@pytest.mark.parametrize("limit", [100_000, 400_000, 1000], ids=["model", "optimizer", "meta"])
def test_no_room_for_a_file_of_the_second_checkpoint(tiny_world, limit):
    every = [*BASE, *STEPS, "--num-iterations", "10", "--save-every", "4"]
    run("scripts.base_train", *every, "--model-tag", "whole")
    if limit == 400_000:
        small, middle, large = sorted(path.stat().st_size for path in folder(10, "whole").iterdir())
        assert small < 100_000 < middle < limit < large
    result = tiny_run.start(train_with_limit, 8, limit, "scripts.base_train", every).wait()
    assert "step_000008 could not be written" in result.error_line
    assert "free space, then --resume" in result.error_line
    assert checkpoint.list_steps("base", "d2") == [4]
    assert [path.name for path in checkpoint.checkpoint_dir("base", "d2").iterdir()] == ["step_000004"], "no rest"
    run("scripts.base_train", *every, "--resume")
    assert losses("base", "d2") == losses("base", "whole")


@pytest.fixture
def small_disk(tiny_world):
    """The base directory on a file system of its own, whose size may be set."""

    def resize(size, option="remount,"):
        command = ["mount", "-t", "tmpfs", "-o", f"{option}size={size}", "tmpfs", str(tiny_world)]
        return subprocess.run(command, capture_output=True).returncode == 0

    inside = tiny_world.with_name("inside")
    shutil.copytree(tiny_world, inside)
    if sys.platform != "linux" or os.geteuid() or not resize(10**9, ""):
        pytest.skip("a small file system needs root and mount")
    try:
        shutil.copytree(inside, tiny_world, dirs_exist_ok=True)
        yield resize
    finally:
        subprocess.run(["umount", "-l", str(tiny_world)], check=True)


def test_a_disk_that_fills_up(small_disk):
    every = [*BASE, *STEPS, "--num-iterations", "10", "--save-every", "4"]
    run("scripts.base_train", *every, "--model-tag", "whole")
    expected = losses("base", "whole")
    base = checkpoint.checkpoint_dir("base", "whole").parent
    one = sum(path.stat().st_size for path in (base / "whole" / "step_000010").iterdir())
    shutil.rmtree(base / "whole")
    used = sum(path.stat().st_size for path in base.parent.parent.rglob("*") if path.is_file())
    assert small_disk(used + one * 3 // 2 + 200_000)
    result = script("scripts.base_train", *every)
    assert "step_000008 could not be written" in result.error_line
    assert "No space left" in result.error_line
    assert checkpoint.newest("base", "d2")["step"] == 4
    assert small_disk(10**9)
    run("scripts.base_train", *every, "--resume")
    assert losses("base", "d2") == expected
    assert json.loads((folder(10, "d2") / "meta.json").read_text())["step"] == 10
