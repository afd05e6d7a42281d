"""Optional fp8 training: matrix products of 8-bit floats, each tensor brought into range by one scale of its own.

Values and weights are e4m3 (3 bits of mantissa, up to 448), gradients e5m2 (2 bits, up to 57,344), as in
arXiv 2209.05433; sums are fp32, and the master weights and everything between the products stay as they are.
"""

import functools

import torch
import torch.nn as nn
import torch.nn.functional as F

_SMALLEST = 128  # rows and columns below which casts cost more than the product saves


def quantise(x: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """(x / scale in the fp8 `dtype`, scale as an fp32 scalar): the largest magnitude becomes the largest that fits.

    Zeros give zeros. An infinity or NaN in x gives NaN, which the loss then shows: it is never rounded to a number.
    """
    scale = x.abs().amax().float().clamp(min=1e-30) / torch.finfo(dtype).max
    return (x.float() / scale).to(dtype), scale


def _product(a_MK: torch.Tensor, b_KN: torch.Tensor, scales: tuple, dtype: torch.dtype, fast: bool) -> torch.Tensor:
    """a·b of fp8 matrices, a in rows and b in columns, as the hardware wants them. fast: sums of fewer bits."""
    a_MK, b_KN = a_MK.contiguous(), b_KN.t().contiguous().t()
    return torch._scaled_mm(a_MK, b_KN, scales[0], scales[1], out_dtype=dtype, use_fast_accum=fast)


class _Fp8Product(torch.autograd.Function):
    """x·Wᵀ of plain tensor operations, which torch.compile fuses with what stands before and after them."""

    @staticmethod
    def forward(ctx, x_NC: torch.Tensor, w_DC: torch.Tensor) -> torch.Tensor:
        x8_NC, x_scale = quantise(x_NC, torch.float8_e4m3fn)
        w8_DC, w_scale = quantise(w_DC, torch.float8_e4m3fn)
        ctx.save_for_backward(x8_NC, w8_DC, x_scale, w_scale)
        ctx.weight_dtype = w_DC.dtype
        return _product(x8_NC, w8_DC.t(), (x_scale, w_scale), x_NC.dtype, fast=True)

    @staticmethod
    def backward(ctx, grad_ND: torch.Tensor):
        x8_NC, w8_DC, x_scale, w_scale = ctx.saved_tensors
        g8_ND, g_scale = quantise(grad_ND, torch.float8_e5m2)
        dx_NC = _product(g8_ND, w8_DC, (g_scale, w_scale), grad_ND.dtype, fast=False)
        dw_DC = _product(g8_ND.t(), x8_NC, (g_scale, x_scale), ctx.weight_dtype, fast=False)
        return dx_NC, dw_DC


def linear(x: torch.Tensor, w_DC: torch.Tensor) -> torch.Tensor:
    """x·Wᵀ for x (..., C), forward and backward in fp8; in x's dtype when the rows of x are no multiple of 16."""
    x_NC = x.reshape(-1, x.size(-1))
    if x_NC.size(0) % 16:
        return F.linear(x, w_DC.to(x.dtype))
    return _Fp8Product.apply(x_NC, w_DC).view(*x.shape[:-1], -1)


def eligible(matrix: nn.Linear) -> bool:
    """Whether a matrix gains: both dimensions multiples of 16, as the hardware wants, and not small."""
    return min(matrix.weight.shape) >= _SMALLEST and all(size % 16 == 0 for size in matrix.weight.shape)


@functools.cache
def works(device: torch.device) -> bool:
    """Whether fp8 products run on this device, forward and backward: tried once (Ada, Hopper or later; CPU, slowly)."""
    try:
        with torch.inference_mode(False), torch.enable_grad():
            w = torch.ones(48, 32, device=device, requires_grad=True)
            y = linear(torch.ones(16, 32, device=device, dtype=torch.bfloat16), w)
            return bool((torch.autograd.grad(y.sum(), w)[0] == 16).all())
    except (RuntimeError, AttributeError):
        return False


def convert(model: nn.Module) -> int:
    """Have the eligible matrices of `model.blocks` compute in fp8 while training; returns how many.

    Nothing is copied or moved: a matrix reads its own flag, so that `model.eval()` is the bf16 model of the same
    weights, and checkpoint and optimizer see no difference. The head stays as it is: its loss has its own products.
    Raises ValueError where fp8 does not run or no matrix is large enough.
    """
    device = next(model.parameters()).device
    if not works(device):
        raise ValueError("--fp8 needs a GPU with fp8 products (Ada, Hopper or later): leave it out")
    chosen: list = [m for m in model.get_submodule("blocks").modules() if isinstance(m, nn.Linear) and eligible(m)]
    if not chosen:
        raise ValueError(f"--fp8: no matrix of {_SMALLEST} x {_SMALLEST} or more: leave it out, or raise --depth")
    for matrix in chosen:
        matrix.fp8 = True
    return len(chosen)
