"""scripts.infer_bench: what it makes of given times, and a whole small run, whose record adds up."""

import importlib.util
import json

import pytest
import tiny_run
import torch

from dev import bench_infer
from nanochat import checkpoint
from nanochat.compute import Compute
from nanochat.tokenizer import Tokenizer

SMALL = ["--depth", "1", "--vocab-size", "64", "--sequence-len", "128", "--head-dim", "32", "--batches", "1,3"]
SMALL += ["--prompt-tokens", "5", "--new-tokens", "6", "--prefix-tokens", "40", "--clients", "3", "--rounds", "2"]


@pytest.fixture(autouse=True)
def base_dir(tmp_path, monkeypatch):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "base"))


class Timed:
    """A side that takes the times it is given, turn by turn."""

    def __init__(self, *times):
        self.times = iter(times)

    def batch(self, size):
        return next(self.times)


def test_times_are_compared_turn_by_turn_and_the_first_is_to_warm_up():
    config = bench_infer.Config(new_tokens=11, rounds=3)
    ours = Timed((9.0, 9.0), (0.1, 1.0), (0.2, 2.0), (0.4, 4.0))
    other = Timed((0.0, 0.0), (0.3, 3.0), (0.3, 4.0), (0.3, 4.0))
    first, second = bench_infer.compare({"ours": ours, "other": other}, 5, config, (1.0, 1.0))
    assert (first["side"], first["batch"], second["side"]) == ("ours", 5, "other")
    assert first["tokens/s"] == 5 * 10 / 2.0 and first["ms a step"] == 200 and first["first token ms"] == 200
    assert second["tokens/s"] == 5 * 10 / 4.0 and second["ms a step"] == 400 and second["first token ms"] == 300
    assert first["ours is faster by"] == 1 and second["ours is faster by"] == 2  # of 3, 2 and 1


def run(tmp_path, *flags):
    out = tmp_path / "infer.json"
    result = tiny_run.script("scripts.infer_bench", *SMALL, "--out", str(out), *flags)
    assert result.code == 0, result
    assert "ours is faster by" in out.with_suffix(".md").read_text(encoding="utf-8")
    return json.loads(out.read_text(encoding="utf-8"))


def test_the_record_of_a_run_adds_up(tmp_path, monkeypatch):
    monkeypatch.setenv("NANOCHAT_DTYPE", "float32")
    record = run(tmp_path)
    shape, alone = record["model"], record["alone"]["ours"]
    C, width = shape["n_embd"], shape["n_kv_head"] * (shape["n_embd"] // shape["n_head"])
    gate = -(-shape["n_kv_head"] // 2) * 2  # the only layer has a value embedding
    weights = C * (C + 2 * width + gate) + C * C + 8 * C * C + C * shape["vocab_size"]
    assert alone["bytes of weights"] == 4 * weights and alone["bytes of cache a token"] == 2 * width * 4
    assert alone["prefill tokens/s"] * alone["first token of 56, s"] == pytest.approx(56)
    rate = 2 * weights * alone["prefill tokens/s"]
    assert alone["prefill share of GEMM rate"] == pytest.approx(rate / record["GEMM FLOP/s"])
    assert 0 < alone["median first token of 3 at once, s"] <= alone["last first token of 3 at once, s"]
    assert [line["batch"] for line in record["batches"]] == [1, 3]
    for line in record["batches"]:
        seconds, size = line["ms a step"] / 1e3, line["batch"]
        assert line["side"] == "ours" and line["ours is faster by"] == 1
        assert line["tokens/s"] * seconds == pytest.approx(size)
        moved = 4 * weights + size * (5 + 6 / 2) * alone["bytes of cache a token"]
        assert line["share of bandwidth"] * record["read bytes/s"] * seconds == pytest.approx(moved)
        assert line["share of GEMM rate"] * record["GEMM FLOP/s"] * seconds == pytest.approx(2 * size * weights)


@pytest.mark.skipif(not importlib.util.find_spec("transformers"), reason="transformers is not installed")
def test_transformers_takes_part(tmp_path):
    record = run(tmp_path, "--transformers", "--batches", "2")
    sides = [line["side"] for line in record["batches"]]
    assert sides == ["ours", "transformers float32", "transformers bfloat16"]
    for line in record["batches"]:
        assert line["tokens/s"] * line["ms a step"] / 1e3 == pytest.approx(2)


def test_what_cannot_be_measured_is_refused():
    for flag, value in (("--batches", "1,x"), ("--rounds", "1"), ("--prefix-tokens", "120")):
        line = tiny_run.script("scripts.infer_bench", *SMALL, flag, value).error_line
        assert ("--sequence-len" if flag == "--prefix-tokens" else flag) in line


def test_bits_per_byte_are_those_of_training_whatever_tokenizer_is_the_newest(trained_world):
    model, _, meta = checkpoint.load_model("base", "cpu")
    Tokenizer.train_from_iterator(["other text"] * 9, 280).save(trained_world / "tokenizer")
    compute, config = Compute(torch.device("cpu"), model.dtype), bench_infer.Config(quality_tokens=1024)
    assert bench_infer.bits_per_byte(model, meta, config, compute, False) == pytest.approx(meta["val_bpb"], rel=0.01)
