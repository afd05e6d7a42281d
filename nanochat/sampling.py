"""From logits to tokens, one row at a time in meaning and all rows at once in work.

Settings come from the rows' requests, randomness from outside: a row's token follows from its own logits, settings and
number, not from its neighbours, not from the device. What no row asks for costs nothing.
"""

from collections import Counter
from collections.abc import Callable, Sequence

import torch

from nanochat.scheduler import Request, TokenScore

_LARGEST_BELOW_ONE = 1 - 2**-24  # in fp32, which rounds larger doubles up to 1
_NUCLEUS = 256  # tokens among which top-p looks first; a sort of the whole vocabulary costs more than a small model


def sample(logits_BV: torch.Tensor, requests: Sequence[Request], uniform: Sequence[float]) -> torch.Tensor:
    """Draw one token a row, (B,) int64: penalties and biases, temperature, top-k, top-p, min-p, then the inverse of
    the cumulative distribution at the row's number in `uniform`, from [0, 1).

    Tokens that tie with the last one that a limit admits are admitted as well. Where the temperature is 0 it is the
    likeliest token, the first of equals.
    """
    logits_BV = penalise(logits_BV.float(), requests)
    likeliest_B = logits_BV.argmax(dim=-1)
    drawn = [row for row, request in enumerate(requests) if request.temperature]
    if not drawn:
        return likeliest_B
    requests = [requests[row] for row in drawn]
    device, rows = logits_BV.device, torch.tensor(drawn, device=logits_BV.device)

    def column(values: Sequence[float]) -> torch.Tensor:
        return torch.tensor(values, device=device, dtype=torch.float32)[:, None]

    scores_DV = logits_BV[rows]
    temperature_D1 = column([max(request.temperature, 1e-6) for request in requests])
    scores_DV = (scores_DV - scores_DV.amax(dim=-1, keepdim=True)) / temperature_D1
    scores_DV = _limit(scores_DV, requests, column)
    cumulative_DV = scores_DV.softmax(dim=-1).cumsum(dim=-1)
    uniform_D1 = column([uniform[row] for row in drawn]).clamp(max=_LARGEST_BELOW_ONE)
    drawn_D1 = torch.searchsorted(cumulative_DV, uniform_D1 * cumulative_DV[:, -1:], right=True)
    return likeliest_B.index_copy(0, rows, drawn_D1[:, 0])


def penalise(logits_BV: torch.Tensor, requests: Sequence[Request]) -> torch.Tensor:
    """Logits after the repetition penalty, presence and frequency penalties, and biases of their rows."""
    owned = False
    for row, request in enumerate(requests):
        repetition, once, each = request.repetition_penalty, request.presence_penalty, request.frequency_penalty
        if repetition == 1 and not (once or each or request.logit_bias):
            continue
        logits_BV = logits_BV if owned else logits_BV.clone()
        owned, logits_V = True, logits_BV[row]
        if repetition != 1:
            ids = torch.tensor(sorted({*request.tokens, *request.output}), device=logits_BV.device)
            seen = logits_V[ids]
            logits_V[ids] = torch.where(seen > 0, seen / repetition, seen * repetition)
        changes = {token: -once - each * n for token, n in Counter(request.output).items()} if once or each else {}
        for token, bias in request.logit_bias.items():
            changes[token] = changes.get(token, 0.0) + bias
        if changes:
            ids, values = (torch.tensor(list(x), device=logits_BV.device) for x in (changes, changes.values()))
            logits_V[ids] += values.to(logits_V.dtype)
    return logits_BV


def _limit(
    scores_BV: torch.Tensor, requests: Sequence[Request], column: Callable[[Sequence[float]], torch.Tensor]
) -> torch.Tensor:
    """Scores (0 = the likeliest) with -inf wherever top-k, top-p of what remains, or min-p forbid the token."""
    V = scores_BV.size(1)
    kept = [min(request.top_k or V, V) for request in requests]
    floor_B1 = torch.full_like(scores_BV[:, :1], float("-inf"))
    if largest := max((k for k in kept if k < V), default=0):
        rank_B1 = column([min(k, largest) - 1 for k in kept]).long()
        threshold_B1 = scores_BV.topk(largest).values.gather(1, rank_B1)
        floor_B1 = torch.where(column(kept) < V, threshold_B1, floor_B1)
    if rows := [row for row, request in enumerate(requests) if request.top_p < 1]:
        scores_RV = scores_BV[rows].masked_fill(scores_BV[rows] < floor_B1[rows], float("-inf"))
        share_R1 = column([max(requests[row].top_p, 1e-9) for row in rows])
        floor_B1[rows] = torch.maximum(floor_B1[rows], _nucleus_floor(scores_RV, share_R1))
    if any(request.min_p for request in requests):
        floor_B1 = torch.maximum(floor_B1, column([request.min_p for request in requests]).log())
    return scores_BV if floor_B1.isinf().all() else scores_BV.masked_fill(scores_BV < floor_B1, float("-inf"))


def _nucleus_floor(scores_RV: torch.Tensor, share_R1: torch.Tensor) -> torch.Tensor:
    """The score of the least likely of the fewest tokens that make up a share of each row's probability, (R, 1)."""
    total_R1 = scores_RV.logsumexp(dim=-1, keepdim=True)
    for n in (min(_NUCLEUS, scores_RV.size(1)), scores_RV.size(1)):
        likeliest_RN = scores_RV.topk(n).values
        # a token belongs to the nucleus when those before it make up less than the share
        before_RN = (likeliest_RN - total_R1).exp().cumsum(dim=-1).roll(1, dims=-1)
        before_RN[:, 0] = 0.0
        inside_R1 = (before_RN < share_R1).sum(dim=-1, keepdim=True)
        if inside_R1.max() < n:
            break
    return likeliest_RN.gather(1, inside_R1 - 1)


def score(logits_BV: torch.Tensor, requests: Sequence[Request], tokens: Sequence[int]) -> list[TokenScore | None]:
    """The log-probability of each row's token and of its likeliest ones, for rows whose requests ask for them."""
    scores: list[TokenScore | None] = [None] * len(requests)
    for row, (request, token) in enumerate(zip(requests, tokens, strict=True)):
        if request.logprobs is not None:
            logprobs_V = logits_BV[row].float().log_softmax(dim=-1)
            top = logprobs_V.topk(min(request.logprobs, len(logprobs_V)))
            likeliest = dict(zip(top.indices.tolist(), top.values.tolist(), strict=True))
            scores[row] = TokenScore(token, logprobs_V[token].item(), likeliest)
    return scores
