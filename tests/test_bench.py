"""This project's own benchmarks: what they count is right, what they compare would show a difference, and they run."""

import itertools
import json
import math

import numpy as np
import pytest
import tiny_run
import torch
from torch.utils.flop_counter import FlopCounterMode

from dev import bench_data, bench_model, bench_train, loc
from dev.bench_model import Work, attended_pairs, count_work, product
from dev.profile_train import IDLE, REST, group_of
from nanochat import recipe
from nanochat.dataloader import RowLoader
from nanochat.gpt import GPT
from nanochat.loss import softcap_cross_entropy

# --- data


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards")
    return [bench_data.make_shard(folder / str(i), 200_000, 150, i) for i in range(2)]


def test_made_shards_are_what_the_loader_reads(shards):
    for shard in shards:
        assert shard.offsets[-1] == len(shard.ids) == shard.meta["tokens"]
        assert abs(np.diff(shard.offsets).mean() / 150 - 1) < 0.1
        assert shard.ids.max() < shard.meta["bos"]


def test_cut_documents_are_counted(shards):
    """Against rows read one by one: a piece is cut when it does not begin where a document begins."""
    T, rows = 128, 1000
    cuts = bench_data.cut_rates(shards, T, rows, windows=4)
    begins = set(shards[0].offsets.tolist())
    rows_R2, start, _ = shards[0].plan(T + 1, 0, 0)
    expected = [sum(s not in begins for s in start[a:b].tolist()) for a, b in rows_R2[:rows].tolist()]
    assert np.allclose(cuts, np.array(expected).reshape(4, -1).mean(axis=1)) and sum(expected) > 0
    assert len(bench_data.cut_rates(shards, T, 20_000)) == 10, "later epochs follow"


def test_ranks_are_compared(shards, monkeypatch):
    assert bench_data.ranks_agree(shards, 128, [0, 7]) == (True, 2 * 3 * 16)
    real = RowLoader.step
    monkeypatch.setattr(RowLoader, "step", lambda self, step: real(self, step + (self.rank == 1)))
    assert not bench_data.ranks_agree(shards, 128, [0])[0], "a rank that is a step ahead is seen"


def test_resuming_is_timed_at_the_ends(shards):
    seconds = bench_data.resume_seconds(shards[0].folder, 5, 128)
    assert len(seconds) == 3 and min(seconds) > 0


def test_data_benchmark(tmp_path, monkeypatch):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "base"))
    small = ["--shard-tokens", "400000", "--seq-len", "256", "--rows", "4000", "--steps", "3", "--resume-shards", "3"]
    result = tiny_run.script("dev.bench_data", *small, "--text-bytes", "60000", "--vocab-size", "400")
    record = json.loads((tmp_path / "base" / "bench" / "data.json").read_text())
    kept = {row["what"]: row["kept"] for row in record["rows"]}
    assert len(kept) == 8 and "NO" in kept.values() if result.code else "NO" not in kept.values()
    assert record["speed"]["both"] < min(record["speed"]["packing"], record["speed"]["batches"])
    assert kept["rows of 2, 4, 8 ranks and of one"] == "yes"


def test_broken_promises_are_told():
    config = bench_data.Config()
    good = {"packing": 6e7, "batches": 6e7, "both": 3e7, "prefetched": 5e7}
    text = {"tokens": 1e6, "bytes": 4e6, "vocab_size": 300}
    record = {"speed": good, "cut_rates": [1.0, 1.02], "ranks_agree": (True, 9), "resume_seconds": [0.1, 0.9]}

    def verdicts(**change):
        rows = bench_data.to_rows({**record, "tokenizing": text, **change}, config)
        return [row["kept"] for row in rows if row["promised"]]

    assert verdicts() == ["yes"] * 4
    assert verdicts(speed={**good, "both": 1.9e7}) == ["NO", "yes", "yes", "yes"]
    assert verdicts(cut_rates=[1.0, 1.2]) == ["yes", "NO", "yes", "yes"]
    assert verdicts(ranks_agree=(False, 9)) == ["yes", "yes", "NO", "yes"]
    assert verdicts(resume_seconds=[0.1, 1.1]) == ["yes", "yes", "yes", "NO"]


# --- model


@pytest.mark.parametrize(("T", "window"), [(7, 7), (7, 3), (7, 1), (7, 100)])
def test_pairs_by_counting(T, window):
    pairs = sum(0 <= t - s < window for t, s in itertools.product(range(T), repeat=2))
    assert attended_pairs(T, window) == pairs


def test_flops_are_those_that_torch_counts():
    """Forward, backward and loss of a real model under torch's counter, of which attention (T² there) is taken off."""
    config = recipe.model_config(2, 192, 64, 32, 16, window_pattern="L", smear_channels=0, value_embed_every=0)
    model = GPT(config)
    model.init_weights()
    rows, N = 3, 3 * 64
    idx_BT = torch.randint(192, (rows, 64))
    counted = {}

    def flops(call):
        with FlopCounterMode(display=False) as counter:
            result = call()
        by_kind = counter.get_flop_counts()["Global"]
        return result, sum(n for kind, n in by_kind.items() if "mm" in str(kind) and "bmm" not in str(kind))

    x_BTC, counted["forward"] = flops(lambda: model.hidden(idx_BT))
    _, counted["backward"] = flops(lambda: x_BTC.backward(torch.randn_like(x_BTC)))
    x_NC = x_BTC.detach().flatten(0, 1).requires_grad_()
    arguments = (x_NC, model.head.weight, idx_BT.flatten(), 15.0, "sum")
    _, counted["loss"] = flops(lambda: softcap_cross_entropy(*arguments).backward())
    attention = 4 * rows * config.n_embd * attended_pairs(64, 64) * config.n_layer
    work = {part: sum(piece.flops for piece in pieces) for part, pieces in count_work(config, rows, 4).items()}
    assert counted == {
        "forward": work["forward"] - attention,
        "backward": work["backward"] - 2 * attention,
        "loss": work["loss"],
    }
    assert work["loss"] == 6 * N * config.n_embd * 192


def test_roofline_takes_the_slower_side_of_each_piece():
    assert Work(100, 10).seconds(flop_rate=10, byte_rate=10) == 10
    assert Work(100, 1000).seconds(flop_rate=10, byte_rate=10) == 100
    assert product(2, 3, 5, 4) == Work(60, 4 * (6 + 15 + 10))
    work = {"forward": [Work(100, 10), Work(10, 100)], "backward": [], "loss": [Work(0.001, 0.001)]}
    seconds = {"forward": 40.0, "backward": 1.0, "loss": 1.0}
    rows = bench_model.to_rows(2, {**work, "backward": [Work(10, 1)]}, seconds, 80, 10, 10)
    assert rows[0]["roofline ms"] == 20_000 and rows[0]["share of it"] == "50.0%" and rows[0]["tokens/s"] == 2
    assert rows[0]["bound by compute"] == "91%" and rows[3]["part"] == "all" and rows[3]["ms"] == 42_000


def test_model_benchmark(tmp_path, monkeypatch):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    small = ["--depths", "1,2", "--rows", "1", "--seq-len", "64", "--vocab-size", "256", "--head-dim", "32"]
    tiny_run.run("dev.bench_model", *small, "--repeats", "1", "--no-compile")
    rows = json.loads((tmp_path / "bench" / "model.json").read_text())["rows"]
    assert [(row["depth"], row["part"]) for row in rows[:5]] == [
        *((1, part) for part in ("forward", "backward", "loss", "all")),
        (2, "forward"),
    ]
    assert math.isclose(rows[3]["ms"], sum(row["ms"] for row in rows[:3]))


# --- tokenizer


def test_tokenizer_benchmark(tmp_path, monkeypatch):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    small = ["--megabytes", ".06", "--vocab-size", "400", "--seconds", ".001", "--pretrained", "nothing_of_that_name"]
    assert "not measured" in tiny_run.run("dev.bench_tokenizer", *small).out
    ours, other, direct, _ = json.loads((tmp_path / "bench" / "tokenizer.json").read_text())["rows"]
    assert "nothing_of_that_name (not on this machine)" in other["tokenizer"] and other["encode MB/s"] is None
    assert ours["bytes a token"] == direct["bytes a token"] > 1


# --- training


def test_training_speed_leaves_the_warm_up_out():
    steps = [{"loss": 1.0, "tok_per_sec": s, "peak_mem_bytes": 5 + i} for i, s in enumerate([1, 2, 90, 110, 100])]
    found = bench_train.summarize([*steps, {"val_bpb": 1.5}], warmup=2)
    assert found["tok_per_sec"] == 100 and (found["p10"], found["p90"]) == (90, 110)
    assert found["peak_mem_bytes"] == 9 and found["val_bpb"] == 1.5


def test_training_benchmark_with_profile(session_world, tmp_path, monkeypatch):
    """Real runs of the entry point, and a profile whose parts add up to the step."""
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "base"))
    corpus = session_world.parent / "corpus"
    sizes = ["--depths=2", "--seq-len=64", "--batch-tokens=512", "--steps=6", "--warmup=2", "--vocab-size=600"]
    flags = ["--no-compile", "--aspect-ratio=16", "--head-dim=16"]
    tiny_run.run("dev.bench_train", f"--data={corpus}", *sizes, "--profile", "--", *flags)
    record = json.loads((tmp_path / "base" / "bench" / "train.json").read_text())
    (row,) = record["rows"]
    assert row["depth"] == 2 and row["tokens/s"] > 0 and row["MFU"].endswith("%") and row["first step, s"] > 0
    (run,) = record["runs"]["2"]
    assert math.isclose(
        float(row["MFU"][:-1]) / 100, row["tokens/s"] * run["flops_per_token"] / run["gemm_flops"], abs_tol=1e-3
    )
    groups = {group["part of a step"]: group["ms"] for group in record["profile_d2"]["groups"]}
    assert {"optimizer", "loss", "attention", "matmul", REST, IDLE} == groups.keys()
    assert math.isclose(sum(groups.values()), 1e3 * record["profile_d2"]["seconds_per_step"], rel_tol=0.05)
    assert not list((tmp_path / "base" / "bench").glob("*/checkpoints/base/*"))


def test_groups_of_operators():
    assert group_of(["aten::mm"]) == group_of(["aten::bmm", "MmBackward0"]) == "matmul"
    assert group_of(["aten::mm", "part: optimizer"]) == "optimizer"
    assert group_of(["aten::mm", "_ChunkedLossSum", "part: loss"]) == "loss"
    assert group_of(["aten::bmm", "nanochat::block_attention"]) == "attention"
    assert group_of(["aten::mul", "aten::linear"]) == group_of(["aten::copy_"]) == REST


# --- lines


def test_lines_are_counted_by_kind():
    source = (
        '"""Doc,\nof two lines."""\n\nx = """not\n\na doc"""\n\n\ndef f():\n    "Doc."\n    # why\n    return 1  # no\n'
    )
    assert loc.count(source) == {"code": 4, "text": 4, "blank": 4, "lines": 12}


def budgeted_lines():
    """The whole project's own figure, by the tool itself."""
    paths = [path for folder in loc.BUDGETED for path in (loc.ROOT / folder).glob("*.py")]
    return sum(loc.count(path.read_text())["lines"] for path in paths)


@pytest.mark.xfail(strict=True, reason="the design's bar is missed: dev/LOG.md, the line budget, restored")
def test_budget_is_kept():
    assert budgeted_lines() <= loc.BUDGET == 9_000


def test_lines_above_the_budget_only_become_fewer():
    """Whoever takes lines out lowers the figure; nobody raises it."""
    assert budgeted_lines() <= 14_707
