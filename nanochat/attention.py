"""Attention: one call in training, one in cached inference, both held against one plain definition.

`attend_naive` is the definition: causal, grouped-query, with a window. It needs memory for T x T scores per head, so
training uses a faster backend that `choose` finds: on CPU our own blocks of queries, on CUDA FlashAttention-3, or
FlexAttention for windows and cuDNN for full attention. A backend is chosen because a probe saw it agree with the
definition on this machine, not because its package imports.

Inference attends to keys and values in a cache: `cached_attention` and `attend_to_slots`.

Shapes: B sequences, T positions, H query heads, K kv heads (K divides H), D channels per head, S slots of a cache.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from nanochat.compute import kernel_agrees

Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, int], torch.Tensor]  # (q_BTHD, k_BTKD, v_BTKD, window)
BLOCK = 128  # queries per block on CPU; GPTConfig rounds short windows up to a multiple of it


def attend_naive(q_BTHD: torch.Tensor, k_BTKD: torch.Tensor, v_BTKD: torch.Tensor, window: int) -> torch.Tensor:
    """Causal attention by its definition: the oracle of every other form.

    Each of the H query heads attends with its kv head (K divides H) to its own position and the `window` - 1
    before it; scores are scaled by 1/sqrt(D). Returns (B, T, H, D).
    """
    positions_1T = torch.arange(q_BTHD.size(1), device=q_BTHD.device)[None]
    return cached_attention(q_BTHD, k_BTKD, v_BTKD, positions_1T, window)


def cached_attention(
    q_BTHD: torch.Tensor,
    k_BSKD: torch.Tensor,
    v_BSKD: torch.Tensor,
    positions_BT: torch.Tensor,
    window: int,
    sinks_H: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention of new queries to keys of which slot s holds position s, by its definition. Returns (B, T, H, D).

    positions_BT: where each query stands; rows may differ in length. A query at position p sees slots p - window + 1
    .. p. A negative position marks padding, whose output means nothing (but is finite).
    sinks_H: one more logit per head, unscaled, that takes its share of the softmax and gives nothing (gpt-oss).
    """
    distance_BTS = positions_BT.clamp(min=0)[:, :, None] - torch.arange(k_BSKD.size(1), device=q_BTHD.device)
    hidden_BTS = (distance_BTS < 0) | (distance_BTS >= window)
    mask_B1MS = mask(hidden_BTS, q_BTHD.size(2) // k_BSKD.size(2), q_BTHD.dtype).float()
    keys_GDS = k_BSKD.permute(0, 2, 3, 1).flatten(0, 1)
    values_GSD = v_BSKD.transpose(1, 2).flatten(0, 1)
    return attend_to_slots(q_BTHD, keys_GDS, values_GSD, mask_B1MS, q_BTHD.size(3) ** -0.5, sinks_H)


def _order_matters(device: torch.device, dtype: torch.dtype, deterministic: bool) -> bool:
    """Return whether products must be given a certain shape for their sums to be taken in a certain order."""
    return deterministic and device.type == "cpu" and dtype == torch.float32


def mask(hidden_BTS: torch.Tensor, group: int, dtype: torch.dtype, deterministic: bool = True) -> torch.Tensor:
    """Return what `attend_to_slots` adds to scores, (B, 1, M, S): -inf where `hidden`, else 0.

    It has a row for each of the M = T·group queries that share a kv head, and in fp32 on CPU as many more as make
    a multiple of eight (see `attend_to_slots`).
    """
    mask_BTS = torch.zeros_like(hidden_BTS, dtype=dtype).masked_fill_(hidden_BTS, float("-inf"))
    mask_BMS = mask_BTS[:, :, None].expand(-1, -1, group, -1).flatten(1, 2)
    if _order_matters(hidden_BTS.device, dtype, deterministic):
        mask_BMS = F.pad(mask_BMS, (0, 0, 0, -mask_BMS.size(1) % 8))
    return mask_BMS[:, None]


@torch.jit.script_if_tracing  # the tracer alone would fix the number of parts (cpu_trace.py)
def _product_in_parts(weights_GMS: torch.Tensor, values_GSD: torch.Tensor) -> torch.Tensor:
    """Return weights·values (G, M, D), summed over slots in parts of 128."""
    y_GMD = torch.bmm(weights_GMS[:, :, :128], values_GSD[:, :128])
    for start in range(128, weights_GMS.size(2), 128):
        y_GMD = torch.baddbmm(y_GMD, weights_GMS[:, :, start : start + 128], values_GSD[:, start : start + 128])
    return y_GMD


def attend_to_slots(
    q_BTHD: torch.Tensor,
    keys_GDS: torch.Tensor,
    values_GSD: torch.Tensor,
    mask_B1MS: torch.Tensor,
    scale: float,
    sinks_H: torch.Tensor | None = None,
    deterministic: bool = True,
) -> torch.Tensor:
    """softmax(scale · q·keys + mask) · values, as two batched matrix products around a softmax; G = B·K of them.

    Returns (B, T, H, D). The softmax is taken in the mask's dtype, or q's where that is longer.

    deterministic: a query's result has the same bits whatever other queries, rows and hidden slots there are (on CPU,
    for slots in multiples of 128). In bf16 it always has. In fp32 the order of a sum changes with the shape of
    a product, unless its rows are a multiple of eight, and sums over slots are taken in parts of 128.
    """
    B, T, H, D = map(
        int, q_BTHD.shape
    )  # int: constants in a trace (cpu_trace.py), which fits any B as it says -1 below
    K = int(keys_GDS.size(0)) // B
    group = H // K
    M = T * group
    rows = int(mask_B1MS.size(2))
    if T == 1:
        q_GMD = q_BTHD.reshape(-1, group, D)
    else:
        q_GMD = q_BTHD.unflatten(2, (K, group)).transpose(1, 2).reshape(B * K, M, D)
    if rows > M:
        q_GMD = F.pad(q_GMD, (0, 0, 0, rows - M))
    scores_BKMS = torch.add(mask_B1MS, torch.bmm(q_GMD, keys_GDS).unflatten(0, (-1, K)), alpha=scale)
    if sinks_H is not None:
        sinks_1K1G1 = sinks_H.to(scores_BKMS.dtype).view(1, K, 1, group, 1)
        sinks_BKM1 = sinks_1K1G1.expand(scores_BKMS.size(0), K, T, group, 1).flatten(2, 3)
        scores_BKMS = torch.cat((F.pad(sinks_BKM1, (0, 0, 0, rows - M)), scores_BKMS), dim=-1)
    weights_GMS = scores_BKMS.softmax(-1).flatten(0, 1)
    if sinks_H is not None:
        weights_GMS = weights_GMS[..., 1:]
    weights_GMS = weights_GMS.to(values_GSD.dtype)
    if _order_matters(q_BTHD.device, q_BTHD.dtype, deterministic):
        y_GMD = _product_in_parts(weights_GMS, values_GSD)
    else:
        y_GMD = torch.bmm(weights_GMS, values_GSD)
    if rows > M:
        y_GMD = y_GMD[:, :M]
    if T == 1:
        return y_GMD.reshape(-1, 1, H, D)
    return y_GMD.reshape(B, K, T, group, D).transpose(1, 2).reshape(B, T, H, D)


def attend_fused(
    q_BTHD: torch.Tensor, keys_GDS: torch.Tensor, values_GSD: torch.Tensor, mask_B1MS: torch.Tensor
) -> torch.Tensor:
    """`attend_to_slots` by PyTorch's fused kernel, for prefill on a GPU: no scores are ever written to memory.

    Query heads that share a kv head become further queries of it, so keys and values are not repeated.
    """
    B, T, H, _ = q_BTHD.shape
    K = keys_GDS.size(0) // B
    q_BKMD = q_BTHD.unflatten(2, (K, H // K)).transpose(1, 2).flatten(2, 3)
    keys_BKSD = keys_GDS.transpose(1, 2).unflatten(0, (B, K))
    values_BKSD = values_GSD.unflatten(0, (B, K))
    mask_BKMS = mask_B1MS.expand(-1, K, -1, -1)
    y_BKMD = F.scaled_dot_product_attention(q_BKMD, keys_BKSD, values_BKSD, attn_mask=mask_BKMS)
    return y_BKMD.unflatten(2, (T, H // K)).transpose(1, 2).flatten(2, 3)


def _heads_first(x_BTHD: torch.Tensor, heads: int) -> torch.Tensor:
    """(B, T, K, D) -> (B, H, T, D), each kv head repeated for the query heads that share it."""
    x_BKTD = x_BTHD.transpose(1, 2)
    return x_BKTD if x_BKTD.size(1) == heads else x_BKTD.repeat_interleave(heads // x_BKTD.size(1), dim=1)


def _attend_sdpa(q_BTHD: torch.Tensor, k_BTKD: torch.Tensor, v_BTKD: torch.Tensor, window: int) -> torch.Tensor:
    """PyTorch's fused kernel, for full causal attention only: with a window it would need a mask of T x T."""
    assert window >= q_BTHD.size(1)
    q, k, v = (_heads_first(x, q_BTHD.size(2)) for x in (q_BTHD, k_BTKD, v_BTKD))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)


# CPU. PyTorch's flash kernel for CPU leaves half of the machine idle, and masks for windows cost more than no windows.
# Here a block of 128 queries attends, by two matrix products around a softmax, to just the keys that some query of
# it may see; only the two corners of the band that are hidden get a mask. The softmax weights are kept for the
# backward pass. Twice as fast as the flash kernel (dev/LOG.md), and a window costs what it covers.


def _hidden_above_diagonal(size: int, like: torch.Tensor) -> torch.Tensor:
    """-inf strictly above the diagonal, else 0: the keys later than each query of a block (causality)."""
    return torch.full((size, size), float("-inf"), dtype=like.dtype).triu(1)


def _hidden_up_to_diagonal(size: int, like: torch.Tensor) -> torch.Tensor:
    """-inf on and below the diagonal, else 0: the keys that have left the window of each query of a block."""
    return torch.full((size, size), float("-inf"), dtype=like.dtype).tril()


def _block_spans(T: int, window: int) -> list[tuple[int, int, int]]:
    """Return (first query, end, first key) for each block of queries. The last key is the last query's own."""
    return [(start, min(start + BLOCK, T), max(0, start - window)) for start in range(0, T, BLOCK)]


def _kept_weights(N: int, T: int, window: int) -> int:
    """Return the number of softmax weights of all blocks."""
    return N * sum((end - start) * (end - first_key) for start, end, first_key in _block_spans(T, window))


# An operator of PyTorch with a shape function ("fake"), so that torch.compile keeps a transformer block in one graph.


@torch.library.custom_op("nanochat::block_attention", mutates_args=())
def _block_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: int) -> list[torch.Tensor]:
    """Causal windowed attention for (N, T, D) each, N = sequences x heads, with q scaled already.

    Returns the output (N, T, D), and the weights of all blocks end to end in one flat tensor.
    """
    N, T, _ = q.shape
    later = _hidden_above_diagonal(BLOCK, q)
    left_behind = _hidden_up_to_diagonal(BLOCK, q)
    out = torch.empty_like(q)
    weights = q.new_empty(_kept_weights(N, T, window))
    taken = 0
    for start, end, first_key in _block_spans(T, window):
        length = end - start
        scores = torch.bmm(q[:, start:end], k[:, first_key:end].mT)
        scores[:, :, start - first_key :] += later[:length, :length]
        if start >= window:
            scores[:, :, :BLOCK] += left_behind[:length]
        block = weights[taken : taken + scores.numel()].view(scores.shape)
        torch.softmax(scores, -1, out=block)
        torch.bmm(block, v[:, first_key:end], out=out[:, start:end])
        taken += scores.numel()
    return [out, weights]


@_block_attention.register_fake
def _(q, k, v, window):
    return [torch.empty_like(q), q.new_empty(_kept_weights(q.size(0), q.size(1), window))]


@torch.library.custom_op("nanochat::block_attention_backward", mutates_args=())
def _block_attention_backward(
    grad: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, weights: torch.Tensor, window: int
) -> list[torch.Tensor]:
    N, T, _ = q.shape
    dq = torch.empty_like(q)
    dk = torch.zeros_like(k)
    dv = torch.zeros_like(v)
    taken = weights.numel()
    for start, end, first_key in reversed(_block_spans(T, window)):
        size = N * (end - start) * (end - first_key)
        block = weights[taken - size : taken].view(N, end - start, end - first_key)
        taken -= size
        dy = grad[:, start:end].contiguous()
        dweights = torch.bmm(dy, v[:, first_key:end].mT)
        dscores = torch._softmax_backward_data(dweights, block, -1, q.dtype)
        torch.bmm(dscores, k[:, first_key:end], out=dq[:, start:end])
        # Each key is read by several blocks, and the products add to its gradient themselves. The sums are kept in
        # q's dtype, so the small terms, which come from late queries with many keys, are added first.
        dv[:, first_key:end].baddbmm_(block.mT, dy)
        dk[:, first_key:end].baddbmm_(dscores.mT, q[:, start:end])
    return [dq, dk, dv]


@_block_attention_backward.register_fake
def _(grad, q, k, v, weights, window):
    return [torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)]


def _save_for_backward(ctx, inputs, output) -> None:
    q, k, v, window = inputs
    _, weights = output
    ctx.set_materialize_grads(False)  # nobody asks for a gradient of the weights: make no zeros of their size
    ctx.save_for_backward(q, k, v, weights)
    ctx.window = window


def _backward(ctx, grads):
    q, k, v, weights = ctx.saved_tensors
    dq, dk, dv = _block_attention_backward(grads[0].contiguous(), q, k, v, weights, ctx.window)
    return dq, dk, dv, None


_block_attention.register_autograd(_backward, setup_context=_save_for_backward)


def _attend_blocks(q_BTHD: torch.Tensor, k_BTKD: torch.Tensor, v_BTKD: torch.Tensor, window: int) -> torch.Tensor:
    """Full or windowed causal attention on CPU, by `_block_attention`. A window is a multiple of 128, or covers all."""
    B, T, H, D = q_BTHD.shape
    assert window >= T or window % BLOCK == 0, f"a window must be a multiple of {BLOCK}"
    # Scaling q instead of the scores touches D numbers per query, not one per key.
    q = _heads_first(q_BTHD * D**-0.5, H).reshape(B * H, T, D)
    k = _heads_first(k_BTKD, H).reshape(B * H, T, D)
    v = _heads_first(v_BTKD, H).reshape(B * H, T, D)
    whole = -(-T // BLOCK) * BLOCK
    y, _ = _block_attention(q, k, v, min(window, whole))
    return y.view(B, H, T, D).transpose(1, 2)


# GPU. Each function below returns a backend, and raises ImportError where its package is not installed.


def flash3() -> Attend:
    """FlashAttention-3 (arXiv 2407.08608, Hopper), from its own package or through the hub's package `kernels`."""
    try:
        from flash_attn_interface import flash_attn_func
    except ImportError:
        from kernels import get_kernel

        flash_attn_func = get_kernel("kernels-community/flash-attn3", version=1).flash_attn_func

    def attend(q_BTHD: torch.Tensor, k_BTKD: torch.Tensor, v_BTKD: torch.Tensor, window: int) -> torch.Tensor:
        # Its windows count the keys before the query's own.
        y = flash_attn_func(q_BTHD, k_BTKD, v_BTKD, causal=True, window_size=(window - 1, 0))
        return y[0] if isinstance(y, tuple) else y  # older versions return the log-sum-exps too

    return attend


def cudnn() -> Attend:
    """cuDNN's kernel through PyTorch; full causal attention only."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    def attend(q_BTHD: torch.Tensor, k_BTKD: torch.Tensor, v_BTKD: torch.Tensor, window: int) -> torch.Tensor:
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            return _attend_sdpa(q_BTHD, k_BTKD, v_BTKD, window)

    return attend


def flex() -> Attend:
    """FlexAttention: blocks outside a window are skipped. Full attention goes to what is fastest at that."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    kernel = torch.compile(flex_attention, dynamic=False)
    block_masks: dict[tuple[int, int, torch.device], Any] = {}  # a model has two windows at most, and one length

    def attend(q_BTHD: torch.Tensor, k_BTKD: torch.Tensor, v_BTKD: torch.Tensor, window: int) -> torch.Tensor:
        T, device = q_BTHD.size(1), q_BTHD.device
        if window >= T:
            _, full = choose(device, q_BTHD.dtype, q_BTHD.size(3), windowed=False)
            return full(q_BTHD, k_BTKD, v_BTKD, window)

        def near(b, h, q, k):
            return (q >= k) & (q - k < window)

        key = (window, T, device)
        if key not in block_masks:
            block_masks[key] = create_block_mask(near, None, None, T, T, device=str(device))
        q, k, v = (x.transpose(1, 2) for x in (q_BTHD, k_BTKD, v_BTKD))
        return kernel(q, k, v, block_mask=block_masks[key], enable_gqa=True).transpose(1, 2)

    return attend


def blocks() -> Attend:
    """Blocks of queries on CPU: see above."""
    return _attend_blocks


def backends(device_type: str, windowed: bool) -> tuple[tuple[str, Callable[[], Attend]], ...]:
    """Return the candidates for a device, fastest first. windowed: some layers have windows."""
    if device_type == "cuda":
        return (("flash-attention-3", flash3), ("flex", flex) if windowed else ("cudnn", cudnn))
    if device_type == "cpu":
        return (("blocks", blocks),)
    return ()


def works(name: str, make: Callable[[], Attend], device: torch.device, dtype: torch.dtype, head_dim: int, window: int):
    """Return whether a backend gives the definition's output and gradients on this device (see compute.py)."""
    generator = torch.Generator().manual_seed(0)
    q_BTHD, k_BTKD, v_BTKD = (
        torch.randn(1, 300, heads, head_dim, generator=generator).to(device, dtype) for heads in (4, 2, 2)
    )
    return kernel_agrees(
        f"attention by {name}",
        lambda q, k, v: make()(q, k, v, window),
        lambda q, k, v: attend_naive(q, k, v, window),
        [q_BTHD, k_BTKD, v_BTKD],
    )


@functools.cache
def choose(device: torch.device, dtype: torch.dtype, head_dim: int, windowed: bool) -> tuple[str, Attend]:
    """Return the fastest backend that works on this device, and its name: `attend(q_BTHD, k_BTKD, v_BTKD, window)`.

    Backends are probed forward and backward. When none passes, full attention falls back to PyTorch's own kernel, and
    windows to the masked definition, which is right but slow. The answer is remembered, as probes cost seconds.
    """
    for name, make in backends(device.type, windowed):
        windows = (128, 512) if windowed else (512,)  # the probe has 300 positions: 512 is full attention
        if all(works(name, make, device, dtype, head_dim, window) for window in windows):
            # torch.compile cannot see into foreign kernels: tell it to break the graph of a block there.
            return name, make() if device.type == "cpu" else torch.compiler.disable(make(), recursive=False)
    return ("masked", attend_naive) if windowed else ("sdpa", _attend_sdpa)
