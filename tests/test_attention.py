"""Attention. Oracles: the definition, itself held against torch's own attention under an explicit mask."""

import itertools
import sys

import pytest
import torch
import torch.nn.functional as F
from torch.profiler import ProfilerActivity, profile

from nanochat import attention
from nanochat.attention import attend_naive, cached_attention, choose

CPU = torch.device("cpu")
DEVICES = [CPU, *([torch.device("cuda", 0)] if torch.cuda.is_available() else [])]


@pytest.fixture(autouse=True)
def forget_choices():
    """Probes are remembered for the life of a process; a test that plants a backend must not leave one behind."""
    choose.cache_clear()
    yield
    choose.cache_clear()


def make(T, H=4, K=2, D=16, B=2, seed=0, dtype=torch.float32, device=CPU):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(B, T, heads, D, generator=generator).to(device, dtype) for heads in (H, K, K)]


def masked_sdpa(q_BTHD, k_BTKD, v_BTKD, window):
    """torch's attention with the mask of a causal window written out."""
    T = q_BTHD.size(1)
    distance_TT = torch.arange(T)[:, None] - torch.arange(T)
    seen_TT = ((distance_TT >= 0) & (distance_TT < window)).to(q_BTHD.device)
    q, k, v = (x.transpose(1, 2) for x in (q_BTHD, k_BTKD, v_BTKD))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=seen_TT, enable_gqa=True).transpose(1, 2)


def forward_backward(attend, q, k, v, window):
    """The output and the gradients of a sum weighted unevenly, so that no error cancels."""
    q, k, v = (x.clone().requires_grad_() for x in (q, k, v))
    y = attend(q, k, v, window)
    weights = torch.linspace(-1, 1, y.numel(), device=y.device).view(y.shape)
    (y.float() * weights).sum().backward()
    return y.detach(), q.grad, k.grad, v.grad


def assert_same(attend, oracle, q, k, v, window, tolerance):
    results = (forward_backward(form, q, k, v, window) for form in (attend, oracle))
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("window", [1, 5, 33, 1000])
@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (4, 1)])
def test_the_definition_equals_torch_under_an_explicit_mask(window, heads):
    assert_same(attend_naive, masked_sdpa, *make(33, *heads), window, 1e-5)


CASES = [
    (device, window, T)
    for device, window, T in itertools.product(DEVICES, (128, 256, 512), (1, 127, 128, 129, 300, 512))
    if window <= T or window == 128
]


@pytest.mark.parametrize("device, window, T", CASES, ids=str)
@pytest.mark.parametrize("heads", [(4, 4), (4, 2)], ids=["mha", "gqa"])
def test_the_chosen_backend_equals_the_definition(device, window, T, heads):
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    attend = choose(device, dtype, 16 if device.type == "cpu" else 64, window < T)[1]
    q, k, v = make(T, *heads, D=16 if device.type == "cpu" else 64, dtype=dtype, device=device)
    assert_same(attend, masked_sdpa, q, k, v, window, 2e-5 if dtype == torch.float32 else 5e-2)


@pytest.mark.parametrize("windowed", [True, False])
def test_bf16_stays_close_to_fp32(windowed):
    attend = choose(CPU, torch.bfloat16, 16, windowed)[1]
    q, k, v = make(300, dtype=torch.bfloat16)
    expected = attend_naive(q.float(), k.float(), v.float(), 128 if windowed else 300)
    got = attend(q, k, v, 128 if windowed else 300)
    assert got.dtype == torch.bfloat16
    assert (got.float() - expected).norm() < 0.02 * expected.norm()


def test_on_cpu_a_real_backend_passes_the_probe():
    assert choose(CPU, torch.float32, 64, True)[0] == "blocks"
    assert choose(CPU, torch.float32, 64, False)[0] == "blocks"


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_the_probe_works_where_gradients_are_off(context):
    with context():
        assert choose(CPU, torch.float32, 64, True)[0] == "blocks"


# Backends that look well and are not (pitfall 18): what each does wrong, and nothing else.


def fails_on_launch(q, k, v, window):
    raise RuntimeError("no kernel image is available for execution on the device\nand more lines")


def fails_without_a_word(q, k, v, window):
    raise NotImplementedError


def forgets_the_window(q, k, v, window):
    return attend_naive(q, k, v, q.size(1))


def sees_one_too_many(q, k, v, window):
    return attend_naive(q, k, v, window + 1)


def has_no_gradient(q, k, v, window):
    return attend_naive(q, k, v, window).detach()


def has_no_gradient_for_keys(q, k, v, window):
    return attend_naive(q, k.detach(), v, window)


def has_nan_gradients(q, k, v, window):
    y = attend_naive(q, k, v, window)
    return y + (y - y.detach()).clamp(min=0).sqrt()  # value unchanged, d sqrt(0) is infinite


class WrongGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y):
        return y.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad * 1.5


def has_wrong_gradients(q, k, v, window):
    return WrongGradient.apply(attend_naive(q, k, v, window))


BROKEN = [
    fails_on_launch,
    fails_without_a_word,
    forgets_the_window,
    sees_one_too_many,
    has_no_gradient,
    has_no_gradient_for_keys,
    has_nan_gradients,
    has_wrong_gradients,
]


@pytest.mark.parametrize("broken", BROKEN)
def test_the_probe_passes_over_a_broken_backend(broken, monkeypatch, capsys):
    candidates = (("broken", lambda: broken), ("definition", lambda: attend_naive))
    monkeypatch.setattr(attention, "backends", lambda device_type, windowed: candidates)
    assert choose(CPU, torch.float32, 16, True) == ("definition", attend_naive)
    assert "Traceback" not in capsys.readouterr().out


def test_without_any_backend_attention_is_still_right(monkeypatch):
    monkeypatch.setattr(attention, "backends", lambda *_: (("broken", lambda: fails_on_launch),))
    q, k, v = make(40)
    for windowed, window in ((True, 8), (False, 40)):
        assert_same(choose(CPU, torch.float32, 16, windowed)[1], masked_sdpa, q, k, v, window, 1e-5)


FLASH3 = """
import torch
import torch.nn.functional as F

def flash_attn_func(q, k, v, softmax_scale=None, causal=False, qv=None, window_size=(-1, -1)):
    left, right = window_size
    assert causal and right == 0 and softmax_scale is None
    distance = torch.arange(q.size(1))[:, None] - torch.arange(k.size(1))
    seen = (distance >= 0) & (distance <= left)  # its window counts the keys before the query's own
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=seen, enable_gqa=True).transpose(1, 2)
    return RESULT
"""
HUB = """
from types import SimpleNamespace
import hub_flash

def get_kernel(name, version):
    assert (name, version) == ("kernels-community/flash-attn3", 1)
    return SimpleNamespace(flash_attn_func=hub_flash.flash_attn_func)
"""


@pytest.mark.parametrize("result", ["y", "(y, None)"])  # older versions return the log-sum-exps too
@pytest.mark.parametrize("source", ["package", "hub"])
def test_flash_attention_3_is_called_by_its_own_conventions(source, result, tmp_path, monkeypatch):
    """Its documented interface, written out with torch's attention; the kernel itself needs a Hopper GPU."""
    names = {"package": "flash_attn_interface", "hub": "hub_flash"}
    (tmp_path / f"{names[source]}.py").write_text(FLASH3.replace("RESULT", result))
    if source == "hub":
        (tmp_path / "kernels.py").write_text(HUB)
    monkeypatch.syspath_prepend(tmp_path)
    try:
        for window in (5, 33):
            assert_same(attention.flash3(), masked_sdpa, *make(33), window, 1e-5)
    finally:
        for name in (*names.values(), "kernels"):
            sys.modules.pop(name, None)


def shapes_of_operations(attend, T, window):
    """The trailing two sizes of every input of every operation of a forward and backward pass, inner ones too."""
    q, k, v = make(T, B=1)
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as trace:
        forward_backward(attend, q, k, v, window)
    return {tuple(s[-2:]) for event in trace.events() for s in event.input_shapes if isinstance(s, list) and len(s) > 1}


def test_windows_in_training_are_not_masks():
    """Pitfall 19: a window by a mask costs T x T, more than no window. Nothing of that size may exist."""
    T = 512
    assert (T, T) in shapes_of_operations(masked_sdpa, T, 128)  # the measure sees what it looks for
    shapes = shapes_of_operations(choose(CPU, torch.float32, 16, True)[1], T, 128)
    assert (128, 256) in shapes or (256, 128) in shapes  # a block of queries against its window
    assert max(min(shape) for shape in shapes) < T // 2


@pytest.mark.parametrize("window", [3, 100])
def test_cached_attention_equals_the_definition_row_by_row(window):
    """Rows of unlike lengths in one cache, three new tokens each; slots not yet written hold rubbish."""
    S, T, lengths = 24, 3, (3, 10, 24, 17)
    q, k, v = make(S, B=len(lengths))
    cached_k, cached_v = k.clone(), v.clone()
    for row, length in enumerate(lengths):
        cached_k[row, length:] = cached_v[row, length:] = 1e3
    positions_BT = torch.tensor([[length - T + t for t in range(T)] for length in lengths])
    q_new = torch.stack([q[row, positions] for row, positions in enumerate(positions_BT)])
    got = cached_attention(q_new, cached_k, cached_v, positions_BT, window)
    full = masked_sdpa(q, k, v, window)
    for row, positions in enumerate(positions_BT):
        torch.testing.assert_close(got[row], full[row, positions], rtol=1e-5, atol=1e-5)


def test_padding_is_finite_and_changes_no_other_row():
    q, k, v = make(5, B=3)
    positions_BT = torch.tensor([[0, 1, 2, 3, 4], [-1, -1, 0, 1, 2], [-1, -1, -1, -1, -1]])
    y = cached_attention(q, k, v, positions_BT, 2)
    assert torch.isfinite(y).all()
    torch.testing.assert_close(y[:1], masked_sdpa(q[:1], k[:1], v[:1], 2), rtol=1e-5, atol=1e-5)
    alone = cached_attention(q[1:2, 2:], k[1:2], v[1:2], positions_BT[1:2, 2:], 2)
    torch.testing.assert_close(y[1:2, 2:], alone, rtol=1e-5, atol=1e-5)
