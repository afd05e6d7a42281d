"""The tasks of CORE (DCLM, arXiv:2406.11794): the bundle's folder, rows in the protocol's order, and their prompts."""

import csv
import hashlib
import json
import os
import random
import tempfile
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from nanochat.common import atomic_write_json, read_json, sha256_file
from nanochat.hub import download_url

BUNDLE_URL = "https://karpathy-public.s3.us-west-2.amazonaws.com/eval_bundle.zip"
UNPACKED_LIMIT = 4 << 30  # bytes; the public bundle has about 160 MB
SHUFFLE_SEED = 1337  # which rows are kept, and in which order
FEWSHOT_SEED = 1234  # plus the row's index: which examples stand before a row
# what a row of each kind holds: texts, and the list of texts that `gold` points into
_FIELDS: dict[str, tuple[tuple[str, ...], str | None]] = {
    "multiple_choice": (("query",), "choices"),
    "schema": (("continuation",), "context_options"),
    "language_modeling": (("context", "continuation"), None),
}


@dataclass(frozen=True)
class CoreTask:
    """One line of `core.yaml`, with the accuracy that guessing reaches (0..1)."""

    label: str
    path: Path
    kind: str  # multiple_choice | schema | language_modeling
    shots: int
    delimiter: str
    baseline: float


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
        tasks = [
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
        for t in tasks:
            if type(t.shots) is not int or t.shots < 0 or not isinstance(t.delimiter, str) or not 0 <= t.baseline < 1:
                raise ValueError(f"the number of shots, delimiter or baseline of {t.label} is not one")
        if not 0 < len({task.label for task in tasks}) == len(tasks):
            raise ValueError("icl_tasks must list tasks of different labels")
    except (yaml.YAMLError, csv.Error, ValueError, LookupError, TypeError, RecursionError) as error:
        raise ValueError(f"{bundle_dir / 'core.yaml'} and eval_meta_data.csv do not fit: {error!r}") from error
    return tasks


def _check_row(kind: str, row: Any) -> None:
    texts, options = _FIELDS[kind]
    if not isinstance(row, dict):
        raise ValueError("not a JSON object")
    for name in texts:
        if not isinstance(row.get(name), str) or (name == "continuation" and not row[name].strip()):
            raise ValueError(f"'{name}' must be a text, not {row.get(name)!r}"[:200])
    if options:
        choices, gold = row.get(options), row.get("gold")
        if not isinstance(choices, list) or len(choices) < 2 or not all(isinstance(c, str) for c in choices):
            raise ValueError(f"'{options}' must list two texts or more")
        if type(gold) is not int or not 0 <= gold < len(choices):
            raise ValueError(f"'gold' must be a place in '{options}', 0 to {len(choices) - 1}, not {gold!r}"[:200])


def read_rows(task: CoreTask) -> tuple[list[dict[str, Any]], list[str]]:
    """The good rows of a task in the protocol's order, and of each bad one "FILE:LINE: what is wrong".

    Raises ValueError when nothing of the task can be used.
    """
    if task.kind not in _FIELDS:
        raise ValueError(f"unknown icl_task_type '{task.kind}': choose from {', '.join(_FIELDS)}")
    if not task.path.is_file():
        raise ValueError(f"{task.path} is missing")
    rows, faults = [], []
    for number, line in enumerate(task.path.read_bytes().split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            _check_row(task.kind, row)
            rows.append(row)
        except (ValueError, RecursionError) as error:
            faults.append(f"{task.path}:{number}: {error}")
    if not rows:
        raise ValueError(f"{len(faults)} bad rows and no good one: {faults[0]}" if faults else f"{task.path} is empty")
    random.Random(SHUFFLE_SEED).shuffle(rows)
    return rows, faults


def fingerprint(task: CoreTask, rows: Sequence[dict[str, Any]], kept: int) -> str:
    """A hash of all that makes the questions: two records of a task can be compared where it is equal."""
    settings = [task.kind, task.shots, task.delimiter, task.baseline, kept]
    return hashlib.sha256(json.dumps([settings, rows]).encode()).hexdigest()[:16]


def draw_examples(rows: Sequence[dict[str, Any]], kept: int, index: int, shots: int) -> list[dict[str, Any]]:
    """The few-shot examples of row `index`: from the other kept rows, or from all where too few were kept."""
    others = (kept if kept > shots else len(rows)) - 1
    drawn = random.Random(FEWSHOT_SEED + index).sample(range(others), min(shots, others))
    return [rows[i + (i >= index)] for i in drawn]  # places among the others: row `index` is skipped


def _options(task: CoreTask, row: dict[str, Any]) -> list[str]:
    """The row written out in full, once an option; a language_modeling row has one."""
    if task.kind == "multiple_choice":
        return [row["query"] + task.delimiter + choice for choice in row["choices"]]
    if task.kind == "schema":
        return [context + task.delimiter + row["continuation"] for context in row["context_options"]]
    return [row["context"].strip() + task.delimiter + row["continuation"]]


def build_prompts(task: CoreTask, row: dict[str, Any], examples: Sequence[dict[str, Any]]) -> list[str]:
    """The texts to compare: one an option; for language_modeling the prompt alone, then with its continuation."""
    cloze = task.kind == "language_modeling"
    shots = "".join(_options(task, example)[0 if cloze else example["gold"]] + "\n\n" for example in examples)
    texts = [shots + option for option in _options(task, row)]
    if cloze:
        texts.insert(0, (shots + row["context"].strip() + task.delimiter).rstrip())
    return texts


def download_bundle(folder: Path, url: str = BUNDLE_URL, **options: Any) -> None:
    """Have the zipped bundle at `url` unpacked in `folder`: downloaded the first time, checked every time.

    Nobody publishes the archive's hash. So its length is checked against the server's, its content by zip's checksums,
    and the files later by manifest.json, their SHA-256. options: `download_url`'s. ValueError: something has changed.
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
    download_url(url, archive, **options)
    try:
        with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as temporary:
            unpacked = _unpack(archive, Path(temporary, "all"))
            if missing := [task.path.name for task in read_tasks(unpacked) if not task.path.is_file()]:
                raise ValueError(f"it lacks {', '.join(missing)}")
            files = {p.relative_to(unpacked).as_posix(): sha256_file(p) for p in unpacked.rglob("*") if p.is_file()}
            whole = {"url": url, "bytes": archive.stat().st_size, "sha256": sha256_file(archive)}
            atomic_write_json(unpacked / "manifest.json", {**whole, "files": files})
            os.rename(unpacked, folder)
    except (ValueError, zipfile.BadZipFile, zlib.error, EOFError, RuntimeError) as error:
        raise ValueError(f"{url} does not hold a whole evaluation bundle: {error}") from error
    finally:
        archive.unlink(missing_ok=True)


def _unpack(archive: Path, folder: Path) -> Path:
    """Unpack a zip into `folder`, and nothing outside it, whatever its names; returns where its `core.yaml` lies."""
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
