"""Attention by one call for training and one for cached inference; backends are chosen by probes, not by imports."""

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F

from nanochat import kernels

Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, int], torch.Tensor]
_BLOCK = 128  # queries to a block on CPU; short windows are multiples of it


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
    """Attention of new queries to a cache in which slot s holds position s. Returns (B, T, H, D).

    positions_BT says where each query stands, row by row; rows may differ in length. A query at position p sees
    slots p - window + 1 .. p; a negative position marks padding, whose output means nothing (but is finite).
    sinks_H: one more logit a head, unscaled, that takes its share of the softmax and gives nothing (gpt-oss).
    """
    distance_BTS = positions_BT.clamp(min=0)[:, :, None] - torch.arange(k_BSKD.size(1), device=q_BTHD.device)
    hidden_BTS = (distance_BTS < 0) | (distance_BTS >= window)
    mask_B1MS = mask(hidden_BTS, q_BTHD.size(2) // k_BSKD.size(2), q_BTHD.dtype).float()
    return attend_to_slots(q_BTHD, k_BSKD, v_BSKD, mask_B1MS, q_BTHD.size(3) ** -0.5, sinks_H)


def _exact(device: torch.device, dtype: torch.dtype, invariant: bool) -> bool:
    """Whether products must be given a certain shape for their sums to go in a certain order."""
    return invariant and device.type == "cpu" and dtype == torch.float32


def mask(hidden_BTS: torch.Tensor, group: int, dtype: torch.dtype, invariant: bool = True) -> torch.Tensor:
    """What `attend_to_slots` adds to scores: -inf where `hidden`, else 0; (B, 1, M, S) with a row for each of the
    M = T·group queries that share a kv head, and further ones where products want them."""
    mask_BTS = torch.zeros_like(hidden_BTS, dtype=dtype).masked_fill_(hidden_BTS, float("-inf"))
    mask_BMS = mask_BTS[:, :, None].expand(-1, -1, group, -1).flatten(1, 2)
    if _exact(hidden_BTS.device, dtype, invariant):
        mask_BMS = F.pad(mask_BMS, (0, 0, 0, -mask_BMS.size(1) % 8))
    return mask_BMS[:, None]


def attend_to_slots(
    q_BTHD: torch.Tensor,
    k_BSKD: torch.Tensor,
    v_BSKD: torch.Tensor,
    mask_B1MS: torch.Tensor,
    scale: float,
    sinks_H: torch.Tensor | None = None,
    invariant: bool = True,
) -> torch.Tensor:
    """softmax(scale · q·keys + mask) · values, as two matrix products around a softmax, N = B·K of them at once.

    Returns (B, T, H, D). Keys that lie with their slots innermost make it 5 times as fast on CPU in bf16 (dev/LOG.md).
    The softmax is taken in the mask's dtype, or q's where that is longer. A trace, but for fp32, leaves B and S open.

    invariant: a query's result has the same bits whatever other queries, rows and hidden slots there are (on CPU, for
    slots in multiples of 128). In bf16 it always has; in fp32 the order of a sum changes with the shape of a product,
    unless its rows are a multiple of 8, and sums over slots go in parts of 128.
    """
    (T, H, D), K, rows = map(int, q_BTHD.shape[1:]), int(k_BSKD.size(2)), int(mask_B1MS.size(2))
    G, M = H // K, T * H // K
    keys_NDS, values_NSD = k_BSKD.permute(0, 2, 3, 1).flatten(0, 1), v_BSKD.transpose(1, 2).flatten(0, 1)
    q_NMD = (q_BTHD if T == 1 else q_BTHD.unflatten(2, (K, G)).transpose(1, 2)).reshape(-1, M, D)
    if rows > M:
        q_NMD = F.pad(q_NMD, (0, 0, 0, rows - M))
    scores_BKMS = torch.add(mask_B1MS, torch.bmm(q_NMD, keys_NDS).unflatten(0, (-1, K)), alpha=scale)
    if sinks_H is not None:
        sinks = sinks_H.to(scores_BKMS.dtype).view(1, K, 1, G).expand(len(q_BTHD), K, T, G).reshape(-1, K, M, 1)
        scores_BKMS = torch.cat((F.pad(sinks, (0, 0, 0, rows - M)), scores_BKMS), dim=-1)
    weights_NMS = scores_BKMS.softmax(-1).flatten(0, 1)
    if sinks_H is not None:
        weights_NMS = weights_NMS[..., 1:]
    if weights_NMS.dtype != values_NSD.dtype:
        weights_NMS = weights_NMS.to(values_NSD.dtype)
    if _exact(q_BTHD.device, q_BTHD.dtype, invariant):
        pairs = zip(weights_NMS.split(128, dim=2), values_NSD.split(128, dim=1), strict=True)
        y_NMD = torch.bmm(*next(pairs))
        for part_NMS, part_NSD in pairs:
            y_NMD = torch.baddbmm(y_NMD, part_NMS, part_NSD)
    else:
        y_NMD = torch.bmm(weights_NMS, values_NSD)
    if rows > M:
        y_NMD = y_NMD[:, :M]
    return (y_NMD if T == 1 else y_NMD.reshape(-1, K, T, G, D).transpose(1, 2)).reshape(-1, T, H, D)


def _heads_first(x_BTHD: torch.Tensor, heads: int) -> torch.Tensor:
    """(B, T, K, D) -> (B, H, T, D), each kv head repeated for the query heads that share it."""
    x_BKTD = x_BTHD.transpose(1, 2)
    return x_BKTD if x_BKTD.size(1) == heads else x_BKTD.repeat_interleave(heads // x_BKTD.size(1), dim=1)


def _attend_sdpa(q_BTHD: torch.Tensor, k_BTKD: torch.Tensor, v_BTKD: torch.Tensor, window: int) -> torch.Tensor:
    """PyTorch's fused kernel; full causal attention only."""
    assert window >= q_BTHD.size(1)
    q, k, v = (_heads_first(x, q_BTHD.size(2)) for x in (q_BTHD, k_BTKD, v_BTKD))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)


@functools.cache
def _triangle(size: int, keep_above: bool, dtype: torch.dtype) -> torch.Tensor:
    """-inf strictly above the diagonal (causality), or on and below it (the far edge of a window); 0 elsewhere."""
    hidden = torch.full((size, size), float("-inf"))
    return (hidden.tril() if keep_above else hidden.triu(1)).to(dtype)


def _block_spans(T: int, window: int) -> list[tuple[int, int, int]]:
    """(first query, end, first key) of each block of queries: the keys are those that some query of it sees."""
    return [(a, min(a + _BLOCK, T), max(0, a - window)) for a in range(0, T, _BLOCK)]


@torch.library.custom_op("nanochat::block_attention", mutates_args=())
def _block_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: int) -> list[torch.Tensor]:
    """(N, T, D) each, q scaled; N = sequences x heads. Returns the output and the weights, block after block, flat."""
    N, T, _ = q.shape
    spans = _block_spans(T, window)
    out = torch.empty_like(q)
    weights = q.new_empty(N * sum((b - a) * (b - first) for a, b, first in spans))
    taken = 0
    for a, b, first in spans:
        scores = torch.bmm(q[:, a:b], k[:, first:b].mT)
        scores[:, :, a - first :] += _triangle(_BLOCK, False, q.dtype)[: b - a, : b - a]
        if a >= window:
            scores[:, :, :_BLOCK] += _triangle(_BLOCK, True, q.dtype)[: b - a]
        block = weights[taken : taken + scores.numel()].view(scores.shape)
        torch.softmax(scores, -1, out=block)
        torch.bmm(block, v[:, first:b], out=out[:, a:b])
        taken += scores.numel()
    return [out, weights]


@_block_attention.register_fake
def _(q, k, v, window):
    size = q.size(0) * sum((b - a) * (b - first) for a, b, first in _block_spans(q.size(1), window))
    return [torch.empty_like(q), q.new_empty(size)]


@torch.library.custom_op("nanochat::block_attention_backward", mutates_args=())
def _block_attention_backward(
    grad: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, weights: torch.Tensor, window: int
) -> list[torch.Tensor]:
    N, T, _ = q.shape
    dq, dk, dv = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
    end = weights.numel()
    for a, b, first in reversed(_block_spans(T, window)):
        block = weights[end - N * (b - a) * (b - first) : end].view(N, b - a, b - first)
        end -= block.numel()
        dy = grad[:, a:b].contiguous()
        dscores = torch._softmax_backward_data(torch.bmm(dy, v[:, first:b].mT), block, -1, q.dtype)
        torch.bmm(dscores, k[:, first:b], out=dq[:, a:b])
        # added up by the products themselves, small terms (of late queries) first, as the sums are in q's dtype
        dv[:, first:b].baddbmm_(block.mT, dy)
        dk[:, first:b].baddbmm_(dscores.mT, q[:, a:b])
    return [dq, dk, dv]


@_block_attention_backward.register_fake
def _(grad, q, k, v, weights, window):
    return [torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)]


def _save_for_backward(ctx, inputs, output) -> None:
    ctx.set_materialize_grads(False)  # the weights have none, which would be zeros of their size
    ctx.save_for_backward(*inputs[:3], output[1])
    ctx.window = inputs[3]


def _backward(ctx, grads):
    q, k, v, weights = ctx.saved_tensors
    return (*_block_attention_backward(grads[0].contiguous(), q, k, v, weights, ctx.window), None)


_block_attention.register_autograd(_backward, setup_context=_save_for_backward)


def _attend_blocks(q_BTHD: torch.Tensor, k_BTKD: torch.Tensor, v_BTKD: torch.Tensor, window: int) -> torch.Tensor:
    """Causal and windowed attention on CPU: blocks of queries against just the keys that they may see.

    Batched matrix products around a softmax, with the weights kept for the backward pass: twice as fast as the CPU
    flash kernel (dev/LOG.md), and windows cost what they cover, without masks beyond the two corners of a band.
    """
    B, T, H, D = q_BTHD.shape
    assert window >= T or window % _BLOCK == 0, f"a window must be a multiple of {_BLOCK}"
    heads = [_heads_first(x, H).reshape(B * H, T, D) for x in (q_BTHD * D**-0.5, k_BTKD, v_BTKD)]
    return _block_attention(*heads, min(window, -(-T // _BLOCK) * _BLOCK))[0].view(B, H, T, D).transpose(1, 2)


@functools.cache
def _flash3() -> Callable[..., torch.Tensor]:
    try:
        from flash_attn_interface import flash_attn_func
    except ImportError:
        from kernels import get_kernel

        flash_attn_func = get_kernel("kernels-community/flash-attn3", version=1).flash_attn_func
    return flash_attn_func


def _attend_flash3(q_BTHD: torch.Tensor, k_BTKD: torch.Tensor, v_BTKD: torch.Tensor, window: int) -> torch.Tensor:
    """FlashAttention-3 (arXiv 2407.08608, Hopper) from its own package, or through the hub's package `kernels`."""
    y = _flash3()(q_BTHD, k_BTKD, v_BTKD, causal=True, window_size=(window - 1, 0))
    return y[0] if isinstance(y, tuple) else y


def _attend_cudnn(q_BTHD: torch.Tensor, k_BTKD: torch.Tensor, v_BTKD: torch.Tensor, window: int) -> torch.Tensor:
    """cuDNN's kernel through PyTorch; full causal attention only."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        return _attend_sdpa(q_BTHD, k_BTKD, v_BTKD, window)


@functools.cache
def _flex_kernel(window: int, T: int, device: str) -> Callable[..., torch.Tensor]:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    def near(b, h, q, k):
        return (q >= k) & (q - k < window)

    block_mask = create_block_mask(near, None, None, T, T, device=device)
    kernel = torch.compile(flex_attention, dynamic=False)
    return functools.partial(kernel, block_mask=block_mask, enable_gqa=True)


def _attend_flex(q_BTHD: torch.Tensor, k_BTKD: torch.Tensor, v_BTKD: torch.Tensor, window: int) -> torch.Tensor:
    """Windows by FlexAttention's block-sparse kernel; full attention by what is fastest at it."""
    T = q_BTHD.size(1)
    if window >= T:
        return choose(q_BTHD.device, q_BTHD.dtype, q_BTHD.size(3), False)[1](q_BTHD, k_BTKD, v_BTKD, window)
    q, k, v = (x.transpose(1, 2) for x in (q_BTHD, k_BTKD, v_BTKD))
    return _flex_kernel(window, T, str(q.device))(q, k, v).transpose(1, 2)


# by device, and by whether some layers have windows
_BACKENDS: dict[tuple[str, bool], tuple[tuple[str, Attend], ...]] = {
    ("cuda", True): (("flash-attention-3", _attend_flash3), ("flex", _attend_flex)),
    ("cuda", False): (("flash-attention-3", _attend_flash3), ("cudnn", _attend_cudnn)),
    ("cpu", True): (("blocks", _attend_blocks),),
    ("cpu", False): (("blocks", _attend_blocks),),
}


def _works(name: str, attend: Attend, device: torch.device, dtype: torch.dtype, head_dim: int, window: int) -> bool:
    """Run forward and backward once against the definition: a kernel may import well and still fail on launch."""
    generator = torch.Generator().manual_seed(0)
    values = [torch.randn(1, 300, heads, head_dim, generator=generator).to(device, dtype) for heads in (4, 2, 2)]
    forms = [lambda q, k, v, form=form: form(q, k, v, window) for form in (attend, attend_naive)]
    return kernels.agrees(f"attention by {name}", forms[0], forms[1], values)


@functools.cache
def choose(device: torch.device, dtype: torch.dtype, head_dim: int, windowed: bool) -> tuple[str, Attend]:
    """The fastest training backend that works on this device, by name: `attend(q_BTHD, k_BTKD, v_BTKD, window)`.

    Kernels are probed forward and backward, with and without a window. When none passes, full attention falls back
    to PyTorch's own, and windows to the masked definition, which is right but slow.
    """
    for name, attend in _BACKENDS.get((device.type, windowed), ()):
        windows = (128, 512) if windowed else (512,)
        if all(_works(name, attend, device, dtype, head_dim, window) for window in windows):
            # foreign kernels break the graph of a compiled block; decorated at import, they would load torch's compiler
            return name, attend if device.type == "cpu" else torch.compiler.disable(attend, recursive=False)
    return ("masked", attend_naive) if windowed else ("sdpa", _attend_sdpa)
