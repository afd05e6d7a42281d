"""A model by its name: a checkpoint of your own, a folder, or a download in Hugging Face's cache.

    sft, sft/d12             the newest checkpoint of a stage, or of a stage and tag: see checkpoint.py
    some/folder              any folder with config.json, safetensors and tokenizer.json
    ORG/NAME, NAME           a download; ORG/NAME@REVISION is another branch, tag or commit than main

`download` fetches with `huggingface_hub` into the cache that transformers uses, too, so a model that you already have
is found. `find` turns a name into a `NamedModel`, `find_all` decides which devices several of them go to, and
`NamedModel.load` makes an engine.
"""

import hashlib
import os
import shutil
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import torch
import torch.distributed as dist

from nanochat import checkpoint
from nanochat.common import STAGES, get_base_dir, sha256_file
from nanochat.compute import free_memory, pick_dtype
from nanochat.conversation import ChatFormat
from nanochat.engine import Engine
from nanochat.hf.chat import chat_format
from nanochat.hf.load import FAMILIES, INDEX, load, read_config, read_weight_map, skeleton, stored_tensors
from nanochat.hf.parallel import layer_bytes, split_layers, tensor_parallel
from nanochat.hub import persistently

DEVICES = "lay an open-weights model over these, such as cuda:0,cuda:1; unset: over all GPUs if one is too small"
NEEDED = ("config.json", "tokenizer.json")
# What is fetched of a repository. Other files hold the same weights in other formats.
FILES = (
    *NEEDED,
    "model*.safetensors",
    INDEX,
    "generation_config.json",
    "tokenizer_config.json",
    "chat_template.jinja",
)
# Bytes per value of each type in a safetensors header; what is not listed counts as 8.
TYPE_BYTES = {"F32": 4, "BF16": 2, "F16": 2, "U8": 1}


def parse_name(name: str) -> tuple[str, str]:
    """Return (ORG/NAME, revision) for ORG/NAME, ORG/NAME@REVISION, or the address of the model's page on the hub."""
    if name.startswith(("https://", "http://")):
        parts = urlsplit(name).path.strip("/").split("/")
        has_revision = len(parts) > 3 and parts[2] in ("tree", "blob", "resolve")
        return "/".join(parts[:2]), parts[3] if has_revision else "main"
    repo, _, revision = name.partition("@")
    return repo, revision or "main"


def _cache_dir() -> Path:
    """Return the folder in which huggingface_hub keeps repositories: `$HF_HUB_CACHE`, or below `$HF_HOME`."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)


def _snapshot(repo: str, revision: str) -> Path:
    """Return the folder of a download in the cache, whether or not it is there.

    The cache's layout is documented by the hub: `refs/<revision>` holds a commit, `snapshots/<commit>` its files."""
    folder = _cache_dir() / f"models--{repo.replace('/', '--')}"
    ref = folder / "refs" / revision
    commit = ref.read_text().strip() if ref.is_file() else revision
    return folder / "snapshots" / commit


def _is_complete(folder: Path) -> bool:
    """Return whether a folder has everything that running a model takes. Raises ValueError for a damaged index."""
    if not all((folder / name).is_file() for name in NEEDED):
        return False
    if not (folder / INDEX).is_file():
        return (folder / "model.safetensors").is_file()
    return all((folder / shard).is_file() for shard in read_weight_map(folder / INDEX).values())


def _is_supported(folder: Path) -> bool:
    """Return whether a folder is complete and holds an architecture that can be run here."""
    try:
        return _is_complete(folder) and bool(read_config(folder))
    except ValueError:  # some other model in the user's cache, or a damaged one
        return False


def list_models() -> dict[str, Path]:
    """Return the folders of the complete downloads of supported architectures, by name."""
    found = {}
    # Earlier versions of this project kept models in a folder of their own.
    for folder in sorted((get_base_dir() / "hub").glob("*--*")):
        found[folder.name.replace("--", "/", 1)] = folder
    for ref in sorted(_cache_dir().glob("models--*/refs/**/*")):
        parts = ref.relative_to(_cache_dir()).parts
        repo = parts[0].removeprefix("models--").replace("--", "/")
        revision = "/".join(parts[2:])
        if ref.is_file():
            found[repo if revision == "main" else f"{repo}@{revision}"] = _snapshot(repo, revision)
    return {name: folder for name, folder in found.items() if _is_supported(folder)}


def find_folder(name: str) -> tuple[str, Path]:
    """Return (full name, folder) of an open-weights model by path, ORG/NAME, or NAME where only one is so named.

    Raises ValueError, which lists the models that are here, if there is no such model or only a part of one."""
    if (Path(name) / "config.json").is_file():
        return Path(name).resolve().name, Path(name)
    repo, revision = parse_name(name)
    full_name = repo if revision == "main" else f"{repo}@{revision}"
    here = list_models()
    matches = [each for each in here if full_name in (each, each.partition("/")[2])]
    if len(matches) == 1:
        return matches[0], here[matches[0]]
    folder = _snapshot(repo, revision)  # a commit has no ref, and is not in the list
    if _is_complete(folder):
        return full_name, folder
    there = f"there are {', '.join(matches)}" if matches else f"here are {', '.join(here) or 'none'}"
    raise ValueError(f"no model {name!r} here: {there}; python -m scripts.models download ORG/NAME fetches one")


def download(
    name: str, revision: str | None = None, include: Sequence[str] = (), offline: bool = False, workers: int = 8
) -> Path:
    """Fetch what is missing of a model, or the files that match the patterns of `include`; return its folder.

    Files arrive under temporary names and are compared with their hashes. With `offline` nothing is fetched. Raises
    ValueError if the hub has no such model, if it cannot be run here, or if it is not here and `offline` is set;
    raises OSError if the disk has too little room or the hub cannot be reached (see `hub_errors`)."""
    from huggingface_hub import snapshot_download

    repo, named_revision = parse_name(name)
    revision = revision or named_revision
    if offline:
        folder = _snapshot(repo, revision)
        if not _is_complete(folder):
            raise ValueError(f"{name} is not here, or not wholly: download it without --offline")
        return folder

    def fetch() -> Path:
        _check_before_download(repo, revision, include)
        patterns = list(include or FILES)
        return Path(snapshot_download(repo, revision=revision, allow_patterns=patterns, max_workers=workers))

    folder = persistently(fetch, repo)
    _verify_files(repo, folder)
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
        if missing or not any(name.endswith(".safetensors") for name in sizes):
            raise ValueError(f"{repo} lacks {', '.join(missing) or '.safetensors files'}: it cannot be run here")
    folder = _snapshot(repo, info.sha or revision)
    needed = sum(size for path, size in sizes.items() if not (folder / path).exists())
    _cache_dir().mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(_cache_dir()).free
    if needed > free:
        raise ValueError(f"{needed / 1e9:.1f} GB to download, {free / 1e9:.1f} GB free in {_cache_dir()}: make room")


def _matches_name(path: Path) -> bool:
    """Compare a cached file with its hash.

    The cache names each file by the hub's hash of it, and a snapshot holds links: SHA-256 for large files, git's SHA-1
    over a header and the bytes for the others. Where the system has no links there is nothing to compare with."""
    if not path.is_symlink():
        return True
    name = Path(os.readlink(path)).name
    if len(name) == 64:
        return sha256_file(path) == name
    data = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest() == name


def _verify_files(name: str, folder: Path) -> int:
    """Compare all files of a folder with their hashes and return how many they are.

    Raises ValueError if some are damaged, after deleting these, so that another download fetches them again."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    damaged = [path for path in files if not _matches_name(path)]
    for path in damaged:
        blob = path.parent / os.readlink(path)
        path.resolve().unlink(missing_ok=True)
        blob.unlink(missing_ok=True)
        path.unlink()
    if damaged:
        names = ", ".join(path.relative_to(folder).as_posix() for path in damaged)
        raise ValueError(f"{name}: damaged, and deleted: {names}; python -m scripts.models download {name}")
    return len(files)


def verify(name: str) -> int:
    """Compare every file of a download with its hash and return how many there are; raises ValueError as above."""
    full_name, folder = find_folder(name)
    if folder.parent.name != "snapshots":
        raise ValueError(f"{name} is a plain folder without hashes: download it again to have its files checked")
    return _verify_files(full_name, folder)


def remove(name: str) -> int:
    """Delete a download with all its revisions and return the bytes set free. Raises ValueError if it is not here."""
    from huggingface_hub import CacheNotFound, scan_cache_dir

    repo, _ = parse_name(name)
    old_folder = get_base_dir() / "hub" / repo.replace("/", "--")
    if old_folder.is_dir():
        size = sum(path.stat().st_size for path in old_folder.rglob("*") if path.is_file())
        shutil.rmtree(old_folder)
        return size
    try:
        cache = scan_cache_dir()
    except CacheNotFound as error:
        raise ValueError(f"{name} is not here: nothing has been downloaded yet") from error
    for cached in cache.repos:
        if cached.repo_type == "model" and cached.repo_id == repo:
            strategy = cache.delete_revisions(*(revision.commit_hash for revision in cached.revisions))
            strategy.execute()
            return strategy.expected_freed_size
    raise ValueError(f"{name} is not here: {', '.join(list_models()) or 'no model'} is")


def info(folder: Path) -> dict[str, Any]:
    """Describe the model in a folder by its config and the headers of its files; no weights are read."""
    config = read_config(folder)
    tensors = stored_tensors(folder).values()
    shape = FAMILIES[config["model_type"]].config_type.from_json(config)
    numel = {tensor.name: torch.Size(tensor.shape).numel() for tensor in tensors}
    plain = sum(numel[tensor.name] for tensor in tensors if tensor.dtype != "U8")
    # An MXFP4 block holds two 4-bit parameters per byte; the bytes beside it are scales.
    packed = sum(2 * numel[tensor.name] for tensor in tensors if tensor.name.endswith("_blocks"))
    return {
        "architecture": config["model_type"],
        "parameters": plain + packed,
        "bytes": sum(numel[tensor.name] * TYPE_BYTES.get(tensor.dtype, 8) for tensor in tensors),
        "types": sorted({tensor.dtype for tensor in tensors}),
        "context": shape.sequence_len,
        "vocabulary": shape.vocab_size,
        "commit": folder.name if folder.parent.name == "snapshots" else None,
        "folder": str(folder),
    }


@dataclass(frozen=True)
class NamedModel:
    """A model that is on this machine and not loaded yet."""

    name: str
    folder: Path
    own: bool  # a checkpoint of this project
    step: int | None = None  # of an own checkpoint; None = the newest
    places: tuple[torch.device, ...] = ()  # the device of each layer, or one for all; () = where `load` is told
    placement: str = ""  # one line for the user about size and devices, by `find_all`

    def n_bytes(self, dtype: torch.dtype, ranks: int = 1) -> int:
        """Return the bytes of its weights on each of the ranks that share its layers, from the files' headers."""
        total = 0
        for tensor in stored_tensors(self.folder).values():
            size = torch.Size(tensor.shape).numel()
            size *= 1 if tensor.dtype == "U8" else dtype.itemsize  # MXFP4 stays packed in memory
            total += size // ranks if ".layers." in tensor.name else size
        return total

    def load(
        self, device: torch.device, max_batch: int, int8: bool = False, ranks: int = 1
    ) -> tuple[Engine, ChatFormat]:
        """Load it and return an engine with its chat format. Raises ValueError if `ranks` cannot share its matrices."""
        if self.places:
            device = self.places[0]
        if self.own:
            if ranks > 1:
                raise ValueError(f"--tensor-parallel: {self.name} is a model of this project, which runs on one device")
            stage, tag = self.name.split("/")
            own_model, own_tokenizer, _ = checkpoint.load_model(stage, device, tag, self.step)
            return Engine(own_model, own_tokenizer, max_batch, int8=int8), ChatFormat(own_tokenizer)
        dtype = pick_dtype(device)
        tokenizer: Any
        if ranks > 1:
            # Every rank maps the whole model into the CPU's memory, whose pages they share, then takes its part.
            model, tokenizer = load(self.folder, "cpu", dtype)
            model = tensor_parallel(model, dist.init_device_mesh(device.type, (ranks,)))
        else:
            model, tokenizer = load(self.folder, self.places if len(self.places) > 1 else device, dtype)
        return Engine(model, tokenizer, max_batch, int8=int8), chat_format(self.folder, tokenizer)


def own_checkpoints() -> list[str]:
    """Return the names, STAGE/TAG, of the checkpoints that were trained here."""
    folders = sorted((get_base_dir() / "checkpoints").glob("*/*"))
    names = [(folder.parent.name, folder.name) for folder in folders]
    return [f"{stage}/{tag}" for stage, tag in names if checkpoint.list_steps(stage, tag)]


def find(name: str, step: int | None = None) -> NamedModel:
    """Return the model of that name, at `step` of its training if given.

    Raises ValueError, which says what there is instead, if there is no such model or step."""
    stage, _, tag = name.partition("/")
    if stage in STAGES:
        tag = tag or checkpoint.find_tag(stage)
        folder = checkpoint.checkpoint_dir(stage, tag)
        steps = checkpoint.list_steps(stage, tag)
        if step is not None and steps and step not in steps:
            raise ValueError(f"no such checkpoint in {folder}: steps there are {', '.join(map(str, steps))}")
        if steps:
            number = steps[-1] if step is None else step
            return NamedModel(f"{stage}/{tag}", folder / f"step_{number:06d}", own=True, step=step)
        if name not in list_models():  # an organisation on the hub may have the name of a stage
            here = ", ".join(own_checkpoints())
            raise ValueError(f"no such checkpoint in {folder}: here are {here}; see python -m scripts.models list")
    if step is not None:
        raise ValueError(f"--step {step}: {name} is no checkpoint of your own, only those have steps")
    full_name, folder = find_folder(name)
    return NamedModel(full_name, folder, own=False)


def pick_devices(names: str) -> list[torch.device]:
    """Return the devices that `--devices` names. Raises ValueError for one that this machine does not have."""
    devices = {}  # an ordered set
    try:
        for name in names.split(","):
            zeros = torch.zeros(1, device=name.strip())
            zeros.tolist()  # fails on "meta", which holds no values
            devices[zeros.device] = True
    except (RuntimeError, AssertionError) as error:  # the second where PyTorch was built without the kind
        raise ValueError(f"--devices {names}: not all are here ({str(error).splitlines()[0]})") from error
    return list(devices)


def find_all(
    names: Sequence[str],
    device: torch.device,
    step: int | None = None,
    devices: str | None = None,
    ranks: int = 1,
) -> list[NamedModel]:
    """Return the models of these names, each with the devices it will be loaded on and a line about its memory.

    Open-weights models are laid over `devices`, layer after layer; without it, over all GPUs if they do not fit on
    `device`. `ranks` says how many processes share each model's matrices. Raises ValueError if a model is not here, two
    have one name, or they do not fit in free memory together."""
    models = [find(name, step) for name in dict.fromkeys(names)]
    if len({model.name for model in models}) < len(models):
        raise ValueError(f"two of {', '.join(names)} have the same name: rename a folder")
    places = pick_devices(devices) if devices else [device]
    dtype = pick_dtype(places[0])
    sizes = [model.n_bytes(dtype, ranks) for model in models]
    if not devices and ranks == 1 and device.type == "cuda" and sum(sizes) > free_memory(device):
        places = [torch.device("cuda", i) for i in range(torch.cuda.device_count())]
    room = [free_memory(place) for place in places]
    free = f"{sum(room) / 1e9:.2f} GB are free"
    if sum(sizes) > sum(room):
        all_names = ", ".join(model.name for model in models)
        need = f"{all_names}: {sum(sizes) / 1e9:.2f} GB are needed"
        raise ValueError(f"{need} and {free}: take smaller or fewer ones, or other --devices")
    placed = []
    for model, size in zip(models, sizes, strict=True):
        whole = model.own or len(places) == 1 or (not devices and size <= max(room))
        pieces = [size] if whole else layer_bytes(skeleton(model.folder), dtype)
        indices = split_layers(pieces, room)
        for index, piece in zip(indices, pieces, strict=True):
            room[index] -= piece
        counts = Counter(indices)
        where = ", ".join(f"{places[i]}" if whole else f"{places[i]} ({n} layers)" for i, n in counts.items())
        name = f"{model.name}, {model.folder.name.replace('_', ' ')}" if model.own else model.name
        weights = f"{size / 1e9:.2f} GB of weights in {str(dtype).removeprefix('torch.')}"
        line = f"{name}: {weights} for {where}, {free}"
        placed.append(replace(model, places=tuple(places[i] for i in indices), placement=line))
    return placed
