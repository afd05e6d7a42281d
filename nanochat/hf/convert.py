"""Checkpoints in and out: the original nanochat's files, transformers' NanoChat folders, and bundles of our own.

    import   model_<step>.pt + meta_<step>.json    the original nanochat, of 2025 or of 2026
             config.json + safetensors             transformers' NanoChat, or one of our bundles
    export   NanoChatForCausalLM                   where transformers' class can express the model
             modeling_nanochat.py                  else: with code of its own, for trust_remote_code

All of them are the class GPT of gpt.py with other numbers and other names. So each way takes two steps: rename the
tensors by a table, and mirror the rotation. The original and transformers rotate positions by -θ, we by +θ. Negating
the second half of the channels of each query and key head turns one into the other, because it mirrors the planes in
which they rotate: the mirror image of a vector turned by -θ is the mirrored vector turned by +θ.
"""

import dataclasses
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, StringConstraints
from safetensors.torch import load_file

from nanochat import checkpoint
from nanochat.common import get_base_dir, read_json
from nanochat.compute import Compute
from nanochat.gpt import GPT, GPTConfig
from nanochat.hf.bundle import BUNDLE_TYPE, write_bundle
from nanochat.hf.load import stored_tensors
from nanochat.hf.open_model import Count, Heads, Layers, OpenConfig, Positive
from nanochat.hf.tokenizer_convert import find_tokenizer
from nanochat.tokenizer import FILE_NAME, kept_name

State = dict[str, torch.Tensor]

# Their names -> ours; "{i}" is the number of a layer. Names that are the same on both sides are not listed.
ORIGINAL_NAMES = {
    "transformer.wte.weight": "embed.weight",
    "transformer.h.{i}.attn.c_q.weight": "blocks.{i}.attn.q.weight",
    "transformer.h.{i}.attn.c_k.weight": "blocks.{i}.attn.k.weight",
    "transformer.h.{i}.attn.c_v.weight": "blocks.{i}.attn.v.weight",
    "transformer.h.{i}.attn.c_proj.weight": "blocks.{i}.attn.out.weight",
    "transformer.h.{i}.attn.ve_gate.weight": "blocks.{i}.attn.gate.weight",
    "transformer.h.{i}.mlp.c_fc.weight": "blocks.{i}.mlp.up.weight",
    "transformer.h.{i}.mlp.c_proj.weight": "blocks.{i}.mlp.down.weight",
    "lm_head.weight": "head.weight",
    "resid_lambdas": "resid_scale",
    "x0_lambdas": "embed_skip",
    "smear_lambda": "smear_scale",
    "backout_lambda": "backout",
}
TRANSFORMERS_NAMES = {
    "model.embed_tokens.weight": "embed.weight",
    "model.layers.{i}.self_attn.q_proj.weight": "blocks.{i}.attn.q.weight",
    "model.layers.{i}.self_attn.k_proj.weight": "blocks.{i}.attn.k.weight",
    "model.layers.{i}.self_attn.v_proj.weight": "blocks.{i}.attn.v.weight",
    "model.layers.{i}.self_attn.o_proj.weight": "blocks.{i}.attn.out.weight",
    "model.layers.{i}.mlp.fc1.weight": "blocks.{i}.mlp.up.weight",
    "model.layers.{i}.mlp.fc2.weight": "blocks.{i}.mlp.down.weight",
    "lm_head.weight": "head.weight",
}

# The model of 2025, which transformers' NanoChat is: every later switch of GPTConfig is off.
PLAIN_SWITCHES: dict[str, Any] = {
    "rope_base": 10_000.0,
    "qk_scale": 1.0,
    "value_embed_every": 0,
    "smear_channels": 0,
    "backout": 0.0,
    "resid_scale_first": 1.0,
    "resid_scale_last": 1.0,
    "embed_skip_first": 0.0,
    "embed_skip_last": 0.0,
}


class OriginalShape(OpenConfig):
    """The shape of an original checkpoint."""

    sequence_len: Count
    vocab_size: Count
    n_layer: Layers
    n_head: Heads
    n_kv_head: Heads
    n_embd: Count
    window_pattern: Annotated[str, StringConstraints(to_upper=True)] = "L"


class OriginalMeta(OpenConfig):
    """meta_<step>.json of an original checkpoint."""

    shape: OriginalShape = Field(alias="model_config")
    val_bpb: float | None = None


class NanoChatConfig(OpenConfig):
    """config.json of transformers' NanoChat, as far as our model can express it, but for the rotary settings."""

    sequence_len: Count = Field(alias="max_position_embeddings")
    vocab_size: Count
    n_layer: Layers = Field(alias="num_hidden_layers")
    n_head: Heads = Field(alias="num_attention_heads")
    n_kv_head: Heads = Field(alias="num_key_value_heads")
    n_embd: Count = Field(alias="hidden_size")
    softcap: float = Field(0.0, alias="final_logit_softcapping", ge=0)  # null: off
    window_pattern: Literal["L"] = "L"
    # What is no field of GPTConfig.
    tied: bool = Field(False, alias="tie_word_embeddings", exclude=True)
    hidden_act: Literal["relu2"] = Field("relu2", exclude=True)


class NanoChatRope(OpenConfig):
    """The rotary settings of transformers' NanoChat."""

    rope_type: Literal["default"] = "default"
    rope_theta: Positive = 10_000.0


def all_names(table: dict[str, str], n_layer: int) -> dict[str, str]:
    """Return a table of names with every layer written out.

    {"h.{i}.c_q": "blocks.{i}.q"} of two layers becomes {"h.0.c_q": "blocks.0.q", "h.1.c_q": "blocks.1.q"}.
    """
    names = {}
    for theirs, ours in table.items():
        for i in range(n_layer):
            names[theirs.format(i=i)] = ours.format(i=i)
    return names


@torch.no_grad()
def mirror_rotation(model: GPT) -> None:
    """Make a model that rotates positions one way say the same when they are rotated the other way (see above)."""
    head_dim = model.config.head_dim
    sign_D1 = torch.ones(head_dim, 1)
    sign_D1[head_dim // 2 :] = -1
    for block in model.blocks:
        for matrix in (block.attn.q, block.attn.k):
            weight_HDC = matrix.weight.unflatten(0, (-1, head_dim))
            weight_HDC.mul_(sign_D1)


def build_model(config: GPTConfig, state: State, origin: Path) -> GPT:
    """Return the model, in fp32, of a state dict under our names.

    Raises ValueError, which names `origin`, for tensors that are missing, extra or of another shape.
    """
    # A hostile number of layers would take long to build. Each has several tensors, so this is surely too many.
    if config.n_layer > len(state):
        raise ValueError(f"{origin} has {len(state)} tensors, too few for {config.n_layer} layers")
    state = dict(state)
    # Models of 2025 lack these two, which change nothing at these values.
    state.setdefault("resid_scale", torch.ones(config.n_layer))
    state.setdefault("embed_skip", torch.zeros(config.n_layer))
    padding = config.padded_vocab_size - config.vocab_size
    for name, value in state.items():
        is_table = name.startswith(("embed.", "head.", "value_embeds.")) and value.dim() == 2
        if is_table and len(value) == config.vocab_size:
            state[name] = F.pad(value, (0, 0, 0, padding))  # ours have a multiple of 64 rows
        elif name in ("smear_scale", "backout") and value.numel() == 1:  # vectors of one number in the original
            state[name] = value.reshape(())
    with torch.device("meta"):  # no memory for values that are replaced at once
        model = GPT(config)
    try:
        model.load_state_dict({name: value.float().contiguous() for name, value in state.items()}, assign=True)
    except RuntimeError as error:  # PyTorch lists all that is wrong, on many lines
        reason = " ".join(str(error).split(":", 1)[1].split())
        raise ValueError(f"{origin} does not fit its config: {reason:.300}") from error
    return model.eval()


def build_foreign_model(config: GPTConfig, state: State, table: dict[str, str], origin: Path) -> GPT:
    """Return the model of a state dict under the names of `table`; raises ValueError as `build_model` does."""
    names = all_names(table, config.n_layer)
    model = build_model(config, {names.get(name, name): value for name, value in state.items()}, origin)
    mirror_rotation(model)
    return model


def read_original(folder: Path) -> tuple[GPT, dict[str, Any]]:
    """Read the newest model_<step>.pt of the original nanochat; return the model and facts for meta.json.

    Its shape is in the meta file beside it. Its year shows in its tensors: smear came in 2026.
    """
    path = max(folder.glob("model_[0-9]*.pt"))  # steps have leading zeros: the newest comes last
    digits = path.stem.removeprefix("model_")
    meta_path = folder / f"meta_{digits}.json"
    if not meta_path.is_file():
        raise ValueError(f"{meta_path} is missing: it says what {path.name} is")
    state = read_state(path)
    meta = OriginalMeta.from_json(read_json(meta_path), str(meta_path))
    # The meta file of 2025 and that of 2026 have the same fields: only the tensors tell the architectures apart.
    is_new = "smear_gate.weight" in state
    if not is_new and "resid_lambdas" in state:
        raise ValueError(f"{path} is of a time between the two architectures that are known here")
    config = GPTConfig(**meta.shape.model_dump(), **({} if is_new else PLAIN_SWITCHES))
    model = build_foreign_model(config, state, ORIGINAL_NAMES, path)
    return model, {"original_step": int(digits), "val_bpb": meta.val_bpb}


def read_state(path: Path) -> State:
    """Read a dict of tensors that torch.save wrote. `weights_only` runs nothing that a pickle may ask for."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        for name, value in state.items():
            if not isinstance(value, torch.Tensor):
                raise TypeError(f"{name!r:.60} is no tensor")
        # torch.compile puts this in front of every name of a model that was saved compiled.
        return {name.removeprefix("_orig_mod."): value for name, value in state.items()}
    except Exception as error:  # a damaged or hostile file can raise anything
        reason = " ".join(str(error).split())
        raise ValueError(f"{path} is not a plain dict of tensors ({reason:.200})") from error


def read_folder(folder: Path) -> GPT:
    """Read a folder of safetensors: transformers' NanoChat, or a bundle of ours."""
    path = folder / "config.json"
    values = read_json(path)
    kind = values.get("model_type") if isinstance(values, dict) else None
    if kind not in (BUNDLE_TYPE, "nanochat"):
        raise ValueError(f"{folder} is a {kind!r:.40}, no nanochat: python -m scripts.models play {folder} runs it")
    state: State = {}
    for file in {tensor.path for tensor in stored_tensors(folder).values()}:  # their headers have been checked
        state.update(load_file(file))

    if kind == BUNDLE_TYPE:
        try:
            config = GPTConfig.from_dict(values["gpt"])
        except (KeyError, TypeError) as error:
            raise ValueError(f"{path}: 'gpt' is no model config ({error})") from error
        return build_model(config, state, folder)

    defaults = {"num_key_value_heads": values.get("num_attention_heads"), "final_logit_softcapping": 15.0}
    shape = NanoChatConfig.from_json({**defaults, **values}, str(path))
    rope = NanoChatRope.from_json(values.get("rope_parameters") or values, str(path))  # older files: not nested
    config = GPTConfig(**{**PLAIN_SWITCHES, **shape.model_dump(), "rope_base": rope.rope_theta})
    if shape.tied:
        state["lm_head.weight"] = state["model.embed_tokens.weight"].clone()  # ours has a head of its own
    return build_foreign_model(config, state, TRANSFORMERS_NAMES, folder)


def import_checkpoint(folder: Path, stage: str, tag: str, tokenizer_dir: str | None = None) -> Path:
    """Bring the checkpoint in `folder` into checkpoints/<stage>/<tag> as step 0, and return that folder.

    Pickles are read without running anything in them. Raises ValueError if the folder holds none of the formats above,
    if it is damaged, if its tokenizer is missing or has another vocabulary, or if the tag is taken.
    """
    if checkpoint.list_steps(stage, tag):
        raise ValueError(f"there is a {stage}/{tag} already: choose another --tag")
    facts: dict[str, Any] = {}
    if any(folder.glob("model_[0-9]*.pt")):
        model, facts = read_original(folder)
    elif (folder / "config.json").is_file():
        model = read_folder(folder)
    else:
        raise ValueError(f"{folder} holds neither model_<step>.pt nor config.json: nothing to import")

    tokenizer = find_tokenizer(folder, tokenizer_dir)
    config = model.config
    if tokenizer.get_vocab_size() != config.vocab_size:
        raise ValueError(f"{folder}: model of {config.vocab_size} tokens, tokenizer of {tokenizer.get_vocab_size()}")
    # The base directory's own tokenizer is never replaced: another one is kept beside it, under its hash.
    home = get_base_dir() / "tokenizer"
    tokenizer.save(home, kept_name(tokenizer.hash) if (home / FILE_NAME).is_file() else FILE_NAME)

    # What later stages read of a base model's meta.json. How it was trained is not known.
    meta = {
        "model_config": dataclasses.asdict(config),
        "tokenizer_hash": tokenizer.hash,
        "dataset": "builtin",
        "depth": config.n_layer,
        "total_batch_size": 1 << 19,
        "val_bpb": None,
        "imported_from": str(folder),
        **facts,
    }
    compute = Compute(torch.device("cpu"), torch.float32)
    checkpoint.save(stage, tag, step=0, model=model, optimizer_state=None, meta=meta, compute=compute)
    return checkpoint.checkpoint_dir(stage, tag)


def is_expressible(model: GPT) -> bool:
    """Return whether transformers' NanoChat class can express the model: that of 2025, with no short windows."""
    config = model.config
    later = (config.value_embed_every, config.smear_channels, config.backout, config.norm_scales)
    if config.qk_scale != 1 or any(later):
        return False
    if set(config.windows) != {config.sequence_len} or config.softcap == 0:
        return False
    # These two are weights, whatever the config says of their first values.
    return bool((model.resid_scale == 1).all() and (model.embed_skip == 0).all())


def export_checkpoint(folder: Path, stage: str, tag: str | None, step: int | None = None, format: str = "auto") -> str:
    """Write a checkpoint to `folder` as a bundle (hf/bundle.py) that transformers loads.

    `format` is "nanochat" for transformers' own class, "code" for a bundle with its own code, or "auto" for the first
    that works. Returns the line of Python that loads it. Raises ValueError if the folder is not empty or the model
    cannot be expressed in the format.
    """
    if format == "gguf":
        raise ValueError("llama.cpp's converter has no nanochat architecture, so there is no GGUF: use --format auto")
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"{folder} is not empty: export to a new folder")
    # For training, as then the weights keep all of their bits.
    model, tokenizer, meta = checkpoint.load_model(stage, "cpu", tag, step, train=True)
    with_code = format == "code" or not is_expressible(model)
    if format == "nanochat" and with_code:
        raise ValueError("transformers' NanoChat class cannot express this model: use --format code")

    state = model.state_dict() if with_code else transformers_state(model)
    facts = {name: meta.get(name) for name in ("stage", "tag", "step", "val_bpb", "dataset", "source")}
    write_bundle(folder, model.config, state, tokenizer, facts, with_code)
    trust = ", trust_remote_code=True" if with_code else ""
    return f"{folder}: AutoModelForCausalLM.from_pretrained({str(folder)!r}{trust})"


def transformers_state(model: GPT) -> State:
    """Return the state dict of transformers' NanoChat; `model` itself is mirrored, and of no other use afterwards."""
    mirror_rotation(model)
    ours = model.state_dict()
    for name in ("embed.weight", "head.weight"):
        ours[name] = ours[name][: model.config.vocab_size]  # their tables have no padding
    names = all_names(TRANSFORMERS_NAMES, model.config.n_layer)
    # resid_scale and embed_skip have no name there, and change nothing in a model that `is_expressible`.
    return {theirs: ours[name] for theirs, name in names.items()}
