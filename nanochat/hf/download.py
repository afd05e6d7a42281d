"""Open-weights models from the hub: download into Hugging Face's cache, check by hash, delete.

The cache is that of `huggingface_hub` and transformers. Below `models--ORG--NAME` it keeps each file once, in `blobs`,
under its hash; `snapshots/<commit>` is what a user sees: the files of that commit as links to blobs.
"""

import hashlib
import os
import shutil
from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path

from nanochat.common import sha256_file
from nanochat.hf.load import INDEX
from nanochat.hf.store import (
    NEEDED,
    cache_dir,
    find_folder,
    is_complete,
    list_models,
    old_downloads,
    parse_name,
    snapshot,
)
from nanochat.hub import persistently

# What is fetched of a repository. Other files hold the same weights in other formats.
FILES = (
    *NEEDED,
    "model*.safetensors",
    INDEX,
    "generation_config.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
)


def download(
    name: str, revision: str | None = None, include: Sequence[str] = (), offline: bool = False, workers: int = 8
) -> Path:
    """Fetch what is missing of a model, or the files that match the patterns of `include`; return its folder.

    Files arrive under temporary names and are compared with their hashes. With `offline` nothing is fetched. Raises
    ValueError if the hub has no such model, if it cannot be run here, or if it is not here and `offline` is set;
    raises OSError if the disk has too little room or the hub cannot be reached (see `hub_errors`).
    """
    from huggingface_hub import snapshot_download

    repo, named_revision = parse_name(name)
    revision = revision or named_revision  # `--revision` wins over ORG/NAME@REVISION
    if offline:
        folder = snapshot(repo, revision)
        if not is_complete(folder):
            raise ValueError(f"{name} is not here, or not wholly: download it without --offline")
        return folder

    def fetch() -> Path:
        _check_before_download(repo, revision, include)
        patterns = list(include or FILES)
        return Path(snapshot_download(repo, revision=revision, allow_patterns=patterns, max_workers=workers))

    folder = persistently(fetch, repo)
    _delete_damaged(repo, folder)
    return folder


def _check_before_download(repo: str, revision: str, include: Sequence[str]) -> None:
    """Raise ValueError if the repository lacks what is needed or the disk lacks room, before anything is fetched."""
    from huggingface_hub import HfApi

    info = HfApi().model_info(repo, revision=revision, files_metadata=True)
    sizes = {}
    for file in info.siblings or []:
        if any(fnmatch(file.rfilename, pattern) for pattern in include or FILES):
            sizes[file.rfilename] = file.size or 0
    if not sizes:
        raise ValueError(f"{repo} has no file that matches {', '.join(include or FILES)}")
    if not include:
        missing = [name for name in NEEDED if name not in sizes]
        if not any(name.endswith(".safetensors") for name in sizes):
            missing.append(".safetensors files")
        if missing:
            raise ValueError(f"{repo} lacks {', '.join(missing)}: it cannot be run here")
    # A full disk would end the download after hours, so the room is counted now, without the files that are here.
    folder = snapshot(repo, info.sha or revision)
    needed = sum(size for path, size in sizes.items() if not (folder / path).exists())
    cache_dir().mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(cache_dir()).free
    if needed > free:
        raise ValueError(f"{needed / 1e9:.1f} GB to download, {free / 1e9:.1f} GB free in {cache_dir()}: make room")


def verify(name: str) -> int:
    """Compare every file of a download with its hash and return how many there are.

    Raises ValueError if the model is not here, if it is a folder without hashes, or if files are damaged; those are
    deleted.
    """
    full_name, folder = find_folder(name)
    if folder.parent.name != "snapshots":
        raise ValueError(f"{name} is a plain folder without hashes: download it again to have its files checked")
    return _delete_damaged(full_name, folder)


def _delete_damaged(name: str, folder: Path) -> int:
    """Compare all files of a snapshot with their hashes and return how many they are.

    Raises ValueError if some are damaged, after deleting these, so that another download fetches them again.
    """
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    damaged = [path for path in files if not _is_intact(path)]
    for path in damaged:
        blob = path.parent / os.readlink(path)
        path.resolve().unlink(missing_ok=True)  # newer caches have a second link, to a store that repositories share
        blob.unlink(missing_ok=True)
        path.unlink()
    if damaged:
        names = ", ".join(path.relative_to(folder).as_posix() for path in damaged)
        raise ValueError(f"{name}: damaged, and deleted: {names}; python -m scripts.models download {name}")
    return len(files)


def _is_intact(path: Path) -> bool:
    """Return whether the bytes of a cached file have the hash that its blob is named by.

    That is SHA-256 for large files, and for others git's SHA-1 over a header and the bytes. On a system without links
    the file itself stands in the snapshot, and there is nothing to compare with.
    """
    if not path.is_symlink():
        return True
    blob_name = Path(os.readlink(path)).name
    if len(blob_name) == 64:
        return sha256_file(path) == blob_name
    data = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest() == blob_name


def remove(name: str) -> int:
    """Delete a download with all its revisions and return the bytes set free. Raises ValueError if it is not here."""
    repo, _ = parse_name(name)
    folder_name = repo.replace("/", "--")
    folders = [cache_dir() / f"models--{folder_name}"]
    if "--" in folder_name:  # without it, a name such as ".." would lead out of the folder
        folders.append(old_downloads() / folder_name)
    folders = [folder for folder in folders if folder.is_dir()]
    if not folders:
        raise ValueError(f"{name} is not here: {', '.join(list_models()) or 'no model'} is")
    freed = 0
    for folder in folders:
        # Links in snapshots lead to blobs, which are counted once.
        files = [path for path in folder.rglob("*") if path.is_file() and not path.is_symlink()]
        freed += sum(path.stat().st_size for path in files)
        shutil.rmtree(folder)
    return freed
