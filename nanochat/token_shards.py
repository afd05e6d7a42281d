"""Documents -> token ids -> packed rows, on disk.

Training reads rows of T+1 token ids: the first T are the inputs, the last T the targets. Rows are packed once for each
(tokenizer, text, T) and kept under the base directory, so that training only has to copy them:

    datasets/NAME/rows_<tokenizer>_<T+1>/<shard>_<hash of its text>/
        rows.bin    (R, T+1) token ids, uint16 or uint32
        mask.bin    (R, T+1) uint8, 1 where a token is a target; only the rows of fine-tuning have one
        meta.json   R, dtype, counts, hashes; written last

Folder names hold the hashes of tokenizer and text, so a row of another tokenizer or of older text is never read.

Packing is best fit (packing.py). Each piece of text in a row starts with <|bos|>: the model learns that nothing before
it belongs to the same document, and generation starts from the same token. A document that is longer than a row, or
than what is left of one, is split over rows. Nothing is cropped, so each token of the text is in exactly one row.

`TextRows` makes the rows of a source shard when they are first asked for. So a run can start when the first shards have
been downloaded. `pack_masked` makes the rows of fine-tuning: conversations with masks, and pretraining text replayed
among them, whose mask is 1 throughout. There nothing is split: each document stays whole.
"""

import hashlib
import itertools
import os
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nanochat.common import atomic_write_json, fsync_dir, read_json, sha256_file
from nanochat.documents import dataset_dir, iterate_documents, read_manifest, shard_records
from nanochat.loss import IGNORED
from nanochat.packing import Piece, plan_rows
from nanochat.tokenizer import Tokenizer

# Seconds to wait for a shard that is still being downloaded.
ARRIVAL_TIMEOUT = 3600.0
# Shards whose rows are shuffled together: at SHARD_BYTES of text each, 1 GiB of text is tokenized before a first step.
GROUP_SHARDS = 16


# --- rows on disk, read


@dataclass(frozen=True)
class RowFile:
    """The packed rows of one shard, as memory maps."""

    rows_RT1: np.ndarray  # token ids
    mask_RT1: np.ndarray | None  # 1 where a token is a target; None: every token is one, but for the padding
    padding: int  # without a mask: tokens at the end of the last row that are no text and so no targets

    def read(self, rows_K: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the ids of some rows (K, T+1), and their targets (K, T), int64: IGNORED where none counts."""
        ids_KT1 = self.rows_RT1[rows_K]
        targets_KT = ids_KT1[:, 1:].astype(np.int64)
        if self.mask_RT1 is not None:
            targets_KT[self.mask_RT1[rows_K, 1:] == 0] = IGNORED
        elif self.padding:
            is_last_K = rows_K == len(self.rows_RT1) - 1
            targets_KT[is_last_K, -self.padding :] = IGNORED
        return ids_KT1, targets_KT


class PackedRows:
    """The packed rows of several shards: all that a loader reads from.

    An epoch takes the shards in their order, `group_shards` at a time, and shuffles the rows of a group. Subclasses
    make the rows that are not there yet. Threads may share it: at worst, two of them look up the same number.
    """

    def __init__(self, folders: Sequence[Path], sequence_len: int, group_shards: int, may_grow: bool = False) -> None:
        self.folders = list(folders)
        self.may_grow = may_grow  # a download may get further shards after these
        self.sequence_len = sequence_len
        shards = range(len(self.folders))
        self.groups = [shards[first : first + group_shards] for first in shards[::group_shards]]
        self._counts: dict[int, int] = {}  # shard -> its number of rows
        self._files: dict[int, RowFile] = {}

    def make(self, shard: int) -> None:
        """Make the rows of a shard if they are not on disk. Those of `pack_masked` are, so there is nothing to do."""

    def count(self, shard: int) -> int:
        """Return the number of rows of a shard. Waits for the shard to arrive, and packs it, if need be."""
        if shard not in self._counts:
            self.make(shard)
            self._counts[shard] = read_json(self.folders[shard] / "meta.json")["rows"]
        return self._counts[shard]

    def count_group(self, group: int) -> int:
        """Return the number of rows of a group of shards."""
        return sum(self.count(shard) for shard in self.groups[group])

    def total(self) -> int:
        """Return the number of rows of all shards, which are all packed for that."""
        return sum(self.count(shard) for shard in range(len(self.folders)))

    def open(self, shard: int) -> RowFile:
        """Map the rows of a shard. Raises ValueError if a file is missing or its hash is not what meta.json says."""
        if shard not in self._files:
            self.make(shard)
            folder = self.folders[shard]
            meta = read_json(folder / "meta.json")
            for name, sha256 in meta["sha256"].items():
                path = folder / name
                if not path.exists() or sha256_file(path) != sha256:
                    raise ValueError(f"{path} is missing or damaged: delete {folder}, it will be made again")
            shape = (meta["rows"], self.sequence_len + 1)
            rows_RT1 = np.memmap(folder / "rows.bin", meta["dtype"], "r", shape=shape)
            masked = meta["conversations"]
            mask_RT1 = np.memmap(folder / "mask.bin", "uint8", "r", shape=shape) if masked else None
            self._files[shard] = RowFile(rows_RT1, mask_RT1, meta["padding"])
        return self._files[shard]


def data_hash(*rows: PackedRows) -> str:
    """Return a hash that changes when the text does: that of the folders' names, which hold hashes of it."""
    names = []
    for each in rows:
        folders = each.folders[:1] if each.may_grow else each.folders
        names += [folder.name for folder in folders]
    return hashlib.sha256(" ".join(names).encode()).hexdigest()


class TextRows(PackedRows):
    """The rows of a dataset's split, "train" or "val", made when they are first asked for."""

    def __init__(self, dataset: str, split: str, tokenizer: Tokenizer, sequence_len: int) -> None:
        """Raises ValueError if the dataset is not prepared, or lacks a shard that is not being downloaded."""
        manifest = read_manifest(dataset)
        records = shard_records(dataset, split)
        if not records:
            raise ValueError(f"dataset '{dataset}' has no shard for '{split}': prepare it again")
        root = _rows_folder(dataset, tokenizer, sequence_len)
        is_download = manifest.get("shuffled", False)
        self.tokenizer = tokenizer
        self.paths = [path for path, _ in records]
        self.hashes = [entry["sha256"] for _, entry in records]
        super().__init__(
            folders=[root / f"{path.stem}_{entry['sha256'][:12]}" for path, entry in records],
            sequence_len=sequence_len,
            # A dataset of the hub is shuffled already. One shard at a time lets a run start when the first has come.
            group_shards=1 if is_download else GROUP_SHARDS,
            may_grow=is_download,
        )

    def make(self, shard: int) -> None:
        """Tokenize and pack a shard if its rows are not on disk. Of several processes one works, the others wait.

        Waits for a shard that is still being downloaded. Raises ValueError if it does not arrive within
        `ARRIVAL_TIMEOUT` seconds, or if its hash is not the manifest's.
        """
        from filelock import FileLock  # its last release for Python 3.10 tries out the file system when it is imported

        folder = self.folders[shard]
        if folder.exists():
            return
        _wait_for(self.paths[shard])
        folder.parent.mkdir(parents=True, exist_ok=True)
        # One process or thread works on a folder at a time. The system frees the lock of a process that dies.
        with FileLock(folder.with_name(f".{folder.name}.lock")):
            if not folder.exists():  # another process may have made it while this one waited for the lock
                _pack_text(self.paths[shard], self.hashes[shard], folder, self.tokenizer, self.sequence_len + 1)


def _rows_folder(dataset: str, tokenizer: Tokenizer, sequence_len: int) -> Path:
    return dataset_dir(dataset) / f"rows_{tokenizer.hash[:12]}_{sequence_len + 1}"


def _wait_for(path: Path) -> None:
    """Wait until a file is there. Downloads get their name when they are complete."""
    if path.exists():
        return
    print(f"waiting for {path} to be downloaded", flush=True)
    deadline = time.monotonic() + ARRIVAL_TIMEOUT
    while not path.exists():
        if time.monotonic() > deadline:
            raise ValueError(f"{path} has not arrived in {ARRIVAL_TIMEOUT:.0f} s: start its download again")
        time.sleep(min(0.5, ARRIVAL_TIMEOUT / 10))


# --- rows on disk, written


def _pack_text(path: Path, sha256: str, folder: Path, tokenizer: Tokenizer, row_tokens: int) -> None:
    """Tokenize one source shard and write its rows to `folder`."""
    if sha256_file(path) != sha256:
        raise ValueError(f"{path} is not the file that the manifest names: delete it and prepare the dataset again")
    began = time.monotonic()
    counts: Counter[str] = Counter()
    documents = _tokenized(iterate_documents([path], counts), tokenizer)
    with tempfile.TemporaryDirectory(prefix=".new-", dir=folder.parent) as temporary:
        meta = write_rows(Path(temporary), documents, row_tokens, _dtype(tokenizer), tokenizer.get_bos_token_id())
        _rename(Path(temporary, "rows"), folder)
    skipped = f" ({counts['skipped']} skipped, {counts['cleaned']} cleaned)" if counts.total() else ""
    print(
        f"packed {path.name}: {meta['documents']:,} documents{skipped}, {meta['tokens']:,} tokens "
        f"in {meta['rows']:,} rows of {row_tokens - 1}, {time.monotonic() - began:.1f} s",
        flush=True,
    )


def _tokenized(texts: Iterator[str], tokenizer: Tokenizer) -> Iterator[tuple[list[int], None]]:
    """Token ids of each text, without BOS: packing puts one before each piece. Batches are encoded in threads."""
    while batch := list(itertools.islice(texts, 256)):
        for ids in tokenizer.encode(batch):
            yield ids, None


def pack_masked(
    name: str, documents: Iterable[tuple[list[int], list[int]]], tokenizer: Tokenizer, sequence_len: int
) -> PackedRows:
    """Write documents, each as (ids, mask), as rows under datasets/`name`, and return the rows.

    They are conversations and replayed text; ids begin with BOS. They are streamed to disk: memory does not grow with
    their number. The folder is named by a hash of the rows, so equal rows are stored once. Raises ValueError if there
    is no document, or if one is longer than a row.
    """
    root = _rows_folder(name, tokenizer, sequence_len)
    root.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".new-", dir=root) as temporary:
        meta = write_rows(
            Path(temporary),
            documents,
            row_tokens=sequence_len + 1,
            dtype=_dtype(tokenizer),
            bos=tokenizer.get_bos_token_id(),
            masked=True,
        )
        content = hashlib.sha256("".join(meta["sha256"].values()).encode()).hexdigest()
        folder = root / f"conversations_{content[:12]}"
        _rename(Path(temporary, "rows"), folder)
    return PackedRows([folder], sequence_len, group_shards=1)


def _dtype(tokenizer: Tokenizer) -> np.dtype:
    return np.dtype("uint16" if tokenizer.get_vocab_size() <= 1 << 16 else "uint32")


def write_rows(
    folder: Path,
    documents: Iterable[tuple[Sequence[int], Sequence[int] | None]],
    row_tokens: int,
    dtype: np.dtype,
    bos: int,
    masked: bool = False,
) -> dict[str, Any]:
    """Write `documents`, (ids, mask), as rows to `folder`/rows, and return what its meta.json says.

    masked: documents have masks, begin with BOS, and stay whole. Otherwise masks are None, every token is a target, and
    documents may be split. They are first written end to end, to files beside the rows: best fit needs all lengths
    before it can fill a row.
    """
    lengths = []
    with open(folder / "ids.bin", "wb") as ids_file, open(folder / "mask.bin", "wb") as mask_file:
        for ids, mask in documents:
            ids_file.write(np.array(ids, dtype).tobytes())
            lengths.append(len(ids))
            if masked:
                assert mask is not None and len(mask) == len(ids), "one mask value for each id"
                assert not mask[0], "the BOS is no target: it may follow another document"
                mask_file.write(bytes(mask))
    if not any(lengths):
        raise ValueError("no text with anything to learn: give the dataset more text or longer rows")

    rows = plan_rows(lengths, row_tokens, split=not masked)
    begins = np.cumsum([0, *lengths]).tolist()  # where each document begins in the files
    rows_folder = folder / "rows"
    rows_folder.mkdir()
    padding = copy_pieces(
        source=folder / "ids.bin",
        target=rows_folder / "rows.bin",
        rows=rows,
        begins=begins,
        row_tokens=row_tokens,
        dtype=dtype,
        fill=bos,
        # A piece of text is put behind a BOS, which the row holds already; a masked document brings its own.
        margin=0 if masked else 1,
    )
    if masked:
        copy_pieces(
            source=folder / "mask.bin",
            target=rows_folder / "mask.bin",
            rows=rows,
            begins=begins,
            row_tokens=row_tokens,
            dtype=np.dtype("uint8"),
            fill=0,
            margin=0,
        )
    meta = {
        "rows": len(rows),
        "padding": padding,  # read where there is no mask: a mask is 0 there
        "documents": len(lengths),
        "tokens": sum(lengths),
        "conversations": masked,  # this key is older than replayed text, which is masked too
        "dtype": dtype.name,
        "sha256": {path.name: sha256_file(path) for path in sorted(rows_folder.iterdir())},
    }
    atomic_write_json(rows_folder / "meta.json", meta)
    return meta


def copy_pieces(
    source: Path,
    target: Path,
    rows: Sequence[Sequence[Piece]],
    begins: Sequence[int],
    row_tokens: int,
    dtype: np.dtype,
    fill: int,
    margin: int,
) -> int:
    """Copy the pieces of documents, which begin in `source` at `begins`, to their places in the rows of `target`.

    fill: the value where no piece is, `margin` places before each piece and after the last one. Returns the number of
    places after the last piece of the last row.
    """
    values = np.memmap(source, dtype, "r")
    with open(target, "wb") as file:
        for pieces in rows:
            row = np.full(row_tokens, fill, dtype)
            end = 0
            for document, offset, length in pieces:
                first = begins[document] + offset
                start = end + margin
                end = start + length
                row[start:end] = values[first : first + length]
            file.write(row.tobytes())
    return row_tokens - end


def _rename(temporary: Path, folder: Path) -> None:
    """Give a finished folder its name. If another process was faster, its equal work stands."""
    try:
        os.rename(temporary, folder)
    except OSError:
        if not folder.exists():
            raise
        shutil.rmtree(temporary)
    fsync_dir(folder.parent)
