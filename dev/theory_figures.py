"""Draw the figures of dev/theory.md into dev/figures and print their numbers: python -m dev.theory_figures"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dev.bench_old import markdown_table
from nanochat import cli, recipe
from nanochat.gpt import GPTConfig, rotate
from nanochat.loss import softcap
from nanochat.optim import orthogonalize
from nanochat.request import Request
from nanochat.sampling import sample
from nanochat.scheduler import Scheduler

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
        rows.append({**row, "scalars' learning rate": recipe.learning_rate_scales(batch)["scalar"]})
    figure, axes = _axes(3, 3.4)
    for axis, name in zip(axes, ("parameters, M", "tokens, G", "batch, K")):
        axis.semilogy([row["depth"] for row in rows], [row[name] for row in rows], marker="o", markersize=3)
        axis.set(xlabel="depth", title=name)
    return figure, rows


def positions_figure(head_dim: int = 128, layers: int = 8) -> tuple[Any, list[dict[str, float]]]:
    """The product of a turned vector of ones with itself, by distance; and how far back each layer's outputs reach."""
    distance = torch.arange(CONTEXT)
    speeds = 100_000.0 ** (-torch.arange(0, head_dim, 2) / head_dim)
    angles = (distance[:, None] * speeds)[None, :, None]
    turned = rotate(torch.ones(1, CONTEXT, 1, head_dim), angles.cos(), angles.sin())[0, :, 0]
    product = turned @ turned[0] / head_dim
    figure, (left, right) = _axes(2)
    left.plot(distance, product)
    left.set(xlabel="positions apart", ylabel="q·k, of 1 at equal positions", xscale="symlog")
    windows = GPTConfig(CONTEXT, VOCAB, layers, 1, 1, head_dim).windows
    reach = [0]
    for window in windows:
        reach.append(min(CONTEXT - 1, reach[-1] + window - 1))
    right.step(range(1, layers + 1), reach[1:], where="mid", label="SSSL")
    right.bar(range(1, layers + 1), windows, color="C1", alpha=0.3, label="window of the layer")
    right.set(xlabel="layer", ylabel="positions back")
    right.legend(frameon=False)
    return figure, [
        {"layer": i + 1, "window": windows[i], "reaches back": reach[i + 1], "apart": 2**i, "q·k": product[2**i].item()}
        for i in range(layers)
    ]


def nonlinear_figure() -> tuple[Any, list[dict[str, float]]]:
    """The softcap of logits, and the squared ReLU beside the plain one."""
    z, x = torch.linspace(-60, 60, 241), torch.linspace(-2, 2, 201)
    figure, (left, right) = _axes(2)
    left.plot(z, softcap(z, 15.0), label="15·tanh(z/15)")
    left.plot(z, z.clamp(-15, 15), ":", label="z, cut")
    left.set(xlabel="z", ylabel="logit")
    right.plot(x, x.relu().square(), label="ReLU²")
    right.plot(x, x.relu(), ":", label="ReLU")
    right.set(xlabel="x")
    left.legend(frameon=False), right.legend(frameon=False)
    return figure, [{"z": z, "logit": softcap(torch.tensor(z), 15.0).item()} for z in (1.0, 5.0, 15.0, 30.0, 60.0)]


def sampling_figure(draws: int = 4000) -> tuple[Any, list[dict[str, float]]]:
    """Ten tokens with logits that fall by a half each: e^(z/T), and how often the sampler draws each."""
    logits_V = -0.5 * torch.arange(10.0)
    figure, (axis,) = _axes(1, 5.0)
    rows = []
    for number, temperature in enumerate((0.5, 1.0, 2.0)):
        expected = (logits_V / temperature).softmax(-1)
        requests = [Request([0], temperature=temperature, seed=i) for i in range(draws)]
        numbers = [request.random.random() for request in requests]
        drawn = sample(logits_V.expand(draws, -1), requests, numbers).bincount(minlength=10) / draws
        axis.plot(expected, color=f"C{number}", label=f"temperature {temperature}")
        axis.plot(drawn, "o", color=f"C{number}", markersize=4)
        rows += [
            {
                "temperature": temperature,
                "token": token,
                "e^(z/T)": expected[token].item(),
                "drawn": drawn[token].item(),
            }
            for token in (0, 3, 6)
        ]
    axis.set(xlabel="token, by logit", ylabel="probability (dots: drawn)")
    axis.legend(frameon=False)
    return figure, rows


class _Room:
    """A cache in which everything fits and nothing is known; for the scheduler."""

    def fits(self, sizes: Sequence[int]) -> bool:
        return True

    def attach(self, request: Request, running: Sequence[Request], twin: Request | None) -> int:
        return 0

    def move(self, source: int, target: int, size: int) -> None:
        pass


def _continuous(lengths: list[int], places: int) -> list[list[int]]:
    """Which answer (from 1; 0 = none) each place works on, step by step, by the scheduler."""
    scheduler = Scheduler(_Room(), places, 256)
    requests = [Request([i], length, sample=i) for i, length in enumerate(lengths)]
    for request in requests:
        scheduler.add(request)
    place: dict[int, int] = {}
    steps = []
    while scheduler.waiting or scheduler.running:
        decode, prefill = scheduler.schedule()
        line = [0] * places
        for request, n in [(request, 1) for request in decode] + prefill:
            number = request.sample
            if number not in place:
                place[number] = min(set(range(places)) - set(place.values()))
            line[place[number]] = number + 1
            request.n_read += n
            if not request.n_pending:
                request.output.append(0)
        for request in [each for each in scheduler.running if len(each.output) == each.max_tokens]:
            scheduler.remove(request)
            del place[request.sample]
        steps.append(line)
    return steps


def batching_figure(answers: int = 48, places: int = 8) -> tuple[Any, list[dict[str, float]]]:
    """Places over time: batches that wait for their longest answer, and the scheduler's."""
    rng = random.Random(0)
    lengths = [1 + min(63, int(rng.expovariate(1 / 16))) for _ in range(answers)]
    waiting = []
    for first in range(0, answers, places):
        batch = range(first, min(first + places, answers))
        for step in range(max(lengths[i] for i in batch)):
            waiting.append([i + 1 if step < lengths[i] else 0 for i in batch])
    forms = {"batches that wait": waiting, "continuous": _continuous(lengths, places)}
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.4), dpi=100, layout="constrained")
    for axis, (name, steps) in zip(figure.subplots(2, 1, sharex=True), forms.items()):
        shades = [[((cell * 7) % 20 + 1) / 21 if cell else float("nan") for cell in line] for line in steps]
        axis.imshow(torch.tensor(shades).T, aspect="auto", interpolation="nearest", cmap="tab20", vmin=0, vmax=1)
        axis.set(title=f"{name}: {len(steps)} steps", ylabel="place", yticks=[])
    axis.set(xlabel="step", xlim=(-0.5, max(map(len, forms.values())) - 0.5))
    busy = {name: sum(cell > 0 for line in steps for cell in line) for name, steps in forms.items()}
    return figure, [
        {"form": name, "tokens": busy[name], "steps": len(steps), "places in use": busy[name] / len(steps) / places}
        for name, steps in forms.items()
    ]


def main() -> None:
    folder = Path(cli.parse(Config, description=__doc__).out)
    folder.mkdir(parents=True, exist_ok=True)
    drawn = {
        "positions": positions_figure,
        "nonlinear": nonlinear_figure,
        "orthogonalize": orthogonalize_figure,
        "schedules": schedules_figure,
        "depth": depth_figure,
        "sampling": sampling_figure,
        "batching": batching_figure,
    }
    for name, draw in drawn.items():
        figure, rows = draw()
        figure.savefig(folder / f"{name}.png", metadata={"Software": None})
        print(f"{name}\n\n{markdown_table(rows)}")
    print(f"{folder}: {', '.join(f'{name}.png' for name in drawn)}")


if __name__ == "__main__":
    cli.run(main)
