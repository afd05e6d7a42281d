"""Optional fp8 training (`--fp8`): the blocks' matrix products in 8-bit floats, which a Hopper GPU does twice as fast.

Eight bits have little range, so each tensor is first divided by a scale of its own. Activations and weights become
e4m3 (3 bits of mantissa, up to 448), gradients e5m2 (2 bits, but up to 57,344), as in arXiv 2209.05433. Sums are taken
in fp32, and master weights, norms and the residual stay as they are: only the operands of a product are short.
Steps get 17 % faster at d24. At equal quality it is 5 %, and below d20 it does not pay.
"""

import torch
import torch.nn.functional as F

from nanochat.language_model import Linear

SMALLEST = 128  # rows or columns; below it the casts cost more than the product saves


def quantise(x: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Return x / scale in the fp8 `dtype`, and the scale (fp32): the largest magnitude becomes the largest that fits.

    Zeros stay zeros. An infinity or NaN becomes NaN, so that the loss shows it: it is never rounded to a number.
    """
    largest = x.abs().amax().float().clamp(min=1e-30)
    scale = largest / torch.finfo(dtype).max
    return (x.float() / scale).to(dtype), scale


def _product(a_MK, a_scale, b_KN, b_scale, dtype: torch.dtype, fast: bool) -> torch.Tensor:
    """Multiply fp8 matrices into `dtype`. fast: the tensor cores keep fewer bits of the running sum."""
    # The hardware wants a in row order and b in column order.
    a_MK = a_MK.contiguous()
    b_KN = b_KN.t().contiguous().t()
    return torch._scaled_mm(a_MK, b_KN, a_scale, b_scale, out_dtype=dtype, use_fast_accum=fast)


class _Fp8Product(torch.autograd.Function):
    """x·Wᵀ. The casts are plain tensor operations, which torch.compile fuses with their neighbours."""

    @staticmethod
    def forward(ctx, x_NC: torch.Tensor, w_DC: torch.Tensor) -> torch.Tensor:
        x8_NC, x_scale = quantise(x_NC, torch.float8_e4m3fn)
        w8_DC, w_scale = quantise(w_DC, torch.float8_e4m3fn)
        # Keeping the fp8 copies for the backward pass also halves that memory.
        ctx.save_for_backward(x8_NC, w8_DC, x_scale, w_scale)
        ctx.weight_dtype = w_DC.dtype
        return _product(x8_NC, x_scale, w8_DC.t(), w_scale, dtype=x_NC.dtype, fast=True)

    @staticmethod
    def backward(ctx, grad_ND: torch.Tensor):
        x8_NC, w8_DC, x_scale, w_scale = ctx.saved_tensors
        # Gradients span more orders of magnitude than activations: e5m2 gives up a bit of precision for range.
        g8_ND, g_scale = quantise(grad_ND, torch.float8_e5m2)
        dx_NC = _product(g8_ND, g_scale, w8_DC, w_scale, dtype=grad_ND.dtype, fast=False)
        dw_DC = _product(g8_ND.t(), g_scale, x8_NC, x_scale, dtype=ctx.weight_dtype, fast=False)
        return dx_NC, dw_DC


def linear(x: torch.Tensor, w_DC: torch.Tensor) -> torch.Tensor:
    """Return x·Wᵀ for x (..., C), in fp8 forward and backward; in x's dtype if its rows are no multiple of 16."""
    x_NC = x.reshape(-1, x.size(-1))
    if x_NC.size(0) % 16:
        return F.linear(x, w_DC.to(x.dtype))
    y_ND = _Fp8Product.apply(x_NC, w_DC)
    return y_ND.view(*x.shape[:-1], -1)


class Fp8Linear(Linear):
    """A matrix without bias that trains in fp8 if it can gain from it. In eval mode it is a plain `Linear`."""

    def __init__(self, n_in: int, n_out: int) -> None:
        super().__init__(n_in, n_out)
        self.gains = gains(n_in, n_out)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training and self.gains:
            return linear(x, self.weight)
        return super().forward(x)


def gains(n_in: int, n_out: int) -> bool:
    """Return whether fp8 can gain on a matrix: no small side, and both multiples of 16, as the hardware wants."""
    return min(n_in, n_out) >= SMALLEST and n_in % 16 == 0 and n_out % 16 == 0


def works(device: torch.device) -> bool:
    """Return whether fp8 products work: on Ada, Hopper and later GPUs, and (slowly) on CPU."""
    return what_fails(device) is None


def what_fails(device: torch.device) -> str | None:
    """Try one product, forward and backward; return what PyTorch says if it fails, or None if it works."""
    try:
        with torch.inference_mode(False), torch.enable_grad():
            w = torch.ones(48, 32, device=device, requires_grad=True)
            y = linear(torch.ones(16, 32, device=device, dtype=torch.bfloat16), w)
            (gradient,) = torch.autograd.grad(y.sum(), w)
    except (RuntimeError, AttributeError) as error:
        return f"{type(error).__name__}: {error}"
    return None if (gradient == 16).all() else "its gradients are wrong"


def check(device: torch.device, width: int) -> None:
    """Raise ValueError where fp8 does not run, or where no matrix of a model of this width is large enough."""
    problem = what_fails(device) if device.type == "cuda" else f"this is {device.type}"
    if problem is not None:
        # The reason may be another than the GPU's age, such as memory that has run out.
        raise ValueError(f"--fp8 needs a GPU with fp8 products (Ada, Hopper or later): leave it out ({problem[:200]})")
    if not gains(width, width):
        raise ValueError(f"--fp8: no matrix of {SMALLEST} x {SMALLEST} or more: leave it out, or raise --depth")
