"""CORE: the mean centred accuracy over 22 in-context tasks (DCLM, arXiv:2406.11794), scored in batches.

What is read twice is read once: the options of a row share its prompt, whose keys and values are kept, and only what
differs is read for each. The head's logits are made for that rest alone. Any `model(idx_BT) -> logits_BTV` will do;
one that is called as gpt.py's, with `cache`, `positions_BT` and `last_only`, is spared the repetition.

Shapes: B sequences of a batch, T positions, V vocabulary, N scored tokens of a batch.
"""

import inspect
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from nanochat.compute import Compute
from nanochat.core_tasks import CoreTask, build_prompts, draw_examples, fingerprint, read_rows, read_tasks
from nanochat.kv_cache import KVCache

WINDOW = 32  # rows that are batched together, and dealt out to the ranks: the same ones on any number of ranks
CHUNK = 2048  # positions of a prompt read at a time, which bounds the scores of attention over a cache
SHARED = 0.75  # least part of the longest prompt that a common prefix must be: what follows it is read one by one
Model = Callable[..., torch.Tensor]


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
    """Spans that begin alike: `prefix` is read once, and after it each of `tails`, the longest first, with the places
    of the spans that it serves."""

    prefix: Sequence[int]
    tails: list[tuple[Sequence[int], list[int]]]

    @property
    def length(self) -> int:
        return len(self.prefix) + len(self.tails[0][0])


def accuracy_record(correct: int, n: int, baseline: float) -> dict[str, float]:
    """Accuracy of `correct` out of `n`, its standard error sqrt(p(1-p)/n), and how far it gets from chance (0) to 1.

    The error is the plain binomial one: it is 0 when all or none are right, where it says least.
    """
    p = correct / n
    centered = (p - baseline) / (1 - baseline)
    return {"accuracy": p, "stderr": math.sqrt(p * (1 - p) / n), "n": n, "baseline": baseline, "centered": centered}


def _common_prefix(sequences: Sequence[Sequence[int]]) -> int:
    for i, column in enumerate(zip(*sequences)):
        if len(set(column)) > 1:
            return i
    return min(map(len, sequences))


def scored_spans(kind: str, sequences: list[list[int]], context: int | None = None) -> list[Span]:
    """The spans of a row whose prompts have these tokens: one an option, or the only one of language modeling.

    A sequence longer than `context` loses tokens on the left.
    """
    if kind == "schema":
        suffix = _common_prefix([ids[::-1] for ids in sequences])
        starts = [len(ids) - suffix for ids in sequences]
    else:
        starts = [_common_prefix(sequences)] * len(sequences)
    if kind == "language_modeling":
        sequences = sequences[1:]
    cuts = [max(0, len(ids) - context) if context else 0 for ids in sequences]
    return [Span(ids[cut:], max(start - cut, 1)) for ids, start, cut in zip(sequences, starts, cuts)]


def pad_right(sequences: Sequence[Sequence[int]]) -> torch.Tensor:
    """Token ids of any lengths as one (B, T) batch. Causal attention never looks ahead, so any padding will do."""
    idx_BT = torch.zeros(len(sequences), max(map(len, sequences)), dtype=torch.long)
    for row, ids in zip(idx_BT, sequences):
        row[: len(ids)] = torch.tensor(ids)
    return idx_BT


def _group(spans: Sequence[Span], share: bool) -> list[_Group]:
    """Spans by common prefixes, where that saves reading; without `share` each span alone and all of it a tail."""
    runs: list[tuple[int, list[int]]] = []  # length of the prefix, places of the spans
    for i in sorted(range(len(spans)), key=lambda i: spans[i].ids):
        if spans[i].start == len(spans[i].ids):
            continue
        alone = spans[i].start - 1 if share else 0  # the token before the scored ones is read for its logits
        prefix, members = runs[-1] if runs else (0, [i])
        both = min(prefix, alone, _common_prefix([spans[members[-1]].ids, spans[i].ids]))
        if both and both >= SHARED * max(spans[place].start for place in (*members, i)):
            runs[-1] = both, [*members, i]
        else:
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
    model: Model, cache: KVCache, rows: Sequence[Sequence[int]], starts: Sequence[int], keep: bool
) -> torch.Tensor:
    """Logits (B, T, V) of rows of tokens that follow what the cache holds before `starts`.

    keep: the tokens become a part of what the cache holds, and nobody wants their logits.
    """
    idx_BT, column_1T = pad_right(rows), torch.arange(max(map(len, rows)))[None]
    start_B1, length_B1 = torch.tensor(starts)[:, None], torch.tensor([len(row) for row in rows])[:, None]
    positions_BT = torch.where(column_1T < length_B1, start_B1 + column_1T, -1)
    slots = cache.rows(0, len(rows), int(positions_BT.max()) + 1)
    idx_BT, positions_BT = (x.to(cache.last_token.device) for x in (idx_BT, positions_BT))
    logits_BTV = model(idx_BT, cache=slots, positions_BT=positions_BT, last_only=keep)
    if keep:
        slots.advance(idx_BT, positions_BT)
    return logits_BTV


def _read(model: Model, batch: list[_Group], cached: bool) -> Iterator[tuple[list[_Group], int, torch.Tensor]]:
    """Yields (groups, k, logits_BTV of the k-th tail of each) until every tail was read."""
    device = getattr(model, "device", torch.device("cpu"))
    if not cached:
        yield batch, 0, model(pad_right([group.tails[0][0] for group in batch]).to(device))
        return
    batch = sorted(batch, key=lambda group: -len(group.tails))  # those that have a k-th tail are the first ones
    cache, prefixes = KVCache(device), [group.prefix for group in batch]
    cache.rows(0, len(batch), max(group.length for group in batch))  # takes all memory at once
    for at in range(0, max(map(len, prefixes)), CHUNK):
        _read_on(model, cache, [prefix[at : at + CHUNK] for prefix in prefixes], [at] * len(batch), keep=True)
    for k in range(len(batch[0].tails)):  # each over the one before: no query looks past its own position
        active = [group for group in batch if len(group.tails) > k]
        tails, starts = [group.tails[k][0] for group in active], [len(group.prefix) for group in active]
        yield active, k, _read_on(model, cache, tails, starts, keep=False)


@torch.inference_mode()
def score_spans(model: Model, spans: Sequence[Span], max_tokens: int | None = None) -> list[Score]:
    """The score of each span, to rounding as if it were read alone. What spans begin with in common is read once.

    max_tokens: positions of a batch; None = what suits the device.
    """
    known = inspect.signature(getattr(model, "forward", model)).parameters
    cached = {"cache", "positions_BT", "last_only"} <= known.keys()
    if max_tokens is None:
        on_cpu = torch.device(getattr(model, "device", "cpu")).type == "cpu"
        max_tokens = 2048 if on_cpu else 16384
    scores = [Score(0.0, 0, False)] * len(spans)
    for batch in _batches(_group(spans, cached), max_tokens):
        for groups, k, logits_BTV in _read(model, batch, cached):
            rows, columns, targets, lengths, places = [], [], [], [], []
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


def is_right(scores: Sequence[Score], gold: int | None) -> bool:
    """Whether the gold option has the lowest mean loss or, where `gold` is None, the only span is the arg-max.

    The first of equal options wins. An option with nothing to score (a prefix of all others) has mean loss nan, which
    is chosen only when it stands first.
    """
    if gold is None:
        return scores[0].greedy
    return min(range(len(scores)), key=lambda i: scores[i].mean_loss) == gold


def evaluate_core_task(
    model: Model,
    tokenizer: Any,
    task: CoreTask,
    rows: Sequence[dict[str, Any]],
    max_rows: int | None = None,
    compute: Compute | None = None,
    progress: Callable[[Sequence[Any]], Iterable[Any]] = iter,
) -> dict[str, Any]:
    """Score the first `max_rows` of a task's rows, shared among the ranks; every rank returns the same.

    Returns an `accuracy_record` with `shots`, `truncated` (rows cut on the left to the model's context),
    `fewshot_from` ("kept", or "file" where fewer rows were kept than shots are wanted), `fingerprint` and `outcomes`
    (a digit a row, in order: 1 = right), by which another model's record of the same rows is compared.
    """
    kept = min(max_rows or len(rows), len(rows))
    context = getattr(getattr(model, "config", None), "sequence_len", None)

    def prompts(index: int) -> list[str]:
        return build_prompts(task, rows[index], draw_examples(rows, kept, index, task.shots))

    def place(index: int) -> Any:  # without examples, questions about one story stand together
        return len(prompts(index)[0]) if task.shots else prompts(index)[0]

    order = sorted(range(kept), key=place)
    windows = [order[i : i + WINDOW] for i in range(0, kept, WINDOW)]
    tally = torch.zeros(kept + 1, dtype=torch.int64)  # by row whether it is right; last the number of truncated rows
    for window in progress(windows[compute.rank :: compute.world_size] if compute else windows):
        texts = [prompts(index) for index in window]
        ids = iter(tokenizer.encode([t for row in texts for t in row], prepend=tokenizer.get_bos_token_id()))
        sequences = [[next(ids) for _ in row] for row in texts]
        spans = [scored_spans(task.kind, row, context) for row in sequences]
        scores = iter(score_spans(model, [span for row in spans for span in row]))
        for index, row, whole in zip(window, spans, sequences):
            gold = None if task.kind == "language_modeling" else rows[index]["gold"]
            tally[index] = is_right([next(scores) for _ in row], gold)
            tally[-1] += bool(context) and max(map(len, whole)) > context
    if compute:
        tally = compute.all_reduce_sum(tally.to(compute.device)).cpu()
    *outcomes, truncated = tally.tolist()
    return {
        **accuracy_record(sum(outcomes), kept, task.baseline),
        "shots": min(task.shots, len(rows) - 1),
        "truncated": truncated,
        "fewshot_from": "kept" if kept > task.shots else "file",
        "fingerprint": fingerprint(task, rows, kept),
        "outcomes": "".join(map(str, outcomes)),
    }


def evaluate_core(
    model: Model,
    tokenizer: Any,
    bundle_dir: Path | str,
    max_per_task: int | None = None,
    compute: Compute | None = None,
    log: Callable[[str], None] = lambda line: None,
    progress: Callable[..., Iterable[Any]] = lambda windows, desc: windows,
) -> dict[str, Any]:
    """The CORE metric of any `model(idx_BT) -> logits_BTV` on the tasks of a bundle.

    max_per_task: rows kept of each task; None keeps all, which a number to publish needs.
    log: called with one line a task, and one for its bad rows. progress: wraps a task's batches, as tqdm does.
    Returns core_metric (None when no task ran) and core_stderr, results and centered_results (accuracy by task),
    details (`evaluate_core_task` by task, with `bad_rows`, the number left out) and skipped (why, by task).
    """
    if max_per_task is not None and max_per_task < 1:
        raise ValueError(f"--max-per-task {max_per_task}: must be at least 1")
    details, skipped = {}, {}
    tasks = read_tasks(bundle_dir)
    for number, task in enumerate(tasks, 1):
        try:
            rows, faults = read_rows(task)
        except (ValueError, OSError) as error:
            skipped[task.label] = str(error)
            log(f"{task.label}: skipped: {error}")
            continue
        if faults:
            more = f" and {len(faults) - 3} more" if len(faults) > 3 else ""
            log(f"{task.label}: {len(faults)} bad rows left out: {'; '.join(faults[:3])}{more}")

        bar = partial(progress, desc=f"{number}/{len(tasks)} {task.label}")
        record = evaluate_core_task(model, tokenizer, task, rows, max_per_task, compute, bar)
        details[task.label] = {**record, "bad_rows": len(faults)}
        log(f"{task.label}: {record['accuracy']:.4f} ± {record['stderr']:.4f} (n={record['n']})")
    errors = [record["stderr"] / (1 - record["baseline"]) for record in details.values()]
    centered = {label: record["centered"] for label, record in details.items()}
    return {
        "core_metric": sum(centered.values()) / len(centered) if centered else None,
        "core_stderr": math.hypot(*errors) / len(errors) if errors else None,
        "results": {label: record["accuracy"] for label, record in details.items()},
        "centered_results": centered,
        "details": details,
        "skipped": skipped,
    }
