"""The fused MLP against its definition: on a GPU, else in Triton's interpreter, else skipped.

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

from nanochat import fused_mlp as module
from nanochat import kernels
from nanochat.fused_mlp import eager_mlp, fused_mlp
from nanochat.gpt import GPT, GPTConfig
from nanochat.kernels import Kernels

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
CUDA = torch.cuda.is_available() and not INTERPRETED
DEVICE = torch.device("cuda", 0) if CUDA else torch.device("cpu")
CPU = torch.device("cpu")

needs_triton = pytest.mark.skipif(not module.triton, reason="Triton is not installed")
runs_matmul = pytest.mark.skipif(
    not module.triton or not (INTERPRETED or (CUDA and torch.cuda.get_device_capability()[0] >= 9)),
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
    assert result.returncode == 0 and int(passed[1]) >= 5, result.stdout


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
    for got, expected in zip(*(gradients(f, inputs) for f in (fused_mlp, eager_mlp)), strict=True):
        torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance * expected.abs().max().item())


@runs_matmul
def test_in_half_precision_the_root_of_what_was_kept_is_good_enough():
    """The derivative 2·relu comes from the root of a rounded square; fp16, as the interpreter knows no bf16 product."""
    inputs = make_mlp(40, 32, torch.float16)
    exact = gradients(eager_mlp, [x.float() for x in inputs])
    errors = {}
    for form in (fused_mlp, eager_mlp):
        results = gradients(form, inputs)
        errors[form] = max(((a.float() - b).norm() / b.norm()).item() for a, b in zip(results, exact, strict=True))
    assert errors[fused_mlp] < 1.5 * errors[eager_mlp] < 0.01


@runs_matmul
def test_a_model_with_the_fused_mlp_is_the_same_model():
    config = GPTConfig(sequence_len=16, vocab_size=64, n_layer=2, n_head=2, n_kv_head=2, n_embd=32)
    dtype = torch.bfloat16 if CUDA else torch.float32
    idx_BT = torch.randint(0, 64, (2, 16), generator=torch.Generator().manual_seed(0)).to(DEVICE)
    results = []
    for fused in (False, True):
        model = GPT(config, dtype, kernels=Kernels(fused_mlp=fused)).to(DEVICE)
        model.init_weights(torch.Generator(DEVICE).manual_seed(0))
        for block in model.blocks:
            torch.nn.init.normal_(block.mlp.down.weight, std=0.1, generator=torch.Generator(DEVICE).manual_seed(1))
        value = model(idx_BT, idx_BT)
        value.backward()
        results.append([value.detach(), model.blocks[0].mlp.up.weight.grad, model.embed.weight.grad])
    for got, expected in zip(*results, strict=True):
        tolerance = 5e-2 if CUDA else 1e-5
        torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance * expected.abs().max().item())


COMPILE = """
from dev.triton_code import compile_fused_mlp, disassemble

for backward in (True, False):
    kernel = compile_fused_mlp(backward)
    assert "wgmma.mma_async" in kernel.asm["ptx"] and "cp.async.bulk.tensor" in kernel.asm["ptx"]
    assert kernel.metadata.shared <= 227 * 1024, kernel.metadata.shared
    code = disassemble(kernel)
    assert code.spilled_bytes == 0 and code.load_bits == code.store_bits == 128, code
print("built")
"""


@needs_triton
@pytest.mark.skipif(INTERPRETED, reason="compiled in a process without the interpreter")
def test_the_kernels_compile_for_gpus_that_are_not_here(tmp_path):
    """Types, tile shapes, shared memory and registers are for the compiler to check; Hopper gets wgmma and TMA."""
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path)}
    root = Path(__file__).resolve().parent.parent
    result = subprocess.run([sys.executable, "-c", COMPILE], env=environment, cwd=root, capture_output=True, text=True)
    assert result.returncode == 0 and "built" in result.stdout, result.stderr


@pytest.mark.skipif(CUDA, reason="for machines without a GPU")
def test_without_a_gpu_the_plain_form_is_chosen():
    assert not kernels.fused_mlp_pays(CPU, torch.bfloat16, 128)
