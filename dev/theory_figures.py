"""Draw the figures of dev/theory.md into dev/figures and print their numbers: python -m dev.theory_figures"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dev.bench import markdown_table
from nanochat import cli, recipe
from nanochat.optim import orthogonalize

FOLDER = Path(__file__).resolve().parent / "figures"
VOCAB, CONTEXT = 32768, 2048


@dataclass(frozen=True)
class Config:
    """Flags."""

    out: str = cli.option(str(FOLDER), "folder for the figures")


def _axes(panels: int, width: float = 4.0) -> tuple[Any, list[Any]]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width * panels, 3.0), dpi=100, layout="constrained")
    axes = list(figure.subplots(1, panels, squeeze=False)[0])
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25)
    return figure, axes


def orthogonalize_figure() -> tuple[Any, list[dict[str, float]]]:
    """Singular values of a matrix whose spectrum falls over five decades, before and after `orthogonalize`."""
    generator = torch.Generator().manual_seed(0)
    n = 256
    u, v = (torch.linalg.qr(torch.randn(n, n, generator=generator))[0] for _ in range(2))
    spectrum = torch.logspace(0, -5, n)
    after = torch.linalg.svdvals(orthogonalize((u * spectrum @ v.mT)[None]).float()[0])
    figure, (axis,) = _axes(1, 5.0)
    axis.semilogy(range(n), spectrum, label="gradient")
    axis.semilogy(range(n), after, label="step of Muon")
    axis.set(xlabel="singular value, by size", ylabel="value")
    axis.legend(frameon=False)
    places = (0, 64, 128, 192, 255)
    return figure, [{"singular value": i, "before": spectrum[i].item(), "after": after[i].item()} for i in places]


def schedules_figure(steps: int = 2000) -> tuple[Any, list[dict[str, float]]]:
    """Factors on learning rate and weight decay, and Muon's momentum, over a run."""
    at = range(steps)
    figure, (left, right) = _axes(2)
    left.plot(at, [recipe.learning_rate_multiplier(step, steps) for step in at], label="learning rate")
    left.plot(at, [recipe.weight_decay_multiplier(step, steps) for step in at], label="weight decay")
    left.set(xlabel="step", ylabel="factor", ylim=(0, 1.05))
    left.legend(frameon=False)
    right.plot(at, [recipe.muon_momentum(step, steps) for step in at], color="C2")
    right.set(xlabel="step", ylabel="momentum of Muon")
    rows = [
        {
            "step": step,
            "learning rate": recipe.learning_rate_multiplier(step, steps),
            "weight decay": recipe.weight_decay_multiplier(step, steps),
            "momentum": recipe.muon_momentum(step, steps),
        }
        for step in (0, 40, 400, 700, 1350, 1999)
    ]
    return figure, rows


def depth_figure() -> tuple[Any, list[dict[str, float]]]:
    """Parameters, tokens and batch that follow from the depth."""
    rows = []
    for depth in (4, 6, 8, 12, 16, 20, 24, 32):
        config = recipe.model_config(depth, VOCAB, CONTEXT)
        tokens = recipe.horizon_tokens(config)
        batch = recipe.batch_tokens(tokens, recipe.reference_tokens(config))
        row = {"depth": depth, "width": config.n_embd, "parameters, M": recipe.scaling_parameters(config) / 1e6}
        row |= {"tokens, G": tokens / 1e9, "batch, K": batch / 2**10, "steps": tokens // batch}
        rows.append({**row, "learning rate": recipe.learning_rate_scale(batch)})
    figure, axes = _axes(3, 3.4)
    for axis, name in zip(axes, ("parameters, M", "tokens, G", "batch, K")):
        axis.semilogy([row["depth"] for row in rows], [row[name] for row in rows], marker="o", markersize=3)
        axis.set(xlabel="depth", title=name)
    return figure, rows


def main() -> None:
    folder = Path(cli.parse(Config, description=__doc__).out)
    folder.mkdir(parents=True, exist_ok=True)
    drawn = {"orthogonalize": orthogonalize_figure, "schedules": schedules_figure, "depth": depth_figure}
    for name, draw in drawn.items():
        figure, rows = draw()
        figure.savefig(folder / f"{name}.png", metadata={"Software": None})
        print(f"{name}\n\n{markdown_table(rows)}")
    print(f"{folder}: {', '.join(f'{name}.png' for name in drawn)}")


if __name__ == "__main__":
    cli.run(main)
