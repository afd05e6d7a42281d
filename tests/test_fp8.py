"""fp8 products. Oracle: the same roundings done by casts, and the product of what they leave in fp32."""

import shutil

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from nanochat import fp8
from nanochat.gpt import GPT, GPTConfig, build_model
from nanochat.kernels import Kernels

CPU = torch.device("cpu")
DEVICES = [CPU, *([torch.device("cuda", 0)] if torch.cuda.is_available() else [])]
E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
SMALL = {"sequence_len": 32, "vocab_size": 96, "n_layer": 2, "n_head": 2, "n_kv_head": 2, "n_embd": 128}

needs_fp8 = pytest.mark.skipif(not fp8.works(CPU), reason="this PyTorch has no fp8 products on CPU")


def rounded(x, dtype):
    """x as fp8 holds it: its largest magnitude on the largest that fits."""
    scale = x.abs().max() / torch.finfo(dtype).max
    return (x / scale).to(dtype).float() * scale


def make(N, C, D, dtype=torch.float32, device=CPU, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x, w, grad = (torch.randn(shape, generator=generator) for shape in ((N, C), (D, C), (N, D)))
    return x.to(device, dtype).requires_grad_(), (w / C**0.5).to(device).requires_grad_(), grad.to(device, dtype)


def distance(a, b):
    return ((a.float() - b.float()).norm() / b.float().norm()).item()


@settings(max_examples=60, deadline=None)
@given(
    exponent=st.integers(-28, 36),
    spread=st.floats(0, 12),
    dtype=st.sampled_from([E4M3, E5M2]),
    source=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 1000),
)
def test_scaling_fills_the_range_and_never_leaves_it(exponent, spread, dtype, source, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(97, generator=generator) * 2 ** (spread * torch.randn(97, generator=generator))
    x = (x / x.abs().max() * 10.0**exponent).to(source)
    x8, scale = fp8.quantise(x, dtype)
    info, back = torch.finfo(dtype), x8.float() * scale
    assert x8.dtype == dtype and scale.dtype == torch.float32 and scale.ndim == 0
    assert torch.isfinite(x8.float()).all() and x8.float().abs().max() == info.max
    # half a unit of the last place, or half of the smallest step near zero
    bound = torch.maximum(x.float().abs() * info.eps / 2, scale * info.smallest_normal * info.eps / 2)
    assert ((back - x.float()).abs() <= bound * 1.001).all()


@pytest.mark.parametrize("dtype", [E4M3, E5M2])
def test_zeros_stay_zeros(dtype):
    x8, scale = fp8.quantise(torch.zeros(4, 4), dtype)
    assert torch.equal(x8.float(), torch.zeros(4, 4)) and scale > 0


@needs_fp8
@pytest.mark.parametrize("bad", [float("inf"), float("-inf"), float("nan")])
def test_what_is_not_finite_stays_visible(bad):
    """Rounded to the largest number it would let a diverged run go on."""
    x, w, _ = make(16, 32, 48)
    with torch.no_grad():
        x[3, 5] = bad
        assert not torch.isfinite(fp8.linear(x, w)).all()


@needs_fp8
@pytest.mark.parametrize("device", DEVICES, ids=str)
@pytest.mark.parametrize("N, C, D", [(16, 16, 16), (64, 128, 48), (32, 48, 160)])
def test_forward_and_backward_equal_the_emulation(N, C, D, device):
    if not fp8.works(device):
        pytest.skip("this GPU has no fp8 products")
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    x, w, grad = make(N, C, D, dtype, device)
    y = fp8.linear(x, w)
    y.backward(grad)
    x_, w_ = rounded(x.detach().float(), E4M3), rounded(w.detach(), E4M3)
    grad_ = rounded(grad.float(), E5M2)
    assert (y.dtype, x.grad.dtype, w.grad.dtype) == (dtype, dtype, torch.float32)
    for got, expected in ((y, x_ @ w_.T), (x.grad, grad_ @ w_), (w.grad, grad_.T @ x_)):
        assert distance(got, expected) < (1e-5 if dtype == torch.float32 else 5e-3)


@needs_fp8
def test_errors_are_those_of_three_and_two_bits_of_mantissa():
    """Rounding to e4m3 moves a value by up to 1/16 of itself, to e5m2 by up to 1/8; over many, by about .4 of that."""
    x, w, grad = make(256, 256, 256)
    y = fp8.linear(x, w)
    y.backward(grad)
    assert 0.02 < distance(y, x @ w.T) < 0.05
    assert 0.03 < distance(x.grad, grad @ w) < 0.08
    assert 0.03 < distance(w.grad, grad.T @ x) < 0.08


@needs_fp8
def test_leading_dimensions_and_rows_that_do_not_fit():
    x, w, _ = make(32, 32, 48)
    assert torch.equal(fp8.linear(x.view(2, 4, 4, 32), w), fp8.linear(x, w).view(2, 4, 4, 48))
    assert torch.equal(fp8.linear(x[:31], w), F.linear(x[:31], w))  # 31 rows are no multiple of 16


@pytest.mark.parametrize(
    "n_in, n_out, gains", [(128, 128, True), (768, 3072, True), (112, 768, False), (12, 6, False), (136, 768, False)]
)
def test_which_matrices_gain(n_in, n_out, gains):
    assert fp8.gains(n_in, n_out) == gains


def model(in_fp8=False):
    model = GPT(GPTConfig(**SMALL), torch.bfloat16, embed_dtype=torch.float32, kernels=Kernels(fp8=in_fp8))
    model.init_weights(torch.Generator().manual_seed(0))
    with torch.no_grad():
        for block in model.blocks:
            for matrix in (block.attn.out, block.mlp.down):  # zero at the start: nothing would be tested
                matrix.weight.normal_(std=0.05, generator=torch.Generator().manual_seed(1))
    return model


def tokens(seed=0):
    return torch.randint(0, 96, (2, 32), generator=torch.Generator().manual_seed(seed))


@needs_fp8
def test_a_model_in_fp8_differs_in_training_and_is_the_bf16_model_in_evaluation():
    plain, short = model(), model(in_fp8=True)
    assert short.state_dict().keys() == plain.state_dict().keys()
    expected = plain(tokens(), tokens(1))
    trained = short.train()(tokens(), tokens(1))
    assert not torch.equal(trained, expected) and abs(trained - expected) < 0.05 * expected
    assert torch.equal(short.eval()(tokens(), tokens(1)), expected)


@needs_fp8
def test_training_in_fp8_follows_training_in_bf16():
    losses = {}
    for name in ("bf16", "fp8"):
        trained = model(in_fp8=name == "fp8").train()
        optimizer = torch.optim.AdamW(trained.parameters(), lr=3e-3)
        for _ in range(25):
            loss = trained(tokens(), tokens(1))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        losses[name] = loss.item()
    assert losses["bf16"] < 2  # from 4.6
    assert losses["fp8"] == pytest.approx(losses["bf16"], rel=0.15)


def test_where_fp8_cannot_work_it_is_refused_with_the_remedy(monkeypatch):
    with pytest.raises(ValueError, match="--fp8 needs a GPU"):
        build_model(GPTConfig(**SMALL), CPU, train=True, fp8=True)
    gpu = torch.device("cuda")
    monkeypatch.setattr(fp8, "what_fails", lambda device: "RuntimeError: no kernel for sm_75")
    with pytest.raises(ValueError, match=r"--fp8 needs a GPU.*no kernel for sm_75"):
        fp8.check(gpu, width=768)
    monkeypatch.setattr(fp8, "what_fails", lambda device: None)
    with pytest.raises(ValueError, match="--depth"):
        fp8.check(gpu, width=64)


@needs_fp8
@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="torch.compile needs a C++ compiler")
def test_compiled_equals_eager_in_one_graph():
    """No graph break: casts and scales can join what stands before and after the products."""
    x, w, grad = make(32, 64, 48)
    results = []
    for form in (fp8.linear, torch.compile(fp8.linear, dynamic=False, fullgraph=True)):
        x.grad = w.grad = None
        y = form(x, w)
        y.backward(grad)
        results.append((y.detach(), x.grad, w.grad))
    for got, expected in zip(*results, strict=True):
        assert distance(got, expected) < 1e-2  # a fused scale may round one value the other way


def test_a_failed_trial_keeps_its_reason(monkeypatch):
    def fail(*arguments):
        raise RuntimeError("cuBLAS has no room for its workspace")

    monkeypatch.setattr(fp8, "linear", fail)
    assert fp8.what_fails(CPU) == "RuntimeError: cuBLAS has no room for its workspace"
    assert not fp8.works(CPU)
