"""The CORE benchmark: both forms give the same, the sums add up, and a broken promise is an error."""

import json

import pytest
import torch
from core_bundle import CHOICE, CLOZE, SCHEMA, tiny_model, write_bundle

from dev import bench_core
from nanochat.core_eval import evaluate_core_task
from nanochat.core_tasks import read_rows, read_tasks
from nanochat.tokenizer import Tokenizer

SHAPE = ["--depth", "1", "--head-dim", "32", "--vocab-size", "280", "--seq-len", "48", "--rows", "3", "--repeats", "1"]


@pytest.fixture
def bundle(tmp_path):
    choices = [{**CHOICE, "query": f"Sky {i}?", "gold": i % 2} for i in range(9)]
    tasks = {"choice": ("multiple_choice", 2, 50, choices), "schema": ("schema", 0, 50, [SCHEMA])}
    return write_bundle(tmp_path / "bundle", {**tasks, "cloze": ("language_modeling", 0, 0, [CLOZE])})


def test_the_plain_form_is_the_protocol(bundle):
    model, tokenizer = tiny_model(265, 64), Tokenizer.train_from_iterator(["abc"], 265)
    for task in read_tasks(bundle):
        rows, _ = read_rows(task)
        plain = bench_core.plain_outcomes(model, tokenizer, task, rows, len(rows))
        assert plain == evaluate_core_task(model, tokenizer, task, rows)["outcomes"]


def test_the_record_adds_up_and_the_promise_is_kept_or_an_error(bundle, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("NANOCHAT_DTYPE", "float32")
    threads = torch.get_num_threads()
    for promise in ("0", "1e9"):
        flags = [*SHAPE, "--bundle", str(bundle), "--promise", promise, "--out", str(tmp_path / "core")]
        monkeypatch.setattr("sys.argv", ["bench_core", *flags, "--device-type", "cpu"])
        if promise == "0":
            bench_core.main()
        else:
            with pytest.raises(ValueError, match="times as fast as one at a time, not 1e"):
                bench_core.main()
    torch.set_num_threads(threads)
    *rows, whole = json.loads((tmp_path / "core.json").read_text())["rows"]
    assert [row["task"] for row in rows] == ["choice", "schema", "cloze"] and whole["task"] == "all"
    assert [(row["rows"], row["sequences"]) for row in rows] == [(3, 6), (1, 2), (1, 1)]
    for name in ("rows", "sequences", "tokens", "scored", "plain s", "batched s"):
        assert whole[name] == pytest.approx(sum(row[name] for row in rows))
    assert whole["ratio"] == pytest.approx(whole["plain s"] / whole["batched s"])
    assert whole["decisions differ"] == 0 and whole["log-likelihoods differ by"] < 1e-4
    assert "| all |" in capsys.readouterr().out
