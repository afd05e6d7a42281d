"""Spans of tokens scored in batches: their log-probability after what stands before them.

What is read twice is read once: where spans begin alike, as the options of a question do, the keys and values of that
prefix are kept, and only what differs is read for each. The head's logits are made for that rest alone. Any
`model(idx_BT) -> logits_BTV` will do; a `LanguageModel` spares the repetition.

Shapes: B sequences of a batch, T positions, V vocabulary, N scored tokens of a batch.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch.nn.utils.rnn import pad_sequence

from nanochat.kv_cache import CacheBatch, KVCache, Part
from nanochat.language_model import LanguageModel

CHUNK = 2048  # positions of a prompt read at a time, which bounds the scores of attention over a cache
SHARED = 0.75  # least part of the longest prompt that a common prefix must be: what follows it is read one by one
Model = Any


class Span(NamedTuple):
    """Tokens to be read, ids[start:] of them to be scored. A token is scored by the logits before it: start >= 1."""

    ids: list[int]
    start: int


class Score(NamedTuple):
    """What a model makes of a span: its log-probability in nats, its tokens, whether each of them is the arg-max."""

    logprob: float
    tokens: int
    greedy: bool

    @property
    def mean_loss(self) -> float:
        """Nats a token; nan where nothing is scored."""
        return -self.logprob / self.tokens if self.tokens else math.nan


class _Group(NamedTuple):
    """Spans that begin alike: `prefix` is read once, then each of `tails`, longest first, for the spans at places."""

    prefix: Sequence[int]
    tails: list[tuple[tuple[int, ...], list[int]]]

    @property
    def length(self) -> int:
        return len(self.prefix) + len(self.tails[0][0])


def common_prefix(sequences: Sequence[Sequence[int]]) -> int:
    """How many tokens all the sequences begin with in common."""
    return next((i for i, column in enumerate(zip(*sequences)) if len(set(column)) > 1), min(map(len, sequences)))


def pad_right(sequences: Sequence[Sequence[int]]) -> torch.Tensor:
    """Token ids of any lengths as one (B, T) batch. Causal attention never looks ahead, so any padding will do."""
    return pad_sequence([torch.tensor(ids, dtype=torch.long) for ids in sequences], batch_first=True)


def _group(spans: Sequence[Span], share: bool) -> list[_Group]:
    """Spans by common prefixes, where most of each is common; without `share` nothing is a prefix, all a tail."""
    runs: list[tuple[int, list[int]]] = []  # length of the prefix, places of the spans
    for i in sorted(range(len(spans)), key=lambda i: spans[i].ids):
        if spans[i].start == len(spans[i].ids):
            continue
        alone = spans[i].start - 1 if share else 0  # the token before the scored ones is read for its logits
        if runs:
            prefix, members = runs[-1]
            both = min(prefix, alone, common_prefix([spans[members[-1]].ids, spans[i].ids]))
            longest = max(spans[place].start for place in (*members, i))
            if both >= SHARED * longest or spans[members[-1]].ids[:-1] == spans[i].ids[:-1]:
                runs[-1] = both, [*members, i]
                continue
        runs.append((alone, [i]))
    groups = []
    for length, members in runs:
        tails: dict[tuple[int, ...], list[int]] = {}
        for i in members:
            tails.setdefault(tuple(spans[i].ids[length:-1]), []).append(i)
        ordered = sorted(tails.items(), key=lambda tail: -len(tail[0]))
        groups.append(_Group(spans[members[0]].ids[:length], ordered))
    return groups


def _batches(groups: list[_Group], max_tokens: int) -> Iterator[list[_Group]]:
    """Groups of similar length in batches of at most `max_tokens` positions, padding included, or of one group."""
    batch: list[_Group] = []
    for group in sorted(groups, key=lambda group: -group.length):
        if batch and (len(batch) + 1) * batch[0].length > max_tokens:
            yield batch
            batch = []
        batch.append(group)
    if batch:
        yield batch


def _read_on(
    model: Model,
    cache: KVCache,
    rows: Sequence[Sequence[int]],
    starts: Sequence[int],
    before: Sequence[int],
    keep: bool,
) -> torch.Tensor:
    """Logits (B, T, V) of rows of tokens that follow what the cache holds before `starts`; `before`: the token there.

    keep: the tokens become a part of what the cache holds, and nobody wants their logits.
    """
    lengths = [len(row) for row in rows]
    parts = [
        Part(first_row=i, n_rows=1, n_tokens=n, length=at + n)
        for i, (at, n) in enumerate(zip(starts, lengths, strict=True))
    ]
    tokens = [token for row in rows for token in row]
    positions = [at + t for at, n in zip(starts, lengths, strict=True) for t in range(n)]
    places = [i for i, n in enumerate(lengths) for _ in range(n)]
    previous = [token for first, row in zip(before, rows, strict=True) if row for token in (first, *row[:-1])]
    idx_N, positions_N, rows_N, previous_N = torch.tensor((tokens, positions, places, previous), device=cache.device)
    context = CacheBatch(cache, [part for part in parts if part.n_tokens], rows_N, positions_N, previous_N)
    if keep:
        return model.decode(idx_N, context, torch.zeros(1, dtype=torch.long, device=cache.device))
    return pad_sequence(model.decode(idx_N, context).split(lengths), batch_first=True)


def _read(model: Model, batch: list[_Group], cached: bool) -> Iterator[tuple[list[_Group], int, torch.Tensor]]:
    """Yields (groups, k, logits_BTV of the k-th tail of each) until every tail was read."""
    device = getattr(model, "device", torch.device("cpu"))
    if not cached:
        yield batch, 0, model(pad_right([group.tails[0][0] for group in batch]).to(device))
        return
    batch = sorted(batch, key=lambda group: -len(group.tails))  # those that have a k-th tail are the first ones
    # tails are read over one another, for which the cache has to hold the whole prefix, windows or not
    context = model.config.sequence_len
    cache = KVCache(device, [need._replace(window=context) for need in model.cache_needs], context)
    prefixes = [group.prefix for group in batch]
    cache.reserve(len(batch), max(group.length for group in batch))  # takes all memory at once
    for at in range(0, max(map(len, prefixes)), CHUNK):
        rows = [prefix[at : at + CHUNK] for prefix in prefixes]
        before = [prefix[at - 1] if 0 < at < len(prefix) else -1 for prefix in prefixes]
        _read_on(model, cache, rows, [at] * len(batch), before, keep=True)
    for k in range(len(batch[0].tails)):  # each over the one before: no query looks past its own position
        active = [group for group in batch if len(group.tails) > k]
        tails, starts = [group.tails[k][0] for group in active], [len(group.prefix) for group in active]
        before = [group.prefix[-1] if group.prefix else -1 for group in active]
        yield active, k, _read_on(model, cache, tails, starts, before, keep=False)


@torch.inference_mode()
def score_spans(model: Model, spans: Sequence[Span], max_tokens: int | None = None) -> list[Score]:
    """The score of each span, to rounding as if it were read alone. What spans begin with in common is read once.

    max_tokens: positions of a batch; None = what suits the device.
    """
    cached = isinstance(model, LanguageModel)
    if max_tokens is None:
        on_cpu = torch.device(getattr(model, "device", "cpu")).type == "cpu"
        max_tokens = 2048 if on_cpu else 16384
    scores = [Score(0.0, 0, False)] * len(spans)
    for batch in _batches(_group(spans, cached), max_tokens):
        for groups, k, logits_BTV in _read(model, batch, cached):
            rows, columns, targets, lengths, places = [], list[int](), [], [], []
            for row, group in enumerate(groups):
                for place in group.tails[k][1]:
                    (ids, start), before = spans[place], len(group.prefix) + 1
                    rows += [row] * (len(ids) - start)
                    columns += range(start - before, len(ids) - before)
                    targets += ids[start:]
                    lengths.append(len(ids) - start)
                    places.append(place)
            predicted_NV = logits_BTV[rows, columns].float()
            targets_N = torch.tensor(targets, device=predicted_NV.device)
            losses_N = torch.nn.functional.cross_entropy(predicted_NV, targets_N, reduction="none").cpu().double()
            hits_N = (predicted_NV.argmax(-1) == targets_N).cpu()
            for place, losses, hits in zip(places, losses_N.split(lengths), hits_N.split(lengths)):
                scores[place] = Score(-losses.sum().item(), len(losses), bool(hits.all()))
    return scores
