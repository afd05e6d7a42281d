"""Bytes per token by kind of text, beside GPT-2's and GPT-4's encodings: python -m scripts.tok_eval

More bytes per token is better: the same text is fewer steps to train on and to generate. The samples of tok_eval.txt
are of several languages, code, mathematics and emoji; the validation text of a dataset is measured beside them.
"""

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

SAMPLES = Path(__file__).with_suffix(".txt")

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
    """Return True if tiktoken has `encoding` on this machine: without a network it waits long for one that it lacks."""
    default = os.path.join(tempfile.gettempdir(), "data-gym-cache")
    folder = os.environ.get("TIKTOKEN_CACHE_DIR", os.environ.get("DATA_GYM_CACHE_DIR", default))
    return bool(folder) and all(Path(folder, name).is_file() for name in CACHED_FILES[encoding])


def measure(texts: list[str], tokenizers: dict[str, Tokenizer]) -> dict[str, Any]:
    """Return the texts' bytes, and for each tokenizer its tokens, bytes per token, and ours over its (above 1: ours is
    shorter)."""
    row: dict[str, Any] = {"bytes": sum(len(text.encode()) for text in texts)}
    for name, tokenizer in tokenizers.items():
        rows = tokenizer.encode(texts)
        for text, ids in zip(texts, rows):
            if tokenizer.decode(ids) != text:
                raise RuntimeError(f"{name} does not restore a text that begins {text[:40]!r}")
        tokens = sum(len(ids) for ids in rows)
        row[name] = {"tokens": tokens, "bytes_per_token": row["bytes"] / max(tokens, 1)}
        row[name]["ratio"] = row["ours"]["bytes_per_token"] / row[name]["bytes_per_token"]
    return row


def main() -> None:
    config = cli.parse(Config, description=__doc__)

    tokenizers = {"ours": load_tokenizer()}
    for name in CACHED_FILES:
        if is_cached(name):
            tokenizers[name] = Tokenizer.from_pretrained(name)
        else:
            print0(f"{name}: skipped, not in tiktoken's cache (Tokenizer.from_pretrained({name!r}) downloads it once)")

    texts = {name: [text] for name, text in read_sections(SAMPLES).items()}
    if (dataset_dir(config.dataset) / "manifest.json").exists():
        validation = iterate_documents(list_shards(config.dataset, "val"))
        texts["validation"] = list(islice(validation, config.max_docs))
    else:
        print0(f"validation: skipped, no dataset {config.dataset} (python -m nanochat.dataset --name {config.dataset})")

    print0("bytes per token, and ours over the other's")
    print0(f"{'text':16}{'bytes':>10}" + "".join(f"{name:>14}" for name in tokenizers))
    rows = {}
    for kind, documents in texts.items():
        row = measure(documents, tokenizers)
        rows[kind] = row
        columns = [f"{row[name]['bytes_per_token']:7.2f}{row[name]['ratio']:7.2f}" for name in tokenizers]
        print0(f"{kind:16}{row['bytes']:10,}{''.join(columns)}")

    record = {
        "stage": "tok_eval",
        "hash": tokenizers["ours"].hash,
        "vocab_sizes": {name: tokenizer.get_vocab_size() for name, tokenizer in tokenizers.items()},
        "texts": rows,
    }
    write_record(get_base_dir() / "evals" / "tok_eval.json", record)


if __name__ == "__main__":
    cli.run(main)
