"""Train the tokenizer on a dataset's training shards: python -m scripts.tok_train --vocab-size 32768"""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

from nanochat import cli
from nanochat.common import get_base_dir, print0, write_record
from nanochat.documents import iterate_documents, list_shards
from nanochat.tokenizer import Tokenizer


@dataclass(frozen=True)
class Config:
    """What the tokenizer is trained on, and its size."""

    dataset: str = cli.option("builtin", "dataset to learn from: its name, or the folder it was made from")
    vocab_size: int = cli.option(32768, "ids, the nine special tokens included")
    max_chars: int = cli.option(2_000_000_000, "stop after this many characters")
    doc_cap: int = cli.option(10_000, "characters taken of each document before any gives more")

    def __post_init__(self) -> None:
        cli.require_positive(self, "max_chars", "doc_cap")


def training_texts(config: Config, seen: dict[str, int]) -> Iterator[str]:
    """Up to `max_chars` of the documents' beginnings, then of the rest of the long ones; counted into `seen`."""
    from tqdm import tqdm

    with tqdm(desc="reading", unit=" chars", unit_scale=True, disable=None) as bar:
        for part in (slice(config.doc_cap), slice(config.doc_cap, None)):
            for text in iterate_documents(list_shards(config.dataset, "train")):
                text = text[part][: config.max_chars - seen["chars"]]
                seen["documents"] += part.start is None
                seen["chars"] += len(text)
                bar.update(len(text))
                yield text
                if seen["chars"] >= config.max_chars:
                    return


def main() -> None:
    config = cli.parse(Config, description=__doc__)
    start, seen = time.perf_counter(), {"documents": 0, "chars": 0}
    tokenizer = Tokenizer.train_from_iterator(training_texts(config, seen), config.vocab_size)
    tokenizer.save(get_base_dir() / "tokenizer")
    seconds = time.perf_counter() - start

    sample = list(islice(iterate_documents(list_shards(config.dataset, "val")), 1000))
    tokens = sum(map(len, tokenizer.encode(sample)))
    bytes_per_token = sum(len(text.encode()) for text in sample) / max(tokens, 1)
    made = {"config": vars(config), "vocab_size": tokenizer.get_vocab_size(), "hash": tokenizer.hash}
    record = {"stage": "tok_train", **made, **seen, "seconds": seconds, "bytes_per_token": bytes_per_token}
    write_record(get_base_dir() / "evals" / "tok_train.json", record)
    print0(
        f"{tokenizer.get_vocab_size()} tokens from {seen['chars']:,} characters of {seen['documents']:,} documents "
        f"in {seconds:.1f} s; {bytes_per_token:.2f} bytes per token on validation text"
    )


if __name__ == "__main__":
    cli.run(main)
