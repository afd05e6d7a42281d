"""JSON records -> report.md with figures, and model cards. Nothing is measured here: equal records give equal bytes."""

import re
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from nanochat import figures
from nanochat.common import atomic_write
from nanochat.records import NUMBER, STAGES, ByStage, Record, Records, by_stage

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


def _head(records: Iterable[Record]) -> str:
    dated = [record for record in records if "date" in record]
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


def _base_table(evals: Mapping[str, Record], name: str = "stage") -> str:
    cores = [record["core"] or {"core_metric": None, "skipped": {}} for record in evals.values()]
    gains = _gains([core["core_metric"] if name == "stage" else None for core in cores], lambda gain: f"{gain:+.4f}")
    rows = []
    for (stage, record), core, gain in zip(evals.items(), cores, gains):
        bits = [None if record[key] is None else f"{record[key]:.4f}" for key in ("train_bpb", "val_bpb")]
        metric = core["core_metric"]
        score = None if metric is None else f"{metric:.4f} ± {core['core_stderr']:.4f}{gain}"
        rows.append((stage, *bits, score, record.get("bundle"), ", ".join(core["skipped"]) or "none"))
    return _table((name, "bits per byte, train", "validation", "CORE", "of bundle", "tasks skipped"), rows)


def _series(run: Record, key: str) -> tuple[list[int], list[float]]:
    """Steps and values of one metric, the last where a step was run twice."""
    points = {line["step"]: line[key] for line in run["metrics"] if isinstance(line.get(key), NUMBER)}
    return sorted(points), [points[step] for step in sorted(points)]


def _runs_table(runs: ByStage) -> str:
    def row(stage: str, run: Record) -> tuple[Any, ...]:
        losses, bits = _series(run, "loss")[1], _series(run, "val_bpb")[1]
        rates, shares, peaks = (_series(run, key)[1] for key in ("tok_per_sec", "mfu", "peak_mem_bytes"))
        steps, tokens = _series(run, "tokens")
        seen = (steps[-1], tokens[-1]) if steps else (None, None)
        scores = (f"{losses[-1]:.4f}" if losses else None, f"{min(bits):.4f}" if bits else None)
        rate = round(statistics.median(rates)) if rates else None
        share = f"{100 * statistics.median(shares):.1f} %" if shares else "n/a"
        peak, seconds = f"{max(peaks) / 2**30:.1f} GiB" if peaks else None, run.get("wall_seconds")
        took = None if seconds is None else _duration(seconds)
        return (stage, run.get("dataset"), run.get("parameters"), *seen, *scores, rate, share, peak, took)

    counts = ("data", "parameters", "last step", "tokens", "last loss", "best val bpb")
    header = ("stage", *counts, "tokens/s", "MFU", "peak memory", "training time")
    return _table(header, (row(stage, run) for stage, run in runs.items()))


def _settings_table(settings: ByStage) -> str:
    """What was set, a column a stage; settings that are unset in all of them are left out."""
    names = dict.fromkeys(name for found in settings.values() for name in found)
    rows = [(name, *(found.get(name) for found in settings.values())) for name in names]
    return _table(("setting", *settings), [row for row in rows if any(cell is not None for cell in row[1:])])


_TOOL_CALL = re.compile(r"(?s)<\|python_start\|>(.*?)<\|python_end\|>(?:<\|output_start\|>(.*?)<\|output_end\|>)?")


def show_tool_calls(answer: str) -> str:
    """An answer with its uses of the calculator written for people: `[calculator: 37*48 → 1776] 1776.`"""
    return _TOOL_CALL.sub(lambda c: f"[calculator: {c[1]}{'' if c[2] is None else ' → ' + c[2]}] ", answer).rstrip()


def _chats(evals: ByStage) -> str:
    """The conversations that the last evaluated stage kept."""
    stage, record = list(evals.items())[-1]
    blocks = [f"From the {stage} model."]
    for sample in record["samples"]:
        mark = "right" if sample["correct"] else "wrong"
        text = f"user:      {sample['question']}\nassistant: {show_tool_calls(sample['answer'])}"
        blocks.append(f"{sample['task']}, {mark}:\n\n{_fence(text)}")
    return "\n\n".join(blocks)


def _continuations(evals: ByStage) -> str:
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
    sections = {
        "Chat tasks by stage": _chat_table(chat)
        + ("\n\n" + figure("tasks", figures.bars(chat_scores)) if any(chat_scores.values()) else ""),
        "Language modeling by stage": _base_table(base),
        "CORE tasks by stage": _scores_table(core_scores),
        "Conversations": _chats(chat) if chat else NOT_RUN,
        "Continuations": _continuations(base) if base else NOT_RUN,
        "Training": _runs_table(runs),
        "Loss": curve("loss", "loss", "training loss, nats"),
        "Validation": curve("bpb", "val_bpb", "bits per byte"),
        **({"Reward": curve("reward", "reward", "mean reward", bottom=0)} if "rl" in runs else {}),
        "Speed": curve("speed", "tok_per_sec", "tokens/s", bottom=0),
        "Model": _settings_table({stage: run["model_config"] for stage, run in runs.items()}),
        "Settings": _settings_table({stage: run["config"] for stage, run in runs.items()}),
    }
    return "\n\n".join([f"## Model {tag}", *(f"### {title}\n\n{body}" for title, body in sections.items())])


def model_card(records: Records, tag: str, stage: str) -> str:
    """The model card of one checkpoint, Markdown with the header that model hubs read.

    Holds what the records say of this stage and those before it. Raises ValueError when there is no such run.
    """
    stages = STAGES[: STAGES.index(stage) + 1]
    found = (by_stage(kind, tag) for kind in (records.runs, records.base_evals, records.chat_evals))
    runs, base, chat = ({s: record for s, record in kind.items() if s in stages} for kind in found)
    if stage not in runs:
        raise ValueError(f"no run {stage}/{tag} under the base directory: a model card needs its run.json")
    source = runs[stage].get("source")
    card = Path(__file__).with_name("model_card.txt").read_text(encoding="utf-8")
    return card.format(
        name=f"nanochat {tag} ({stage})",
        parameters=_text(runs[stage].get("parameters")),
        context=_text(runs[stage]["model_config"].get("sequence_len")),
        source=f" (this stage from {source})" if source else "",
        chat=_chat_table(chat),
        base=_base_table(base),
        runs=_runs_table(runs),
        settings=_settings_table({stage: runs[stage]["model_config"]}),
        data=_data_table(m for m in records.manifests if m["name"] in {run.get("dataset") for run in runs.values()}),
        head=_head(list(runs.values())),
    )


def _chat_table(chat: ByStage) -> str:
    scores = {stage: record["tasks"] for stage, record in chat.items()}
    return _scores_table(scores, "ChatCORE", [record["chatcore"] for record in chat.values()])


def write_report(base_dir: Path, out_dir: Path | None = None, price: float | None = None) -> Path:
    """Write report.md, its figures and a MODEL_CARD_<tag>.md of each model's last stage; returns the report's path.

    Read are the records under `base_dir`, written is into `out_dir` (base_dir/report).
    price: dollars an hour, for the cost of each stage. Raises ValueError naming a damaged record.
    """
    out_dir = out_dir or base_dir / "report"
    records = Records.read(base_dir)
    models = [_model_section(records, tag, out_dir) for tag in records.tags()] or [f"## Model\n\n{NOT_RUN}"]
    foreign = {record["tag"]: record for record in records.base_evals if record["stage"] not in STAGES}
    parts = [
        "# Report",
        "Accuracies are in percent, ± one standard error; in brackets, the gain over the stage before.",
        _head([*records.runs, *records.base_evals, *records.chat_evals]),
        *models,
        *([f"## Open-weights models, by the same code\n\n{_base_table(foreign, 'model')}"] if foreign else []),
        f"## Tokenizer\n\n{_tokenizer_table(records.tokenizer)}",
        f"## Wall time{' and cost' if price is not None else ''}\n\n{_times_table(records.stage_times, price)}",
        f"## Data and licences\n\n{_data_table(records.manifests)}",
    ]
    atomic_write(out_dir / "report.md", "\n\n".join(parts) + "\n")
    for tag in records.tags():
        if runs := by_stage(records.runs, tag):
            atomic_write(out_dir / f"MODEL_CARD_{tag}.md", model_card(records, tag, list(runs)[-1]))
    return out_dir / "report.md"
