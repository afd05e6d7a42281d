"""Figures of metrics: the axes, smoothing, finding runs, and a figure of a real run."""

import json
import math

import pytest
import tiny_run

from dev.plot import draw, find_runs, smoothed, to_curve

LINES = [
    {"step": 0, "val_bpb": 3.0},
    {"step": 1, "loss": 5.0, "tokens": 100, "dt": 0.5},
    {"step": 2, "loss": 4.0, "tokens": 200, "dt": 0.25},
    {"step": 2, "val_bpb": 2.0, "tasks": {"a": 1}},
    {"step": 3, "loss": 3.0, "tokens": 300, "dt": 0.5},
]


def test_axes():
    assert to_curve(LINES, "loss") == ([1, 2, 3], [5.0, 4.0, 3.0])
    assert to_curve(LINES, "loss", "tokens", start=2) == ([200, 300], [4.0, 3.0])
    assert to_curve(LINES, "loss", "seconds") == ([0.5, 0.75, 1.25], [5.0, 4.0, 3.0])
    assert to_curve(LINES, "val_bpb", "seconds") == ([0.0, 0.75], [3.0, 2.0]), "evaluations stand at their step's end"
    assert to_curve(LINES, "val_bpb", "tokens") == ([0, 200], [3.0, 2.0])
    assert to_curve(LINES, "tasks") == to_curve(LINES, "nothing") == ([], [])


def test_smoothing():
    line = [float(i) for i in range(100)]
    assert smoothed(line, 0.0) == line
    assert all(math.isclose(a, b) for a, b in zip(smoothed(line, 0.1)[5:-5], line[5:-5])), "a straight line stays"
    assert smoothed([1.0, 2.0, 6.0], 1.0) == [1.5, 3.0, 4.0]


def write_run(folder, lines=LINES):
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_runs_by_name_folder_file_and_sweep(tmp_path, monkeypatch):
    base = tmp_path / "base"
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(base))
    with pytest.raises(ValueError, match="no runs in"):
        find_runs(None)
    one, two = write_run(base / "runs/base/d4"), write_run(base / "runs/sft/d4")
    write_run(base / "runs/base/d4~1")
    other = write_run(tmp_path / "elsewhere")
    sweep = write_run(base / "sweeps/lr/runs/base/abc")
    (base / "sweeps/lr/results").mkdir()
    (base / "sweeps/lr/results/abc.json").write_text('{"point": {"depth": "2"}, "seed": 1}')
    assert {name: path.parent for name, path in find_runs(None).items()} == {"base/d4": one, "sft/d4": two}
    assert [path.parent for path in find_runs(f"base/d4,{other},{other}/metrics.jsonl").values()][-1] == other
    assert find_runs("sweeps/lr") == {"depth 2, seed 1": sweep / "metrics.jsonl"}
    with pytest.raises(ValueError, match="--runs base/d5"):
        find_runs("base/d5")


def test_each_run_has_one_colour_in_all_panels():
    a, b = ([1, 2], [3.0, 4.0]), ([1, 2], [5.0, 6.0])
    figure = draw({"loss": {"a": a, "b": b}, "val_bpb": {"b": b}}, "step")
    first, second = figure.axes
    assert [list(line.get_ydata()) for line in first.lines] == [[3.0, 4.0], [5.0, 6.0]]
    assert second.lines[0].get_color() == first.lines[1].get_color() != first.lines[0].get_color()
    assert len(draw({"loss": {"a": a}}, "tokens", smooth=0.5).axes[0].lines) == 2, "faint under the smoothed"


def test_legend_stays_inside_the_figure():
    figure = draw({"loss": {f"target-flops 1e+12, depth {i}, seed 0": ([1, 2], [3.0, 4.0]) for i in range(9)}}, "step")
    figure.draw_without_rendering()
    box = figure.legends[0].get_window_extent()
    assert box.x0 >= 0 and box.x1 <= figure.bbox.x1 and box.y0 >= 0


def test_figure_of_a_real_run(trained_world, tmp_path):
    for x, out in (("tokens", tmp_path / "a.png"), ("seconds", tmp_path / "b.svg")):
        result = tiny_run.run("dev.plot", "--runs", "base/d2,mid/d2", "--x", x, "--out", str(out))
        assert "2 run(s)" in result.out
    assert (tmp_path / "a.png").read_bytes()[:4] == b"\x89PNG" and "<svg" in (tmp_path / "b.svg").read_text()
    line = tiny_run.script("dev.plot", "--y", "los", "--out", str(tmp_path / "c.png")).error_line
    assert "--y los" in line and "tok_per_sec" in line
    assert "--out" in tiny_run.script("dev.plot", "--out", "c.jpeg").error_line
