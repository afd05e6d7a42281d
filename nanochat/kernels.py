"""Triton kernels: cross-entropy of softcapped logits in place, and matrix products with the squared ReLU inside.

None is needed: each has an eager form that says the same, and is chosen by a probe on the device at hand.
"""

from __future__ import annotations  # `tl` need not be there

import functools
import statistics
from collections.abc import Callable, Sequence

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


# Cross-entropy: one program a row of logits, which it reads twice and overwrites once.


@jit
def _capped(z, cap, CAPPED: tl.constexpr):
    """The softcapped logits and their derivative: tanh(u) = 2σ(2u) - 1, and its derivative 4σ(2u)(1 - σ(2u))."""
    if CAPPED:
        s = tl.sigmoid(2 * z / cap)
        return cap * (2 * s - 1), 4 * s * (1 - s)
    else:
        return z, z * 0 + 1


@jit
def _cross_entropy_kernel(
    z_ptr, targets_ptr, losses_ptr, stride, V, cap, CAPPED: tl.constexpr, GRADIENT: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    z_ptr += row * stride
    target = tl.load(targets_ptr + row)
    columns = tl.arange(0, BLOCK)
    highest, total = -float("inf"), 0.0
    for start in range(0, V, BLOCK):
        there = start + columns < V
        z = tl.load(z_ptr + start + columns, mask=there, other=0.0).to(tl.float32)
        logits = tl.where(there, _capped(z, cap, CAPPED)[0], -float("inf"))
        higher = tl.maximum(highest, tl.max(logits, 0))
        total = total * tl.exp(highest - higher) + tl.sum(tl.exp(logits - higher), 0)
        highest = higher
    lse = highest + tl.log(total)
    hit = _capped(tl.load(z_ptr + tl.maximum(target, 0)).to(tl.float32), cap, CAPPED)[0]
    tl.store(losses_ptr + row, tl.where(target < 0, 0.0, lse - hit))
    if GRADIENT:
        for start in range(0, V, BLOCK):
            there = start + columns < V
            z = tl.load(z_ptr + start + columns, mask=there, other=0.0).to(tl.float32)
            logits, slope = _capped(z, cap, CAPPED)
            gradient = (tl.exp(logits - lse) - tl.where(start + columns == target, 1.0, 0.0)) * slope
            gradient = tl.where(target < 0, 0.0, gradient)
            tl.store(z_ptr + start + columns, gradient.to(z_ptr.dtype.element_ty), mask=there)


def softcap_cross_entropy_(z_NV: Tensor, targets_N: Tensor, cap: float, gradient: bool = True) -> Tensor:
    """Per-token losses (N,) fp32 of the head's raw output z, softcapped; 0 where the target is negative.

    With `gradient`, z becomes the gradient of the losses' sum. The log-sum-exp runs online (arXiv 1805.02867).
    """
    (N, V), losses_N = z_NV.shape, torch.empty(len(z_NV), device=z_NV.device)
    assert z_NV.stride(1) == 1
    constants = {"CAPPED": cap > 0, "GRADIENT": gradient, "BLOCK": min(4096, triton.next_power_of_2(V))}
    _cross_entropy_kernel[(N,)](z_NV, targets_N, losses_N, z_NV.stride(0), V, cap, **constants, num_warps=8)
    return losses_N


# The MLP: its two products with (N, H) results, which bring the squared ReLU and its derivative with them.


@jit
def _relu2_kernel(
    a, b, saved, out, M, N, K,
    BACKWARD: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """out = relu(a·bᵀ)², or backward out = (a·b) · 2√saved, one tile a program; all but sizes are descriptors."""
    # eight tiles down before the next column, so that neighbours in time share columns of b in the L2 cache
    tiles_m, tiles_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    group = tl.program_id(0) // (8 * tiles_n)
    rows = tl.minimum(tiles_m - group * 8, 8)
    inside = tl.program_id(0) % (8 * tiles_n)
    m, n = (group * 8 + inside % rows) * BLOCK_M, (inside // rows) * BLOCK_N
    sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in range(0, K, BLOCK_K):
        if BACKWARD:
            sums = tl.dot(a.load([m, k]), b.load([k, n]), sums)
        else:
            sums = tl.dot(a.load([m, k]), b.load([n, k]).T, sums)
    if BACKWARD:
        sums *= 2 * tl.sqrt(saved.load([m, n]).to(tl.float32))
    else:
        sums = tl.maximum(sums, 0.0)
        sums *= sums
    out.store([m, n], sums.to(out.dtype))


def _relu2_matmul(a_MK: Tensor, b: Tensor, saved_MN: Tensor | None = None) -> Tensor:
    """relu(a·bᵀ)² for b (N, K); with `saved`, that very result, (a·b) · 2·relu for b (K, N): relu is its root."""
    (M, K), N = a_MK.shape, b.size(0 if saved_MN is None else 1)
    out_MN = a_MK.new_empty(M, N)
    BM, BN, BK = 128, 256, 64  # four stages of it are 192 KB of the 227 KB of shared memory that Hopper has
    blocks = ((BM, BK), (BN, BK) if saved_MN is None else (BK, BN), (BM, BN), (BM, BN))
    tensors = (a_MK.contiguous(), b.contiguous(), out_MN if saved_MN is None else saved_MN, out_MN)
    descriptors = [TensorDescriptor.from_tensor(x, list(shape)) for x, shape in zip(tensors, blocks, strict=True)]
    tiles = triton.cdiv(M, BM) * triton.cdiv(N, BN)
    constants = {"BACKWARD": saved_MN is not None, "BLOCK_M": BM, "BLOCK_N": BN, "BLOCK_K": BK}
    _relu2_kernel[(tiles,)](*descriptors, M, N, K, **constants, num_warps=8, num_stages=4)
    return out_MN


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
    return [dhidden_NH @ up_HC, dhidden_NH.t() @ x_NC, dy_NC.t() @ hidden_NH]


@_relu2_mlp_backward.register_fake
def _(dy_NC, x_NC, up_HC, down_CH, hidden_NH):
    return [torch.empty_like(x) for x in (x_NC, up_HC, down_CH)]


_relu2_mlp.register_autograd(
    lambda ctx, grads: tuple(_relu2_mlp_backward(grads[0], *ctx.saved_tensors)),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs, output[1]),
)


def fused_mlp(x: Tensor, up_HC: Tensor, down_CH: Tensor) -> Tensor:
    """relu(x·upᵀ)²·downᵀ for x (..., C), keeping of the hidden layer only what comes out of the square."""
    weights = (up_HC.to(x.dtype), down_CH.to(x.dtype))
    return _relu2_mlp(x.reshape(-1, x.size(-1)), *weights)[0].view(x.shape)


def eager_mlp(x: Tensor, up_HC: Tensor, down_CH: Tensor) -> Tensor:
    """The same by its definition."""
    return F.linear(F.relu(F.linear(x, up_HC.to(x.dtype))).square(), down_CH.to(x.dtype))


@torch.inference_mode(False)
@torch.enable_grad()
def agrees(name: str, form: Callable[..., Tensor], oracle: Callable[..., Tensor], inputs: Sequence[Tensor]) -> bool:
    """Whether `form` runs here, forward and backward, and gives what `oracle` gives: imports prove nothing.

    Differences may be 1e-4 of the largest value of each result in fp32, 5e-2 of it in shorter types.
    """
    tolerance, results = 1e-4 if inputs[0].dtype == torch.float32 else 5e-2, []
    try:
        for function in (oracle, form):
            leaves = [x.detach().clone().requires_grad_() for x in inputs]
            y = function(*leaves)
            gradients = torch.autograd.grad(y.float().square().sum(), leaves)
            results.append([x.float() for x in (y.detach(), *gradients)])
        if all((a - b).abs().max() <= tolerance * a.abs().max() for a, b in zip(*results, strict=True)):
            return True
        reason = "wrong results"
    except Exception as error:  # whatever a foreign kernel raises means: not this one
        reason = (str(error) or type(error).__name__).splitlines()[0]
    print(f"{name} refused: {reason}")
    return False


def milliseconds(run: Callable[..., object], *arguments: object) -> float:
    """Median time of ten `run(*arguments)` on a GPU, after three to warm up."""
    taken = []
    for _ in range(13):
        began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        began.record()
        run(*arguments)
        ended.record()
        ended.synchronize()
        taken.append(began.elapsed_time(ended))
    return statistics.median(taken[3:])


@functools.cache
@torch.inference_mode(False)
@torch.enable_grad()
def fused_mlp_pays(device: torch.device, dtype: torch.dtype, width: int) -> bool:
    """Whether `fused_mlp` is right on this device, and at this width not slower than the compiled definition."""
    if not triton or device.type != "cuda" or torch.cuda.get_device_capability(device)[0] < 9 or dtype.itemsize != 2:
        return False
    generator = torch.Generator().manual_seed(0)
    shapes = ((8192, width), (4 * width, width), (width, 4 * width))
    inputs = [(torch.randn(s, generator=generator) / s[1] ** 0.5).to(device, dtype).requires_grad_() for s in shapes]
    if not agrees("fused MLP", fused_mlp, eager_mlp, inputs):
        return False
    forms = (fused_mlp, torch.compile(eager_mlp, dynamic=False))
    times = [milliseconds(lambda f: torch.autograd.grad(f(*inputs), inputs, inputs[0]), f) for f in forms]
    return times[0] <= times[1]
