"""What the stages leave behind: every JSON record of a base directory, read and checked."""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nanochat.common import read_json

STAGES = ("base", "mid", "sft", "rl")

# What a record must hold to be shown: {str: x} maps any names to x, [x] lists x, and a tuple offers alternatives.
NUMBER = (int, float)
_OPTIONAL = (*NUMBER, type(None))
_SCORE = {"accuracy": NUMBER, "stderr": NUMBER, "n": int, "baseline": NUMBER}
_CORE = {"core_metric": _OPTIONAL, "core_stderr": _OPTIONAL, "details": {str: _SCORE}, "skipped": {str: str}}
_MODEL: dict[str, Any] = {"stage": str, "tag": str}
_BASE_EVAL = {**_MODEL, "train_bpb": _OPTIONAL, "val_bpb": _OPTIONAL, "core": (_CORE, type(None))}
_BASE_EVAL |= {"samples": [{"prompt": str, "text": str}]}
_CHAT_EVAL = {**_MODEL, "chatcore": NUMBER, "tasks": {str: _SCORE}}
_CHAT_EVAL |= {"samples": [{"task": str, "question": str, "answer": str, "correct": bool}]}
_RUN = {**_MODEL, "config": dict, "model_config": dict}
_TOK_EVAL = {"vocab_sizes": {str: int}, "texts": {str: {"bytes": int, "ours": {"bytes_per_token": NUMBER}}}}
_METRIC = {"step": int}
_STAGE_TIME = {"stage": str, "seconds": NUMBER}
_MANIFEST = {"name": str, "source": str, "licence": str, "shards": [{"bytes": int, "documents": (int, type(None))}]}

Record = dict[str, Any]
ByStage = dict[str, Record]  # in the order of the stages


def _fits(value: Any, shape: Any) -> bool:
    if isinstance(shape, tuple):
        return any(_fits(value, alternative) for alternative in shape)
    if isinstance(shape, list):
        return isinstance(value, list) and all(_fits(item, shape[0]) for item in value)
    if not isinstance(shape, dict):
        return isinstance(value, shape)
    if not isinstance(value, dict):
        return False
    if str in shape:
        return all(_fits(item, shape[str]) for item in value.values())
    return all(_fits(value.get(key), inner) for key, inner in shape.items())


def _checked(where: Path | str, value: Any, shape: Any) -> Any:
    if not _fits(value, shape):
        raise ValueError(f"{where} is not a whole record of its kind: delete it and run its stage again")
    return value


def _read_lines(path: Path, shape: Any) -> list[Record]:
    records = []
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n") if path.is_file() else []
    for number, line in enumerate(lines, 1):
        try:
            if line:
                records.append(_checked(f"{path}:{number}", json.loads(line), shape))
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}:{number} is not valid JSON: delete that line") from error
    return records


@dataclass(frozen=True)
class Records:
    """All that a base directory holds to report on."""

    base_evals: list[Record]
    chat_evals: list[Record]
    runs: list[Record]  # run.json, each with the lines of its metrics.jsonl under "metrics"
    tokenizer: Record | None
    stage_times: list[Record]
    manifests: list[Record]

    @classmethod
    def read(cls, base_dir: Path) -> "Records":
        """Read every record under `base_dir`; a damaged one raises ValueError that names its file."""

        def read_all(pattern: str, shape: Any) -> list[Record]:
            return [_checked(path, read_json(path), shape) for path in sorted(base_dir.glob(pattern))]

        runs = []
        for path in sorted(base_dir.glob("runs/*/*/run.json")):
            if "~" in path.parent.name:  # set aside when a run of the same name began
                continue
            metrics = _read_lines(path.with_name("metrics.jsonl"), _METRIC)
            runs.append({**_checked(path, read_json(path), _RUN), "metrics": metrics})
        return cls(
            base_evals=read_all("evals/base_eval_*.json", _BASE_EVAL),
            chat_evals=read_all("evals/chat_eval_*.json", _CHAT_EVAL),
            runs=runs,
            tokenizer=next(iter(read_all("evals/tok_eval.json", _TOK_EVAL)), None),
            stage_times=_read_lines(base_dir / "runs" / "stages.jsonl", _STAGE_TIME),
            manifests=read_all("datasets/*/manifest.json", _MANIFEST),
        )

    def tags(self) -> list[str]:
        """The models made here, by name."""
        records = [*self.runs, *self.base_evals, *self.chat_evals]
        return sorted({record["tag"] for record in records if record["stage"] in STAGES})


def by_stage(records: Iterable[Record], tag: str) -> ByStage:
    """The records of one model."""
    found = {record["stage"]: record for record in records if record["tag"] == tag}
    return {stage: found[stage] for stage in STAGES if stage in found}
