"""Tiny random models of each open-weights family, made and saved by transformers, the oracle of their tests."""

import functools
import json
from pathlib import Path
from typing import Any

import tokenizers
import torch
import transformers

from nanochat import hf
from nanochat.conversation import ChatFormat
from nanochat.engine import Engine
from nanochat.hf.chat import chat_format
from nanochat.hf.tokenizer import HFTokenizer

VOCAB = 320
TEXT = [
    "It was the best of times, it was the worst of times.",
    "def f(x):\n    return x ** 2\n\n\nprint(f(12345))",
    "Grüße aus Köln! 東京は日本の首都です。 🎉👩‍👩‍👧 naïve café",
    "spaces   and\ttabs\r\n\r\n  at the   end   ",
]
CLASSES = {
    "gpt2": (transformers.GPT2Config, transformers.GPT2LMHeadModel),
    "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM),
    "mistral": (transformers.MistralConfig, transformers.MistralForCausalLM),
    "qwen2": (transformers.Qwen2Config, transformers.Qwen2ForCausalLM),
    "qwen3": (transformers.Qwen3Config, transformers.Qwen3ForCausalLM),
    "gpt_oss": (transformers.GptOssConfig, transformers.GptOssForCausalLM),
}
SHAPE = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
OSS_SHAPE = {**SHAPE, "head_dim": 16, "num_local_experts": 6, "num_experts_per_tok": 3, "sliding_window": 8}


def make(kind: str, seed: int = 0, **settings: Any) -> transformers.PreTrainedModel:
    """A model with random values everywhere, biases, norms and sinks too."""
    shape = {"gpt2": {"n_embd": 48, "n_layer": 3, "n_head": 4, "n_positions": 256}, "gpt_oss": OSS_SHAPE}
    config_class, model_class = CLASSES[kind]
    ends = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    config = config_class(**{"vocab_size": VOCAB, **shape.get(kind, SHAPE), **ends, **settings})
    model = model_class._from_config(config, attn_implementation="eager").eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for name, value in model.named_parameters():
        noise = torch.randn(value.shape, generator=generator)
        if "embed_tokens" in name or "wte" in name:
            value.copy_(noise)
        elif value.dim() > 1 and "bias" not in name:
            value.copy_(noise * value.shape[-2 if "experts" in name or kind == "gpt2" else -1] ** -0.5)
        else:
            norm = "norm" in name or "ln_" in name
            value.copy_(0.3 * noise + (1 if norm and "weight" in name else 0))
    return model


@functools.cache
def byte_level() -> tokenizers.Tokenizer:
    """A byte-level BPE, as GPT-2, Llama 3, Qwen and gpt-oss have."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=VOCAB - 4,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXT, trainer)
    return tokenizer


def save(model: transformers.PreTrainedModel, folder: Path, **options: Any) -> Path:
    """The model's folder, with a tokenizer. options: of `save_pretrained`, such as max_shard_size."""
    model.save_pretrained(folder, **options)
    byte_level().save(str(folder / "tokenizer.json"))
    return folder


HARMONY_MARKS = ("start", "end", "message", "channel", "constrain", "return", "call")


def harmony_tokenizer(folder: Path) -> HFTokenizer:
    """A byte-level tokenizer with gpt-oss's marks, saved in `folder`."""
    backend = tokenizers.Tokenizer.from_str(byte_level().to_str())
    backend.add_special_tokens([f"<|{name}|>" for name in HARMONY_MARKS])
    backend.save(str(folder / "tokenizer.json"))
    ends = [backend.token_to_id(f"<|{name}|>") for name in ("return", "call")]
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
    return HFTokenizer.from_directory(folder)


class Scripted:
    """A real model that is made to say `answer`, token by token; for one request at a time."""

    whole = False  # it is not to be prepacked: the copy would not be scripted
    graphs = False

    def __init__(self, model: Any, answer: list[int]) -> None:
        self.model = model
        self.answer = answer
        self.config = model.config
        self.device = model.device
        self.dtype = model.dtype
        self.cache_needs = model.cache_needs
        self.start = self.last = -1

    def modules(self) -> Any:
        """The real model's modules: the engine counts their weights."""
        return self.model.modules()

    def __call__(self, idx_N: torch.Tensor, *, context: Any, wanted_R: torch.Tensor | None = None) -> torch.Tensor:
        logits_RV = self.model(idx_N, context=context, wanted_R=wanted_R)
        last = int(context.positions[-1])
        if idx_N.numel() > 1 or last != self.last + 1:  # a prompt is being read
            self.start = last
        self.last = last
        logits_RV[-1:, self.answer[min(last - self.start, len(self.answer) - 1)]] = 1e4
        return logits_RV


HARMONY_ANSWER = "<|channel|>analysis<|message|>2 and 2 🎉 <b>is</b>\nFour?<|end|><|start|>assistant"
HARMONY_ANSWER += "<|channel|>final<|message|>Four, **东京**.<|return|>"
REASONING, ANSWER = "2 and 2 🎉 <b>is</b>\nFour?", "Four, **东京**."


def scripted_gpt_oss(folder: Path, answer: str = HARMONY_ANSWER) -> tuple[Engine, ChatFormat]:
    """A random gpt-oss that always thinks REASONING and says ANSWER, and its format."""
    folder.mkdir(exist_ok=True)
    make("gpt_oss", vocab_size=328, max_position_embeddings=1024).save_pretrained(folder)
    tokenizer = harmony_tokenizer(folder)
    model = hf.load_model(folder, "cpu", torch.float32)
    script = tokenizer.encode_marked(answer)
    return Engine(Scripted(model, script), tokenizer, 1), chat_format(folder, tokenizer)
