"""Open-weights models from a folder of safetensors: `load(folder, device)` -> a model and its tokenizer.

    config.json                             which family, and its numbers
    model.safetensors                       or shards, with model.safetensors.index.json to say which holds what
    tokenizer.json, tokenizer_config.json   text to ids; names of special tokens; chat template
    generation_config.json                  which tokens end an answer

`load_model` builds the family's model without values, reads the headers of the files, checks that every name, type and
shape fits, and only then reads weights. Nothing in the folder is run, and a wrong file costs no memory.
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

# model_type in config.json -> the class that runs it.
FAMILIES: dict[str, type[OpenModel]] = {
    "gpt2": GPT2,
    "llama": Llama,
    "mistral": Llama,
    "qwen2": Llama,
    "qwen3": Llama,
    "gpt_oss": GptOss,
}
INDEX = "model.safetensors.index.json"
LARGEST_HEADER = 16 << 20  # bytes; models of 100,000 tensors stay below
FLOAT_TYPES = ("F32", "BF16", "F16")

# One device for the whole model, or one for each layer.
Place = torch.device | str | Sequence[torch.device]


class StoredTensor(NamedTuple):
    """A tensor in a file, as the file's header describes it."""

    path: Path
    name: str
    dtype: str  # safetensors' word, such as BF16
    shape: tuple[int, ...]


def read_config(folder: Path | str) -> dict[str, Any]:
    """Return config.json of a model's folder.

    Raises ValueError if there is none, or if its architecture or the quantization of its weights is not known here."""
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
    quantization = values.get("quantization_config")
    method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
    if method is not None and (kind, method) != ("gpt_oss", "mxfp4"):
        raise ValueError(f"{path}: weights quantized by {method!r:.40} are not supported: take the plain ones")
    return values


def stored_tensors(folder: Path | str) -> dict[str, StoredTensor]:
    """Return every tensor of a folder by its name, from the headers of its files alone.

    Raises ValueError, which names the file, if one is missing, damaged, or not what the index says."""
    folder = Path(folder)
    index_path = folder / INDEX
    weight_map: dict[str, str] | None = None
    if index_path.is_file():
        weight_map = read_weight_map(index_path)
        files = sorted(set(weight_map.values()))
    elif (folder / "model.safetensors").is_file():
        files = ["model.safetensors"]
    else:
        raise ValueError(f"{folder} holds no model.safetensors, whole or in shards: other formats are not read")
    found: dict[str, StoredTensor] = {}
    for file in files:
        for name, tensor in _read_header(folder / file).items():
            if name in found or (weight_map is not None and weight_map.get(name) != file):
                raise ValueError(f"{index_path} does not place the tensor {name!r:.80} in {file}, which has it")
            found[name] = tensor
    missing = sorted((weight_map or {}).keys() - found.keys())
    if missing:
        raise ValueError(f"{folder}: {_first_few(missing)} named by the index, but in no file")
    return found


def read_weight_map(path: Path) -> dict[str, str]:
    """Return the index's map from tensors to files.

    Raises ValueError for a damaged index, and for a file name with a folder in it, which could lead anywhere."""
    index = read_json(path)
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{path} has no weight_map")
    for file in weight_map.values():
        if not isinstance(file, str) or Path(file).name != file or not file.endswith(".safetensors"):
            raise ValueError(f"{path}: {file!r:.80} is not the name of a .safetensors file beside it")
    return weight_map


def _read_header(path: Path) -> dict[str, StoredTensor]:
    """Return the tensors of one file by their names; no values are read."""
    if not path.is_file():  # also a named pipe, which opening would wait for
        raise ValueError(f"{path} is missing: download the whole model")
    try:
        # A file begins with the length of its header. safe_open would try to make room for whatever it says.
        with open(path, "rb") as file:
            header_bytes = int.from_bytes(file.read(8), "little")
        if header_bytes > LARGEST_HEADER:
            raise ValueError(f"{path} is not a safetensors file: its header would have {header_bytes} bytes")
        tensors = {}
        with safe_open(path, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118 (it is no dict)
                part = opened.get_slice(name)
                tensors[name] = StoredTensor(path, name, part.get_dtype(), tuple(part.get_shape()))
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is missing, damaged or not a safetensors file ({error})") from error
    return tensors


def _first_few(names: list[str]) -> str:
    """Return the first three names, and how many there are."""
    dots = ", ..." if len(names) > 3 else ""
    return f"{', '.join(names[:3])}{dots} ({len(names)} tensors)"


def skeleton(folder: Path | str) -> OpenModel:
    """Return the model that config.json describes, without values: its tensors are on PyTorch's device "meta"."""
    values = read_config(folder)
    family: Any = FAMILIES[values["model_type"]]
    config = family.config_type.from_json(values)
    with torch.device("meta"):
        return family(config)


def _match_names(model: OpenModel, stored: dict[str, StoredTensor], folder: Path | str) -> dict[str, StoredTensor]:
    """Return the stored tensors by the names of the model's parameters.

    Raises ValueError for tensors that are missing, unknown, or of another shape or type than the model's."""
    wanted = model.state_dict()
    found = {}
    for name, tensor in stored.items():
        target = model.rename(name)
        # With tied embeddings some files hold the head as well; it is a copy of the embedding.
        if target is not None and not (target == "lm_head.weight" and model.config.tied):
            found[target] = tensor
    wrong_shapes = []
    wrong_types = []
    for name in wanted.keys() & found.keys():
        allowed = FLOAT_TYPES if wanted[name].is_floating_point() else ("U8",)
        if found[name].shape != wanted[name].shape:
            wrong_shapes.append(f"{name} {list(found[name].shape)} for {list(wanted[name].shape)}")
        elif found[name].dtype not in allowed:
            wrong_types.append(f"{name} {found[name].dtype}")
    problems = {
        "missing": sorted(wanted.keys() - found.keys()),
        "not the model's": sorted(found.keys() - wanted.keys()),
        "of another shape": sorted(wrong_shapes),
        "of another type": sorted(wrong_types),
    }
    words = [f"{_first_few(names)} {problem}" for problem, names in problems.items() if names]
    if words:
        raise ValueError(f"the weights in {folder} do not fit its config.json: {'; '.join(words)}")
    return found


def load_model(folder: Path | str, device: Place, dtype: torch.dtype | None = None) -> OpenModel:
    """Load the model in `folder` in eval mode, with floating-point weights in `dtype` (None: the device's best).

    `device` is one for the whole model or one per layer (see `OpenModel.parts`). Files are memory-mapped: on the CPU,
    weights that keep their dtype stay views of the file, so that a second process shares their pages. Raises
    ValueError, which names what is wrong, if the folder is not that of a supported model."""
    model = skeleton(folder)
    found = _match_names(model, stored_tensors(folder), folder)
    n_layer = model.config.n_layer
    places = [torch.device(device)] * n_layer if isinstance(device, torch.device | str) else list(device)
    dtype = dtype or pick_dtype(places[0])

    # Parts share tensors with the model; identity says which part, hence which device, a tensor belongs to.
    place_of_tensor = {}
    for part, place in zip(model.parts, places, strict=True):
        for tensor in part.state_dict(keep_vars=True).values():
            place_of_tensor[id(tensor)] = place
    place_of_name = {name: place_of_tensor[id(t)] for name, t in model.state_dict(keep_vars=True).items()}

    names_by_file: dict[Path, list[str]] = {}
    for name, stored in found.items():
        names_by_file.setdefault(stored.path, []).append(name)
    state = {}
    for path, names in names_by_file.items():
        with safe_open(path, framework="pt") as opened:
            for name in names:
                value = opened.get_tensor(found[name].name).to(place_of_name[name])
                state[name] = value.to(dtype) if value.is_floating_point() else value
    model.load_state_dict(state, assign=True)
    for part, place in zip(model.parts, places, strict=True):
        part.to(place)  # moves buffers that are in no file, such as rotary frequencies
    return model.requires_grad_(False).eval()


def load(folder: Path | str, device: Place, dtype: torch.dtype | None = None) -> tuple[OpenModel, HFTokenizer]:
    """Load a model and its tokenizer: `model(idx_BT)` returns logits (B, T, V) in fp32; see `load_model`.

    The tokenizer has the interface of `nanochat.tokenizer.Tokenizer`. Raises ValueError as `load_model` does, or for a
    folder without a usable tokenizer.json."""
    tokenizer = HFTokenizer.from_directory(folder)  # first: a wrong one is found before gigabytes are read
    return load_model(folder, device, dtype), tokenizer
