"""GPT-2 (Radford et al. 2019): LayerNorm, learned positions, tanh-GELU, biases everywhere, a tied head."""

import re
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F

from nanochat.hf.layers import OpenModel, Settings, attend, bring

_MASKS = re.compile(r"h\.\d+\.attn\.(masked_)?bias")  # the hub's file carries the causal mask


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
        """Raises ValueError that names what is missing, wrong or not supported."""
        settings = Settings(values)
        settings.expect("activation_function", "gelu_new", "gelu_pytorch_tanh")
        settings.expect("scale_attn_weights", True)
        settings.expect("scale_attn_by_inverse_layer_idx", False)
        settings.expect("add_cross_attention", False)
        width, n_head = settings.integer("n_embd"), settings.integer("n_head")
        if width % n_head:
            raise ValueError(f"config.json: 'n_embd' {width} is not divisible by 'n_head' {n_head}")
        return cls(
            vocab_size=settings.integer("vocab_size"),
            sequence_len=settings.integer("n_positions"),
            n_layer=settings.integer("n_layer", high=1000),
            n_head=n_head,
            n_embd=width,
            n_inner=settings.integer("n_inner", 4 * width),
            eps=settings.number("layer_norm_epsilon", 1e-5),
            tied=settings.flag("tie_word_embeddings", True),
        )


class Conv1D(nn.Module):
    """A matrix with bias, stored (in, out)."""

    def __init__(self, n_in: int, n_out: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.empty(n_in, n_out)), nn.Parameter(torch.empty(n_out))

    def forward(self, x_BTC: torch.Tensor) -> torch.Tensor:
        return F.linear(x_BTC, self.weight.t(), self.bias)


class Attention(nn.Module):
    """Queries, keys and values from one matrix; every head has its own keys."""

    def __init__(self, config: GPT2Config) -> None:
        super().__init__()
        self.n_head = config.n_head
        self.c_attn = Conv1D(config.n_embd, 3 * config.n_embd)
        self.c_proj = Conv1D(config.n_embd, config.n_embd)

    def forward(self, x_BTC, positions_BT, window: int, cache: Any, layer: int) -> torch.Tensor:
        B, T, C = x_BTC.shape
        q_BTHD, k_BTHD, v_BTHD = self.c_attn(x_BTC).view(B, T, 3, self.n_head, C // self.n_head).unbind(2)
        return self.c_proj(attend(q_BTHD, k_BTHD, v_BTHD, positions_BT, window, cache, layer).reshape(B, T, C))


class Block(nn.Module):
    """Attention, then two matrices around a GELU in its tanh form, each on the normed residual."""

    def __init__(self, config: GPT2Config) -> None:
        super().__init__()
        C, inner = config.n_embd, config.n_inner
        self.ln_1, self.ln_2 = (nn.LayerNorm(C, config.eps) for _ in range(2))
        self.attn = Attention(config)
        self.mlp = nn.ModuleDict({"c_fc": Conv1D(C, inner), "c_proj": Conv1D(inner, C)})

    def forward(self, x_BTC, positions_BT, window: int, cache: Any, layer: int) -> torch.Tensor:
        x_BTC = x_BTC + self.attn(self.ln_1(x_BTC), positions_BT, window, cache, layer)
        inner_BTI = F.gelu(self.mlp["c_fc"](self.ln_2(x_BTC)), approximate="tanh")
        return x_BTC + self.mlp["c_proj"](inner_BTI)


class GPT2(OpenModel):
    """The model, without values until `hf_load` fills it."""

    config_type = GPT2Config

    def __init__(self, config: GPT2Config) -> None:
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.sequence_len, config.n_embd)
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd, config.eps)
        self.stack = [self.wte, self.wpe], self.h, self.ln_f
        self.lm_head = None if config.tied else nn.Linear(config.n_embd, config.vocab_size, bias=False)

    @staticmethod
    def rename(name: str) -> str | None:
        """See OpenModel."""
        name = name.removeprefix("transformer.")
        return None if _MASKS.fullmatch(name) else name

    def hidden(self, idx_BT: torch.Tensor, cache: Any = None, positions_BT: torch.Tensor | None = None) -> torch.Tensor:
        """The normed residual that the head reads, (B, T, C)."""
        positions_BT = self.positions(idx_BT, cache, positions_BT)
        x_BTC = self.wte(idx_BT) + self.wpe(positions_BT.clamp(min=0))
        for layer, block in enumerate(self.h):
            x_BTC, positions_BT = bring(block.ln_1, x_BTC, positions_BT)
            x_BTC = block(x_BTC, positions_BT, self.config.sequence_len, cache, layer)
        return self.ln_f(*bring(self.ln_f, x_BTC))
