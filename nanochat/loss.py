"""The head's loss: projection, softcap and cross-entropy, without the full logits ever existing.

Logits are the largest tensor of a training step: at d24 a micro-batch of 32 x 2048 tokens has 8.6 GB of them in fp32.
So tokens are taken in chunks. For each chunk the logits, the loss and the gradients by x and W are made in the forward
pass, while the logits are still in cache, and only the two gradients are kept. The backward pass multiplies them by
the incoming scalar.

`softcap_cross_entropy` is what the model calls. `choose` picks the form for training on this machine: `liger-kernel`'s
Triton kernel on CUDA where it is installed and a probe agrees, else `chunked_loss_sum`, compiled where that is wanted.
`chunked_loss_sum` is the default everywhere else and the oracle of the probe.

Shapes: N tokens, C channels, V vocabulary; x_NC is the normed residual, w_VC the head's matrix.
"""

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from nanochat.compute import kernel_agrees

LossSum = Callable[[Tensor, Tensor, Tensor, float], Tensor]  # (x_NC, w_VC, targets_N, cap) -> summed loss
ChunkGradients = Callable[[Tensor, Tensor, Tensor, float], tuple[Tensor, Tensor]]


def softcap(z: Tensor, cap: float) -> Tensor:
    """Return cap·tanh(z/cap) in fp32, which lies in (-cap, cap); a cap of 0 switches it off (Gemma 2, 2408.00118).

    It keeps single logits from running away, and near zero it is the identity.
    """
    z = z.float()
    if cap and torch.is_inference_mode_enabled():
        # The same, written with exp and in place: half the time on CPU, but no gradient where exp overflows.
        z = z.mul(2 / cap).exp_().add_(1)
        return cap - z.reciprocal_().mul_(2 * cap)
    return cap * torch.tanh(z / cap) if cap else z


def softcap_cross_entropy(
    x: Tensor,
    w_VC: Tensor,
    targets: Tensor,
    cap: float,
    reduction: str = "mean",
    chunk: int | None = None,
    compiled: bool = False,
) -> Tensor:
    """Cross-entropy in nats of softcapped logits x·Wᵀ, x (..., C), against targets (...). Negative ones are ignored.

    reduction: "sum" | "mean" (over the targets that count; 0 when there are none) | "none" (like targets, fp32);
    others raise ValueError. chunk: tokens per chunk, by default what suits the device. compiled: see `choose`.
    """
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"loss_reduction={reduction!r}: choose mean, sum or none")
    x_NC = x.flatten(0, -2)
    targets_N = targets.flatten().to(x.device)
    differentiable = torch.is_grad_enabled() and (x_NC.requires_grad or w_VC.requires_grad)
    if reduction == "none" or not differentiable:
        losses_N = _losses_by_token(x_NC, w_VC, targets_N, cap, chunk, differentiable)
        if reduction == "none":
            return losses_N.view(targets.shape)
        total = losses_N.sum()
    elif chunk is None:
        _, loss_sum = choose(x_NC.device, x_NC.dtype, compiled)
        total = loss_sum(x_NC, w_VC, targets_N, cap)
    else:
        total = chunked_loss_sum(x_NC, w_VC, targets_N, cap, chunk)
    return total if reduction == "sum" else total / (targets_N >= 0).sum().clamp(min=1)


@functools.cache
def choose(device: torch.device, dtype: torch.dtype, compiled: bool) -> tuple[str, LossSum]:
    """Return the form of the summed loss to train with here, and its name. The answer is remembered, as probes cost.

    compiled: where liger-kernel is not used, have torch.compile fuse the elementwise work of a chunk.
    """
    if device.type == "cuda" and liger_agrees(device, dtype, liger_loss_sum):
        return "liger", liger_loss_sum
    if compiled:
        fused = torch.compile(_chunk_gradients, dynamic=False)
        return "compiled", functools.partial(chunked_loss_sum, chunk_gradients=fused)
    return "eager", chunked_loss_sum


def liger_agrees(device: torch.device, dtype: torch.dtype, form: LossSum) -> bool:
    """Return whether `form` gives the value and gradients of `chunked_loss_sum` here, ignored targets included."""
    generator = torch.Generator().manual_seed(0)
    targets_N = torch.randint(0, 70, (32,), generator=generator)
    targets_N[::3] = -1
    targets_N = targets_N.to(device)
    x_NC = torch.randn(32, 16, generator=generator).to(device, dtype)
    w_VC = torch.randn(70, 16, generator=generator).to(device, dtype)
    return kernel_agrees(
        "liger-kernel's cross-entropy",
        lambda x, w: form(x, w, targets_N, 15.0),
        lambda x, w: chunked_loss_sum(x, w, targets_N, 15.0),
        [x_NC, w_VC],
    )


def liger_loss_sum(x_NC: Tensor, w_VC: Tensor, targets_N: Tensor, cap: float) -> Tensor:
    """The summed loss by liger-kernel (arXiv 2410.10989): chunks as here, but each chunk's logits are read twice and
    overwritten once by one Triton kernel. Raises ImportError where the package or Triton is not installed."""
    from liger_kernel.transformers.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyLoss

    loss = LigerFusedLinearCrossEntropyLoss(
        ignore_index=-1,
        reduction="sum",
        softcap=cap or None,
        accum_dtype=torch.float32,  # the gradient of W is a sum over chunks, which bf16 would round at each of them
    )
    return loss(w_VC.to(x_NC.dtype), x_NC, targets_N.clamp(min=-1))


def chunked_loss_sum(
    x_NC: Tensor,
    w_VC: Tensor,
    targets_N: Tensor,
    cap: float,
    chunk: int | None = None,
    chunk_gradients: ChunkGradients | None = None,
) -> Tensor:
    """The summed loss in plain PyTorch, in chunks of equal size. `chunk_gradients` defaults to the eager form below."""
    size = _chunk_size(x_NC, chunk)
    return _ChunkedLossSum.apply(x_NC, w_VC, targets_N, cap, size, chunk_gradients or _chunk_gradients)


def _chunk_size(x_NC: Tensor, chunk: int | None) -> int:
    """Return the size of equal chunks of about `chunk` tokens. The default fits a CPU's cache, or keeps a GPU busy."""
    n_tokens = max(1, len(x_NC))
    largest = chunk or (256 if x_NC.device.type == "cpu" else 4096)
    n_chunks = -(-n_tokens // largest)
    return -(-n_tokens // n_chunks)


class _ChunkedLossSum(torch.autograd.Function):
    """The summed loss, with its gradients made in the forward pass."""

    @staticmethod
    def forward(ctx, x_NC, w_VC, targets_N, cap: float, chunk: int, chunk_gradients: ChunkGradients):
        w = w_VC.to(x_NC.dtype)
        total = torch.zeros((), device=x_NC.device)
        dx_NC = torch.empty_like(x_NC)
        dw_VC = torch.zeros_like(w_VC, dtype=torch.float32)
        for x, targets, dx in zip(x_NC.split(chunk), targets_N.split(chunk), dx_NC.split(chunk), strict=True):
            # A last, shorter chunk would be one more graph to compile: it is made eagerly.
            make = chunk_gradients if x.size(0) == chunk else _chunk_gradients
            loss, dz_NV = make(x, w, targets, cap)
            total += loss
            torch.mm(dz_NV, w, out=dx)
            dw_VC += dz_NV.t() @ x
        ctx.save_for_backward(dx_NC, dw_VC)
        ctx.weight_dtype = w_VC.dtype
        return total

    @staticmethod
    def backward(ctx, scale: Tensor):
        dx_NC, dw_VC = ctx.saved_tensors
        return dx_NC * scale.to(dx_NC.dtype), (dw_VC * scale).to(ctx.weight_dtype), None, None, None, None


def _chunk_gradients(x_NC: Tensor, w_VC: Tensor, targets_N: Tensor, cap: float) -> tuple[Tensor, Tensor]:
    """Return a chunk's summed loss, and its gradient (N, V) by the head's raw output z = x·Wᵀ, in x's dtype.

    d loss / d z = (softmax(logits) - onehot) · (1 - tanh²(z/cap)); rows without a target are zero.
    """
    logits_NV = F.linear(x_NC, w_VC).float()
    if cap:
        # tanh(u) = 1 - 2/(e^2u + 1): a CPU makes exponentials three times as fast as tanh.
        tanh_NV = 1 - 2 / ((logits_NV * (2 / cap)).exp() + 1)
        logits_NV = cap * tanh_NV
        # Logits in (-cap, cap) cannot overflow exp: the usual pass that subtracts the maximum is not needed.
        lse_N1 = logits_NV.exp().sum(1, keepdim=True).log()
    else:
        lse_N1 = logits_NV.logsumexp(1, keepdim=True)
    valid_N1 = (targets_N >= 0).unsqueeze(1)
    safe_N1 = targets_N.clamp(min=0).unsqueeze(1)
    loss = ((lse_N1 - logits_NV.gather(1, safe_N1)) * valid_N1).sum()
    onehot_NV = torch.arange(logits_NV.size(1), device=x_NC.device) == safe_N1
    dz_NV = ((logits_NV - lse_N1).exp() - onehot_NV.float()) * valid_N1
    if cap:
        dz_NV = dz_NV * (1 - tanh_NV * tanh_NV)
    return loss, dz_NV.to(x_NC.dtype)


def _losses_by_token(
    x_NC: Tensor, w_VC: Tensor, targets_N: Tensor, cap: float, chunk: int | None, differentiable: bool
) -> Tensor:
    """Return the loss of each token (N,) in fp32, chunk by chunk; 0 where the target is negative."""
    w = w_VC.to(x_NC.dtype)
    size = _chunk_size(x_NC, chunk)
    losses = []
    for x, targets in zip(x_NC.split(size), targets_N.split(size), strict=True):
        if differentiable:
            # Each token's gradient will be weighted on its own, so none can be made now. The logits are made again in
            # the backward pass instead of being kept.
            losses.append(checkpoint(_chunk_losses, x, w, targets, cap, use_reentrant=False))
        else:
            losses.append(_chunk_losses(x, w, targets, cap))
    return torch.cat(losses)


def _chunk_losses(x_NC: Tensor, w_VC: Tensor, targets_N: Tensor, cap: float) -> Tensor:
    logits_NV = softcap(F.linear(x_NC, w_VC), cap)
    return F.cross_entropy(logits_NV, targets_N.clamp(min=-1), ignore_index=-1, reduction="none")
