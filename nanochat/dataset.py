"""Where text comes from: shards of a hub, the built-in world, or a folder of your own files.

    python -m nanochat.dataset --name builtin|climbmix|fineweb-edu|PATH -n SHARDS

Each dataset is a folder of Parquet shards (column `text`, one document a row) under the base directory, and a
`manifest.json` that names source, licence, and every shard's size and hash. The validation shard is chosen once and
fixed there by its hash: one that is missing or changed is an error, never replaced by another.
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

from nanochat import cli, hub
from nanochat.common import atomic_write_json, get_base_dir, read_json, sha256_file
from nanochat.documents import ShardWriter, describe, iterate_documents, parquet_errors

SHARD_BYTES = 64 << 20  # of text, where documents of a folder are gathered into shards
BUILTIN_SHARD_BYTES = 1_500_000
Manifest = dict[str, Any]  # see read_manifest


@dataclass(frozen=True)
class Remote:
    """A dataset on the hub: `shards` files shard_00000.parquet and on, the last of them for validation."""

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
    shards: int | None = cli.option(None, "training shards: 8 unless said, of a folder all", flag="-n")
    mirror: str | None = cli.option(None, "base URL of another hub (or set NANOCHAT_HUB)")
    workers: int = cli.option(8, "parallel downloads")
    seed: int = cli.option(0, "seed of the built-in text")

    def __post_init__(self) -> None:
        cli.require_positive(self, "shards", "workers")


def dataset_name(name: str) -> str:
    """The name that a dataset is kept under: itself, or for a path the folder's name made safe."""
    if name == "builtin" or name in REMOTES:
        return name
    safe = re.sub(r"[^\w.-]+", "-", Path(name).resolve().name).strip("-.") or "folder"
    return f"{safe}-folder" if safe == "builtin" or safe in REMOTES else safe


def dataset_dir(name: str) -> Path:
    """The folder of a dataset, given its name or the path it was made from."""
    return get_base_dir() / "datasets" / dataset_name(name)


def read_manifest(name: str) -> Manifest:
    """A prepared dataset's manifest: name, source, licence, shards [{file, sha256, bytes, documents, split}], and
    whether they are `complete` (False while a download goes on). Raises ValueError when there is none."""
    path = dataset_dir(name) / "manifest.json"
    if not path.exists():
        raise ValueError(f"dataset '{name}' is not prepared: run python -m nanochat.dataset --name {name}")
    manifest = read_json(path)
    if Path(name).is_dir() and "sources" in manifest and Path(manifest["source"]) != Path(name).resolve():
        raise ValueError(f"dataset '{manifest['name']}' was made from {manifest['source']}, not {name}: rename one")
    return manifest


def shard_records(name: str, split: str) -> list[tuple[Path, dict[str, Any]]]:
    """Path and manifest entry of each shard of `split` ("train" or "val").

    A training shard may still be arriving while the manifest is not `complete`; any other shard that is missing, and
    a validation shard whose bytes have changed, raise ValueError.
    """
    manifest, folder = read_manifest(name), dataset_dir(name)
    records = [(folder / entry["file"], entry) for entry in manifest["shards"] if entry["split"] == split]
    for path, entry in records:
        if not path.exists() and (split == "val" or manifest["complete"]):
            raise ValueError(f"{path} of dataset '{name}' is missing: run python -m nanochat.dataset --name {name}")
        if split == "val" and sha256_file(path) != entry["sha256"]:
            raise ValueError(f"{path} is not the validation shard that the manifest names: delete it and prepare again")
    return records


def list_shards(name: str, split: str) -> list[Path]:
    """Paths of the shards of `split` ("train" or "val"), in order; see `shard_records` for what may be missing."""
    return [path for path, _ in shard_records(name, split)]


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def prepare(name: str, n: int | None = None, *, mirror: str | None = None, workers: int = 8, seed: int = 0) -> Manifest:
    """Make dataset `name` ready, with at least `n` training shards, and return its manifest.

    What is already there is kept: preparing again continues, grows, or does nothing. Raises ValueError for an unknown
    name, an empty or changed folder, and files that cannot be read.
    """
    folder = dataset_dir(name)
    if name == "builtin":
        manifest = _prepare_builtin(folder, n or 8, seed)
    elif name in REMOTES:
        manifest = _prepare_remote(name, folder, n or 8, mirror, workers)
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


def _save(folder: Path, **manifest: Any) -> Manifest:
    manifest["counts"] = {key: manifest.get("counts", {}).get(key, 0) for key in ("empty", "cleaned")}
    atomic_write_json(folder / "manifest.json", {"name": folder.name, **manifest})
    return read_json(folder / "manifest.json")


def _existing(folder: Path) -> Manifest | None:
    """The manifest in `folder`, if there is one and its shards all exist with their sizes."""
    if not (folder / "manifest.json").exists():
        return None
    manifest = read_json(folder / "manifest.json")
    paths = [(folder / entry["file"], entry["bytes"]) for entry in manifest["shards"]]
    return manifest if all(path.exists() and path.stat().st_size == size for path, size in paths) else None


def _prepare_builtin(folder: Path, n: int, seed: int) -> Manifest:
    from nanochat import world

    sources = sorted(Path(world.__file__).parent.glob("world*"))
    code = hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()
    recipe = {"seed": seed, "n": n, "world": code, "python": platform.python_version()}
    old = _existing(folder)
    if old and old["recipe"] == recipe:
        return old
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "manifest.json").unlink(missing_ok=True)
    train, val = ShardWriter(folder, "train", None), ShardWriter(folder, "val", None)
    prose = world.prose_documents()
    for index in range(n):
        share = prose[index::n]
        world_bytes = max(BUILTIN_SHARD_BYTES // 2, BUILTIN_SHARD_BYTES - sum(len(text.encode()) for text in share))
        for text in itertools.chain(share, world.documents(_hash(f"{seed} {index}"), world_bytes)):
            (train if _hash(text) % 20 else val).add(text)  # the same text is never on both sides
        train.cut()
    val.cut()
    source = "the standard library's documentation and the built-in world"
    facts = {"source": source, "licence": "PSF-2.0 (standard library documentation), MIT (world text)"}
    return _save(folder, **facts, complete=True, recipe=recipe, shards=train.entries + val.entries)


def _prepare_remote(name: str, folder: Path, n: int, mirror: str | None, workers: int) -> Manifest:
    from pyarrow import parquet

    remote = REMOTES[name]
    if n >= remote.shards:
        raise ValueError(f"-n {n}: {name} has {remote.shards - 1} training shards")
    print(f"{name}: {remote.repo}, licence {remote.licence}")
    try:
        listing = {file.path: file for file in hub.list_dataset_files(remote.repo, mirror)}
    except ValueError as error:
        print(f"no listing, so no sizes and hashes to check against: {error}")
        listing = {}
    known = {}
    if (folder / "manifest.json").exists():
        known = {entry["file"]: entry for entry in read_json(folder / "manifest.json")["shards"]}
    n = max(n, len(known) - 1)  # a dataset only grows: a run may be reading it
    names = [f"shard_{number:05d}.parquet" for number in (*range(n), remote.shards - 1)]
    source = f"{hub.base_url(mirror)}/datasets/{remote.repo}"
    files = [listing.get(name) or hub.RemoteFile(name, f"{source}/resolve/main/{name}") for name in names]
    for file in files:
        before = known.get(file.path, {}).get("sha256")
        if before and file.sha256 and before != file.sha256:
            raise ValueError(f"the hub's {file.path} of {name} has changed: delete {folder} to take the new data")

    def entries(arrived: list[hub.RemoteFile]) -> list[dict[str, Any]]:
        result = []
        for file, split in zip(files, ["train"] * n + ["val"]):
            path = folder / file.path
            entry = {"file": file.path, "sha256": file.sha256, "bytes": file.size, "documents": None, "split": split}
            if file.path in known and known[file.path]["documents"] is not None:
                entry = known[file.path]
            elif file in arrived:
                with parquet_errors(path):
                    rows = parquet.read_metadata(path).num_rows
                entry = entry | {"documents": rows} if file.sha256 else describe(path, split, rows)
            result.append(entry)
        return result

    facts = {"source": source, "licence": remote.licence}
    hub.download_many(files[-1:], folder, label="validation")
    _save(folder, **facts, complete=False, shards=entries(files[-1:]))  # from here on, training may start
    hub.download_many(files[:-1], folder, workers=workers, label=name)
    return _save(folder, **facts, complete=True, shards=entries(files))


def _prepare_folder(source: Path, folder: Path, n: int | None) -> Manifest:
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
        if _existing(folder) and (old["n"] is None or (n is not None and n <= old["n"])):
            return old
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "manifest.json").unlink(missing_ok=True)
    counts: Counter[str] = Counter()
    train = ShardWriter(folder, "train", SHARD_BYTES, n)
    val = ShardWriter(folder, "val", None)
    own_shards = len(files) > 1 and all(p.suffix.lower() != ".txt" for p in files)
    if own_shards:  # the last one validates
        for path in files[:-1]:
            for text in iterate_documents([path], counts):
                train.add(text)
            train.cut()
            if len(train.entries) == n:
                break
        for text in iterate_documents(files[-1:], counts):
            val.add(text)
    else:
        for text, validates in _split_documents(files, counts):
            (val if validates else train).add(text)
    train.cut()
    val.cut()
    if not train.entries or not val.entries:
        raise ValueError(f"--name {source}: no text for {'validation' if train.entries else 'training'}: add documents")
    facts = {"source": str(source), "licence": f"that of your own files in {source}", "sources": sources, "n": n}
    return _save(folder, **facts, complete=True, counts=counts, shards=train.entries + val.entries)


def _split_documents(files: Sequence[Path], counts: Counter[str]) -> Iterator[tuple[str, bool]]:
    """Every document and whether it validates: about one in twenty by hash, and at least one on each side."""
    hashes = {_hash(text) for text in iterate_documents(files)}
    chosen = {value for value in hashes if value % 20 == 0}
    if len(hashes) == 1:  # a book in one file: its last twentieth validates
        text, *_ = iterate_documents(files, counts)
        cut = text.rfind("\n", 0, len(text) * 19 // 20) + 1 or len(text) * 19 // 20
        yield from [(part, i == 1) for i, part in enumerate((text[:cut], text[cut:])) if part.strip()]
        return
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
