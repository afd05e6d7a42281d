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

from nanochat.gpt import rotate, rotation
from nanochat.hf.layers import OpenModel, Settings, TiedHead, bring, rotary_frequencies
from nanochat.language_model import LayerNeed, Linear, Together


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
        return cls(
            **found,
            qkv_bias=biased or family == "qwen2",
            out_bias=biased,
            mlp_bias=settings.flag("mlp_bias"),
            qk_norm=family == "qwen3",
            sinks=False,
        )


def shape(settings: Settings, theta: float, sliding: Callable[[int], bool]) -> dict[str, Any]:
    """Return the fields of LlamaConfig that every family states in the same words. Raises ValueError for misfits.

    theta: the family's default base of rotation. sliding: which layers have a window where config.json names none.
    """
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
        self.head_dim = config.head_dim
        self.window = config.windows[layer]
        q_channels = config.n_head * config.head_dim
        kv_channels = config.n_kv_head * config.head_dim
        self.q_proj = Linear(config.n_embd, q_channels, bias=config.qkv_bias)
        self.k_proj = Linear(config.n_embd, kv_channels, bias=config.qkv_bias)
        self.v_proj = Linear(config.n_embd, kv_channels, bias=config.qkv_bias)
        self.o_proj = Linear(q_channels, config.n_embd, bias=config.out_bias)
        self.heads = [config.n_head, config.n_kv_head]
        self.qk_norm = config.qk_norm
        if config.qk_norm:
            self.q_norm = nn.RMSNorm(config.head_dim, config.eps)
            self.k_norm = nn.RMSNorm(config.head_dim, config.eps)
        self.qkv: Any = Together((self.q_proj, self.k_proj), (self.v_proj,))
        self.sinks = nn.Parameter(torch.empty(config.n_head)) if config.sinks else None

    def forward(self, x_C, cos_1D, sin_1D, attend: Any) -> torch.Tensor:
        *qk, v = self.qkv(x_C)
        qk = [x.unflatten(-1, (-1, self.head_dim)) for x in qk]
        v_KD = v.unflatten(-1, (-1, self.head_dim))
        if self.qk_norm:
            q_HD, k_KD = qk if len(qk) == 2 else qk[0].split(self.heads, dim=-2)
            qk = [self.q_norm(q_HD), self.k_norm(k_KD)]
        qk = [rotate(x_HD, cos_1D, sin_1D) for x_HD in qk]
        q_HD, k_KD = qk if len(qk) == 2 else qk[0].split(self.heads, dim=-2)
        y_HD = attend(q_HD, k_KD, v_KD, self.window, self.sinks)
        return self.o_proj(y_HD.flatten(-2))


class MLP(nn.Module):
    """SwiGLU (arXiv 2002.05202)."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.gate_proj = Linear(config.n_embd, config.n_inner, bias=config.mlp_bias)
        self.up_proj = Linear(config.n_embd, config.n_inner, bias=config.mlp_bias)
        self.down_proj = Linear(config.n_inner, config.n_embd, bias=config.mlp_bias)
        self.gate_up: Any = Together((self.gate_proj,), (self.up_proj,))

    def forward(self, x_C: torch.Tensor) -> torch.Tensor:
        gate, up = self.gate_up(x_C)
        return self.down_proj(F.silu(gate) * up)


class Block(nn.Module):
    """Attention, then `mlp`, each on the normed residual."""

    def __init__(self, config: LlamaConfig, layer: int, mlp: nn.Module) -> None:
        super().__init__()
        self.self_attn = Attention(config, layer)
        self.mlp = mlp
        self.input_layernorm = nn.RMSNorm(config.n_embd, config.eps)
        self.post_attention_layernorm = nn.RMSNorm(config.n_embd, config.eps)

    def forward(self, x_C, cos_1D, sin_1D, attend: Any) -> torch.Tensor:
        x_C = x_C + self.self_attn(self.input_layernorm(x_C), cos_1D, sin_1D, attend)
        return x_C + self.mlp(self.post_attention_layernorm(x_C))


class Decoder(nn.Module):
    """From tokens to the normed residual."""

    def __init__(self, config: LlamaConfig, mlp: Callable[[Any], nn.Module]) -> None:
        super().__init__()
        self.embed_tokens: Any = nn.Embedding(config.vocab_size, config.n_embd)
        self.layers = nn.ModuleList(Block(config, layer, mlp(config)) for layer in range(config.n_layer))
        self.norm = nn.RMSNorm(config.n_embd, config.eps)
        self.scale = config.rotary_scale
        # it belongs to the embedding so that it is on the device where tokens come in
        radians_P = torch.tensor(config.rotary, device="cpu")
        self.embed_tokens.register_buffer("radians_P", radians_P, persistent=False)

    def forward(self, idx: torch.Tensor, context: Any) -> torch.Tensor:
        x_C = self.embed_tokens(idx)
        cos_1D, sin_1D = rotation(context.positions, self.embed_tokens.radians_P, x_C.dtype, self.scale)
        for layer, block in enumerate(self.layers):
            x_C, cos_1D, sin_1D = bring(block.input_layernorm, x_C, cos_1D, sin_1D)
            x_C = block(x_C, cos_1D, sin_1D, context.layer(layer))
        return self.norm(*bring(self.norm, x_C))


class Llama(OpenModel):
    """The model, without values until `hf/load.py` fills it."""

    config_type: type[LlamaConfig] = LlamaConfig
    mlp: Callable[[Any], nn.Module] = MLP  # makes what follows attention in a block

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.config = config
        self.model = Decoder(config, self.mlp)
        self.stack = [self.model.embed_tokens], self.model.layers, self.model.norm
        self.lm_head = None if config.tied else Linear(config.n_embd, config.vocab_size)
        self.readout = Together((self.lm_head or TiedHead(self.model.embed_tokens),))

    @staticmethod
    def rename(name: str) -> str | None:
        """Return the model's name of a tensor in a file; None = not needed."""
        return None if name.endswith("rotary_emb.inv_freq") else name

    @property
    def cache_needs(self) -> list[LayerNeed]:
        """What each layer keeps of a token in the KV cache."""
        return [LayerNeed(self.config.n_kv_head, self.config.head_dim, window) for window in self.config.windows]

    def forward(
        self,
        idx: torch.Tensor,
        targets: torch.Tensor | None = None,
        *,
        loss_reduction: str = "mean",
        context: Any = None,
        wanted_R: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return logits in fp32, or with targets the loss in nats; the arguments are those of `gpt.GPT.forward`."""
        context = context or self.whole_rows(idx)
        x_C = self.model(idx, context)
        return self.predict(x_C, targets, loss_reduction, wanted_R)
