"""Where text comes from: the built-in world, a dataset of the Hugging Face hub, or a folder of your own files.

    python -m nanochat.dataset --name builtin|climbmix|fineweb-edu|PATH -n SHARDS

Every source becomes the same thing: a folder datasets/NAME of Parquet shards (a column `text`, one document a row) and
a manifest.json. The manifest names the source, its licence, and each shard with its size, hash and split. All later
stages read shards through it:

* The validation shard is chosen once and fixed in the manifest by its hash. If it is missing or has changed, that is an
  error: losses on another validation set could not be compared.
* A manifest lists all shards of a download from its start, with `complete` false until the last has arrived. So
  training may begin with the first shards (token_shards.py waits for the others), in the order that it would have had
  anyway.
"""

import hashlib
import itertools
import platform
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nanochat import cli
from nanochat.common import atomic_write_json, get_base_dir, read_json, sha256_file
from nanochat.documents import ShardWriter, iterate_documents, parquet_errors
from nanochat.hub import fetch_dataset_files, hub_address, list_dataset

SHARD_BYTES = 64 << 20  # text of a shard that is made from a folder
BUILTIN_SHARD_BYTES = 1_500_000
DEFAULT_SHARDS = 8
VALIDATION_SHARE = 20  # one document in this many validates, where a source has no validation part of its own

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


# --- a prepared dataset


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
    folder = dataset_dir(name)
    records = [(folder / entry["file"], entry) for entry in manifest["shards"] if entry["split"] == split]
    for path, entry in records:
        if not path.exists() and (split == "val" or manifest["complete"]):
            raise ValueError(f"{path} of dataset '{name}' is missing: run python -m nanochat.dataset --name {name}")
        if split == "val" and sha256_file(path) != entry["sha256"]:
            raise ValueError(f"{path} is not the validation shard that the manifest names: delete it and prepare again")
    return records


def list_shards(name: str, split: str) -> list[Path]:
    """Return the paths of the shards of `split`; see `shard_records` for what may be missing."""
    return [path for path, _ in shard_records(name, split)]


# --- preparing one


def prepare(name: str, n: int | None = None, *, mirror: str | None = None, workers: int = 8, seed: int = 0) -> Manifest:
    """Make dataset `name` ready, with at least `n` training shards, and return its manifest.

    What is already there is kept: preparing again continues, grows, or does nothing. Raises ValueError if the name is
    unknown, a folder is empty or has changed, or a file cannot be read.
    """
    folder = dataset_dir(name)
    if name == "builtin":
        manifest = _prepare_builtin(folder, n or DEFAULT_SHARDS, seed)
    elif name in REMOTES:
        manifest = _prepare_remote(name, folder, n or DEFAULT_SHARDS, mirror, workers)
    elif Path(name).is_dir():
        manifest = _prepare_folder(Path(name).resolve(), folder, n)
    else:
        raise ValueError(f"--name {name}: no such folder, and not one of builtin, {', '.join(REMOTES)}")
    train = sum(entry["split"] == "train" for entry in manifest["shards"])
    print(f"dataset {manifest['name']}: {train} training shards and one for validation in {folder}")
    print(f"licence: {manifest['licence']}")
    if any(manifest["counts"].values()):
        print(f"documents skipped as empty: {manifest['counts']['empty']}, cleaned: {manifest['counts']['cleaned']}")
    return manifest


def _save(folder: Path, counts: Counter[str], **manifest: Any) -> Manifest:
    told = {"empty": counts["empty"], "cleaned": counts["cleaned"]}
    atomic_write_json(folder / "manifest.json", {"name": folder.name, "counts": told, **manifest})
    return read_json(folder / "manifest.json")


def _is_whole(folder: Path, manifest: Manifest) -> bool:
    """Return whether all shards of a manifest are there, with their sizes."""
    paths = [(folder / entry["file"], entry["bytes"]) for entry in manifest["shards"]]
    return all(path.exists() and path.stat().st_size == size for path, size in paths)


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def _prepare_builtin(folder: Path, n: int, seed: int) -> Manifest:
    """Write English prose of the Python installation, mixed with documents of the built-in world."""
    from nanochat import world

    # The text depends on all of these; if one differs, the dataset is made anew.
    world_files = sorted(Path(world.__file__).parent.glob("world*"))
    world_hash = hashlib.sha256(b"".join(path.read_bytes() for path in world_files)).hexdigest()
    recipe = {"seed": seed, "n": n, "world": world_hash, "python": platform.python_version()}
    if (folder / "manifest.json").exists():
        old = read_json(folder / "manifest.json")
        if old["recipe"] == recipe and _is_whole(folder, old):
            return old
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "manifest.json").unlink(missing_ok=True)
    train = ShardWriter(folder, "train")
    val = ShardWriter(folder, "val")
    prose = world.prose_documents()
    for index in range(n):
        share = prose[index::n]
        prose_bytes = sum(len(text.encode()) for text in share)
        world_bytes = max(BUILTIN_SHARD_BYTES // 2, BUILTIN_SHARD_BYTES - prose_bytes)
        for text in itertools.chain(share, world.documents(_hash(f"{seed} {index}"), world_bytes)):
            # By hash, so that a text that occurs twice is never on both sides.
            (train if _hash(text) % VALIDATION_SHARE else val).add(text)
        train.end_shard()
    val.end_shard()
    return _save(
        folder,
        Counter(),
        source="the standard library's documentation and the built-in world",
        licence="PSF-2.0 (standard library documentation), MIT (world text)",
        recipe=recipe,
        complete=True,
        shards=train.entries + val.entries,
    )


def _prepare_remote(name: str, folder: Path, n: int, mirror: str | None, workers: int) -> Manifest:
    """Download `n` training shards and the validation shard, which comes first."""
    remote = REMOTES[name]
    if n >= remote.shards:
        raise ValueError(f"-n {n}: {name} has {remote.shards - 1} training shards")
    print(f"{name}: {remote.repo}, licence {remote.licence}")
    known: dict[str, dict[str, Any]] = {}
    if (folder / "manifest.json").exists():
        known = {entry["file"]: entry for entry in read_json(folder / "manifest.json")["shards"]}
    n = max(n, len(known) - 1)  # a dataset only grows: a run may be reading it
    names = [f"shard_{number:05d}.parquet" for number in (*range(n), remote.shards - 1)]
    commit, listed = list_dataset(remote.repo, mirror)
    entries = []
    for file_name in names:
        if file_name not in listed:
            raise ValueError(f"{remote.repo} has no {file_name}: check the mirror, or ask for fewer shards")
        sha256 = listed[file_name].sha256
        if file_name in known and known[file_name]["sha256"] not in (None, sha256):
            raise ValueError(f"the hub's {file_name} of {name} has changed: delete {folder} to take the new data")
        entries.append({
            "file": file_name,
            "sha256": sha256,
            "bytes": listed[file_name].bytes,
            "documents": None,  # until it has arrived
            "split": "val" if file_name == names[-1] else "train",
        })  # fmt: skip
    facts = {
        "source": f"{hub_address(mirror)}/datasets/{remote.repo}",
        "licence": remote.licence,
        "shuffled": True,
    }
    files = [listed[file_name] for file_name in names]
    fetch_dataset_files(remote.repo, commit, files[-1:], folder, mirror, workers)
    entries[-1] = _with_documents(folder, entries[-1])
    _save(folder, Counter(), **facts, complete=False, shards=entries)  # from here on, training may start
    fetch_dataset_files(remote.repo, commit, files[:-1], folder, mirror, workers)
    entries = [_with_documents(folder, entry) for entry in entries]
    return _save(folder, Counter(), **facts, complete=True, shards=entries)


def _with_documents(folder: Path, entry: dict[str, Any]) -> dict[str, Any]:
    """Return the entry of a downloaded shard with its number of documents."""
    from pyarrow import parquet

    path = folder / entry["file"]
    with parquet_errors(path):
        return {**entry, "documents": parquet.read_metadata(path).num_rows}


def _prepare_folder(source: Path, folder: Path, n: int | None) -> Manifest:
    """Gather the documents of a user's folder into shards."""
    visible = (p for p in source.rglob("*") if not any(part.startswith(".") for part in p.relative_to(source).parts))
    files = sorted(p for p in visible if p.suffix.lower() in (".parquet", ".jsonl", ".txt") and p.is_file())
    if not files:
        raise ValueError(f"--name {source}: no .parquet, .jsonl or .txt file in this folder: put your text there")
    sources = [{"file": str(p.relative_to(source)), "bytes": p.stat().st_size, "sha256": sha256_file(p)} for p in files]
    if (folder / "manifest.json").exists():
        old = read_manifest(str(source))
        changed = [s["file"] for s in [*sources, *old["sources"]] if s not in sources or s not in old["sources"]]
        if changed:
            raise ValueError(f"{source} has changed since it was prepared ({changed[0]}): delete {folder} to renew it")
        if _is_whole(folder, old) and (old["n"] is None or (n is not None and n <= old["n"])):
            return old
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "manifest.json").unlink(missing_ok=True)
    counts: Counter[str] = Counter()
    train = ShardWriter(folder, "train", shard_bytes=SHARD_BYTES, max_shards=n)
    val = ShardWriter(folder, "val")
    if len(files) > 1 and all(p.suffix.lower() != ".txt" for p in files):  # shards already: the last one validates
        for path in files[:-1]:
            for text in iterate_documents([path], counts):
                train.add(text)
            train.end_shard()
            if len(train.entries) == n:
                break
        for text in iterate_documents(files[-1:], counts):
            val.add(text)
    else:
        for text, validates in _split_documents(files, counts):
            (val if validates else train).add(text)
    train.end_shard()
    val.end_shard()
    if not train.entries or not val.entries:
        raise ValueError(f"--name {source}: no text for {'validation' if train.entries else 'training'}: add documents")
    return _save(
        folder,
        counts,
        source=str(source),
        licence=f"that of your own files in {source}",
        sources=sources,
        n=n,
        complete=True,
        shards=train.entries + val.entries,
    )


def _split_documents(files: Sequence[Path], counts: Counter[str]) -> Iterator[tuple[str, bool]]:
    """Yield every document and whether it validates: about one in twenty by hash, and at least one on each side."""
    hashes = {_hash(text) for text in iterate_documents(files)}
    if len(hashes) == 1:  # a book in one file: its last twentieth validates
        text, *_ = iterate_documents(files, counts)
        cut = len(text) * (VALIDATION_SHARE - 1) // VALIDATION_SHARE
        cut = text.rfind("\n", 0, cut) + 1 or cut
        yield from [(part, i == 1) for i, part in enumerate((text[:cut], text[cut:])) if part.strip()]
        return
    chosen = {value for value in hashes if value % VALIDATION_SHARE == 0}
    if not chosen or chosen == hashes:
        chosen = {min(hashes, default=0)}
    for text in iterate_documents(files, counts):
        yield text, _hash(text) in chosen


def main() -> None:
    """Prepare a dataset from the command line."""
    config = cli.parse(Config, description="Prepare a dataset.")
    prepare(config.name, config.shards, mirror=config.mirror, workers=config.workers, seed=config.seed)


if __name__ == "__main__":
    cli.run(main)
