"""The JSON records that the stages leave in a base directory, read and checked for the report.

    runs/STAGE/TAG/run.json, metrics.jsonl           training
    evals/base_eval_*.json, chat_eval_*.json         evaluation
    evals/tok_eval.json, datasets/*/manifest.json    tokenizer, data
    runs/stages.jsonl                                how long each stage took

The classes say what the report reads of each kind of record; a record may hold more. `Records.read` reads all of them
and raises ValueError for the first that does not hold it.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from nanochat.common import STAGES

Record = dict[str, Any]
ByStage = dict[str, Record]  # records of one model, in the order of the stages

# --- what a record holds ----------------------------------------------------------------------------------------------

Seconds = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class Checked(BaseModel):
    """No conversions: "1" is no number. A key without a default must be there; keys that are not named may be."""

    model_config = ConfigDict(strict=True)


class Accuracy(Checked):
    """One task's result (core_eval.py: `accuracy_record`)."""

    accuracy: float
    stderr: float
    n: int
    baseline: float


class Core(Checked):
    """CORE over its tasks; null when no task ran."""

    core_metric: float | None
    core_stderr: float | None
    details: dict[str, Accuracy]
    skipped: dict[str, str]


class Continuation(Checked):
    """A prompt and how the model went on."""

    prompt: str
    text: str


class Conversation(Checked):
    """A question of a chat task and the model's answer."""

    task: str
    question: str
    answer: str
    correct: bool


class Stage(Checked):
    """What every record of a model has. When and from which commit it was made is shown where it is known."""

    stage: str
    tag: str
    date: str = ""
    commit: str = ""


class BaseEval(Stage):
    """evals/base_eval_*.json"""

    train_bpb: float | None
    val_bpb: float | None
    val_loss: float | None = None  # records of older versions have bits per byte alone
    val_perplexity: float | None = None
    core: Core
    samples: list[Continuation]


class ChatEval(Stage):
    """evals/chat_eval_*.json"""

    chatcore: float
    chatcore_stderr: float
    tasks: dict[str, Accuracy]
    samples: list[Conversation]


class Run(Stage):
    """run.json"""

    config: dict[str, Any]
    # A name that begins with "model_" is pydantic's own, so the field goes by another one here.
    model_sizes: dict[str, Any] = Field(alias="model_config")
    dataset: str | None = None
    wall_seconds: Seconds = 0.0


class Step(Checked):
    """A line of metrics.jsonl; the report takes whichever metrics are there."""

    step: int


class StageTime(Checked):
    """A line of stages.jsonl."""

    stage: str
    seconds: Seconds


class Shard(Checked):
    """A file of a dataset. documents: null until it has arrived."""

    bytes: int
    documents: int | None


class Manifest(Checked):
    """datasets/*/manifest.json"""

    name: str
    source: str
    licence: str
    shards: list[Shard]


class TokenizedText(Checked):
    """What one tokenizer makes of a text."""

    bytes_per_token: float


class Text(Checked):
    """A text, and by the name of each tokenizer what it makes of it."""

    model_config = ConfigDict(strict=True, extra="allow")
    __pydantic_extra__: dict[str, TokenizedText]

    bytes: int


class TokenizerEval(Checked):
    """evals/tok_eval.json"""

    vocab_sizes: dict[str, int]
    texts: dict[str, Text]


# --- reading ----------------------------------------------------------------------------------------------------------


def read_record(path: Path, kind: type[Checked]) -> Record:
    """Read a JSON record. Raises ValueError naming the file when it is damaged or lacks what the report shows."""
    return parse_record(str(path), path.read_text(encoding="utf-8", errors="replace"), kind)


def read_lines(path: Path, kind: type[Checked]) -> list[Record]:
    """Read a .jsonl file, a record per line; [] where there is none. Raises ValueError naming the damaged line."""
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    return [parse_record(f"{path}:{number}", line, kind) for number, line in enumerate(lines, 1) if line]


def parse_record(where: str, text: str, kind: type[Checked]) -> Record:
    """Return the record in `text`, once it is known to hold what `kind` names. Raises ValueError, one line."""
    try:
        record = json.loads(text)
        kind.model_validate(record)
    except ValidationError as error:
        problem = error.errors(include_url=False, include_input=False)[0]
        place = ".".join(map(str, problem["loc"])) or "all of it"
        message = f"{where} is damaged at {place} ({problem['msg']}): delete it and run its stage again"
        raise ValueError(message) from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} is no record: delete it and run its stage again") from error
    return record


@dataclass(frozen=True)
class Records:
    """All that a base directory holds to report on."""

    runs: list[Record]  # run.json, each with the lines of its metrics.jsonl under "metrics"
    base_evals: list[Record]
    chat_evals: list[Record]
    tokenizer_evals: list[Record]  # at most one
    manifests: list[Record]
    stage_times: list[Record]

    @classmethod
    def read(cls, base_dir: Path) -> "Records":
        """Read every record under `base_dir`. Raises ValueError naming the file of a damaged one."""

        def read_all(pattern: str, kind: type[Checked]) -> list[Record]:
            return [read_record(path, kind) for path in sorted(base_dir.glob(pattern))]

        runs = []
        for path in sorted(base_dir.glob("runs/*/*/run.json")):
            if "~" in path.parent.name:  # an older run of the same name, kept when a new one began
                continue
            run = read_record(path, Run)
            run["metrics"] = read_lines(path.with_name("metrics.jsonl"), Step)
            runs.append(run)
        return cls(
            runs=runs,
            base_evals=read_all("evals/base_eval_*.json", BaseEval),
            chat_evals=read_all("evals/chat_eval_*.json", ChatEval),
            tokenizer_evals=read_all("evals/tok_eval.json", TokenizerEval),
            manifests=read_all("datasets/*/manifest.json", Manifest),
            stage_times=newest_run(read_lines(base_dir / "runs" / "stages.jsonl", StageTime)),
        )

    def tags(self) -> list[str]:
        """Return the tags of the models trained here."""
        records = [*self.runs, *self.base_evals, *self.chat_evals]
        return sorted({record["tag"] for record in records if record["stage"] in STAGES})


def newest_run(stage_times: list[Record]) -> list[Record]:
    """Return the times of the newest run of speedrun.sh, one per stage; the file has those of other tags too."""
    last: dict[str, Record] = {}
    for line in stage_times:
        if line.get("tag") == stage_times[-1].get("tag"):
            last[line["stage"]] = line
    return list(last.values())


def by_stage(records: Iterable[Record], tag: str, stages: Sequence[str] = STAGES) -> ByStage:
    """Pick the records of one model at these stages, in their order."""
    found = {record["stage"]: record for record in records if record["tag"] == tag}
    return {stage: found[stage] for stage in stages if stage in found}


def series(run: Record, key: str) -> dict[int, float]:
    """Return one metric by step; the last value counts where a step was run twice, as after a kill."""
    points = {line["step"]: line[key] for line in run["metrics"] if isinstance(line.get(key), int | float)}
    return dict(sorted(points.items()))
