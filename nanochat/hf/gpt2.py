"""GPT-2 (Radford et al. 2019): LayerNorm, learned positions, tanh-GELU, biases everywhere, a tied head."""

import re
from typing import Any, Literal

import torch
import torch.nn as nn
import torch.nn.functional as F
from pydantic import Field, model_validator
from typing_extensions import Self

from nanochat.hf.open_model import Count, Heads, Layers, OpenConfig, OpenModel, Positive, bring
from nanochat.language_model import Linear, Together

# The parts of the model that have other names in the files.
NAMES = {"wte": "embed_tokens", "h": "layers", "ln_f": "norm"}
# Files from the hub hold the causal mask of each layer, too.
MASKS = re.compile(r"h\.\d+\.attn\.(masked_)?bias")
# The matrices of a block, which the files hold as (inputs, outputs): in TensorFlow they were 1x1 convolutions.
CONVOLUTIONS = re.compile(r"layers\.\d+\.(attn|mlp)\.(c_attn|c_fc|c_proj)\.weight")


class GPT2Config(OpenConfig):
    """config.json of a GPT-2."""

    vocab_size: Count
    sequence_len: Count = Field(alias="n_positions")
    n_layer: Layers
    n_head: Heads
    n_embd: Count
    n_inner: Count = 0  # absent: four times the width
    eps: Positive = Field(1e-5, alias="layer_norm_epsilon")
    tied: bool = Field(True, alias="tie_word_embeddings")
    # Other values of these mean other maths. GPT-2's GELU is the tanh form, under two names.
    activation_function: Literal["gelu_new", "gelu_pytorch_tanh"] = "gelu_new"
    scale_attn_weights: Literal[True] = True
    scale_attn_by_inverse_layer_idx: Literal[False] = False
    add_cross_attention: Literal[False] = False

    @model_validator(mode="after")
    def complete(self) -> Self:
        """Fill in what is absent. Raises ValueError for numbers that do not fit together."""
        self.n_inner = self.n_inner or 4 * self.n_embd
        if self.n_embd % self.n_head:
            raise ValueError(f"'n_embd' {self.n_embd} is not divisible by 'n_head' {self.n_head}")
        return self

    @property
    def n_kv_head(self) -> int:
        """Every head has keys of its own."""
        return self.n_head

    @property
    def head_dim(self) -> int:
        """Channels of one head, D."""
        return self.n_embd // self.n_head

    @property
    def windows(self) -> list[int]:
        """Positions each layer attends to: all."""
        return [self.sequence_len] * self.n_layer


class Attention(nn.Module):
    """Causal attention; queries, keys and values come from one matrix, and every head has its own keys."""

    def __init__(self, config: GPT2Config) -> None:
        super().__init__()
        self.n_head = config.n_head
        self.window = config.sequence_len
        self.c_attn = Linear(config.n_embd, 3 * config.n_embd, bias=True)
        self.c_proj = Linear(config.n_embd, config.n_embd, bias=True)

    def forward(self, x_C: torch.Tensor, attend: Any) -> torch.Tensor:
        # The matrix's outputs are all queries, then all keys, then all values.
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

    def hidden(self, idx: torch.Tensor, context: Any) -> torch.Tensor:
        """Return the normed residual that the head reads, (..., C)."""
        # A learned vector for each position is added once, at the bottom. Later models rotate queries and keys instead.
        x_C = self.embed_tokens(idx) + self.wpe(context.positions)
        for layer, block in enumerate(self.layers):
            # A layer may lie on another device than the one before (hf/parallel.py).
            (x_C,) = bring(block.ln_1.weight.device, x_C)
            x_C = block(x_C, context.layer(layer))
        (x_C,) = bring(self.norm.weight.device, x_C)
        return self.norm(x_C)
