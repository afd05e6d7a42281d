"""CORE: the mean centred accuracy over 22 in-context tasks (DCLM, arXiv:2406.11794)."""

import csv
import json
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from nanochat.compute import Compute

SHUFFLE_SEED = 1337  # which rows are kept, and in which order
FEWSHOT_SEED = 1234  # plus the row's index: which examples stand before a row


@dataclass(frozen=True)
class CoreTask:
    """One line of `core.yaml`, with the accuracy that guessing reaches (0..1)."""

    label: str
    path: Path
    kind: str  # multiple_choice | schema | language_modeling
    shots: int
    delimiter: str
    baseline: float


def accuracy_record(correct: int, n: int, baseline: float) -> dict[str, float]:
    """Accuracy of `correct` out of `n`, its standard error sqrt(p(1-p)/n), and how far it gets from chance (0) to 1.

    The error is the plain binomial one: it is 0 when all or none are right, where it says least.
    """
    p = correct / n
    centered = (p - baseline) / (1 - baseline)
    return {"accuracy": p, "stderr": math.sqrt(p * (1 - p) / n), "n": n, "baseline": baseline, "centered": centered}


def read_tasks(bundle_dir: Path | str) -> list[CoreTask]:
    """The tasks of a bundle: `core.yaml`, `eval_meta_data.csv` (baselines in percent) and `eval_data/`.

    Raises ValueError when the bundle's index is missing or wrong.
    """
    import yaml

    bundle_dir = Path(bundle_dir)
    for name in ("core.yaml", "eval_meta_data.csv"):
        if not (bundle_dir / name).is_file():
            raise ValueError(f"{bundle_dir / name} is missing: --bundle must name an evaluation bundle's folder")
    try:
        with open(bundle_dir / "eval_meta_data.csv", newline="", encoding="utf-8") as f:
            baselines = {row["Eval Task"]: float(row["Random baseline"]) / 100 for row in csv.DictReader(f)}
        entries = yaml.safe_load((bundle_dir / "core.yaml").read_text(encoding="utf-8"))["icl_tasks"]
        return [
            CoreTask(
                label=entry["label"],
                path=bundle_dir / "eval_data" / entry["dataset_uri"],
                kind=entry["icl_task_type"],
                shots=entry["num_fewshot"][0],
                delimiter=entry.get("continuation_delimiter", " "),
                baseline=baselines[entry["label"]],
            )
            for entry in entries
        ]
    except (yaml.YAMLError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{bundle_dir / 'core.yaml'} and eval_meta_data.csv do not fit: {error!r}") from error


def _options(task: CoreTask, row: dict[str, Any]) -> list[str]:
    """The row written out in full, once an option; a language_modeling row has one."""
    if task.kind == "multiple_choice":
        return [row["query"] + task.delimiter + choice for choice in row["choices"]]
    if task.kind == "schema":
        return [context + task.delimiter + row["continuation"] for context in row["context_options"]]
    return [row["context"].strip() + task.delimiter + row["continuation"]]


def _solved(task: CoreTask, row: dict[str, Any]) -> str:
    return _options(task, row)[row.get("gold", 0)]


def read_rows(task: CoreTask) -> list[dict[str, Any]]:
    """All rows of a task in the protocol's order. Raises ValueError naming the file and line that is wrong."""
    if task.kind not in ("multiple_choice", "schema", "language_modeling"):
        raise ValueError(f"unknown icl_task_type '{task.kind}'")
    if not task.path.is_file():
        raise ValueError(f"{task.path} is missing")
    rows = []
    for number, line in enumerate(task.path.read_text(encoding="utf-8").split("\n"), 1):
        if not line.strip():
            continue
        try:
            rows.append(json.loads(line))
            _solved(task, rows[-1])
        except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
            raise ValueError(f"{task.path}:{number} is not a {task.kind} row ({error!r})") from error
    if not rows:
        raise ValueError(f"{task.path} holds no rows")
    random.Random(SHUFFLE_SEED).shuffle(rows)
    return rows


def draw_examples(rows: Sequence[dict[str, Any]], kept: int, index: int, shots: int) -> list[dict[str, Any]]:
    """The few-shot examples of row `index`: from the other kept rows, or from all where too few were kept."""
    pool = kept if kept > shots else len(rows)
    others = [i for i in range(pool) if i != index]
    return [rows[i] for i in random.Random(FEWSHOT_SEED + index).sample(others, min(shots, len(others)))]


def build_prompts(task: CoreTask, row: dict[str, Any], examples: Sequence[dict[str, Any]]) -> list[str]:
    """The texts to compare: one an option; for language_modeling the prompt alone, then with its continuation."""
    shots = "".join(_solved(task, example) + "\n\n" for example in examples)
    texts = [shots + option for option in _options(task, row)]
    if task.kind == "language_modeling":
        texts.insert(0, (shots + row["context"].strip() + task.delimiter).rstrip())
    return texts


def _common_prefix(sequences: Sequence[Sequence[int]]) -> int:
    for i, column in enumerate(zip(*sequences)):
        if len(set(column)) > 1:
            return i
    return min(map(len, sequences))


def scored_sequences(kind: str, sequences: list[list[int]]) -> tuple[list[list[int]], list[int]]:
    """The sequences to run through the model and where the scored span of each begins; it ends with the sequence."""
    if kind == "schema":
        suffix = _common_prefix([ids[::-1] for ids in sequences])
        return sequences, [len(ids) - suffix for ids in sequences]
    start = _common_prefix(sequences)
    if kind == "language_modeling":
        sequences = sequences[1:]
    return sequences, [start] * len(sequences)


def pad_right(sequences: Sequence[Sequence[int]]) -> torch.Tensor:
    """Token ids of any lengths as one (B, T) batch. Causal attention never looks ahead, so any padding will do."""
    idx_BT = torch.zeros(len(sequences), max(map(len, sequences)), dtype=torch.long)
    for row, ids in zip(idx_BT, sequences):
        row[: len(ids)] = torch.tensor(ids)
    return idx_BT


def score_row(
    model: Callable[[torch.Tensor], torch.Tensor], sequences: list[list[int]], starts: list[int], gold: int | None
) -> bool:
    """Whether the model gets one row right: the gold option has the lowest mean loss over its span or, where `gold`
    is None, every token of the only span is the arg-max.

    The first of equal options wins. An option with nothing to score (a prefix of all others) has mean loss nan, which
    is chosen only when it stands first.
    """
    logits_BTV = model(pad_right(sequences).to(getattr(model, "device", "cpu")))
    losses = []
    for logits_TV, ids, start in zip(logits_BTV, sequences, starts):
        predicted_SV = logits_TV[start - 1 : len(ids) - 1].float()
        target_S = torch.tensor(ids[start:], dtype=torch.long, device=predicted_SV.device)
        if gold is None:
            return bool((predicted_SV.argmax(dim=-1) == target_S).all())
        losses.append(torch.nn.functional.cross_entropy(predicted_SV, target_S).item())
    return min(range(len(losses)), key=losses.__getitem__) == gold


def evaluate_core_task(
    model: Callable[[torch.Tensor], torch.Tensor],
    tokenizer: Any,
    task: CoreTask,
    rows: Sequence[dict[str, Any]],
    max_rows: int | None = None,
    compute: Compute | None = None,
) -> dict[str, Any]:
    """Score the first `max_rows` of a task's rows, shared among the ranks; every rank returns the same.

    Returns an `accuracy_record` with `shots`, `truncated` (rows cut on the left to the model's context) and
    `fewshot_from` ("kept", or "file" where fewer rows were kept than shots are wanted).
    """
    kept = min(max_rows or len(rows), len(rows))
    context = getattr(getattr(model, "config", None), "sequence_len", None)
    correct = truncated = 0
    for index in range(compute.rank if compute else 0, kept, compute.world_size if compute else 1):
        prompts = build_prompts(task, rows[index], draw_examples(rows, kept, index, task.shots))
        ids = tokenizer.encode(prompts, prepend=tokenizer.get_bos_token_id())
        sequences, starts = scored_sequences(task.kind, ids)
        cuts = [max(0, len(ids) - context) if context else 0 for ids in sequences]
        # a token is scored by the logits before it, so the first one of a sequence cannot be
        starts = [max(start - cut, 1) for start, cut in zip(starts, cuts)]
        gold = None if task.kind == "language_modeling" else rows[index]["gold"]
        correct += score_row(model, [ids[cut:] for ids, cut in zip(sequences, cuts)], starts, gold)
        truncated += any(cuts)
    if compute:
        counts = torch.tensor([correct, truncated], device=compute.device)
        correct, truncated = compute.all_reduce_sum(counts).tolist()
    return {
        **accuracy_record(correct, kept, task.baseline),
        "shots": min(task.shots, len(rows) - 1),
        "truncated": truncated,
        "fewshot_from": "kept" if kept > task.shots else "file",
    }


@torch.no_grad()
def evaluate_core(
    model: Callable[[torch.Tensor], torch.Tensor],
    tokenizer: Any,
    bundle_dir: Path | str,
    max_per_task: int | None = None,
    compute: Compute | None = None,
    log: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """The CORE metric of any `model(idx_BT) -> logits_BTV` on the tasks of a bundle.

    max_per_task: rows kept of each task; None keeps all, which a number to publish needs.
    log: called with one line a task.
    Returns core_metric (None when no task ran) and core_stderr, results and centered_results (accuracy by task),
    details (`evaluate_core_task` by task) and skipped (why, by task).
    """
    if max_per_task is not None and max_per_task < 1:
        raise ValueError(f"--max-per-task {max_per_task}: must be at least 1")
    details, skipped = {}, {}
    for task in read_tasks(bundle_dir):
        try:
            rows = read_rows(task)
        except ValueError as error:
            skipped[task.label] = str(error)
            log(f"{task.label}: skipped: {error}")
            continue
        record = details[task.label] = evaluate_core_task(model, tokenizer, task, rows, max_per_task, compute)
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
