"""Open-weights models from a folder of safetensors: `load(folder, device)` -> a model and its tokenizer.

    config.json                             which family, and its numbers
    model.safetensors                       or shards, with model.safetensors.index.json to list them
    tokenizer.json, tokenizer_config.json   text to ids; names of special tokens; chat template
    generation_config.json                  which tokens end an answer

`load_model` builds the family's model without values, reads the headers of the files, checks that every name, type and
shape fits, and only then reads weights. Nothing in the folder is run, and a wrong file costs no memory.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
from pydantic import Field
from safetensors import SafetensorError, safe_open

from nanochat.common import read_json
from nanochat.compute import pick_dtype
from nanochat.hf.gpt2 import GPT2
from nanochat.hf.gpt_oss import GptOss
from nanochat.hf.llama import Llama
from nanochat.hf.open_model import OpenConfig, OpenModel
from nanochat.hf.tokenizer import HFTokenizer
from nanochat.language_model import warn_if_not_finite

# model_type in config.json -> the class that runs it.
FAMILIES: dict[str, type[OpenModel]] = {
    "gpt2": GPT2,
    "llama": Llama,  # SmolLM calls itself so as well
    "mistral": Llama,
    "qwen2": Llama,
    "qwen3": Llama,
    "gpt_oss": GptOss,
}
INDEX = "model.safetensors.index.json"
FLOAT_TYPES = ("F32", "BF16", "F16")

# One device for the whole model, or one for each layer.
Place = torch.device | str | Sequence[torch.device]


class Index(OpenConfig):
    """model.safetensors.index.json: which file holds which tensor. No name may lead out of the folder."""

    weight_map: dict[str, Annotated[str, Field(pattern=r"^[^/\\]+\.safetensors$")]] = Field(min_length=1)


class StoredTensor(NamedTuple):
    """A tensor in a file, as the file's header describes it."""

    path: Path
    name: str
    dtype: str  # safetensors' word, such as BF16
    shape: tuple[int, ...]


def read_config(folder: Path | str) -> dict[str, Any]:
    """Return config.json of a model's folder.

    Raises ValueError if there is none, or if its architecture or the quantization of its weights is not known here.
    """
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise ValueError(f"{folder} holds no config.json: is it a model's folder?")
    values = read_json(path)
    if not isinstance(values, dict) or not isinstance(values.get("model_type"), str):
        raise ValueError(f"{path} names no model_type")
    kind = values["model_type"]
    if kind in ("nanochat", "nanochat_gpt"):  # not an open-weights family but our own, which has a way of its own
        raise ValueError(f"{folder} is a nanochat's: python -m scripts.models import makes it one of your checkpoints")
    if kind not in FAMILIES:
        named = f"{kind!r:.60} {values.get('architectures') or ''!s:.80}".strip()
        raise ValueError(f"{path}: the architecture {named} is not supported; known are {', '.join(FAMILIES)}")
    # Quantized weights come in many formats, each with kernels of its own. gpt-oss's is simple enough to unpack.
    quantization = values.get("quantization_config")
    method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
    if method is not None and (kind, method) != ("gpt_oss", "mxfp4"):
        raise ValueError(f"{path}: weights quantized by {method!r:.40} are not supported: take the plain ones")
    return values


def weight_files(folder: Path | str) -> list[Path]:
    """Return the files that hold a model's weights: model.safetensors, or the shards that the index names.

    They need not be there. Raises ValueError if the index is damaged, or if it names a file with a folder in it, which
    could lead anywhere.
    """
    folder = Path(folder)
    path = folder / INDEX
    if not path.is_file():
        return [folder / "model.safetensors"]
    index = Index.from_json(read_json(path), str(path))
    return [folder / file for file in sorted(set(index.weight_map.values()))]


def stored_tensors(folder: Path | str) -> dict[str, StoredTensor]:
    """Return every tensor of a folder by its name, from the headers of its files alone; no values are read.

    Raises ValueError, which names the file, if one is missing or damaged, or has a tensor that another one has, too.
    """
    found: dict[str, StoredTensor] = {}
    for path in weight_files(folder):
        if not path.is_file():  # also a named pipe, which opening would wait for
            raise ValueError(f"{path} is missing: download the whole model; other formats are not read")
        # safetensors is a format without code: a header in JSON, whose length and offsets the library checks against
        # the file's size, then plain bytes. A pickle (pytorch_model.bin) could run anything.
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 (it is no dict)
                    if name in found:
                        raise ValueError(f"{path} has {name!r:.80}, which {found[name].path.name} has, too")
                    part = file.get_slice(name)
                    found[name] = StoredTensor(path, name, part.get_dtype(), tuple(part.get_shape()))
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path} is missing, damaged or not a safetensors file ({error})") from error
    return found


def skeleton(folder: Path | str) -> OpenModel:
    """Return the model that config.json describes, without values: its parameters are on PyTorch's device "meta".

    Buffers, which no file holds, have their values already.
    """
    values = read_config(folder)
    family: Any = FAMILIES[values["model_type"]]
    config = family.config_type.from_json(values)
    with torch.device("meta"):
        return family(config)


def match_parameters(model: OpenModel, folder: Path | str) -> dict[str, StoredTensor]:
    """Return for each parameter of the model the stored tensor that holds its values.

    Raises ValueError for tensors that are missing, unknown, or of another shape or type than the model's.
    """
    # By the model's name; some tensors of a file are not needed.
    found = {}
    for stored in stored_tensors(folder).values():
        target = model.rename(stored.name)
        # With tied embeddings some files hold the head as well; it is a copy of the embedding.
        if target is not None and not (target == "lm_head.weight" and model.config.tied):
            found[target] = stored

    wanted = dict(model.named_parameters())  # a tied head is not among them
    problems = [f"{name} is missing" for name in wanted.keys() - found.keys()]
    for name, stored in found.items():
        if name not in wanted:
            problems.append(f"{stored.name} is not the model's")
            continue
        shape = tuple(wanted[name].shape)
        if model.is_transposed(name):
            shape = shape[::-1]
        types = FLOAT_TYPES if wanted[name].is_floating_point() else ("U8",)
        if stored.shape != shape:
            problems.append(f"{stored.name} is of another shape, {list(stored.shape)} for {list(shape)}")
        elif stored.dtype not in types:
            problems.append(f"{stored.name} is of another type, {stored.dtype}")
    if problems:
        few = "; ".join(sorted(problems)[:3])
        raise ValueError(f"the weights in {folder} do not fit its config.json, {len(problems)} of them: {few}")
    return found


def load_model(folder: Path | str, device: Place, dtype: torch.dtype | None = None) -> OpenModel:
    """Load the model in `folder` in eval mode, with floating-point weights in `dtype` (None: the device's best).

    `device` is one for the whole model or one per layer. Files are memory-mapped: on the CPU, weights that keep their
    dtype stay views of the file, so that a second process shares their pages. Raises ValueError, which names what is
    wrong, if the folder is not that of a supported model.
    """
    # 1. config.json says which family this is; its model has shapes and no values yet.
    model = skeleton(folder)

    # 2. The headers say what the files hold. From here on, everything is known to fit.
    stored = match_parameters(model, folder)

    # 3. Each layer has a device, and what is outside the layers goes with the first or the last of them.
    if isinstance(device, torch.device | str):
        places = [torch.device(device)] * model.config.n_layer
    else:
        places = list(device)
    dtype = dtype or pick_dtype(places[0])

    # 4. Weights are read one by one, each straight to its device, so that no second copy of the model is in memory.
    files = {tensor.path: safe_open(tensor.path, framework="pt") for tensor in stored.values()}
    state = {}
    for name, tensor in stored.items():
        value = files[tensor.path].get_tensor(tensor.name).to(places[model.layer_of(name)])
        if model.is_transposed(name):
            value = value.t()  # a view
        state[name] = value.to(dtype) if value.is_floating_point() else value
    # `assign` takes the tensors themselves instead of copying them. It is not strict because a tied head is not in
    # `state`; as its embedding is another tensor now, the two are tied again.
    model.load_state_dict(state, strict=False, assign=True)
    model.tie_head()
    for name, table in model.named_buffers():  # rotary frequencies: in no file, needed where tokens come in
        setattr(model, name, table.to(places[0]))
    warn_if_not_finite(model, folder)
    return model.requires_grad_(False).eval()


def load(folder: Path | str, device: Place, dtype: torch.dtype | None = None) -> tuple[OpenModel, HFTokenizer]:
    """Load a model and its tokenizer: `model(idx_BT)` returns logits (B, T, V) in fp32; see `load_model`.

    The tokenizer has the interface of `nanochat.tokenizer.Tokenizer`. Raises ValueError as `load_model` does, or for a
    folder without a usable tokenizer.json.
    """
    tokenizer = HFTokenizer.from_directory(folder)  # first: a wrong one is found before gigabytes are read
    return load_model(folder, device, dtype), tokenizer
