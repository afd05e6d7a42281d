"""Optional fp8 training (`--fp8`): matrix products in 8-bit floats, which a Hopper GPU does twice as fast.

Eight bits have little range, so each tensor is first divided by a scale of its own. Activations and weights become
e4m3 (3 bits of mantissa, up to 448), gradients e5m2 (2 bits, but up to 57,344), as in arXiv 2209.05433. Sums are taken
in fp32, and master weights, norms and the residual stay as they are: only the operands of a product are short.

The products are fast, but they need passes over memory that find the largest magnitude and cast. Three things keep
these passes few:

    Fp8Together             q, k and v are one product, so that their input is quantised once
    weights_quantised       weights are quantised once in a step, not in each of its micro-batches
    fp8_loss_sum            the head, with its loss: the gradient of a chunk is cast where it is made

Modelled for d24 (bytes counted in generated code, nothing measured on a device): 251 ms per micro-step instead of 263,
where bf16 takes 307. Below d20 fp8 does not pay.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from nanochat.language_model import Linear, Together
from nanochat.loss import CUDA_CHUNK_COMPILED, chunk_size, chunked_loss_sum, gradients_by_output

SMALLEST = 128  # rows or columns; below it the casts cost more than the product saves
ROWS = 16  # the hardware multiplies only matrices whose sides are multiples of this


def scale_of(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the scale (fp32) with which the largest magnitude of x becomes the largest that the fp8 `dtype` holds."""
    largest = x.abs().amax().float().clamp(min=1e-30)
    return largest / torch.finfo(dtype).max


def quantise(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return x / scale in the fp8 `dtype`, and the scale.

    Zeros stay zeros. An infinity or NaN becomes NaN, so that the loss shows it: it is never rounded to a number.
    """
    scale = scale_of(x, dtype)
    return (x.float() / scale).to(dtype), scale


def _product(a_MK: Tensor, a_scale: Tensor, b_KN: Tensor, b_scale: Tensor, dtype: torch.dtype, fast: bool) -> Tensor:
    """Multiply fp8 matrices into `dtype`. fast: the tensor cores keep fewer bits of the running sum."""
    # The hardware wants a in row order and b in column order. What lies so already is not copied.
    a_MK = a_MK.contiguous()
    b_KN = b_KN.t().contiguous().t()
    return torch._scaled_mm(a_MK, b_KN, a_scale, b_scale, out_dtype=dtype, use_fast_accum=fast)


class Quantised(NamedTuple):
    """A matrix in fp8, in row order for one product and in column order for another, and the scale of both."""

    rows_MN: Tensor
    columns_MN: Tensor
    scale: Tensor


def cast_both(x_MN: Tensor, scale: Tensor, dtype: torch.dtype) -> Quantised:
    """Quantise a matrix, whose scale is known, for products from both sides."""
    rows_MN = (x_MN.float() / scale).to(dtype)
    return Quantised(rows_MN, rows_MN.t().contiguous().t(), scale)


def quantise_both(x_MN: Tensor, dtype: torch.dtype) -> Quantised:
    """Quantise a matrix for products from both sides."""
    return cast_both(x_MN, scale_of(x_MN, dtype), dtype)


def quantise_weights(weights: Sequence[Tensor]) -> Quantised:
    """Quantise matrices (D, C) that read the same input, one below the other, with one scale."""
    return quantise_both(weights[0] if len(weights) == 1 else torch.cat(tuple(weights)), torch.float8_e4m3fn)


class _Fp8Product(torch.autograd.Function):
    """x·Wᵀ for the rows of several W. The casts are plain operations, which torch.compile fuses with their neighbours.

    w_rows_DC, w_columns_DC, w_scale: all W quantised. The W themselves come in only for their gradients to go out.
    """

    @staticmethod
    def forward(ctx, x_NC: Tensor, w_rows_DC: Tensor, w_columns_DC: Tensor, w_scale: Tensor, *weights: Tensor):
        x8_NC, x_scale = quantise(x_NC, torch.float8_e4m3fn)
        # Keeping the fp8 copies for the backward pass also halves that memory.
        ctx.save_for_backward(x8_NC, x_scale, w_columns_DC, w_scale)
        ctx.sizes = [len(w_DC) for w_DC in weights]
        ctx.weight_dtype = weights[0].dtype
        return _product(x8_NC, x_scale, w_rows_DC.t(), w_scale, dtype=x_NC.dtype, fast=True)

    @staticmethod
    def backward(ctx, grad_ND: Tensor):
        x8_NC, x_scale, w_columns_DC, w_scale = ctx.saved_tensors
        # Gradients span more orders of magnitude than activations: e5m2 gives up a bit of precision for range.
        g8_ND, g_scale = quantise(grad_ND, torch.float8_e5m2)
        dx_NC = _product(g8_ND, g_scale, w_columns_DC, w_scale, dtype=grad_ND.dtype, fast=False)
        dw_DC = _product(g8_ND.t(), g_scale, x8_NC, x_scale, dtype=ctx.weight_dtype, fast=False)
        return dx_NC, None, None, None, *dw_DC.split(ctx.sizes)


def linear(x: Tensor, *weights: Tensor, quantised: Quantised | None = None) -> Tensor:
    """Return x·Wᵀ for x (..., C) and the rows of all W (D, C), in fp8 forward and backward.

    quantised: the W, if they have been quantised already. Not in fp8 if the number of x's rows is no multiple of 16.
    """
    x_NC = x.reshape(-1, x.size(-1))
    if x_NC.size(0) % ROWS:
        return torch.cat([F.linear(x, w_DC.to(x.dtype)) for w_DC in weights], dim=-1)
    if quantised is None:
        with torch.no_grad():
            quantised = quantise_weights(weights)
    y_ND = _Fp8Product.apply(x_NC, *quantised, *weights)
    return y_ND.view(*x.shape[:-1], -1)


class Fp8Linear(Linear):
    """A matrix without bias that trains in fp8 if it can gain from it. In eval mode it is a plain `Linear`."""

    def __init__(self, n_in: int, n_out: int) -> None:
        super().__init__(n_in, n_out)
        self.gains = gains(n_in, n_out)
        self.quantised: Quantised | None = None  # see weights_quantised

    def forward(self, x: Tensor) -> Tensor:
        if self.training and self.gains:
            return linear(x, self.weight, quantised=self.quantised)
        return super().forward(x)

    def weights(self) -> list[Tensor]:
        """Return the matrices of its fp8 product."""
        return [self.weight] if self.gains else []


class Fp8Together(Together):
    """Matrices that read the same input: those that gain from fp8 are one product of an input quantised once."""

    def __init__(self, *groups: Sequence[Any]) -> None:
        super().__init__(*groups)
        matrices = [matrix for group in groups for matrix in group]
        self.wide = [matrix for matrix in matrices if gains(matrix.in_features, matrix.out_features)]
        self.narrow = [matrix for matrix in matrices if not gains(matrix.in_features, matrix.out_features)]
        # The gate is the only narrow matrix, and comes last. With any other order there is no fp8 product.
        if matrices != self.wide + self.narrow:
            self.wide = []
        self.quantised: Quantised | None = None

    def __call__(self, x: Tensor) -> Sequence[Tensor]:
        if not self.wide or not self.wide[0].training:
            return super().__call__(x)
        y = linear(x, *self.weights(), quantised=self.quantised)
        outputs = y.split([matrix.out_features for matrix in self.wide], dim=-1)
        return [*outputs, *(matrix(x) for matrix in self.narrow)]

    def weights(self) -> list[Tensor]:
        """Return the matrices of its fp8 product."""
        return [matrix.weight for matrix in self.wide]


@contextlib.contextmanager
def weights_quantised(model: Any) -> Iterator[None]:
    """Quantise the weights of a GPT's blocks here, once for all forward and backward passes inside.

    No weight may change inside. Outside, each pass quantises anew: nothing stale can be used. Does nothing for a model
    that does not train in fp8.
    """
    products: list[Any] = []
    if model.kernels.fp8:
        for block in model.blocks:
            products += [block.attn.qkvg, block.attn.out, block.mlp.up, block.mlp.down]
    # Eager, the casts would be ten passes over each matrix instead of two.
    form = torch.compile(quantise_weights, dynamic=False) if model.kernels.compiled else quantise_weights
    try:
        for product in products:
            if product.weights():
                with torch.no_grad():
                    product.quantised = form(product.weights())
        yield
    finally:
        for product in products:
            product.quantised = None


# --- the head


def chunk_gradient(z_NV: Tensor, targets_N: Tensor, cap: float, n_vocab: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return a chunk's summed loss, its gradient by the head's raw output z, and the scale of that in fp8.

    The gradient is not cast to fp8 here. torch.compile would leave out its rounding to bf16 in between, and so write it
    to memory and read it in fp32: 12 bytes a logit for the chunk, and not 8 (counted by `python -m dev.gpu_code`).
    """
    loss, dz_NV = gradients_by_output(z_NV, targets_N, cap, n_vocab)
    return loss, dz_NV, scale_of(dz_NV, torch.float8_e5m2)


class _Fp8LossSum(torch.autograd.Function):
    """The summed loss with all three products of the head in fp8, and its gradients made in the forward pass."""

    @staticmethod
    def forward(
        ctx, x_NC: Tensor, w_VC: Tensor, targets_N: Tensor, cap: float, n_vocab: int, chunk: int, compiled: bool
    ):
        quantised: Callable[..., Quantised] = quantise_both
        make_gradient: Callable[..., tuple[Tensor, Tensor, Tensor]] = chunk_gradient
        cast: Callable[..., Quantised] = cast_both
        if compiled:
            quantised = torch.compile(quantise_both, dynamic=False)
            make_gradient = torch.compile(chunk_gradient, dynamic=False)
            cast = torch.compile(cast_both, dynamic=False)
        w8 = quantised(w_VC, torch.float8_e4m3fn)
        total = torch.zeros((), device=x_NC.device)
        dx_NC = torch.empty_like(x_NC)
        dw_VC = torch.zeros_like(w_VC, dtype=torch.float32)
        for x, targets, dx in zip(x_NC.split(chunk), targets_N.split(chunk), dx_NC.split(chunk), strict=True):
            x8 = quantised(x, torch.float8_e4m3fn)
            z_NV = _product(x8.rows_MN, x8.scale, w8.rows_MN.t(), w8.scale, dtype=x.dtype, fast=True)
            loss, dz_NV, dz_scale = make_gradient(z_NV, targets, cap, n_vocab)
            dz8 = cast(dz_NV, dz_scale, torch.float8_e5m2)
            total += loss
            dx.copy_(_product(dz8.rows_MN, dz8.scale, w8.columns_MN, w8.scale, dtype=x.dtype, fast=False))
            dw_VC += _product(dz8.columns_MN.t(), dz8.scale, x8.columns_MN, x8.scale, dtype=torch.float32, fast=False)
        ctx.save_for_backward(dx_NC, dw_VC)
        ctx.weight_dtype = w_VC.dtype
        return total

    @staticmethod
    def backward(ctx, scale: Tensor):
        dx_NC, dw_VC = ctx.saved_tensors
        dx_NC = dx_NC * scale.to(dx_NC.dtype)
        dw_VC = (dw_VC * scale).to(ctx.weight_dtype)
        return dx_NC, dw_VC, None, None, None, None, None


def fp8_loss_sum(
    x_NC: Tensor, w_VC: Tensor, targets_N: Tensor, cap: float, n_vocab: int, compiled: bool = False
) -> Tensor:
    """The summed loss as `chunked_loss_sum` defines it, in fp8. Tokens that are no multiple of 16 are not in fp8."""
    if len(x_NC) % ROWS or not gains(w_VC.size(1), w_VC.size(0)):
        return chunked_loss_sum(x_NC, w_VC, targets_N, cap, n_vocab)
    chunk = chunk_size(x_NC, CUDA_CHUNK_COMPILED if compiled else None)
    chunk = -(-chunk // ROWS) * ROWS
    return _Fp8LossSum.apply(x_NC, w_VC, targets_N, cap, n_vocab, chunk, compiled)


# --- where it is used


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
