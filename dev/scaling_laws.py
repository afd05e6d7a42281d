"""The best model size and number of tokens for a budget of compute. Trains every depth on every budget (IsoFLOP
curves), fits the best size of each budget and how it grows with compute, and draws both. Flags after -- go to every
run; the same command goes on where it was stopped. For example: python -m dev.scaling_laws --budgets 1e12,3e12,1e13
--depths 2,3,4,6 --jobs 2 -- --max-seq-len 512

The method is approach 2 of Hoffmann et al. (arXiv 2203.15556): for each budget C a parabola of the loss in ln N and
one in ln D, then N_opt ~ C^a and D_opt ~ C^b through their minima. N counts the parameters of matrices and head, as
the recipe does, D training tokens; the loss is bits per byte of validation text.
"""

import io
import itertools
import math
import re
import shlex
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import numpy as np

from dev.bench_old import markdown_table, write_report
from dev.runner import Record, Runner, plan, split_argv
from nanochat import cli, recipe
from nanochat.common import atomic_write, get_base_dir
from nanochat.gpt import GPTConfig


@dataclass(frozen=True)
class Config:
    """Flags of an IsoFLOP study."""

    budgets: str = cli.option("1e12,3e12,1e13,3e13", "training FLOPs of each curve, separated by commas")
    depths: str = cli.option("2,3,4,6,8", "depths trained on every budget, separated by commas")
    name: str = cli.option("scaling", "name of the study and of its folder")
    seeds: int = cli.option(1, "runs of each pair of depth and budget, with --seed 0, 1, ...")
    jobs: int = cli.option(1, "runs at once; they share the cores, and take the GPUs in turn")

    def __post_init__(self) -> None:
        if self.seeds < 1 or self.jobs < 1:
            raise ValueError("--seeds and --jobs must be at least 1")
        if not re.fullmatch(r"\w[\w.-]*", self.name):
            raise ValueError(f"--name {self.name!r}: use letters, digits, '_', '-' and '.' only")
        depths = numbers("--depths", self.depths)
        if len(depths) < 3 or any(depth % 1 for depth in depths):
            raise ValueError(f"--depths {self.depths}: a parabola needs at least three whole numbers")
        numbers("--budgets", self.budgets)


def numbers(flag: str, text: str) -> list[float]:
    """The positive numbers of a list with commas. Raises ValueError that names the flag."""
    try:
        values = sorted({float(part) for part in text.split(",")})
    except ValueError:
        values = [0.0]
    if values[0] <= 0:
        raise ValueError(f"{flag} {text!r}: give positive numbers, separated by commas")
    return values


# --- the fit ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Minimum:
    """The lowest point of loss = least + curvature·(ln x - ln at)²; `inside`: it lies between the points it is from."""

    at: float
    least: float
    curvature: float
    inside: bool


def fit_parabola(x: Sequence[float], loss: Sequence[float]) -> Minimum | None:
    """The least-squares parabola of the loss in ln x; None when it opens downward, so that it has no minimum."""
    ln_x = np.log(x)
    a, b, c = np.polyfit(ln_x - ln_x.mean(), loss, 2)
    if a <= 0:
        return None
    at = ln_x.mean() - b / (2 * a)
    return Minimum(float(np.exp(at)), float(c - b * b / (4 * a)), float(a), bool(ln_x.min() <= at <= ln_x.max()))


@dataclass(frozen=True)
class PowerLaw:
    """y = factor·x^exponent; stderr of the exponent from the residuals, None for fewer than three points."""

    factor: float
    exponent: float
    stderr: float | None

    def __call__(self, x: float) -> float:
        return self.factor * x**self.exponent


def fit_power_law(x: Sequence[float], y: Sequence[float]) -> PowerLaw:
    """The straight line of ln y over ln x by least squares, from at least two points."""
    ln_x, ln_y = np.log(x), np.log(y)
    spread = ln_x - ln_x.mean()
    slope = float(spread @ ln_y / (spread @ spread))
    residuals = ln_y - ln_y.mean() - slope * spread
    stderr = float(np.sqrt(residuals @ residuals / (len(x) - 2) / (spread @ spread))) if len(x) > 2 else None
    return PowerLaw(float(np.exp(ln_y.mean() - slope * ln_x.mean())), slope, stderr)


@dataclass(frozen=True)
class Fit:
    """What a study says: by budget the best N and D, and the laws through those inside their curves (None: too few)."""

    best: dict[float, tuple[Minimum | None, Minimum | None]]
    size_law: PowerLaw | None
    token_law: PowerLaw | None


def fit_isoflops(points: Sequence[Record]) -> Fit:
    """Fit `points`, each with `budget` (FLOPs), `parameters`, `tokens` and `loss`, at least three a budget."""
    best = {}
    for budget in sorted({point["budget"] for point in points}):
        curve = [point for point in points if point["budget"] == budget]
        loss = [point["loss"] for point in curve]
        best[budget] = tuple(fit_parabola([point[x] for point in curve], loss) for x in ("parameters", "tokens"))
    sound = {budget: pair for budget, pair in best.items() if all(minimum and minimum.inside for minimum in pair)}
    if len(sound) < 2:
        return Fit(best, None, None)
    laws = (fit_power_law(list(sound), [pair[i].at for pair in sound.values()]) for i in (0, 1))
    return Fit(best, *laws)


def to_points(records: Sequence[Record]) -> list[Record]:
    """Finished runs as points of IsoFLOP curves, seeds averaged; the budget is the one that was asked for."""
    groups: dict[tuple[float, int], list[Record]] = {}
    for record in records:
        if "error" not in record:
            key = float(record["point"]["target-flops"]), int(record["point"]["depth"])
            groups.setdefault(key, []).append(record)
    return [
        {
            "budget": budget,
            "depth": depth,
            "parameters": recipe.scaling_parameters(GPTConfig.from_dict(runs[0]["model_config"])),
            "tokens": runs[0]["tokens"],
            "loss": fmean(run["val_bpb"] for run in runs),
            "runs": len(runs),
        }
        for (budget, depth), runs in sorted(groups.items())
    ]


# --- telling ----------------------------------------------------------------------------------------------------------


def figure(points: Sequence[Record], fit: Fit) -> bytes:
    """PNG: IsoFLOP curves with their parabolas and minima; the best N and D over the budget with their laws."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    drawing = Figure(figsize=(11, 4), dpi=110, layout="constrained")
    left, right = drawing.subplots(1, 2)
    for i, (budget, (minimum, _)) in enumerate(fit.best.items()):
        colour = colormaps["viridis"](0.85 * i / max(1, len(fit.best) - 1))
        curve = sorted((point["parameters"], point["loss"]) for point in points if point["budget"] == budget)
        left.plot(*zip(*curve), "o", color=colour, label=f"{budget:.1e} FLOPs")
        if minimum:
            x = np.geomspace(min(curve[0][0], minimum.at), max(curve[-1][0], minimum.at), 100)
            left.plot(x, minimum.least + minimum.curvature * np.log(x / minimum.at) ** 2, color=colour, linewidth=1.2)
            left.plot(minimum.at, minimum.least, "*", color=colour, markersize=13, markeredgecolor="black")
    left.set(xscale="log", xlabel="parameters of matrices and head, N", ylabel="validation bits per byte")
    left.legend(frameon=False)
    budgets = list(fit.best)
    for which, law, colour in ((0, fit.size_law, "#4c78a8"), (1, fit.token_law, "#f58518")):
        label = "ND"[which] + " of the minimum" + (f", ~ C^{law.exponent:.2f}" if law else "")
        at = [(budget, pair[which].at) for budget, pair in fit.best.items() if pair[which]]
        if at:
            right.plot(*zip(*at), "o", color=colour, label=label)
        if law:
            right.plot(budgets, [law(budget) for budget in budgets], color=colour, linewidth=1.2)
    right.set(xscale="log", yscale="log", xlabel="training FLOPs, C", ylabel="parameters, tokens")
    right.legend(frameon=False)
    for axis in (left, right):
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25)
    buffer = io.BytesIO()
    drawing.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def describe(points: Sequence[Record], fit: Fit) -> str:
    """The study in Markdown: every point, the minima, and the laws with the data ratio they recommend."""
    rows: list[dict[str, Any]] = []
    for budget, (size, tokens) in fit.best.items():
        found = {"N": size and size.at, "D": tokens and tokens.at, "least bits per byte": size and size.least}
        ratio = tokens.at / size.at if size and tokens else None
        sound = "yes" if size and tokens and size.inside and tokens.inside else "no: widen --depths"
        rows.append({"FLOPs": f"{budget:.2e}", **found, "D / N": ratio, "inside the curve": sound})
    each = [{**point, "budget": f"{point['budget']:.2e}", "loss": f"{point['loss']:.4f}"} for point in points]
    text = f"{markdown_table(each)}\nMinima of the parabolas:\n\n{markdown_table(rows)}\n"
    for name, law in (("N_opt", fit.size_law), ("D_opt", fit.token_law)):
        if law is None:
            return text + "No law: it takes two budgets whose minimum lies inside their curve.\n"
        error = "" if law.stderr is None else f" ± {law.stderr:.3f}"
        text += f"{name} = {law.factor:.3g} · C^({law.exponent:.3f}{error})\n"
    return text


def main() -> None:
    own, common = split_argv(sys.argv[1:])
    config = cli.parse(Config, own, (__doc__ or "").split("\n\n")[0])
    budgets, depths = numbers("--budgets", config.budgets), numbers("--depths", config.depths)
    pairs = itertools.product(budgets, depths)
    points = [{"target-flops": f"{budget:g}", "depth": f"{depth:.0f}"} for budget, depth in pairs]
    runs = plan("scripts.base_train", points, config.seeds, common)
    folder = get_base_dir() / "sweeps" / config.name
    records: list[Record] = []
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    runner = Runner(folder, config.jobs)
    runner.execute(runs, lambda found: records.__setitem__(slice(None), found))
    points = to_points(records)
    short = {b for b in budgets if sum(math.isclose(point["budget"], b) for point in points) < 3}
    if short:
        raise ValueError(f"fewer than three depths came through at {min(short):g} FLOPs: see the logs in {folder}")
    fit = fit_isoflops(points)
    atomic_write(folder / "scaling_laws.png", figure(points, fit))
    command = shlex.join(["python", "-m", "dev.scaling_laws", *sys.argv[1:]])
    laws = {"size_law": fit.size_law and vars(fit.size_law), "token_law": fit.token_law and vars(fit.token_law)}
    record = {"command": command, "points": points, **laws}
    write_report(folder / "scaling_laws", record, f"`{command}`\n\n{describe(points, fit)}")
    print(f"{folder / 'scaling_laws.png'} drawn")


if __name__ == "__main__":
    cli.run(main)
