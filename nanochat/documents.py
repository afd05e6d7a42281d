"""The documents of a prepared dataset: which shards there are, and the texts in them.

    datasets/NAME/
        manifest.json            source, licence, and each shard with its size, hash and split
        shard_00000.parquet      a column `text`, one document a row
        shard_00001.parquet      ...
        shard_val.parquet        the validation shard; of a download, the one with the last number

dataset.py makes such a folder; every stage that trains or evaluates reads it through this file.

The validation shard is chosen once and fixed in the manifest by its hash. If it is missing or has changed, that is an
error, because losses on another validation set could not be compared.
"""

import contextlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nanochat.common import get_base_dir, read_json, sha256_file

Manifest = dict[str, Any]  # see read_manifest


@dataclass(frozen=True)
class Remote:
    """A dataset on the hub: `shards` files shard_00000.parquet and on, already shuffled. The last one validates."""

    repo: str
    shards: int
    licence: str


REMOTES = {
    "climbmix": Remote("karpathy/climbmix-400b-shuffle", 6543, "CC-BY-NC-4.0"),
    "fineweb-edu": Remote("karpathy/fineweb-edu-100b-shuffle", 1823, "ODC-By"),
}


# --- shards


def dataset_name(name: str) -> str:
    """Return the name that a dataset is kept under: itself, or for a path the folder's name, made safe."""
    if name == "builtin" or name in REMOTES:
        return name
    safe = re.sub(r"[^\w.-]+", "-", Path(name).resolve().name).strip("-.") or "folder"
    return f"{safe}-folder" if safe == "builtin" or safe in REMOTES else safe


def dataset_dir(name: str) -> Path:
    """Return the folder of a dataset, given its name or the path it was made from."""
    return get_base_dir() / "datasets" / dataset_name(name)


def read_manifest(name: str) -> Manifest:
    """Return a prepared dataset's manifest. Raises ValueError if there is none, or if it is of another folder.

    Keys: name, source, licence, shards [{file, sha256, bytes, documents, split}], complete (false while a download goes
    on), shuffled (true if the source has shuffled its documents), counts of documents skipped or cleaned.
    """
    path = dataset_dir(name) / "manifest.json"
    if not path.exists():
        raise ValueError(f"dataset '{name}' is not prepared: run python -m nanochat.dataset --name {name}")
    manifest = read_json(path)
    if Path(name).is_dir() and "sources" in manifest and Path(manifest["source"]) != Path(name).resolve():
        raise ValueError(f"dataset '{manifest['name']}' was made from {manifest['source']}, not {name}: rename one")
    return manifest


def shard_records(name: str, split: str) -> list[tuple[Path, dict[str, Any]]]:
    """Return path and manifest entry of each shard of `split` ("train" or "val"), in order.

    A training shard may still be on its way while the manifest is not `complete`. Raises ValueError if any other shard
    is missing, or if the validation shard's bytes have changed.
    """
    manifest = read_manifest(name)
    records = []
    for entry in manifest["shards"]:
        if entry["split"] != split:
            continue
        path = dataset_dir(name) / entry["file"]
        if not path.exists() and (split == "val" or manifest["complete"]):
            raise ValueError(f"{path} of dataset '{name}' is missing: run python -m nanochat.dataset --name {name}")
        if split == "val" and sha256_file(path) != entry["sha256"]:
            raise ValueError(f"{path} is not the validation shard that the manifest names: delete it and prepare again")
        records.append((path, entry))
    return records


def list_shards(name: str, split: str) -> list[Path]:
    """Return the paths of the shards of `split`; see `shard_records` for what may be missing."""
    return [path for path, _ in shard_records(name, split)]


# --- texts


def iterate_documents(paths: Iterable[Path], counts: Counter[str] | None = None) -> Iterator[str]:
    """Yield the documents of .parquet (column `text`), .jsonl (key `text`) and .txt (one each) files.

    NULs are removed, and surrogates and undecodable bytes become U+FFFD; empty documents are skipped. Both are
    counted in `counts` as "cleaned" and "empty". Raises ValueError if a file cannot be read.
    """
    readers = {".parquet": _read_parquet, ".jsonl": _read_jsonl, ".txt": _read_txt}
    for path in paths:
        if not path.exists():
            raise ValueError(f"{path} is not there (yet): let its download end, or prepare the dataset again")
        for text in readers[path.suffix.lower()](path):
            clean = _cleaned(text)
            if counts is not None and not clean:
                counts["empty"] += 1
            elif counts is not None and clean != text:
                counts["cleaned"] += 1
            if clean:
                yield clean


def _cleaned(text: str | None) -> str:
    """Return `text` as tokenizers can take it, "" if it is blank."""
    clean = (text or "").replace("\0", "")
    try:
        clean.encode()
    except UnicodeEncodeError:
        clean = re.sub("[\ud800-\udfff]", "\ufffd", clean)
    return clean if clean.strip() else ""


# The readers decode bytes that are not UTF-8 to lone surrogates, which `_cleaned` replaces.


def _read_txt(path: Path) -> Iterator[str]:
    yield path.read_bytes().decode("utf-8", "surrogateescape").removeprefix("\ufeff")


def _read_jsonl(path: Path) -> Iterator[str]:
    with open(path, encoding="utf-8", errors="surrogateescape", newline="\n") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line.removeprefix("\ufeff"))
            except (ValueError, RecursionError):
                row = None
            if not isinstance(row, dict) or not isinstance(row.get("text"), str):
                raise ValueError(f'{path}, line {number}, is not a JSON object with a string "text": mend or remove it')
            yield row["text"]


def _read_parquet(path: Path) -> Iterator[str | None]:
    import pyarrow as pa
    from pyarrow import parquet

    with parquet_errors(path):
        file = parquet.ParquetFile(path)
        kinds = dict(zip(file.schema_arrow.names, file.schema_arrow.types))
        if kinds.get("text") not in (pa.string(), pa.large_string()):
            raise ValueError(f"{path} has no column 'text' of strings (it has {', '.join(kinds)}): rename or convert")
        for batch in file.iter_batches(1024, columns=["text"]):
            try:
                yield from batch["text"].to_pylist()
            except UnicodeDecodeError:
                for raw in batch["text"].cast(pa.large_binary()).to_pylist():
                    yield raw and raw.decode("utf-8", "surrogateescape")


@contextlib.contextmanager
def parquet_errors(path: Path) -> Iterator[None]:
    """Turn what pyarrow raises about a damaged file into a ValueError that names it."""
    import pyarrow as pa

    try:
        yield
    except (pa.ArrowException, OSError) as error:
        message = f"{path} is not a whole Parquet file ({error}): delete or replace it, then prepare the dataset again"
        raise ValueError(message) from error
