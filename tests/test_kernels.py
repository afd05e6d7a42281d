"""Triton kernels against torch's dense forms: on a GPU, else in Triton's interpreter, else skipped.

The interpreter is chosen when the kernels are first imported, so these tests run once more in a process of their own
with TRITON_INTERPRET=1. What only a compiler finds is found by compiling for GPUs that are not there.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from nanochat import kernels, loss
from nanochat.gpt import GPT, GPTConfig

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
CUDA = torch.cuda.is_available() and not INTERPRETED
DEVICE = torch.device("cuda", 0) if CUDA else torch.device("cpu")
CPU = torch.device("cpu")

needs_triton = pytest.mark.skipif(not kernels.triton, reason="Triton is not installed")
runs_kernels = pytest.mark.skipif(
    not kernels.triton or not (CUDA or INTERPRETED), reason="needs Triton, and a GPU or TRITON_INTERPRET=1"
)
runs_matmul = pytest.mark.skipif(
    not kernels.triton or not (INTERPRETED or (CUDA and torch.cuda.get_device_capability()[0] >= 9)),
    reason="needs Triton, and a Hopper GPU or TRITON_INTERPRET=1",
)


@needs_triton
@pytest.mark.skipif(INTERPRETED or CUDA, reason="this process runs them itself")
def test_the_kernels_are_right_in_the_interpreter():
    command = [sys.executable, "-m", "pytest", "--noconftest", "-p", "no:cacheprovider", __file__]
    result = subprocess.run(
        command, env={**os.environ, "TRITON_INTERPRET": "1"}, cwd=Path(__file__).parent, capture_output=True, text=True
    )
    passed = re.search(r"(\d+) passed", result.stdout)
    assert result.returncode == 0 and int(passed[1]) > 30, result.stdout


def make_logits(N, V, dtype=torch.float32, scale=10.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    z_NV = (torch.randn(N, V, generator=generator) * scale).to(DEVICE, dtype)
    targets_N = torch.randint(0, V, (N,), generator=generator)
    targets_N[::3] = -1
    return z_NV, targets_N.to(DEVICE)


def dense(z_NV, targets_N, cap):
    """torch's losses and the gradient of their sum by z, in fp32."""
    z_NV = z_NV.detach().float().requires_grad_()
    logits_NV = cap * torch.tanh(z_NV / cap) if cap else z_NV
    losses_N = F.cross_entropy(logits_NV, targets_N, ignore_index=-1, reduction="none")
    losses_N.sum().backward()
    return losses_N.detach(), z_NV.grad


@runs_kernels
@pytest.mark.parametrize("cap", [15.0, 0.0, 50.0])
@pytest.mark.parametrize("N, V", [(1, 2), (7, 70), (5, 4096), (4, 4097), (3, 9000)])
def test_cross_entropy_equals_the_dense_form(N, V, cap):
    z_NV, targets_N = make_logits(N, V)
    expected, expected_grad = dense(z_NV, targets_N, cap)
    losses_N = kernels.softcap_cross_entropy_(z_NV, targets_N, cap)
    torch.testing.assert_close(losses_N, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(z_NV, expected_grad, rtol=1e-5, atol=1e-5)


@runs_kernels
def test_bf16_logits_get_the_gradient_of_their_own_values():
    z_NV, targets_N = make_logits(6, 500, torch.bfloat16)
    expected, expected_grad = dense(z_NV, targets_N, 15.0)
    losses_N = kernels.softcap_cross_entropy_(z_NV, targets_N, 15.0)
    torch.testing.assert_close(losses_N, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(z_NV.float(), expected_grad, rtol=2**-7, atol=1e-6)  # one rounding to bf16


@runs_kernels
def test_without_gradient_the_logits_stay():
    z_NV, targets_N = make_logits(6, 500)
    before = z_NV.clone()
    losses_N = kernels.softcap_cross_entropy_(z_NV, targets_N, 15.0, gradient=False)
    torch.testing.assert_close(losses_N, dense(z_NV, targets_N, 15.0)[0], rtol=1e-5, atol=1e-5)
    assert torch.equal(z_NV, before)


@runs_kernels
def test_extreme_logits_and_rows_of_a_wider_matrix():
    wide, targets_N = make_logits(5, 80, scale=1e6)
    beyond = wide[:, 70:].clone()
    z_NV, targets_N = wide[:, :70], targets_N.clamp(max=69)
    expected, expected_grad = dense(z_NV, targets_N, 15.0)
    torch.testing.assert_close(kernels.softcap_cross_entropy_(z_NV, targets_N, 15.0), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(z_NV, expected_grad, rtol=1e-5, atol=1e-5)
    assert torch.equal(wide[:, 70:], beyond)


@runs_kernels
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("chunk", [5, 16, 100])
def test_the_head_loss_through_the_kernel_equals_the_dense_form(reduction, chunk, monkeypatch):
    monkeypatch.setattr(loss, "choose", lambda *_: ("triton", loss._triton_chunk_gradients))
    generator = torch.Generator().manual_seed(0)
    x_NC, w_VC = (torch.randn(n, 16, generator=generator).to(DEVICE).requires_grad_() for n in (33, 70))
    targets_N = torch.randint(-1, 70, (33,), generator=generator).to(DEVICE)
    results = []
    for form in ("kernel", "dense"):
        x_NC.grad = w_VC.grad = None
        if form == "kernel":
            value = loss.softcap_cross_entropy(x_NC, w_VC, targets_N, 15.0, reduction, chunk)
        else:
            value = F.cross_entropy(
                15 * torch.tanh(x_NC @ w_VC.T / 15), targets_N, ignore_index=-1, reduction=reduction
            )
        (value * 1.5).backward()
        results.append((value.detach(), x_NC.grad, w_VC.grad))
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def make_mlp(N, C, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    shapes = ((N, C), (4 * C, C), (C, 4 * C))
    return [(torch.randn(s, generator=generator) / s[1] ** 0.5).to(DEVICE, dtype) for s in shapes]


def gradients(form, inputs):
    inputs = [x.detach().clone().requires_grad_() for x in inputs]
    y = form(*inputs)
    y.backward(torch.linspace(-1, 1, y.numel(), device=y.device).view(y.shape).to(y.dtype))
    return y.detach(), *(x.grad for x in inputs)


@runs_matmul
@pytest.mark.parametrize("N, C", [(1, 16), (130, 64), (300, 48)])  # less, more and not a multiple of a tile
def test_the_fused_mlp_equals_the_definition(N, C):
    dtype, tolerance = (torch.bfloat16, 3e-2) if CUDA else (torch.float32, 1e-5)
    inputs = make_mlp(N, C, dtype)
    for got, expected in zip(*(gradients(f, inputs) for f in (kernels.fused_mlp, kernels.eager_mlp)), strict=True):
        torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance * expected.abs().max().item())


@runs_matmul
def test_in_half_precision_the_root_of_what_was_kept_is_good_enough():
    """The derivative 2·relu comes from the root of a rounded square; fp16, as the interpreter knows no bf16 product."""
    inputs = make_mlp(40, 32, torch.float16)
    exact = gradients(kernels.eager_mlp, [x.float() for x in inputs])
    errors = {}
    for form in (kernels.fused_mlp, kernels.eager_mlp):
        results = gradients(form, inputs)
        errors[form] = max(((a.float() - b).norm() / b.norm()).item() for a, b in zip(results, exact, strict=True))
    assert errors[kernels.fused_mlp] < 1.5 * errors[kernels.eager_mlp] < 0.01


@runs_matmul
def test_a_model_with_the_fused_mlp_is_the_same_model():
    config = GPTConfig(sequence_len=16, vocab_size=64, n_layer=2, n_head=2, n_kv_head=2, n_embd=32)
    dtype = torch.bfloat16 if CUDA else torch.float32
    idx_BT = torch.randint(0, 64, (2, 16), generator=torch.Generator().manual_seed(0)).to(DEVICE)
    results = []
    for fused in (False, True):
        model = GPT(config, dtype).to(DEVICE)
        model.init_weights(torch.Generator(DEVICE).manual_seed(0))
        for block in model.blocks:
            torch.nn.init.normal_(block.mlp.down.weight, std=0.1, generator=torch.Generator(DEVICE).manual_seed(1))
            block.mlp.fused = fused
        value = model(idx_BT, idx_BT)
        value.backward()
        results.append([value.detach(), model.blocks[0].mlp.up.weight.grad, model.embed.weight.grad])
    for got, expected in zip(*results, strict=True):
        tolerance = 5e-2 if CUDA else 1e-5
        torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance * expected.abs().max().item())


COMPILE = """
import sys, warnings
warnings.simplefilter("ignore")
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from nanochat import kernels

def build(kernel, capability, types, constants, **options):
    signature = {name: "constexpr" if name in constants else types[name] for name in kernel.arg_names}
    source = ASTSource(kernel, signature, {(kernel.arg_names.index(k),): v for k, v in constants.items()})
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)

logits = {"z_ptr": "*bf16", "targets_ptr": "*i64", "losses_ptr": "*fp32", "stride": "i32", "V": "i32", "cap": "fp32"}
for capability in (80, 90):
    for gradient in (True, False):
        constants = {"CAPPED": True, "GRADIENT": gradient, "BLOCK": 4096}
        build(kernels._cross_entropy_kernel, capability, logits, constants, num_warps=8)
tile = lambda m, n: f"tensordesc<bf16[{m},{n}]>"
for backward in (True, False):
    types = {"a": tile(128, 64), "b": tile(64, 256) if backward else tile(256, 64), "saved": tile(128, 256)}
    types |= {"out": tile(128, 256), "M": "i32", "N": "i32", "K": "i32"}
    constants = {"BACKWARD": backward, "BLOCK_M": 128, "BLOCK_N": 256, "BLOCK_K": 64}
    built = build(kernels._relu2_kernel, 90, types, constants, num_warps=8, num_stages=4)
    assert "wgmma.mma_async" in built.asm["ptx"] and "cp.async.bulk.tensor" in built.asm["ptx"]
    assert built.metadata.shared <= 227 * 1024, built.metadata.shared
print("built")
"""


@needs_triton
@pytest.mark.skipif(INTERPRETED, reason="compiled in a process without the interpreter")
def test_the_kernels_compile_for_gpus_that_are_not_here(tmp_path):
    """Loop types, tile shapes and shared memory are checked by the compiler alone; Hopper gets wgmma and TMA."""
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path)}
    root = Path(__file__).resolve().parent.parent
    result = subprocess.run([sys.executable, "-c", COMPILE], env=environment, cwd=root, capture_output=True, text=True)
    assert result.returncode == 0 and "built" in result.stdout, result.stderr


# Everywhere: what is chosen, and how a probe judges.


def test_without_a_gpu_the_plain_forms_are_chosen():
    assert not kernels.fused_mlp_pays(CPU, torch.bfloat16, 128)
    assert loss.choose(CPU, torch.bfloat16, False) == ("eager", loss._chunk_gradients)
    assert loss.choose(CPU, torch.bfloat16, True)[0] == "compiled"


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
        assert kernels.agrees("candidate", form, torch.sin, inputs) == (reason is None)
    printed = capsys.readouterr().out
    assert (reason in printed and printed.count("\n") == 1) if reason else not printed
