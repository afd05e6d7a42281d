"""Speed of the tokenizer beside tiktoken's own encodings and Hugging Face's tokenizers, where they are on this machine.
For example: python -m dev.bench_tokenizer --data FOLDER --vocab-size 32768
"""

import dataclasses
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from dev import bench_old as bench
from nanochat import cli, world
from nanochat.common import get_base_dir
from nanochat.compute import usable_cores
from nanochat.documents import iterate_documents
from nanochat.tokenizer import SPECIAL_TOKENS, SPLIT_PATTERN, Tokenizer


@dataclass(frozen=True)
class Config:
    """Flags of the benchmark."""

    data: str = cli.option("builtin", "text: builtin, or a folder of .parquet, .jsonl or .txt")
    vocab_size: int = cli.option(4096, "ids, special tokens included")
    megabytes: float = cli.option(8.0, "text to train on; a quarter of it is encoded and decoded")
    seconds: float = cli.option(1.0, "least time of each measurement")
    pretrained: str = cli.option("gpt2,cl100k_base", "tiktoken's encodings to measure beside ours")
    out: str | None = cli.option(None, "record to write, without suffix; unset = bench/tokenizer in the base directory")

    def __post_init__(self) -> None:
        if not self.megabytes > 0 or not self.seconds > 0:
            raise ValueError("--megabytes and --seconds must be above 0")


def read_texts(data: str, size: float) -> list[str]:
    """Documents of about `size` bytes together. Raises ValueError for a folder without text."""
    if data == "builtin":
        return list(world.documents(0, int(size)))
    kinds = (".parquet", ".jsonl", ".txt")
    paths = sorted(path for path in Path(data).rglob("*") if path.suffix.lower() in kinds)
    texts: list[str] = []
    for text in iterate_documents(paths):
        texts.append(text)
        size -= len(text.encode())
        if size <= 0:
            return texts
    if not texts:
        raise ValueError(f"--data {data}: not builtin, and no folder with .parquet, .jsonl or .txt files")
    return texts


def measure(
    name: str,
    texts: Sequence[str],
    encode: Callable[[str], Sequence[int]],
    encode_batch: Callable[[Sequence[str]], Sequence[Sequence[int]]],
    decode: Callable[[Sequence[int]], str],
    seconds: float,
    train_seconds: float | None = None,
) -> dict[str, Any]:
    """A line of the table. Raises ValueError unless what was decoded is what was encoded."""
    ids = [encode(text) for text in texts]
    if [decode(row) for row in ids] != list(texts):
        raise ValueError(f"{name} does not give back what it encoded")
    size = sum(len(text.encode()) for text in texts)

    def rate(call: Callable[[], Any]) -> float:
        return size / 1e6 / statistics.median(bench.time_calls(call, seconds=seconds, least=3, warmup=0))

    return {
        "tokenizer": name,
        "training s": train_seconds,
        "encode MB/s": rate(lambda: [encode(text) for text in texts]),
        f"in {usable_cores()} threads": rate(lambda: encode_batch(texts)),
        "decode MB/s": rate(lambda: [decode(row) for row in ids]),
        "bytes a token": size / sum(map(len, ids)),
    }


def not_measured(name: str, why: str) -> dict[str, Any]:
    """The line of a tokenizer that is not on this machine."""
    keys = ("training s", "encode MB/s", f"in {usable_cores()} threads", "decode MB/s", "bytes a token")
    return {"tokenizer": f"{name} ({why})", **dict.fromkeys(keys)}


def ours_and_tiktoken(texts: Sequence[str], sample: Sequence[str], config: Config) -> Iterator[dict[str, Any]]:
    """Our tokenizer, tiktoken called directly with its vocabulary, and tiktoken's encodings."""
    began = time.perf_counter()
    ours = Tokenizer.train_from_iterator(texts, config.vocab_size)
    spent = time.perf_counter() - began
    yield measure(
        f"ours, V={ours.get_vocab_size()}", sample, ours.encode, ours.encode, ours.decode, config.seconds, spent
    )
    known = {"tiktoken called directly, same vocabulary": ours}
    for name in filter(None, config.pretrained.split(",")):
        try:
            known[f"tiktoken {name}"] = Tokenizer.from_pretrained(name)
        except ValueError:
            yield not_measured(f"tiktoken {name}", "not on this machine")
    for name, tokenizer in known.items():
        encoding = tokenizer.encoding

        def encode_batch(batch: Sequence[str], encoding: Any = encoding) -> list[list[int]]:
            return encoding.encode_ordinary_batch(batch, num_threads=usable_cores())

        yield measure(name, sample, encoding.encode_ordinary, encode_batch, encoding.decode, config.seconds)


def hugging_face(texts: Sequence[str], sample: Sequence[str], config: Config) -> dict[str, Any]:
    """Hugging Face's tokenizers, trained on the same text with the same pattern and size."""
    try:
        import tokenizers
    except ImportError:
        return not_measured("Hugging Face tokenizers", "not installed")
    from tokenizers import Regex, decoders, models, pre_tokenizers, trainers

    bpe = tokenizers.Tokenizer(models.BPE())
    # its regex engine has other possessive forms: greedy ones split this text nearly alike
    pattern = SPLIT_PATTERN.replace("}++", "}+").replace("]++", "]+").replace("?+", "?").replace("*+", "*")
    split = pre_tokenizers.Split(Regex(pattern.replace("{1,2}+", "{1,2}")), "isolated")
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=config.vocab_size - len(SPECIAL_TOKENS), initial_alphabet=alphabet, show_progress=False
    )
    began = time.perf_counter()
    bpe.train_from_iterator(texts, trainer)
    spent = time.perf_counter() - began

    def encode_batch(batch: Sequence[str]) -> list[list[int]]:
        return [encoding.ids for encoding in bpe.encode_batch(list(batch))]

    name = f"Hugging Face tokenizers {tokenizers.__version__}"
    return measure(name, sample, lambda text: bpe.encode(text).ids, encode_batch, bpe.decode, config.seconds, spent)


def main() -> None:
    config = cli.parse(Config, description=__doc__)
    texts = read_texts(config.data, config.megabytes * 1e6)
    sample = list(islice(texts, max(1, len(texts) // 4)))
    size = sum(len(text.encode()) for text in texts) / 1e6
    print(f"{len(texts):,} documents, {size:.1f} MB", flush=True)
    rows = []
    for row in (*ours_and_tiktoken(texts, sample, config), hugging_face(texts, sample, config)):
        print(f"{row['tokenizer']}: done", flush=True)
        rows.append(row)
    page = (
        f"# Tokenizer speed\n\nTrained on {size:.1f} MB in {len(texts):,} documents of `{Path(config.data).name}`, one "
        f"in four of them encoded and decoded; medians of wall time.\n\n{bench.markdown_table(rows)}"
    )
    record = {"config": dataclasses.asdict(config), "megabytes": size, "rows": rows}
    bench.write_report(config.out or get_base_dir() / "bench" / "tokenizer", record, page)


if __name__ == "__main__":
    cli.run(main)
