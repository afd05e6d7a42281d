"""Attention over whole rows: one call, `attend(q_BTHD, k_BTKD, v_BTKD, window) -> y_BTHD`, and the kernels behind it.

`attend_naive` is the definition, and the oracle of every other form: causal, with grouped queries and a window. It
keeps T x T scores per head, so nothing trains with it. What does:

    attend_blocks           on CPU, our own blocks of queries
    flash3, flex, cudnn     on CUDA, kernels of others, which kernels.py tries and chooses from
    attend_sdpa             PyTorch's own kernel, where none of those works

`attend` is right on every device, if not the fastest. The engine attends to a cache instead: cached_attention.py.

Shapes: B sequences, T positions, H query heads, K kv heads (K divides H), D channels per head; N = B·H.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Attend = Callable[[Tensor, Tensor, Tensor, int], Tensor]  # (q_BTHD, k_BTKD, v_BTKD, window) -> y_BTHD
BLOCK = 128  # queries per block on CPU; GPTConfig rounds short windows up to a multiple of it


def attend_naive(q_BTHD: Tensor, k_BTKD: Tensor, v_BTKD: Tensor, window: int, sinks_H: Tensor | None = None) -> Tensor:
    """Causal attention by its definition: softmax(q·k / √D)·v over a query's own position and the `window` - 1 before.

    The K kv heads are shared evenly by the H query heads. sinks_H: one more logit per head, which takes its share of
    the softmax and gives nothing (gpt-oss). The softmax is taken in fp32. Returns (B, T, H, D).
    """
    B, T, H, D = q_BTHD.shape
    q_BHTD = heads_first(q_BTHD, H)
    k_BHTD = heads_first(k_BTKD, H)
    v_BHTD = heads_first(v_BTKD, H)
    scores_BHTT = (q_BHTD @ k_BHTD.mT).float() * D**-0.5
    scores_BHTT = scores_BHTT.masked_fill(~visible(T, window, q_BTHD.device), float("-inf"))
    if sinks_H is not None:
        sinks_BHT1 = sinks_H.float().view(1, H, 1, 1).expand(B, H, T, 1)
        scores_BHTT = torch.cat((scores_BHTT, sinks_BHT1), dim=-1)
    weights_BHTT = scores_BHTT.softmax(dim=-1)[..., :T]
    y_BHTD = weights_BHTT.to(v_BHTD.dtype) @ v_BHTD
    return y_BHTD.transpose(1, 2)


def visible(T: int, window: int, device: torch.device) -> Tensor:
    """Return (T, T), True where the query of a row may see the key of a column."""
    position_T = torch.arange(T, device=device)
    distance_TT = position_T[:, None] - position_T
    return (distance_TT >= 0) & (distance_TT < window)


def heads_first(x_BTKD: Tensor, n_heads: int) -> Tensor:
    """(B, T, K, D) -> (B, H, T, D), each kv head repeated for the query heads that share it."""
    x_BKTD = x_BTKD.transpose(1, 2)
    group = n_heads // x_BKTD.size(1)
    return x_BKTD if group == 1 else x_BKTD.repeat_interleave(group, dim=1)


def attend(q_BTHD: Tensor, k_BTKD: Tensor, v_BTKD: Tensor, window: int) -> Tensor:
    """Attention by a form that needs no probe: blocks on CPU if the window fits them, else PyTorch's kernel."""
    fits_blocks = window >= q_BTHD.size(1) or window % BLOCK == 0
    if q_BTHD.device.type == "cpu" and fits_blocks:
        return attend_blocks(q_BTHD, k_BTKD, v_BTKD, window)
    return attend_sdpa(q_BTHD, k_BTKD, v_BTKD, window)


def attend_sdpa(q_BTHD: Tensor, k_BTKD: Tensor, v_BTKD: Tensor, window: int) -> Tensor:
    """Attention by PyTorch's fused kernel. A window is a mask of T x T there, which costs more than no window."""
    T = q_BTHD.size(1)
    H = q_BTHD.size(2)
    y_BHTD = F.scaled_dot_product_attention(
        heads_first(q_BTHD, H),
        heads_first(k_BTKD, H),
        heads_first(v_BTKD, H),
        attn_mask=None if window >= T else visible(T, window, q_BTHD.device),
        is_causal=window >= T,
    )
    return y_BHTD.transpose(1, 2)


# --- CPU
#
# PyTorch's flash kernel for CPU leaves half of the machine idle, and masks for windows cost more than no windows. Here
# a block of 128 queries attends, by two matrix products around a softmax, to just the keys that some query of it may
# see; only the two corners of the band that are hidden get a mask. The softmax weights are kept for the backward pass.
# Twice as fast as the flash kernel (dev/LOG.md), and a window costs what it covers.
#
#     window 256, the third block        keys    0..127       128..255      256..383
#     queries 256..383                           left corner  all visible   causal corner


def attend_blocks(q_BTHD: Tensor, k_BTKD: Tensor, v_BTKD: Tensor, window: int) -> Tensor:
    """Attention in blocks of queries. A window is a multiple of 128, or covers the row."""
    B, T, H, D = q_BTHD.shape
    assert window >= T or window % BLOCK == 0, f"a window must be a multiple of {BLOCK}"
    # Scaling q instead of the scores touches D numbers per query, not one per key.
    q_NTD = heads_first(q_BTHD * D**-0.5, H).reshape(B * H, T, D)
    k_NTD = heads_first(k_BTKD, H).reshape(B * H, T, D)
    v_NTD = heads_first(v_BTKD, H).reshape(B * H, T, D)
    T_in_blocks = -(-T // BLOCK) * BLOCK
    y_NTD, _ = _block_attention(q_NTD, k_NTD, v_NTD, min(window, T_in_blocks))
    return y_NTD.view(B, H, T, D).transpose(1, 2)


def _blocks(T: int, window: int) -> list[tuple[int, int, int]]:
    """Return (first query, end, first key) of each block. The last key that a block needs is its last query's own."""
    return [(start, min(start + BLOCK, T), max(0, start - window)) for start in range(0, T, BLOCK)]


def _weight_count(N: int, T: int, window: int) -> int:
    """Return the number of softmax weights in all blocks."""
    return N * sum((end - start) * (end - first_key) for start, end, first_key in _blocks(T, window))


# Forward and backward are operators of PyTorch with a shape function ("fake"), so that torch.compile keeps
# a transformer block in one graph.


@torch.library.custom_op("nanochat::block_attention", mutates_args=())
def _block_attention(q_NTD: Tensor, k_NTD: Tensor, v_NTD: Tensor, window: int) -> list[Tensor]:
    """Return attention's output (N, T, D) for q that is scaled already, and the weights of all blocks, end to end."""
    N, T, _ = q_NTD.shape
    hidden = torch.full((BLOCK, BLOCK), float("-inf"), dtype=q_NTD.dtype)
    later = hidden.triu(1)  # -inf above the diagonal: keys later than the query
    left_behind = hidden.tril()  # -inf on and below the diagonal: keys that have left the query's window
    y_NTD = torch.empty_like(q_NTD)
    weights = q_NTD.new_empty(_weight_count(N, T, window))
    used = 0
    for start, end, first_key in _blocks(T, window):
        length = end - start
        scores = torch.bmm(q_NTD[:, start:end], k_NTD[:, first_key:end].mT)
        scores[:, :, start - first_key :] += later[:length, :length]
        if start >= window:
            scores[:, :, :BLOCK] += left_behind[:length]
        block = weights[used : used + scores.numel()].view(scores.shape)
        torch.softmax(scores, -1, out=block)
        torch.bmm(block, v_NTD[:, first_key:end], out=y_NTD[:, start:end])
        used += scores.numel()
    return [y_NTD, weights]


@torch.library.custom_op("nanochat::block_attention_backward", mutates_args=())
def _block_attention_backward(
    dy_NTD: Tensor, q_NTD: Tensor, k_NTD: Tensor, v_NTD: Tensor, weights: Tensor, window: int
) -> list[Tensor]:
    """Return the gradients of q, k and v, block by block from the last to the first."""
    N, T, _ = q_NTD.shape
    dq_NTD = torch.empty_like(q_NTD)
    dk_NTD = torch.zeros_like(k_NTD)
    dv_NTD = torch.zeros_like(v_NTD)
    end_of_block = weights.numel()
    for start, end, first_key in reversed(_blocks(T, window)):
        shape = (N, end - start, end - first_key)
        size = N * (end - start) * (end - first_key)
        block = weights[end_of_block - size : end_of_block].view(shape)
        end_of_block -= size
        dy = dy_NTD[:, start:end].contiguous()
        dweights = torch.bmm(dy, v_NTD[:, first_key:end].mT)
        dscores = torch._softmax_backward_data(dweights, block, -1, q_NTD.dtype)
        torch.bmm(dscores, k_NTD[:, first_key:end], out=dq_NTD[:, start:end])
        # Each key is read by several blocks, and the products add to its gradient themselves. The sums are kept in
        # q's dtype, so the small terms, which come from late queries with many keys, are added first.
        dv_NTD[:, first_key:end].baddbmm_(block.mT, dy)
        dk_NTD[:, first_key:end].baddbmm_(dscores.mT, q_NTD[:, start:end])
    return [dq_NTD, dk_NTD, dv_NTD]


@_block_attention.register_fake
def _(q_NTD, k_NTD, v_NTD, window):
    N, T, _ = q_NTD.shape
    return [torch.empty_like(q_NTD), q_NTD.new_empty(_weight_count(N, T, window))]


@_block_attention_backward.register_fake
def _(dy_NTD, q_NTD, k_NTD, v_NTD, weights, window):
    return [torch.empty_like(q_NTD), torch.empty_like(k_NTD), torch.empty_like(v_NTD)]


def _save_for_backward(ctx, inputs, output) -> None:
    q_NTD, k_NTD, v_NTD, window = inputs
    _, weights = output
    ctx.set_materialize_grads(False)  # nobody asks for a gradient of the weights: make no zeros of their size
    ctx.save_for_backward(q_NTD, k_NTD, v_NTD, weights)
    ctx.window = window


def _backward(ctx, grads):
    q_NTD, k_NTD, v_NTD, weights = ctx.saved_tensors
    dy_NTD = grads[0].contiguous()
    dq_NTD, dk_NTD, dv_NTD = _block_attention_backward(dy_NTD, q_NTD, k_NTD, v_NTD, weights, ctx.window)
    return dq_NTD, dk_NTD, dv_NTD, None


_block_attention.register_autograd(_backward, setup_context=_save_for_backward)


# --- CUDA. Kernels of others behind our call. What tracing cannot see into is told to break a block's graph there.


@functools.cache
def flash3_interface() -> Any:
    """Import FlashAttention-3's low-level module, from its own package or through the hub's package `kernels`.

    Raises ImportError where neither is installed. Remembered as an import is: the hub would be asked at each call.
    """
    try:
        import flash_attn_interface
    except ImportError:
        from kernels import get_kernel

        return get_kernel("kernels-community/flash-attn3", version=1).flash_attn_interface
    return flash_attn_interface


def flash3() -> Attend:
    """FlashAttention-3 (arXiv 2407.08608, Hopper). Raises ImportError where it is not installed."""
    flash3_interface()
    return attend_flash3


def attend_flash3(q_BTHD: Tensor, k_BTKD: Tensor, v_BTKD: Tensor, window: int) -> Tensor:
    """Attention by FlashAttention-3, differentiable, in bf16."""
    y_BTHD, _ = _flash3(q_BTHD, k_BTKD, v_BTKD, window)
    return y_BTHD


# Called as it is, a foreign kernel breaks a block's graph in two, before and after it, and nothing is fused across the
# breaks (6 of 263 ms of a d24's micro-step in fp8, counted, not measured). As an operator with a shape function it is
# one node of one graph, also where activations are recomputed.


@torch.library.custom_op("nanochat::flash3", mutates_args=())
def _flash3(q_BTHD: Tensor, k_BTKD: Tensor, v_BTKD: Tensor, window: int) -> tuple[Tensor, Tensor]:
    """Return attention's output, and the log-sum-exps (B, H, T) that its backward pass needs."""
    y_BTHD, lse_BHT, *_ = flash3_interface()._flash_attn_forward(
        q_BTHD,
        k_BTKD,
        v_BTKD,
        softmax_scale=q_BTHD.size(-1) ** -0.5,
        causal=True,
        window_size_left=window - 1,  # its windows count the keys before the query's own
        window_size_right=0,
    )
    return y_BTHD, lse_BHT


@torch.library.custom_op("nanochat::flash3_backward", mutates_args=())
def _flash3_backward(
    dy_BTHD: Tensor, q_BTHD: Tensor, k_BTKD: Tensor, v_BTKD: Tensor, y_BTHD: Tensor, lse_BHT: Tensor, window: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of q, k and v."""
    dq_BTHD = torch.empty_like(q_BTHD, memory_format=torch.contiguous_format)
    dk_BTKD = torch.empty_like(k_BTKD, memory_format=torch.contiguous_format)
    dv_BTKD = torch.empty_like(v_BTKD, memory_format=torch.contiguous_format)
    flash3_interface()._flash_attn_backward(
        dy_BTHD,
        q_BTHD,
        k_BTKD,
        v_BTKD,
        y_BTHD,
        lse_BHT,
        dq=dq_BTHD,
        dk=dk_BTKD,
        dv=dv_BTKD,
        softmax_scale=q_BTHD.size(-1) ** -0.5,
        is_causal=True,
        window_size_left=window - 1,
        window_size_right=0,
    )
    return dq_BTHD, dk_BTKD, dv_BTKD


@_flash3.register_fake
def _(q_BTHD, k_BTKD, v_BTKD, window):
    B, T, H, _ = q_BTHD.shape
    return q_BTHD.new_empty(q_BTHD.shape), q_BTHD.new_empty((B, H, T), dtype=torch.float32)


@_flash3_backward.register_fake
def _(dy_BTHD, q_BTHD, k_BTKD, v_BTKD, y_BTHD, lse_BHT, window):
    return q_BTHD.new_empty(q_BTHD.shape), k_BTKD.new_empty(k_BTKD.shape), v_BTKD.new_empty(v_BTKD.shape)


def _save_for_flash3_backward(ctx, inputs, output) -> None:
    q_BTHD, k_BTKD, v_BTKD, window = inputs
    y_BTHD, lse_BHT = output
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q_BTHD, k_BTKD, v_BTKD, y_BTHD, lse_BHT)
    ctx.window = window


def _backward_of_flash3(ctx, dy_BTHD, _):
    q_BTHD, k_BTKD, v_BTKD, y_BTHD, lse_BHT = ctx.saved_tensors
    dq_BTHD, dk_BTKD, dv_BTKD = _flash3_backward(
        dy_BTHD.contiguous(), q_BTHD, k_BTKD, v_BTKD, y_BTHD, lse_BHT, ctx.window
    )
    return dq_BTHD, dk_BTKD, dv_BTKD, None


_flash3.register_autograd(_backward_of_flash3, setup_context=_save_for_flash3_backward)


def padded(kernel: Attend) -> Attend:
    """Let a kernel see rows of multiples of 128 positions alone.

    FlexAttention compiles, and cuDNN plans, anew for each length: evaluation and RL, whose rows have all lengths, would
    wait for them again and again.
    """

    def attend_padded(q_BTHD: Tensor, k_BTKD: Tensor, v_BTKD: Tensor, window: int) -> Tensor:
        T = q_BTHD.size(1)
        missing = -T % BLOCK
        if not missing:
            return kernel(q_BTHD, k_BTKD, v_BTKD, window)
        # Rows grow at their end, and attention is causal: no query of the row sees a key that was added.
        grow = (0, 0, 0, 0, 0, missing)
        if window >= T:
            window = max(window, T + missing)  # a window that covers the row still does
        y_BTHD = kernel(F.pad(q_BTHD, grow), F.pad(k_BTKD, grow), F.pad(v_BTKD, grow), window)
        return y_BTHD[:, :T]

    return attend_padded


def cudnn() -> Attend:
    """cuDNN's kernel through PyTorch, for full causal attention."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    def attend_cudnn(q_BTHD: Tensor, k_BTKD: Tensor, v_BTKD: Tensor, window: int) -> Tensor:
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            return attend_sdpa(q_BTHD, k_BTKD, v_BTKD, window)

    return torch.compiler.disable(attend_cudnn, recursive=False)


def flex() -> Attend:
    """FlexAttention (arXiv 2412.05496), for windows: it skips the blocks of keys outside of them."""
    from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

    kernel = torch.compile(flex_attention, dynamic=False)
    block_masks: dict[tuple[int, int], BlockMask] = {}  # by window and length; making one takes longer than using it

    def attend_flex(q_BTHD: Tensor, k_BTKD: Tensor, v_BTKD: Tensor, window: int) -> Tensor:
        T = q_BTHD.size(1)

        def near(b, h, q, k):
            return (q >= k) & (q - k < window)

        if (window, T) not in block_masks:
            block_masks[window, T] = create_block_mask(near, None, None, T, T, device=str(q_BTHD.device))
        y_BHTD = kernel(
            q_BTHD.transpose(1, 2),
            k_BTKD.transpose(1, 2),
            v_BTKD.transpose(1, 2),
            block_mask=block_masks[window, T],
            enable_gqa=True,
        )
        return y_BHTD.transpose(1, 2)

    return torch.compiler.disable(attend_flex, recursive=False)
