"""Attention of new tokens to the slots of a KV cache: two batched matrix products around a softmax.

Decoding one token per row reads all keys and values once and computes next to nothing, so it is bound by memory and by
the number of operations: plain products are as fast as a fused kernel, and their sums can be kept in one order. Prefill
on a GPU is bound by arithmetic, and takes PyTorch's fused kernel (`attend_fused`).

The oracle of both is `attention.attend_naive`. kv_cache.py lays out the slots and says which of them a query sees.

Shapes: B rows of T new tokens, H query heads, K kv heads, D channels per head, S slots; G = B·K products, each of
M = T·H/K queries, because the query heads that share a kv head are more queries of that head.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def _order_varies(device: torch.device, dtype: torch.dtype) -> bool:
    """Return whether products sum in an order that depends on their shape, which can be prevented (see below)."""
    return device.type == "cpu" and dtype == torch.float32


def slot_mask(hidden_BTS: Tensor, group: int, dtype: torch.dtype) -> Tensor:
    """Return what is added to the scores, (B, 1, M, S): -inf where `hidden`, else 0. group: query heads per kv head.

    In fp32 on CPU it has as many rows more as make a multiple of eight (see `attend_to_slots`).
    """
    mask_BTS = torch.zeros_like(hidden_BTS, dtype=dtype).masked_fill_(hidden_BTS, float("-inf"))
    mask_BMS = mask_BTS[:, :, None].expand(-1, -1, group, -1).flatten(1, 2)
    if _order_varies(hidden_BTS.device, dtype):
        mask_BMS = F.pad(mask_BMS, (0, 0, 0, -mask_BMS.size(1) % 8))
    return mask_BMS[:, None]


@torch.jit.script_if_tracing  # the tracer alone would fix the number of parts (cpu_trace.py)
def _product_in_parts(weights_GMS: Tensor, values_GSD: Tensor) -> Tensor:
    """Return weights·values (G, M, D), summed over slots in parts of 128."""
    y_GMD = torch.bmm(weights_GMS[:, :, :128], values_GSD[:, :128])
    for start in range(128, weights_GMS.size(2), 128):
        end = start + 128
        y_GMD = torch.baddbmm(y_GMD, weights_GMS[:, :, start:end], values_GSD[:, start:end])
    return y_GMD


def attend_to_slots(
    q_BTHD: Tensor,
    keys_GDS: Tensor,
    values_GSD: Tensor,
    mask_B1MS: Tensor,
    sinks_H: Tensor | None = None,
) -> Tensor:
    """Return softmax(q·keys / √D + mask)·values, (B, T, H, D).

    sinks_H: one more logit per head that takes its share of the softmax and gives nothing (gpt-oss).
    On CPU a query's result has the same bits whatever other queries, rows and hidden slots there are, for slots in
    multiples of 128. In bf16 that is so by nature. In fp32 a product sums in an order that depends on its shape,
    unless its rows are a multiple of eight; and sums over slots are taken in parts of 128.
    """
    # int: sizes are constants in a trace (cpu_trace.py). It fits any number of rows, so below B is written as -1.
    B = int(q_BTHD.size(0))
    T = int(q_BTHD.size(1))
    H = int(q_BTHD.size(2))
    D = int(q_BTHD.size(3))
    K = int(keys_GDS.size(0)) // B
    group = H // K
    M = T * group
    padding = int(mask_B1MS.size(2)) - M

    # One matrix of queries per kv head.
    if T == 1:
        q_GMD = q_BTHD.reshape(-1, group, D)
    else:
        q_GMD = q_BTHD.unflatten(2, (K, group)).transpose(1, 2).reshape(B * K, M, D)
    if padding:
        q_GMD = F.pad(q_GMD, (0, 0, 0, padding))

    scores_GMS = torch.bmm(q_GMD, keys_GDS)
    scores_BKMS = torch.add(mask_B1MS, scores_GMS.unflatten(0, (-1, K)), alpha=D**-0.5)
    if sinks_H is None:
        weights_GMS = scores_BKMS.softmax(-1).flatten(0, 1)
    else:
        sinks_1K1G1 = sinks_H.to(scores_BKMS.dtype).view(1, K, 1, group, 1)
        sinks_BKM1 = sinks_1K1G1.expand(scores_BKMS.size(0), K, T, group, 1).flatten(2, 3)
        sinks_BKM1 = F.pad(sinks_BKM1, (0, 0, 0, padding))
        weights_GMS = torch.cat((sinks_BKM1, scores_BKMS), dim=-1).softmax(-1).flatten(0, 1)[..., 1:]
    weights_GMS = weights_GMS.to(values_GSD.dtype)

    if _order_varies(q_BTHD.device, q_BTHD.dtype):
        y_GMD = _product_in_parts(weights_GMS, values_GSD)
    else:
        y_GMD = torch.bmm(weights_GMS, values_GSD)

    # Back to heads per token.
    if padding:
        y_GMD = y_GMD[:, :M]
    if T == 1:
        return y_GMD.reshape(-1, 1, H, D)
    return y_GMD.reshape(B, K, T, group, D).transpose(1, 2).reshape(B, T, H, D)


def attend_fused(q_BTHD: Tensor, keys_GDS: Tensor, values_GSD: Tensor, mask_B1MS: Tensor) -> Tensor:
    """`attend_to_slots` by PyTorch's fused kernel, which never writes the scores to memory. Returns (B, T, H, D)."""
    B, T, H, _ = q_BTHD.shape
    K = keys_GDS.size(0) // B
    group = H // K
    q_BKMD = q_BTHD.unflatten(2, (K, group)).transpose(1, 2).flatten(2, 3)
    keys_BKSD = keys_GDS.transpose(1, 2).unflatten(0, (B, K))
    values_BKSD = values_GSD.unflatten(0, (B, K))
    mask_BKMS = mask_B1MS.expand(-1, K, -1, -1)
    y_BKMD = F.scaled_dot_product_attention(q_BKMD, keys_BKSD, values_BKSD, attn_mask=mask_BKMS)
    return y_BKMD.unflatten(2, (T, group)).transpose(1, 2).flatten(2, 3)
