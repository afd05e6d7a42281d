"""Bytes per token by kind of text, beside GPT-2's and GPT-4's encodings: python -m scripts.tok_eval"""

import os
import tempfile
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from nanochat import cli
from nanochat.common import get_base_dir, print0, read_sections, write_record
from nanochat.documents import dataset_dir, iterate_documents, list_shards
from nanochat.tokenizer import Tokenizer, load_tokenizer

# The files tiktoken keeps for an encoding (it names them by the SHA-1 of their address).
CACHED_FILES = {
    "gpt2": ("6d1cbeee0f20b3d9449abfede4726ed8212e3aee", "6c7ea1a7e38e3a7f062df639a5b80947f075ffe6"),
    "cl100k_base": ("9b5ad71b2ce5302211f9c61530b329a4922fc6a4",),
}


@dataclass(frozen=True)
class Config:
    """Which dataset's validation text is measured beside the samples."""

    dataset: str = cli.option("builtin", "dataset whose validation text is measured, if it is there")
    max_docs: int = cli.option(1000, "validation documents to measure")


def is_cached(encoding: str) -> bool:
    """Whether tiktoken can load `encoding` without the network (where it would wait long for an absent one)."""
    default = os.path.join(tempfile.gettempdir(), "data-gym-cache")
    folder = os.environ.get("TIKTOKEN_CACHE_DIR", os.environ.get("DATA_GYM_CACHE_DIR", default))
    return bool(folder) and all(Path(folder, name).is_file() for name in CACHED_FILES[encoding])


def load_tokenizers() -> dict[str, Tokenizer]:
    """Ours, then those of GPT-2 and GPT-4 that are on this machine."""
    tokenizers = {"ours": load_tokenizer()}
    for name in CACHED_FILES:
        if is_cached(name):
            tokenizers[name] = Tokenizer.from_pretrained(name)
        else:
            print0(f"{name}: skipped, not in tiktoken's cache (Tokenizer.from_pretrained({name!r}) downloads it once)")
    return tokenizers


def load_samples() -> dict[str, str]:
    """Text by kind, from tok_eval.txt: languages, code, mathematics and emoji."""
    return read_sections(Path(__file__).with_suffix(".txt"))


def load_texts(config: Config) -> dict[str, list[str]]:
    """The samples, and the dataset's validation documents when it has been made."""
    texts = {name: [text] for name, text in load_samples().items()}
    if (dataset_dir(config.dataset) / "manifest.json").exists():
        validation = iterate_documents(list_shards(config.dataset, "val"))
        texts["validation"] = list(islice(validation, config.max_docs))
    else:
        print0(f"validation: skipped, no dataset {config.dataset} (python -m nanochat.dataset --name {config.dataset})")
    return texts


def measure(texts: list[str], tokenizers: dict[str, Tokenizer]) -> dict[str, Any]:
    """Tokens and bytes per token of each tokenizer, and the ratio of ours to the others' (above 1: ours is shorter)."""
    row: dict[str, Any] = {"bytes": sum(len(text.encode()) for text in texts)}
    for name, tokenizer in tokenizers.items():
        ids = tokenizer.encode(texts)
        for text, one in zip(texts, ids):
            if tokenizer.decode(one) != text:
                raise RuntimeError(f"{name} does not restore a text that begins {text[:40]!r}")
        tokens = sum(map(len, ids))
        row[name] = {"tokens": tokens, "bytes_per_token": row["bytes"] / max(tokens, 1)}
        row[name]["ratio"] = row["ours"]["bytes_per_token"] / row[name]["bytes_per_token"]
    return row


def print_table(rows: dict[str, dict[str, Any]], names: list[str]) -> None:
    """Bytes a token of each text by each tokenizer of `names`, ours first, with the ratio of ours to the others."""
    header = f"{'bytes per token':16}{'bytes':>10}{'ours':>8}"
    print0(header + "".join(f"{name:>14}{'ratio':>7}" for name in names[1:]))
    for text, row in rows.items():
        line = f"{text:16}{row['bytes']:10,}{row['ours']['bytes_per_token']:8.2f}"
        print0(line + "".join(f"{row[name]['bytes_per_token']:14.2f}{row[name]['ratio']:7.2f}" for name in names[1:]))


def main() -> None:
    config = cli.parse(Config, description=__doc__)
    tokenizers = load_tokenizers()
    rows = {name: measure(texts, tokenizers) for name, texts in load_texts(config).items()}
    print_table(rows, list(tokenizers))
    sizes = {name: tokenizer.get_vocab_size() for name, tokenizer in tokenizers.items()}
    record = {"stage": "tok_eval", "hash": tokenizers["ours"].hash, "vocab_sizes": sizes, "texts": rows}
    write_record(get_base_dir() / "evals" / "tok_eval.json", record)


if __name__ == "__main__":
    cli.run(main)
