"""The MLP's relu(x·upᵀ)²·downᵀ with the squared ReLU inside the matrix products: one Triton kernel, Hopper GPUs only.

Why a kernel of our own: in plain PyTorch the hidden layer, four times as wide as the model, is written by the first
product, then read and written again by the squared ReLU, and the same happens backward. Those trips to memory take
longer than their arithmetic. Here the square (forward) and its derivative (backward) are applied to a tile of the
product while it is still in registers. Counted at d24 that saves 48 GB of memory traffic per micro-step. It also
halves what is kept for the backward pass: only the squared values are, and relu(z) is their root.

`fused_mlp` is the fast form, and `eager_mlp` the definition and oracle. kernels.py runs both before it takes the fast
one. Nothing needs Triton to be installed.

Shapes: N tokens, C channels (width), H = 4·C hidden channels. The kernel itself multiplies (M, K) by (K, N).
"""

from __future__ import annotations  # annotations name `tl`, which is absent without Triton

import torch
import torch.nn.functional as F
from torch import Tensor

try:
    import triton
    import triton.language as tl
    from triton.tools.tensor_descriptor import TensorDescriptor
except ImportError:
    triton = None

jit = triton.jit if triton else lambda function: function

# A program computes a tile of 128 x 256 outputs in steps of 64 along K. Four stages of loads in flight take
# 4 · (128 + 256) · 64 · 2 bytes = 192 KB of the 227 KB of shared memory that Hopper has.
BLOCK_M = 128
BLOCK_N = 256
BLOCK_K = 64


@jit
def _relu2_kernel(
    a, b, saved, out, M, N, K,
    BACKWARD: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """out = relu(a·bᵀ)², or BACKWARD out = (a·b) · 2·√saved. One tile per program; a, b, saved, out are descriptors."""
    # Programs that run at the same time share the L2 cache. Walk eight tiles down before the next column, so that
    # neighbours in time read the same columns of b.
    tiles_m = tl.cdiv(M, BLOCK_M)
    tiles_n = tl.cdiv(N, BLOCK_N)
    group = tl.program_id(0) // (8 * tiles_n)
    rows = tl.minimum(tiles_m - group * 8, 8)
    inside = tl.program_id(0) % (8 * tiles_n)
    m = (group * 8 + inside % rows) * BLOCK_M
    n = (inside // rows) * BLOCK_N

    sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in range(0, K, BLOCK_K):
        if BACKWARD:
            sums = tl.dot(a.load([m, k]), b.load([k, n]), sums)
        else:
            sums = tl.dot(a.load([m, k]), b.load([n, k]).T, sums)

    # The part that makes it worth while: the elementwise work happens before the tile leaves the registers.
    if BACKWARD:
        sums *= 2 * tl.sqrt(saved.load([m, n]).to(tl.float32))  # d relu(z)² / dz = 2·relu(z), and relu(z) = √saved
    else:
        sums = tl.maximum(sums, 0.0)
        sums *= sums
    out.store([m, n], sums.to(out.dtype))


def _relu2_matmul(a_MK: Tensor, b: Tensor, saved_MN: Tensor | None = None) -> Tensor:
    """Return relu(a·bᵀ)² for b (N, K). Given that result as `saved_MN`, return (a·b) · 2·relu for b (K, N)."""
    backward = saved_MN is not None
    M, K = a_MK.shape
    N = b.size(1) if backward else b.size(0)
    a_MK = a_MK.contiguous()
    b = b.contiguous()
    out_MN = a_MK.new_empty(M, N)
    tile = [BLOCK_M, BLOCK_N]
    programs = triton.cdiv(M, BLOCK_M) * triton.cdiv(N, BLOCK_N)
    # Tensor descriptors let Hopper's TMA unit copy whole tiles, and pad them with zeros at the edges.
    _relu2_kernel[(programs,)](
        TensorDescriptor.from_tensor(a_MK, [BLOCK_M, BLOCK_K]),
        TensorDescriptor.from_tensor(b, [BLOCK_K, BLOCK_N] if backward else [BLOCK_N, BLOCK_K]),
        TensorDescriptor.from_tensor(saved_MN if backward else out_MN, tile),
        TensorDescriptor.from_tensor(out_MN, tile),
        M,
        N,
        K,
        BACKWARD=backward,
        BLOCK_M=BLOCK_M,
        BLOCK_N=BLOCK_N,
        BLOCK_K=BLOCK_K,
        num_warps=8,
        num_stages=4,
    )
    return out_MN


# Registered as operators of PyTorch, with the shapes that they return ("fake"), so that torch.compile keeps a block
# with this MLP in one graph.


@torch.library.custom_op("nanochat::relu2_mlp", mutates_args=())
def _relu2_mlp(x_NC: Tensor, up_HC: Tensor, down_CH: Tensor) -> list[Tensor]:
    hidden_NH = _relu2_matmul(x_NC, up_HC)
    return [hidden_NH @ down_CH.t(), hidden_NH]


@_relu2_mlp.register_fake
def _(x_NC, up_HC, down_CH):
    return [x_NC.new_empty(x_NC.size(0), down_CH.size(0)), x_NC.new_empty(x_NC.size(0), up_HC.size(0))]


@torch.library.custom_op("nanochat::relu2_mlp_backward", mutates_args=())
def _relu2_mlp_backward(dy_NC: Tensor, x_NC: Tensor, up_HC: Tensor, down_CH: Tensor, hidden_NH: Tensor) -> list[Tensor]:
    dhidden_NH = _relu2_matmul(dy_NC, down_CH, hidden_NH)
    dx_NC = dhidden_NH @ up_HC
    dup_HC = dhidden_NH.t() @ x_NC
    ddown_CH = dy_NC.t() @ hidden_NH
    return [dx_NC, dup_HC, ddown_CH]


@_relu2_mlp_backward.register_fake
def _(dy_NC, x_NC, up_HC, down_CH, hidden_NH):
    return [torch.empty_like(x_NC), torch.empty_like(up_HC), torch.empty_like(down_CH)]


def _save_for_backward(ctx, inputs, output) -> None:
    x_NC, up_HC, down_CH = inputs
    _, hidden_NH = output
    ctx.save_for_backward(x_NC, up_HC, down_CH, hidden_NH)


def _backward(ctx, grads):
    x_NC, up_HC, down_CH, hidden_NH = ctx.saved_tensors
    return tuple(_relu2_mlp_backward(grads[0], x_NC, up_HC, down_CH, hidden_NH))


_relu2_mlp.register_autograd(_backward, setup_context=_save_for_backward)


def fused_mlp(x: Tensor, up_HC: Tensor, down_CH: Tensor) -> Tensor:
    """Return relu(x·upᵀ)²·downᵀ for x (..., C), differentiable. Weights are cast to x's dtype."""
    x_NC = x.reshape(-1, x.size(-1))
    y_NC, _ = _relu2_mlp(x_NC, up_HC.to(x.dtype), down_CH.to(x.dtype))
    return y_NC.view(x.shape)


def eager_mlp(x: Tensor, up_HC: Tensor, down_CH: Tensor) -> Tensor:
    """The same by its definition: the oracle of the probe and of the tests."""
    return F.linear(F.relu(F.linear(x, up_HC.to(x.dtype))).square(), down_CH.to(x.dtype))


def has_kernel(device: torch.device) -> bool:
    """Return whether the kernel can run on this device: Triton is installed, and it is a Hopper GPU or later."""
    return triton is not None and device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= 9
