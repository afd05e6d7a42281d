"""JSON records -> report.md with figures, and model cards. Nothing is measured here: equal records give equal bytes.

`Records.read` reads and checks what the stages left in a base directory. Each `*_table` turns records into a Markdown
table, `draw_curves` and `draw_bars` make the figures, and `write_report` puts them together, one section a model.
"""

import io
import json
import re
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nanochat.common import STAGES, atomic_write, read_json

NOT_RUN = "not run"
COLOURS = {"base": "#8c8c8c", "mid": "#4c78a8", "sft": "#f58518", "rl": "#54a24b"}

Record = dict[str, Any]
ByStage = dict[str, Record]  # in the order of the stages

# --- reading ----------------------------------------------------------------------------------------------------------

# The keys that a record must have to be shown; it may have more.
BASE_EVAL = ("stage", "tag", "train_bpb", "val_bpb", "core", "samples")
CHAT_EVAL = ("stage", "tag", "chatcore", "tasks", "samples")
RUN = ("stage", "tag", "config", "model_config")
MANIFEST = ("name", "source", "licence", "shards")


def checked(where: Path | str, record: Any, keys: Sequence[str]) -> Record:
    """Return a record as it is. Raises ValueError naming its file when it lacks a key that the report shows."""
    missing = [key for key in keys if not isinstance(record, dict) or key not in record]
    if missing:
        raise ValueError(f"{where} has no {', '.join(missing)}: delete it and run its stage again")
    return record


def read_lines(path: Path, keys: Sequence[str]) -> list[Record]:
    """Read a .jsonl file; [] where there is none. Raises ValueError naming the damaged line."""
    records = []
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n") if path.is_file() else []
    for number, line in enumerate(lines, 1):
        try:
            if line:
                records.append(checked(f"{path}:{number}", json.loads(line), keys))
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
        """Read every record under `base_dir`. Raises ValueError naming the file of a damaged one."""

        def read_all(pattern: str, keys: Sequence[str]) -> list[Record]:
            return [checked(path, read_json(path), keys) for path in sorted(base_dir.glob(pattern))]

        runs = []
        for path in sorted(base_dir.glob("runs/*/*/run.json")):
            if "~" in path.parent.name:  # an older run of the same name, kept when a new one began
                continue
            run = checked(path, read_json(path), RUN)
            runs.append({**run, "metrics": read_lines(path.with_name("metrics.jsonl"), ("step",))})
        return cls(
            base_evals=read_all("evals/base_eval_*.json", BASE_EVAL),
            chat_evals=read_all("evals/chat_eval_*.json", CHAT_EVAL),
            runs=runs,
            tokenizer=next(iter(read_all("evals/tok_eval.json", ("vocab_sizes", "texts"))), None),
            stage_times=read_lines(base_dir / "runs" / "stages.jsonl", ("stage", "seconds")),
            manifests=read_all("datasets/*/manifest.json", MANIFEST),
        )

    def tags(self) -> list[str]:
        """Return the tags of the models trained here."""
        records = [*self.runs, *self.base_evals, *self.chat_evals]
        return sorted({record["tag"] for record in records if record["stage"] in STAGES})


def by_stage(records: Iterable[Record], tag: str) -> ByStage:
    """Pick the records of one model, in the order of the stages."""
    found = {record["stage"]: record for record in records if record["tag"] == tag}
    return {stage: found[stage] for stage in STAGES if stage in found}


def series(run: Record, key: str) -> tuple[list[int], list[float]]:
    """Return steps and values of one metric; the last value counts where a step was run twice, as after a kill."""
    points = {line["step"]: line[key] for line in run["metrics"] if isinstance(line.get(key), int | float)}
    return sorted(points), [points[step] for step in sorted(points)]


# --- Markdown ---------------------------------------------------------------------------------------------------------


def to_text(value: Any) -> str:
    """Format a cell: floats to four digits, integers with commas, a dash for None."""
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    if isinstance(value, dict):
        return ", ".join(f"{key} {to_text(item)}" for key, item in value.items())
    return "–" if value is None else " ".join(str(value).split())


def to_table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Return a Markdown table, numbers aligned right; "not run" without rows."""
    lines = [[to_text(cell).replace("|", "\\|") for cell in row] for row in rows]
    if not lines:
        return NOT_RUN
    rule = ["---"] + ["---:"] * (len(header) - 1)
    return "\n".join("| " + " | ".join(line) + " |" for line in [list(header), rule, *lines])


def fence(text: str) -> str:
    """Return `text` verbatim, in a fence longer than any that it holds."""
    longest = max(map(len, re.findall("`+", text)), default=0)
    ticks = "`" * max(3, longest + 1)
    return f"{ticks}text\n{text}\n{ticks}"


def duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60} h {minutes % 60:02d} min" if minutes >= 60 else f"{minutes} min {rest:02d} s"


def gains(values: Iterable[float | None], form: Callable[[float], str]) -> list[str]:
    """Return each value's change from the one before it as ` (+x)`; empty where there is nothing to compare with."""
    result = []
    before = None
    for value in values:
        result.append("" if value is None or before is None else f" ({form(value - before)})")
        if value is not None:
            before = value
    return result


TOOL_CALL = re.compile(r"(?s)<\|python_start\|>(.*?)<\|python_end\|>(?:<\|output_start\|>(.*?)<\|output_end\|>)?")


def show_tool_calls(answer: str) -> str:
    """Write an answer's uses of the calculator for people: `[calculator: 37*48 → 1776] 1776.`"""

    def show(call: re.Match[str]) -> str:
        result = "" if call[2] is None else f" → {call[2]}"
        return f"[calculator: {call[1]}{result}] "

    return TOOL_CALL.sub(show, answer).rstrip()


# --- tables -----------------------------------------------------------------------------------------------------------


def provenance_table(records: Iterable[Record]) -> str:
    dated = sorted((record for record in records if "date" in record), key=lambda record: record["date"])
    if not dated:
        return NOT_RUN
    dates = dict.fromkeys((dated[0]["date"], dated[-1]["date"]))
    rows = [
        ("commit", ", ".join(dict.fromkeys(record.get("commit", "unknown") for record in dated))),
        ("records from", " to ".join(dates)),
        ("hardware", dated[-1].get("hardware")),
        ("versions", dated[-1].get("versions")),
    ]
    return to_table(("", "of the records"), rows)


def scores_table(scores: ByStage, mean_name: str = "", means: Sequence[float] = ()) -> str:
    """Show accuracy ± standard error in percent, a row a task and a column a stage; the means come last."""
    rows = []
    for task in dict.fromkeys(task for found in scores.values() for task in found):
        cells = [found.get(task) for found in scores.values()]
        changes = gains([cell and cell["accuracy"] for cell in cells], lambda gain: f"{100 * gain:+.1f}")
        texts = []
        for cell, change in zip(cells, changes):
            texts.append(cell and f"{100 * cell['accuracy']:.1f} ± {100 * cell['stderr']:.1f}{change}")
        known = next(cell for cell in cells if cell)
        rows.append((task, known["n"], f"{100 * known['baseline']:.0f}", *texts))
    if rows and mean_name:
        changes = gains(means, lambda gain: f"{gain:+.3f}")
        texts = [f"{value:.3f}{change}" for value, change in zip(means, changes)]
        rows.append((f"**{mean_name}**", "", "0", *texts))
    return to_table(("task", "n", "chance", *scores), rows)


def chat_table(chat_evals: ByStage) -> str:
    scores = {stage: record["tasks"] for stage, record in chat_evals.items()}
    return scores_table(scores, "ChatCORE", [record["chatcore"] for record in chat_evals.values()])


def base_table(evals: Mapping[str, Record], first_column: str = "stage") -> str:
    """Show bits per byte and CORE, a row for each of `evals`: the stages of one model, or several models."""
    rows = []
    before = None
    for name, record in evals.items():
        core = record["core"] or {"core_metric": None, "skipped": {}}
        metric = core["core_metric"]
        score = None
        if metric is not None:
            gain = f" ({metric - before:+.4f})" if before is not None and first_column == "stage" else ""
            score = f"{metric:.4f} ± {core['core_stderr']:.4f}{gain}"
            before = metric
        bits = [None if record[key] is None else f"{record[key]:.4f}" for key in ("train_bpb", "val_bpb")]
        rows.append((name, *bits, score, record.get("bundle"), ", ".join(core["skipped"]) or "none"))
    header = (first_column, "bits per byte, train", "validation", "CORE", "of bundle", "tasks skipped")
    return to_table(header, rows)


def runs_table(runs: ByStage) -> str:
    header = (
        "stage", "data", "parameters", "last step", "tokens", "last loss", "best val bpb", "tokens/s", "MFU",
        "peak memory", "training time",
    )  # fmt: skip
    rows = []
    for stage, run in runs.items():
        steps, tokens = series(run, "tokens")
        losses = series(run, "loss")[1]
        bits = series(run, "val_bpb")[1]
        rates = series(run, "tok_per_sec")[1]
        mfu = series(run, "mfu")[1]
        peaks = series(run, "peak_mem_bytes")[1]
        seconds = run.get("wall_seconds")
        row = (
            stage,
            run.get("dataset"),
            run.get("parameters"),
            steps[-1] if steps else None,
            tokens[-1] if tokens else None,
            f"{losses[-1]:.4f}" if losses else None,
            f"{min(bits):.4f}" if bits else None,
            round(statistics.median(rates)) if rates else None,
            f"{100 * statistics.median(mfu):.1f} %" if mfu else "n/a",
            f"{max(peaks) / 2**30:.1f} GiB" if peaks else None,
            None if seconds is None else duration(seconds),
        )
        rows.append(row)
    return to_table(header, rows)


def settings_table(settings: ByStage) -> str:
    """Show what was set, a column a stage; settings that are unset in all of them are left out."""
    names = dict.fromkeys(name for found in settings.values() for name in found)
    rows = [(name, *(found.get(name) for found in settings.values())) for name in names]
    return to_table(("setting", *settings), [row for row in rows if any(cell is not None for cell in row[1:])])


def times_table(times: Sequence[Record], price: float | None) -> str:
    if not times:
        return NOT_RUN
    total = sum(line["seconds"] for line in times)
    rows = []
    for name, seconds in [*((line["stage"], line["seconds"]) for line in times), ("**total**", total)]:
        cost = [] if price is None else [f"$ {seconds / 3600 * price:.2f}"]
        share = f"{100 * seconds / total:.0f} %" if total else "–"
        rows.append((name, duration(seconds), share, *cost))
    cost_header = [] if price is None else [f"cost at $ {price:g} an hour"]
    return to_table(("stage", "wall time", "share", *cost_header), rows)


def data_table(manifests: Iterable[Record]) -> str:
    rows = []
    for manifest in manifests:
        counts = [shard["documents"] for shard in manifest["shards"]]
        size = sum(shard["bytes"] for shard in manifest["shards"])
        documents = None if None in counts else sum(counts)  # shards of the hub are not counted before they are read
        about = (manifest["name"], manifest["source"], manifest["licence"])
        rows.append((*about, len(counts), documents, f"{size / 1e6:.1f} MB"))
    return to_table(("dataset", "source", "licence", "shards", "documents", "size"), rows)


def tokenizer_table(record: Record | None) -> str:
    if record is None:
        return NOT_RUN
    names = list(record["vocab_sizes"])
    rows = []
    for text, row in record["texts"].items():
        cells = [f"{row[name]['bytes_per_token']:.2f}" if name in row else "–" for name in names]
        rows.append((text, row["bytes"], *cells))
    sizes = [f"{name} ({to_text(size)} tokens)" for name, size in record["vocab_sizes"].items()]
    return to_table(("bytes per token", "bytes", *sizes), rows)


def conversations(chat_evals: ByStage) -> str:
    """Show the conversations that the evaluation of the last stage kept."""
    stage, record = list(chat_evals.items())[-1]
    blocks = [f"From the {stage} model."]
    for sample in record["samples"]:
        mark = "right" if sample["correct"] else "wrong"
        text = f"user:      {sample['question']}\nassistant: {show_tool_calls(sample['answer'])}"
        blocks.append(f"{sample['task']}, {mark}:\n\n{fence(text)}")
    return "\n\n".join(blocks)


def continuations(base_evals: ByStage) -> str:
    """Show how the first stage goes on from some prompts."""
    stage, record = next(iter(base_evals.items()))
    text = "\n\n".join(f"{sample['prompt']}»{sample['text']}" for sample in record["samples"])
    return f"From the {stage} model; the prompt ends at `»`.\n\n{fence(text)}"


# --- figures ----------------------------------------------------------------------------------------------------------


def new_figure(width: float, height: float, panels: int) -> tuple[Any, list[Any]]:
    from matplotlib.figure import Figure  # without pyplot: no window system, and no state kept between figures

    figure = Figure(figsize=(width, height), dpi=110, layout="constrained")
    axes = list(figure.subplots(1, panels, squeeze=False)[0])
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(axis="y", alpha=0.25)
    return figure, axes


def save_figure(figure: Any, path: Path) -> str:
    """Write a PNG and return the Markdown that shows it."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})  # without matplotlib's version: the same bytes
    atomic_write(path, buffer.getvalue())
    return f"![{path.stem}]({path.name})"


def draw_curves(runs: ByStage, key: str, label: str, path: Path, bottom: float | None = None) -> str:
    """Draw a metric over the steps, one panel a stage; long curves are faint under their running mean."""
    found = {stage: series(run, key) for stage, run in runs.items() if series(run, key)[0]}
    if not found:
        return NOT_RUN
    figure, axes = new_figure(max(5.0, 3.6 * len(found)), 3.0, len(found))
    for axis, (stage, (steps, values)) in zip(axes, found.items()):
        half = len(values) // 40  # a mean over a twentieth of the curve; a short curve stays as it is
        means = [statistics.fmean(values[max(0, i - half) : i + half + 1]) for i in range(len(values))]
        axis.plot(steps, values, color=COLOURS[stage], alpha=0.3, linewidth=0.8)
        axis.plot(steps, means, color=COLOURS[stage], linewidth=1.8, marker=None if half else "o", markersize=4)
        axis.set(title=stage, xlabel="step")
        axis.set_ylim(bottom=bottom)
    axes[0].set_ylabel(label)
    return save_figure(figure, path)


def draw_bars(scores: ByStage, path: Path) -> str:
    """Draw accuracy by task, one bar a stage with its standard error; a dotted line marks guessing."""
    tasks = list(dict.fromkeys(task for found in scores.values() for task in found))
    figure, (axis,) = new_figure(max(5.0, 1.2 + 1.5 * len(tasks)), 3.6, 1)
    width = 0.8 / len(scores)
    for i, (stage, found) in enumerate(scores.items()):
        places = [tasks.index(task) + (i - (len(scores) - 1) / 2) * width for task in found]
        heights = [100 * score["accuracy"] for score in found.values()]
        errors = [100 * score["stderr"] for score in found.values()]
        bars = axis.bar(places, heights, 0.92 * width, yerr=errors, color=COLOURS[stage], label=stage, capsize=2.5)
        axis.bar_label(bars, fmt="%.0f", padding=3, size=8)
        for task, score in found.items():
            left, right = tasks.index(task) - 0.42, tasks.index(task) + 0.42
            axis.hlines(100 * score["baseline"], left, right, colors="#333333", linestyles="dotted", linewidth=1)
    axis.set_xticks(range(len(tasks)), tasks)
    axis.set_ylim(0, 112)
    axis.set_ylabel("accuracy, % (dotted: guessing)")
    figure.legend(loc="outside upper center", ncols=len(scores), frameon=False)
    return save_figure(figure, path)


# --- the report and the model card ------------------------------------------------------------------------------------


def model_section(records: Records, tag: str, out_dir: Path) -> str:
    """Return everything about one model; its figures are written beside the report."""
    runs = by_stage(records.runs, tag)
    base_evals = by_stage(records.base_evals, tag)
    chat_evals = by_stage(records.chat_evals, tag)
    chat_scores = {stage: record["tasks"] for stage, record in chat_evals.items()}
    core_scores = {stage: record["core"]["details"] for stage, record in base_evals.items() if record["core"]}
    chat = chat_table(chat_evals)
    if any(chat_scores.values()):
        chat += "\n\n" + draw_bars(chat_scores, out_dir / f"tasks_{tag}.png")

    def curves(name: str, key: str, label: str, bottom: float | None = None) -> str:
        return draw_curves(runs, key, label, out_dir / f"{name}_{tag}.png", bottom)

    sections = {
        "Chat tasks by stage": chat,
        "Language modeling by stage": base_table(base_evals),
        "CORE tasks by stage": scores_table(core_scores),
        "Conversations": conversations(chat_evals) if chat_evals else NOT_RUN,
        "Continuations": continuations(base_evals) if base_evals else NOT_RUN,
        "Training": runs_table(runs),
        "Loss": curves("loss", "loss", "training loss, nats"),
        "Validation": curves("bpb", "val_bpb", "bits per byte"),
        "Speed": curves("speed", "tok_per_sec", "tokens/s", bottom=0),
        "Model": settings_table({stage: run["model_config"] for stage, run in runs.items()}),
        "Settings": settings_table({stage: run["config"] for stage, run in runs.items()}),
    }
    if "rl" in runs:
        sections["Reward"] = curves("reward", "reward", "mean reward", bottom=0)
    return "\n\n".join([f"## Model {tag}", *(f"### {title}\n\n{body}" for title, body in sections.items())])


def model_card(records: Records, tag: str, stage: str) -> str:
    """Return the model card of one checkpoint, Markdown with the header that model hubs read.

    It holds what the records say of this stage and those before it. Raises ValueError when there is no such run.
    """
    stages = STAGES[: STAGES.index(stage) + 1]
    runs = {name: run for name, run in by_stage(records.runs, tag).items() if name in stages}
    if stage not in runs:
        raise ValueError(f"no run {stage}/{tag} under the base directory: a model card needs its run.json")
    chat_evals = {name: record for name, record in by_stage(records.chat_evals, tag).items() if name in stages}
    base_evals = {name: record for name, record in by_stage(records.base_evals, tag).items() if name in stages}
    datasets = {run.get("dataset") for run in runs.values()}
    source = runs[stage].get("source")
    template = Path(__file__).with_name("model_card.txt").read_text(encoding="utf-8")
    return template.format(
        name=f"nanochat {tag} ({stage})",
        parameters=to_text(runs[stage].get("parameters")),
        context=to_text(runs[stage]["model_config"].get("sequence_len")),
        source=f" (this stage from {source})" if source else "",
        chat=chat_table(chat_evals),
        base=base_table(base_evals),
        runs=runs_table(runs),
        settings=settings_table({stage: runs[stage]["model_config"]}),
        data=data_table(manifest for manifest in records.manifests if manifest["name"] in datasets),
        head=provenance_table(list(runs.values())),
    )


def write_report(base_dir: Path, out_dir: Path | None = None, price: float | None = None) -> Path:
    """Write report.md, its figures and a model card of each model's last stage; return the path of report.md.

    Reads the records under `base_dir` and writes to `out_dir` (default: base_dir/report). price: dollars an hour, for
    the cost of each stage. Raises ValueError naming a damaged record.
    """
    out_dir = out_dir or base_dir / "report"
    records = Records.read(base_dir)
    open_weights = {record["tag"]: record for record in records.base_evals if record["stage"] not in STAGES}
    parts = [
        "# Report",
        "Accuracies are in percent, ± one standard error; in brackets, the gain over the stage before.",
        provenance_table([*records.runs, *records.base_evals, *records.chat_evals]),
    ]
    parts += [model_section(records, tag, out_dir) for tag in records.tags()] or [f"## Model\n\n{NOT_RUN}"]
    if open_weights:
        parts.append(f"## Open-weights models, by the same code\n\n{base_table(open_weights, 'model')}")
    parts += [
        f"## Tokenizer\n\n{tokenizer_table(records.tokenizer)}",
        f"## Wall time{' and cost' if price is not None else ''}\n\n{times_table(records.stage_times, price)}",
        f"## Data and licences\n\n{data_table(records.manifests)}",
    ]
    atomic_write(out_dir / "report.md", "\n\n".join(parts) + "\n")
    for tag in records.tags():
        runs = by_stage(records.runs, tag)
        if runs:
            atomic_write(out_dir / f"MODEL_CARD_{tag}.md", model_card(records, tag, list(runs)[-1]))
    return out_dir / "report.md"
