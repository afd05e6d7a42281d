"""Spans: how likely a model finds tokens after what stands before them, for CORE and for the chat tasks.

Options of one question begin alike, CORE's often with thousands of tokens of examples, so what they share is read once:

    spans    A B C D x y      fork    prefix A B C D      one row      A B C D x y z
             A B C D z                branches x y, z     positions    0 1 2 3 4 5 4      z does not see x and y

A `Fork` is such a group, `ForkedRows` lays forks end to end and tells the model where each token stands and what it
sees, and `score_spans` reads them and scores. There is no padding, and logits are made for scored tokens alone.

Shapes: N tokens of a batch, S scored tokens, V vocabulary, T tokens of one fork, H heads, K kv heads, D head dim.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
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


@dataclass
class Fork:
    """Spans that begin alike: their common prefix is read once, then what follows it in each of them.

    All of it lies in one sequence, prefix, branch, branch, ..., and goes through the model in one forward. The
    attention mask keeps branches from seeing each other, and each branch counts its positions on from the prefix.
    """

    prefix: list[int]
    members: list[int]  # which spans
    longest: int  # tokens read of the longest one

    @property
    def size(self) -> int:
        """Tokens of the fork, at most."""
        return len(self.prefix) + len(self.members) * (self.longest - len(self.prefix))


def common_prefix(sequences: Sequence[Sequence[int]]) -> int:
    """Return how many tokens all the sequences begin with in common."""
    for i, column in enumerate(zip(*sequences, strict=False)):
        if len(set(column)) > 1:
            return i
    return min(map(len, sequences))


def group_spans(spans: Sequence[Span], max_tokens: int) -> list[Fork]:
    """Put spans that share at least half of their tokens into forks of at most `max_tokens`."""
    forks: list[Fork] = []
    for i in sorted(range(len(spans)), key=lambda i: spans[i].ids):
        ids = spans[i].ids[:-1]  # the last token is scored, but never read
        if spans[i].start == len(spans[i].ids):
            continue  # nothing to score
        if forks:
            shared = common_prefix([forks[-1].prefix, ids])
            joined = Fork(ids[:shared], [*forks[-1].members, i], max(forks[-1].longest, len(ids)))
            # Half: the square mask of a fork costs more than what a short common prefix saves.
            if 2 * shared >= joined.longest and joined.size <= max(max_tokens, len(ids)):
                forks[-1] = joined
                continue
        forks.append(Fork(ids, [i], len(ids)))
    return forks


class ForkedRows:
    """The context of one forward over the tokens of some forks, laid end to end (see language_model.py).

    positions: where each of N tokens stands in its span. previous_N: the token before each, -1 before the first.
    places: of the token before each scored one, fork after fork, span after span.
    """

    def __init__(self, forks: Sequence[Fork], spans: Sequence[Span], device: torch.device) -> None:
        ids: list[int] = []
        positions: list[int] = []
        previous: list[int] = []
        branches: list[int] = []  # 0 is the prefix, which all branches of a fork see
        places: list[int] = []
        self._sizes = []  # tokens of each fork
        for fork in forks:
            fork_begin = len(ids)
            shared = len(fork.prefix)
            members = [spans[member] for member in fork.members]
            # Branch 0 is the prefix itself; a member is read from where the prefix ends, without its last token.
            for branch, read in enumerate([fork.prefix, *(span.ids[:-1] for span in members)]):
                first = shared if branch else 0
                branch_begin = len(ids)
                ids += read[first:]
                positions += range(first, len(read))
                previous += [-1, *read][first : len(read)]
                branches += [branch] * (len(read) - first)
                if branch == 0:
                    continue  # nothing is scored for the prefix's own sake
                for position in range(members[branch - 1].start - 1, len(read)):
                    # Members may score tokens of their common prefix too, by the same logits.
                    in_branch = position >= shared
                    places.append(branch_begin + position - shared if in_branch else fork_begin + position)
            self._sizes.append(len(ids) - fork_begin)
        self.idx_N = torch.tensor(ids, device=device)
        self.positions = torch.tensor(positions, device=device)
        self.previous_N = torch.tensor(previous, device=device)
        self.places = torch.tensor(places, device=device)
        self._branch_N = torch.tensor(branches, device=device)
        self._masks: dict[tuple[int, torch.device], list[torch.Tensor]] = {}  # by window: layers have several

    def layer(self, layer: int) -> Any:
        """Return the function by which queries of a layer meet keys and values: the same one for all layers."""
        return self._attend

    def _attend(
        self,
        q_NHD: torch.Tensor,
        k_NKD: torch.Tensor,
        v_NKD: torch.Tensor,
        window: int,
        sinks_H: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Attend within each fork; returns (N, H, D)."""
        key = (window, q_NHD.device)
        if key not in self._masks:
            self._masks[key] = [visible_TT.to(q_NHD.device) for visible_TT in self._visible(window)]
        outputs = []
        parts = zip(*(each.split(self._sizes) for each in (q_NHD, k_NKD, v_NKD)), self._masks[key], strict=True)
        for q_THD, k_TKD, v_TKD, mask in parts:
            if sinks_H is not None:
                # gpt-oss: a learned logit per head takes its share of the softmax and gives nothing. The same as one
                # more key of zeros, with that logit in the mask, and a value of zeros.
                k_TKD = F.pad(k_TKD, (0, 0, 0, 0, 0, 1))
                v_TKD = F.pad(v_TKD, (0, 0, 0, 0, 0, 1))
                hidden_TT = torch.zeros(mask.shape, dtype=q_THD.dtype, device=mask.device).masked_fill(~mask, -math.inf)
                sinks_HT1 = sinks_H.to(q_THD.dtype).view(-1, 1, 1).expand(-1, len(mask), 1)
                mask = torch.cat((hidden_TT.expand(len(sinks_H), -1, -1), sinks_HT1), dim=-1)
            # Heads first, and each kv head once per query head that shares it. We assume that torch's fused GPU kernels
            # do not take fewer kv heads than query heads together with a mask (enable_gqa), and have not tried it.
            group = q_THD.size(1) // k_TKD.size(1)
            q_1HTD = q_THD.transpose(0, 1)[None]
            k_1HTD = k_TKD.repeat_interleave(group, dim=1).transpose(0, 1)[None]
            v_1HTD = v_TKD.repeat_interleave(group, dim=1).transpose(0, 1)[None]
            y_1HTD = F.scaled_dot_product_attention(q_1HTD, k_1HTD, v_1HTD, attn_mask=mask)
            outputs.append(y_1HTD[0].transpose(0, 1))
        return torch.cat(outputs)

    def _visible(self, window: int) -> Iterator[torch.Tensor]:
        """Yield which keys each query of a fork sees: the prefix and its own branch, up to itself, in the window."""
        for branch_T, position_T in zip(
            self._branch_N.split(self._sizes), self.positions.split(self._sizes), strict=True
        ):
            distance_TT = position_T[:, None] - position_T[None, :]
            related_TT = (branch_T[None, :] == 0) | (branch_T[None, :] == branch_T[:, None])
            yield related_TT & (distance_TT >= 0) & (distance_TT < window)


@torch.inference_mode()
def score_spans(model: Any, spans: Sequence[Span], max_tokens: int | None = None) -> list[Score]:
    """Score each span, to rounding as if it were read alone.

    model: a language_model.LanguageModel. max_tokens: tokens of a batch; None = what suits the device.
    """
    if max_tokens is None:
        max_tokens = 2048 if model.device.type == "cpu" else 16384
    batches: list[list[Fork]] = []
    room = 0
    for fork in group_spans(spans, max_tokens):
        if fork.size > room:
            batches.append([])
            room = max_tokens
        batches[-1].append(fork)
        room -= fork.size
    scores = [Score(logprob=0.0, tokens=0, greedy=False)] * len(spans)
    for batch in batches:
        context = ForkedRows(batch, spans, model.device)
        # Logits are made for the scored tokens alone: the head is the largest matrix of a small model. Eager, since
        # every batch has another length and torch.compile would begin anew for each.
        with torch.compiler.set_stance("force_eager"):
            logits_SV = model(context.idx_N, context=context, wanted_R=context.places).float()
        members = [member for fork in batch for member in fork.members]
        targets = [token for member in members for token in spans[member].ids[spans[member].start :]]
        targets_S = torch.tensor(targets, device=logits_SV.device)
        losses_S = F.cross_entropy(logits_SV, targets_S, reduction="none").cpu().double()
        hits_S = (logits_SV.argmax(-1) == targets_S).cpu()
        lengths = [len(spans[member].ids) - spans[member].start for member in members]
        for member, losses, hits in zip(members, losses_S.split(lengths), hits_S.split(lengths), strict=True):
            scores[member] = Score(
                logprob=-losses.sum().item(),
                tokens=len(losses),
                greedy=bool(hits.all()),
            )
    return scores
