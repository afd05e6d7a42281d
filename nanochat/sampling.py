"""From logits to tokens, one row at a time in meaning and all rows at once in work."""

from collections.abc import Sequence

import torch

_LARGEST_BELOW_ONE = 1 - 2**-24  # in fp32, which rounds larger doubles up to 1


def sample(
    logits_BV: torch.Tensor,
    temperature: Sequence[float],
    top_k: Sequence[int | None],
    uniform: Sequence[float],
) -> torch.Tensor:
    """Draw one token a row, (B,) int64, by inverting the row's cumulative distribution at its number in `uniform`.

    The randomness comes in from outside, one number in [0, 1) a row, so a row's token depends on nothing but its own
    logits, settings and number: not on its neighbours, not on the device. temperature: 0 = the likeliest token.
    top_k: only the k likeliest tokens, and those that tie with the k-th, may be drawn; None or 0 = all.
    """
    device, vocab_size = logits_BV.device, logits_BV.size(1)
    likeliest_B = logits_BV.argmax(dim=-1)
    if not any(temperature):
        return likeliest_B
    temperature_B1 = torch.tensor([[max(t, 1e-6)] for t in temperature], device=device)
    scores_BV = (logits_BV - logits_BV.amax(dim=-1, keepdim=True)) / temperature_B1
    kept = [min(k or vocab_size, vocab_size) for k in top_k]
    largest_k = max((k for k in kept if k < vocab_size), default=None)
    if largest_k is not None:
        rank_B1 = torch.tensor([[min(k, largest_k) - 1] for k in kept], device=device)
        threshold_B1 = scores_BV.topk(largest_k).values.gather(1, rank_B1)
        unlimited_B1 = torch.tensor([[k == vocab_size] for k in kept], device=device)
        scores_BV = scores_BV.masked_fill((scores_BV < threshold_B1) & ~unlimited_B1, float("-inf"))
    cumulative_BV = scores_BV.softmax(dim=-1).cumsum(dim=-1)
    uniform_B1 = torch.tensor([[u] for u in uniform], device=device).clamp(max=_LARGEST_BELOW_ONE)
    drawn_B1 = torch.searchsorted(cumulative_BV, uniform_B1 * cumulative_BV[:, -1:], right=True)
    greedy_B = torch.tensor([t == 0 for t in temperature], device=device)
    return torch.where(greedy_B, likeliest_B, drawn_B1[:, 0])
