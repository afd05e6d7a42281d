"""GPT-2 (Radford et al. 2019): LayerNorm, learned positions, tanh-GELU, biases everywhere, a tied head."""

import re
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F

from nanochat.hf.open_model import OpenModel, Settings, bring
from nanochat.language_model import LayerNeed, Linear, Together

# The parts of the model that have other names in the files.
NAMES = {"wte": "embed_tokens", "h": "layers", "ln_f": "norm"}
# Files from the hub hold the causal mask of each layer, too.
MASKS = re.compile(r"h\.\d+\.attn\.(masked_)?bias")
# The matrices of a block, which the files hold as (inputs, outputs): in TensorFlow they were 1x1 convolutions.
CONVOLUTIONS = re.compile(r"layers\.\d+\.(attn|mlp)\.(c_attn|c_fc|c_proj)\.weight")


@dataclass(frozen=True)
class GPT2Config:
    """config.json of a GPT-2, checked."""

    vocab_size: int
    sequence_len: int
    n_layer: int
    n_head: int
    n_embd: int
    n_inner: int
    eps: float
    tied: bool

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "GPT2Config":
        """Read config.json. Raises ValueError that names what is missing, wrong or not supported."""
        settings = Settings(values)
        settings.expect("activation_function", "gelu_new", "gelu_pytorch_tanh")
        settings.expect("scale_attn_weights", True)
        settings.expect("scale_attn_by_inverse_layer_idx", False)
        settings.expect("add_cross_attention", False)
        n_embd = settings.integer("n_embd")
        n_head = settings.integer("n_head")
        if n_embd % n_head:
            raise ValueError(f"config.json: 'n_embd' {n_embd} is not divisible by 'n_head' {n_head}")
        return cls(
            vocab_size=settings.integer("vocab_size"),
            sequence_len=settings.integer("n_positions"),
            n_layer=settings.integer("n_layer", high=1000),
            n_head=n_head,
            n_embd=n_embd,
            n_inner=settings.integer("n_inner", 4 * n_embd),
            eps=settings.number("layer_norm_epsilon", 1e-5),
            tied=settings.flag("tie_word_embeddings", True),
        )


class Attention(nn.Module):
    """Causal attention; queries, keys and values come from one matrix, and every head has its own keys."""

    def __init__(self, config: GPT2Config) -> None:
        super().__init__()
        self.n_head = config.n_head
        self.window = config.sequence_len
        self.c_attn = Linear(config.n_embd, 3 * config.n_embd, bias=True)
        self.c_proj = Linear(config.n_embd, config.n_embd, bias=True)

    def forward(self, x_C: torch.Tensor, attend: Any) -> torch.Tensor:
        q_HD, k_HD, v_HD = self.c_attn(x_C).unflatten(-1, (3, self.n_head, -1)).unbind(-3)
        y_HD = attend(q_HD, k_HD, v_HD, self.window)
        return self.c_proj(y_HD.flatten(-2))


class MLP(nn.Module):
    """Two matrices around a GELU in its tanh form (arXiv 1606.08415)."""

    def __init__(self, config: GPT2Config) -> None:
        super().__init__()
        self.c_fc = Linear(config.n_embd, config.n_inner, bias=True)
        self.c_proj = Linear(config.n_inner, config.n_embd, bias=True)

    def forward(self, x_C: torch.Tensor) -> torch.Tensor:
        return self.c_proj(F.gelu(self.c_fc(x_C), approximate="tanh"))


class Block(nn.Module):
    """Attention, then MLP, each on the normed residual."""

    def __init__(self, config: GPT2Config) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, config.eps)
        self.attn = Attention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd, config.eps)
        self.mlp = MLP(config)

    def forward(self, x_C: torch.Tensor, attend: Any) -> torch.Tensor:
        x_C = x_C + self.attn(self.ln_1(x_C), attend)
        return x_C + self.mlp(self.ln_2(x_C))


class GPT2(OpenModel):
    """The model."""

    config_type = GPT2Config

    def __init__(self, config: GPT2Config) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.sequence_len, config.n_embd)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.norm = nn.LayerNorm(config.n_embd, config.eps)
        self.lm_head = Linear(config.n_embd, config.vocab_size)
        self.readout = Together((self.lm_head,))
        self.tie_head()

    @staticmethod
    def rename(name: str) -> str | None:
        """Return the model's name of a tensor in a file; None = not needed."""
        name = name.removeprefix("transformer.")  # some files have it, some have not
        if MASKS.fullmatch(name):
            return None
        part, _, rest = name.partition(".")
        return f"{NAMES.get(part, part)}.{rest}"

    @staticmethod
    def is_transposed(name: str) -> bool:
        """Return whether files hold the matrix of this name, the model's, as (inputs, outputs)."""
        return CONVOLUTIONS.fullmatch(name) is not None

    @property
    def cache_needs(self) -> list[LayerNeed]:
        """Return what each layer keeps of a token in the KV cache."""
        config = self.config
        need = LayerNeed(config.n_head, config.n_embd // config.n_head, config.sequence_len)
        return [need] * config.n_layer

    def hidden(self, idx: torch.Tensor, context: Any) -> torch.Tensor:
        """Return the normed residual that the head reads, (..., C)."""
        x_C = self.embed_tokens(idx) + self.wpe(context.positions)
        for layer, block in enumerate(self.layers):
            (x_C,) = bring(block.ln_1.weight.device, x_C)
            x_C = block(x_C, context.layer(layer))
        (x_C,) = bring(self.norm.weight.device, x_C)
        return self.norm(x_C)
