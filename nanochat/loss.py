"""The head's loss: projection, softcap and cross-entropy in chunks, so that the full logits never exist."""

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from nanochat import kernels

ChunkGradients = Callable[[Tensor, Tensor, Tensor, float], tuple[Tensor, Tensor]]


def softcap(z: Tensor, cap: float) -> Tensor:
    """cap·tanh(z/cap) in fp32, which keeps logits inside (-cap, cap) (Gemma 2, arXiv 2408.00118); 0 switches it off."""
    z = z.float()
    return cap * torch.tanh(z / cap) if cap else z


def _chunk_losses(x_NC: Tensor, w_VC: Tensor, targets_N: Tensor, cap: float) -> Tensor:
    """Per-token cross-entropy (N,) fp32; 0 where the target is negative."""
    logits_NV = softcap(F.linear(x_NC, w_VC), cap)
    return F.cross_entropy(logits_NV, targets_N.clamp(min=-1), ignore_index=-1, reduction="none")


def _chunk_gradients(x_NC: Tensor, w_VC: Tensor, targets_N: Tensor, cap: float) -> tuple[Tensor, Tensor]:
    """The chunk's summed loss, and the loss's gradient by the head's raw output z (N, V) in x's dtype.

    d loss / d z = (softmax(logits) - onehot) · (1 - tanh²(z/cap)); rows without a target are zero.
    """
    logits_NV = F.linear(x_NC, w_VC).float()
    if cap:
        # by exponentials, which a CPU makes three times as fast as tanh; so bounded, they need no maximum taken out
        tanh_NV = 1 - 2 / ((logits_NV * (2 / cap)).exp() + 1)
        logits_NV = cap * tanh_NV
        lse_N1 = logits_NV.exp().sum(1, keepdim=True).log()
    else:
        lse_N1 = logits_NV.logsumexp(1, keepdim=True)
    valid_N1 = (targets_N >= 0).unsqueeze(1)
    safe_N1 = targets_N.clamp(min=0).unsqueeze(1)
    loss = ((lse_N1 - logits_NV.gather(1, safe_N1)) * valid_N1).sum()
    hit_NV = torch.arange(logits_NV.size(1), device=x_NC.device) == safe_N1
    grad_NV = ((logits_NV - lse_N1).exp() - hit_NV.float()) * valid_N1
    if cap:
        grad_NV = grad_NV * (1 - tanh_NV * tanh_NV)
    return loss, grad_NV.to(x_NC.dtype)


def _triton_chunk_gradients(x_NC: Tensor, w_VC: Tensor, targets_N: Tensor, cap: float) -> tuple[Tensor, Tensor]:
    """The same in one kernel, which reads the head's output twice and overwrites it by the gradient."""
    z_NV = F.linear(x_NC, w_VC)
    return kernels.softcap_cross_entropy_(z_NV, targets_N, cap).sum(), z_NV


@functools.cache
def choose(device: torch.device, dtype: torch.dtype, compiled: bool) -> tuple[str, ChunkGradients]:
    """How a chunk's loss and gradient are made here, by name: by Triton where a probe shows that it works,
    else by torch.compile where it is wanted, else eagerly."""
    if device.type == "cuda" and kernels.triton:
        generator = torch.Generator().manual_seed(0)
        targets_N = torch.randint(-1, 70, (32,), generator=generator).to(device)
        inputs = [torch.randn(n, 16, generator=generator).to(device, dtype) for n in (32, 70)]
        forms = [
            lambda x, w, f=f: _ChunkedLossSum.apply(x, w, targets_N, 15.0, 16, f)
            for f in (_triton_chunk_gradients, _chunk_gradients)
        ]
        if kernels.agrees("Triton cross-entropy", forms[0], forms[1], inputs):
            return "triton", _triton_chunk_gradients
    if compiled:
        return "compiled", torch.compile(_chunk_gradients, dynamic=False)
    return "eager", _chunk_gradients


class _ChunkedLossSum(torch.autograd.Function):
    """Summed loss whose gradients are made in the forward pass, while each chunk's logits are still in cache."""

    @staticmethod
    def forward(ctx, x_NC, w_VC, targets_N, cap: float, chunk: int, chunk_gradients: ChunkGradients):
        w = w_VC.to(x_NC.dtype)
        total = torch.zeros((), device=x_NC.device)
        dx_NC = torch.empty_like(x_NC)
        dw_VC = torch.zeros_like(w_VC, dtype=torch.float32)
        for x, targets, dx in zip(x_NC.split(chunk), targets_N.split(chunk), dx_NC.split(chunk), strict=True):
            # a last, shorter chunk would be one more graph to compile
            make = chunk_gradients if x.size(0) == chunk else _chunk_gradients
            loss, grad_NV = make(x, w, targets, cap)
            total += loss
            torch.mm(grad_NV, w, out=dx)
            dw_VC += grad_NV.t() @ x
        ctx.save_for_backward(dx_NC, dw_VC)
        ctx.weight_dtype = w_VC.dtype
        return total

    @staticmethod
    def backward(ctx, scale: Tensor):
        dx_NC, dw_VC = ctx.saved_tensors
        return dx_NC * scale.to(dx_NC.dtype), (dw_VC * scale).to(ctx.weight_dtype), None, None, None, None


def softcap_cross_entropy(
    x_NC: Tensor,
    w_VC: Tensor,
    targets_N: Tensor,
    cap: float,
    reduction: str = "mean",
    chunk: int | None = None,
    compiled: bool = False,
) -> Tensor:
    """Cross-entropy in nats of softcapped logits x·Wᵀ against targets_N, in chunks of `chunk` tokens.

    Negative targets are ignored. reduction: "sum" | "mean" (over the targets that count; 0 when there are none) |
    "none" (per token, fp32), else ValueError. Value and gradient are the dense form's. compiled: torch.compile fuses
    a chunk's elementwise work where no kernel does (`choose`). The default chunk suits a CPU's cache, or a GPU.
    """
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"loss_reduction={reduction!r}: choose mean, sum or none")
    chunks = -(-max(1, len(x_NC)) // (chunk or (256 if x_NC.device.type == "cpu" else 4096)))
    chunk = max(1, -(-len(x_NC) // chunks))  # of one size, as far as may be
    grad = torch.is_grad_enabled() and (x_NC.requires_grad or w_VC.requires_grad)
    if grad and reduction != "none":
        chunk_gradients = choose(x_NC.device, x_NC.dtype, compiled)[1]
        total = _ChunkedLossSum.apply(x_NC, w_VC, targets_N, cap, chunk, chunk_gradients)
        return total if reduction == "sum" else total / (targets_N >= 0).sum().clamp(min=1)
    w = w_VC.to(x_NC.dtype)
    losses = []
    for x, targets in zip(x_NC.split(chunk), targets_N.split(chunk), strict=True):
        # logits are made again in the backward pass instead of being kept
        arguments = (x, w, targets, cap)
        losses.append(checkpoint(_chunk_losses, *arguments, use_reentrant=False) if grad else _chunk_losses(*arguments))
    losses_N = torch.cat(losses)
    if reduction == "none":
        return losses_N
    return losses_N.sum() if reduction == "sum" else losses_N.sum() / (targets_N >= 0).sum().clamp(min=1)
