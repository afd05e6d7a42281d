"""A smoke call of each tool in dev/: it runs, and its record holds what it is for."""

import json

import pytest
import tiny_run

from dev.isoflop import fit_parabola

SHAPE = ["--no-compile", "--aspect-ratio=16", "--head-dim=16", "--eval-tokens=1024"]


def test_bench_train_with_profile(session_world, tmp_path, monkeypatch):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "base"))
    corpus = str(session_world.parent / "corpus")
    small = ["--depths=2", "--vocab-size=400", "--seq-len=64", "--batch-tokens=512", "--steps=6", "--warmup=2"]
    tiny_run.run("dev.bench", "train", *small, f"--data={corpus}", "--profile", "--", *SHAPE)
    record = json.loads((tmp_path / "base" / "bench" / "train.json").read_text())
    (row,) = record["runs"]
    assert row["p10"] <= row["tokens/s"] <= row["p90"] and 0 < row["MFU"] < 1
    shares = {part["part of a step"]: part["share"] for part in record["profile_d2"]}
    assert sum(shares.values()) == pytest.approx(1)
    assert shares["optimizer"] > 0 and shares["matrix products"] > 0


def test_sweep_over_flops_draws_isoflop_curves_and_skips_what_is_finished(tiny_world):
    space = "--space=target-flops=4e8; depth=2,3,4"
    flags = [*SHAPE, "--max-seq-len=64", "--total-batch-size=512", "--sample-every=0", "--dataset=corpus"]
    first = tiny_run.run("dev.sweep", "--name=iso", space, "--", *flags)
    assert "3 of 3 runs to do" in first.out
    folder = tiny_world / "sweeps" / "iso"
    assert (folder / "isoflop.png").read_bytes().startswith(b"\x89PNG")
    assert len(json.loads((folder / "isoflop.json").read_text())["points"]) == 3
    assert "0 of 3 runs to do" in tiny_run.run("dev.sweep", "--name=iso", space, "--", *flags).out


def test_parabola_finds_the_best_size():
    """Of a loss N/best + best/N, which is least at N = best and symmetric in the logarithm."""
    sizes = [2.0**n for n in range(10, 17)]
    for best in (3000.0, 9000.0):
        found = fit_parabola(sizes, [size / best + best / size for size in sizes])
        assert found is not None and found[0] == pytest.approx(best, rel=0.2)
    assert fit_parabola(sizes, [-size for size in sizes]) is None, "no minimum between the points"
