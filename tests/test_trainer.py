"""The one loop: killed, told to stop, diverging and resumed; and what it writes down."""

import gc
import itertools
import json
import math
import os
import random
import re
import shutil
import signal
import sys
import time

import pytest
import torch
from tiny_run import BASE, SKILLS, STEPS, losses, metrics, run, run_ranks, script, start_script, wait_for

from nanochat import checkpoint, device_batch, optim, recipe, trainer
from nanochat.compute import Compute, can_compile
from nanochat.dataloader import RowLoader
from nanochat.gpt import build_model
from nanochat.optim import MuonAdamW
from nanochat.recipe import TrainConfig
from nanochat.run import Run, RunLog
from nanochat.token_shards import TextRows
from nanochat.tokenizer import load_tokenizer

CPU = Compute(torch.device("cpu"), torch.float32)
STAGES = {
    "base": ("scripts.base_train", [*BASE, *STEPS]),
    "mid": ("scripts.mid_train", [*STEPS, *SKILLS]),
    "sft": ("scripts.chat_sft", [*STEPS, *SKILLS, "--eval-every", "5"]),
}


@pytest.fixture(autouse=True)
def fp32(monkeypatch):
    monkeypatch.setenv("NANOCHAT_DTYPE", "float32")


def train(*flags, stage="base"):
    module, common = STAGES[stage]
    return run(module, *common, *flags)


def record(stage, tag):
    return json.loads((checkpoint.get_base_dir() / "runs" / stage / tag / "run.json").read_text())


def make_model():
    model = build_model(recipe.model_config(2, 600, 64, 16, 16), CPU.device, train=True)
    model.init_weights(torch.Generator().manual_seed(0))
    return model


def train_here(steps=6, tag="t", model=None, **flags):
    """A run in this process, on the corpus."""
    tokenizer = load_tokenizer()
    model = model or make_model()
    config = TrainConfig(**{"compile": False, "eval_tokens": 512, "device_batch_size": 4, **flags})
    run = Run(
        stage="base",
        tag=tag,
        config=config,
        model=model,
        optimizer=MuonAdamW(model, config.learning_rates(dict.fromkeys(recipe.LEARNING_RATES, 0.03)), 0.1, CPU),
        tokenizer=tokenizer,
        compute=CPU,
        total_batch_size=512,
        num_iterations=steps,
        facts={"dataset": "corpus", "depth": 2},
    )
    trainer.train(run, TextRows("corpus", "train", tokenizer, 64), TextRows("corpus", "val", tokenizer, 64))


# --- killed and resumed


@pytest.mark.parametrize("stage", STAGES)
def test_killed_at_random_moments_and_resumed_to_the_bit(trained_world, stage):
    module, common = STAGES[stage]
    if stage == "sft":
        shutil.copytree(trained_world / "checkpoints" / "mid", trained_world / "checkpoints" / "sft")
    flags = [*common, "--num-iterations", "40", "--save-every", "5", "--grad-clip", "0.5", "--model-tag"]
    if stage == "base":
        flags = ["--dropout", "0.1", *flags]
    run(module, *flags, "whole")
    expected = losses(stage, "whole")
    assert list(expected) == list(range(1, 41))

    seed = random.randrange(10**6)
    print("seed of the moments:", seed)  # shown when the test fails
    rng = random.Random(seed)
    running = start_script(module, *flags, "killed")
    kills = 0
    for target in (7, 7 + rng.randrange(30)):
        wait_for(lambda at=target: max(losses(stage, "killed"), default=0) >= at, running)
        time.sleep(rng.random() * 0.05)
        os.kill(running.pid, signal.SIGKILL)
        kills += running.wait().code == -signal.SIGKILL
        running = start_script(module, *flags, "killed", "--resume")
        last = list(losses(stage, "killed"))
        wait_for(lambda now=running: "resumed" in now.written(), running)
        assert last, "metrics of before are kept"
    result = running.wait()
    assert result.code == 0, result
    assert kills, "it was not over before"
    assert losses(stage, "killed") == expected
    assert [line["val_bpb"] for line in metrics(stage, "killed") if "val_bpb" in line] == [
        line["val_bpb"] for line in metrics(stage, "whole") if "val_bpb" in line
    ]
    end = [checkpoint.read_meta(stage, tag, 40)["files"] for tag in ("whole", "killed")]
    assert end[0]["model.safetensors"] == end[1]["model.safetensors"]


def test_a_metrics_line_cut_short_by_a_kill(tiny_world):
    train("--num-iterations", "8", "--save-every", "4")
    expected = metrics("base", "d2")
    path = tiny_world / "runs" / "base" / "d2" / "metrics.jsonl"
    shutil.rmtree(tiny_world / "checkpoints" / "base" / "d2" / "step_000008")
    path.write_text(path.read_text()[:-200])
    train("--num-iterations", "8", "--save-every", "4", "--resume")
    assert [line["step"] for line in metrics("base", "d2")] == [line["step"] for line in expected]


def test_resuming_at_a_step_and_at_the_end(tiny_world):
    flags = ["--num-iterations", "10", "--save-every", "3", "--keep", "9"]
    train(*flags)
    expected = losses("base", "d2")
    result = train(*flags, "--resume", "6")
    assert "resumed base/d2 at step 6 of 10" in result.out
    assert losses("base", "d2") == expected
    assert train(*flags, "--resume").out.count("step ") <= 2, "nothing is left to do"
    assert losses("base", "d2") == expected


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_told_to_stop_it_saves_and_can_go_on(tiny_world, signum):
    module, common = STAGES["base"]
    flags = [*common, "--num-iterations", "60", "--eval-every", "0"]
    run(module, *flags, "--model-tag", "whole")
    running = start_script(module, *flags)
    wait_for(lambda: len(losses("base", "d2")) >= 5, running)
    os.kill(running.pid, signum)
    result = running.wait()
    assert result.code == 130, result
    assert "Traceback" not in result.err
    [step] = checkpoint.list_steps("base", "d2")
    assert 5 <= step < 60 and step == max(losses("base", "d2")), "the step in hand was finished and no more"
    run(module, *flags, "--resume")
    assert losses("base", "d2") == losses("base", "whole")


def test_a_second_signal_ends_at_once(tiny_world, monkeypatch):
    """The first one is held up by a checkpoint that takes for ever."""
    begun = []

    def slow(*arguments):
        begun.append(1)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(60)

    monkeypatch.setattr(checkpoint, "save", slow)
    train_interrupted(monkeypatch, at_forward=5)
    assert begun and checkpoint.list_steps("base", "t") == []


def train_interrupted(monkeypatch, at_forward, **flags):
    """Six steps of two micro-batches, with a signal in the middle of this forward pass."""
    model = make_model()
    forward = model.forward
    passes = itertools.count(1)

    def interrupted(*arguments, **options):
        loss = forward(*arguments, **options)
        if next(passes) == at_forward:
            os.kill(os.getpid(), signal.SIGINT)
            raise AssertionError("it goes on")
        return loss

    monkeypatch.setattr(model, "forward", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train_here(model=model, eval_every=0, **flags)


@pytest.mark.parametrize("at_forward, step", [(1, 0), (8, 3)])
def test_a_signal_in_the_middle_of_a_step_discards_it(tiny_world, monkeypatch, at_forward, step):
    train_here(tag="whole", eval_every=0)
    train_interrupted(monkeypatch, at_forward)
    assert checkpoint.list_steps("base", "t") == ([step] if step else [])
    assert list(losses("base", "t")) == list(range(1, step + 1))
    train_here(eval_every=0, resume="auto")
    assert losses("base", "t") == losses("base", "whole")


def test_a_signal_during_a_long_evaluation(tiny_world, monkeypatch):
    """torchrun kills 30 seconds after SIGTERM: the evaluation is given up, what was trained is saved."""
    model = make_model()
    forward = model.forward
    evaluated = []

    def slow(idx_BT, targets_BT, **options):
        if options["loss_reduction"] == "none":
            evaluated.append(len(idx_BT))
            if len(evaluated) == 2:
                os.kill(os.getpid(), signal.SIGTERM)
        return forward(idx_BT, targets_BT, **options)

    monkeypatch.setattr(model, "forward", slow)
    with pytest.raises(KeyboardInterrupt):
        train_here(model=model, eval_every=3, eval_tokens=10**6)
    assert len(evaluated) == 2, "of many batches"
    assert checkpoint.list_steps("base", "t") == [3]
    train_here(eval_every=3, eval_tokens=512, resume="newest")
    assert [line["step"] for line in metrics("base", "t") if "val_bpb" in line] == [3, 6], "it is made good"


def test_a_crash_in_evaluation_costs_nothing(tiny_world, monkeypatch):
    def crash(*arguments):
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="out of memory"):
        patch.setattr(trainer, "evaluate_loss", crash)
        train_here(eval_every=3)
    assert checkpoint.newest("base", "t")["step"] == 3
    train_here(eval_every=3, resume="newest")
    train_here(eval_every=3, tag="whole")
    assert losses("base", "t") == losses("base", "whole")
    evaluations = [
        [(line["step"], line["val_bpb"]) for line in metrics("base", tag) if "val_bpb" in line]
        for tag in ("t", "whole")
    ]
    assert evaluations[0] == evaluations[1], "the evaluation that crashed is made good"


@pytest.mark.parametrize("record", ["log", "checkpoint"])
def test_a_kill_at_either_record_of_an_evaluation(tiny_world, monkeypatch, record):
    """It is logged, and then noted in the checkpoint; a run that dies at either has it once in the end."""
    write = RunLog.write

    def killed_at_an_evaluation(log, line):
        if "val_bpb" in line:
            raise SystemExit
        write(log, line)

    def killed(*arguments):
        raise SystemExit

    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        if record == "log":
            patch.setattr(RunLog, "write", killed_at_an_evaluation)
        else:
            patch.setattr(checkpoint, "update_meta", killed)
        train_here(eval_every=3)
    train_here(eval_every=3, resume="newest")
    assert [line["step"] for line in metrics("base", "t") if "val_bpb" in line] == [3, 6]
    assert [line["step"] for line in metrics("base", "t") if "loss" in line] == [1, 2, 3, 4, 5, 6]


# --- divergence


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_loss_that_is_not_finite_stops_the_run(tiny_world, ranks):
    flags = [*STAGES["base"][1], "--num-iterations", "12", "--save-every", "1", "--keep", "4"]
    first = start_script("scripts.base_train", *flags)
    wait_for(lambda: len(losses("base", "d2")) >= 4, first)
    os.kill(first.pid, signal.SIGTERM)
    assert first.wait().code == 130
    good = checkpoint.newest("base", "d2")["step"]
    weights = (tiny_world / "checkpoints/base/d2" / f"step_{good:06d}" / "model.safetensors").read_bytes()
    broken = [*flags, "--matrix-lr", "1e30", "--embedding-lr", "1e30", "--resume"]
    for result in run_ranks(ranks, "scripts.base_train", *broken):
        line = result.error_line
        step = int(re.search(r"at step (\d+)", line)[1])
        assert re.search(rf"rows {8 * step} to {8 * step + 7}\b", line), line
    assert step > good
    assert f"--resume {good}" in line, "the way back leads past the checkpoint that is spoilt"
    assert weights == (tiny_world / "checkpoints/base/d2" / f"step_{good:06d}" / "model.safetensors").read_bytes(), (
        "earlier checkpoints stand"
    )
    run("scripts.base_train", *flags, "--resume", str(good))
    run("scripts.base_train", *flags, "--model-tag", "whole")
    assert losses("base", "d2") == losses("base", "whole")


def test_the_loss_is_read_when_the_update_is_under_way_and_still_spoils_no_checkpoint(tiny_world, monkeypatch):
    """Reading waits for a GPU: nothing may be read between the first forward pass and the end of the update."""
    model = make_model()
    forward, update, item = model.forward, MuonAdamW.step, torch.Tensor.item
    events = []

    def spoilt_forward(*arguments, **options):
        events.append("forward")
        loss = forward(*arguments, **options)
        return loss * math.nan if events.count("update") == 3 else loss

    def noted_update(self, *arguments, **options):
        events.append("update")
        return update(self, *arguments, **options)

    def noted_item(tensor):
        events.append("read")
        return item(tensor)

    monkeypatch.setattr(model, "forward", spoilt_forward)
    monkeypatch.setattr(MuonAdamW, "step", noted_update)
    monkeypatch.setattr(torch.Tensor, "item", noted_item)
    with pytest.raises(ValueError, match=r"loss is nan at step 3, rows 24 to 31 .* then --resume 2"):
        train_here(model=model, eval_every=0, save_every=1, keep=9)
    step = ["forward", "forward", "update", "read"]  # two micro-batches
    assert [event for event in events if event != "read"] == 4 * step[:3]
    assert "".join(event[0] for event in events).count("ffur") == 4
    assert not model.embed.weight.isfinite().all(), "the weights in memory are spoilt"
    assert checkpoint.list_steps("base", "t") == [1, 2, 3]
    for saved in (1, 2, 3):
        loaded, _, _ = checkpoint.load_model("base", "cpu", "t", saved)
        assert all(parameter.isfinite().all() for parameter in loaded.parameters())


def test_the_last_step_diverges(tiny_world):
    flags = ["--num-iterations", "1", "--matrix-lr", "1e30", "--embedding-lr", "1e30", "--unembedding-lr", "1e30"]
    line = script(STAGES["base"][0], *STAGES["base"][1], *flags).error_line
    assert "step 1" in line and "learning rate" in line
    for entry in metrics("base", "d2"):
        assert all(math.isfinite(value) for value in entry.values() if isinstance(value, float))


def test_weights_that_are_not_finite(trained_world):
    """Midtraining from a poisoned base model stops at its first step, before anything is saved."""
    from safetensors.torch import load_file, save_file

    folder = trained_world / "checkpoints/base/d2/step_000008"
    weights = load_file(folder / "model.safetensors")
    weights["embed.weight"][:, 0] = math.nan
    save_file(weights, folder / "model.safetensors")
    meta = json.loads((folder / "meta.json").read_text())
    meta["files"]["model.safetensors"] = checkpoint.sha256_file(folder / "model.safetensors")
    (folder / "meta.json").write_text(json.dumps(meta))
    result = script("scripts.mid_train", *STEPS, *SKILLS, "--num-iterations", "5", "--model-tag", "new")
    assert result.code == 2, result
    warning, error = result.err.splitlines()
    assert warning.startswith("warning: ") and "embed.weight" in warning
    assert "at step 0, rows 0 to 7" in error
    assert checkpoint.list_steps("mid", "new") == []


@pytest.mark.parametrize("where, call, saved", [("forward", 8, [2, 3]), ("update", 27, [2])])
def test_memory_that_runs_out_in_the_middle(tiny_world, monkeypatch, where, call, saved):
    """In the fourth step: the third is saved, unless the update has begun to change the weights."""
    model = make_model()
    owner, name = (model, "forward") if where == "forward" else (optim, "adamw_update")  # of which a step has 2, or 8
    function = getattr(owner, name)
    calls = itertools.count(1)

    def full(*arguments, **options):
        if next(calls) == call:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return function(*arguments, **options)

    train_here(tag="whole", eval_every=0)
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, full)
        with pytest.raises(ValueError, match=r"4 rows at once: try a smaller --device-batch-size.*--resume auto"):
            train_here(model=model, eval_every=0, save_every=2)
    assert checkpoint.list_steps("base", "t") == saved
    train_here(eval_every=0, resume="auto", device_batch_size=2)
    assert list(losses("base", "t").values()) == pytest.approx(list(losses("base", "whole").values()), rel=1e-5)


def test_no_search_for_garbage_between_steps(tiny_world, monkeypatch):
    searches = []
    monkeypatch.setattr(gc, "callbacks", [lambda phase, info: searches.append(phase)])
    states = []
    record_step = Run.record_step

    def noted(self, **line):
        states.append((gc.isenabled(), gc.get_freeze_count() > 1000))
        record_step(self, **line)

    monkeypatch.setattr(Run, "record_step", noted)
    train_here(8, eval_every=0)
    assert states == [(True, False)] * 3 + [(False, True)] * 5
    assert gc.isenabled() and gc.get_freeze_count() == 0, "as before"


# --- what is written


def test_every_line_of_the_metrics_has_its_keys(trained_world):
    train("--num-iterations", "6", "--eval-every", "3")
    train("--num-iterations", "6", "--eval-every", "3", stage="mid")
    for stage in ("base", "mid"):
        lines = metrics(stage, "d2")
        keys = {"step", "loss", "lr_mult", "tokens", "tok_per_sec", "mfu", "dt", "peak_mem_bytes", "epoch"}
        assert [line["step"] for line in lines] == [1, 2, 3, 3, 4, 5, 6, 6]
        for line in lines:
            assert line.keys() == (keys if "loss" in line else {"step", "val_bpb", "val_loss", "val_perplexity"})
        steps = [line for line in lines if "loss" in line]
        assert all(line["mfu"] is None for line in steps), "unknown on a CPU, not 0 %"
        assert all(10**7 < line["peak_mem_bytes"] < 10**11 for line in steps)


def test_the_record_of_a_run(tiny_world):
    train("--num-iterations", "4", "--seed", "7")
    run_json = record("base", "d2")
    assert run_json["config"]["seed"] == 7 and run_json["config"]["depth"] == 2
    assert (run_json["dataset"], run_json["num_iterations"], run_json["total_batch_size"]) == ("corpus", 4, 512)
    model, _, meta = checkpoint.load_model("base", "cpu")
    assert run_json["parameters"] == sum(p.numel() for p in model.parameters())
    assert run_json["model_config"] == meta["model_config"]
    assert run_json["val_bpb"] == metrics("base", "d2")[-1]["val_bpb"]
    assert (run_json["plan"]["rows"], run_json["plan"]["accumulation"]) == (8, 1)
    assert run_json["peak_mem_bytes"] > 10**7
    assert {"commit", "hardware", "versions", "date", "wall_seconds"} <= run_json.keys()


def test_both_clocks_of_a_run(tiny_world):
    """All training steps, and those after the tenth; both go on after a resume."""
    flags = ["--num-iterations", "14", "--save-every", "6", "--keep", "9"]
    train(*flags)
    for resume in ([], ["--resume", "12"]):
        train(*flags, *resume)
        seconds = [line["dt"] for line in metrics("base", "d2") if "loss" in line]
        assert len(seconds) == 14
        assert record("base", "d2")["wall_seconds"] == pytest.approx(sum(seconds))
        assert record("base", "d2")["steady_seconds"] == pytest.approx(sum(seconds[10:]))


@pytest.mark.parametrize(
    ("device", "flags", "expected"),
    [
        ("cpu", {}, 250),
        ("cuda", {}, 1000),
        ("cuda", {"eval_every": 300}, 1200),
        ("cuda", {"eval_every": 1500}, 1500),
        ("cuda", {"eval_every": 0}, 0),
        ("cuda", {"save_every": 10}, 10),
    ],
)
def test_checkpoints_are_rarer_on_a_gpu(device, flags, expected):
    compute = Compute(torch.device(device), torch.bfloat16)
    assert trainer.steps_between_checkpoints(TrainConfig(**flags), compute) == expected


def test_tokens_and_speed_under_accumulation(tiny_world):
    walls = {}
    for rows in (8, 2, 1):
        began = time.perf_counter()
        train_here(20, tag=f"b{rows}", device_batch_size=rows, eval_every=0)
        walls[rows] = time.perf_counter() - began
    for rows, wall in walls.items():
        steps = [line for line in metrics("base", f"b{rows}") if "loss" in line]
        assert [line["tokens"] for line in steps] == [512 * n for n in range(1, 21)]
        assert all(line["tok_per_sec"] * line["dt"] == pytest.approx(512) for line in steps)
        assert sum(line["dt"] for line in steps) < wall
        assert list(losses("base", f"b{rows}").values()) == pytest.approx(list(losses("base", "b8").values()), rel=1e-5)


def test_time_spent_waiting_for_rows_counts(tiny_world, monkeypatch):
    iterate = RowLoader.iterate

    def slow(self, start_step=0):
        for item in iterate(self, start_step):
            time.sleep(0.1)
            yield item

    monkeypatch.setattr(RowLoader, "iterate", slow)
    train_here(4, eval_every=0)
    assert all(line["dt"] > 0.1 for line in metrics("base", "t") if "loss" in line)


def test_the_learning_rate_is_the_recipes(tiny_world):
    """test_recipe.py holds each schedule to its closed form."""
    flags = {"schedule": "cosine", "warmup_steps": 3, "warmdown_ratio": 0.5, "final_lr_frac": 0.1}
    train_here(40, eval_every=0, **flags)
    lr = [line["lr_mult"] for line in metrics("base", "t") if "loss" in line]
    assert lr == [recipe.learning_rate_multiplier(step, 40, TrainConfig(**flags)) for step in range(40)]


def test_the_gradient_norm_is_torchs(tiny_world):
    model = make_model()
    batches = RowLoader(TextRows("corpus", "train", load_tokenizer(), 64), 8, 4, TrainConfig().seed).step(0)
    loss = model(torch.cat([x for x, _ in batches]), torch.cat([y for _, y in batches]))
    loss.backward()
    expected = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.25).item()
    train_here(1, grad_clip=0.25)
    [line] = [line for line in metrics("base", "t") if "loss" in line]
    assert line["grad_norm"] == pytest.approx(expected, rel=1e-4)
    assert line["loss"] == pytest.approx(loss.item(), rel=1e-5)


def test_dropout_is_used_in_training_only(tiny_world):
    still = ["--matrix-lr", "0", "--embedding-lr", "0", "--unembedding-lr", "0", "--scalar-lr", "0"]
    train("--num-iterations", "4", "--model-tag", "plain")
    for tag, rate in (("none", "0"), ("half", "0.5")):
        folder = checkpoint.checkpoint_dir("base", tag)
        shutil.copytree(checkpoint.checkpoint_dir("base", "plain"), folder)
        meta = json.loads((folder / "step_000004" / "meta.json").read_text())
        meta["model_config"]["dropout"], meta["num_iterations"] = float(rate), 6
        (folder / "step_000004" / "meta.json").write_text(json.dumps(meta | {"tag": tag}))
        train("--num-iterations", "6", "--dropout", rate, "--resume", *still, "--weight-decay", "0", "--model-tag", tag)
    none, half = losses("base", "none"), losses("base", "half")
    assert all(none[step] != half[step] for step in (5, 6))
    assert record("base", "none")["val_bpb"] == pytest.approx(record("base", "half")["val_bpb"], rel=1e-6)


def test_frozen_weights_score_the_same_each_time(tiny_world):
    still = ["--matrix-lr", "0", "--embedding-lr", "0", "--unembedding-lr", "0", "--scalar-lr", "0"]
    train("--num-iterations", "6", "--eval-every", "2", *still)
    scores = [line["val_bpb"] for line in metrics("base", "d2") if "val_bpb" in line]
    assert len(scores) == 3 and len(set(scores)) == 1
    assert len(set(losses("base", "d2").values())) == 6, "while the rows of training change"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_it_learns(tiny_world, monkeypatch, dtype):
    monkeypatch.setenv("NANOCHAT_DTYPE", dtype)
    # 512 tokens are few: the recipe's rates, which shrink with the batch, would need a longer run
    train("--num-iterations", "100", "--eval-every", "50", "--matrix-lr", "0.3", "--embedding-lr", "6")
    loss = list(losses("base", "d2").values())
    assert loss[0] == pytest.approx(math.log(600), abs=0.05), "at first every token is as likely"
    assert loss[-1] < loss[0] - 1.5
    first, last = (line["val_bpb"] for line in metrics("base", "d2") if "val_bpb" in line)
    assert last < first


# --- rows at once


def choose(share, model=None, compute=CPU, **flags):
    """The rows that a device takes at once of its share of a step."""
    return device_batch.choose_device_batch(model or make_model(), TrainConfig(**flags), compute, share)


@pytest.mark.parametrize(("share", "rows"), [(8, 8), (24, 24), (64, 32), (96, 32), (37, 1), (93, 31)])
def test_a_cpu_takes_the_largest_divisor_up_to_32(tiny_world, share, rows):
    batch = choose(share)
    assert (batch.rows, batch.accumulation, batch.recompute) == (rows, share // rows, False)


def test_a_given_number_of_rows_is_taken_as_it_is(tiny_world):
    for recompute in (None, True, False):
        model = make_model()
        batch = choose(24, model, device_batch_size=3, activation_checkpointing=recompute)
        assert (batch.rows, batch.accumulation, batch.recompute) == (3, 8, bool(recompute))


@pytest.mark.parametrize(
    ("fits", "fits_recomputing", "expected"),
    [
        (99, 99, (24, False)),
        (23, 99, (12, False)),
        (5, 99, (3, False)),
        (1, 99, (1, False)),
        (0, 99, (24, True)),
        (0, 6, (6, True)),
        (0, 0, None),
    ],
)
def test_on_a_gpu_rows_are_halved_until_they_fit_and_then_activations_recomputed(
    tiny_world, monkeypatch, fits, fits_recomputing, expected
):
    model, cuda = make_model(), Compute(torch.device("cuda"), torch.bfloat16)

    def attempt(model, compute, rows, recompute):
        return 1000 if rows <= (fits_recomputing if recompute else fits) else None

    monkeypatch.setattr(device_batch, "try_device_batch", attempt)
    if expected is None:
        with pytest.raises(ValueError, match="out of memory with 1 rows at once: try a smaller --device-batch-size"):
            choose(24, model, cuda)
        return
    batch = choose(24, model, cuda)
    assert (batch.rows, batch.recompute, batch.peak) == (*expected, 1000)


@pytest.mark.parametrize("given", [None, 16])
def test_all_ranks_take_the_rows_of_the_one_with_the_least_memory(tiny_world, monkeypatch, given):
    """A given --device-batch-size that does not fit is halved too: nobody watches a node's first step."""

    class BesideAFullGPU(Compute):
        """One of two ranks; the other has room for six rows."""

        def any_rank(self, flag):
            return flag or tried[-1] > 6

    tried = []

    def attempt(model, compute, rows, recompute):
        tried.append(rows)
        return 1000 if rows <= 12 else None

    monkeypatch.setattr(device_batch, "try_device_batch", attempt)
    compute = BesideAFullGPU(torch.device("cuda"), torch.bfloat16, rank=0, world_size=2)
    batch = choose(48, make_model(), compute, device_batch_size=given)
    assert (batch.rows, batch.recompute) == ((6, False) if given is None else (4, False))
    assert tried == ([48, 24, 12, 6] if given is None else [16, 8, 4])


def test_an_attempt_leaves_no_gradients_and_reports_running_out(tiny_world, monkeypatch):
    model = make_model()
    forward = model.forward

    def limited(idx_BT, targets_BT, **options):
        if len(idx_BT) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(idx_BT, targets_BT, **options)

    monkeypatch.setattr(model, "forward", limited)
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    assert device_batch.try_device_batch(model, CPU, 2, recompute=False) > 0
    assert device_batch.try_device_batch(model, CPU, 4, recompute=True) is None
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_recomputation_changes_no_bit(dropout):
    idx_BT = torch.randint(0, 600, (2, 65), generator=torch.Generator().manual_seed(3))
    results = []
    for recompute in (False, True):
        model = build_model(recipe.model_config(2, 600, 64, 16, 16, dropout=dropout), CPU.device, train=True)
        model.init_weights(torch.Generator().manual_seed(0))
        for block in model.blocks:  # zero projections would hide what comes before them
            torch.nn.init.normal_(block.attn.out.weight, std=0.02, generator=torch.Generator().manual_seed(1))
            torch.nn.init.normal_(block.mlp.down.weight, std=0.02, generator=torch.Generator().manual_seed(2))
        torch.manual_seed(5)
        loss = model(idx_BT[:, :-1], idx_BT[:, 1:], recompute=recompute)
        loss.backward()
        results.append([loss.detach(), *(p.grad for p in model.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_what_a_run_says_of_its_size_time_and_cost(tiny_world):
    flags = [*STAGES["base"][1], "--num-iterations", "20", "--price", "3600", "--device-batch-size", "4"]
    out = run("scripts.base_train", *flags).out
    model = make_model()
    parameters = sum(p.numel() for p in model.parameters())
    assert f"base d2: {parameters:,} parameters" in out
    assert f"{model.flops_per_token() / 1e6:,.1f} MFLOPs per token" in out
    assert "20 steps of 512 tokens = 10,240" in out and "2 x 4 rows per step and device" in out
    minutes, dollars = re.search(r"about ([\d.]+) min and \$([\d.,]+) left at the speed", out).groups()
    assert float(dollars) == pytest.approx(60 * float(minutes), abs=3.1)
    seconds = [line["dt"] for line in metrics("base", "d2") if "loss" in line]
    assert float(dollars) == pytest.approx(10 * sum(seconds[5:10]) / 5, rel=0.05, abs=0.02)


def test_on_a_terminal_a_step_overwrites_the_line_before(tiny_world, monkeypatch, capsys):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "60")
    train_here(120, eval_every=0, save_every=200)
    out = capsys.readouterr().out
    shown = re.findall(r"step +(\d+)/120[^\r\n]*(\r|\n)", out)
    assert [int(step) for step, _ in shown] == list(range(1, 121))
    kept = [int(step) for step, end in shown if end == "\n"]
    assert kept == [1, 2, 3, *range(4, 121, 2)], "as in a file"
    live = [line for line in re.split(r"[\r\n]", out) if re.match(r"step +\d*[13579]/", line)][2:]
    assert all(len(line.removesuffix("\x1b[K")) < 60 for line in live), "a line that wraps could not be overwritten"


def test_ranks_take_the_same_rows(tiny_world):
    flags = [*STAGES["base"][1], "--num-iterations", "3", "--device-batch-size", "auto"]
    first, second = run_ranks(2, "scripts.base_train", *flags)
    assert (first.code, second.code) == (0, 0), (first, second)
    assert "2 x cpu" in first.out and "1 x 4 rows" in first.out
    assert "rows per step" not in second.out, "the first rank speaks for all"


# --- how it is told what to do


def test_a_config_file_is_the_same_as_flags(tiny_world):
    settings = "num-iterations: 5\nmatrix_lr: 0.1\ngrad-clip: 1\nschedule: cosine\nmodel-tag: file\neval-every: 0\n"
    (tiny_world / "run.yaml").write_text(settings)
    train("--config", str(tiny_world / "run.yaml"))
    flags = ["--num-iterations", "5", "--matrix-lr", "0.1", "--grad-clip", "1", "--schedule", "cosine"]
    train(*flags, "--eval-every", "0", "--model-tag", "flags")
    assert losses("base", "file") == losses("base", "flags")
    one, other = record("base", "file")["config"], record("base", "flags")["config"]
    assert one | {"model_tag": None} == other | {"model_tag": None}
    train("--config", str(tiny_world / "run.yaml"), "--num-iterations", "3", "--model-tag", "both")
    assert list(losses("base", "both")) == [1, 2, 3], "the command line wins"
    assert record("base", "both")["config"]["matrix_lr"] == 0.1


def test_wandb_offline(tiny_world):
    pytest.importorskip("wandb")
    result = run(
        *["scripts.base_train", *STAGES["base"][1], "--num-iterations", "3", "--run", "trial"], WANDB_MODE="offline"
    )
    assert "step 3" in result.out
    [file] = (tiny_world / "runs" / "base" / "d2").rglob("offline-run-*/*.wandb")
    assert file.stat().st_size > 100
    assert list(losses("base", "d2")) == [1, 2, 3]


def test_kernels_are_compiled_where_there_is_a_compiler(tmp_path, monkeypatch):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    cpu = torch.device("cpu")
    assert not can_compile(cpu)
    compiler = tmp_path / "my-c++"
    compiler.write_text("#!/bin/sh\n")
    compiler.chmod(0o755)
    assert not can_compile(cpu)
    monkeypatch.setenv("CXX", "my-c++")
    assert can_compile(cpu)
    assert can_compile(torch.device("cuda")) and not can_compile(torch.device("mps"))
