"""How kernels are judged and chosen: candidates that are right, wrong in value, wrong in gradient, and broken."""

import sys

import pytest
import torch
from test_attention import assert_same, make, masked_sdpa

from nanochat import kernels
from nanochat.attention import attend_blocks, attend_naive, attend_sdpa, flash3
from nanochat.kernels import agrees, choose_attention, choose_cuda_attention, load_attention

CPU = torch.device("cpu")


def raises(x):
    raise RuntimeError("out of resource: shared memory\nand more lines")


JUDGED = [
    (lambda x: x.sin(), None),
    (lambda x: x.sin() * 1.001, "wrong results"),
    (lambda x: x.sin() + (x - x.detach()), "wrong results"),  # right value, wrong gradient
    (lambda x: x.sin() * float("nan"), "wrong results"),
    (lambda x: x.sin().detach(), "does not require grad"),
    (raises, "out of resource: shared memory"),
]


@pytest.mark.parametrize("form, reason", JUDGED)
def test_a_probe_passes_only_what_agrees_forward_and_backward(form, reason, capsys):
    inputs = [torch.linspace(-2, 2, 50)]
    with torch.inference_mode():
        assert agrees("candidate", form, torch.sin, inputs) == (reason is None)
    printed = capsys.readouterr().out
    assert (reason in printed and printed.count("\n") == 1) if reason else not printed


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
def test_a_broken_attention_kernel_is_refused(broken, capsys):
    assert load_attention("broken", lambda: broken, CPU, torch.float32, 16, (128, 512)) is None
    printed = capsys.readouterr().out
    assert printed.startswith("attention by broken refused: ") and printed.count("\n") == 1


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_a_right_kernel_is_taken_where_gradients_are_off_too(context):
    with context():
        assert load_attention("blocks", lambda: attend_blocks, CPU, torch.float32, 16, (128, 512)) is not None


def not_installed():
    raise ImportError("No module named 'flash_attn_interface'")


@pytest.mark.parametrize(
    "working, windowed, name",
    [
        ({"flash3", "cudnn", "flex"}, True, "flash-attention-3"),
        ({"flash3", "cudnn", "flex"}, False, "flash-attention-3"),
        ({"cudnn", "flex"}, True, "flex and cudnn"),
        ({"cudnn", "flex"}, False, "cudnn"),
        ({"flex"}, True, "flex and sdpa"),
        ({"cudnn"}, True, "sdpa"),
        (set(), False, "sdpa"),
        (set(), True, "sdpa"),
    ],
)
def test_on_cuda_the_fastest_that_works_is_chosen_and_is_right(working, windowed, name, monkeypatch):
    """The order of choice, by stand-ins that run on CPU."""
    for loader in ("flash3", "cudnn", "flex"):
        monkeypatch.setattr(kernels, loader, (lambda: attend_sdpa) if loader in working else not_installed)
    chosen, attend = choose_cuda_attention(CPU, torch.float32, 16, windowed)
    assert chosen == name
    for window in (128, 300) if windowed else (300,):
        assert_same(attend, masked_sdpa, *make(300), window, 2e-5)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("windowed", [True, False])
def test_what_is_chosen_on_this_gpu_is_right(windowed):
    device = torch.device("cuda", 0)
    _, attend = choose_attention(device, torch.bfloat16, 64, windowed)
    q, k, v = make(300, D=64, dtype=torch.bfloat16, device=device)
    assert_same(attend, masked_sdpa, q, k, v, 128 if windowed else 300, 5e-2)


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
            assert_same(flash3(), masked_sdpa, *make(33), window, 1e-5)
    finally:
        for name in (*names.values(), "kernels"):
            sys.modules.pop(name, None)
