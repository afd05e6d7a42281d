"""Checkpoints in and out: original nanochat's, transformers' NanoChat folders, and bundles that transformers loads.

All of them are the class GPT with other numbers and names. The original and transformers rotate positions by -θ: there
the second half of every query and key head has the other sign, which mirrors the planes of rotation.
"""

import dataclasses
import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace
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
from nanochat.tokenizer import FILE_NAME, kept_name

State = dict[str, torch.Tensor]
# 2025's model: every switch at its neutral value
PLAIN: dict[str, Any] = {"rope_base": 10_000.0, "qk_scale": 1.0, "value_embed_every": 0, "smear_channels": 0}
PLAIN |= dict.fromkeys(("resid_scale_first", "resid_scale_last"), 1.0)
PLAIN |= dict.fromkeys(("backout", "embed_skip_first", "embed_skip_last"), 0.0)

_ORIGINAL = {"transformer.wte.weight": "embed.weight", "lm_head.weight": "head.weight", "backout_lambda": "backout"}
_ORIGINAL |= {"resid_lambdas": "resid_scale", "x0_lambdas": "embed_skip"}
_ORIGINAL |= {"smear_gate.weight": "smear_gate.weight", "smear_lambda": "smear_scale"}
_ORIGINAL_BLOCK = {"attn.c_q": "attn.q", "attn.c_k": "attn.k", "attn.c_v": "attn.v", "attn.c_proj": "attn.out"}
_ORIGINAL_BLOCK |= {"attn.ve_gate": "attn.gate", "mlp.c_fc": "mlp.up", "mlp.c_proj": "mlp.down"}
_NANOCHAT = {"model.embed_tokens.weight": "embed.weight", "lm_head.weight": "head.weight"}
_NANOCHAT_BLOCK = {"self_attn.q_proj": "attn.q", "self_attn.k_proj": "attn.k", "self_attn.v_proj": "attn.v"}
_NANOCHAT_BLOCK |= {"self_attn.o_proj": "attn.out", "mlp.fc1": "mlp.up", "mlp.fc2": "mlp.down"}
BUNDLE = "nanochat_gpt"  # model_type of a bundle with its own code


def _rename(state: State, names: dict[str, str], block_names: dict[str, str], layers: str) -> State:
    """A foreign state dict under our names; ValueError names what has none."""
    result, unknown = {}, []
    for name, value in state.items():
        match = re.fullmatch(rf"{re.escape(layers)}\.(\d+)\.(.+)\.weight", name)
        if match and match[2] in block_names:
            result[f"blocks.{match[1]}.{block_names[match[2]]}.weight"] = value
        elif name in names or re.fullmatch(r"value_embeds\.\d+\.weight", name):
            result[names.get(name, name)] = value
        else:
            unknown.append(name)
    if unknown:
        raise ValueError(f"not tensors of a nanochat model: {', '.join(sorted(unknown)[:3])} of {len(unknown)}")
    return result


def _mirror(state: State, head_dim: int) -> State:
    """The same model with positions that rotate the other way; see above."""
    sign = torch.ones(head_dim)
    sign[head_dim // 2 :] = -1
    turned = {
        name: value * sign.repeat(len(value) // head_dim)[:, None].to(value.dtype)
        for name, value in state.items()
        if name.endswith((".attn.q.weight", ".attn.k.weight")) and len(value) % head_dim == 0
    }
    return {**state, **turned}


def _build(config: GPTConfig, state: State, origin: str) -> GPT:
    """The model of a state dict under our names, in fp32; ValueError names what is missing, extra or mis-shaped."""
    if config.n_layer > len(state):
        raise ValueError(f"{origin} has {len(state)} tensors, too few for {config.n_layer} layers")
    with torch.device("meta"):
        model = GPT(config)
    wanted = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    neutral = {"resid_scale": torch.ones(config.n_layer), "embed_skip": torch.zeros(config.n_layer)}
    state = {**neutral, **state}
    for name in ("smear_scale", "backout"):
        if name in state and state[name].numel() == 1:
            state[name] = state[name].reshape(())
    for name, value in state.items():
        rows = config.padded_vocab_size - len(value) if value.dim() == 2 else 0
        if rows > 0 and name.startswith(("embed.", "head.", "value_embeds.")) and len(value) == config.vocab_size:
            state[name] = torch.nn.functional.pad(value, (0, 0, 0, rows))
    there = {name: tuple(value.shape) for name, value in state.items()}
    if wrong := sorted(n for n in wanted.keys() | there.keys() if wanted.get(n) != there.get(n)):
        raise ValueError(f"{origin} does not fit its config: {', '.join(wrong[:3])} of {len(wrong)} tensors")
    model.load_state_dict({name: value.float().contiguous() for name, value in state.items()}, assign=True)
    return model.eval()


def _read_original(folder: Path) -> tuple[GPT, dict[str, Any]]:
    """The newest model_<step>.pt with its meta_<step>.json."""
    steps = {int(m[1]): path for path in folder.glob("model_*.pt") if (m := re.fullmatch(r"model_(\d+)", path.stem))}
    if not steps:
        raise ValueError(f"{folder} holds no model_<step>.pt: rename the one to import so")
    path = steps[max(steps)]
    meta_path = path.with_name(f"{path.stem.replace('model', 'meta', 1)}.json")
    if not meta_path.is_file():
        raise ValueError(f"{meta_path} is missing: it says what {path.name} is")
    meta = read_json(meta_path)
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        state = {name.removeprefix("_orig_mod."): value for name, value in state.items()}
        if wrong := [name for name, value in state.items() if not isinstance(value, torch.Tensor)]:
            raise TypeError(f"{wrong[0]!r:.60} is no tensor")
    except Exception as error:  # a damaged or hostile file can raise anything
        raise ValueError(f"{path} is not a plain dict of tensors ({' '.join(str(error).split())[:200]})") from error
    named = meta.get("model_config") if isinstance(meta, dict) else None
    keys = ("sequence_len", "vocab_size", "n_layer", "n_head", "n_kv_head", "n_embd")
    if not isinstance(named, dict) or not all(type(named.get(key)) is int for key in keys):
        raise ValueError(f"{meta_path} holds no model_config with {', '.join(keys)}")
    shape = {key: named[key] for key in keys} | {"window_pattern": str(named.get("window_pattern", "L")).upper()}
    if "smear_gate.weight" in state:
        config = GPTConfig(**shape)
    elif "resid_lambdas" in state or any(name.startswith("value_embeds") for name in state):
        raise ValueError(f"{path} is of a time between the two architectures that are known here")
    else:
        config = GPTConfig(**shape, **PLAIN)
    state = _rename(state, _ORIGINAL, _ORIGINAL_BLOCK, "transformer.h")
    facts = {"original_step": max(steps), "val_bpb": meta.get("val_bpb")}
    return _build(config, _mirror(state, config.head_dim), str(path)), facts


def _read_folder(folder: Path) -> tuple[GPT, dict[str, Any]]:
    """A transformers NanoChat folder, or a bundle of our own."""
    values, state = read_json(folder / "config.json"), dict[str, torch.Tensor]()
    for path in sorted({tensor.path for tensor in stored_tensors(folder).values()}):
        state |= load_file(path)
    kind = values.get("model_type") if isinstance(values, dict) else None
    if kind == BUNDLE:
        try:
            config = GPTConfig.from_dict(values.get("gpt") or {})
        except TypeError as error:
            raise ValueError(f"{folder / 'config.json'}: 'gpt' is no model config ({error})") from error
        return _build(config, state, str(folder)), {}
    if kind != "nanochat":
        raise ValueError(f"{folder} is a {kind!r:.40}, no nanochat: python -m scripts.models play {folder} runs it")
    settings = Settings(values)
    settings.expect("hidden_act", "relu2")
    settings.expect("attention_bias", False)
    settings.expect("intermediate_size", 4 * settings.integer("hidden_size"))
    heads = settings.integer("num_attention_heads")
    rope = Settings(values.get("rope_parameters") or values.get("rope_scaling") or {}, "config.json: rope_parameters")
    rope.expect("rope_type", "default")
    capped = values.get("final_logit_softcapping", 15.0) is not None
    if "lm_head.weight" not in state and settings.flag("tie_word_embeddings"):
        state["lm_head.weight"] = state["model.embed_tokens.weight"].clone()
    own: dict[str, Any] = {
        "sequence_len": settings.integer("max_position_embeddings"),
        "vocab_size": settings.integer("vocab_size"),
        "n_layer": settings.integer("num_hidden_layers", high=1000),
        "n_head": heads,
        "n_kv_head": settings.integer("num_key_value_heads", heads),
        "n_embd": settings.integer("hidden_size"),
        "rope_base": rope.number("rope_theta", settings.number("rope_theta", 10_000.0), low=1.0),
        "softcap": settings.number("final_logit_softcapping", 15.0) if capped else 0.0,
    }
    config = GPTConfig(**{**PLAIN, **own, "window_pattern": "L"})
    state = _rename(state, _NANOCHAT, _NANOCHAT_BLOCK, "model.layers")
    return _build(config, _mirror(state, config.head_dim), str(folder)), {}


def import_checkpoint(folder: Path, stage: str, tag: str, tokenizer_dir: str | None = None) -> Path:
    """Bring a checkpoint in `folder` into checkpoints/<stage>/<tag>, step 0; returns where it lies.

    `folder` holds model_<step>.pt and meta_<step>.json of the original nanochat, or a transformers NanoChat, or one of
    our bundles. Pickles are read without running anything in them. Raises ValueError when it is none of these, is
    damaged, or has another tokenizer than the base directory.
    """
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
    home = get_base_dir() / "tokenizer"
    tokenizer.save(home, kept_name(tokenizer.hash) if (home / FILE_NAME).is_file() else FILE_NAME)
    meta: dict[str, Any] = {"model_config": dataclasses.asdict(config), "tokenizer_hash": tokenizer.hash}
    meta |= {"dataset": "builtin", "depth": config.n_layer, "total_batch_size": 1 << 19, "val_bpb": None, **facts}
    compute = Compute(torch.device("cpu"), torch.float32)
    no_optimizer = SimpleNamespace(state_dict=dict)
    checkpoint.save(stage, tag, 0, model, no_optimizer, {**meta, "imported_from": str(folder)}, compute)
    return checkpoint.checkpoint_dir(stage, tag)


def expressible(model: GPT) -> bool:
    """Whether transformers' NanoChat class can say the same: the plain model of 2025, with every window whole."""
    config = model.config
    plain = config.qk_scale == 1 and not (config.value_embed_every or config.smear_channels or config.backout)
    whole = set(config.windows) == {config.sequence_len} and config.softcap > 0
    return plain and whole and bool((model.resid_scale == 1).all() and (model.embed_skip == 0).all())


def _nanochat_bundle(model: GPT) -> tuple[State, dict[str, Any]]:
    config, back = model.config, {ours: theirs for theirs, ours in (_NANOCHAT | _NANOCHAT_BLOCK).items()}
    state = {}
    for name, value in _mirror(model.state_dict(), config.head_dim).items():
        if match := re.fullmatch(r"blocks\.(\d+)\.(.+)\.weight", name):
            state[f"model.layers.{match[1]}.{back[match[2]]}.weight"] = value
        elif name in back:
            state[back[name]] = value[: config.vocab_size].contiguous()
    values: dict[str, Any] = {"architectures": ["NanoChatForCausalLM"], "model_type": "nanochat"}
    values |= {"hidden_act": "relu2", "intermediate_size": 4 * config.n_embd, "num_key_value_heads": config.n_kv_head}
    values |= {"rope_parameters": {"rope_type": "default", "rope_theta": config.rope_base}}
    return state, {**values, "rms_norm_eps": torch.finfo(torch.float32).eps, "final_logit_softcapping": config.softcap}


def _code_bundle(model: GPT) -> tuple[State, dict[str, Any]]:
    code = {"AutoConfig": "modeling_nanochat_gpt.NanochatGPTConfig"}
    code |= {"AutoModelForCausalLM": "modeling_nanochat_gpt.NanochatGPT"}
    values = {"architectures": ["NanochatGPT"], "model_type": BUNDLE, "auto_map": code, "use_cache": False}
    return dict(model.state_dict()), {**values, "gpt": dataclasses.asdict(model.config)}


def export_checkpoint(folder: Path, stage: str, tag: str | None, step: int | None = None, format: str = "auto") -> str:
    """Write a checkpoint to `folder` as a bundle: safetensors, config, tokenizer, chat template, hashes, model card.

    format: "nanochat" = transformers' own class, where it can express the model; "code" = with a modeling file that
    transformers loads by trust_remote_code; "auto" = what goes. Returns what to say; ValueError for what cannot be.
    """
    if format == "gguf":
        raise ValueError("llama.cpp's converter has no nanochat architecture, so there is no GGUF: use --format auto")
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"{folder} is not empty: export to a new folder")
    model, tokenizer, meta = checkpoint.load_model(stage, "cpu", tag, step, train=True)
    plain = expressible(model)
    if format == "nanochat" and not plain:
        raise ValueError("transformers' NanoChat class cannot express this model: use --format code")
    coded = format == "code" or not plain
    state, values = (_code_bundle if coded else _nanochat_bundle)(model.eval())
    config = model.config
    values |= {"vocab_size": config.vocab_size, "max_position_embeddings": config.sequence_len}
    values |= {"hidden_size": config.n_embd, "num_hidden_layers": config.n_layer}
    values |= {"num_attention_heads": config.n_head, "tie_word_embeddings": False}
    bos, end = tokenizer.get_bos_token_id(), tokenizer.encode_special("<|assistant_end|>")
    ends = {"bos_token_id": bos, "eos_token_id": [end, bos]}
    folder.mkdir(parents=True, exist_ok=True)
    state = {name: value.detach().float().contiguous() for name, value in state.items()}
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    atomic_write_json(folder / "config.json", {**values, **ends, "dtype": "float32"})
    atomic_write_json(folder / "generation_config.json", {**ends, "use_cache": not coded})
    atomic_write(folder / "tokenizer.json", to_tokenizer_json(tokenizer))
    tokenizer.save(folder / "tokenizer")  # our own form, which tiktoken runs, for the way back
    names = {"bos_token": "<|bos|>", "eos_token": "<|assistant_end|>", "tokenizer_class": "PreTrainedTokenizerFast"}
    limits = {"model_max_length": config.sequence_len, "clean_up_tokenization_spaces": False}
    atomic_write_json(folder / "tokenizer_config.json", {**names, **limits})
    here = Path(__file__).parent
    shutil.copy(here / "chat_template.jinja", folder)
    if coded:
        shutil.copy(here / "modeling_nanochat_gpt.txt", folder / "modeling_nanochat_gpt.py")
    facts = {name: meta.get(name) for name in ("stage", "tag", "step", "val_bpb", "dataset", "source")}
    trust = ", trust_remote_code=True" if coded else ""
    name, size = f"{facts['stage']}/{facts['tag']}", sum(p.numel() for p in model.parameters()) / 1e6
    told = "\n".join(f"* {name}: {value}" for name, value in facts.items() if value is not None)
    shape, card = json.dumps(dataclasses.asdict(config), indent=1), (here / "bundle_card.txt").read_text("utf-8")
    atomic_write(folder / "README.md", card.format(name=name, size=size, facts=told, trust=trust, config=shape))
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    hashes = {path.relative_to(folder).as_posix(): sha256_file(path) for path in files}
    atomic_write_json(folder / "hashes.json", {"sha256": hashes, "tokenizer_hash": tokenizer.hash, **facts})
    return f"{folder}: AutoModelForCausalLM.from_pretrained({str(folder)!r}{trust})"
