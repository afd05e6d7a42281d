"""CORE: how well a base model answers 22 in-context tasks, as one number (DCLM, arXiv:2406.11794).

    download_bundle          the published tasks -> a folder: core.yaml, eval_meta_data.csv, eval_data/*.jsonl
    read_tasks, read_rows    that folder -> tasks and their rows
    build_prompts            a row and its few-shot examples -> one text per option
    scored_spans             those texts -> the tokens that differ, which spans.py scores
    evaluate_core            all of it: accuracy per task, 0 for guessing and 1 for perfect, and their mean

Nothing is generated: the model reads each option, and the likeliest one is its answer. The three kinds of tasks:

    multiple_choice      "Sky? Answer: " + ("blue" | "black")         scored: the options' tokens
    schema               ("The cat" | "The dog") + " barked."         scored: the common end
    language_modeling    "Two and two are" + " four"                  right if each token of "four" is the arg-max
"""

import csv
import hashlib
import json
import math
import os
import random
import tempfile
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from nanochat import hub
from nanochat.common import print0
from nanochat.compute import Compute
from nanochat.spans import Score, Span, common_prefix, score_questions

Row = dict[str, Any]

# --- the bundle -------------------------------------------------------------------------------------------------------

BUNDLE_URL = "https://karpathy-public.s3.us-west-2.amazonaws.com/eval_bundle.zip"


def download_bundle(folder: Path, url: str = BUNDLE_URL) -> None:
    """Download and unpack the zipped bundle at `url` into `folder`, unless that is there.

    Raises ValueError when the archive is damaged (the zip format has checksums) or is not a whole bundle.
    """
    if folder.exists():
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    # Unpacked beside its place and renamed at the end: the folder is there whole or not at all.
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as temporary:
        archive = Path(temporary, "bundle.zip")
        hub.download_url(url, archive)
        try:
            with zipfile.ZipFile(archive) as bundle:
                bundle.extractall(Path(temporary, "all"))  # which drops ".." and leading "/" of names
            found = sorted(Path(temporary, "all").rglob("core.yaml"), key=lambda path: len(path.parts))
            if not found:
                raise ValueError("it has no core.yaml")
            missing = [task.path.name for task in read_tasks(found[0].parent) if not task.path.is_file()]
            if missing:
                raise ValueError(f"it lacks {', '.join(missing)}")
        except (ValueError, zipfile.BadZipFile, zlib.error, EOFError, RuntimeError) as error:
            raise ValueError(f"{url} does not hold a whole evaluation bundle: {error}") from error
        os.rename(found[0].parent, folder)


# --- tasks ------------------------------------------------------------------------------------------------------------

KINDS = ("multiple_choice", "schema", "language_modeling")

# The protocol fixes both seeds: all models are asked the same rows with the same examples.
SHUFFLE_SEED = 1337  # which rows are kept, and in which order
FEWSHOT_SEED = 1234  # plus the row's index: which examples stand before a row


@dataclass(frozen=True)
class CoreTask:
    """One line of core.yaml, with the accuracy that guessing reaches (0..1)."""

    label: str
    path: Path
    kind: str  # one of KINDS
    shots: int  # examples before each row
    delimiter: str  # between a question and its answer
    baseline: float


def read_tasks(bundle_dir: Path | str) -> list[CoreTask]:
    """Read the tasks of a bundle. Raises ValueError when its index is missing or wrong."""
    import yaml

    bundle_dir = Path(bundle_dir)
    index = bundle_dir / "core.yaml"
    table = bundle_dir / "eval_meta_data.csv"
    for path in (index, table):
        if not path.is_file():
            raise ValueError(f"{path} is missing: --bundle must name an evaluation bundle's folder")
    tasks = []
    try:
        with open(table, newline="", encoding="utf-8") as file:
            percents = {row["Eval Task"]: float(row["Random baseline"]) for row in csv.DictReader(file)}
        for entry in yaml.safe_load(index.read_text(encoding="utf-8"))["icl_tasks"]:
            task = CoreTask(
                label=entry["label"],
                path=bundle_dir / "eval_data" / entry["dataset_uri"],
                kind=entry["icl_task_type"],
                shots=int(entry["num_fewshot"][0]),
                delimiter=entry.get("continuation_delimiter", " "),
                baseline=percents[entry["label"]] / 100,
            )
            if task.shots < 0 or not isinstance(task.delimiter, str) or not 0 <= task.baseline < 1:
                raise ValueError(f"num_fewshot, continuation_delimiter or baseline of {task.label} is out of range")
            tasks.append(task)
    except (yaml.YAMLError, csv.Error, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{index} and {table.name} do not fit: {error!r}") from error
    if not tasks or len({task.label for task in tasks}) < len(tasks):
        raise ValueError(f"{index} and {table.name} do not fit: icl_tasks must list tasks of different labels")
    return tasks


def check_row(kind: str, row: Any) -> None:
    """Raise ValueError for a row that lacks what its kind of task needs."""
    if not isinstance(row, dict):
        raise ValueError("not a JSON object")
    texts = {"multiple_choice": ["query"], "schema": ["continuation"], "language_modeling": ["context", "continuation"]}
    for name in texts[kind]:
        if not isinstance(row.get(name), str) or (name == "continuation" and not row[name].strip()):
            raise ValueError(f"'{name}' must be a text, not {row.get(name)!r}"[:200])
    if kind == "language_modeling":
        return
    name = "choices" if kind == "multiple_choice" else "context_options"
    listed = row.get(name)
    gold = row.get("gold")
    if not isinstance(listed, list) or len(listed) < 2 or not all(isinstance(text, str) for text in listed):
        raise ValueError(f"'{name}' must list two texts or more")
    if not isinstance(gold, int) or isinstance(gold, bool) or not 0 <= gold < len(listed):
        raise ValueError(f"'gold' must be a place in '{name}', 0 to {len(listed) - 1}, not {gold!r}"[:200])


def read_rows(task: CoreTask) -> tuple[list[Row], list[str]]:
    """Read the good rows of a task in the protocol's order, and "FILE:LINE: what is wrong" of each bad one.

    Raises ValueError when nothing of the task can be used.
    """
    if task.kind not in KINDS:
        raise ValueError(f"unknown icl_task_type '{task.kind}': choose from {', '.join(KINDS)}")
    if not task.path.is_file():
        raise ValueError(f"{task.path} is missing")
    rows = []
    faults = []
    for number, line in enumerate(task.path.read_bytes().split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            check_row(task.kind, row)
        except (ValueError, RecursionError) as error:
            faults.append(f"{task.path}:{number}: {error}")
        else:
            rows.append(row)
    if not rows and faults:
        raise ValueError(f"{len(faults)} bad rows and no good one: {faults[0]}")
    if not rows:
        raise ValueError(f"{task.path} is empty")
    random.Random(SHUFFLE_SEED).shuffle(rows)
    return rows, faults


def fingerprint(task: CoreTask, rows: Sequence[Row], kept: int) -> str:
    """Hash all that makes the questions: records of two models can be compared where it is equal."""
    settings = [task.kind, task.shots, task.delimiter, task.baseline, kept]
    return hashlib.sha256(json.dumps([settings, rows]).encode()).hexdigest()[:16]


# --- prompts ----------------------------------------------------------------------------------------------------------


def draw_examples(rows: Sequence[Row], kept: int, index: int, shots: int) -> list[Row]:
    """Draw the few-shot examples of row `index`: from the other kept rows, or from all where too few were kept."""
    others = (kept if kept > shots else len(rows)) - 1
    drawn = random.Random(FEWSHOT_SEED + index).sample(range(others), min(shots, others))
    return [rows[i + (i >= index)] for i in drawn]  # places among the others: row `index` is skipped


def options(task: CoreTask, row: Row) -> list[str]:
    """Write the row out in full, once per option; a language_modeling row has one."""
    if task.kind == "multiple_choice":
        return [row["query"] + task.delimiter + choice for choice in row["choices"]]
    if task.kind == "schema":
        return [context + task.delimiter + row["continuation"] for context in row["context_options"]]
    return [row["context"].strip() + task.delimiter + row["continuation"]]


def build_prompts(task: CoreTask, row: Row, examples: Sequence[Row]) -> list[str]:
    """Return the texts to compare: one per option; for language_modeling the prompt, then with its continuation."""
    shots = ""
    for example in examples:
        right = 0 if task.kind == "language_modeling" else example["gold"]
        shots += options(task, example)[right] + "\n\n"
    texts = [shots + option for option in options(task, row)]
    if task.kind == "language_modeling":
        # Stripped, since a space at the end is a token of its own, but in the full text belongs to the next word.
        texts.insert(0, (shots + row["context"].strip() + task.delimiter).rstrip())
    return texts


# --- scoring ----------------------------------------------------------------------------------------------------------


def scored_spans(kind: str, sequences: list[list[int]], context: int) -> list[Span]:
    """Return the spans of a row whose prompts have these tokens: one per option, one for language_modeling.

    multiple_choice scores what differs at the end, schema what is common at the end, language_modeling what the second
    text has beyond the first. A sequence longer than `context` loses tokens on the left.
    """
    if kind == "schema":
        suffix = common_prefix([ids[::-1] for ids in sequences])
        starts = [len(ids) - suffix for ids in sequences]
    else:
        starts = [common_prefix(sequences)] * len(sequences)
    if kind == "language_modeling":
        sequences = sequences[1:]
    spans = []
    for ids, start in zip(sequences, starts, strict=False):
        cut = max(0, len(ids) - context)
        spans.append(Span(ids[cut:], start=max(start - cut, 1)))
    return spans


def is_right(scores: Sequence[Score], gold: int | None) -> bool:
    """Return True if the gold option has the lowest mean loss or, if `gold` is None, the only span is the arg-max.

    The first of equals wins.
    """
    if gold is None:
        return scores[0].greedy
    # An option that is a prefix of all others has nothing to score, so its mean loss is nan, and every comparison with
    # nan is false. So `min` chooses it where it stands first and nowhere else. The reference implementation does the
    # same; another rule would give numbers that cannot be compared with others'.
    return min(range(len(scores)), key=lambda i: scores[i].mean_loss) == gold


# --- the metric -------------------------------------------------------------------------------------------------------

ROWS_AT_ONCE = 32  # rows that are tokenized together, and dealt out to the ranks: the same ones on any number of ranks


def accuracy_record(correct: float, n: int, baseline: float) -> dict[str, Any]:
    """Return the accuracy of `correct` out of `n`, its standard error, and how far it gets from chance (0) to 1.

    The error is the plain binomial sqrt(p(1-p)/n): it is 0 when all or none are right, where it says least.
    """
    p = correct / n
    return {
        "accuracy": p,
        "stderr": math.sqrt(p * (1 - p) / n),
        "n": n,
        "baseline": baseline,
        "centered": (p - baseline) / (1 - baseline),
    }


def mean_centered(records: Sequence[dict[str, Any]]) -> tuple[float, float]:
    """Return the mean centered accuracy of tasks by their `accuracy_record`s, and its standard error."""
    errors = [record["stderr"] / (1 - record["baseline"]) for record in records]
    return sum(record["centered"] for record in records) / len(records), math.hypot(*errors) / len(records)


def score_rows(
    model: Any, tokenizer: Any, task: CoreTask, rows: Sequence[Row], kept: int, indices: Sequence[int]
) -> list[tuple[bool, bool]]:
    """Return for each of some rows whether the model is right, and whether its prompt was cut to the context."""
    context = model.config.sequence_len
    prompts = [build_prompts(task, rows[i], draw_examples(rows, kept, i, task.shots)) for i in indices]
    # All texts in one call, which the tokenizer spreads over the cores.
    all_texts = [text for texts in prompts for text in texts]
    ids = iter(tokenizer.encode(all_texts, prepend=tokenizer.get_bos_token_id()))
    tokenized = [[next(ids) for _ in texts] for texts in prompts]  # per row, the tokens of each of its texts
    scores = score_questions(model, [scored_spans(task.kind, sequences, context) for sequences in tokenized])
    results = []
    for index, sequences, row_scores in zip(indices, tokenized, scores, strict=True):
        gold = None if task.kind == "language_modeling" else rows[index]["gold"]
        results.append((is_right(row_scores, gold), max(map(len, sequences)) > context))
    return results


def evaluate_core_task(
    model: Any,
    tokenizer: Any,
    task: CoreTask,
    rows: Sequence[Row],
    max_rows: int | None = None,
    compute: Compute | None = None,
    title: str = "",
) -> dict[str, Any]:
    """Score the first `max_rows` of a task's rows, shared among the ranks; every rank returns the same.

    Returns an `accuracy_record` with `shots`, `truncated` (rows cut on the left to the model's context),
    `fewshot_from` ("kept", or "file" where fewer rows were kept than shots are wanted), `fingerprint` and `outcomes`
    (a digit per row, in order: 1 = right), by which another model's record of the same rows is compared.
    """
    kept = min(max_rows or len(rows), len(rows))
    rank = compute.rank if compute else 0
    ranks = compute.world_size if compute else 1
    found_N2 = torch.zeros(kept, 2, dtype=torch.int64)  # right, cut
    starts = range(rank * ROWS_AT_ONCE, kept, ranks * ROWS_AT_ONCE)
    for start in tqdm(starts, desc=title, leave=False, disable=None if rank == 0 else True):
        indices = range(start, min(start + ROWS_AT_ONCE, kept))
        found_N2[indices] = torch.tensor(score_rows(model, tokenizer, task, rows, kept, indices)).long()
    if compute:
        found_N2 = compute.all_reduce_sum(found_N2.to(compute.device)).cpu()
    right, cut = found_N2.T.tolist()
    return {
        **accuracy_record(sum(right), kept, task.baseline),
        "shots": min(task.shots, len(rows) - 1),
        "fewshot_from": "kept" if kept > task.shots else "file",
        "truncated": sum(cut),
        "fingerprint": fingerprint(task, rows, kept),
        "outcomes": "".join(map(str, right)),
    }


def evaluate_core(
    model: Any,
    tokenizer: Any,
    bundle_dir: Path | str,
    max_per_task: int | None = None,
    compute: Compute | None = None,
) -> dict[str, Any]:
    """Return the CORE metric of a model on the tasks of a bundle, and print a line per task.

    max_per_task: rows kept of each task; None keeps all, as a number to publish needs. Raises ValueError below 1.
    Returns core_metric (None when no task ran) and core_stderr, results and centered_results (accuracy by task),
    details (`evaluate_core_task` by task, with `bad_rows`, the number left out) and skipped (why, by task).
    """
    if max_per_task is not None and max_per_task < 1:
        raise ValueError(f"--max-per-task {max_per_task}: must be at least 1")
    details: dict[str, dict[str, Any]] = {}
    skipped = {}
    tasks = read_tasks(bundle_dir)
    for number, task in enumerate(tasks, 1):
        try:
            rows, faults = read_rows(task)
        except (ValueError, OSError) as error:
            skipped[task.label] = str(error)
            print0(f"{task.label}: skipped: {error}")
            continue
        if faults:
            more = f" and {len(faults) - 3} more" if len(faults) > 3 else ""
            print0(f"{task.label}: {len(faults)} bad rows left out: {'; '.join(faults[:3])}{more}")
        title = f"{number}/{len(tasks)} {task.label}"
        record = evaluate_core_task(model, tokenizer, task, rows, max_per_task, compute, title)
        details[task.label] = {**record, "bad_rows": len(faults)}
        print0(f"{task.label}: {record['accuracy']:.4f} ± {record['stderr']:.4f} (n={record['n']})")
    metric, stderr = mean_centered(list(details.values())) if details else (None, None)
    return {
        "core_metric": metric,
        "core_stderr": stderr,
        "results": {label: record["accuracy"] for label, record in details.items()},
        "centered_results": {label: record["centered"] for label, record in details.items()},
        "details": details,
        "skipped": skipped,
    }
