"""Figures of any runs' metrics, overlaid. A run is stage/tag of the base directory, a folder with a metrics.jsonl, or
such a file; sweeps/NAME is all of a sweep. For example: python -m dev.plot --runs base/d4,sft/d4 --y loss,val_bpb --x
tokens
"""

import io
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dev.runner import Record, read_metrics
from nanochat import cli
from nanochat.common import atomic_write, get_base_dir, read_json

AXES = {"step": "step", "tokens": "training tokens", "seconds": "seconds of training"}
LABELS = {"loss": "training loss, nats", "val_bpb": "validation bits per byte", "tok_per_sec": "tokens/s"}

Curve = tuple[list[float], list[float]]  # x, y


@dataclass(frozen=True)
class Config:
    """What is drawn, and how."""

    runs: str | None = cli.option(None, "runs, separated by commas; unset = all of the base directory")
    y: str | None = cli.option(None, "metrics, separated by commas, a panel each; unset = loss, val_bpb, tok_per_sec")
    x: str = cli.option("step", "what they are drawn against", tuple(AXES))
    smooth: float = cli.option(0.0, "share of a curve that each point is averaged over, such as .05 (0 = none)")
    start: int = cli.option(0, "leave out the steps before this one")
    log: bool = cli.option(False, "logarithmic axes")
    out: str = cli.option("metrics.png", "file to write: .png, .svg or .pdf")

    def __post_init__(self) -> None:
        if not 0 <= self.smooth <= 1:
            raise ValueError(f"--smooth {self.smooth}: must be between 0 and 1")
        if Path(self.out).suffix not in (".png", ".svg", ".pdf"):
            raise ValueError(f"--out {self.out}: the name must end in .png, .svg or .pdf")


def find_runs(names: str | None) -> dict[str, Path]:
    """The metrics.jsonl of each run, by a name that tells it from the others. Raises ValueError for one not there."""
    base = get_base_dir()
    if names is None:
        paths = list(_below(base))
    else:
        paths = []
        for name in filter(None, (name.strip() for name in names.split(","))):
            tries = [base / "runs" / name / "metrics.jsonl", Path(name) / "metrics.jsonl", Path(name)]
            found = [path for path in tries if path.is_file()][:1] or list(_below(base / name))
            if not found:
                raise ValueError(f"--runs {name}: no {tries[0]}, no such folder or file, and no sweep of that name")
            paths += found
    if not paths:
        raise ValueError(f"no runs in {base / 'runs'}: train one, or name folders with --runs")
    folders = [path.resolve().parent for path in paths]
    common = Path(os.path.commonpath(folders)) if len(folders) > 1 else folders[0].parent.parent
    return {_point(folder) or str(folder.relative_to(common)): path for folder, path in zip(folders, paths)}


def _below(base: Path) -> Iterator[Path]:
    """The runs of a base directory; one with a tilde was set aside when another of its name began."""
    return (path for path in sorted(base.glob("runs/*/*/metrics.jsonl")) if "~" not in path.parent.name)


def _point(folder: Path) -> str | None:
    """What a finished run of a sweep was about."""
    result = folder.parents[2] / "results" / f"{folder.name}.json"
    if not result.is_file():
        return None
    record = read_json(result)
    return ", ".join([*(f"{name} {value}" for name, value in record["point"].items()), f"seed {record['seed']}"])


def to_curve(lines: Sequence[Record], y: str, x: str = "step", start: int = 0) -> Curve:
    """Metric `y` over `x`: step | tokens | seconds (of training, summed). Lines without the metric are left out.

    Lines of evaluations hold a step alone: they stand where that step's training ended, at 0 before the first.
    """
    seconds, place = 0.0, {"step": 0.0, "tokens": 0.0, "seconds": 0.0}
    xs, ys = [], []
    for line in lines:
        if "loss" in line:
            seconds += line["dt"]
            place = {"step": line["step"], "tokens": line["tokens"], "seconds": seconds}
        if isinstance(line.get(y), int | float) and line["step"] >= start:
            xs.append(place[x])
            ys.append(line[y])
    return xs, ys


def smoothed(values: Sequence[float], share: float) -> list[float]:
    """Each value averaged with its neighbours, over `share` of all of them; at the ends over those there are."""
    half = int(len(values) * share / 2)
    windows = (values[max(0, i - half) : i + half + 1] for i in range(len(values)))
    return [sum(window) / len(window) for window in windows]


def draw(panels: Mapping[str, Mapping[str, Curve]], x: str, smooth: float = 0.0, log: bool = False) -> Any:
    """A matplotlib figure: one panel a metric, `panels[metric][run]` in one colour a run throughout."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure  # without pyplot: no window system and no state kept between figures

    runs = list(dict.fromkeys(run for curves in panels.values() for run in curves))
    few = [colormaps["tab10"](i) for i in range(10)]
    colours = few if len(runs) <= 10 else [colormaps["viridis"](i / (len(runs) - 1)) for i in range(len(runs))]
    figure = Figure(figsize=(5.2 * len(panels), 3.9), dpi=110, layout="constrained")
    for axis, (metric, curves) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items()):
        for run, colour in zip(runs, colours):
            if run not in curves:
                continue
            xs, ys = curves[run]
            marker = "o" if len(xs) <= 40 and not smooth else None
            if smooth:
                axis.plot(xs, ys, color=colour, alpha=0.25, linewidth=0.8)
                ys = smoothed(ys, smooth)
            axis.plot(xs, ys, color=colour, linewidth=1.6, marker=marker, markersize=3.5, label=run)
        axis.set(xlabel=AXES[x], ylabel=LABELS.get(metric, metric))
        if log:
            axis.set(xscale="log", yscale="log")
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25)
    handles = {label: h for axis in figure.axes for h, label in zip(*axis.get_legend_handles_labels())}
    columns = max(1, int(figure.get_figwidth() / (0.7 + 0.09 * max(map(len, runs)))))  # inches of a handle, of a letter
    place = {"loc": "outside lower center", "ncols": min(columns, len(runs)), "frameon": False}
    figure.legend(handles.values(), handles.keys(), **place)
    return figure


def main() -> None:
    config = cli.parse(Config, description=__doc__)
    metrics = {name: read_metrics(path) for name, path in find_runs(config.runs).items()}
    known = {key for lines in metrics.values() for line in lines for key in line if to_curve([line], key)[0]}
    wanted = [name.strip() for name in config.y.split(",")] if config.y else [name for name in LABELS if name in known]
    panels = {}
    for y in wanted:
        curves = {name: to_curve(lines, y, config.x, config.start) for name, lines in metrics.items()}
        panels[y] = {name: curve for name, curve in curves.items() if curve[0]}
        if not panels[y]:
            raise ValueError(
                f"--y {y}: no run has it from step {config.start} on; there are {', '.join(sorted(known))}"
            )
    if not panels:
        raise ValueError(f"nothing to draw yet in {', '.join(metrics)}")
    buffer = io.BytesIO()
    draw(panels, config.x, config.smooth, config.log).savefig(buffer, format=Path(config.out).suffix[1:])
    atomic_write(config.out, buffer.getvalue())
    print(f"{len(metrics)} run(s) in {config.out}")


if __name__ == "__main__":
    cli.run(main)
