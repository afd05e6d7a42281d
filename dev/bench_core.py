"""CORE in batches that share prefixes, against one example at a time: the plain form, each option read whole and alone,
without cache. Same rows, same decisions, the forms taking turns. For example:

    python -m dev.bench_core --bundle ../shared/data/eval_bundle --depth 4 --seq-len 2048
"""

import dataclasses
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from dev import bench_old as bench
from nanochat import checkpoint, cli, recipe, world
from nanochat.common import get_base_dir
from nanochat.compute import Compute
from nanochat.core_eval import evaluate_core_task, is_right, scored_spans
from nanochat.core_tasks import CoreTask, build_prompts, draw_examples, read_rows, read_tasks
from nanochat.gpt import build_model
from nanochat.spans import Score, Span, score_spans
from nanochat.tokenizer import Tokenizer


@dataclass(frozen=True)
class Config:
    """Flags of the benchmark."""

    bundle: str | None = cli.option(None, "folder of a CORE bundle; unset: the built-in world's")
    rows: int = cli.option(16, "rows of each task")
    stage: str | None = cli.option(None, "stage of a checkpoint to measure; unset: a model of random weights")
    model_tag: str | None = cli.option(None, "its model; unset: the newest")
    depth: int = cli.option(4, "depth of the random model")
    seq_len: int = cli.option(2048, "its context in tokens")
    vocab_size: int = cli.option(32768, "its vocabulary, learnt from the bundle; smaller where that is too small")
    head_dim: int = cli.option(64, "channels of its attention heads")
    repeats: int = cli.option(3, "times that each task is scored in each form")
    promise: float = cli.option(5.0, "least ratio of the two times, all tasks together")
    device_type: str | None = cli.option(None, "cuda | mps | cpu; unset = the fastest there is", ("cuda", "mps", "cpu"))
    out: str | None = cli.option(None, "record to write, without suffix; unset = bench/core in the base directory")

    def __post_init__(self) -> None:
        for name in ("rows", "depth", "seq_len", "vocab_size", "head_dim", "repeats"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} {getattr(self, name)}: must be at least 1")


def load(config: Config, compute: Compute, tasks: Sequence[CoreTask]) -> tuple[Any, Tokenizer]:
    """The checkpoint asked for, or a model of random weights, none of them zero, with a tokenizer of the bundle."""
    if config.stage:
        return checkpoint.load_model(config.stage, compute.device, config.model_tag)[:2]
    texts = [path.read_text(encoding="utf-8") for path in sorted({task.path for task in tasks})]
    tokenizer = Tokenizer.train_from_iterator(texts, config.vocab_size)
    shape = recipe.model_config(config.depth, tokenizer.get_vocab_size(), config.seq_len, head_dim=config.head_dim)
    model = build_model(shape, compute.device, train=False)
    generator = torch.Generator(compute.device).manual_seed(0)
    model.init_weights(generator)
    with torch.no_grad():
        for block in model.blocks:  # zero at first, and the head next to it
            for matrix in (block.attn.out, block.mlp.down):
                matrix.weight.normal_(std=0.02, generator=generator)
        model.head.weight.normal_(std=0.02, generator=generator)
    return model.eval(), tokenizer


def row_spans(tokenizer: Any, task: CoreTask, rows: Sequence[Any], kept: int, context: int) -> list[list[Span]]:
    """The spans of each kept row."""
    bos = tokenizer.get_bos_token_id()
    prompts = [build_prompts(task, rows[i], draw_examples(rows, kept, i, task.shots)) for i in range(kept)]
    return [scored_spans(task.kind, tokenizer.encode(texts, prepend=bos), context) for texts in prompts]


@torch.inference_mode()
def plain_score(model: Any, span: Span) -> Score:
    """The score of one span: all logits of the whole sequence, the scored ones taken from them."""
    idx_1T = torch.tensor([span.ids], device=model.device)
    logits_NV = model(idx_1T)[0, span.start - 1 : -1].float()
    targets_N = idx_1T[0, span.start :]
    losses_N = torch.nn.functional.cross_entropy(logits_NV, targets_N, reduction="none")
    return Score(-losses_N.double().sum().item(), len(targets_N), bool((logits_NV.argmax(-1) == targets_N).all()))


def plain_outcomes(model: Any, tokenizer: Any, task: CoreTask, rows: Sequence[Any], kept: int) -> str:
    """`outcomes` as `evaluate_core_task` returns them, one example at a time."""
    outcomes = ""
    for row, spans in zip(rows, row_spans(tokenizer, task, rows, kept, model.config.sequence_len)):
        gold = None if task.kind == "language_modeling" else row["gold"]
        outcomes += str(int(is_right([plain_score(model, span) for span in spans], gold)))
    return outcomes


def measure(model: Any, tokenizer: Any, task: CoreTask, config: Config) -> dict[str, Any]:
    """One task in both forms, in turns: median seconds, decisions that differ, largest difference of a
    log-likelihood."""
    rows, _ = read_rows(task)
    kept = min(config.rows, len(rows))
    forms: dict[str, Callable[[], str]] = {
        "plain": lambda: plain_outcomes(model, tokenizer, task, rows, kept),
        "batched": lambda: evaluate_core_task(model, tokenizer, task, rows, kept)["outcomes"],
    }
    seconds: dict[str, list[float]] = {name: [] for name in forms}
    outcomes = {}
    for repeat in range(config.repeats):
        for name in list(forms)[:: -1 if repeat % 2 else 1]:
            bench.synchronize(model.device)
            began = time.perf_counter()
            outcomes[name] = forms[name]()
            bench.synchronize(model.device)
            seconds[name].append(time.perf_counter() - began)
    context = model.config.sequence_len
    spans = [span for row in row_spans(tokenizer, task, rows, kept, context) for span in row]
    plain, batched = [plain_score(model, span) for span in spans], score_spans(model, spans)
    return {
        "task": task.label,
        "rows": kept,
        "sequences": len(spans),
        "tokens": sum(len(span.ids) for span in spans),
        "scored": sum(len(span.ids) - span.start for span in spans),
        "plain s": statistics.median(seconds["plain"]),
        "batched s": statistics.median(seconds["batched"]),
        "ratio": statistics.median(p / b for p, b in zip(seconds["plain"], seconds["batched"])),
        "decisions differ": sum(a != b for a, b in zip(outcomes["plain"], outcomes["batched"])),
        "log-likelihoods differ by": max(abs(a.logprob - b.logprob) for a, b in zip(plain, batched)),
    }


def main() -> None:
    config = cli.parse(Config, description=__doc__)
    compute = Compute.create(config.device_type)
    with tempfile.TemporaryDirectory(prefix="nanochat-bench-") as temporary:
        if config.bundle is None:
            world.core_bundle(temporary)
        tasks = read_tasks(config.bundle or temporary)
        model, tokenizer = load(config, compute, tasks)
        measure(model, tokenizer, tasks[0], dataclasses.replace(config, rows=1, repeats=1))  # warms up
        rows = [measure(model, tokenizer, task, config) for task in tqdm(tasks, unit="task", disable=None)]
    sums = {name: sum(row[name] for row in rows) for name in rows[0] if name not in ("task", "ratio")}
    largest = max(row["log-likelihoods differ by"] for row in rows)
    sums |= {"ratio": sums["plain s"] / sums["batched s"], "log-likelihoods differ by": largest}
    rows.append({"task": "all", **sums})
    shape = model.config
    where = f"{compute.name}, {str(compute.dtype).removeprefix('torch.')}, {torch.get_num_threads()} threads"
    page = (
        f"# CORE in batches against one example at a time\n\n{where}; {shape.n_layer} layers of {shape.n_embd}, "
        f"context {shape.sequence_len}, V={shape.vocab_size}. Load average {os.getloadavg()[0]:.1f}. Medians of "
        f"{config.repeats} turns; the last line adds them up.\n\n{bench.markdown_table(rows)}"
    )
    record = {"config": dataclasses.asdict(config), "model": dataclasses.asdict(shape), "rows": rows}
    bench.write_report(Path(config.out) if config.out else get_base_dir() / "bench" / "core", record, page)
    if sums["ratio"] < config.promise:
        raise ValueError(f"{sums['ratio']:.2f} times as fast as one at a time, not {config.promise:g}")
    if compute.dtype == torch.float32 and (sums["decisions differ"] or largest > 1e-4):
        raise ValueError(f"{sums['decisions differ']} decisions differ, and log-likelihoods by {largest:.2g}")


if __name__ == "__main__":
    cli.run(main)
