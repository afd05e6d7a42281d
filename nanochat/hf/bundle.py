"""A bundle: a folder with one of our models that transformers loads, or any program that reads its formats.

model.safetensors                                 weights, under the names of the class that runs them
config.json, generation_config.json               for transformers' NanoChat class, or for
modeling_nanochat.py                              ... our own, with trust_remote_code
tokenizer.json, tokenizer_config.json             for the `tokenizers` package
chat_template.jinja                               conversations, as conversation.py renders them
tokenizer/                                        our own format, to load it here again
README.md, hashes.json                            the model card; SHA-256 of all other files
"""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from nanochat.common import atomic_write, atomic_write_json, sha256_file
from nanochat.gpt import GPTConfig
from nanochat.hf.tokenizer_convert import to_tokenizer_json
from nanochat.tokenizer import Tokenizer

BUNDLE_TYPE = "nanochat_gpt"  # model_type in the config.json of a bundle with its own code
HERE = Path(__file__).parent


def write_bundle(
    folder: Path,
    config: GPTConfig,
    state: dict[str, torch.Tensor],
    tokenizer: Tokenizer,
    facts: dict[str, Any],
    with_code: bool,
) -> None:
    """Write all files of a bundle. `state` has the names of transformers' class or, with code of its own, ours.

    `facts` go into the model card and beside the hashes: stage, tag, step and so on.
    """
    folder.mkdir(parents=True, exist_ok=True)
    write_config(folder, config, tokenizer, with_code)
    write_tokenizer(folder, tokenizer, config.sequence_len)
    if with_code:
        shutil.copy(HERE / "modeling_nanochat.py", folder)
    state = {name: value.detach().float().contiguous() for name, value in state.items()}
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    write_card(folder, config, sum(value.numel() for value in state.values()), facts, with_code)
    # The hashes come last: they are those of all other files.
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    hashes = {path.relative_to(folder).as_posix(): sha256_file(path) for path in files}
    atomic_write_json(folder / "hashes.json", {"sha256": hashes, "tokenizer_hash": tokenizer.hash, **facts})


def write_config(folder: Path, config: GPTConfig, tokenizer: Tokenizer, with_code: bool) -> None:
    """Write config.json and generation_config.json for transformers' own class, or for modeling_nanochat.py."""
    # Generation ends with the assistant's turn, or where another document would begin.
    bos = tokenizer.get_bos_token_id()
    end = tokenizer.encode_special("<|assistant_end|>")
    special_ids = {"bos_token_id": bos, "eos_token_id": [end, bos]}
    if with_code:
        kind = {
            "architectures": ["NanochatGPT"],
            "model_type": BUNDLE_TYPE,
            "auto_map": {
                "AutoConfig": "modeling_nanochat.NanochatGPTConfig",
                "AutoModelForCausalLM": "modeling_nanochat.NanochatGPT",
            },
            "use_cache": False,
            "pad_token_id": bos,
            "gpt": dataclasses.asdict(config),
        }
    else:
        kind = {
            "architectures": ["NanoChatForCausalLM"],
            "model_type": "nanochat",
            "hidden_act": "relu2",
            "intermediate_size": 4 * config.n_embd,
            "num_key_value_heads": config.n_kv_head,
            "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_base},
            "rms_norm_eps": torch.finfo(torch.float32).eps,
            "final_logit_softcapping": config.softcap,
            "pad_token_id": None,  # its own default, 1, would keep the embedding of our token 1 from learning
        }
    values = {
        **kind,
        **special_ids,
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.sequence_len,
        "hidden_size": config.n_embd,
        "num_hidden_layers": config.n_layer,
        "num_attention_heads": config.n_head,
        "tie_word_embeddings": False,
        "dtype": "float32",
    }
    atomic_write_json(folder / "config.json", values)
    generation = {**special_ids, "pad_token_id": bos, "use_cache": not with_code}
    atomic_write_json(folder / "generation_config.json", generation)


def write_tokenizer(folder: Path, tokenizer: Tokenizer, context: int) -> None:
    """Write the tokenizer for transformers with its chat template, and in our own format, to load it here again."""
    atomic_write(folder / "tokenizer.json", to_tokenizer_json(tokenizer))
    tokenizer.save(folder / "tokenizer")
    settings = {
        "bos_token": "<|bos|>",
        "eos_token": "<|assistant_end|>",
        # Trainers leave the padding token out of the loss. With a token that is learned, such as the end of a turn, the
        # real ones would be left out as well; <|bos|> stands first in its row, where nothing predicts it.
        "pad_token": "<|bos|>",
        "padding_side": "left",  # generation goes on from the end of a row
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": context,
        "clean_up_tokenization_spaces": False,
    }
    atomic_write_json(folder / "tokenizer_config.json", settings)
    shutil.copy(HERE / "chat_template.jinja", folder)


def write_card(folder: Path, config: GPTConfig, n_parameters: int, facts: dict[str, Any], with_code: bool) -> None:
    """Write README.md, the bundle's model card, from bundle_card.txt."""
    template = (HERE / "bundle_card.txt").read_text(encoding="utf-8")
    text = template.format(
        name=f"{facts['stage']}/{facts['tag']}",
        size=n_parameters / 1e6,
        facts="\n".join(f"* {name}: {value}" for name, value in facts.items() if value is not None),
        trust=", trust_remote_code=True" if with_code else "",
        config=json.dumps(dataclasses.asdict(config), indent=1),
    )
    atomic_write(folder / "README.md", text)
