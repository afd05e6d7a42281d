"""The loader's promises, measured on token shards made for it: speed on one core from packing to batches, a constant
share of cut documents, the same rows on any number of ranks, resuming at any step in under a second; and how fast text
is tokenized. For example: python -m dev.bench_data --seq-len 2048
"""

import dataclasses
import itertools
import os
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dev import bench_old as bench
from nanochat import cli, world
from nanochat.common import atomic_write_json, get_base_dir, sha256_file
from nanochat.compute import usable_cores
from nanochat.dataloader import RowLoader
from nanochat.token_shards import TokenShard
from nanochat.tokenizer import Tokenizer

BOS = 32759


@dataclass(frozen=True)
class Config:
    """Flags of the benchmark."""

    seq_len: int = cli.option(2048, "context in tokens")
    document: float = cli.option(1100.0, "mean length of a document in tokens; lengths are log-normal, sigma 1")
    shards: int = cli.option(2, "token shards made")
    shard_tokens: int = cli.option(16_000_000, "tokens of each")
    rows: int = cli.option(50_000, "rows over which the share of cut documents is followed")
    steps: int = cli.option(40, "steps of 2^18 tokens timed")
    resume_shards: int = cli.option(400, "shards of the long run that is resumed near its end")
    vocab_size: int = cli.option(4096, "size of the tokenizer whose speed is taken")
    text_bytes: int = cli.option(8_000_000, "text tokenized")
    out: str | None = cli.option(None, "record to write, without suffix; unset = bench/data in the base directory")

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            if field.name != "out" and getattr(self, field.name) < 1:
                raise ValueError(f"--{field.name.replace('_', '-')} {getattr(self, field.name)}: must be above 0")


def make_shard(folder: Path, tokens: int, mean: float, seed: int) -> TokenShard:
    """A shard of about `tokens` random ids in documents of log-normal length, in the format of token_shards.py."""
    rng = np.random.default_rng(seed)
    lengths = np.maximum(1, rng.lognormal(np.log(mean) - 0.5, 1.0, max(1, round(tokens / mean)))).astype(np.int64)
    folder.mkdir(parents=True)
    rng.integers(0, BOS, lengths.sum(), dtype=np.uint16).tofile(folder / "ids.bin")
    np.concatenate([[0], np.cumsum(lengths)]).tofile(folder / "offsets.bin")
    meta = {"conversations": False, "documents": len(lengths), "tokens": int(lengths.sum()), "dtype": "uint16"}
    sha256 = {path.stem: sha256_file(path) for path in sorted(folder.iterdir())}
    atomic_write_json(folder / "meta.json", {**meta, "bos": BOS, "sha256": sha256})
    return TokenShard(folder)


class Clock:
    """Wall time and processor time of a `with` block. Their quotient tells whether others were using the core."""

    def __enter__(self) -> "Clock":
        self._wall, self._processor = time.perf_counter(), time.process_time()
        return self

    def __exit__(self, *error: object) -> None:
        self.wall, self.processor = time.perf_counter() - self._wall, time.process_time() - self._processor


def rows_per_step(seq_len: int) -> int:
    """Rows of about 2^18 tokens."""
    return max(8, 2**18 // seq_len // 8 * 8)


def measure_speed(shards: Sequence[TokenShard], seq_len: int, steps: int) -> dict[str, float]:
    """Tokens a second of processor time: packing (of epoch 0, not packed before), filling batches, and both in turn;
    and tokens a second of wall time with the prefetching thread, as training uses it."""
    with Clock() as packing:
        rows_in_epoch = sum(shard.row_count(seq_len + 1, 0, 0) for shard in shards)
    rows = rows_per_step(seq_len)
    loader = RowLoader(shards, seq_len, rows, rows, 0)
    loader.step(0)  # maps and checks the files
    with Clock() as filling:
        for step in range(steps):
            loader.step(step)
    loader = RowLoader(shards, seq_len, rows, rows, 0)
    with Clock() as prefetched:
        for _ in itertools.islice(loader.iterate(), steps):
            pass
    pack, fill = packing.processor / (rows_in_epoch * seq_len), filling.processor / (steps * rows * seq_len)
    return {
        "packing": 1 / pack,
        "batches": 1 / fill,
        "both": 1 / (pack + fill),
        "prefetched": steps * rows * seq_len / prefetched.wall,
    }


def cut_rates(shards: Sequence[TokenShard], seq_len: int, rows: int, windows: int = 10) -> list[float]:
    """Pieces that begin inside a document, per row, over successive `windows` of the loader's first `rows` rows."""
    cuts: list[np.ndarray] = []
    for visit in itertools.count():
        if sum(map(len, cuts)) >= rows:
            return [float(part.mean()) for part in np.array_split(np.concatenate(cuts)[:rows], windows)]
        shard = shards[visit % len(shards)]  # later epochs take the shards in another order: the rates are the same
        rows_R2, start, _ = shard.plan(seq_len + 1, 0, visit // len(shards))
        inside = np.concatenate([[0], np.cumsum(~np.isin(start, shard.offsets))])
        cuts.append(inside[rows_R2[:, 1]] - inside[rows_R2[:, 0]])


def ranks_agree(shards: Sequence[TokenShard], seq_len: int, steps: Sequence[int]) -> tuple[bool, int]:
    """Whether the rows of 2, 4 and 8 ranks, put together, are those of one rank; and how many rows were compared."""
    rows, compared, equal = 16, 0, True
    whole = RowLoader(shards, seq_len, rows, rows, 0)
    for step in steps:
        inputs_NT, targets_NT = whole.step(step)[0]
        for world_size in (2, 4, 8):
            for rank in range(world_size):
                ((x, y),) = RowLoader(shards, seq_len, rows, rows // world_size, 0, rank, world_size).step(step)
                equal &= torch.equal(x, inputs_NT[rank::world_size]) and torch.equal(y, targets_NT[rank::world_size])
                compared += len(x)
    return equal, compared


def resume_seconds(folder: Path, copies: int, seq_len: int) -> list[float]:
    """Seconds until the first batch of a new loader at the first, middle and last step of an epoch of `copies` shards.

    They are one folder under many names: each is read as if it were a file of its own, only the disk's cache is warm.
    """
    rows = rows_per_step(seq_len)
    steps = copies * TokenShard(folder).row_count(seq_len + 1, 0, 0) // rows
    seconds = []
    for step in (0, steps // 2, steps - 1):
        began = time.perf_counter()
        next(RowLoader([TokenShard(folder) for _ in range(copies)], seq_len, rows, rows, 0).iterate(step))
        seconds.append(time.perf_counter() - began)
    return seconds


def tokenizing_rate(vocab_size: int, text_bytes: int) -> dict[str, float]:
    """Tokens and bytes a second of wall time for the built-in text, with a tokenizer made from it, on all cores."""
    texts = list(world.documents(0, text_bytes))
    tokenizer = Tokenizer.train_from_iterator(texts[: len(texts) // 4], vocab_size)
    times = bench.time_calls(lambda: tokenizer.encode(texts), seconds=2, least=2, warmup=1)
    tokens = sum(map(len, tokenizer.encode(texts)))
    seconds, size = statistics.median(times), sum(len(text.encode()) for text in texts)
    return {"tokens": tokens / seconds, "bytes": size / seconds, "vocab_size": tokenizer.get_vocab_size()}


def to_rows(record: dict[str, Any], config: Config) -> Iterator[dict[str, Any]]:
    """The table: what is promised, and what was measured."""

    def row(what: str, measured: str, promised: str = "", kept: bool | None = None) -> dict[str, Any]:
        return {
            "what": what,
            "measured": measured,
            "promised": promised,
            "kept": {None: ""}.get(kept, "yes" if kept else "NO"),
        }

    speed, cuts = record["speed"], record["cut_rates"]
    both, spread = speed["both"] / 1e6, (max(cuts) - min(cuts)) / statistics.fmean(cuts)
    yield row("packing and batches, a core", f"{both:.1f} M tokens/s", "20 M tokens/s", both >= 20)
    yield row("- packing alone", f"{speed['packing'] / 1e6:.1f} M tokens/s")
    yield row("- batches alone", f"{speed['batches'] / 1e6:.1f} M tokens/s")
    yield row("- prefetched, wall time", f"{speed['prefetched'] / 1e6:.1f} M tokens/s")
    measured = f"{min(cuts):.3f} to {max(cuts):.3f} a row in tenths"
    # the mean of a tenth scatters by chance; a packer that starves moves it by its own size
    yield row(f"cut documents over {config.rows:,} rows", measured, "constant (within 10 %)", spread < 0.1)
    equal, compared = record["ranks_agree"]
    yield row(
        "rows of 2, 4, 8 ranks and of one", f"{'equal' if equal else 'DIFFERENT'}, {compared:,} rows", "equal", equal
    )
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
        print(f"making {config.shards} shards of {config.shard_tokens:,} tokens", flush=True)
        folders = [Path(temporary) / f"shard_{i}" for i in range(config.shards)]
        shards = [make_shard(folder, config.shard_tokens, config.document, i) for i, folder in enumerate(folders)]
        print("speed", flush=True)
        record: dict[str, Any] = {"speed": measure_speed(shards, config.seq_len, config.steps)}
        print(f"cut documents over {config.rows:,} rows", flush=True)
        record["cut_rates"] = cut_rates(shards, config.seq_len, config.rows)
        print("ranks, and resuming", flush=True)
        record["ranks_agree"] = ranks_agree(shards, config.seq_len, range(0, 60, 10))
        record["resume_seconds"] = resume_seconds(folders[0], config.resume_shards, config.seq_len)
    print("tokenizing", flush=True)
    record["tokenizing"] = tokenizing_rate(config.vocab_size, config.text_bytes)
    rows = list(to_rows(record, config))
    shape = f"documents of {config.document:g} tokens in the mean, context of {config.seq_len}"
    page = f"# Loader\n\n{shape}; `a core` is processor time. Load average {os.getloadavg()[0]:.1f}.\n\n"
    out = config.out or get_base_dir() / "bench" / "data"
    record = {"config": dataclasses.asdict(config), **record, "rows": rows}
    bench.write_report(out, record, page + bench.markdown_table(rows))
    if broken := [row["what"] for row in rows if row["kept"] == "NO"]:
        raise ValueError(f"not kept: {', '.join(broken)}")


if __name__ == "__main__":
    cli.run(main)
