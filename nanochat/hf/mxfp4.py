"""MXFP4: blocks of 32 four-bit floats that share a power of two (OCP Microscaling Formats 1.0), kept packed.

A byte holds two values, the first in its low half. Shapes: N rows of G blocks, K = 32 G columns, E experts, P pairs
of a token and an expert.
"""

from __future__ import annotations  # `tl` need not be there

import functools

import torch
import torch.nn.functional as F

from nanochat.fused_mlp import jit, triton

if triton:
    import triton.language as tl

BLOCK = 32  # values that share a scale
_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


@functools.cache
def _pairs(device: torch.device) -> torch.Tensor:
    """The two values of each byte, (256, 2) fp32."""
    values = torch.tensor([*_VALUES, *(-value for value in _VALUES)], device=device)
    byte = torch.arange(256, device=device)
    return torch.stack((values[byte & 15], values[byte >> 4]), dim=1)


def dequantize(blocks_NGB: torch.Tensor, scales_NG: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """(..., N, G, 16) u8 blocks and (..., N, G) u8 scales, biased by 127 -> (..., N, 32 G) values in `dtype`."""
    values = F.embedding(blocks_NGB.int(), _pairs(blocks_NGB.device)).flatten(-2)
    return torch.ldexp(values, scales_NG.int()[..., None] - 127).flatten(-2).to(dtype)


@jit
def _value(code):
    """The number of a four-bit code: sign, two bits of exponent (bias 1), one bit of mantissa."""
    fraction = 0.5 * (code & 1).to(tl.float32)
    exponent = (code >> 1) & 3
    size = tl.where(exponent == 0, fraction, (1.0 + fraction) * ((1 << exponent) >> 1).to(tl.float32))
    return tl.where(code >> 3 == 1, -size, size)


@jit
def _matvec_kernel(
    x_ptr, blocks_ptr, scales_ptr, experts_ptr, y_ptr, N, G, BLOCK_N: tl.constexpr, BLOCK_G: tl.constexpr
):
    """BLOCK_N outputs of one pair: its row of x times rows of its expert's matrix, unpacked in registers."""
    pair = tl.program_id(0).to(tl.int64)
    expert = tl.load(experts_ptr + pair).to(tl.int64)
    n, byte = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, 16)
    row = expert * N + n
    sums = tl.zeros((BLOCK_N,), tl.float32)
    for start in range(0, G, BLOCK_G):
        g = start + tl.arange(0, BLOCK_G)
        there = (n < N)[:, None] & (g < G)[None, :]
        block = row[:, None] * G + g[None, :]
        packed = tl.load(blocks_ptr + block[:, :, None] * 16 + byte[None, None, :], mask=there[:, :, None], other=0)
        packed = packed.to(tl.int32)
        scale = tl.exp2(tl.load(scales_ptr + block, mask=there, other=127).to(tl.float32) - 127.0)
        column = (g[:, None] * 16 + byte[None, :]) * 2
        inside = (g < G)[:, None] & (byte >= 0)[None, :]
        first = tl.load(x_ptr + pair * G * 32 + column, mask=inside, other=0.0).to(tl.float32)
        second = tl.load(x_ptr + pair * G * 32 + column + 1, mask=inside, other=0.0).to(tl.float32)
        products = _value(packed & 15) * first[None, :, :] + _value(packed >> 4) * second[None, :, :]
        sums += tl.sum(tl.sum(products, 2) * scale, 1)
    tl.store(y_ptr + pair * N + n, sums.to(y_ptr.dtype.element_ty), mask=n < N)


def matvec(
    x_PK: torch.Tensor, blocks_ENGB: torch.Tensor, scales_ENG: torch.Tensor, expert_P: torch.Tensor
) -> torch.Tensor:
    """Each row of x times the matrix of its expert, transposed: (P, N) in x's dtype, summed in fp32.

    Reads the packed bytes once a pair and writes no unpacked copy, so it is bound by their bandwidth where pairs are
    few, as in decoding.
    """
    P, N, G = len(x_PK), *scales_ENG.shape[1:]
    y_PN = x_PK.new_empty(P, N)
    constants = {"BLOCK_N": 16, "BLOCK_G": 8}
    tensors = (x_PK.contiguous(), blocks_ENGB.contiguous(), scales_ENG.contiguous(), expert_P, y_PN)
    with torch.cuda.device_of(x_PK):  # which need not be the current one
        _matvec_kernel[(P, triton.cdiv(N, 16))](*tensors, N, G, **constants, num_warps=4)
    return y_PN


@functools.cache
def kernel_works(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the kernel runs on this device and gives what the plain form gives."""
    if not triton or device.type != "cuda":
        return False
    generator = torch.Generator().manual_seed(0)
    blocks = torch.randint(256, (3, 40, 12, 16), generator=generator, dtype=torch.uint8).to(device)
    scales = torch.randint(120, 130, (3, 40, 12), generator=generator, dtype=torch.uint8).to(device)
    x_PK, expert_P = torch.randn(2, 12 * BLOCK, generator=generator).to(device, dtype), torch.tensor([2, 0]).to(device)
    wanted = torch.einsum("pk,pnk->pn", x_PK.float(), dequantize(blocks, scales, torch.float32)[expert_P])
    try:
        worst = (matvec(x_PK, blocks, scales, expert_P).float() - wanted).abs().max() / wanted.abs().max()
        reason = None if worst < (1e-4 if dtype == torch.float32 else 2e-2) else "wrong results"
    except Exception as error:  # whatever a kernel raises means: not this one
        reason = (str(error) or type(error).__name__).splitlines()[0]
    if reason:
        print(f"MXFP4 kernel refused: {reason}")
    return reason is None
