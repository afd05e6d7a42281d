"""Documents in files: read from Parquet, JSON lines and plain text, cleaned, and written as Parquet shards."""

import contextlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from nanochat.common import atomic_write, sha256_file


def iterate_documents(paths: Iterable[Path | str], counts: Counter[str] | None = None) -> Iterator[str]:
    """Yield the documents of .parquet (column `text`), .jsonl (key `text`) and .txt (one each) files.

    NULs are removed, and surrogates and undecodable bytes become U+FFFD; empty documents are skipped. Both are
    counted in `counts` as "cleaned" and "empty". Raises ValueError if a file cannot be read.
    """
    counts = Counter() if counts is None else counts
    readers = {".parquet": _read_parquet, ".jsonl": _read_jsonl, ".txt": _read_txt}
    for path in map(Path, paths):
        if not path.exists():
            raise ValueError(f"{path} is not there (yet): let its download end, or prepare the dataset again")
        for text in readers[path.suffix.lower()](path):
            clean = (text or "").replace("\0", "")
            try:
                clean.encode()
            except UnicodeEncodeError:
                clean = re.sub("[\ud800-\udfff]", "\ufffd", clean)
            if not clean.strip():
                counts["empty"] += 1
                continue
            counts["cleaned"] += clean != text
            yield clean


# The readers decode bytes that are not UTF-8 to lone surrogates, so that `iterate_documents` replaces and counts them.


def _read_txt(path: Path) -> Iterator[str]:
    yield path.read_bytes().decode("utf-8", "surrogateescape").removeprefix("\ufeff")


def _read_jsonl(path: Path) -> Iterator[str]:
    with open(path, encoding="utf-8", errors="surrogateescape", newline="\n") as lines:
        for number, line in enumerate(lines, 1):
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
                raw = batch["text"].cast(pa.large_binary()).to_pylist()
                yield from (row and row.decode("utf-8", "surrogateescape") for row in raw)


@contextlib.contextmanager
def parquet_errors(path: Path) -> Iterator[None]:
    """Turn what pyarrow raises about a damaged file into a ValueError that names it."""
    import pyarrow as pa

    try:
        yield
    except (pa.ArrowException, OSError) as error:
        message = f"{path} is not a whole Parquet file ({error}): delete or replace it, then prepare the dataset again"
        raise ValueError(message) from error


class ShardWriter:
    """Gathers documents of one split and writes them as Parquet shards, each whole or not at all."""

    def __init__(self, folder: Path, split: str, shard_bytes: int | None = None, max_shards: int | None = None) -> None:
        self.folder = folder
        self.split = split
        self.shard_bytes = shard_bytes
        self.max_shards = max_shards
        self.entries: list[dict[str, Any]] = []  # of the manifest
        self._texts: list[str] = []
        self._bytes = 0

    def add(self, text: str) -> None:
        """Take one more document, unless there are enough shards."""
        if len(self.entries) == self.max_shards:
            return
        self._texts.append(text)
        self._bytes += len(text.encode())
        if self.shard_bytes and self._bytes >= self.shard_bytes:
            self.end_shard()

    def end_shard(self) -> None:
        """Write the documents gathered so far as a shard."""
        import pyarrow as pa
        from pyarrow import parquet

        if not self._texts:
            return
        number = "val" if self.split == "val" else f"{len(self.entries):05d}"
        path = self.folder / f"shard_{number}.parquet"
        table = pa.table({"text": pa.array(self._texts, pa.large_string())})
        content = pa.BufferOutputStream()
        parquet.write_table(table, content, compression="zstd", row_group_size=1024)
        atomic_write(path, content.getvalue().to_pybytes())
        self.entries.append({
            "file": path.name,
            "sha256": sha256_file(path),
            "bytes": path.stat().st_size,
            "documents": len(self._texts),
            "split": self.split,
        })  # fmt: skip
        self._texts = []
        self._bytes = 0
