"""A prepared dataset: its shards, and the documents in them.

    datasets/NAME/
        manifest.json            source, licence, and each shard with its size, hash and split
        shard_00000.parquet      a column `text`, one document a row
        shard_00001.parquet      ...
        shard_val.parquet        the validation shard; of a download, the one with the last number

dataset.py makes such a folder; every stage that trains or evaluates reads it through this file.

The validation shard is chosen once and fixed in the manifest by its hash. If it is missing or has changed, that is an
error, because losses on another validation set could not be compared.
"""

import codecs
import contextlib
import io
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

    A training shard may still be downloading while the manifest is not `complete`. Raises ValueError if any other shard
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

COMPRESSED = {".gz": "gzip", ".zst": "zstd"}  # .jsonl and .txt are read from these, too; Arrow's names
# Byte order marks of text files that are not UTF-8. UTF-32 comes first, because its mark begins with that of UTF-16.
ENCODING_MARKS = {
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
NAMED = 5  # so many skipped documents are printed with file and line; the others are only counted


def iterate_documents(paths: Iterable[Path], counts: Counter[str] | None = None) -> Iterator[str]:
    """Yield the documents of .parquet (column `text`), .jsonl (key `text`) and .txt (one document a file) files.

    NULs are removed, and surrogates and undecodable bytes become U+FFFD. Lines and rows without text are skipped.
    counts: both are counted here, as "cleaned" and "skipped", and the first skipped ones are printed.
    Raises ValueError if a file as a whole cannot be read.
    """
    readers = {".parquet": _read_parquet, ".jsonl": _read_jsonl, ".txt": _read_txt}
    for path in paths:
        if not path.exists():
            raise ValueError(f"{path} is not there (yet): let its download end, or prepare the dataset again")
        kind = file_kind(path)
        unit = "row" if kind == ".parquet" else "line"
        number = 0
        for number, text in readers[kind](path):
            clean = _cleaned(text)
            if clean:
                yield clean
            if counts is None:
                continue
            if not clean:
                counts["skipped"] += 1
                if counts["skipped"] <= NAMED:
                    print(f"skipped {path}, {unit} {number}: no text", flush=True)
            elif clean != text:
                counts["cleaned"] += 1
        if number == 0 and counts is not None:
            print(f"skipped {path}: it is empty", flush=True)


def file_kind(path: Path) -> str:
    """Return a file's suffix in lower case, such as .jsonl, also for .jsonl.gz and .jsonl.zst."""
    name = path.name.lower()
    for ending in COMPRESSED:
        if name.endswith((f".jsonl{ending}", f".txt{ending}")):
            name = name.removesuffix(ending)
    return Path(name).suffix


def _cleaned(text: str | None) -> str:
    """Return `text` as tokenizers can take it, "" if it is blank."""
    clean = (text or "").replace("\0", "")
    try:
        clean.encode()
    except UnicodeEncodeError:
        clean = re.sub("[\ud800-\udfff]", "\ufffd", clean)
    return clean if clean.strip() else ""


# The readers yield the number of each row or line, and its text: None if it has none. Bytes that are not UTF-8 become
# lone surrogates, which `_cleaned` replaces.

Numbered = Iterator[tuple[int, str | None]]


def _read_txt(path: Path) -> Numbered:
    with _open_text(path) as file:
        yield 1, file.read().replace("\r\n", "\n")


def _read_jsonl(path: Path) -> Numbered:
    with _open_text(path) as lines:
        for number, line in enumerate(lines, start=1):
            line = line.removeprefix("\ufeff").strip()
            if not line:
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                row = None
            text = row.get("text") if isinstance(row, dict) else None
            yield number, text if isinstance(text, str) else None


@contextlib.contextmanager
def _open_text(path: Path) -> Iterator[io.TextIOWrapper]:
    """Open a text file, compressed or not. It is UTF-8 unless it begins with the mark of UTF-16 or UTF-32."""
    import pyarrow as pa

    # Given, because Arrow itself recognizes compressed files by lower-case endings only.
    compression = COMPRESSED.get(path.suffix.lower())
    with damage_named(path), pa.input_stream(path, compression=compression) as stream:
        buffered = io.BufferedReader(stream)
        start = buffered.peek(4)
        encoding = "utf-8-sig"
        errors = "surrogateescape"
        for mark, name in ENCODING_MARKS.items():
            if start.startswith(mark):
                encoding = name
                errors = "replace"  # surrogateescape has no surrogates for bytes below 128
                break
        yield io.TextIOWrapper(buffered, encoding=encoding, errors=errors, newline="\n")


def _read_parquet(path: Path) -> Numbered:
    import pyarrow as pa
    from pyarrow import parquet

    if path.stat().st_size == 0:
        return
    with damage_named(path):
        file = parquet.ParquetFile(path)
        if file.metadata.num_rows == 0:  # such files may be without columns, too
            return
        names = file.schema_arrow.names
        problem = f"{path} has no column 'text' of strings (it has {', '.join(names)}): rename or convert"
        if names.count("text") != 1:
            raise ValueError(problem)
        number = 0
        for batch in file.iter_batches(1024, columns=["text"]):
            # Every kind of strings and bytes can be cast to this one (views, dictionaries, ...), and nothing else can.
            try:
                raw = batch["text"].cast(pa.large_binary())
            except pa.ArrowNotImplementedError as error:
                raise ValueError(problem) from error
            for value in raw.to_pylist():
                number += 1
                text = None if value is None else value.decode("utf-8", "surrogateescape")
                yield number, text


@contextlib.contextmanager
def damage_named(path: Path) -> Iterator[None]:
    """Turn an error of pyarrow in the block into a ValueError that names the damaged file."""
    import pyarrow as pa

    try:
        yield
    except UnicodeEncodeError as error:
        raise ValueError(f"{str(path)!a}: pyarrow opens only files whose names are UTF-8: rename it") from error
    except (pa.ArrowException, OSError) as error:
        message = f"{path} is damaged ({error}): delete or replace it, then prepare the dataset again"
        raise ValueError(message) from error
