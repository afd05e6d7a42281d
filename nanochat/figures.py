"""The report's figures, drawn with matplotlib: curves over training steps, and bars per task.

Equal numbers give equal bytes, so that a report that is made again does not differ.
"""

import io
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nanochat.common import atomic_write

COLOURS = {"base": "#8c8c8c", "mid": "#4c78a8", "sft": "#f58518", "rl": "#54a24b"}


def new_figure(width: float, height: float, panels: int) -> tuple[Any, list[Any]]:
    """Return a figure of so many panels side by side, and their axes. width, height: inches."""
    from matplotlib.figure import Figure  # without pyplot: no window system, and no state kept between figures

    figure = Figure(figsize=(width, height), dpi=110, layout="constrained")
    axes = list(figure.subplots(1, panels, squeeze=False)[0])
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(axis="y", alpha=0.25)
    return figure, axes


def save_figure(figure: Any, path: Path) -> None:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})  # without matplotlib's version: the same bytes
    atomic_write(path, buffer.getvalue())


def draw_curves(curves: Mapping[str, Mapping[int, float]], label: str, path: Path, bottom: float | None = None) -> bool:
    """Draw a metric over the steps, one panel per stage; long curves are faint under their running mean.

    curves: stage -> step -> value. Returns False, and draws nothing, where there is no value.
    """
    drawn = {stage: points for stage, points in curves.items() if points}
    if not drawn:
        return False
    figure, axes = new_figure(width=max(5.0, 3.6 * len(drawn)), height=3.0, panels=len(drawn))
    for axis, (stage, points) in zip(axes, drawn.items()):
        steps = list(points)
        values = list(points.values())
        half = len(values) // 40  # a mean over a twentieth of the curve; a short curve stays as it is
        means = [statistics.fmean(values[max(0, i - half) : i + half + 1]) for i in range(len(values))]
        axis.plot(steps, values, color=COLOURS[stage], alpha=0.3, linewidth=0.8)
        axis.plot(steps, means, color=COLOURS[stage], linewidth=1.8, marker=None if half else "o", markersize=4)
        axis.set(title=stage, xlabel="step")
        axis.set_ylim(bottom=bottom)
    axes[0].set_ylabel(label)
    save_figure(figure, path)
    return True


def draw_bars(scores: Mapping[str, Mapping[str, Any]], path: Path) -> bool:
    """Draw accuracy by task, a bar per stage with its standard error; a dotted line marks guessing.

    scores: stage -> task -> its `accuracy_record`. Returns False, and draws nothing, where there is no task.
    """
    baselines = {task: record["baseline"] for found in scores.values() for task, record in found.items()}
    if not baselines:
        return False
    places = {task: place for place, task in enumerate(baselines)}
    figure, (axis,) = new_figure(width=max(5.0, 1.2 + 1.5 * len(places)), height=3.6, panels=1)
    width = 0.8 / len(scores)
    for i, (stage, found) in enumerate(scores.items()):
        shift = (i - (len(scores) - 1) / 2) * width  # the stages' bars stand side by side around their task's tick
        bars = axis.bar(
            [places[task] + shift for task in found],
            [100 * record["accuracy"] for record in found.values()],
            width=0.92 * width,
            yerr=[100 * record["stderr"] for record in found.values()],
            color=COLOURS[stage],
            label=stage,
            capsize=2.5,
        )
        axis.bar_label(bars, fmt="%.0f", padding=3, size=8)
    for task, place in places.items():
        guessing = 100 * baselines[task]
        axis.hlines(guessing, place - 0.42, place + 0.42, colors="#333333", linestyles="dotted", linewidth=1)
    axis.set_xticks(range(len(places)), places)
    axis.set_ylim(0, 112)
    axis.set_ylabel("accuracy, % (dotted: guessing)")
    figure.legend(loc="outside upper center", ncols=len(scores), frameon=False)
    save_figure(figure, path)
    return True
