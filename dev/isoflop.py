"""IsoFLOP curves of a finished sweep over target-flops and depth: how large a model, and how many tokens, per budget?

Approach 2 of Hoffmann et al. (arXiv 2203.15556): for each budget C a parabola of the loss in ln N and in ln D, then
N_opt ~ C^a and D_opt ~ C^b through their minima. N counts the parameters of matrices and head, as the recipe does; D
counts training tokens; the loss is bits per byte. `python -m dev.sweep` calls this.
"""

from pathlib import Path
from statistics import fmean

import numpy as np

from dev.measure import Record
from nanochat import recipe
from nanochat.figures import new_figure, save_figure
from nanochat.gpt import GPTConfig


def fit_parabola(x: list[float], loss: list[float]) -> tuple[float, float, float] | None:
    """Fit loss = least + curvature * (ln x - ln at)^2 and return (at, least, curvature).

    Returns None where the parabola has no minimum, or where that lies outside of the points.
    """
    ln_x = np.log(x)
    a, b, c = np.polyfit(ln_x - ln_x.mean(), loss, 2)
    at = ln_x.mean() - b / (2 * a)
    if a <= 0 or not ln_x.min() <= at <= ln_x.max():
        return None
    return float(np.exp(at)), float(c - b * b / (4 * a)), float(a)


def fit_isoflops(records: list[Record]) -> Record:
    """Fit a finished scaling study; returns points, minima by budget, and both power laws as (factor, exponent).

    A law is None with fewer than two budgets whose minimum lies inside of their points.
    """
    groups: dict[tuple[float, int], list[Record]] = {}
    for record in records:
        if "error" not in record:
            point = record["point"]
            groups.setdefault((float(point["target-flops"]), int(point["depth"])), []).append(record)
    points = []
    for (budget, depth), runs in sorted(groups.items()):
        N = recipe.scaling_parameters(GPTConfig.from_dict(runs[0]["model_config"]))
        loss = fmean(run["val_bpb"] for run in runs)
        points.append({"budget": budget, "depth": depth, "N": N, "D": runs[0]["tokens"], "loss": loss})
    minima = []
    for budget in sorted({point["budget"] for point in points}):
        curve = [point for point in points if point["budget"] == budget]
        if len(curve) < 3:
            continue
        loss = [point["loss"] for point in curve]
        by_size = fit_parabola([point["N"] for point in curve], loss)
        by_tokens = fit_parabola([point["D"] for point in curve], loss)
        if by_size and by_tokens:
            best_N, least, curvature = by_size
            minima.append({"budget": budget, "N": best_N, "D": by_tokens[0], "loss": least, "curve": curvature})
    laws: dict[str, tuple[float, float] | None] = {"N": None, "D": None}
    if len(minima) > 1:
        log_budgets = np.log([best["budget"] for best in minima])
        for name in laws:
            # log y = log factor + exponent * log x, by least squares
            exponent, offset = np.polyfit(log_budgets, np.log([best[name] for best in minima]), 1)
            laws[name] = float(np.exp(offset)), float(exponent)
    return {"points": points, "minima": minima, "laws": laws}


def draw_isoflops(fit: Record, path: Path) -> None:
    """Draw the curves with their parabolas on the left, and the best N and D over the budget on the right."""
    figure, (left, right) = new_figure(width=11, height=4, panels=2)
    minima = {best["budget"]: best for best in fit["minima"]}
    for budget in sorted({point["budget"] for point in fit["points"]}):
        points = sorted((point["N"], point["loss"]) for point in fit["points"] if point["budget"] == budget)
        sizes, losses = zip(*points)
        (line,) = left.plot(sizes, losses, "o", label=f"{budget:.1e} FLOPs")
        if budget in minima:
            best = minima[budget]
            N = np.geomspace(sizes[0], sizes[-1], 100)
            left.plot(N, best["loss"] + best["curve"] * np.log(N / best["N"]) ** 2, color=line.get_color())
    left.set(xscale="log", xlabel="parameters of matrices and head, N", ylabel="validation bits per byte")
    left.legend(frameon=False)
    budgets = list(minima)
    for name, law in fit["laws"].items():
        (line,) = right.plot(budgets, [best[name] for best in minima.values()], "o", label=f"best {name}")
        if law is not None:
            factor, exponent = law
            fitted = [factor * budget**exponent for budget in budgets]
            right.plot(budgets, fitted, color=line.get_color(), label=f"{factor:.3g} C^{exponent:.2f}")
    right.set(xlabel="training FLOPs, C", ylabel="parameters, tokens")
    if budgets:  # an empty axis has no logarithm
        right.set(xscale="log", yscale="log")
        right.legend(frameon=False)
    save_figure(figure, path)
