"""CORE: the mean centred accuracy over 22 in-context tasks (DCLM, arXiv:2406.11794)."""

import math
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from nanochat.compute import Compute
from nanochat.core_tasks import CoreTask, build_prompts, draw_examples, fingerprint, read_rows, read_tasks
from nanochat.spans import Model, Score, Span, common_prefix, score_spans

WINDOW = 32  # rows that are batched together, and dealt out to the ranks: the same ones on any number of ranks


def accuracy_record(correct: float, n: int, baseline: float) -> dict[str, Any]:
    """Accuracy of `correct` out of `n`, its standard error sqrt(p(1-p)/n), and how far it gets from chance (0) to 1.

    The error is the plain binomial one: it is 0 when all or none are right, where it says least.
    """
    p = correct / n
    centered = (p - baseline) / (1 - baseline)
    return {"accuracy": p, "stderr": math.sqrt(p * (1 - p) / n), "n": n, "baseline": baseline, "centered": centered}


def mean_centered(records: Sequence[dict[str, Any]]) -> tuple[float, float]:
    """The mean centred accuracy of tasks by their `accuracy_record`s, and its standard error."""
    errors = [record["stderr"] / (1 - record["baseline"]) for record in records]
    return sum(record["centered"] for record in records) / len(records), math.hypot(*errors) / len(records)


def scored_spans(kind: str, sequences: list[list[int]], context: int | None = None) -> list[Span]:
    """The spans of a row whose prompts have these tokens: one an option, or the only one of language modeling.

    A sequence longer than `context` loses tokens on the left.
    """
    if kind == "schema":
        suffix = common_prefix([ids[::-1] for ids in sequences])
        starts = [len(ids) - suffix for ids in sequences]
    else:
        starts = [common_prefix(sequences)] * len(sequences)
    if kind == "language_modeling":
        sequences = sequences[1:]
    cuts = [max(0, len(ids) - context) if context else 0 for ids in sequences]
    return [Span(ids[cut:], max(start - cut, 1)) for ids, start, cut in zip(sequences, starts, cuts)]


def is_right(scores: Sequence[Score], gold: int | None) -> bool:
    """Whether the gold option has the lowest mean loss or, where `gold` is None, the only span is the arg-max.

    The first of equals wins. An option with nothing to score (a prefix of all others) is chosen where it stands first.
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
            tally[-1] += context is not None and max(map(len, whole)) > context
    if compute:
        tally = compute.all_reduce_sum(tally.to(compute.device)).cpu()
    *outcomes, truncated = tally.tolist()
    shots = {"shots": min(task.shots, len(rows) - 1), "fewshot_from": "kept" if kept > task.shots else "file"}
    record = accuracy_record(sum(outcomes), kept, task.baseline) | shots | {"truncated": truncated}
    return record | {"fingerprint": fingerprint(task, rows, kept), "outcomes": "".join(map(str, outcomes))}


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

    max_per_task: rows kept of each task, ValueError below 1; None keeps all, as a number to publish needs.
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
    metric, stderr = mean_centered(list(details.values())) if details else (None, None)
    results, centered = ({k: record[of] for k, record in details.items()} for of in ("accuracy", "centered"))
    core = {"core_metric": metric, "core_stderr": stderr, "results": results, "centered_results": centered}
    return {**core, "details": details, "skipped": skipped}
