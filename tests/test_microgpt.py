"""The GPT on scalar autograd against torch: gradients, losses, optimizers; and its commands."""

import csv
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dev.microgpt import (
    SGD,
    AdamW,
    Sample,
    ScalarGPT,
    Shape,
    Train,
    Value,
    cross_entropy,
    dot,
    draw,
    read_text,
    schedule,
    softmax,
    starting_weights,
    train,
)
from dev.microgpt_tensor import TensorGPT

ROOT = Path(__file__).resolve().parent.parent
SMALL = {"steps": 50, "batch": 2, "context": 6, "width": 8, "characters": 400, "eval_every": 10}


OPERATIONS = [  # on Values, and on torch's scalars
    (lambda a, b: a + b,) * 2,
    (lambda a, b: 1.5 - a,) * 2,
    (lambda a, b: a * b,) * 2,
    (lambda a, b: a - b,) * 2,
    (lambda a, b: a / (b**2 + 1.0),) * 2,
    (lambda a, b: (a * a + 2.0) ** -0.5,) * 2,
    (lambda a, b: (a * a * -1.0).exp(),) * 2,
    (lambda a, b: (a**2 + 0.5).log(),) * 2,
    (lambda a, b: a.relu(),) * 2,
    (lambda a, b: dot([a, b, a], [b, b, a]), lambda a, b: a * b + b * b + a * a),
]


def random_expression(rng, leaves, tensors):
    """The same random expression of `leaves` (Values) and `tensors` (torch scalars)."""
    nodes = list(zip(leaves, tensors))
    for _ in range(rng.randint(5, 25)):
        ours, theirs = rng.choice(OPERATIONS)
        (a, ta), (b, tb) = rng.choice(nodes), rng.choice(nodes)
        result = ours(a, b), theirs(ta, tb)
        if abs(result[0].data) < 1e3:
            nodes.append(result)
    return nodes[-1]


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 10**9))
def test_gradients_of_random_expressions_are_those_of_torch(seed):
    rng = random.Random(seed)
    numbers = [rng.uniform(-2, 2) for _ in range(4)]
    leaves = [Value(x) for x in numbers]
    tensors = [torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in numbers]
    value, tensor = random_expression(rng, leaves, tensors)
    value.backward()
    assert value.data == pytest.approx(tensor.item(), rel=1e-12, abs=1e-12)
    wanted = torch.autograd.grad(tensor, tensors, allow_unused=True) if tensor.requires_grad else [None] * 4
    for leaf, gradient in zip(leaves, wanted):
        expected = 0.0 if gradient is None else gradient.item()
        assert abs(leaf.grad - expected) <= 1e-9 * max(1.0, abs(expected))


def test_a_second_backward_adds_to_leaves_alone():
    """As torch with retain_graph: what lies between is not passed on twice."""
    a, b = Value(1.5), Value(-0.5)
    ta, tb = (torch.tensor(x.data, dtype=torch.float64, requires_grad=True) for x in (a, b))
    y, ty = a * b + a, ta * tb + ta
    for ours, theirs in ((y + 1.0, ty + 1.0), (y * 2.0, ty * 2.0), (y * y, ty * ty), (a, ta)):
        ours.backward()
        theirs.backward(retain_graph=True)
        assert (a.grad, b.grad) == pytest.approx((ta.grad.item(), tb.grad.item()))


def test_cross_entropy_is_torchs_even_where_the_share_rounds_to_nothing():
    for logits in ([0.3, -1.2, 2.0], [1000.0, 0.0, -1000.0]):
        values, tensor = [Value(x) for x in logits], torch.tensor(logits, dtype=torch.float64, requires_grad=True)
        ours = cross_entropy(values, 1)
        theirs = torch.nn.functional.cross_entropy(tensor[None], torch.tensor([1]))
        ours.backward()
        theirs.backward()
        assert ours.data == pytest.approx(theirs.item(), abs=1e-12)
        assert [x.grad for x in values] == pytest.approx(tensor.grad.tolist(), abs=1e-12)


def both(shape, seed=0):
    weights = starting_weights(shape, seed)
    rng = random.Random(seed)
    for name in weights:
        if name.endswith(("out", "down")):  # begins at zero, where half the gradients would be zero too
            weights[name] = [[rng.gauss(0, 0.3) for _ in row] for row in weights[name]]
    return ScalarGPT(shape, weights), TensorGPT(shape, weights)


def test_gradients_of_the_whole_model_are_those_of_torch():
    scalar, tensor = both(Shape(vocab_size=7, context=5, layers=2, heads=2, width=8))
    windows = [[0, 1, 2, 3, 4, 5], [6, 6, 1, 0, 2, 4]]
    ours, theirs = scalar.loss(windows), tensor.loss(windows)
    ours.backward()
    theirs.backward()
    assert abs(ours.data - theirs.item()) < 1e-12
    for name, weight in tensor.weights.items():
        grad = torch.tensor([[x.grad for x in row] for row in scalar.weights[name]], dtype=torch.float64)
        torch.testing.assert_close(grad, weight.grad, rtol=0, atol=1e-9)
        assert weight.grad.abs().max() > 0


def test_the_model_is_nanochats_with_its_extras_off():
    from nanochat.gpt import GPT, GPTConfig

    shape = Shape(vocab_size=7, context=8, layers=2, heads=2, width=16)
    off = {"qk_scale": 1.0, "softcap": 0.0, "value_embed_every": 0, "smear_channels": 0, "backout": 0.0}
    off |= {"resid_scale_first": 1.0, "resid_scale_last": 1.0, "embed_skip_first": 0.0, "embed_skip_last": 0.0}
    config = GPTConfig(8, 7, n_layer=2, n_head=2, n_kv_head=2, n_embd=16, window_pattern="L", **off)
    gpt = GPT(config, dtype=torch.float32)
    gpt.init_weights()
    _, tensor = both(shape)
    names = {
        "query": "attn.q",
        "key": "attn.k",
        "value": "attn.v",
        "out": "attn.out",
        "up": "mlp.up",
        "down": "mlp.down",
    }
    state = gpt.state_dict()
    for name, weight in tensor.weights.items():
        layer, _, part = name.partition(".")
        target = f"blocks.{layer}.{names[part]}.weight" if part else f"{name}.weight"
        state[target][: len(weight)] = weight.detach().to(state[target].dtype)
    ids_BT = torch.tensor([[0, 1, 2, 3, 4, 5, 6, 0]])
    torch.testing.assert_close(gpt(ids_BT)[..., :7].double(), tensor(ids_BT), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_scalar_and_tensor_training_have_equal_losses(optimizer):
    (scalar, *_), (tensor, *_) = (
        train(Train(**SMALL, optimizer=optimizer, tensor=tensor), show=False) for tensor in (False, True)
    )
    assert len(scalar) == 50 and scalar[-1]["loss"] < scalar[0]["loss"]
    for ours, theirs in zip(scalar, tensor):
        assert abs(ours["loss"] - theirs["loss"]) <= 1e-6 and ours["lr"] == theirs["lr"]
        if ours["val_loss"] is not None:
            assert abs(ours["val_loss"] - theirs["val_loss"]) <= 1e-6


def test_adamw_and_sgd_are_torchs():
    rng = random.Random(1)
    start = [rng.gauss(0, 1) for _ in range(20)]
    rivals = {
        AdamW: lambda p: torch.optim.AdamW(p, lr=0.1, betas=(0.9, 0.95)),
        SGD: lambda p: torch.optim.SGD(p, lr=0.1),
    }
    for ours, make in rivals.items():
        values, tensor = [Value(x) for x in start], torch.tensor(start, dtype=torch.float64, requires_grad=True)
        optimizer, theirs = ours(values), make([tensor])
        for _ in range(30):
            gradients = [rng.gauss(0, 1) for _ in start]
            for value, gradient in zip(values, gradients):
                value.grad = gradient
            tensor.grad = torch.tensor(gradients, dtype=torch.float64)
            optimizer.step(0.1)
            theirs.step()
        torch.testing.assert_close(torch.tensor([v.data for v in values], dtype=torch.float64), tensor.detach())


def test_adamw_reaches_a_loss_in_fewer_steps_than_sgd():
    """Each with the best of three learning rates, of which the middle one is best or as good as any."""

    def steps_to(optimizer, rates, target=2.6):
        counts = []
        for lr in rates:
            rows, *_ = train(Train(steps=150, optimizer=optimizer, lr=lr, tensor=True, warmdown=0.0), show=False)
            means = [sum(row["loss"] for row in rows[i : i + 10]) / 10 for i in range(140)]
            counts.append(next((i for i, mean in enumerate(means) if mean <= target), 1000))
        return min(counts)

    adamw, sgd = steps_to("adamw", (0.02, 0.04, 0.08)), steps_to("sgd", (0.5, 1.0, 2.0))
    assert adamw < 150 and adamw < sgd


def test_the_held_out_loss_is_of_text_that_training_never_reads():
    config = Train(**{**SMALL, "steps": 10})
    text = read_text(config)
    cut = len(text) * 9 // 10
    _, model, alphabet = train(config, show=False)
    held_out = [alphabet.index(c) for c in text[cut:]]
    windows = [held_out[i : i + 7] for i in range(0, len(held_out) - 6, 6)][:16]
    rows, *_ = train(config, show=False)
    assert rows[-1]["val_loss"] == pytest.approx(model.loss(windows).data, abs=1e-12)


def test_training_is_the_same_whatever_the_held_out_text(tmp_path):
    text = read_text(Train(**SMALL))
    cut, runs = len(text) * 9 // 10, []
    for number, held_out in enumerate((text[cut:], text[cut:][::-1])):
        path = tmp_path / f"{number}.txt"
        path.write_text(text[:cut] + held_out)
        runs.append(train(Train(**{**SMALL, "steps": 10}, text=str(path)), show=False))
    (rows, model, _), (others, other, _) = runs
    assert [row["loss"] for row in rows] == [row["loss"] for row in others]
    assert model.plain_weights() == other.plain_weights()
    assert rows[-1]["val_loss"] != others[-1]["val_loss"]


def test_schedule_rises_and_falls_linearly():
    factors = [schedule(step, 100, warmup=10, warmdown=0.5) for step in range(100)]
    assert factors[0] == pytest.approx(1 / 11) and factors[10:50] == [1.0] * 40 and factors[-1] == pytest.approx(0.02)
    assert factors[:11] == sorted(factors[:11]) and factors[50:] == sorted(factors[50:], reverse=True)


def test_softmax_and_draw_follow_their_definition():
    logits = [0.3, -1.2, 2.0]
    wanted = torch.tensor(logits, dtype=torch.float64).softmax(0).tolist()
    assert [x.data for x in softmax([Value(x) for x in logits])] == pytest.approx(wanted)
    assert draw(logits, 0, random.Random(0)) == 2
    rng, n = random.Random(0), 20_000
    tokens = [draw(logits, 0.5, rng) for _ in range(n)]
    halved = torch.tensor(logits, dtype=torch.float64).div(0.5).softmax(0).tolist()
    for token, p in enumerate(halved):
        assert abs(tokens.count(token) / n - p) < 5 * (p * (1 - p) / n) ** 0.5


def test_the_file_needs_neither_torch_nor_numpy():
    code = "import sys, dev.microgpt; assert not {'torch', 'numpy'} & set(sys.modules), 'imported'"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, timeout=60)


def test_commands(tmp_path):
    environment = {**os.environ, "NANOCHAT_BASE_DIR": str(tmp_path)}

    def run(*arguments):
        command = [sys.executable, "-m", "dev.microgpt", *arguments]
        return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=120)

    early = run("sample")
    assert early.returncode == 2 and "microgpt train" in early.stderr and early.stderr.count("\n") == 1
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in SMALL.items()]
    trained = run("train", *flags)
    assert trained.returncode == 0, trained.stderr
    rows = list(csv.DictReader((tmp_path / "microgpt" / "losses.csv").read_text().splitlines()))
    assert len(rows) == 50 and rows[-1]["val_loss"] and not rows[0]["val_loss"]
    assert (tmp_path / "microgpt" / "losses.png").read_bytes()[:4] == b"\x89PNG"
    one, two = run("sample", "--prompt", "a", "--length", "20"), run("sample", "--prompt", "a", "--length", "20")
    assert one.stdout == two.stdout and one.stdout[0] == "a" and len(one.stdout) == 22
    tensor = run("train", *flags, "--tensor", "--out", str(tmp_path / "tensor"))
    assert tensor.returncode == 0, tensor.stderr
    for row, other in zip(rows, csv.DictReader((tmp_path / "tensor" / "losses.csv").read_text().splitlines())):
        assert float(row["loss"]) == pytest.approx(float(other["loss"]), abs=1e-6)
    again = run("sample", "--prompt", "a", "--length", "20", "--temperature", "0", "--out", str(tmp_path / "tensor"))
    assert again.stdout == run("sample", "--prompt", "a", "--length", "20", "--temperature", "0").stdout
    for bad in (["sample", "--prompt", "☃"], ["train", "--width", "7"], ["train", "--text", "/nowhere"], ["x"], []):
        result = run(*bad)
        assert result.returncode == 2 and result.stderr.strip().count("\n") == 0, (bad, result.stderr)


def test_flags_are_checked():
    nan = float("nan")
    for bad in ({"steps": 0}, {"width": 6, "heads": 2}, {"lr": 0.0}, {"lr": nan}, {"warmup": -1}, {"characters": -5}):
        with pytest.raises(ValueError, match="must be"):
            Train(**bad)
    for bad in ({"prompt": ""}, {"temperature": nan}, {"length": -1}):
        with pytest.raises(ValueError, match="--"):
            Sample(**bad)
    with pytest.raises(ValueError, match="too few"):
        train(Train(characters=50), show=False)
