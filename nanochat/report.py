"""JSON records -> report.md with figures, and model cards. Nothing is measured here: equal records give equal bytes.

records.py reads what the stages left in a base directory. Here a function `..._table` makes a Markdown table of some
records, `conversations` and `continuations` show samples, figures.py draws, and `write_report` puts all of it together,
one section per model. A missing record is no error, so a report can be made after any stage: what would be made of it
says "not run", and a single value that is missing is a dash.
"""

import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from datetime import timedelta
from pathlib import Path

from nanochat.common import STAGES, atomic_write
from nanochat.figures import draw_bars, draw_curves
from nanochat.records import ByStage, Record, Records, by_stage, series
from nanochat.table import NOT_RUN, to_table, to_text

# --- Markdown ---------------------------------------------------------------------------------------------------------


def with_gains(scores: Iterable[tuple[float, float] | None], digits: int) -> list[str | None]:
    """Format (value, standard error) pairs as `90.0 ± 2.1 (+65.0)`: in brackets the gain over the one before."""
    texts: list[str | None] = []
    before = None
    for score in scores:
        if score is None:
            texts.append(None)
            continue
        value, error = score
        gain = "" if before is None else f" ({value - before:+.{digits}f})"
        texts.append(f"{value:.{digits}f} ± {error:.{digits}f}{gain}")
        before = value
    return texts


def fence(text: str) -> str:
    """Return `text` verbatim, in a fence of more backticks than any row of them that it holds."""
    longest = max(map(len, re.findall("`+", text)), default=0)
    ticks = "`" * max(3, longest + 1)
    return f"{ticks}text\n{text}\n{ticks}"


def show_figure(path: Path) -> str:
    return f"![{path.stem}]({path.name})"


TOOL_CALL = re.compile(r"(?s)<\|python_start\|>(.*?)<\|python_end\|>(?:<\|output_start\|>(.*?)<\|output_end\|>)?")


def show_tool_calls(answer: str) -> str:
    """Write an answer's uses of the calculator for people: `[calculator: 37*48 → 1776] 1776.`"""

    def show(call: re.Match[str]) -> str:
        expression, result = call.groups()
        return f"[calculator: {expression}] " if result is None else f"[calculator: {expression} → {result}] "

    return TOOL_CALL.sub(show, answer).rstrip()


# --- tables -----------------------------------------------------------------------------------------------------------


def provenance_table(records: Iterable[Record]) -> str:
    dated = sorted((record for record in records if "date" in record), key=lambda record: record["date"])
    if not dated:
        return NOT_RUN
    commits = dict.fromkeys(record.get("commit", "unknown") for record in dated)  # each once, in order
    facts = {
        "commit": ", ".join(commits),
        "records from": f"{dated[0]['date']} to {dated[-1]['date']}",
        "hardware": dated[-1].get("hardware"),
        "versions": dated[-1].get("versions"),
    }
    return to_table([{"": name, "of the records": fact} for name, fact in facts.items()])


def scores_rows(scores: ByStage) -> list[Record]:
    """Return accuracy ± standard error in percent, a row per task and a column per stage.

    scores: stage -> task -> its `accuracy_record`.
    """
    rows = []
    for task in dict.fromkeys(task for found in scores.values() for task in found):
        records = [found.get(task) for found in scores.values()]
        percents = [record and (100 * record["accuracy"], 100 * record["stderr"]) for record in records]
        known = next(record for record in records if record)
        row = {"task": task, "n": known["n"], "chance": f"{100 * known['baseline']:.0f}"}
        row.update(zip(scores, with_gains(percents, digits=1)))
        rows.append(row)
    return rows


def chat_table(evals: ByStage) -> str:
    """Show the chat tasks, and under them ChatCORE, their mean with 0 for guessing and 1 for all right."""
    rows = scores_rows({stage: record["tasks"] for stage, record in evals.items()})
    if rows:
        means = [(record["chatcore"], record["chatcore_stderr"]) for record in evals.values()]
        rows.append({"task": "**ChatCORE**", "n": "", "chance": "0", **dict(zip(evals, with_gains(means, digits=3)))})
    return to_table(rows)


def base_table(evals: Mapping[str, Record], first_column: str) -> str:
    """Show bits per byte and CORE, a row for each of `evals`: the stages of one model, or several models."""
    rows = []
    for name, record in evals.items():
        core = record["core"]
        metric = core["core_metric"]
        row = {
            first_column: name,
            "bits per byte, train": record["train_bpb"],
            "validation": record["val_bpb"],
            "validation loss, nats per token": record.get("val_loss"),
            "perplexity": record.get("val_perplexity"),
            "CORE": None if metric is None else f"{metric:.4f} ± {core['core_stderr']:.4f}",
            "of bundle": record.get("bundle"),
            "tasks skipped": ", ".join(core["skipped"]) or "none",
        }
        rows.append(row)
    return to_table(rows)


def runs_table(runs: ByStage) -> str:
    """Show what each stage read and reached, and how fast. A metric that a run never logged is a dash."""
    rows = []
    for stage, run in runs.items():
        tokens = series(run, "tokens")
        losses = list(series(run, "loss").values())
        rates = series(run, "tok_per_sec").values()
        shares = series(run, "mfu").values()
        peaks = series(run, "peak_mem_bytes").values()
        row = {
            "stage": stage,
            "data": run.get("dataset"),
            "parameters": run.get("parameters"),
            "last step": max(tokens, default=None),
            "tokens": max(tokens.values(), default=None),
            "last loss": losses[-1] if losses else None,
            "best val bpb": min(series(run, "val_bpb").values(), default=None),
            "best val loss": min(series(run, "val_loss").values(), default=None),
            "perplexity": min(series(run, "val_perplexity").values(), default=None),
            "tokens/s": round(statistics.median(rates)) if rates else None,
            "MFU": f"{100 * statistics.median(shares):.1f} %" if shares else None,
            "peak memory": f"{max(peaks) / 2**30:.1f} GiB" if peaks else None,
            "training time": rounded_time(run.get("wall_seconds")),
            "without its first 10 steps": rounded_time(run.get("steady_seconds")),
        }
        rows.append(row)
    return to_table(rows)


def rounded_time(seconds: float | None) -> timedelta | None:
    """Return a time to whole seconds; None stays None, a dash in a table."""
    return None if seconds is None else timedelta(seconds=round(seconds))


def settings_table(settings: ByStage) -> str:
    """Show what was set, a column per stage; settings that are unset in all of them are left out."""
    rows = []
    for name in dict.fromkeys(name for found in settings.values() for name in found):
        values = {stage: found.get(name) for stage, found in settings.items()}
        if any(value is not None for value in values.values()):
            rows.append({"setting": name, **values})
    return to_table(rows)


def times_table(times: Sequence[Record], price: float | None) -> str:
    """Show how long each stage took, and what it cost at `price` dollars an hour."""
    total = sum(line["seconds"] for line in times)
    rows = []
    for line in [*times, {"stage": "**total**", "seconds": total}] if total else []:
        seconds = line["seconds"]
        row = {
            "stage": line["stage"],
            "wall time": timedelta(seconds=round(seconds)),
            "share": f"{100 * seconds / total:.0f} %",
        }
        if price is not None:
            row[f"cost at $ {price:g} an hour"] = f"$ {seconds / 3600 * price:.2f}"
        rows.append(row)
    return to_table(rows)


def data_table(manifests: Iterable[Record]) -> str:
    rows = []
    for manifest in manifests:
        counts = [shard["documents"] for shard in manifest["shards"]]
        row = {
            "dataset": manifest["name"],
            "source": manifest["source"],
            "licence": manifest["licence"],
            "shards": len(counts),
            "documents": None if None in counts else sum(counts),  # the hub's shards are counted when they are read
            "size": f"{sum(shard['bytes'] for shard in manifest['shards']) / 1e6:.1f} MB",
        }
        rows.append(row)
    return to_table(rows)


def tokenizer_table(record: Record) -> str:
    """Show bytes per token of several tokenizers, a row per text. More is better: a token then says more."""
    rows = []
    for text, results in record["texts"].items():
        row = {"bytes per token": text, "bytes": results["bytes"]}
        for name, size in record["vocab_sizes"].items():
            row[f"{name} ({size:,} tokens)"] = results[name]["bytes_per_token"] if name in results else None
        rows.append(row)
    return to_table(rows)


def conversations(evals: ByStage) -> str:
    """Show the conversations that the evaluation of the last stage kept."""
    if not evals:
        return NOT_RUN
    stage, record = list(evals.items())[-1]
    blocks = [f"From the {stage} model."]
    for sample in record["samples"]:
        verdict = "right" if sample["correct"] else "wrong"
        text = f"user:      {sample['question']}\nassistant: {show_tool_calls(sample['answer'])}"
        blocks.append(f"{sample['task']}, {verdict}:\n\n{fence(text)}")
    return "\n\n".join(blocks)


def continuations(evals: ByStage) -> str:
    """Show how the model of the first stage goes on from some prompts."""
    if not evals:
        return NOT_RUN
    stage, record = next(iter(evals.items()))
    text = "\n\n".join(f"{sample['prompt']}»{sample['text']}" for sample in record["samples"])
    return f"From the {stage} model; the prompt ends at `»`.\n\n{fence(text)}"


# --- the report and the model card ------------------------------------------------------------------------------------


def model_section(records: Records, tag: str, out_dir: Path) -> str:
    """Return everything about one model; its figures are written beside the report."""
    runs = by_stage(records.runs, tag)
    base_evals = by_stage(records.base_evals, tag)
    chat_evals = by_stage(records.chat_evals, tag)

    def curves(name: str, key: str, label: str, bottom: float | None = None) -> str:
        points = {stage: series(run, key) for stage, run in runs.items()}
        path = out_dir / f"{name}_{tag}.png"
        return show_figure(path) if draw_curves(points, label, path, bottom) else NOT_RUN

    chat = chat_table(chat_evals)
    bars = out_dir / f"tasks_{tag}.png"
    if draw_bars({stage: record["tasks"] for stage, record in chat_evals.items()}, bars):
        chat += f"\n\n{show_figure(bars)}"
    sections = {
        "Chat tasks by stage": chat,
        "Language modeling by stage": base_table(base_evals, "stage"),
        "CORE tasks by stage": to_table(
            scores_rows({s: record["core"]["details"] for s, record in base_evals.items()})
        ),
        "Conversations": conversations(chat_evals),
        "Continuations": continuations(base_evals),
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
    runs = by_stage(records.runs, tag, stages)
    if stage not in runs:
        raise ValueError(f"no run {stage}/{tag} under the base directory: a model card needs its run.json")
    run = runs[stage]
    datasets = {each.get("dataset") for each in runs.values()}
    template = Path(__file__).with_name("model_card.txt").read_text(encoding="utf-8")
    return template.format(
        name=f"nanochat {tag} ({stage})",
        parameters=to_text(run.get("parameters")),
        context=to_text(run["model_config"].get("sequence_len")),
        source=f" (this stage from {run['source']})" if run.get("source") else "",
        chat=chat_table(by_stage(records.chat_evals, tag, stages)),
        base=base_table(by_stage(records.base_evals, tag, stages), "stage"),
        runs=runs_table(runs),
        settings=settings_table({stage: run["model_config"]}),
        data=data_table(manifest for manifest in records.manifests if manifest["name"] in datasets),
        head=provenance_table(runs.values()),
    )


def write_report(base_dir: Path, out_dir: Path, price: float | None = None) -> Path:
    """Write report.md, its figures and a model card of each model's last stage; return the path of report.md.

    Reads the records under `base_dir` and writes to `out_dir`. price: dollars an hour, for the cost of each stage.
    Raises ValueError naming a damaged record.
    """
    records = Records.read(base_dir)
    parts = [
        "# Report",
        "Accuracies are in percent, ± one standard error; in brackets, the gain over the stage before.",
        provenance_table([*records.runs, *records.base_evals, *records.chat_evals]),
    ]
    parts += [model_section(records, tag, out_dir) for tag in records.tags()] or [f"## Model\n\n{NOT_RUN}"]
    open_weights = {record["tag"]: record for record in records.base_evals if record["stage"] not in STAGES}
    if open_weights:
        parts.append(f"## Open-weights models, by the same code\n\n{base_table(open_weights, 'model')}")
    tokenizers = [tokenizer_table(record) for record in records.tokenizer_evals] or [NOT_RUN]
    parts += [
        f"## Tokenizer\n\n{tokenizers[0]}",
        f"## Wall time{'' if price is None else ' and cost'}\n\n{times_table(records.stage_times, price)}",
        f"## Data and licences\n\n{data_table(records.manifests)}",
    ]
    atomic_write(out_dir / "report.md", "\n\n".join(parts) + "\n")
    for tag in records.tags():
        runs = by_stage(records.runs, tag)
        if runs:
            last_stage = list(runs)[-1]
            atomic_write(out_dir / f"MODEL_CARD_{tag}.md", model_card(records, tag, last_stage))
    return out_dir / "report.md"
