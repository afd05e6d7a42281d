"""The loader's promises, measured on rows made for it: speed on one core, the same rows on any number of ranks, and
resuming at any step in under a second; and how fast text is packed and tokenized: python -m dev.bench_data
"""

import dataclasses
import itertools
import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dev import bench_old as bench
from nanochat import cli, world
from nanochat.common import get_base_dir
from nanochat.compute import usable_cores
from nanochat.dataloader import RowLoader
from nanochat.token_shards import PackedRows, write_rows
from nanochat.tokenizer import Tokenizer

BOS = 32759
STEP_TOKENS = 2**18


@dataclass(frozen=True)
class Config:
    """Flags of the benchmark."""

    seq_len: int = cli.option(2048, "context in tokens")
    document: float = cli.option(1100.0, "mean length of a document in tokens; lengths are log-normal, sigma 1")
    shard_tokens: int = cli.option(16_000_000, "tokens of the shard that is packed and read")
    steps: int = cli.option(40, "steps of 2^18 tokens timed")
    resume_shards: int = cli.option(400, "shards of the long run that is resumed near its end")
    vocab_size: int = cli.option(4096, "size of the tokenizer whose speed is taken")
    text_bytes: int = cli.option(8_000_000, "text tokenized")
    out: str | None = cli.option(None, "record to write, without suffix; unset = bench/data in the base directory")

    def __post_init__(self) -> None:
        cli.require_positive(
            self, "seq_len", "document", "shard_tokens", "steps", "resume_shards", "vocab_size", "text_bytes"
        )


def make_documents(tokens: int, mean: float, seed: int) -> list[tuple[np.ndarray, None]]:
    """Return about `tokens` random ids in documents of log-normal length."""
    rng = np.random.default_rng(seed)
    lengths = np.maximum(1, rng.lognormal(np.log(mean) - 0.5, 1.0, max(1, round(tokens / mean)))).astype(np.int64)
    ids = rng.integers(0, BOS, lengths.sum(), dtype=np.uint16)
    return [(part, None) for part in np.split(ids, np.cumsum(lengths)[:-1])]


def rows_per_step(seq_len: int) -> int:
    """Return the rows of a step of about 2^18 tokens."""
    return max(8, STEP_TOKENS // seq_len // 8 * 8)


def measure_speed(rows: PackedRows, steps: int) -> dict[str, float]:
    """Tokens a second: of processor time for filling batches, of wall time with the prefetching thread."""
    step_rows = rows_per_step(rows.sequence_len)
    tokens = steps * step_rows * rows.sequence_len
    loader = RowLoader(rows, step_rows, step_rows, seed=0)
    loader.step(0)  # maps and checks the files
    began = time.process_time()
    for step in range(steps):
        loader.step(step)
    filling = time.process_time() - began
    began = time.perf_counter()
    for _ in itertools.islice(loader.iterate(), steps):
        pass
    return {"batches": tokens / filling, "prefetched": tokens / (time.perf_counter() - began)}


def ranks_agree(rows: PackedRows, steps: list[int]) -> tuple[bool, int]:
    """Return whether the rows of 2, 4 and 8 ranks, put together, are those of one rank; and how many were compared."""
    step_rows = 16
    compared = 0
    equal = True
    whole = RowLoader(rows, step_rows, step_rows, seed=0)
    for step in steps:
        inputs_NT, targets_NT = whole.step(step)[0]
        for world_size in (2, 4, 8):
            for rank in range(world_size):
                ((x, y),) = RowLoader(rows, step_rows, step_rows // world_size, 0, rank, world_size).step(step)
                equal &= torch.equal(x, inputs_NT[rank::world_size]) and torch.equal(y, targets_NT[rank::world_size])
                compared += len(x)
    return equal, compared


def resume_seconds(folder: Path, copies: int, seq_len: int) -> list[float]:
    """Seconds until the first batch of a new loader at the first, middle and last step of an epoch of `copies` shards.

    They are one folder under many names: each is read as if it were a file of its own, only the disk's cache is warm.
    """
    step_rows = rows_per_step(seq_len)
    steps = max(1, PackedRows([folder] * copies, seq_len, 1).total() // step_rows)
    seconds = []
    for step in (0, steps // 2, steps - 1):
        began = time.perf_counter()
        next(RowLoader(PackedRows([folder] * copies, seq_len, 1), step_rows, step_rows, seed=0).iterate(step))
        seconds.append(time.perf_counter() - began)
    return seconds


def tokenizing_rate(vocab_size: int, text_bytes: int) -> dict[str, float]:
    """Tokens and bytes a second of wall time for the built-in text, with a tokenizer made from it, on all cores."""
    texts = list(world.documents(0, text_bytes))
    tokenizer = Tokenizer.train_from_iterator(texts[: len(texts) // 4], vocab_size)
    times = bench.time_calls(lambda: tokenizer.encode(texts), seconds=2, least=2, warmup=1)
    tokens = sum(map(len, tokenizer.encode(texts)))
    seconds = statistics.median(times)
    size = sum(len(text.encode()) for text in texts)
    return {"tokens": tokens / seconds, "bytes": size / seconds, "vocab_size": tokenizer.get_vocab_size()}


def to_rows(record: dict[str, Any], config: Config) -> Iterator[dict[str, Any]]:
    """The table: what is promised, and what was measured."""

    def row(what: str, measured: str, promised: str = "", kept: bool | None = None) -> dict[str, Any]:
        answer = {None: "", True: "yes", False: "NO"}[kept]
        return {"what": what, "measured": measured, "promised": promised, "kept": answer}

    speed = record["speed"]
    rate = speed["batches"] / 1e6
    yield row("batches, a core", f"{rate:.1f} M tokens/s", "20 M tokens/s", rate >= 20)
    yield row("- prefetched, wall time", f"{speed['prefetched'] / 1e6:.1f} M tokens/s")
    yield row("packing and writing, once", f"{record['packing'] / 1e6:.1f} M tokens/s")
    equal, compared = record["ranks_agree"]
    answer = f"{'equal' if equal else 'DIFFERENT'}, {compared:,} rows"
    yield row("rows of 2, 4, 8 ranks and of one", answer, "equal", equal)
    slowest = max(record["resume_seconds"])
    behind = f"resume behind {config.resume_shards} shards of {config.shard_tokens / 1e6:.3g} M tokens"
    yield row(behind, f"{slowest:.3f} s", "under 1 s", slowest < 1)
    text = record["tokenizing"]
    measured = f"{text['tokens'] / 1e6:.2f} M tokens/s, {text['bytes'] / 1e6:.1f} MB/s"
    yield row(f"tokenizing, {usable_cores()} cores, V={text['vocab_size']}", measured)


def main() -> None:
    config = cli.parse(Config, description=__doc__)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="nanochat-bench-") as temporary:
        documents = make_documents(config.shard_tokens, config.document, seed=0)
        began = time.process_time()
        meta = write_rows(Path(temporary), documents, config.seq_len + 1, np.dtype("uint16"), BOS)
        record: dict[str, Any] = {"packing": meta["tokens"] / (time.process_time() - began)}
        folder = Path(temporary, "rows")
        rows = PackedRows([folder], config.seq_len, group_shards=1)
        record["speed"] = measure_speed(rows, config.steps)
        record["ranks_agree"] = ranks_agree(rows, list(range(0, 60, 10)))
        record["resume_seconds"] = resume_seconds(folder, config.resume_shards, config.seq_len)
    record["tokenizing"] = tokenizing_rate(config.vocab_size, config.text_bytes)
    rows_of_table = list(to_rows(record, config))
    shape = f"documents of {config.document:g} tokens in the mean, context of {config.seq_len}"
    page = f"# Loader\n\n{shape}; `a core` is processor time. Load average {os.getloadavg()[0]:.1f}.\n\n"
    out = config.out or get_base_dir() / "bench" / "data"
    record = {"config": dataclasses.asdict(config), **record, "rows": rows_of_table}
    bench.write_report(out, record, page + bench.markdown_table(rows_of_table))
    if broken := [row["what"] for row in rows_of_table if row["kept"] == "NO"]:
        raise ValueError(f"not kept: {', '.join(broken)}")


if __name__ == "__main__":
    cli.run(main)
