"""The report's figures, as PNG bytes: curves of a run by stage, and bars of task scores by stage."""

import io
from collections.abc import Mapping, Sequence
from typing import Any

Points = tuple[Sequence[int], Sequence[float]]  # steps and values
COLOURS = {"base": "#8c8c8c", "mid": "#4c78a8", "sft": "#f58518", "rl": "#54a24b"}


def _figure(width: float, height: float, panels: int) -> tuple[Any, list[Any]]:
    from matplotlib.figure import Figure  # without pyplot: no window system and no state kept between figures

    figure = Figure(figsize=(width, height), dpi=110, layout="constrained")
    axes = list(figure.subplots(1, panels, squeeze=False)[0])
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(axis="y", alpha=0.25)
        axis.set_axisbelow(True)
    return figure, axes


def _png(figure: Any) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})  # no version in the file: same data, same bytes
    return buffer.getvalue()


def _smoothed(values: Sequence[float]) -> list[float]:
    """The mean over a twentieth of the curve around each point."""
    half = len(values) // 40
    windows = (values[max(0, i - half) : i + half + 1] for i in range(len(values)))
    return [sum(window) / len(window) for window in windows]


def curves(series: Mapping[str, Points], label: str, bottom: float | None = None) -> bytes:
    """One panel a stage: `series` by stage. Long curves are drawn faint under their smoothed form.

    bottom: where the value axis begins; None: a little below the least value.
    """
    figure, axes = _figure(max(5.0, 3.6 * len(series)), 3.0, len(series))
    for axis, (stage, (steps, values)) in zip(axes, series.items()):
        if len(values) > 40:
            axis.plot(steps, values, color=COLOURS[stage], alpha=0.3, linewidth=0.8)
            axis.plot(steps, _smoothed(values), color=COLOURS[stage], linewidth=1.8)
        else:
            axis.plot(steps, values, color=COLOURS[stage], linewidth=1.8, marker="o", markersize=4)
        axis.set_title(stage)
        axis.set_xlabel("step")
        axis.margins(x=0.02)
        axis.set_ylim(bottom=bottom)
    axes[0].set_ylabel(label)
    return _png(figure)


def bars(scores: Mapping[str, Mapping[str, Mapping[str, float]]]) -> bytes:
    """Accuracy in percent by task, one bar a stage with its standard error; a dotted line marks guessing.

    scores[stage][task] holds accuracy, stderr and baseline (0..1).
    """
    tasks = list(dict.fromkeys(task for found in scores.values() for task in found))
    figure, (axis,) = _figure(max(5.0, 1.2 + 1.5 * len(tasks)), 3.6, 1)
    width = 0.8 / len(scores)
    style: dict[str, Any] = {"ecolor": "#333333", "capsize": 2.5, "error_kw": {"elinewidth": 1}}
    for i, (stage, found) in enumerate(scores.items()):
        at = [tasks.index(task) + (i - (len(scores) - 1) / 2) * width for task in found]
        values, errors = ([100 * score[key] for score in found.values()] for key in ("accuracy", "stderr"))
        shown = axis.bar(at, values, 0.92 * width, color=COLOURS[stage], yerr=errors, label=stage, **style)
        axis.bar_label(shown, fmt="%.0f", padding=3, size=8)
        for task, score in found.items():
            x, chance = tasks.index(task), 100 * score["baseline"]
            axis.hlines(chance, x - 0.42, x + 0.42, colors="#333333", linestyles="dotted", linewidth=1)
    axis.set_xticks(range(len(tasks)), tasks)
    axis.set_ylim(0, 112)
    axis.set_yticks(range(0, 101, 20))
    axis.set_ylabel("accuracy, % (dotted: guessing)")
    figure.legend(loc="outside upper center", ncols=len(scores), frameon=False)
    return _png(figure)
