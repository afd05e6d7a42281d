"""Llama 2 and 3, SmolLM, Mistral, Qwen2 and Qwen3: one decoder with RMSNorm, SwiGLU, grouped queries, rotary positions.

The families differ in biases, in norms of queries and keys, in windows and in how far rotary positions are stretched.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F

from nanochat.gpt import rotate
from nanochat.hf.layers import OpenModel, Settings, attend, bring, rotary_frequencies


@dataclass(frozen=True)
class LlamaConfig:
    """config.json of a Llama-like model, checked."""

    vocab_size: int
    sequence_len: int
    n_layer: int
    n_head: int
    n_kv_head: int
    head_dim: int
    n_embd: int
    n_inner: int
    eps: float
    tied: bool
    qkv_bias: bool
    out_bias: bool
    mlp_bias: bool
    qk_norm: bool
    sinks: bool
    windows: tuple[int, ...]  # positions each layer attends to, its own included
    rotary: tuple[float, ...]  # radians a position, for each plane
    rotary_scale: float  # on cos and sin

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "LlamaConfig":
        """Raises ValueError that names what is missing, wrong or not supported."""
        settings, family = Settings(values), values.get("model_type")
        biased = settings.flag("attention_bias")
        first: float = math.inf  # layer with a window
        if family == "mistral" and "sliding_window" in settings.values:
            first = 0
        elif family != "mistral" and settings.flag("use_sliding_window"):
            first = settings.integer("max_window_layers", 28, low=0)
        found = shape(settings, 10_000.0, lambda layer: layer >= first)
        found |= {"qkv_bias": biased or family == "qwen2", "out_bias": biased, "mlp_bias": settings.flag("mlp_bias")}
        return cls(**found, qk_norm=family == "qwen3", sinks=False)


def shape(settings: Settings, theta: float, sliding: Callable[[int], bool]) -> dict[str, Any]:
    """The fields of LlamaConfig that every family states in the same words; ValueError for misfits. theta: its default
    base of rotation; sliding: which layers have a window where config.json does not name them."""
    settings.expect("hidden_act", "silu")
    layers, context = settings.integer("num_hidden_layers", high=1000), settings.integer("max_position_embeddings")
    width, heads = settings.integer("hidden_size"), settings.integer("num_attention_heads", high=1 << 16)
    kv_heads = settings.integer("num_key_value_heads", heads)
    if heads % kv_heads:
        raise ValueError(f"config.json: {heads} attention heads cannot share {kv_heads} key-value heads evenly")
    if "head_dim" not in settings.values and width % heads:
        raise ValueError(f"config.json: 'hidden_size' {width} is not divisible by {heads} attention heads")
    head_dim = settings.integer("head_dim", max(1, width // heads), high=1 << 16)
    rotary, scale = rotary_frequencies(settings, head_dim, theta)
    return {
        "vocab_size": settings.integer("vocab_size"),
        "sequence_len": context,
        "n_layer": layers,
        "n_head": heads,
        "n_kv_head": kv_heads,
        "head_dim": head_dim,
        "n_embd": width,
        "n_inner": settings.integer("intermediate_size"),
        "eps": settings.number("rms_norm_eps", 1e-6),
        "rotary": rotary,
        "rotary_scale": scale,
        "tied": settings.flag("tie_word_embeddings"),
        "windows": settings.windows(layers, context, sliding),
    }


class Attention(nn.Module):
    """Causal grouped-query attention; norms of queries and keys, biases, windows and sinks as the config has them."""

    def __init__(self, config: LlamaConfig, layer: int) -> None:
        super().__init__()
        self.config, self.layer = config, layer
        D, n_q, n_kv = config.head_dim, config.n_head * config.head_dim, config.n_kv_head * config.head_dim
        self.q_proj = nn.Linear(config.n_embd, n_q, bias=config.qkv_bias)
        self.k_proj = nn.Linear(config.n_embd, n_kv, bias=config.qkv_bias)
        self.v_proj = nn.Linear(config.n_embd, n_kv, bias=config.qkv_bias)
        self.o_proj = nn.Linear(n_q, config.n_embd, bias=config.out_bias)
        self.q_norm, self.k_norm = (nn.RMSNorm(D, config.eps) if config.qk_norm else nn.Identity() for _ in range(2))
        self.sinks = nn.Parameter(torch.empty(config.n_head)) if config.sinks else None

    def forward(self, x_BTC, cos_BT1D, sin_BT1D, positions_BT, cache: Any) -> torch.Tensor:
        config, (B, T, _) = self.config, x_BTC.shape
        q_BTHD = self.q_norm(self.q_proj(x_BTC).view(B, T, -1, config.head_dim))
        k_BTKD = self.k_norm(self.k_proj(x_BTC).view(B, T, -1, config.head_dim))
        v_BTKD = self.v_proj(x_BTC).view(B, T, -1, config.head_dim)
        q_BTHD, k_BTKD = rotate(q_BTHD, cos_BT1D, sin_BT1D), rotate(k_BTKD, cos_BT1D, sin_BT1D)
        window = config.windows[self.layer]
        y_BTHD = attend(q_BTHD, k_BTKD, v_BTKD, positions_BT, window, cache, self.layer, self.sinks)
        return self.o_proj(y_BTHD.reshape(B, T, -1))


class MLP(nn.Module):
    """SwiGLU (arXiv 2002.05202)."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.n_embd, config.n_inner, bias=config.mlp_bias)
        self.up_proj = nn.Linear(config.n_embd, config.n_inner, bias=config.mlp_bias)
        self.down_proj = nn.Linear(config.n_inner, config.n_embd, bias=config.mlp_bias)

    def forward(self, x_BTC: torch.Tensor) -> torch.Tensor:
        return self.down_proj(F.silu(self.gate_proj(x_BTC)) * self.up_proj(x_BTC))


class Block(nn.Module):
    """Attention, then `mlp`, each on the normed residual."""

    def __init__(self, config: LlamaConfig, layer: int, mlp: nn.Module) -> None:
        super().__init__()
        self.self_attn, self.mlp = Attention(config, layer), mlp
        self.input_layernorm, self.post_attention_layernorm = (nn.RMSNorm(config.n_embd, config.eps) for _ in range(2))

    def forward(self, x_BTC, cos_BT1D, sin_BT1D, positions_BT, cache: Any) -> torch.Tensor:
        x_BTC = x_BTC + self.self_attn(self.input_layernorm(x_BTC), cos_BT1D, sin_BT1D, positions_BT, cache)
        return x_BTC + self.mlp(self.post_attention_layernorm(x_BTC))


class Decoder(nn.Module):
    """From tokens to the normed residual."""

    def __init__(self, config: LlamaConfig, mlp: Callable[[Any], nn.Module]) -> None:
        super().__init__()
        self.embed_tokens: Any = nn.Embedding(config.vocab_size, config.n_embd)
        self.layers = nn.ModuleList(Block(config, layer, mlp(config)) for layer in range(config.n_layer))
        self.norm, self.scale = nn.RMSNorm(config.n_embd, config.eps), config.rotary_scale
        rotary_D = torch.tensor(config.rotary, device="cpu")
        self.embed_tokens.register_buffer("rotary_D", rotary_D, persistent=False)  # where positions come in

    def forward(self, idx_BT: torch.Tensor, positions_BT: torch.Tensor, cache: Any | None) -> torch.Tensor:
        x_BTC = self.embed_tokens(idx_BT)
        angles_BT1D = (positions_BT[..., None].float() * self.embed_tokens.rotary_D)[:, :, None]
        cos, sin = ((turn(angles_BT1D) * self.scale).to(x_BTC.dtype) for turn in (torch.cos, torch.sin))
        given = [cos, sin, positions_BT]
        for block in self.layers:
            x_BTC, *given = bring(block.input_layernorm, x_BTC, *given)
            x_BTC = block(x_BTC, *given, cache)
        return self.norm(*bring(self.norm, x_BTC))


class Llama(OpenModel):
    """The model, without values until `hf_load` fills it."""

    config_type: type[LlamaConfig] = LlamaConfig
    mlp: Callable[[Any], nn.Module] = MLP  # makes what follows attention in a block

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.config, self.model = config, Decoder(config, self.mlp)
        self.stack = [self.model.embed_tokens], self.model.layers, self.model.norm
        self.lm_head = None if config.tied else nn.Linear(config.n_embd, config.vocab_size, bias=False)

    @staticmethod
    def rename(name: str) -> str | None:
        """See OpenModel."""
        return None if name.endswith("rotary_emb.inv_freq") else name

    def hidden(self, idx_BT: torch.Tensor, cache: Any = None, positions_BT: torch.Tensor | None = None) -> torch.Tensor:
        """The normed residual that the head reads, (B, T, C)."""
        return self.model(idx_BT, self.positions(idx_BT, cache, positions_BT), cache)
