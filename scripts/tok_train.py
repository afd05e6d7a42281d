"""Train the tokenizer on a dataset's training shards: python -m scripts.tok_train --vocab-size 32768"""

import time
from collections import Counter
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


def training_texts(config: Config, seen: Counter[str]) -> Iterator[str]:
    """Yield up to `max_chars` of text: the documents' beginnings, then the rest of the long ones.

    Beginnings first, so that a few huge documents do not decide the vocabulary. What was read is counted into `seen`.
    """
    from tqdm import tqdm

    with tqdm(desc="reading", unit=" chars", unit_scale=True, disable=None) as bar:
        for part in (slice(config.doc_cap), slice(config.doc_cap, None)):
            for text in iterate_documents(list_shards(config.dataset, "train")):
                text = text[part][: config.max_chars - seen["chars"]]
                if part.start is None:
                    seen["documents"] += 1
                seen["chars"] += len(text)
                bar.update(len(text))
                yield text
                if seen["chars"] >= config.max_chars:
                    return


def main() -> None:
    config = cli.parse(Config, description=__doc__)
    began = time.perf_counter()
    seen: Counter[str] = Counter()
    tokenizer = Tokenizer.train_from_iterator(training_texts(config, seen), config.vocab_size)
    tokenizer.save(get_base_dir() / "tokenizer")
    seconds = time.perf_counter() - began

    sample = list(islice(iterate_documents(list_shards(config.dataset, "val")), 1000))
    n_bytes = sum(len(text.encode()) for text in sample)
    n_tokens = sum(len(ids) for ids in tokenizer.encode(sample))
    record = {
        "stage": "tok_train",
        "config": vars(config),
        "vocab_size": tokenizer.get_vocab_size(),
        "hash": tokenizer.hash,
        "documents": seen["documents"],
        "chars": seen["chars"],
        "seconds": seconds,
        "bytes_per_token": n_bytes / max(n_tokens, 1),
    }
    write_record(get_base_dir() / "evals" / "tok_train.json", record)
    print0(
        f"{record['vocab_size']} tokens from {record['chars']:,} characters of {record['documents']:,} documents "
        f"in {seconds:.1f} s; {record['bytes_per_token']:.2f} bytes per token on validation text"
    )


if __name__ == "__main__":
    cli.run(main)
