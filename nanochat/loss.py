"""The head's loss: projection, softcap and cross-entropy, without the full logits ever existing.

Logits are the largest tensor of a training step: at d24 a micro-batch of 32 x 2048 tokens has 8.6 GB of them in fp32.
So tokens are taken in chunks. For each chunk the logits, the loss and the gradients by x and W are made in the forward
pass, while the logits are still in cache, and only the two gradients are kept. The backward pass multiplies them by
the incoming scalar.

`softcap_cross_entropy` is what the model calls. It sums the loss by `chunked_loss_sum`, the default and the oracle, or
by the faster form that kernels.py chose: the same with chunks compiled, or `liger_loss_sum` on CUDA.

The head has more rows than the vocabulary has tokens, rounded up for the hardware. All forms take the whole matrix, and
`n_vocab` says where the vocabulary ends. Cutting the rows off before would cost a copy: autograd makes the gradient of
a slice by writing one of zeros for the whole and copying into it.

Shapes: N tokens, C channels, V rows of the head; x_NC is the normed residual, w_VC the head's matrix.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

# The target where nothing is learned: a user's words, a tool's output, padding. Anything below 0 is taken for it, since
# token ids are above it. `grep IGNORED` finds all who set it or look for it.
IGNORED = -1

LossSum = Callable[[Tensor, Tensor, Tensor, float, int], Tensor]  # (x_NC, w_VC, targets_N, cap, n_vocab) -> summed loss
ChunkGradients = Callable[[Tensor, Tensor, Tensor, float, int], tuple[Tensor, Tensor]]

# Tokens of a chunk. 256 fit a CPU's cache. The gradient of W is added up in fp32 over the chunks, and each addition
# moves 20 bytes per entry: on a GPU chunks are as large as memory allows, which is more where the work between the
# products is fused and nothing of it is written in fp32.
CPU_CHUNK = 256
CUDA_CHUNK = 4096
CUDA_CHUNK_COMPILED = 16384


def softcap(z: Tensor, cap: float) -> Tensor:
    """Return cap·tanh(z/cap) in fp32, which lies in (-cap, cap); a cap of 0 switches it off (Gemma 2, 2408.00118).

    It keeps single logits from running away, and near zero it is the identity.
    """
    z = z.float()
    if not cap:
        return z
    if torch.is_inference_mode_enabled():
        # tanh(u) = 1 - 2/(e^2u + 1), in place: half the time on CPU, but it has no gradient where exp overflows.
        z = z.mul(2 / cap).exp_().add_(1)
        return cap - z.reciprocal_().mul_(2 * cap)
    return cap * torch.tanh(z / cap)


def chunked_loss_sum(
    x_NC: Tensor,
    w_VC: Tensor,
    targets_N: Tensor,
    cap: float,
    n_vocab: int,
    chunk: int | None = None,
    chunk_gradients: ChunkGradients | None = None,
) -> Tensor:
    """The summed loss in plain PyTorch, in chunks of about `chunk` tokens (default: what suits the device).

    It is the oracle of every faster form. chunk_gradients: `make_chunk_gradients`, or that function compiled.
    """
    size = chunk_size(x_NC, chunk)
    return _ChunkedLossSum.apply(x_NC, w_VC, targets_N, cap, n_vocab, size, chunk_gradients or make_chunk_gradients)


def chunk_size(x_NC: Tensor, chunk: int | None = None) -> int:
    """Return the size of equal chunks of about `chunk` tokens. The default fits a CPU's cache, or keeps a GPU busy."""
    n_tokens = max(1, len(x_NC))
    largest = chunk or (CPU_CHUNK if x_NC.device.type == "cpu" else CUDA_CHUNK)
    n_chunks = -(-n_tokens // largest)
    return -(-n_tokens // n_chunks)


class _ChunkedLossSum(torch.autograd.Function):
    """The summed loss, with its gradients made in the forward pass."""

    @staticmethod
    def forward(ctx, x_NC, w_VC, targets_N, cap: float, n_vocab: int, chunk: int, chunk_gradients: ChunkGradients):
        w = w_VC.to(x_NC.dtype)
        total = torch.zeros((), device=x_NC.device)
        dx_NC = torch.empty_like(x_NC)
        dw_VC = torch.zeros_like(w_VC, dtype=torch.float32)
        for x, targets, dx in zip(x_NC.split(chunk), targets_N.split(chunk), dx_NC.split(chunk), strict=True):
            # A last, shorter chunk would be one more graph to compile: it is made eagerly.
            gradients_of = chunk_gradients if x.size(0) == chunk else make_chunk_gradients
            loss, dz_NV = gradients_of(x, w, targets, cap, n_vocab)
            total += loss
            torch.mm(dz_NV, w, out=dx)
            dw_VC += dz_NV.t() @ x
        ctx.save_for_backward(dx_NC, dw_VC)
        ctx.weight_dtype = w_VC.dtype
        return total

    @staticmethod
    def backward(ctx, scale: Tensor):
        dx_NC, dw_VC = ctx.saved_tensors
        dx_NC = dx_NC * scale.to(dx_NC.dtype)
        dw_VC = (dw_VC * scale).to(ctx.weight_dtype)
        return dx_NC, dw_VC, None, None, None, None, None


def make_chunk_gradients(
    x_NC: Tensor, w_VC: Tensor, targets_N: Tensor, cap: float, n_vocab: int
) -> tuple[Tensor, Tensor]:
    """Return a chunk's summed loss, and its gradient (N, V) by the head's raw output z = x·Wᵀ, in x's dtype."""
    return gradients_by_output(F.linear(x_NC, w_VC), targets_N, cap, n_vocab)


def gradients_by_output(z_NV: Tensor, targets_N: Tensor, cap: float, n_vocab: int) -> tuple[Tensor, Tensor]:
    """Return a chunk's summed loss, and its gradient (N, V) by the head's raw output z, in z's dtype.

    d loss / d z = (softmax(logits) - onehot) · (1 - tanh²(z/cap)); rows without a target are zero, and so are the
    columns after the vocabulary.
    """
    padding = z_NV.size(1) - n_vocab
    logits_NV = z_NV[:, :n_vocab].float()
    if cap:
        # tanh(u) = 1 - 2/(e^2u + 1): a CPU makes exponentials three times as fast as tanh.
        tanh_NV = 1 - 2 / ((logits_NV * (2 / cap)).exp() + 1)
        logits_NV = cap * tanh_NV
        # Logits in (-cap, cap) cannot overflow exp: the usual pass that subtracts the maximum is not needed.
        lse_N1 = logits_NV.exp().sum(1, keepdim=True).log()
    else:
        lse_N1 = logits_NV.logsumexp(1, keepdim=True)
    valid_N1 = (targets_N > IGNORED).unsqueeze(1)
    safe_N1 = targets_N.clamp(min=0).unsqueeze(1)
    loss = ((lse_N1 - logits_NV.gather(1, safe_N1)) * valid_N1).sum()

    onehot_NV = torch.arange(n_vocab, device=z_NV.device) == safe_N1
    dz_NV = ((logits_NV - lse_N1).exp() - onehot_NV.float()) * valid_N1
    if cap:
        dz_NV = dz_NV * (1 - tanh_NV * tanh_NV)
    dz_NV = dz_NV.to(z_NV.dtype)
    return loss, F.pad(dz_NV, (0, padding)) if padding else dz_NV


def losses_by_token(
    x_NC: Tensor, w_VC: Tensor, targets_N: Tensor, cap: float, n_vocab: int, chunk: int | None = None
) -> Tensor:
    """Return the loss of each token (N,) in fp32, chunk by chunk; 0 where the target is negative."""

    def losses_of(x: Tensor, targets: Tensor) -> Tensor:
        logits_NV = softcap(F.linear(x, w)[:, :n_vocab], cap)
        return F.cross_entropy(logits_NV, targets.clamp(min=IGNORED), ignore_index=IGNORED, reduction="none")

    w = w_VC.to(x_NC.dtype)
    size = chunk_size(x_NC, chunk)
    losses = []
    for x, targets in zip(x_NC.split(size), targets_N.split(size), strict=True):
        # Each token's gradient will be weighted on its own, so none can be made now. `checkpoint` makes the logits
        # again in the backward pass instead of keeping them.
        losses.append(checkpoint(losses_of, x, targets, use_reentrant=False))
    return torch.cat(losses)


def liger_loss_sum(x_NC: Tensor, w_VC: Tensor, targets_N: Tensor, cap: float, n_vocab: int) -> Tensor:
    """The summed loss by liger-kernel (arXiv 2410.10989), whose Triton kernel overwrites a chunk's logits once.

    Raises ImportError where the package or Triton is not installed.
    """
    from liger_kernel.transformers.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyLoss

    loss = LigerFusedLinearCrossEntropyLoss(
        ignore_index=IGNORED,
        reduction="sum",
        softcap=cap or None,
        accum_dtype=torch.float32,  # the gradient of W is a sum over chunks, which bf16 would round at each of them
    )
    if n_vocab < len(w_VC):  # its kernel knows of no end but the matrix's own
        w_VC = w_VC[:n_vocab]
    return loss(w_VC.to(x_NC.dtype), x_NC, targets_N.clamp(min=IGNORED))


def softcap_cross_entropy(
    x: Tensor,
    w_VC: Tensor,
    targets: Tensor,
    cap: float,
    reduction: str = "mean",
    loss_sum: LossSum = chunked_loss_sum,
    n_vocab: int | None = None,
) -> Tensor:
    """Cross-entropy in nats of softcapped logits x·Wᵀ, x (..., C), against targets (...). IGNORED ones do not count.

    n_vocab: rows of W that are tokens; the rest pads it. None = all.
    reduction: "sum" | "mean" (over the targets that count; 0 when there are none) | "none" (like targets, fp32);
    others raise ValueError. loss_sum: the form of the sum to differentiate.
    """
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"loss_reduction={reduction!r}: choose mean, sum or none")
    x_NC = x.flatten(0, -2)
    targets_N = targets.flatten().to(x.device)
    if n_vocab is None:
        n_vocab = len(w_VC)
    if reduction == "none":
        return losses_by_token(x_NC, w_VC, targets_N, cap, n_vocab).view(targets.shape)
    if torch.is_grad_enabled() and (x.requires_grad or w_VC.requires_grad):
        total = loss_sum(x_NC, w_VC, targets_N, cap, n_vocab)
    else:
        total = losses_by_token(x_NC, w_VC, targets_N, cap, n_vocab).sum()  # without the gradients, a third of the work
    return total if reduction == "sum" else total / (targets_N > IGNORED).sum().clamp(min=1)
