"""Spans: how likely a model finds tokens after what stands before them, for CORE and for the chat tasks.

A question has several spans, one per option. They begin alike, CORE's often with thousands of tokens of examples, so
what all options share is read once:

    options    A B C D x y      read as one row    A B C D x y z
               A B C D z        positions          0 1 2 3 4 5 4
                                branch             0 0 0 0 1 1 2      z does not see x and y

`score_questions` lays the rows of many questions end to end and reads them in one forward, whose context `BranchedRows`
tells the model where each token stands and what it sees. There is no padding, and logits are made for scored tokens
alone. On CORE this is four to five times as fast as one option after another, with equal decisions (dev/LOG.md).

Shapes: N tokens of a batch, S scored tokens, V vocabulary, T tokens of one question, H heads, K kv heads, D head dim.
"""

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F


class Span(NamedTuple):
    """Tokens to read, of which ids[start:] are scored. A token is scored by the logits before it, so start >= 1."""

    ids: list[int]
    start: int


class Score(NamedTuple):
    """Log-probability of a span in nats, its number of tokens, and whether each of them is the arg-max."""

    logprob: float
    tokens: int
    greedy: bool

    @property
    def mean_loss(self) -> float:
        """Nats per token; nan where nothing is scored."""
        return -self.logprob / self.tokens if self.tokens else math.nan


def common_prefix(sequences: Sequence[Sequence[int]]) -> int:
    """Return how many tokens all the sequences begin with in common."""
    for i, column in enumerate(zip(*sequences, strict=False)):
        if len(set(column)) > 1:
            return i
    return min(map(len, sequences))


class BranchedRows:
    """The context of one forward over questions laid end to end (see language_model.py).

    positions: where each of N tokens stands in its span. previous_N: the token before each, -1 before the first.
    scored_S: the tokens whose logits score the next one, and targets_S the next ones: question by question, span by
    span.
    """

    def __init__(self, questions: Sequence[Sequence[Span]], device: torch.device) -> None:
        tokens: list[tuple[int, int, int, int]] = []  # id, position, id of the token before, branch
        scored: list[int] = []
        targets: list[int] = []
        self.sizes = []  # tokens of each question

        def read(ids: list[int], begin: int, end: int, branch: int) -> None:
            before = [-1, *ids]
            tokens.extend(zip(ids[begin:end], range(begin, end), before[begin:end], itertools.repeat(branch)))

        for spans in questions:
            first = len(tokens)
            # The token before a scored one is read in each branch, so that all logits of a span are in its branch.
            prefix = min(common_prefix([span.ids for span in spans]), *(span.start - 1 for span in spans))
            read(spans[0].ids, 0, prefix, branch=0)  # 0: all branches see it
            for branch, span in enumerate(spans, 1):
                shift = len(tokens) - prefix  # from positions in the span to places in the row
                last = len(span.ids) - 1  # it is scored, but never read
                read(span.ids, prefix, last, branch)
                scored += range(span.start - 1 + shift, last + shift)
                targets += span.ids[span.start :]
            self.sizes.append(len(tokens) - first)
        columns = torch.tensor(tokens, device=device).T.contiguous()
        self.idx_N, self.positions, self.previous_N, self.branches_N = columns
        self.scored_S = torch.tensor(scored, device=device)
        self.targets_S = torch.tensor(targets, device=device)
        # for each question the keys that are visible to a query; layers share it by window and device
        self.visible: dict[tuple[int, torch.device], list[torch.Tensor]] = {}

    def layer(self, layer: int) -> Any:
        """Return the function by which queries of a layer meet keys and values: the same one for all layers."""
        return self.attend

    def attend(
        self,
        q_NHD: torch.Tensor,
        k_NKD: torch.Tensor,
        v_NKD: torch.Tensor,
        window: int,
        sinks_H: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Attend within each question; returns (N, H, D)."""
        key = (window, q_NHD.device)  # open-weights layers may be on any device
        if key not in self.visible:
            self.visible[key] = [visible_TT.to(q_NHD.device) for visible_TT in self._visible(window)]
        q_parts = q_NHD.split(self.sizes)
        k_parts = k_NKD.split(self.sizes)
        v_parts = v_NKD.split(self.sizes)
        outputs = []
        for q_THD, k_TKD, v_TKD, visible_TT in zip(q_parts, k_parts, v_parts, self.visible[key], strict=True):
            outputs.append(attend_visible(q_THD, k_TKD, v_TKD, visible_TT, sinks_H))
        return torch.cat(outputs)

    def _visible(self, window: int) -> Iterator[torch.Tensor]:
        """Yield the keys that each query of a question sees: prefix and own branch, up to itself, in the window."""
        for branch_T, position_T in zip(self.branches_N.split(self.sizes), self.positions.split(self.sizes)):
            distance_TT = position_T[:, None] - position_T[None, :]
            related_TT = (branch_T[None, :] == 0) | (branch_T[None, :] == branch_T[:, None])
            yield related_TT & (distance_TT >= 0) & (distance_TT < window)


def attend_visible(
    q_THD: torch.Tensor,
    k_TKD: torch.Tensor,
    v_TKD: torch.Tensor,
    visible_TT: torch.Tensor,
    sinks_H: torch.Tensor | None,
) -> torch.Tensor:
    """Attend by PyTorch's fused kernel to the visible keys; returns (T, H, D). sinks_H: see attention.py."""
    mask = visible_TT
    if sinks_H is not None:
        # A sink is one more key of zeros, with the sink's logit in the mask, and a value of zeros.
        k_TKD = F.pad(k_TKD, (0, 0, 0, 0, 0, 1))
        v_TKD = F.pad(v_TKD, (0, 0, 0, 0, 0, 1))
        sinks_HT1 = sinks_H.to(q_THD.dtype)[:, None, None].expand(-1, len(mask), 1)
        hidden_TT = torch.zeros_like(mask, dtype=q_THD.dtype).masked_fill(~mask, -math.inf)
        mask = torch.cat((hidden_TT.expand(len(sinks_H), -1, -1), sinks_HT1), dim=-1)
    # Heads first, and each kv head once per query head that shares it. We assume that torch's fused GPU kernels do not
    # take fewer kv heads than query heads together with a mask (enable_gqa), and have not tried it.
    group = q_THD.size(1) // k_TKD.size(1)
    q_HTD = q_THD.transpose(0, 1)
    k_HTD = k_TKD.transpose(0, 1).repeat_interleave(group, dim=0)
    v_HTD = v_TKD.transpose(0, 1).repeat_interleave(group, dim=0)
    y_1HTD = F.scaled_dot_product_attention(q_HTD[None], k_HTD[None], v_HTD[None], attn_mask=mask)
    return y_1HTD[0].transpose(0, 1)


@torch.inference_mode()
def score_questions(
    model: Any, questions: Sequence[Sequence[Span]], max_tokens: int | None = None
) -> list[list[Score]]:
    """Score each span of each question, to rounding as if it were read alone.

    model: a language_model.LanguageModel. max_tokens: tokens of a batch; None = what suits the device.
    """
    if max_tokens is None:
        max_tokens = 2048 if model.device.type == "cpu" else 16384
    # A span with nothing to score is not read.
    asked = [[span for span in spans if span.start < len(span.ids)] for spans in questions]
    scores: list[Score] = []
    for batch in _batches([spans for spans in asked if spans], max_tokens):
        context = BranchedRows(batch, model.device)
        # Logits are made for the scored tokens alone: the head is the largest matrix of a small model. Eager, since
        # every batch has another length and torch.compile would begin anew for each.
        with torch.compiler.set_stance("force_eager"):
            logits_SV = model(context.idx_N, context=context, wanted_R=context.scored_S).float()
        targets_S = context.targets_S.to(logits_SV.device)
        losses_S = F.cross_entropy(logits_SV, targets_S, reduction="none").cpu().double()
        hits_S = (logits_SV.argmax(-1) == targets_S).cpu()
        lengths = [len(span.ids) - span.start for spans in batch for span in spans]
        for losses, hits in zip(losses_S.split(lengths), hits_S.split(lengths)):
            scores.append(Score(logprob=-losses.sum().item(), tokens=len(losses), greedy=bool(hits.all())))
    nothing = Score(logprob=0.0, tokens=0, greedy=False)
    remaining = iter(scores)
    return [[next(remaining) if span.start < len(span.ids) else nothing for span in spans] for spans in questions]


def _batches(questions: Sequence[list[Span]], max_tokens: int) -> Iterator[list[list[Span]]]:
    """Cut questions into batches of about `max_tokens`, of one question at least."""
    batch: list[list[Span]] = []
    tokens = 0
    for spans in itertools.chain.from_iterable(map(_apart, questions)):
        shared = common_prefix([span.ids for span in spans])
        size = shared + sum(len(span.ids) - shared for span in spans)
        if batch and tokens + size > max_tokens:
            yield batch
            batch = []
            tokens = 0
        batch.append(spans)
        tokens += size
    if batch:
        yield batch


def _apart(spans: list[Span]) -> list[list[Span]]:
    """Return a question as it is, or each span as a question of its own where they share less than half.

    Then the square mask of all branches costs more than a short prefix saves: twice the time of attention on CORE,
    where prompts that were cut to the context share nothing any more.
    """
    shared = common_prefix([span.ids for span in spans])
    longest = max(len(span.ids) for span in spans)
    return [spans] if 2 * shared >= longest else [[span] for span in spans]
