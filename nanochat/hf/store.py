"""A model by its name: a checkpoint of your own, a folder, or a download in Hugging Face's cache.

    sft, sft/d12             the newest checkpoint of a stage, or of a stage and tag: see checkpoint.py
    some/folder              any folder with config.json, safetensors and tokenizer.json
    ORG/NAME, NAME           a download; ORG/NAME@REVISION is another branch, tag or commit than main

`find_all` turns names into `NamedModel`s and decides which device each goes to, and `NamedModel.load` makes an engine.
Downloads lie in the cache that transformers uses, too, so a model that you already have is found. hf/download.py fills
that cache.
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import torch
import torch.distributed as dist

from nanochat import checkpoint
from nanochat.common import STAGES, get_base_dir
from nanochat.compute import free_memory, pick_dtype
from nanochat.conversation import ChatFormat, TextFormat
from nanochat.engine import Engine
from nanochat.hf.chat import chat_format
from nanochat.hf.load import FAMILIES, load, read_config, skeleton, stored_tensors, weight_files
from nanochat.hf.parallel import layer_bytes, split_layers, tensor_parallel

DEVICES = "lay an open-weights model over these, such as cuda:0,cuda:1; unset: over all GPUs if one is too small"
NEEDED = ("config.json", "tokenizer.json")
HUB_HOSTS = ("huggingface.co", "www.huggingface.co", "hf.co")
REVISION_PAGES = ("tree", "blob", "resolve", "raw", "commit", "commits")  # a revision follows in the address


# --- downloads in the cache


def parse_name(name: str) -> tuple[str, str]:
    """Return (ORG/NAME, revision) for ORG/NAME, ORG/NAME@REVISION, or the address of a page of the model on the hub.

    Raises ValueError for an address of another host, or of a page that is no model's.
    """
    name = name.strip()
    if "://" in name or name.partition("/")[0] in HUB_HOSTS:
        return _parse_address(name if "://" in name else f"https://{name}")
    repo, _, revision = name.partition("@")
    return repo, revision or "main"


def _parse_address(address: str) -> tuple[str, str]:
    """Return (ORG/NAME, revision) for https://HOST/ORG/NAME or a page below it, such as .../tree/REVISION/FOLDER."""
    from huggingface_hub import constants

    url = urlsplit(address)
    endpoint = urlsplit(constants.ENDPOINT)  # HF_ENDPOINT, which may be a mirror
    is_hub = url.netloc == endpoint.netloc or url.hostname in HUB_HOSTS
    if not is_hub or url.scheme not in ("https", "http"):
        raise ValueError(f"{address} is not on the hub, {endpoint.netloc}: give ORG/NAME; HF_ENDPOINT names a mirror")
    path = url.path.removesuffix("/").removesuffix(".git")
    parts = [unquote(part) for part in path.split("/") if part]  # a revision such as refs%2Fpr%2F1 is one part
    # The oldest models have no ORG: https://HOST/NAME/tree/REVISION.
    n_name = 1 if len(parts) < 2 or parts[1] in REVISION_PAGES else 2
    if not parts or parts[0] in ("datasets", "spaces", "models"):
        raise ValueError(f"{address} is not the page of a model: it must be like https://{endpoint.netloc}/ORG/NAME")
    page = parts[n_name:]
    has_revision = len(page) > 1 and page[0] in REVISION_PAGES
    return "/".join(parts[:n_name]), page[1] if has_revision else "main"


def cache_dir() -> Path:
    """Return the folder in which huggingface_hub keeps repositories: `$HF_HUB_CACHE`, or below `$HF_HOME`."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)


def old_downloads() -> Path:
    """Return the folder in which earlier versions of this project kept models, each as ORG--NAME."""
    return get_base_dir() / "hub"


def snapshot(repo: str, revision: str) -> Path:
    """Return the folder of a download in the cache, whether or not it is there.

    The cache's layout is documented by the hub: `refs/<revision>` holds a commit, `snapshots/<commit>` its files.
    """
    folder = cache_dir() / f"models--{repo.replace('/', '--')}"
    ref = folder / "refs" / revision
    commit = ref.read_text().strip() if ref.is_file() else revision
    return folder / "snapshots" / commit


def is_complete(folder: Path) -> bool:
    """Return whether a folder has every file that the model needs to run. Raises ValueError for a damaged index."""
    needed = [*(folder / name for name in NEEDED), *weight_files(folder)]
    return all(path.is_file() for path in needed)


def list_models() -> dict[str, Path]:
    """Return the folders of the downloads that can be run here, by name."""
    found = {}
    for folder in sorted(old_downloads().glob("*--*")):
        found[folder.name.replace("--", "/", 1)] = folder
    cache = cache_dir()
    for ref in sorted(cache.glob("models--*/refs/**/*")):
        if ref.is_file():
            # models--ORG--NAME/refs/REVISION, and a revision may hold slashes
            folder_name, _, *parts = ref.relative_to(cache).parts
            repo = folder_name.removeprefix("models--").replace("--", "/")
            revision = "/".join(parts)
            found[_full_name(repo, revision)] = snapshot(repo, revision)
    models = {}
    for name, folder in found.items():
        try:
            if is_complete(folder) and read_config(folder):
                models[name] = folder
        except ValueError:  # an architecture that is not known here, or damaged
            continue
    return models


def _full_name(repo: str, revision: str) -> str:
    return repo if revision == "main" else f"{repo}@{revision}"


def find_folder(name: str) -> tuple[str, Path]:
    """Return (full name, folder) of an open-weights model by path, ORG/NAME, or NAME where only one is so named.

    Raises ValueError, which lists the models that are here, if there is no such model or only a part of one.
    """
    path = Path(name)
    if (path / "config.json").is_file():
        return path.resolve().name, path
    repo, revision = parse_name(name)
    full_name = _full_name(repo, revision)
    here = list_models()
    matches = [each for each in here if full_name in (each, each.partition("/")[2])]
    if len(matches) == 1:
        return matches[0], here[matches[0]]
    folder = snapshot(repo, revision)  # a commit has no ref, and is not in the list
    if is_complete(folder):
        return full_name, folder
    if matches:
        raise ValueError(f"{name!r} may be any of {', '.join(matches)}: say which")
    there = ", ".join([*own_checkpoints(), *here]) or "none"
    raise ValueError(
        f"no model {name!r} here: there are {there}; python -m scripts.models download ORG/NAME fetches one"
    )


def info(folder: Path) -> dict[str, Any]:
    """Describe the model in a folder by its config and the headers of its files; no weights are read."""
    config = read_config(folder)
    shape = FAMILIES[config["model_type"]].config_type.from_json(config)
    tensors = stored_tensors(folder).values()
    parameters = 0
    for tensor in tensors:
        if tensor.name.endswith("_blocks"):
            parameters += 2 * math.prod(tensor.shape)  # a byte of an MXFP4 block holds two 4-bit parameters
        elif tensor.dtype != "U8":  # the other bytes are the blocks' scales
            parameters += math.prod(tensor.shape)
    return {
        "architecture": config["model_type"],
        "parameters": parameters,
        "bytes": sum(path.stat().st_size for path in {tensor.path for tensor in tensors}),
        "types": sorted({tensor.dtype for tensor in tensors}),
        "context": shape.sequence_len,
        "vocabulary": shape.vocab_size,
        "commit": folder.name if folder.parent.name == "snapshots" else None,
        "folder": str(folder),
    }


# --- models of either kind


@dataclass(frozen=True)
class NamedModel:
    """A model that is on this machine and not loaded yet."""

    name: str
    folder: Path
    own: bool  # a checkpoint of this project
    step: int | None = None  # of an own checkpoint; None = the newest whole one
    # By `find_all`: the device of each layer, or one for all; and a line for the user about size and devices.
    places: tuple[torch.device, ...] = ()
    placement: str = ""

    def n_bytes(self, dtype: torch.dtype, ranks: int = 1) -> int:
        """Return the bytes of its weights on each of the ranks that share its layers, from the files' headers."""
        total = 0
        for tensor in stored_tensors(self.folder).values():
            item_bytes = 1 if tensor.dtype == "U8" else dtype.itemsize  # MXFP4 stays packed in memory
            size = math.prod(tensor.shape) * item_bytes
            total += size // ranks if ".layers." in tensor.name else size
        return total

    def load(
        self, device: torch.device, max_batch: int, int8: bool = False, ranks: int = 1
    ) -> tuple[Engine, ChatFormat]:
        """Load it and return an engine with its chat format.

        `device` counts for a model without `places`. Raises ValueError if `ranks` processes cannot share its matrices.
        """
        if self.places:
            device = self.places[0]
        if self.own:
            if ranks > 1:
                raise ValueError(f"--tensor-parallel: {self.name} is a model of this project, which runs on one device")
            stage, tag = self.name.split("/")
            own_model, own_tokenizer, _ = checkpoint.load_model(stage, device, tag, self.step)
            # A base model has seen documents alone: the marks of turns are in its vocabulary, but mean nothing to it.
            form = TextFormat(own_tokenizer) if stage == "base" else ChatFormat(own_tokenizer)
            return Engine(own_model, own_tokenizer, max_batch, int8=int8), form
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
    names = []
    for folder in sorted((get_base_dir() / "checkpoints").glob("*/*")):
        if checkpoint.list_steps(folder.parent.name, folder.name):
            names.append(f"{folder.parent.name}/{folder.name}")
    return names


def find(name: str, step: int | None = None) -> NamedModel:
    """Return the model of that name, at `step` of its training if given.

    Raises ValueError, which says what there is instead, if there is no such model or step.
    """
    stage, _, tag = name.partition("/")
    tag = tag.rstrip("/")  # as names of folders end that a shell has completed
    if stage in STAGES:
        tag = tag or checkpoint.find_tag(stage)
        folder = checkpoint.checkpoint_dir(stage, tag)
        steps = checkpoint.list_steps(stage, tag)
        if not steps:
            here = ", ".join(own_checkpoints())
            raise ValueError(f"no such checkpoint in {folder}: here are {here}; see python -m scripts.models list")
        if step not in (None, *steps):
            raise ValueError(f"no such checkpoint in {folder}: steps there are {', '.join(map(str, steps))}")
        newest_or_asked = steps[-1] if step is None else step
        folder = checkpoint.step_dir(stage, tag, newest_or_asked)
        return NamedModel(f"{stage}/{tag}", folder, own=True, step=step)
    if step is not None:
        raise ValueError(f"--step {step}: {name} is no checkpoint of your own, only those have steps")
    full_name, folder = find_folder(name)
    return NamedModel(full_name, folder, own=False)


# --- and the devices they go to


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
    have one name, or they do not fit in free memory together.
    """
    models = [find(name, step) for name in dict.fromkeys(names)]
    if len({model.name for model in models}) < len(models):
        raise ValueError(f"two of {', '.join(names)} have the same name: rename a folder")
    places = pick_devices(devices) if devices else [device]
    dtype = pick_dtype(places[0])
    sizes = [model.n_bytes(dtype, ranks) for model in models]
    needed = sum(sizes)
    if device.type == "cuda" and not devices and ranks == 1 and needed > free_memory(device):
        places = [torch.device("cuda", i) for i in range(torch.cuda.device_count())]
    room = [free_memory(place) for place in places]
    free = f"{sum(room) / 1e9:.2f} GB are free"
    if needed > sum(room):
        all_names = ", ".join(model.name for model in models)
        raise ValueError(
            f"{all_names}: {needed / 1e9:.2f} GB are needed and {free}: take smaller or fewer ones, or other --devices"
        )

    placed = []
    for model, size in zip(models, sizes, strict=True):
        # `--devices` asks for a model to be spread; without it, that happens only to one that no device can hold.
        whole = model.own or len(places) == 1 or (not devices and size <= max(room))
        pieces = [size] if whole else layer_bytes(skeleton(model.folder), dtype)
        indices = split_layers(pieces, room)  # the device of each piece
        for index, piece in zip(indices, pieces, strict=True):
            room[index] -= piece
        where = str(places[indices[0]])
        if not whole:
            where = ", ".join(f"{places[index]} ({n} layers)" for index, n in Counter(indices).items())
        title = f"{model.name}, {model.folder.name.replace('_', ' ')}" if model.own else model.name
        weights = f"{size / 1e9:.2f} GB of weights in {str(dtype).removeprefix('torch.')}"
        placed_model = replace(
            model,
            places=tuple(places[index] for index in indices),
            placement=f"{title}: {weights} for {where}, {free}",
        )
        placed.append(placed_model)
    return placed
