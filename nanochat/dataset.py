"""Where text comes from: the built-in world, a dataset of the Hugging Face hub, or a folder of your own files.

    python -m nanochat.dataset --name builtin|climbmix|fineweb-edu|PATH -n SHARDS

Every source becomes the same thing, a folder datasets/NAME of Parquet shards and a manifest (see documents.py). What is
already there is kept: preparing again continues, grows, or does nothing.

A manifest lists all shards of a download from its start, with `complete` false until the last has arrived. So training
may begin with the first shards (token_shards.py waits for the others), in the order that it would have had anyway.
"""

import hashlib
import itertools
import os
import platform
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nanochat import cli, world
from nanochat.common import atomic_write, atomic_write_json, read_json, sha256_file
from nanochat.documents import (
    REMOTES,
    Manifest,
    damage_named,
    dataset_dir,
    file_kind,
    iterate_documents,
    read_manifest,
)
from nanochat.hub import HubFile, fetch_dataset_files, hub_address, list_dataset

DEFAULT_SHARDS = 8
SHARD_BYTES = 64 << 20  # text of a shard that is made from a folder
BUILTIN_SHARD_BYTES = 1_500_000
VALIDATION_SHARE = 20  # one document in this many validates, where a source has no validation part of its own


@dataclass(frozen=True)
class Config:
    """Flags of `python -m nanochat.dataset`."""

    name: str = cli.option("builtin", "builtin, climbmix, fineweb-edu, or a folder of .parquet, .jsonl or .txt")
    shards: int | None = cli.option(None, "training shards (default: 8; of a folder all)", flag="-n")
    mirror: str | None = cli.option(None, "base URL of another hub (or set HF_ENDPOINT)")
    workers: int = cli.option(8, "parallel downloads")
    seed: int = cli.option(0, "seed of the built-in text")

    def __post_init__(self) -> None:
        cli.require_positive(self, "shards", "workers")


def main() -> None:
    config = cli.parse(Config, description="Prepare a dataset.")
    prepare(config.name, config.shards, mirror=config.mirror, workers=config.workers, seed=config.seed)


def prepare(name: str, n: int | None = None, *, mirror: str | None = None, workers: int = 8, seed: int = 0) -> Manifest:
    """Make dataset `name` ready, with at least `n` training shards, and return its manifest.

    Raises ValueError if the name is unknown, a folder is empty or has changed, or a file cannot be read.
    """
    if name == "builtin":
        manifest = _prepare_builtin(n or DEFAULT_SHARDS, seed)
    elif name in REMOTES:
        manifest = _prepare_remote(name, n or DEFAULT_SHARDS, mirror, workers)
    elif Path(name).is_dir():
        manifest = _prepare_folder(Path(name).resolve(), n)
    else:
        raise ValueError(f"--name {name}: no such folder, and not one of builtin, {', '.join(REMOTES)}")
    splits = Counter(entry["split"] for entry in manifest["shards"])
    counts = manifest["counts"]
    shards = f"{splits['train']} training shards and {splits['val']} for validation"
    print(f"dataset {manifest['name']}: {shards} in {dataset_dir(name)}")
    print(f"licence: {manifest['licence']}")
    if any(counts.values()):
        print(f"documents without text, skipped: {counts['skipped']}, cleaned: {counts['cleaned']}")
    return manifest


# --- the built-in text


def _prepare_builtin(n: int, seed: int) -> Manifest:
    """Write English prose of the Python installation, mixed with documents of the built-in world."""
    folder = dataset_dir("builtin")
    # The text depends on all of these; if one differs, the dataset is made anew.
    world_files = sorted(Path(world.__file__).parent.glob("world*"))
    world_hash = hashlib.sha256(b"".join(path.read_bytes() for path in world_files)).hexdigest()
    recipe = {"seed": seed, "n": n, "world": world_hash, "python": platform.python_version()}
    before = _whole_manifest(folder)
    if before and before["recipe"] == recipe:
        return before

    _start_anew(folder)
    train = ShardWriter(folder, "train")
    val = ShardWriter(folder, "val")
    prose = world.prose_documents()
    for index in range(n):
        share = prose[index::n]
        prose_bytes = sum(len(text.encode()) for text in share)
        world_bytes = max(BUILTIN_SHARD_BYTES // 2, BUILTIN_SHARD_BYTES - prose_bytes)
        for text in itertools.chain(share, world.documents(_hash(f"{seed} {index}"), world_bytes)):
            # By hash, so that a text that occurs twice is never on both sides.
            if _hash(text) % VALIDATION_SHARE == 0:
                val.add(text)
            else:
                train.add(text)
        train.end_shard()
    val.end_shard()
    return _save(
        folder,
        source="the standard library's documentation and the built-in world",
        licence="PSF-2.0 (standard library documentation), MIT (world text)",
        recipe=recipe,
        shards=train.entries + val.entries,
    )


# --- a dataset of the hub


def _prepare_remote(name: str, n: int, mirror: str | None, workers: int) -> Manifest:
    """Download the validation shard first, then `n` training shards."""
    folder = dataset_dir(name)
    remote = REMOTES[name]
    if n >= remote.shards:
        raise ValueError(f"-n {n}: {name} has {remote.shards - 1} training shards")
    print(f"{name}: {remote.repo}, licence {remote.licence}")
    known: dict[str, dict[str, Any]] = {}
    if (folder / "manifest.json").exists():
        known = {entry["file"]: entry for entry in read_manifest(name)["shards"]}
    n = max(n, len(known) - 1)  # a dataset only grows: a run may be reading it

    commit, listed = list_dataset(remote.repo, mirror)
    files = []
    for number in (*range(n), remote.shards - 1):
        file_name = f"shard_{number:05d}.parquet"
        if file_name not in listed:
            raise ValueError(f"{remote.repo} has no {file_name}: check the mirror, or ask for fewer shards")
        file = listed[file_name]
        if file_name in known and known[file_name]["sha256"] not in (None, file.sha256):
            raise ValueError(f"the hub's {file_name} of {name} has changed: delete {folder} to take the new data")
        files.append(file)

    facts = {
        "source": f"{hub_address(mirror)}/datasets/{remote.repo}",
        "licence": remote.licence,
        "shuffled": True,
    }
    fetch_dataset_files(remote.repo, commit, files[-1:], folder, mirror, workers)
    _save(folder, complete=False, shards=_remote_entries(folder, files), **facts)  # from here on, training may start
    fetch_dataset_files(remote.repo, commit, files[:-1], folder, mirror, workers)
    return _save(folder, complete=True, shards=_remote_entries(folder, files), **facts)


def _remote_entries(folder: Path, files: list[HubFile]) -> list[dict[str, Any]]:
    """Return the manifest's entries of a download's files, whether or not they have arrived."""
    entries = []
    for file in files:
        split = "val" if file is files[-1] else "train"
        entries.append(_entry(folder / file.path, split, file.sha256, file.bytes))
    return entries


# --- a folder of your own files

# What a file is for, by a word in its name or in that of a folder it is in: train-00000-of-00001.parquet, Dev/1.txt
ROLES = re.compile(
    r"(?<![^\W\d_])"  # no letter before it: contest.txt is no test
    r"(?:(?P<train>train|training)|(?P<val>val|valid|validation|dev|eval|evaluation)|(?P<test>test|testing))(?:s|set)?"
    r"(?![^\W\d_])",  # and none after it
    re.IGNORECASE,
)


def _prepare_folder(source: Path, n: int | None) -> Manifest:
    """Gather the documents of a user's folder into at most `n` training shards, and at least one for validation."""
    folder = dataset_dir(str(source))
    files = _text_files(source)
    if files["test"]:
        print(f"left out, for you to test with: {_name_files(files['test'], source)}")
    sources = [
        {"file": str(path.relative_to(source)), "role": role, "bytes": path.stat().st_size, "sha256": sha256_file(path)}
        for role in ("train", "val")
        for path in files[role]
    ]
    if (folder / "manifest.json").exists():
        before = read_manifest(str(source))
        changed = [entry["file"] for entry in sources if entry not in before["sources"]]
        changed += [entry["file"] for entry in before["sources"] if entry not in sources]
        if changed:
            raise ValueError(f"{source} has changed since it was prepared ({changed[0]}): delete {folder} to renew it")
        has_enough = before["n"] is None or (n is not None and n <= before["n"])
        if has_enough and _whole_manifest(folder):
            return before

    _start_anew(folder)
    counts: Counter[str] = Counter()
    train = ShardWriter(folder, "train", shard_bytes=SHARD_BYTES, max_shards=n)
    val = ShardWriter(folder, "val", shard_bytes=SHARD_BYTES)
    for text in iterate_documents(files["val"], counts):
        val.add(text)
    val.end_shard()
    if val.entries:
        validation = _name_files(files["val"], source)
        for text in iterate_documents(files["train"], counts):
            train.add(text)
    else:
        validation = _split_documents(files["train"], train, val, counts)
    train.end_shard()
    val.end_shard()
    for writer, purpose in ((train, "training"), (val, "validation")):
        if not writer.entries:
            raise ValueError(f"--name {source}: no text for {purpose}: add documents")
    print(f"validation: {validation}")
    return _save(
        folder,
        source=str(source),
        licence=f"that of your own files in {source}",
        sources=sources,
        n=n,
        counts={"skipped": counts["skipped"], "cleaned": counts["cleaned"]},
        shards=train.entries + val.entries,
    )


def _text_files(source: Path) -> dict[str, list[Path]]:
    """Return the files of a folder that hold text, sorted, by their role: "train", "val" or "test".

    Hidden files and folders are left out. Raises ValueError if there is no text file.
    """
    files: dict[str, list[Path]] = {"train": [], "val": [], "test": []}
    others = []
    for path in sorted(_walk(source)):
        place = path.relative_to(source)
        if path.is_file() and file_kind(path) in (".parquet", ".jsonl", ".txt"):
            files[_role(place)].append(path)
        else:
            others.append(path)
    if not any(files.values()):
        raise ValueError(f"--name {source}: no .parquet, .jsonl or .txt file in this folder: put your text there")
    if others:
        print(f"left out, no file of .parquet, .jsonl or .txt: {_name_files(others, source)}")
    return files


def _walk(source: Path) -> Iterator[Path]:
    """Yield all files under a folder that are not hidden, also through links to folders, but each folder once."""
    seen: set[str] = set()
    for folder, folders, names in os.walk(source, followlinks=True):
        seen.add(os.path.realpath(folder))
        visible = [name for name in sorted(folders) if not name.startswith(".")]
        # Changed in place, because os.walk goes on into the folders that this list then holds.
        folders[:] = [name for name in visible if os.path.realpath(Path(folder, name)) not in seen]
        for name in names:
            if not name.startswith("."):
                yield Path(folder, name)


def _role(place: Path) -> str:
    """Return what a file is for: the innermost folder that says so decides, else its name; without either, training."""
    for name in (*reversed(place.parts[:-1]), place.name):
        found = ROLES.search(name)
        if found:
            return str(found.lastgroup)
    return "train"


def _name_files(files: list[Path], source: Path) -> str:
    """Return the names of the first five files, and how many more there are."""
    names = [str(path.relative_to(source)) for path in files[:5]]
    if len(files) > len(names):
        names.append(f"and {len(files) - len(names)} more")
    return ", ".join(names)


def _split_documents(files: list[Path], train: "ShardWriter", val: "ShardWriter", counts: Counter[str]) -> str:
    """Split documents by their hash: about one in twenty validates. Return the way of splitting in words.

    Both sides get at least one document.
    """
    smallest = 1 << 64
    largest = 0
    sides = set()
    for text in iterate_documents(files):
        value = _hash(text)
        smallest = min(smallest, value)
        largest = max(largest, value)
        sides.add(value % VALIDATION_SHARE == 0)

    if smallest == largest:  # a book in one file: its last twentieth validates
        text, *_ = iterate_documents(files, counts)  # read to the end, so that skipped rows are counted
        cut = len(text) * (VALIDATION_SHARE - 1) // VALIDATION_SHARE
        cut = text.rfind("\n", 0, cut) + 1 or cut  # after a line, if there is more than one
        train.add(text[:cut])
        val.add(text[cut:])
        return "the end of the only document"
    has_both = len(sides) == 2  # otherwise the document with the smallest hash validates
    for text in iterate_documents(files, counts):
        value = _hash(text)
        validates = value % VALIDATION_SHARE == 0 if has_both else value == smallest
        if validates:
            val.add(text)
        else:
            train.add(text)
    return f"one document in {VALIDATION_SHARE}, by its hash"


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


# --- writing


class ShardWriter:
    """Gathers documents of one split and writes them as Parquet shards, each whole or not at all."""

    def __init__(self, folder: Path, split: str, shard_bytes: int | None = None, max_shards: int | None = None) -> None:
        self.folder = folder
        self.split = split
        self.shard_bytes = shard_bytes
        self.max_shards = max_shards
        self.entries: list[dict[str, Any]] = []  # of the manifest
        self.texts: list[str] = []  # of the shard that is being gathered
        self.bytes = 0

    def is_full(self) -> bool:
        return len(self.entries) == self.max_shards

    def add(self, text: str) -> None:
        """Take one more document, unless it is blank or there are enough shards."""
        if self.is_full() or not text.strip():
            return
        self.texts.append(text)
        self.bytes += len(text.encode())
        if self.shard_bytes and self.bytes >= self.shard_bytes:
            self.end_shard()

    def end_shard(self) -> None:
        """Write the documents gathered so far as a shard."""
        import pyarrow as pa
        from pyarrow import parquet

        if not self.texts:
            return
        number = f"{len(self.entries):05d}"
        if self.split == "val":
            number = f"val_{number}" if self.entries else "val"
        path = self.folder / f"shard_{number}.parquet"
        table = pa.table({"text": pa.array(self.texts, pa.large_string())})
        content = pa.BufferOutputStream()
        parquet.write_table(table, content, compression="zstd", row_group_size=1024)
        atomic_write(path, content.getvalue().to_pybytes())
        self.entries.append(_entry(path, self.split, sha256_file(path), path.stat().st_size))
        self.texts = []
        self.bytes = 0


def _entry(path: Path, split: str, sha256: str, size: int) -> dict[str, Any]:
    """Return a shard's entry in the manifest; `documents` is null for one that has not arrived yet."""
    from pyarrow import parquet

    documents = None
    if path.exists():
        with damage_named(path):
            documents = parquet.read_metadata(path).num_rows
    return {"file": path.name, "sha256": sha256, "bytes": size, "documents": documents, "split": split}


def _save(folder: Path, **facts: Any) -> Manifest:
    manifest = {"name": folder.name, "complete": True, "counts": {"skipped": 0, "cleaned": 0}, **facts}
    atomic_write_json(folder / "manifest.json", manifest)
    return manifest


def _whole_manifest(folder: Path) -> Manifest | None:
    """Return a folder's manifest if all shards that it lists are there, with their sizes."""
    if not (folder / "manifest.json").exists():
        return None
    manifest = read_json(folder / "manifest.json")
    for entry in manifest["shards"]:
        path = folder / entry["file"]
        if not path.exists() or path.stat().st_size != entry["bytes"]:
            return None
    return manifest


def _start_anew(folder: Path) -> None:
    """Make the folder if need be. Without its manifest, what is in it does not count as prepared."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "manifest.json").unlink(missing_ok=True)


if __name__ == "__main__":
    cli.run(main)
