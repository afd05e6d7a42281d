"""CORE: how well a base model answers 22 in-context tasks, as one number (DCLM, arXiv:2406.11794).

    download_bundle          the published tasks -> a folder: core.yaml, eval_meta_data.csv, eval_data/*.jsonl
    read_tasks, read_rows    that folder -> tasks and their rows
    build_prompts            a row and its few-shot examples -> one text per option
    scored_spans             those texts -> the tokens that differ, which spans.py scores
    evaluate_core            all of it: accuracy per task, 0 for guessing and 1 for perfect, and their mean

Nothing is generated: the model reads each option, and the likeliest one is its answer.
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
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from tqdm import tqdm

from nanochat import hub
from nanochat.common import atomic_write_json, print0, read_json, sha256_file
from nanochat.compute import Compute
from nanochat.spans import Score, Span, common_prefix, score_spans

# --- the bundle -------------------------------------------------------------------------------------------------------

BUNDLE_URL = "https://karpathy-public.s3.us-west-2.amazonaws.com/eval_bundle.zip"
UNPACKED_LIMIT = 4 << 30  # bytes; the public bundle has about 160 MB


def download_bundle(folder: Path, url: str = BUNDLE_URL) -> None:
    """Download and unpack the zipped bundle at `url` into `folder`, or check the files of an earlier download.

    Nobody publishes the archive's hash. So its content is checked by the zip format's checksums, and later its files by
    the SHA-256 in manifest.json. Raises ValueError when the archive is not a whole bundle, or when a file has changed
    since.
    """
    manifest = folder / "manifest.json"
    if folder.exists():
        if not manifest.is_file():
            raise ValueError(f"{folder} was not downloaded by this project: delete it, or use it by --bundle {folder}")
        for name, sha256 in read_json(manifest)["files"].items():
            if not (folder / name).is_file() or sha256_file(folder / name) != sha256:
                raise ValueError(f"{folder / name} is not the file that was downloaded: delete {folder} and run again")
        return
    archive = folder.with_name(folder.name + ".zip")
    hub.download_url(url, archive)
    try:
        # Unpacked beside its place and renamed at the end: the folder is there whole or not at all.
        with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as temporary:
            unpacked = _unpack(archive, Path(temporary, "all"))
            missing = [task.path.name for task in read_tasks(unpacked) if not task.path.is_file()]
            if missing:
                raise ValueError(f"it lacks {', '.join(missing)}")
            files = {p.relative_to(unpacked).as_posix(): sha256_file(p) for p in unpacked.rglob("*") if p.is_file()}
            facts = {"url": url, "bytes": archive.stat().st_size, "sha256": sha256_file(archive), "files": files}
            atomic_write_json(unpacked / "manifest.json", facts)
            os.rename(unpacked, folder)
    except (ValueError, zipfile.BadZipFile, zlib.error, EOFError, RuntimeError) as error:
        raise ValueError(f"{url} does not hold a whole evaluation bundle: {error}") from error
    finally:
        archive.unlink(missing_ok=True)


def _unpack(archive: Path, folder: Path) -> Path:
    """Unpack a zip into `folder`, and nothing outside it, whatever its names; return where its core.yaml lies."""
    with zipfile.ZipFile(archive) as bundle:
        for path in map(PurePosixPath, bundle.namelist()):
            if path.is_absolute() or ".." in path.parts:
                raise ValueError(f"it has a file named {path}")
        if sum(info.file_size for info in bundle.infolist()) > UNPACKED_LIMIT:
            raise ValueError(f"it unpacks to more than {UNPACKED_LIMIT >> 30} GiB")
        bundle.extractall(folder)
    index = min(folder.rglob("core.yaml"), key=lambda path: len(path.parts), default=None)
    if index is None:
        raise ValueError("it has no core.yaml")
    return index.parent


# --- tasks ------------------------------------------------------------------------------------------------------------

# The protocol fixes both seeds: all models are asked the same rows with the same examples.
SHUFFLE_SEED = 1337  # which rows are kept, and in which order
FEWSHOT_SEED = 1234  # plus the row's index: which examples stand before a row


@dataclass(frozen=True)
class CoreTask:
    """One line of core.yaml, with the accuracy that guessing reaches (0..1)."""

    label: str
    path: Path
    kind: str  # multiple_choice | schema | language_modeling
    shots: int
    delimiter: str
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
    try:
        with open(table, newline="", encoding="utf-8") as file:
            percents = {row["Eval Task"]: float(row["Random baseline"]) for row in csv.DictReader(file)}
        tasks = [
            CoreTask(
                label=entry["label"],
                path=bundle_dir / "eval_data" / entry["dataset_uri"],
                kind=entry["icl_task_type"],
                shots=entry["num_fewshot"][0],
                delimiter=entry.get("continuation_delimiter", " "),
                baseline=percents[entry["label"]] / 100,
            )
            for entry in yaml.safe_load(index.read_text(encoding="utf-8"))["icl_tasks"]
        ]
        for task in tasks:
            if not isinstance(task.shots, int) or task.shots < 0:
                raise ValueError(f"num_fewshot of {task.label} must be 0 or more")
            if not isinstance(task.delimiter, str):
                raise ValueError(f"continuation_delimiter of {task.label} must be a text")
            if not 0 <= task.baseline < 1:
                raise ValueError(f"the baseline of {task.label} must be from 0 to below 100 percent")
        if not tasks or len({task.label for task in tasks}) < len(tasks):
            raise ValueError("icl_tasks must list tasks of different labels")
    except (yaml.YAMLError, csv.Error, ValueError, LookupError, TypeError, RecursionError) as error:
        raise ValueError(f"{index} and {table.name} do not fit: {error!r}") from error
    return tasks


def _check_row(kind: str, row: Any) -> None:
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
    options = row.get(name)
    gold = row.get("gold")
    if not isinstance(options, list) or len(options) < 2 or not all(isinstance(option, str) for option in options):
        raise ValueError(f"'{name}' must list two texts or more")
    if not isinstance(gold, int) or isinstance(gold, bool) or not 0 <= gold < len(options):
        raise ValueError(f"'gold' must be a place in '{name}', 0 to {len(options) - 1}, not {gold!r}"[:200])


def read_rows(task: CoreTask) -> tuple[list[dict[str, Any]], list[str]]:
    """Read the good rows of a task in the protocol's order, and "FILE:LINE: what is wrong" of each bad one.

    Raises ValueError when nothing of the task can be used.
    """
    if task.kind not in ("multiple_choice", "schema", "language_modeling"):
        raise ValueError(
            f"unknown icl_task_type '{task.kind}': choose from multiple_choice, schema and language_modeling"
        )
    if not task.path.is_file():
        raise ValueError(f"{task.path} is missing")
    rows = []
    faults = []
    for number, line in enumerate(task.path.read_bytes().split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            _check_row(task.kind, row)
        except (ValueError, RecursionError) as error:
            faults.append(f"{task.path}:{number}: {error}")
        else:
            rows.append(row)
    if not rows:
        raise ValueError(f"{len(faults)} bad rows and no good one: {faults[0]}" if faults else f"{task.path} is empty")
    random.Random(SHUFFLE_SEED).shuffle(rows)
    return rows, faults


def fingerprint(task: CoreTask, rows: Sequence[dict[str, Any]], kept: int) -> str:
    """Hash all that makes the questions: records of two models can be compared where it is equal."""
    settings = [task.kind, task.shots, task.delimiter, task.baseline, kept]
    return hashlib.sha256(json.dumps([settings, rows]).encode()).hexdigest()[:16]


# --- prompts ----------------------------------------------------------------------------------------------------------


def draw_examples(rows: Sequence[dict[str, Any]], kept: int, index: int, shots: int) -> list[dict[str, Any]]:
    """Draw the few-shot examples of row `index`: from the other kept rows, or from all where too few were kept."""
    others = (kept if kept > shots else len(rows)) - 1
    drawn = random.Random(FEWSHOT_SEED + index).sample(range(others), min(shots, others))
    return [rows[i + (i >= index)] for i in drawn]  # places among the others: row `index` is skipped


def _options(task: CoreTask, row: dict[str, Any]) -> list[str]:
    """Write the row out in full, once per option; a language_modeling row has one."""
    if task.kind == "multiple_choice":
        return [row["query"] + task.delimiter + choice for choice in row["choices"]]
    if task.kind == "schema":
        return [context + task.delimiter + row["continuation"] for context in row["context_options"]]
    return [row["context"].strip() + task.delimiter + row["continuation"]]


def build_prompts(task: CoreTask, row: dict[str, Any], examples: Sequence[dict[str, Any]]) -> list[str]:
    """Return the texts to compare: one per option; for language_modeling the prompt, then with its continuation."""
    cloze = task.kind == "language_modeling"
    shots = "".join(_options(task, example)[0 if cloze else example["gold"]] + "\n\n" for example in examples)
    texts = [shots + option for option in _options(task, row)]
    if cloze:
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
        spans.append(Span(ids[cut:], max(start - cut, 1)))
    return spans


def is_right(scores: Sequence[Score], gold: int | None) -> bool:
    """Return True if the gold option has the lowest mean loss or, if `gold` is None, the only span is the arg-max.

    The first of equals wins. An option with nothing to score (a prefix of all others) is chosen where it stands first.
    """
    if gold is None:
        return scores[0].greedy
    return min(range(len(scores)), key=lambda i: scores[i].mean_loss) == gold


# --- the metric -------------------------------------------------------------------------------------------------------

WINDOW = 32  # rows that are batched together, and dealt out to the ranks: the same ones on any number of ranks


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


def evaluate_core_task(
    model: Any,
    tokenizer: Any,
    task: CoreTask,
    rows: Sequence[dict[str, Any]],
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
    context = model.config.sequence_len
    rank = compute.rank if compute else 0
    ranks = compute.world_size if compute else 1

    def prompts(index: int) -> list[str]:
        return build_prompts(task, rows[index], draw_examples(rows, kept, index, task.shots))

    # Rows of a window are scored together. With examples they sort by length, so that windows differ little in size.
    # Without, they sort by text: questions about one story then stand together, and its tokens are read once.
    if task.shots:
        order = sorted(range(kept), key=lambda index: len(prompts(index)[0]))
    else:
        order = sorted(range(kept), key=lambda index: prompts(index)[0])
    windows = [order[i : i + WINDOW] for i in range(0, kept, WINDOW)]
    right_N = torch.zeros(kept, dtype=torch.int64)
    truncated_N = torch.zeros(kept, dtype=torch.int64)
    for window in tqdm(windows[rank::ranks], desc=title, leave=False, disable=None if rank == 0 else True):
        texts = [prompts(index) for index in window]
        encoded = tokenizer.encode([text for row in texts for text in row], prepend=tokenizer.get_bos_token_id())
        ids = iter(encoded)
        sequences = [[next(ids) for _ in row] for row in texts]
        spans = [scored_spans(task.kind, row, context) for row in sequences]
        scores = iter(score_spans(model, [span for row in spans for span in row]))
        for index, row_spans, whole in zip(window, spans, sequences, strict=True):
            gold = None if task.kind == "language_modeling" else rows[index]["gold"]
            right_N[index] = is_right([next(scores) for _ in row_spans], gold)
            truncated_N[index] = max(map(len, whole)) > context
    if compute:
        right_N = compute.all_reduce_sum(right_N.to(compute.device)).cpu()
        truncated_N = compute.all_reduce_sum(truncated_N.to(compute.device)).cpu()
    return {
        **accuracy_record(right_N.sum().item(), kept, task.baseline),
        "shots": min(task.shots, len(rows) - 1),
        "fewshot_from": "kept" if kept > task.shots else "file",
        "truncated": truncated_N.sum().item(),
        "fingerprint": fingerprint(task, rows, kept),
        "outcomes": "".join(map(str, right_N.tolist())),
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
