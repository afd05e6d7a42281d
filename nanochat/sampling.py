"""From logits to tokens: the settings of each request, applied one after the other.

    penalties and biases -> temperature -> top-k -> top-p -> min-p -> draw

An example, with temperature 1 and three tokens:

    logits          2.0    1.0    0.0
    top_k = 2       2.0    1.0   -inf
    probabilities   0.73   0.27   0
    cumulative      0.73   1.00   1.00     the random number 0.8 draws the second token

A row's token follows from its own logits, settings and random number alone. So the same request with the same seed
gives the same tokens in any company: on CPU to the bit, on a GPU except for rounding. A setting that no row uses costs
nothing. To add one, copy `_min_p`, which is the simplest, and call it from `sample`, after `_min_p`.

Shapes: B rows, D of them that are drawn at random (temperature above 0), V vocabulary.
"""

import math
from collections import Counter
from collections.abc import Sequence

import torch

from nanochat.scheduler import Request, TokenScore

LARGEST_BELOW_ONE = 1 - 2**-24  # in fp32, which rounds larger doubles up to 1
NUCLEUS = 256  # top-p looks among this many tokens first: sorting the vocabulary costs more than a small model
MINUS_INFINITY = float("-inf")
BROKEN = -1  # in place of a token that cannot be drawn: the row's logits are not finite


def sample(logits_BV: torch.Tensor, requests: Sequence[Request], uniform: Sequence[float]) -> torch.Tensor:
    """Draw one token per row, (B,) int64, by the settings of its request.

    uniform: a random number from [0, 1) per row; the token is where the cumulative distribution passes it. At
    temperature 0 it is the likeliest token, the first of equals. A row whose logits are NaN or infinite gives
    BROKEN: it has no likeliest token, and would otherwise get the same one at every step.
    """
    logits_BV = penalise(logits_BV.float(), requests)
    # `max` counts NaN as the largest, so the largest logit shows whether any is NaN or +inf, at the cost of an argmax.
    largest_B, likeliest_B = logits_BV.max(dim=-1)
    drawn = [row for row, request in enumerate(requests) if request.temperature > 0]
    if not drawn:
        return _mark_broken(likeliest_B, largest_B)
    requests = [requests[row] for row in drawn]
    rows_D = torch.tensor(drawn, device=logits_BV.device)
    scores_DV = _temperature(logits_BV[rows_D], requests)
    scores_DV = _top_k(scores_DV, requests)
    scores_DV = _top_p(scores_DV, requests)
    # Up to here the likeliest token of each row has the score 0, and `_min_p` measures the others against it. So
    # whatever may drop or move the likeliest token comes after `_min_p`.
    scores_DV = _min_p(scores_DV, requests)
    cumulative_DV = scores_DV.softmax(dim=-1).cumsum(dim=-1)
    uniform_D1 = _column([uniform[row] for row in drawn], scores_DV).clamp(max=LARGEST_BELOW_ONE)
    # The sum of the distribution is 1 but for rounding.
    tokens_D1 = torch.searchsorted(cumulative_DV, uniform_D1 * cumulative_DV[:, -1:], right=True)
    tokens_B = likeliest_B.index_copy(0, rows_D, tokens_D1[:, 0])
    return _mark_broken(tokens_B, largest_B)


def _mark_broken(tokens_B: torch.Tensor, largest_B: torch.Tensor) -> torch.Tensor:
    """Return the tokens, with BROKEN where the largest logit is not finite."""
    if tokens_B.is_cuda:
        # Left on the GPU: the engine waits for it once a step, to read the tokens.
        return torch.where(largest_B.isfinite(), tokens_B, BROKEN)
    # On a CPU, two operations on a tensor of a few numbers cost more than a loop in Python.
    broken = [row for row, largest in enumerate(largest_B.tolist()) if not math.isfinite(largest)]
    if broken:
        tokens_B[broken] = BROKEN
    return tokens_B


def penalise(logits_BV: torch.Tensor, requests: Sequence[Request]) -> torch.Tensor:
    """Return logits after the repetition, presence and frequency penalties and the biases of each row."""
    result_BV = logits_BV
    for row, request in enumerate(requests):
        changes = _logit_changes(request)
        if request.repetition_penalty == 1 and not changes:
            continue
        if result_BV is logits_BV:
            result_BV = logits_BV.clone()
        logits_V = result_BV[row]
        if request.repetition_penalty != 1:
            seen = torch.tensor(sorted({*request.tokens, *request.output}), device=logits_V.device)
            seen_logits = logits_V[seen]
            # Dividing would raise a negative logit.
            logits_V[seen] = torch.where(
                seen_logits > 0, seen_logits / request.repetition_penalty, seen_logits * request.repetition_penalty
            )
        if changes:
            tokens = torch.tensor(list(changes), device=logits_V.device)
            logits_V[tokens] += torch.tensor(list(changes.values()), device=logits_V.device)
    return result_BV


def _logit_changes(request: Request) -> dict[int, float]:
    """Return what the request's penalties and biases add to the logits of single tokens."""
    changes: dict[int, float] = {}
    if request.presence_penalty or request.frequency_penalty:
        for token, count in Counter(request.output).items():
            changes[token] = -request.presence_penalty - request.frequency_penalty * count
    for token, bias in request.logit_bias.items():
        changes[token] = changes.get(token, 0.0) + bias
    return changes


# Each of the following takes scores (D, V), the settings of D rows, and returns scores. Tokens that a setting rules out
# get -inf. Tokens that tie with the last one admitted are admitted as well.


def _temperature(logits_DV: torch.Tensor, requests: Sequence[Request]) -> torch.Tensor:
    """Divide by the temperature; the likeliest token of each row gets 0, so that nothing overflows."""
    temperature_D1 = _column([max(request.temperature, 1e-6) for request in requests], logits_DV)
    return (logits_DV - logits_DV.amax(dim=-1, keepdim=True)) / temperature_D1


def _top_k(scores_DV: torch.Tensor, requests: Sequence[Request]) -> torch.Tensor:
    """Keep the k likeliest tokens."""
    vocab_size = scores_DV.size(1)
    limits = [min(request.top_k or vocab_size, vocab_size) for request in requests]
    largest = max((k for k in limits if k < vocab_size), default=0)
    if largest == 0:
        return scores_DV
    # One top-k serves all rows: a row with a smaller k takes an earlier column. Rows without a limit keep all.
    last_D1 = torch.tensor([[min(k, largest) - 1] for k in limits], device=scores_DV.device)
    floor_D1 = scores_DV.topk(largest).values.gather(1, last_D1)
    unlimited_D1 = torch.tensor([[k == vocab_size] for k in limits], device=scores_DV.device)
    return scores_DV.masked_fill((scores_DV < floor_D1) & ~unlimited_D1, MINUS_INFINITY)


def _top_p(scores_DV: torch.Tensor, requests: Sequence[Request]) -> torch.Tensor:
    """Keep the fewest tokens that make up the share top_p of the probability (nucleus sampling)."""
    limited = [row for row, request in enumerate(requests) if request.top_p < 1]
    if not limited:
        return scores_DV
    scores_LV = scores_DV[limited]
    share_L1 = _column([max(requests[row].top_p, 1e-9) for row in limited], scores_DV)
    total_L1 = scores_LV.logsumexp(dim=-1, keepdim=True)
    vocab_size = scores_LV.size(1)
    for n in (min(NUCLEUS, vocab_size), vocab_size):
        likeliest_LN = scores_LV.topk(n).values
        # A token belongs to the nucleus if those before it make up less than the share.
        before_LN = (likeliest_LN - total_L1).exp().cumsum(dim=-1).roll(1, dims=-1)
        before_LN[:, 0] = 0.0
        size_L1 = (before_LN < share_L1).sum(dim=-1, keepdim=True)
        if size_L1.max() < n:
            break
    floor_L1 = likeliest_LN.gather(1, size_L1 - 1)
    scores_DV = scores_DV.clone()
    scores_DV[limited] = scores_LV.masked_fill(scores_LV < floor_L1, MINUS_INFINITY)
    return scores_DV


def _min_p(scores_DV: torch.Tensor, requests: Sequence[Request]) -> torch.Tensor:
    """Keep tokens that are at least min_p times as likely as the likeliest, whose score is 0."""
    if not any(request.min_p for request in requests):
        return scores_DV
    floor_D1 = _column([request.min_p for request in requests], scores_DV).log()
    return scores_DV.masked_fill(scores_DV < floor_D1, MINUS_INFINITY)


def _column(values: Sequence[float], like: torch.Tensor) -> torch.Tensor:
    return torch.tensor(values, device=like.device, dtype=torch.float32)[:, None]


def score(logits_BV: torch.Tensor, requests: Sequence[Request], tokens: Sequence[int]) -> list[TokenScore | None]:
    """Return the log-probability of each row's token and of the likeliest ones; None where `logprobs` is not set.

    A BROKEN row has none either.
    """
    scores: list[TokenScore | None] = []
    for row, request in enumerate(requests):
        if request.logprobs is None or tokens[row] == BROKEN:
            scores.append(None)
        else:
            scores += score_tokens(logits_BV[row : row + 1], tokens[row : row + 1], request.logprobs)
    return scores


def score_prompt(request: Request, logits_NV: torch.Tensor) -> None:
    """Append the scores of the next prompt tokens: the logits after a token score the one after it.

    logits_NV: after the tokens that are read now, from `request.n_read` on.
    """
    if not request.scores:
        request.scores.append(TokenScore(request.tokens[0], None, {}))
    next_tokens = request.tokens[request.n_read + 1 : request.n_read + 1 + len(logits_NV)]
    if next_tokens:
        request.scores += score_tokens(logits_NV[: len(next_tokens)], next_tokens, request.logprobs or 0)


def score_tokens(logits_NV: torch.Tensor, tokens: Sequence[int], n_top: int) -> list[TokenScore]:
    """Return the log-probability of one token per row of logits, and of the `n_top` likeliest at its place."""
    logprobs_NV = logits_NV.float().log_softmax(dim=-1)
    tokens_N1 = torch.tensor(tokens, device=logits_NV.device)[:, None]
    logprobs = logprobs_NV.gather(1, tokens_N1)[:, 0].tolist()
    top = logprobs_NV.topk(min(n_top, logits_NV.size(1)))
    top_tokens = top.indices.tolist()
    top_logprobs = top.values.tolist()
    scores = []
    for row, token in enumerate(tokens):
        likeliest = dict(zip(top_tokens[row], top_logprobs[row], strict=True))
        scores.append(TokenScore(token, logprobs[row], likeliest))
    return scores
