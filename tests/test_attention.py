"""Attention. Oracles: the definition, itself held against torch's own attention under an explicit mask."""

import pytest
import torch
import torch.nn.functional as F
from torch.profiler import ProfilerActivity, profile

from nanochat.attention import attend, attend_blocks, attend_naive, attend_sdpa

CPU = torch.device("cpu")


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


FORMS = [attend, attend_blocks, attend_sdpa]
CASES = [
    (window, T) for window in (128, 256, 512) for T in (1, 127, 128, 129, 300, 512) if window <= T or window == 128
]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("window, T", CASES, ids=str)
@pytest.mark.parametrize("heads", [(4, 4), (4, 2)], ids=["mha", "gqa"])
def test_every_form_equals_torch_under_an_explicit_mask(form, window, T, heads):
    assert_same(form, masked_sdpa, *make(T, *heads), window, 2e-5)


@pytest.mark.parametrize("window", [1, 7, 200])
def test_windows_that_do_not_fit_blocks_are_right_too(window):
    assert_same(attend, masked_sdpa, *make(300), window, 2e-5)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("window", [128, 300])
def test_bf16_stays_close_to_fp32(form, window):
    q, k, v = make(300, dtype=torch.bfloat16)
    expected = attend_naive(q.float(), k.float(), v.float(), window)
    got = form(q, k, v, window)
    assert got.dtype == torch.bfloat16
    assert (got.float() - expected).norm() < 0.02 * expected.norm()


def shapes_of_operations(attend, T, window):
    """The trailing two sizes of every input of every operation of a forward and backward pass, inner ones too."""
    q, k, v = make(T, B=1)
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as trace:
        forward_backward(attend, q, k, v, window)
    return {tuple(s[-2:]) for event in trace.events() for s in event.input_shapes if isinstance(s, list) and len(s) > 1}


def test_windows_in_training_are_not_masks():
    """A window by a mask costs T x T, more than no window. Nothing of that size may exist."""
    T = 512
    assert (T, T) in shapes_of_operations(masked_sdpa, T, 128)  # the measure sees what it looks for
    shapes = shapes_of_operations(attend_blocks, T, 128)
    assert (128, 256) in shapes or (256, 128) in shapes  # a block of queries against its window
    assert max(min(shape) for shape in shapes) < T // 2
