"""JSON records -> report.md with figures. Nothing is measured here: the same records give the same bytes."""

import re
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nanochat import cli, figures
from nanochat.common import atomic_write, get_base_dir
from nanochat.records import NUMBER, ByStage, Record, Records, by_stage

NOT_RUN = "not run"


def _text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    if isinstance(value, dict):
        return ", ".join(f"{key} {_text(item)}" for key, item in value.items())
    return "–" if value is None else " ".join(str(value).split())


def _table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A Markdown table, the first column to the left and the others to the right; NOT_RUN without rows."""
    lines = [[_text(cell).replace("|", "\\|") for cell in row] for row in rows]
    if not lines:
        return NOT_RUN
    rule = ["---"] + ["---:"] * (len(header) - 1)
    return "\n".join("| " + " | ".join(line) + " |" for line in [list(header), rule, *lines])


def _fence(text: str) -> str:
    """`text` as it is: inside a fence longer than any it holds."""
    ticks = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{ticks}text\n{text}\n{ticks}"


def _gains(values: Iterable[float | None], form: Callable[[float], str]) -> list[str]:
    """Each value's change from the one before as ` (+x)`; empty where there is none to compare with."""
    result, before = [], None
    for value in values:
        result.append("" if value is None or before is None else f" ({form(value - before)})")
        before = value if value is not None else before
    return result


def _head(records: Records) -> str:
    dated = [r for r in [*records.runs, *records.base_evals, *records.chat_evals] if "date" in r]
    if not dated:
        return NOT_RUN
    dated.sort(key=lambda record: record["date"])
    latest, dates = dated[-1], sorted({dated[0]["date"], dated[-1]["date"]})
    rows = [
        ("commit", ", ".join(dict.fromkeys(record.get("commit", "unknown") for record in dated))),
        ("records from", " to ".join(dates)),
        ("hardware", latest.get("hardware")),
        ("versions", latest.get("versions")),
    ]
    return _table(("", "of the records"), rows)


def _scores_table(scores: ByStage, mean: str = "", means: Sequence[float] = ()) -> str:
    """Task by stage: accuracy ± standard error (gain over the stage before), in percent; last a row of means."""
    rows = []
    for name in dict.fromkeys(name for found in scores.values() for name in found):
        cells = [found.get(name) for found in scores.values()]
        gains = _gains([cell and cell["accuracy"] for cell in cells], lambda gain: f"{100 * gain:+.1f}")
        texts = [c and f"{100 * c['accuracy']:.1f} ± {100 * c['stderr']:.1f}{gain}" for c, gain in zip(cells, gains)]
        known = next(cell for cell in cells if cell)
        rows.append((name, known["n"], f"{100 * known['baseline']:.0f}", *texts))
    if rows and mean:
        gains = _gains(means, lambda gain: f"{gain:+.3f}")
        rows.append((f"**{mean}**", "", "0", *(f"{value:.3f}{gain}" for value, gain in zip(means, gains))))
    return _table(("task", "n", "chance", *scores), rows)


def _base_table(evals: ByStage) -> str:
    cores = [record["core"] or {"core_metric": None, "skipped": {}} for record in evals.values()]
    gains = _gains([core["core_metric"] for core in cores], lambda gain: f"{gain:+.4f}")
    rows = []
    for (stage, record), core, gain in zip(evals.items(), cores, gains):
        bits = [None if record[key] is None else f"{record[key]:.4f}" for key in ("train_bpb", "val_bpb")]
        metric = core["core_metric"]
        score = None if metric is None else f"{metric:.4f} ± {core['core_stderr']:.4f}{gain}"
        rows.append((stage, *bits, score, ", ".join(core["skipped"]) or "none"))
    return _table(("stage", "bits per byte, train", "validation", "CORE", "tasks skipped"), rows)


def _series(run: Record, key: str) -> tuple[list[int], list[float]]:
    """Steps and values of one metric, the last where a step was run twice."""
    points = {line["step"]: line[key] for line in run["metrics"] if isinstance(line.get(key), NUMBER)}
    return sorted(points), [points[step] for step in sorted(points)]


def _runs_table(runs: ByStage) -> str:
    def row(stage: str, run: Record) -> tuple[Any, ...]:
        losses, bits = _series(run, "loss")[1], _series(run, "val_bpb")[1]
        rates, shares, peaks = (_series(run, key)[1] for key in ("tok_per_sec", "mfu", "peak_mem_bytes"))
        steps, tokens = _series(run, "tokens")
        return (
            stage,
            run.get("dataset"),
            run.get("parameters"),
            steps[-1] if steps else None,
            tokens[-1] if tokens else None,
            f"{losses[-1]:.4f}" if losses else None,
            f"{min(bits):.4f}" if bits else None,
            round(statistics.median(rates)) if rates else None,
            f"{100 * statistics.median(shares):.1f} %" if shares else "n/a",
            f"{max(peaks) / 2**30:.1f} GiB" if peaks else None,
            _duration(run["wall_seconds"]) if run.get("wall_seconds") is not None else None,
        )

    counts = ("data", "parameters", "last step", "tokens", "last loss", "best val bpb")
    header = ("stage", *counts, "tokens/s", "MFU", "peak memory", "training time")
    return _table(header, (row(stage, run) for stage, run in runs.items()))


def _settings_table(settings: ByStage) -> str:
    """What was set, a column a stage; settings that are unset in all of them are left out."""
    names = dict.fromkeys(name for found in settings.values() for name in found)
    rows = [(name, *(found.get(name) for found in settings.values())) for name in names]
    return _table(("setting", *settings), [row for row in rows if any(cell is not None for cell in row[1:])])


_TOOL_CALL = re.compile(
    r"<\|python_start\|>(.*?)<\|python_end\|>(?:<\|output_start\|>(.*?)<\|output_end\|>)?", re.DOTALL
)


def show_tool_calls(answer: str) -> str:
    """An answer with its uses of the calculator written for people: `[calculator: 37*48 → 1776]`."""
    return _TOOL_CALL.sub(
        lambda call: f"[calculator: {call[1]}" + (f" → {call[2]}]" if call[2] is not None else "]"), answer
    )


def _chats(evals: ByStage) -> str:
    """The conversations that the last evaluated stage kept."""
    if not evals:
        return NOT_RUN
    stage, record = list(evals.items())[-1]
    blocks = [f"From the {stage} model."]
    for sample in record["samples"]:
        mark = "right" if sample["correct"] else "wrong"
        text = f"user:      {sample['question']}\nassistant: {show_tool_calls(sample['answer'])}"
        blocks.append(f"{sample['task']}, {mark}:\n\n{_fence(text)}")
    return "\n\n".join(blocks)


def _continuations(evals: ByStage) -> str:
    if not evals:
        return NOT_RUN
    stage, record = next(iter(evals.items()))
    return f"From the {stage} model; the prompt ends at `»`.\n\n" + _fence(
        "\n\n".join(f"{sample['prompt']}»{sample['text']}" for sample in record["samples"])
    )


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60} h {minutes % 60:02d} min" if minutes >= 60 else f"{minutes} min {rest:02d} s"


def _times_table(times: Sequence[Record], price: float | None) -> str:
    if not times:
        return NOT_RUN
    total = sum(line["seconds"] for line in times)
    rows = []
    for name, seconds in [*((line["stage"], line["seconds"]) for line in times), ("**total**", total)]:
        cost = [] if price is None else [f"$ {seconds / 3600 * price:.2f}"]
        rows.append((name, _duration(seconds), f"{100 * seconds / total:.0f} %" if total else "–", *cost))
    return _table(("stage", "wall time", "share", *([] if price is None else [f"cost at $ {price:g} an hour"])), rows)


def _data_table(manifests: Iterable[Record]) -> str:
    rows = []
    for manifest in manifests:
        counts = [shard["documents"] for shard in manifest["shards"]]
        size = sum(shard["bytes"] for shard in manifest["shards"])
        documents = None if None in counts else sum(counts)  # a hub's shards are not counted before they are read
        about = (manifest["name"], manifest["source"], manifest["licence"])
        rows.append((*about, len(counts), documents, f"{size / 1e6:.1f} MB"))
    return _table(("dataset", "source", "licence", "shards", "documents", "size"), rows)


def _tokenizer_table(record: Record | None) -> str:
    if record is None:
        return NOT_RUN
    names = list(record["vocab_sizes"])
    rows = [
        (text, row["bytes"], *(f"{row[name]['bytes_per_token']:.2f}" if name in row else "–" for name in names))
        for text, row in record["texts"].items()
    ]
    sizes = [f"{name} ({_text(size)} tokens)" for name, size in record["vocab_sizes"].items()]
    return _table(("bytes per token", "bytes", *sizes), rows)


def _model_section(records: Records, tag: str, out_dir: Path) -> str:
    """Everything about one model; its figures are written beside the report."""
    runs, base, chat = (by_stage(found, tag) for found in (records.runs, records.base_evals, records.chat_evals))

    def figure(name: str, png: bytes) -> str:
        path = out_dir / f"{name}_{tag}.png"
        atomic_write(path, png)
        return f"![{name} of {tag}]({path.name})"

    def curve(name: str, key: str, label: str, bottom: float | None = None) -> str:
        series = {stage: points for stage, run in runs.items() if (points := _series(run, key))[0]}
        return figure(name, figures.curves(series, label, bottom)) if series else NOT_RUN

    chat_scores = {stage: record["tasks"] for stage, record in chat.items()}
    core_scores = {stage: record["core"]["details"] for stage, record in base.items() if record["core"]}
    chat_means = [record["chatcore"] for record in chat.values()]
    sections = {
        "Chat tasks by stage": _scores_table(chat_scores, "ChatCORE", chat_means)
        + ("\n\n" + figure("tasks", figures.bars(chat_scores)) if any(chat_scores.values()) else ""),
        "Language modeling by stage": _base_table(base),
        "CORE tasks by stage": _scores_table(core_scores),
        "Conversations": _chats(chat),
        "Continuations": _continuations(base),
        "Training": _runs_table(runs),
        "Loss": curve("loss", "loss", "training loss, nats"),
        "Validation": curve("bpb", "val_bpb", "bits per byte"),
        "Speed": curve("speed", "tok_per_sec", "tokens/s", bottom=0),
        "Model": _settings_table({stage: run["model_config"] for stage, run in runs.items()}),
        "Settings": _settings_table({stage: run["config"] for stage, run in runs.items()}),
    }
    return "\n\n".join([f"## Model {tag}", *(f"### {title}\n\n{body}" for title, body in sections.items())])


def write_report(base_dir: Path, out_dir: Path | None = None, price: float | None = None) -> Path:
    """Write report.md and its figures from the records under `base_dir` into `out_dir` (base_dir/report); its path.

    price: dollars an hour, for the cost of each stage. Raises ValueError naming a damaged record.
    """
    out_dir = out_dir or base_dir / "report"
    records = Records.read(base_dir)
    models = [_model_section(records, tag, out_dir) for tag in records.tags()] or [f"## Model\n\n{NOT_RUN}"]
    parts = [
        "# Report",
        "Accuracies are in percent, ± one standard error; in brackets, the gain over the stage before.",
        _head(records),
        *models,
        f"## Tokenizer\n\n{_tokenizer_table(records.tokenizer)}",
        f"## Wall time{' and cost' if price is not None else ''}\n\n{_times_table(records.stage_times, price)}",
        f"## Data and licences\n\n{_data_table(records.manifests)}",
    ]
    atomic_write(out_dir / "report.md", "\n\n".join(parts) + "\n")
    return out_dir / "report.md"


@dataclass(frozen=True)
class ReportConfig:
    """Flags of the report."""

    price: float | None = cli.option(None, "dollars an hour of the machine, for the cost")
    out: str | None = cli.option(None, "folder to write to; unset: report/ in the base directory")

    def __post_init__(self) -> None:
        if self.price is not None and not self.price >= 0:
            raise ValueError(f"--price {self.price} must be 0 or more")


def main() -> None:
    """Write the report and print where it is."""
    config = cli.parse(ReportConfig, description="Write report.md and its figures from the records of all stages.")
    print(write_report(get_base_dir(), Path(config.out) if config.out else None, config.price))


if __name__ == "__main__":
    cli.run(main)
