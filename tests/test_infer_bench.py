"""scripts.infer_bench: a whole small run, whose record adds up."""

import json

import tiny_run
import torch

from nanochat.gpt import GPT, GPTConfig
from scripts import infer_bench

SMALL = ["--depth", "1", "--vocab-size", "64", "--sequence-len", "128", "--head-dim", "32", "--batches", "1,3"]
SMALL += ["--prompt-tokens", "5", "--new-tokens", "6", "--prefix-tokens", "40", "--clients", "3", "--rounds", "2"]


class Timed:
    """A side that takes the times it is given, turn by turn."""

    def __init__(self, name, *times):
        self.name = name
        self.times = iter(times)

    def batch(self, size):
        return next(self.times)


def test_times_are_compared_turn_by_turn_and_the_first_is_to_warm_up():
    config = infer_bench.Config(new_tokens=11, rounds=3, batches="5")
    ours = Timed("ours", (9.0, 9.0), (0.1, 1.0), (0.2, 2.0), (0.4, 4.0))
    other = Timed("other", (0.0, 0.0), (0.3, 3.0), (0.3, 4.0), (0.3, 4.0))
    first, second = infer_bench.measure_batches([ours, other], config)
    assert (first["side"], first["batch"], second["side"]) == ("ours", 5, "other")
    assert first["tokens/s"] == 5 * 10 / 2.0 and first["ms a step"] == 200 and first["first token ms"] == 200
    assert second["tokens/s"] == 5 * 10 / 4.0 and second["ms a step"] == 400 and second["first token ms"] == 300
    assert first["ours x"] == 1 and second["ours x"] == 2  # of 3, 2 and 1


def test_the_record_of_a_run_adds_up(tmp_path, monkeypatch):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "base"))
    monkeypatch.setenv("NANOCHAT_DTYPE", "float32")
    out = tmp_path / "infer.json"
    result = tiny_run.script("scripts.infer_bench", *SMALL, "--out", str(out))
    assert result.code == 0, result
    record = json.loads(out.read_text(encoding="utf-8"))
    shape = GPTConfig.from_dict(record["model"])
    with torch.device("meta"):
        model = GPT(shape)
    # what a decode step reads: every matrix but the embeddings
    tables = sum(module.weight.numel() for module in model.modules() if isinstance(module, torch.nn.Embedding))
    matrices = sum(parameter.numel() for parameter in model.parameters() if parameter.dim() == 2) - tables
    assert record["alone"]["bytes of weights read a step"] == 4 * matrices
    assert [(line["side"], line["batch"]) for line in record["batches"]] == [("ours", 1), ("ours", 3)]
    for line in record["batches"]:
        assert abs(line["tokens/s"] * line["ms a step"] / 1e3 / line["batch"] - 1) < 1e-6
