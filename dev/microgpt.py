"""A GPT made of single numbers that know their gradient: the whole of training in one file, without torch or numpy.

    python -m dev.microgpt train                                    # a minute; losses as CSV and figure
    python -m dev.microgpt sample --prompt "The capital" --length 80 --temperature .7
    python -m dev.microgpt train --tensor                           # the same model from the same weights, in torch

The model is that of nanochat/gpt.py with its extras switched off: RMSNorm, rotary positions, QK-norm, ReLU² MLP,
untied head. Lists stand for vectors, lists of lists for matrices; nothing here is fast, and nothing is hidden.
"""

import csv
import gc
import math
import random
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from operator import mul
from pathlib import Path
from typing import Any

from nanochat import cli
from nanochat.common import atomic_write_json, get_base_dir, read_json
from nanochat.world_facts import World

EPS = 1e-8  # under the root of RMSNorm

# --- numbers that know their gradient --------------------------------------------------------------------------------


class Value:
    """A number, the numbers it was made from, and its slope by each of them: d(self)/d(input)."""

    __slots__ = ("data", "grad", "inputs", "slopes")

    def __init__(self, data: float, inputs: tuple["Value", ...] = (), slopes: tuple[float, ...] = ()) -> None:
        self.data = data
        self.grad = 0.0
        self.inputs = inputs
        self.slopes = slopes

    def __add__(self, other: "Value | float") -> "Value":
        if isinstance(other, Value):
            return Value(self.data + other.data, (self, other), (1.0, 1.0))
        return Value(self.data + other, (self,), (1.0,))

    def __mul__(self, other: "Value | float") -> "Value":
        if isinstance(other, Value):
            return Value(self.data * other.data, (self, other), (other.data, self.data))
        return Value(self.data * other, (self,), (other,))

    def __pow__(self, exponent: float) -> "Value":
        return Value(self.data**exponent, (self,), (exponent * self.data ** (exponent - 1),))

    def __truediv__(self, other: "Value | float") -> "Value":
        return self * other**-1

    def __neg__(self) -> "Value":
        return self * -1.0

    def __sub__(self, other: "Value | float") -> "Value":
        return self + -other

    def __rsub__(self, other: float) -> "Value":
        return -self + other

    __radd__ = __add__
    __rmul__ = __mul__

    def exp(self) -> "Value":
        """e to the power of this number."""
        e = math.exp(self.data)
        return Value(e, (self,), (e,))

    def log(self) -> "Value":
        """The natural logarithm."""
        return Value(math.log(self.data), (self,), (1 / self.data,))

    def relu(self) -> "Value":
        """This number, or 0 where it is below."""
        return Value(max(self.data, 0.0), (self,), (float(self.data > 0),))

    def backward(self) -> None:
        """The chain rule, from the end backwards: d(self)/d(x) as `x.grad` of every x that this number was made from.

        Inputs that were made from nothing, such as weights, add up what several calls bring. A number passes its
        gradient on when all that was made from it has added its part: in reverse order of making.
        """
        order = []
        seen = set()
        stack = [(self, False)]
        while stack:
            node, inputs_done = stack.pop()
            if inputs_done:
                order.append(node)
            elif node not in seen:
                seen.add(node)
                if node.inputs:
                    node.grad = 0.0
                stack.append((node, True))
                stack.extend((x, False) for x in node.inputs if x.inputs and x not in seen)
        self.grad += 1.0
        for node in reversed(order):
            grad = node.grad
            for x, slope in zip(node.inputs, node.slopes):
                x.grad += slope * grad


Vector = list[Value]
Matrix = list[Vector]


def dot(a: Sequence[Value], b: Sequence[Value]) -> Value:
    """The sum of products, as one number of many inputs instead of two numbers for each pair."""
    xs = tuple(x.data for x in a)
    ys = tuple(y.data for y in b)
    return Value(sum(map(mul, xs, ys)), (*a, *b), (*ys, *xs))


# --- the model -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shape:
    """The size of the model."""

    vocab_size: int
    context: int = 16
    layers: int = 1
    heads: int = 2
    width: int = 16


def starting_weights(shape: Shape, seed: int) -> dict[str, list[list[float]]]:
    """Plain numbers of every matrix by name, rows = outputs; projections back into the residual begin at zero."""
    rng = random.Random(seed)
    C = shape.width

    def normal(rows: int, columns: int, std: float) -> list[list[float]]:
        return [[rng.gauss(0, std) for _ in range(columns)] for _ in range(rows)]

    weights = {"embed": normal(shape.vocab_size, C, 0.8), "head": normal(shape.vocab_size, C, 0.02)}
    for layer in range(shape.layers):
        weights |= {f"{layer}.{name}": normal(C, C, C**-0.5) for name in ("query", "key", "value")}
        weights |= {f"{layer}.out": normal(C, C, 0.0), f"{layer}.up": normal(4 * C, C, 0.4 * C**-0.5)}
        weights |= {f"{layer}.down": normal(C, 4 * C, 0.0)}
    return weights


def linear(x: Vector, weight: Matrix) -> Vector:
    """Matrix times vector."""
    return [dot(row, x) for row in weight]


def rms_norm(x: Vector) -> Vector:
    """x over the root of its mean square (arXiv 1910.07467, without weights)."""
    scale = (dot(x, x) * (1 / len(x)) + EPS) ** -0.5
    return [v * scale for v in x]


def rotate(x: Vector, position: int, base: float = 100_000.0) -> Vector:
    """Rotary positions (arXiv 2104.09864): the halves of x are the two coordinates of planes that turn."""
    half = len(x) // 2
    angles = [position * base ** (-i / half) for i in range(half)]
    turned = [(x[i] * math.cos(a) - x[i + half] * math.sin(a)) for i, a in enumerate(angles)]
    return turned + [(x[i + half] * math.cos(a) + x[i] * math.sin(a)) for i, a in enumerate(angles)]


def softmax(scores: Vector) -> Vector:
    """Positive shares that add up to 1, in proportion to e^score."""
    greatest = max(score.data for score in scores)  # taken off all, it changes no share and keeps e^score finite
    powers = [(score - greatest).exp() for score in scores]
    inverse = sum(powers[1:], powers[0]) ** -1
    return [power * inverse for power in powers]


def cross_entropy(logits: Vector, target: int) -> Value:
    """-ln softmax(logits)[target] = ln Σ e^z - z_target, in nats, and finite where the share itself rounds to 0."""
    greatest = max(z.data for z in logits)
    powers = [(z - greatest).exp() for z in logits]
    return sum(powers[1:], powers[0]).log() + greatest - logits[target]


class ScalarGPT:
    """The transformer, one position at a time: what later positions may see is what earlier ones left behind."""

    def __init__(self, shape: Shape, weights: dict[str, list[list[float]]]) -> None:
        self.shape = shape
        self.weights = {name: [[Value(x) for x in row] for row in matrix] for name, matrix in weights.items()}

    def parameters(self) -> list[Value]:
        """Every number that is trained."""
        return [x for matrix in self.weights.values() for row in matrix for x in row]

    def plain_weights(self) -> dict[str, list[list[float]]]:
        """The weights as plain numbers."""
        return {name: [[x.data for x in row] for row in matrix] for name, matrix in self.weights.items()}

    def __call__(self, tokens: Sequence[int]) -> list[Vector]:
        """Logits of the next token at every position of one sequence."""
        seen: list[tuple[list[Matrix], list[Matrix]]] = [([], []) for _ in range(self.shape.layers)]
        return [self._position(token, t, seen) for t, token in enumerate(tokens)]

    def _position(self, token: int, t: int, seen: list[tuple[list[Matrix], list[Matrix]]]) -> Vector:
        x = rms_norm(self.weights["embed"][token])
        for layer, (keys, values) in enumerate(seen):
            x = [a + b for a, b in zip(x, self._attention(rms_norm(x), layer, t, keys, values))]
            hidden = [h.relu() ** 2 for h in linear(rms_norm(x), self.weights[f"{layer}.up"])]
            x = [a + b for a, b in zip(x, linear(hidden, self.weights[f"{layer}.down"]))]
        return linear(rms_norm(x), self.weights["head"])

    def _attention(self, x: Vector, layer: int, t: int, keys: list[Matrix], values: list[Matrix]) -> Vector:
        D = self.shape.width // self.shape.heads

        def split(name: str) -> Matrix:
            y = linear(x, self.weights[f"{layer}.{name}"])
            return [y[start : start + D] for start in range(0, len(y), D)]

        queries = [rms_norm(rotate(q, t)) for q in split("query")]
        keys.append([rms_norm(rotate(k, t)) for k in split("key")])
        values.append(split("value"))
        mixed: Vector = []
        for head, query in enumerate(queries):
            shares = softmax([dot(query, key[head]) * D**-0.5 for key in keys])
            mixed += [dot(shares, column) for column in zip(*(value[head] for value in values))]
        return linear(mixed, self.weights[f"{layer}.out"])

    def loss(self, windows: Sequence[Sequence[int]]) -> Value:
        """Mean negative log-likelihood in nats of each token after the first of its window."""
        pairs = [pair for window in windows for pair in zip(self(window[:-1]), window[1:])]
        losses = [cross_entropy(logits, target) for logits, target in pairs]
        return sum(losses[1:], losses[0]) * (1 / len(losses))


# --- training --------------------------------------------------------------------------------------------------------


class SGD:
    """Each number a step down its slope."""

    def __init__(self, parameters: list[Value]) -> None:
        self.parameters = parameters

    def step(self, lr: float) -> None:
        """Update every parameter and forget its gradient."""
        for p in self.parameters:
            p.data -= lr * p.grad
            p.grad = 0.0


class AdamW:
    """Steps of about `lr` whatever the gradient's size, and weights that shrink by themselves (arXiv 1711.05101)."""

    betas = (0.9, 0.95)
    eps = 1e-8
    weight_decay = 0.01

    def __init__(self, parameters: list[Value]) -> None:
        self.parameters = parameters
        self.steps = 0
        self.means = [0.0] * len(parameters)
        self.squares = [0.0] * len(parameters)

    def step(self, lr: float) -> None:
        """Update every parameter and forget its gradient."""
        self.steps += 1
        b1, b2 = self.betas
        c1 = 1 - b1**self.steps  # both averages begin at 0, and are too small by these factors
        c2 = 1 - b2**self.steps
        for i, p in enumerate(self.parameters):
            self.means[i] = b1 * self.means[i] + (1 - b1) * p.grad
            self.squares[i] = b2 * self.squares[i] + (1 - b2) * p.grad**2
            p.data -= lr * self.weight_decay * p.data
            p.data -= lr * self.means[i] / c1 / (math.sqrt(self.squares[i] / c2) + self.eps)
            p.grad = 0.0


def schedule(step: int, steps: int, warmup: int, warmdown: float) -> float:
    """Factor on the learning rate: up to 1 over `warmup` steps, and to 0 over the last `warmdown` share of all."""
    return max(0.0, min(1.0, (step + 1) / (warmup + 1), (steps - step) / max(1.0, warmdown * steps)))


@dataclass(frozen=True)
class Train:
    """Flags of training."""

    text: str | None = cli.option(None, "file to learn from, in UTF-8; unset: sentences of the built-in world")
    characters: int = cli.option(3000, "characters of it; the last tenth is held out")
    steps: int = cli.option(200, "training steps")
    batch: int = cli.option(4, "windows a step")
    context: int = cli.option(16, "characters a window predicts")
    layers: int = cli.option(1, "layers")
    heads: int = cli.option(2, "attention heads")
    width: int = cli.option(16, "channels")
    optimizer: str = cli.option("adamw", "what trains", ("adamw", "sgd"))
    lr: float | None = cli.option(None, "learning rate at its height; unset: .02 for adamw, .5 for sgd")
    warmup: int = cli.option(10, "steps until the learning rate is at its height")
    warmdown: float = cli.option(0.5, "share of the steps over which it falls to 0")
    eval_every: int = cli.option(20, "steps between evaluations on the held-out text")
    seed: int = cli.option(0, "seed of weights and windows")
    tensor: bool = cli.option(False, "in torch instead, in fp64: the same losses, faster")
    out: str | None = cli.option(None, "folder for the results; unset: microgpt in the base directory")

    def __post_init__(self) -> None:
        sizes = ("characters", "steps", "batch", "context", "layers", "heads", "width", "eval_every")
        cli.require_positive(self, *sizes, "lr")
        cli.require_positive(self, "warmup", "warmdown", zero=True)
        if self.width % (2 * self.heads):
            raise ValueError(f"--width {self.width}: must be a multiple of {2 * self.heads}, twice --heads")


def read_text(config: Train) -> str:
    """The characters to learn from: of a file, or facts of the built-in world."""
    if config.text is not None:
        text = Path(config.text).read_text(encoding="utf-8", errors="replace")
    else:
        sentences = [fact.sentence for fact in World().on_side("chat")]
        random.Random(config.seed).shuffle(sentences)
        text = "\n".join(sentences)
    text = text[: config.characters]
    if len(text) // 10 <= config.context:
        raise ValueError(f"{len(text)} characters are too few: a tenth of them must hold a window of {config.context}")
    return text


def train(config: Train, show: bool = True) -> tuple[list[dict[str, float]], Any, str]:
    """Train as the flags say; returns a row a step (step, loss, val_loss, lr), the model, and its alphabet."""
    text = read_text(config)
    alphabet = "".join(sorted(set(text)))
    tokens = [alphabet.index(character) for character in text]
    cut = len(tokens) * 9 // 10
    T = config.context
    training = tokens[:cut]
    held_out = tokens[cut:]
    held_out = [held_out[i : i + T + 1] for i in range(0, len(held_out) - T, T)][:16]
    shape = Shape(len(alphabet), T, config.layers, config.heads, config.width)
    weights = starting_weights(shape, config.seed)
    if config.tensor:
        from dev.microgpt_tensor import TensorAdamW, TensorGPT, TensorSGD

        model = TensorGPT(shape, weights)
        optimizer = {"adamw": TensorAdamW, "sgd": TensorSGD}[config.optimizer](model.parameters())
    else:
        model = ScalarGPT(shape, weights)
        optimizer = {"adamw": AdamW, "sgd": SGD}[config.optimizer](model.parameters())
    lr = config.lr or {"adamw": 0.02, "sgd": 0.5}[config.optimizer]
    rng = random.Random(config.seed)
    rows = []
    for step in range(config.steps):
        starts = [rng.randrange(cut - T) for _ in range(config.batch)]
        loss = model.loss([training[start : start + T + 1] for start in starts])
        loss.backward()
        now = lr * schedule(step, config.steps, config.warmup, config.warmdown)
        optimizer.step(now)
        row = {"step": step + 1, "loss": float(loss.data), "val_loss": None, "lr": now}
        if (step + 1) % config.eval_every == 0 or step + 1 == config.steps:
            row["val_loss"] = float(model.loss(held_out).data)
            if show:
                print(f"step {step + 1:4d}  loss {row['loss']:.4f}  held out {row['val_loss']:.4f}", flush=True)
        rows.append(row)
    return rows, model, alphabet


def draw(logits: Iterable[float], temperature: float, rng: random.Random) -> int:
    """A token drawn with the probabilities softmax(logits / temperature); the likeliest at temperature 0."""
    logits = list(logits)
    greatest = max(logits)
    if temperature == 0:
        return logits.index(greatest)
    return rng.choices(range(len(logits)), [math.exp((x - greatest) / temperature) for x in logits])[0]


# --- commands --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sample:
    """Flags of sampling."""

    prompt: str = cli.option("The ", "text to go on from")
    length: int = cli.option(60, "characters to write")
    temperature: float = cli.option(0.7, "0: the likeliest character; 1: as the model believes; above: wilder")
    seed: int = cli.option(0, "seed of the draw")
    out: str | None = cli.option(None, "folder of the results; unset: microgpt in the base directory")

    def __post_init__(self) -> None:
        cli.require_positive(self, "length", "temperature", zero=True)
        if not self.prompt:
            raise ValueError("--prompt: give it a character to go on from")


def save_figure(rows: Sequence[dict[str, float]], path: Path) -> None:
    """Both losses by step."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.4), dpi=110, layout="constrained")
    axis = figure.subplots()
    axis.plot([row["step"] for row in rows], [row["loss"] for row in rows], alpha=0.4, label="training")
    held_out = [(row["step"], row["val_loss"]) for row in rows if row["val_loss"] is not None]
    axis.plot(*zip(*held_out), marker="o", markersize=3, label="held out")
    axis.set(xlabel="step", ylabel="loss, nats a character")
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False)
    figure.savefig(path)


def train_command(config: Train) -> None:
    """Train, and write weights, losses and figure."""
    gc.disable()  # a step's numbers form no cycles, and looking for cycles among them takes half the time
    if config.tensor:
        import torch

        torch.set_num_threads(1)  # on tensors as small as these, threads wait longer than they work
    rows, model, alphabet = train(config)
    folder = Path(config.out) if config.out else get_base_dir() / "microgpt"
    saved = {"shape": asdict(model.shape), "alphabet": alphabet, "weights": model.plain_weights()}
    atomic_write_json(folder / "model.json", saved)
    with open(folder / "losses.csv", "w", encoding="utf-8", newline="") as f:
        writer = csv.DictWriter(f, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    save_figure(rows, folder / "losses.png")
    print(f"{folder}: model.json, losses.csv, losses.png")


def sample_command(config: Sample) -> None:
    """Continue a prompt with the model that was trained last."""
    path = (Path(config.out) if config.out else get_base_dir() / "microgpt") / "model.json"
    if not path.exists():
        raise ValueError(f"{path} is missing: run `python -m dev.microgpt train` first")
    saved = read_json(path)
    alphabet = saved["alphabet"]
    model = ScalarGPT(Shape(**saved["shape"]), saved["weights"])
    if unknown := sorted(set(config.prompt) - set(alphabet)):
        raise ValueError(f"--prompt: the model has never seen {' '.join(map(repr, unknown))}; it knows {alphabet!r}")
    tokens = [alphabet.index(character) for character in config.prompt]
    rng = random.Random(config.seed)
    print(config.prompt, end="", flush=True)
    for _ in range(config.length):
        logits = model(tokens[-model.shape.context :])[-1]
        tokens.append(draw((x.data for x in logits), config.temperature, rng))
        print(alphabet[tokens[-1]], end="", flush=True)
    print()


def main() -> None:
    commands = {"train": (Train, train_command), "sample": (Sample, sample_command)}
    if len(sys.argv) < 2 or sys.argv[1] not in commands:
        raise ValueError("give a command: python -m dev.microgpt train|sample [--help]")
    config, command = commands[sys.argv[1]]
    command(cli.parse(config, sys.argv[2:], description=__doc__))


if __name__ == "__main__":
    cli.run(main)
