"""MXFP4: the plain form against the format's definition, the kernel against the plain form.

The kernel runs on a GPU, else in Triton's interpreter (in a process of its own, with TRITON_INTERPRET=1), else not.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from nanochat import fused_mlp
from nanochat.hf import mxfp4

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
CUDA = torch.cuda.is_available() and not INTERPRETED
DEVICE = torch.device("cuda", 0) if CUDA else torch.device("cpu")
ROOT = Path(__file__).resolve().parent.parent
needs_triton = pytest.mark.skipif(not fused_mlp.triton, reason="Triton is not installed")


def test_unpacking_follows_the_format():
    """Every code at every scale that fp32 holds, by the definition: sign, exponent of bias 1, a bit of mantissa."""
    codes = torch.arange(16)
    values = [
        (-1) ** (c >> 3) * ((c & 1) / 2 if c & 6 == 0 else (1 + (c & 1) / 2) * 2 ** ((c >> 1 & 3) - 1)) for c in codes
    ]
    low, high = torch.meshgrid(codes, codes, indexing="ij")
    blocks = (low + 16 * high).to(torch.uint8).view(1, 16, 16).expand(255, 16, 16)
    scales = torch.arange(255, dtype=torch.uint8).view(255, 1).expand(255, 16)
    unpacked = mxfp4.dequantize(blocks, scales, torch.float64).view(255, 16, 16, 2)
    expected = torch.tensor([[[values[a], values[b]] for b in range(16)] for a in range(16)], dtype=torch.float64)
    power = 2.0 ** (torch.arange(255, dtype=torch.float64) - 127)
    inside = slice(2, 252)  # 6 times the largest powers, and halves of the smallest, leave fp32
    assert torch.equal(unpacked[inside], (expected * power[:, None, None, None])[inside])


@needs_triton
@pytest.mark.skipif(INTERPRETED or CUDA, reason="this process runs it itself")
def test_the_kernel_is_right_in_the_interpreter():
    command = [sys.executable, "-m", "pytest", "--noconftest", "-p", "no:cacheprovider", "-k", "rows", __file__]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    result = subprocess.run(command, env=environment, cwd=Path(__file__).parent, capture_output=True, text=True)
    assert result.returncode == 0 and "6 passed" in result.stdout, result.stdout


@pytest.mark.skipif(
    not fused_mlp.triton or not (CUDA or INTERPRETED), reason="needs Triton, and a GPU or its interpreter"
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("P", "N", "G"), [(1, 16, 8), (5, 40, 3), (3, 33, 19)])
def test_the_kernel_multiplies_rows_by_their_experts(P, N, G, dtype):
    generator = torch.Generator().manual_seed(P)
    blocks = torch.randint(256, (4, N, G, 16), generator=generator, dtype=torch.uint8).to(DEVICE)
    scales = torch.randint(110, 140, (4, N, G), generator=generator, dtype=torch.uint8).to(DEVICE)
    expert_P = torch.randint(4, (P,), generator=generator).to(DEVICE)
    x_PK = torch.randn(P, G * 32, generator=generator).to(DEVICE, dtype)
    matrices = mxfp4.dequantize(blocks, scales, torch.float64)[expert_P]
    wanted = torch.einsum("pk,pnk->pn", x_PK.double(), matrices)
    size = torch.einsum("pk,pnk->pn", x_PK.double().abs(), matrices.abs())  # what rounding is relative to
    error = (mxfp4.matvec(x_PK, blocks, scales, expert_P).double() - wanted).abs() / size
    assert error.max() < (1e-6 if dtype == torch.float32 else 5e-3)


COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from nanochat import mxfp4

kernel, constants = mxfp4._matvec_kernel, {"BLOCK_N": 16, "BLOCK_G": 8}
types = {"x_ptr": "*bf16", "blocks_ptr": "*u8", "scales_ptr": "*u8", "experts_ptr": "*i64", "y_ptr": "*bf16"}
types |= {"N": "i32", "G": "i32"}
signature = {name: "constexpr" if name in constants else types[name] for name in kernel.arg_names}
source = ASTSource(kernel, signature, {(kernel.arg_names.index(k),): v for k, v in constants.items()})
for capability in (80, 90):
    triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": 4})
print("built")
"""


@needs_triton
@pytest.mark.skipif(INTERPRETED, reason="compiled in a process without the interpreter")
def test_the_kernel_compiles_for_gpus_that_are_not_here(tmp_path):
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path)}
    result = subprocess.run([sys.executable, "-c", COMPILE], env=environment, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0 and "built" in result.stdout, result.stderr


def test_without_a_gpu_the_plain_form_is_chosen():
    assert not mxfp4.kernel_works(torch.device("cpu"), torch.float32)
