"""Checkpoints in and out: the original nanochat's files, transformers' NanoChat folders, and bundles of our own.

    import   model_<step>.pt + meta_<step>.json    the original nanochat, of 2025 or of 2026
             config.json + safetensors             transformers' NanoChat, or one of our bundles
    export   NanoChatForCausalLM                   where transformers' class can express the model
             modeling_nanochat.py                  else: with code of its own, for trust_remote_code

All of them are the class GPT of gpt.py with other numbers and other names, so each way is: rename the tensors, mirror
the rotation, check every shape. The original and transformers rotate positions by -θ, we by +θ. Negating the second
half of the channels of each query and key head turns one into the other: it mirrors the planes in which they rotate.
"""

import dataclasses
import json
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from nanochat import checkpoint
from nanochat.common import atomic_write, atomic_write_json, get_base_dir, read_json, sha256_file
from nanochat.compute import Compute
from nanochat.gpt import GPT, GPTConfig
from nanochat.hf.layers import Settings
from nanochat.hf.load import stored_tensors
from nanochat.hf.tokenizer_convert import find_tokenizer, to_tokenizer_json
from nanochat.tokenizer import FILE_NAME, Tokenizer, kept_name

State = dict[str, torch.Tensor]

BUNDLE_TYPE = "nanochat_gpt"  # model_type in the config.json of a bundle with its own code
HERE = Path(__file__).parent

# The model of 2025: every later switch of GPTConfig at the value that turns it off.
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

# Their names -> ours. Tensors of a layer are "<layers>.<i>.<name>.weight" there and "blocks.<i>.<name>.weight" here.
ORIGINAL_NAMES = {
    "transformer.wte.weight": "embed.weight",
    "lm_head.weight": "head.weight",
    "resid_lambdas": "resid_scale",
    "x0_lambdas": "embed_skip",
    "smear_gate.weight": "smear_gate.weight",
    "smear_lambda": "smear_scale",
    "backout_lambda": "backout",
}
ORIGINAL_BLOCK_NAMES = {
    "attn.c_q": "attn.q",
    "attn.c_k": "attn.k",
    "attn.c_v": "attn.v",
    "attn.c_proj": "attn.out",
    "attn.ve_gate": "attn.gate",
    "mlp.c_fc": "mlp.up",
    "mlp.c_proj": "mlp.down",
}
TRANSFORMERS_NAMES = {"model.embed_tokens.weight": "embed.weight", "lm_head.weight": "head.weight"}
TRANSFORMERS_BLOCK_NAMES = {
    "self_attn.q_proj": "attn.q",
    "self_attn.k_proj": "attn.k",
    "self_attn.v_proj": "attn.v",
    "self_attn.o_proj": "attn.out",
    "mlp.fc1": "mlp.up",
    "mlp.fc2": "mlp.down",
}


def _rename(state: State, names: dict[str, str], block_names: dict[str, str], layers: str) -> State:
    """Return a foreign state dict under our names. Raises ValueError for tensors that no nanochat model has."""
    renamed = {}
    unknown = []
    for name, value in state.items():
        match = re.fullmatch(rf"{re.escape(layers)}\.(\d+)\.(.+)\.weight", name)
        if match and match[2] in block_names:
            renamed[f"blocks.{match[1]}.{block_names[match[2]]}.weight"] = value
        elif name in names:
            renamed[names[name]] = value
        elif re.fullmatch(r"value_embeds\.\d+\.weight", name):
            renamed[name] = value
        else:
            unknown.append(name)
    if unknown:
        raise ValueError(f"not tensors of a nanochat model: {', '.join(sorted(unknown)[:3])} of {len(unknown)}")
    return renamed


def _mirror(state: State, head_dim: int) -> State:
    """Return the model that rotates positions the other way and says the same: see the top of this file."""
    sign_D = torch.ones(head_dim)
    sign_D[head_dim // 2 :] = -1
    mirrored = dict(state)
    for name, value in state.items():
        is_query_or_key = name.endswith((".attn.q.weight", ".attn.k.weight"))
        if is_query_or_key and len(value) % head_dim == 0:  # other shapes are reported by _build_model
            n_heads = len(value) // head_dim
            mirrored[name] = value * sign_D.repeat(n_heads)[:, None].to(value.dtype)
    return mirrored


def _build_model(config: GPTConfig, state: State, origin: str) -> GPT:
    """Return the model of a state dict under our names, in fp32.

    Raises ValueError, which begins with `origin`, for tensors that are missing, extra or of another shape."""
    if config.n_layer > len(state):
        raise ValueError(f"{origin} has {len(state)} tensors, too few for {config.n_layer} layers")
    with torch.device("meta"):
        model = GPT(config)
    state = dict(state)
    # Models of 2025 lack these two, which do nothing at these values.
    state.setdefault("resid_scale", torch.ones(config.n_layer))
    state.setdefault("embed_skip", torch.zeros(config.n_layer))
    for name in ("smear_scale", "backout"):  # vectors of one number in the original
        if name in state and state[name].numel() == 1:
            state[name] = state[name].reshape(())
    for name, value in state.items():
        is_table = name.startswith(("embed.", "head.", "value_embeds.")) and value.dim() == 2
        if is_table and len(value) == config.vocab_size:  # ours are padded to a multiple of 64
            padding = config.padded_vocab_size - config.vocab_size
            state[name] = torch.nn.functional.pad(value, (0, 0, 0, padding))
    wanted = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    found = {name: tuple(value.shape) for name, value in state.items()}
    wrong = sorted(name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name))
    if wrong:
        raise ValueError(f"{origin} does not fit its config: {', '.join(wrong[:3])} of {len(wrong)} tensors")
    model.load_state_dict({name: value.float().contiguous() for name, value in state.items()}, assign=True)
    return model.eval()


def _read_original(folder: Path) -> tuple[GPT, dict[str, Any]]:
    """Read the newest model_<step>.pt of the original nanochat; return the model and facts for meta.json."""
    steps = {}
    for path in folder.glob("model_*.pt"):
        if match := re.fullmatch(r"model_(\d+)", path.stem):
            steps[int(match[1])] = path
    if not steps:
        raise ValueError(f"{folder} holds no model_<step>.pt: rename the one to import so")
    step = max(steps)
    path = steps[step]
    meta_path = path.with_name(f"{path.stem.replace('model', 'meta', 1)}.json")
    if not meta_path.is_file():
        raise ValueError(f"{meta_path} is missing: it says what {path.name} is")
    meta = read_json(meta_path)
    state = _read_state(path)
    config = _original_config(meta, meta_path, state, path)
    state = _rename(state, ORIGINAL_NAMES, ORIGINAL_BLOCK_NAMES, layers="transformer.h")
    model = _build_model(config, _mirror(state, config.head_dim), str(path))
    return model, {"original_step": step, "val_bpb": meta.get("val_bpb")}


def _read_state(path: Path) -> State:
    """Read a dict of tensors that torch.save wrote. `weights_only` runs nothing that a pickle may ask for."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        # torch.compile puts this in front of every name of a model that was saved compiled.
        state = {name.removeprefix("_orig_mod."): value for name, value in state.items()}
        for name, value in state.items():
            if not isinstance(value, torch.Tensor):
                raise TypeError(f"{name!r:.60} is no tensor")
    except Exception as error:  # a damaged or hostile file can raise anything
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{path} is not a plain dict of tensors ({reason})") from error
    return state


def _original_config(meta: Any, meta_path: Path, state: State, path: Path) -> GPTConfig:
    """Return the config of an original checkpoint: its shape is in the meta file, its year shows in its tensors."""
    values = meta.get("model_config") if isinstance(meta, dict) else None
    keys = ("sequence_len", "vocab_size", "n_layer", "n_head", "n_kv_head", "n_embd")
    if not isinstance(values, dict) or not all(isinstance(values.get(key), int) for key in keys):
        raise ValueError(f"{meta_path} holds no model_config with {', '.join(keys)}")
    shape = {key: values[key] for key in keys}
    shape["window_pattern"] = str(values.get("window_pattern", "L")).upper()
    if "smear_gate.weight" in state:
        return GPTConfig(**shape)
    if "resid_lambdas" in state or any(name.startswith("value_embeds") for name in state):
        raise ValueError(f"{path} is of a time between the two architectures that are known here")
    return GPTConfig(**shape, **PLAIN_SWITCHES)


def _read_folder(folder: Path) -> tuple[GPT, dict[str, Any]]:
    """Read a folder of safetensors, transformers' NanoChat or a bundle of ours; return the model and no facts."""
    values = read_json(folder / "config.json")
    state: State = {}
    for path in sorted({tensor.path for tensor in stored_tensors(folder).values()}):
        state.update(load_file(path))
    kind = values.get("model_type") if isinstance(values, dict) else None
    if kind == BUNDLE_TYPE:
        try:
            config = GPTConfig.from_dict(values.get("gpt") or {})
        except TypeError as error:
            raise ValueError(f"{folder / 'config.json'}: 'gpt' is no model config ({error})") from error
        return _build_model(config, state, str(folder)), {}
    if kind != "nanochat":
        raise ValueError(f"{folder} is a {kind!r:.40}, no nanochat: python -m scripts.models play {folder} runs it")
    if "lm_head.weight" not in state and Settings(values).flag("tie_word_embeddings"):
        state["lm_head.weight"] = state["model.embed_tokens.weight"].clone()
    config = _transformers_config(values)
    state = _rename(state, TRANSFORMERS_NAMES, TRANSFORMERS_BLOCK_NAMES, layers="model.layers")
    return _build_model(config, _mirror(state, config.head_dim), str(folder)), {}


def _transformers_config(values: dict[str, Any]) -> GPTConfig:
    """Return our config for a NanoChat config.json. Raises ValueError for settings that our model cannot express."""
    settings = Settings(values)
    settings.expect("hidden_act", "relu2")
    settings.expect("attention_bias", False)
    settings.expect("intermediate_size", 4 * settings.integer("hidden_size"))
    rope_values = settings.values.get("rope_parameters") or settings.values.get("rope_scaling") or {}
    rope = Settings(rope_values, "config.json: rope_parameters")
    rope.expect("rope_type", "default")
    n_head = settings.integer("num_attention_heads")
    has_softcap = values.get("final_logit_softcapping", 15.0) is not None
    own = {
        "sequence_len": settings.integer("max_position_embeddings"),
        "vocab_size": settings.integer("vocab_size"),
        "n_layer": settings.integer("num_hidden_layers", high=1000),
        "n_head": n_head,
        "n_kv_head": settings.integer("num_key_value_heads", n_head),
        "n_embd": settings.integer("hidden_size"),
        "window_pattern": "L",
        "rope_base": rope.number("rope_theta", settings.number("rope_theta", 10_000.0), low=1.0),
        "softcap": settings.number("final_logit_softcapping", 15.0) if has_softcap else 0.0,
    }
    return GPTConfig(**{**PLAIN_SWITCHES, **own})


def import_checkpoint(folder: Path, stage: str, tag: str, tokenizer_dir: str | None = None) -> Path:
    """Bring the checkpoint in `folder` into checkpoints/<stage>/<tag> as step 0, and return that folder.

    Pickles are read without running anything in them. Raises ValueError if the folder holds none of the formats above,
    if it is damaged, if its tokenizer is missing or has another vocabulary, or if the tag is taken."""
    if checkpoint.list_steps(stage, tag):
        raise ValueError(f"there is a {stage}/{tag} already: choose another --tag")
    if any(folder.glob("model_*.pt")):
        model, facts = _read_original(folder)
    elif (folder / "config.json").is_file():
        model, facts = _read_folder(folder)
    else:
        raise ValueError(f"{folder} holds neither model_<step>.pt nor config.json: nothing to import")
    tokenizer = find_tokenizer(folder, tokenizer_dir)
    config = model.config
    if tokenizer.get_vocab_size() != config.vocab_size:
        raise ValueError(f"{folder}: model of {config.vocab_size} tokens, tokenizer of {tokenizer.get_vocab_size()}")
    # The base directory's own tokenizer is never replaced: another one is kept beside it, under its hash.
    home = get_base_dir() / "tokenizer"
    tokenizer.save(home, kept_name(tokenizer.hash) if (home / FILE_NAME).is_file() else FILE_NAME)
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
    has_switches = config.qk_scale != 1 or config.value_embed_every or config.smear_channels or config.backout
    is_full_attention = set(config.windows) == {config.sequence_len}
    is_plain_residual = bool((model.resid_scale == 1).all() and (model.embed_skip == 0).all())
    return not has_switches and is_full_attention and config.softcap > 0 and is_plain_residual


def _transformers_bundle(model: GPT) -> tuple[State, dict[str, Any]]:
    """Return (state dict, config values) for transformers' NanoChat class."""
    config = model.config
    names = {ours: theirs for theirs, ours in TRANSFORMERS_NAMES.items()}
    block_names = {ours: theirs for theirs, ours in TRANSFORMERS_BLOCK_NAMES.items()}
    state = {}
    for name, value in _mirror(model.state_dict(), config.head_dim).items():
        if match := re.fullmatch(r"blocks\.(\d+)\.(.+)\.weight", name):
            state[f"model.layers.{match[1]}.{block_names[match[2]]}.weight"] = value
        elif name in names:  # resid_scale and embed_skip are neutral here and have no name there
            state[names[name]] = value[: config.vocab_size]
    values = {
        "architectures": ["NanoChatForCausalLM"],
        "model_type": "nanochat",
        "hidden_act": "relu2",
        "intermediate_size": 4 * config.n_embd,
        "num_key_value_heads": config.n_kv_head,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_base},
        "rms_norm_eps": torch.finfo(torch.float32).eps,
        "final_logit_softcapping": config.softcap,
    }
    return state, values


def _code_bundle(model: GPT) -> tuple[State, dict[str, Any]]:
    """Return (state dict, config values) for a bundle that brings modeling_nanochat.py along."""
    values = {
        "architectures": ["NanochatGPT"],
        "model_type": BUNDLE_TYPE,
        "auto_map": {
            "AutoConfig": "modeling_nanochat.NanochatGPTConfig",
            "AutoModelForCausalLM": "modeling_nanochat.NanochatGPT",
        },
        "use_cache": False,
        "gpt": dataclasses.asdict(model.config),
    }
    return dict(model.state_dict()), values


def export_checkpoint(folder: Path, stage: str, tag: str | None, step: int | None = None, format: str = "auto") -> str:
    """Write a checkpoint to `folder` as a bundle: safetensors, config, tokenizer, chat template, hashes, model card.

    `format` is "nanochat" for transformers' own class, "code" for a bundle with its own code, or "auto" for the first
    that works. Returns the line of Python that loads it. Raises ValueError if the folder is not empty or the model
    cannot be expressed in the format."""
    if format == "gguf":
        raise ValueError("llama.cpp's converter has no nanochat architecture, so there is no GGUF: use --format auto")
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"{folder} is not empty: export to a new folder")
    model, tokenizer, meta = checkpoint.load_model(stage, "cpu", tag, step, train=True)
    with_code = format == "code" or not is_expressible(model)
    if format == "nanochat" and with_code:
        raise ValueError("transformers' NanoChat class cannot express this model: use --format code")
    state, values = _code_bundle(model) if with_code else _transformers_bundle(model)
    config = model.config
    bos = tokenizer.get_bos_token_id()
    end = tokenizer.encode_special("<|assistant_end|>")
    special_ids = {"bos_token_id": bos, "eos_token_id": [end, bos]}
    values = {
        **values,
        **special_ids,
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.sequence_len,
        "hidden_size": config.n_embd,
        "num_hidden_layers": config.n_layer,
        "num_attention_heads": config.n_head,
        "tie_word_embeddings": False,
        "dtype": "float32",
    }
    folder.mkdir(parents=True, exist_ok=True)
    state = {name: value.detach().float().contiguous() for name, value in state.items()}
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    atomic_write_json(folder / "config.json", values)
    atomic_write_json(folder / "generation_config.json", {**special_ids, "use_cache": not with_code})
    _write_tokenizer(folder, tokenizer, config.sequence_len)
    if with_code:
        shutil.copy(HERE / "modeling_nanochat.py", folder)
    trust = ", trust_remote_code=True" if with_code else ""
    facts = {name: meta.get(name) for name in ("stage", "tag", "step", "val_bpb", "dataset", "source")}
    _write_card(folder, model, facts, trust)
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    hashes = {path.relative_to(folder).as_posix(): sha256_file(path) for path in files}
    atomic_write_json(folder / "hashes.json", {"sha256": hashes, "tokenizer_hash": tokenizer.hash, **facts})
    return f"{folder}: AutoModelForCausalLM.from_pretrained({str(folder)!r}{trust})"


def _write_tokenizer(folder: Path, tokenizer: Tokenizer, context: int) -> None:
    """Write the tokenizer for transformers with its chat template, and in our own form, for the way back."""
    atomic_write(folder / "tokenizer.json", to_tokenizer_json(tokenizer))
    tokenizer.save(folder / "tokenizer")
    settings = {
        "bos_token": "<|bos|>",
        "eos_token": "<|assistant_end|>",
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": context,
        "clean_up_tokenization_spaces": False,
    }
    atomic_write_json(folder / "tokenizer_config.json", settings)
    shutil.copy(HERE / "chat_template.jinja", folder)


def _write_card(folder: Path, model: GPT, facts: dict[str, Any], trust: str) -> None:
    """Write README.md, the bundle's model card, from bundle_card.txt."""
    template = (HERE / "bundle_card.txt").read_text(encoding="utf-8")
    text = template.format(
        name=f"{facts['stage']}/{facts['tag']}",
        size=sum(parameter.numel() for parameter in model.parameters()) / 1e6,
        facts="\n".join(f"* {name}: {value}" for name, value in facts.items() if value is not None),
        trust=trust,
        config=json.dumps(dataclasses.asdict(model.config), indent=1),
    )
    atomic_write(folder / "README.md", text)
