"""Open-weights models on this machine: `hub/<org>--<name>/` under the base directory, each with a manifest.

The manifest, written last, says which commit of the hub a folder holds and the size and SHA-256 of every file.
"""

import re
import shutil
from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch

from nanochat import hub
from nanochat.common import atomic_write_json, get_base_dir, read_json, sha256_file
from nanochat.hf import load as hf_load

NEEDED = ("config.json", "tokenizer.json")
FILES: tuple[str, ...] = (*NEEDED, "model*.safetensors", "model.safetensors.index.json", "generation_config.json")
FILES += ("tokenizer_config.json", "chat_template.jinja")
_MANIFEST = "nanochat_hub.json"


def models_dir() -> Path:
    """Where downloaded models lie."""
    return get_base_dir() / "hub"


def model_dir(name: str) -> Path:
    """The folder of ORG/NAME; ValueError when the name is not of that form."""
    if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name, re.ASCII) or "--" in name.split("/")[0]:
        raise ValueError(f"{name!r} is not a model's name: it must be like ORG/NAME")
    return models_dir() / name.replace("/", "--")


def list_models() -> list[str]:
    """The names of the models that are here and complete."""
    folders = sorted(path.parent for path in models_dir().glob(f"*--*/{_MANIFEST}"))
    return [folder.name.replace("--", "/", 1) for folder in folders]


def find(name: str) -> Path:
    """The folder of a model by ORG/NAME, by NAME where that is clear, or by path; ValueError says what there is."""
    if (Path(name) / "config.json").is_file():
        return Path(name)
    there = list_models()
    matches = [other for other in there if name in (other, other.split("/")[1])]
    if len(matches) != 1:
        words = f"there are {', '.join(matches)}" if matches else f"here are {', '.join(there) or 'none'}"
        raise ValueError(f"no model {name!r} here: {words}; python -m scripts.models download ORG/NAME fetches one")
    return model_dir(matches[0])


def read_manifest(folder: Path) -> dict[str, Any]:
    """What was downloaded into a folder; empty for one that was not, or not wholly. ValueError if damaged."""
    path = folder / _MANIFEST
    manifest = read_json(path) if path.is_file() else {}
    if manifest and not (isinstance(manifest, dict) and isinstance(manifest.get("files"), dict)):
        raise ValueError(f"{path} is damaged: delete it and download again")
    return manifest


def download(
    name: str, revision: str = "main", include: Sequence[str] = (), offline: bool = False, **options: Any
) -> Path:
    """Fetch what is needed of a model from the hub, or what matches the patterns of `include`; returns its folder.

    A file that is here and right is kept, a part of one continued. offline: only check that all is here.
    options: `hub.download_many`'s. Raises ValueError when there is no such model, or not enough room on the disk,
    ConnectionError when the hub cannot be reached or keeps sending wrong bytes.
    """
    folder = model_dir(name)
    manifest = read_manifest(folder)
    if offline:
        gone = [path for path, (size, _) in manifest.get("files", {}).items() if not _has(folder / path, size)]
        if not manifest or gone:
            raise ValueError(f"{name} is not {'wholly ' if manifest else ''}here: download it without --offline")
        return folder
    limits = {key: options[key] for key in ("timeout", "retries", "backoff") if key in options}
    commit, listed = hub.list_model_files(name, revision, **limits)
    files = [file for file in listed if any(fnmatch(file.path, pattern) for pattern in include or FILES)]
    if not include:
        files = [file for file in files if "/" not in file.path]  # folders hold other formats of the same weights
        missing = [path for path in NEEDED if path not in {file.path for file in files}]
        if missing or not any(file.path.endswith(".safetensors") for file in files):
            raise ValueError(f"{name} lacks {', '.join(missing) or '.safetensors files'}: it cannot be run here")
    if not files:
        raise ValueError(f"{name} has no file that matches {', '.join(include)}")
    kept = manifest["files"] if manifest.get("commit") == commit else {}
    for file in files:
        path = folder / file.path
        if path.is_file() and file.path not in kept and (not file.sha256 or sha256_file(path) != file.sha256):
            path.unlink()  # of another commit
    _check_room(folder, files)
    hub.download_many(files, folder, label=name, **options)
    facts = {file.path: [file.size, file.sha256 or sha256_file(folder / file.path)] for file in files}
    content = {"repo": name, "revision": revision, "commit": commit, "files": {**kept, **facts}}
    atomic_write_json(folder / _MANIFEST, content)
    return folder


def _has(path: Path, size: int) -> bool:
    return path.is_file() and path.stat().st_size == size


def _check_room(folder: Path, files: Sequence[hub.RemoteFile]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    there = [path for f in files for path in (folder / f.path, folder / f"{f.path}.part") if path.is_file()]
    needed = sum(file.size or 0 for file in files) - sum(path.stat().st_size for path in there)
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise ValueError(f"{needed / 1e9:.1f} GB are to come, {free / 1e9:.1f} GB are free in {folder}: make room")


def verify(name: str) -> int:
    """Compare every file of a model with its hash; the number of files. ValueError names those that are not right."""
    folder = model_dir(name)
    files = read_manifest(folder).get("files")
    if not files:
        raise ValueError(f"{name} is not here, or not wholly: python -m scripts.models download {name}")
    wrong = [p for p, (size, sha) in files.items() if not _has(folder / p, size) or sha256_file(folder / p) != sha]
    if wrong:
        for path in wrong:  # what is gone is fetched again
            (folder / path).unlink(missing_ok=True)
        (folder / _MANIFEST).unlink()
        raise ValueError(f"{name}: damaged, and deleted: {', '.join(wrong)}; python -m scripts.models download {name}")
    return len(files)


def remove(name: str) -> int:
    """Delete a model, or what is left of one; the number of bytes set free. ValueError if it is not here."""
    folder = model_dir(name)
    if not folder.is_dir():
        raise ValueError(f"{name} is not here: {', '.join(list_models()) or 'no model'} is")
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    doomed = folder.with_name(f".removed-{folder.name}")
    shutil.rmtree(doomed, ignore_errors=True)
    folder.rename(doomed)
    shutil.rmtree(doomed)
    return size


def info(folder: Path) -> dict[str, Any]:
    """What a model's folder holds, from its config and the headers of its files alone."""
    config, tensors = hf_load.read_config(folder), hf_load.stored_tensors(folder).values()
    shape = hf_load.FAMILIES[config["model_type"]].config_type.from_json(config)
    sizes = {"F32": 4, "BF16": 2, "F16": 2, "U8": 1}
    packed = sum(torch.Size(t.shape).numel() for t in tensors if t.name.endswith("_blocks"))
    plain = sum(torch.Size(t.shape).numel() for t in tensors if t.dtype != "U8")
    return {
        "architecture": config["model_type"],
        "parameters": plain + 2 * packed,
        "bytes": sum(torch.Size(t.shape).numel() * sizes.get(t.dtype, 8) for t in tensors),
        "types": sorted({t.dtype for t in tensors}),
        "context": shape.sequence_len,
        "vocabulary": shape.vocab_size,
        "commit": read_manifest(folder).get("commit"),
        "folder": str(folder),
    }
