"""Open-weights models from a folder of safetensors: `load(folder, device)` -> a model and its tokenizer.

    config.json                             which family, and its numbers
    model.safetensors                       or shards, with model.safetensors.index.json to say which holds what
    tokenizer.json, tokenizer_config.json   text to ids; names of special tokens; chat template
    generation_config.json                  which tokens end an answer

Nothing in the folder is run, and nothing is allocated before every name, type and shape is known to fit.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open

from nanochat.common import read_json
from nanochat.compute import pick_dtype
from nanochat.hf.gpt2 import GPT2
from nanochat.hf.gpt_oss import GptOss
from nanochat.hf.layers import OpenModel
from nanochat.hf.llama import Llama
from nanochat.hf.tokenizer import HFTokenizer

FAMILIES: dict[str, type[OpenModel]] = {"gpt2": GPT2, "llama": Llama, "mistral": Llama, "qwen2": Llama, "qwen3": Llama}
FAMILIES["gpt_oss"] = GptOss
Place = torch.device | str | Sequence[torch.device]
_INDEX = "model.safetensors.index.json"
_LARGEST_HEADER = 16 << 20  # bytes; models of 100,000 tensors stay below
_FLOATS = ("F32", "BF16", "F16")


class Stored(NamedTuple):
    """A tensor in a file: where it lies, and what the file's header says of it."""

    path: Path
    name: str
    dtype: str  # safetensors' word, such as BF16
    shape: tuple[int, ...]


def read_config(folder: Path | str) -> dict[str, Any]:
    """config.json of a model folder; ValueError when there is none, or when its architecture is not known here."""
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise ValueError(f"{folder} holds no config.json: is it a model's folder?")
    values = read_json(path)
    if not isinstance(values, dict) or not isinstance(values.get("model_type"), str):
        raise ValueError(f"{path} names no model_type")
    kind = values["model_type"]
    if kind in ("nanochat", "nanochat_gpt"):
        raise ValueError(f"{folder} is a nanochat's: python -m scripts.models import makes it one of your checkpoints")
    if kind not in FAMILIES:
        named = f"{kind!r:.60} {values.get('architectures') or ''!s:.80}".strip()
        raise ValueError(f"{path}: the architecture {named} is not supported; known are {', '.join(FAMILIES)}")
    quantized = values.get("quantization_config")
    method = quantized.get("quant_method") if isinstance(quantized, dict) else quantized
    if method is not None and (kind, method) != ("gpt_oss", "mxfp4"):
        raise ValueError(f"{path}: weights quantized by {method!r:.40} are not supported: take the plain ones")
    return values


def stored_tensors(folder: Path | str) -> dict[str, Stored]:
    """Every tensor of a folder by its name, from the files' headers alone. ValueError names a file that is not whole
    or not what the index says."""
    folder = Path(folder)
    if (folder / _INDEX).is_file():
        index = read_json(folder / _INDEX)
        where = index.get("weight_map") if isinstance(index, dict) else None
        if not isinstance(where, dict) or not where:
            raise ValueError(f"{folder / _INDEX} has no weight_map")
        for file in where.values():
            if not isinstance(file, str) or Path(file).name != file or not file.endswith(".safetensors"):
                raise ValueError(f"{folder / _INDEX}: {file!r:.80} is not the name of a .safetensors file beside it")
        files = sorted(set(where.values()))
    elif (folder / "model.safetensors").is_file():
        where, files = None, ["model.safetensors"]
    else:
        raise ValueError(f"{folder} holds no model.safetensors, whole or in shards: other formats are not read")
    found: dict[str, Stored] = {}
    for file in files:
        for name, tensor in _read_header(folder / file).items():
            if name in found or (where is not None and where.get(name) != file):
                raise ValueError(f"{folder / _INDEX} does not place the tensor {name!r:.80} in {file}, which has it")
            found[name] = tensor
    if missing := sorted(set(where or ()) - found.keys()):
        raise ValueError(f"{folder}: {_listed(missing)} named by the index, but in no file")
    return found


def _read_header(path: Path) -> dict[str, Stored]:
    if not path.is_file():  # nor a pipe, which would be waited for
        raise ValueError(f"{path} is missing: download the whole model")
    try:
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
        if length > _LARGEST_HEADER:
            raise ValueError(f"{path} is not a safetensors file: its header would have {length} bytes")
        with safe_open(path, framework="pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            return {name: Stored(path, name, s.get_dtype(), tuple(s.get_shape())) for name, s in slices.items()}
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is missing, damaged or not a safetensors file ({error})") from error


def _listed(names: list[str]) -> str:
    """The first few of `names`, and how many there are."""
    return f"{', '.join(names[:3])}{', ...' if len(names) > 3 else ''} ({len(names)} tensors)"


def skeleton(folder: Path | str) -> OpenModel:
    """The model that config.json describes, without values (on PyTorch's device "meta")."""
    values = read_config(folder)
    family: Any = FAMILIES[values["model_type"]]
    with torch.device("meta"):
        return family(family.config_type.from_json(values))


def _fit(model: OpenModel, stored: dict[str, Stored], folder: Path | str) -> dict[str, Stored]:
    """The stored tensors by the model's names; ValueError names what is missing, extra, mis-shaped or mistyped."""
    wanted, placed = model.state_dict(), {}
    for name, tensor in stored.items():
        target = model.rename(name)
        if target is not None and not (target == "lm_head.weight" and model.config.tied):
            placed[target] = tensor
    both = [(name, found, wanted[name]) for name, found in placed.items() if name in wanted]
    kinds = {name: _FLOATS if value.is_floating_point() else ("U8",) for name, value in wanted.items()}
    problems = {
        "missing": sorted(wanted.keys() - placed.keys()),
        "not the model's": sorted(placed.keys() - wanted.keys()),
        "of another shape": [f"{n} {list(f.shape)} for {list(w.shape)}" for n, f, w in both if f.shape != w.shape],
        "of another type": [f"{name} {found.dtype}" for name, found, _ in both if found.dtype not in kinds[name]],
    }
    words = [f"{_listed(names)} {what}" for what, names in problems.items() if names]
    if words:
        raise ValueError(f"the weights in {folder} do not fit its config.json: {'; '.join(words)}")
    return placed


def load_model(folder: Path | str, device: Place, dtype: torch.dtype | None = None) -> OpenModel:
    """The model in `folder`, in eval mode, its floating-point weights in `dtype` (None: the device's best).

    Files are memory-mapped: on CPU, weights of the same dtype stay views of them, so that a second process shares
    their pages; to another device each tensor goes straight from the file. device: for all, or one for each layer (see
    `OpenModel.parts`). Raises ValueError that names what is wrong.
    """
    model, stored = skeleton(folder), stored_tensors(folder)
    if isinstance(device, torch.device | str):
        device = [torch.device(device)] * model.config.n_layer
    dtype = dtype or pick_dtype(device[0])
    parts = list(zip(model.parts, device, strict=True))
    homes = {id(tensor): place for part, place in parts for tensor in part.state_dict(keep_vars=True).values()}
    home = {name: homes[id(tensor)] for name, tensor in model.state_dict(keep_vars=True).items()}
    by_file: dict[Path, list[tuple[str, Stored]]] = {}
    for target, tensor in _fit(model, stored, folder).items():
        by_file.setdefault(tensor.path, []).append((target, tensor))
    state = {}
    for path, tensors in by_file.items():
        with safe_open(path, framework="pt") as file:
            for target, tensor in tensors:
                value = file.get_tensor(tensor.name).to(home[target])
                state[target] = value.to(dtype) if value.is_floating_point() else value
    model.load_state_dict(state, assign=True)
    for part, place in parts:
        part.to(place)  # what is in no file
    return model.requires_grad_(False).eval()


def load(path: Path | str, device: Place, dtype: torch.dtype | None = None) -> tuple[Any, Any]:
    """A supported model's folder -> (model, tokenizer): `model(idx_BT)` gives logits (B, T, V) in fp32.

    See `load_model`. The tokenizer has the interface of `nanochat.tokenizer.Tokenizer`.
    """
    tokenizer = HFTokenizer.from_directory(path)  # first: it is checked in a moment
    return load_model(path, device, dtype), tokenizer
