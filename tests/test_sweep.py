"""Sweeps: the points of a space, the statistics over seeds, and a real sweep that is interrupted and goes on."""

import csv
import json
import math
import os
import signal

import numpy as np
import pytest
import tiny_run
from hypothesis import given, settings
from hypothesis import strategies as st

from dev.runner import Runner, plan, read_metrics, split_argv, to_argv
from dev.sweep import parse_space, points_of, summarize, summary_table, write_results

LONG = ["--no-compile", "--total-batch-size=512", "--eval-tokens=1024", "--sample-every=0", "--num-iterations=30"]


def test_grid_is_every_combination_once():
    points = points_of(parse_space("matrix_lr=.02, .04; depth=2,4,6;"))
    assert len(points) == 6 and {tuple(point) for point in points} == {("matrix-lr", "depth")}
    assert {(point["matrix-lr"], point["depth"]) for point in points} == {(a, b) for a in (".02", ".04") for b in "246"}
    assert points_of({}) == [{}], "no space: the flags as they are, for several seeds"


@settings(deadline=None, max_examples=25)
@given(st.integers(1, 40), st.integers(1, 40))
def test_more_draws_begin_with_the_same_points(few, more):
    space = parse_space("matrix-lr=log(.001,1); warmdown-ratio=uniform(.2,.8); depth=int(2,9); schedule=linear,cosine")
    one, other = points_of(space, min(few, more)), points_of(space, max(few, more))
    assert other[: len(one)] == one


def test_draws_follow_their_distribution():
    points = points_of(parse_space("a=log(.01,1); b=uniform(2,4); c=int(1,3)"), 2000)
    a, b = (np.array([float(point[name]) for point in points]) for name in "ab")
    assert a.min() >= 0.01 and a.max() <= 1 and b.min() >= 2 and b.max() <= 4
    assert abs(np.log10(a).mean() + 1) < 0.05, "even in the logarithm: half of the draws are below 0.1"
    assert abs(b.mean() - 3) < 0.05
    assert {point["c"] for point in points} == {"1", "2", "3"}


@pytest.mark.parametrize(
    "text",
    ["depth", "depth=", "=2", "a=1;a=2", "lr=log(0,1)", "lr=log(2,1)", "lr=cube(1,2)", "lr=log(a,b)", "seed=1,2"],
)
def test_space_that_says_nothing(text):
    with pytest.raises(ValueError, match="--space"):
        parse_space(text)


def test_range_without_draws():
    with pytest.raises(ValueError, match=r"matrix-lr.*--draws"):
        points_of(parse_space("matrix-lr=log(.01,.1)"))


def test_arguments():
    assert to_argv({"depth": "4", "compile": "false", "fp8": "true", "x": "-1"}) == [
        "--depth=4",
        "--no-compile",
        "--fp8",
        "--x=-1",
    ]
    assert split_argv(["--a", "--", "--b", "--", "c"]) == (["--a"], ["--b", "--", "c"])
    assert split_argv(["--a"]) == (["--a"], [])


def test_runs_are_named_by_what_they_do(tmp_path, monkeypatch):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))

    def names(points, common=(), seeds=1):
        return [run.id for run in plan("scripts.base_train", points, seeds, common)]

    first = names([{"depth": "2", "matrix-lr": ".1"}])
    assert first == names([{"matrix-lr": ".1", "depth": "2"}]), "order says nothing"
    assert len({*names([{"depth": "2"}, {"depth": "4"}], seeds=3), *names([{"depth": "2"}], ["--fp8"])}) == 7
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer" / "tokenizer.json").write_text("{}")
    assert first != names([{"depth": "2", "matrix-lr": ".1"}]), "another tokenizer, another run"


@pytest.mark.parametrize("common", [["--depth", "3"], ["--depth=3"], ["--seed=1"], ["--resume"], ["--model_tag=x"]])
def test_flags_given_twice(common):
    with pytest.raises(ValueError, match=r"given after -- and set by the sweep"):
        plan("scripts.base_train", [{"depth": "2"}], 1, common)


def record(point, score, **more):
    return {"point": point, "val_bpb": score, "tok_per_sec": 100.0, "seconds": 60.0, "argv": [], **more}


def test_mean_and_standard_error_over_seeds(tmp_path):
    scores = [1.1, 1.3, 1.2, 1.6]
    records = [record({"a": "1"}, score) for score in scores]
    records += [record({"a": "2"}, 1.0), record({"a": "3"}, None, error="loss is nan")]
    best, second, failed = summarize(records, "val_bpb")
    assert [row["point"]["a"] for row in (best, second, failed)] == ["2", "1", "3"]
    assert math.isclose(second["mean"], np.mean(scores))
    assert math.isclose(second["stderr"], np.std(scores, ddof=1) / 2)
    assert (best["n"], best["stderr"]) == (1, None)
    assert (failed["mean"], failed["failed"]) == (None, 1)
    assert summarize(records, "val_bpb", maximize=True)[0]["point"] == {"a": "1"}
    table = summary_table([best, second, failed], "val_bpb")
    assert "| 1 | 1.3000 | 0.1080 | 4 | 100 | 1.0 |" in table and "0, 1 failed" in table
    write_results(tmp_path, records, "val_bpb", False, "command")
    rows = list(csv.DictReader((tmp_path / "results.csv").read_text().splitlines()))
    assert [row["a"] for row in rows] == ["1"] * 4 + ["2", "3"] and rows[5]["error"] == "loss is nan"
    made = json.loads((tmp_path / "results.json").read_text())
    assert len(made["runs"]) == 6 and {"commit", "hardware", "date"} <= made.keys()


def test_interrupted_sweep_goes_on_and_finished_runs_are_skipped(tiny_world):
    """Ctrl-C in the second of two runs: it saves; the same command resumes it and leaves the first alone."""
    folder = tiny_world / "sweeps" / "lr"
    arguments = ["--name", "lr", "--space", "matrix-lr=.02,.04", "--", *tiny_run.BASE, *LONG]
    ids = [run.id for run in plan("scripts.base_train", [{"matrix-lr": ".02"}, {"matrix-lr": ".04"}], 1, arguments[5:])]
    first, second = (folder / "runs" / "base" / name / "metrics.jsonl" for name in ids)

    sweep = tiny_run.start_script("dev.sweep", *arguments)
    tiny_run.wait_for(lambda: len(read_metrics(second)) >= 2, sweep, seconds=300)
    os.kill(sweep.pid, signal.SIGINT)
    assert sweep.wait().code == 130
    assert len((folder / "results.csv").read_text().splitlines()) == 2, "a head and the finished run"
    assert list((folder / "checkpoints" / "base" / ids[1]).glob("step_*")), "the interrupted run saved"
    before = first.read_text()

    result = tiny_run.run("dev.sweep", *arguments)
    assert "1 of 2 runs to do" in result.out
    assert "resumed base/" in (folder / "logs" / f"{ids[1]}.log").read_text()
    steps = [line["step"] for line in read_metrics(second) if "loss" in line]
    assert steps == list(range(1, 31)), "each step once"
    assert first.read_text() == before
    assert not list((folder / "checkpoints" / "base").iterdir()), "models of finished runs are not kept"
    assert not (tiny_world / "runs").exists(), "the base directory's own runs are left alone"
    rows = list(csv.DictReader((folder / "results.csv").read_text().splitlines()))
    assert [row["matrix-lr"] for row in rows] == [".02", ".04"]
    for row, path in zip(rows, (first, second)):
        assert float(row["val_bpb"]) == read_metrics(path)[-1]["val_bpb"]

    assert "0 of 2 runs to do" in tiny_run.run("dev.sweep", *arguments).out


def test_wrong_flag_ends_the_sweep_at_once(tiny_world):
    result = tiny_run.script("dev.sweep", "--space", "matrix-lr=.02,.04,.06", "--", *tiny_run.BASE, "--nonsense=1")
    assert "ended before its first step" in result.error_line and "--nonsense" in result.error_line
    assert len(list((tiny_world / "sweeps" / "sweep" / "logs").iterdir())) == 1


def test_one_sweep_a_folder(tiny_world):
    folder = tiny_world / "sweeps" / "x"
    runner = Runner(folder)
    folder.mkdir(parents=True)
    with runner._alone(), pytest.raises(ValueError, match="runs are under way"), Runner(folder)._alone():
        pass
