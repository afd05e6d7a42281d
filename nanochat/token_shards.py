"""Token shards: documents tokenized once, kept on disk, read through memory maps.

A shard is a folder of flat files (ids, document offsets, for conversations a mask) and the row plans made from it.
Its name holds the hashes of tokenizer and source, so that nothing stale is ever read.
"""

import contextlib
import fcntl
import functools
import hashlib
import io
import itertools
import os
import shutil
import tempfile
import time
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nanochat.common import atomic_write, atomic_write_json, fsync_dir, read_json, sha256_file
from nanochat.conversation import Rendered
from nanochat.dataset import dataset_dir, shard_records
from nanochat.documents import iterate_documents
from nanochat.packing import pack
from nanochat.tokenizer import Tokenizer

WAIT_SECONDS = 3600.0  # for a shard to arrive
Document = tuple[Sequence[int], Sequence[int] | None]  # ids; mask of a conversation


class TokenShard:
    """The token ids of one source shard; `make` writes its folder on first use when it is not there.

    Of several processes or threads that want a shard, one makes it and the others wait for its lock.
    """

    def __init__(self, folder: Path, make: Callable[[], None] | None = None) -> None:
        self.folder, self._make = folder, make

    @functools.cached_property
    def meta(self) -> dict[str, Any]:
        """Counts of documents and tokens, dtype, BOS id, and whether these are conversations, to be kept whole."""
        if not self.folder.exists() and self._make is not None:
            with _lock(self.folder):
                if not self.folder.exists():
                    self._make()
        return read_json(self.folder / "meta.json")

    @functools.cached_property
    def ids(self) -> np.ndarray:
        """(tokens,) uint16 or uint32: all documents, one after the other."""
        return self._array("ids", self.meta["dtype"], self.meta["tokens"])

    @functools.cached_property
    def offsets(self) -> np.ndarray:
        """(documents + 1,) int64: document i is ids[offsets[i] : offsets[i + 1]]."""
        return self._array("offsets", "int64", self.meta["documents"] + 1)

    @functools.cached_property
    def mask(self) -> np.ndarray | None:
        """(tokens,) uint8, 1 where a conversation's token is supervised; None for text."""
        return self._array("mask", "uint8", self.meta["tokens"]) if self.meta["conversations"] else None

    def _array(self, name: str, dtype: str, count: int) -> np.ndarray:
        path = self.folder / f"{name}.bin"
        if not path.exists() or sha256_file(path) != self.meta.get("sha256", {}).get(name):
            raise self._damaged(path)
        return np.asarray(np.memmap(path, dtype, "r")) if count else np.empty(0, dtype)

    def _damaged(self, path: Path) -> ValueError:
        return ValueError(f"{path} is missing or damaged: delete {self.folder}, it will be made again")

    def row_count(self, row_tokens: int, seed: int, epoch: int) -> int:
        """How many rows this shard has in an epoch."""
        return len(self.plan(row_tokens, seed, epoch, ["rows"])[0])

    def plan(
        self, row_tokens: int, seed: int, epoch: int, names: Sequence[str] = ("rows", "start", "length")
    ) -> tuple[np.ndarray, ...]:
        """The rows of an epoch: rows_R2 (first piece, one past the last), and each piece's start and length in `ids`.

        A row without a supervised target is left out. names: what to read; a resumed run walks many shards for their
        rows alone.
        """
        whole, path = self.meta["conversations"], self.folder / f"plan_{row_tokens}_{seed}_{epoch}.npz"
        if not path.exists():
            with _lock(self.folder):
                if not path.exists():
                    plan = pack(np.diff(self.offsets), row_tokens, (seed, epoch), split=not whole)
                    rows, start = plan.rows_R2, self.offsets[plan.document] + plan.offset
                    if self.mask is not None:
                        supervised = np.concatenate([[0], np.cumsum(self.mask, dtype=np.int64)])
                        targets = np.concatenate([[0], np.cumsum(supervised[start + plan.length] - supervised[start])])
                        rows = rows[targets[rows[:, 1]] > targets[rows[:, 0]]]
                    content = io.BytesIO()
                    np.savez(content, rows=rows, start=start, length=plan.length)
                    atomic_write(path, content.getvalue())
        try:
            with np.load(path) as plan:
                return tuple(plan[name] for name in names)
        except (ValueError, KeyError, OSError, EOFError, zipfile.BadZipFile) as error:
            raise self._damaged(path) from error


def build_token_shards(dataset: str, split: str, tokenizer: Tokenizer) -> list[TokenShard]:
    """The token shards of a dataset's `split` ("train" or "val"); each is tokenized when it is first used.

    So a run may start while shards are still arriving: one that is not there when its turn comes is waited for, and
    after `WAIT_SECONDS` ValueError names it. Ids are stored without BOS: packing puts one before each piece.
    """
    root = dataset_dir(dataset) / f"tokens_{tokenizer.hash[:12]}"
    shards = []
    for path, entry in shard_records(dataset, split):
        sha256 = entry["sha256"]
        if sha256 is None:  # a mirror without hashes
            _wait_for(path)
            sha256 = sha256_file(path)
        folder = root / f"{path.stem}_{sha256[:12]}"
        shards.append(TokenShard(folder, functools.partial(_tokenize, path, sha256, folder, tokenizer)))
    if not shards:
        raise ValueError(f"dataset '{dataset}' has no shard for '{split}': prepare it again")
    return shards


def build_conversation_shards(name: str, conversations: Iterable[Rendered], tokenizer: Tokenizer) -> list[TokenShard]:
    """Token shards of rendered conversations: (ids, mask), where ids begin with BOS and mask is 1 on supervised ones.

    They are kept under datasets/`name`, named by a hash of their content: the same conversations are the same shard.
    One shard holds them all, so that rows of a mixture are shuffled throughout.
    """
    root = dataset_dir(name) / f"tokens_{tokenizer.hash[:12]}"
    temporary, digest = _write(root, conversations, tokenizer, conversations=True)
    folder = root / f"conversations_{digest[:12]}"
    _move(temporary, folder)
    return [TokenShard(folder)]


def _wait_for(path: Path) -> None:
    if path.exists():
        return
    print(f"waiting for {path} to arrive", flush=True)
    deadline = time.monotonic() + WAIT_SECONDS
    while not path.exists():
        if time.monotonic() > deadline:
            raise ValueError(f"{path} has not arrived in {WAIT_SECONDS:.0f} s: start its download again")
        time.sleep(min(0.5, WAIT_SECONDS / 10))


def _tokenize(path: Path, sha256: str, folder: Path, tokenizer: Tokenizer) -> None:
    """Tokenize one source shard into `folder`."""
    _wait_for(path)
    if sha256_file(path) != sha256:
        raise ValueError(f"{path} is not the file that the manifest names: delete it and prepare the dataset again")
    counts: Counter[str] = Counter()
    texts = iterate_documents([path], counts)
    batches = iter(lambda: list(itertools.islice(texts, 256)), [])
    began = time.monotonic()
    documents = ((ids, None) for batch in batches for ids in tokenizer.encode(batch))
    temporary, _ = _write(folder.parent, documents, tokenizer, conversations=False, counts=counts)
    _move(temporary, folder)
    meta, seconds = read_json(folder / "meta.json"), time.monotonic() - began
    skipped = f" ({counts['empty']} empty skipped, {counts['cleaned']} cleaned)" if counts.total() else ""
    what = f"{meta['documents']:,} documents{skipped}, {meta['tokens']:,} tokens"
    print(f"tokenized {path.name}: {what}, {seconds:.1f} s", flush=True)


def _write(parent: Path, documents: Iterable[Document], tokenizer: Tokenizer, **meta: Any) -> tuple[Path, str]:
    """Write documents to a new temporary folder in `parent`; that folder, and the SHA-256 of its ids and masks."""
    parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=".new-", dir=parent))
    dtype = np.dtype("uint16" if tokenizer.get_vocab_size() <= 1 << 16 else "uint32")
    digest, lengths = hashlib.sha256(), [0]
    try:
        with contextlib.ExitStack() as files:
            paths = (folder / f"{name}.bin" for name in ("ids", "mask", "offsets"))
            ids_file, mask_file, offsets_file = (files.enter_context(open(path, "wb")) for path in paths)
            for ids, mask in documents:
                columns = [(ids_file, np.array(ids, dtype).tobytes())]
                if mask is not None:
                    assert len(mask) == len(ids) and not mask[0], "one mask value an id, none on the BOS"
                    columns.append((mask_file, bytes(mask)))
                for file, column in columns:
                    file.write(column)
                    digest.update(column)
                lengths.append(len(ids))
            offsets_file.write(np.cumsum(lengths, dtype=np.int64).tobytes())
            for file in (ids_file, mask_file, offsets_file):
                file.flush()
                os.fsync(file.fileno())
        meta |= {"documents": len(lengths) - 1, "tokens": sum(lengths), "dtype": dtype.name}
        meta |= {"sha256": {path.stem: sha256_file(path) for path in sorted(folder.iterdir())}}
        atomic_write_json(folder / "meta.json", {**meta, "bos": tokenizer.get_bos_token_id()})
    except BaseException:
        shutil.rmtree(folder)
        raise
    return folder, digest.hexdigest()


def _move(temporary: Path, folder: Path) -> None:
    """Give a finished folder its name; if another process was faster, its equal work stands."""
    try:
        os.rename(temporary, folder)
    except OSError:
        shutil.rmtree(temporary)
        if not folder.exists():
            raise
    fsync_dir(folder.parent)


@contextlib.contextmanager
def _lock(folder: Path) -> Iterator[None]:
    """One process or thread at a time; the system frees the lock of a process that dies."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with open(folder.with_name(f".{folder.name}.lock"), "w") as f:
        fcntl.flock(f, fcntl.LOCK_EX)
        yield
