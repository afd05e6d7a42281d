"""Llama 2 and 3, SmolLM, Mistral, Qwen2 and Qwen3: one decoder with RMSNorm, SwiGLU, grouped queries, rotary positions.

The families differ in few things, each of which is a field of `LlamaConfig`: biases, norms of queries and keys,
windows, and how far rotary positions are stretched. gpt_oss.py adds sinks and experts.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F

from nanochat.gpt import rotate, rotation
from nanochat.hf.open_model import OpenModel, Settings, bring
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
    windows: tuple[int, ...]  # positions each layer attends to, its own included
    rotary: tuple[float, ...]  # radians per position, for each plane
    rotary_scale: float  # factor on cos and sin
    sinks: bool  # one more logit per head, which takes its share of the softmax

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "LlamaConfig":
        """Read config.json. Raises ValueError that names what is missing, wrong or not supported."""
        settings = Settings(values)
        settings.expect("hidden_act", "silu")
        family = values.get("model_type")
        n_layer = settings.integer("num_hidden_layers", high=1000)
        sequence_len = settings.integer("max_position_embeddings")
        n_embd = settings.integer("hidden_size")
        n_head = settings.integer("num_attention_heads", high=1 << 16)
        n_kv_head = settings.integer("num_key_value_heads", n_head)
        if n_head % n_kv_head:
            raise ValueError(f"config.json: {n_head} attention heads cannot share {n_kv_head} key-value heads evenly")
        if "head_dim" not in settings.values and n_embd % n_head:
            raise ValueError(f"config.json: 'hidden_size' {n_embd} is not divisible by {n_head} attention heads")
        head_dim = settings.integer("head_dim", max(1, n_embd // n_head), high=1 << 16)
        has_bias = settings.flag("attention_bias")
        rotary, rotary_scale = read_rotary(settings, head_dim)
        return cls(
            vocab_size=settings.integer("vocab_size"),
            sequence_len=sequence_len,
            n_layer=n_layer,
            n_head=n_head,
            n_kv_head=n_kv_head,
            head_dim=head_dim,
            n_embd=n_embd,
            n_inner=settings.integer("intermediate_size"),
            eps=settings.number("rms_norm_eps", 1e-6),
            tied=settings.flag("tie_word_embeddings"),
            qkv_bias=has_bias or family == "qwen2",
            out_bias=has_bias,
            mlp_bias=settings.flag("mlp_bias"),
            qk_norm=family == "qwen3",
            windows=read_windows(settings, n_layer, sequence_len),
            rotary=rotary,
            rotary_scale=rotary_scale,
            sinks=family == "gpt_oss",
        )


def read_windows(settings: Settings, n_layer: int, context: int) -> tuple[int, ...]:
    """Return how many positions each layer attends to, its own included.

    `layer_types` says it. Older files lack that: there all layers of a Mistral slide, and the later ones of a Qwen."""
    kinds = settings.values.get("layer_types")
    if kinds is None:
        first_sliding = n_layer
        if settings.values.get("model_type") == "mistral":
            first_sliding = 0 if "sliding_window" in settings.values else n_layer
        elif settings.flag("use_sliding_window"):
            first_sliding = settings.integer("max_window_layers", 28, low=0)
        kinds = ["sliding_attention" if layer >= first_sliding else "full_attention" for layer in range(n_layer)]
    if not isinstance(kinds, list) or len(kinds) != n_layer:
        raise ValueError(f"config.json: 'layer_types' must name the kind of each of the {n_layer} layers")
    windows = []
    for kind in kinds:
        if kind == "full_attention":
            windows.append(context)
        elif kind == "sliding_attention":
            windows.append(min(settings.integer("sliding_window"), context))
        else:
            raise ValueError(f"config.json: layer type {kind!r:.40} is not supported")
    return tuple(windows)


def read_rotary(settings: Settings, head_dim: int) -> tuple[tuple[float, ...], float]:
    """Return radians per position for each of the D/2 planes, and the factor on cos and sin.

    A model that was trained on short texts reads longer ones when its planes turn slower, by `factor`. Slowing all of
    them (linear) blurs neighbours. So llama3 and yarn keep the planes that turn often within the original context,
    which tell near positions apart, slow those that turn seldom, and blend in between."""
    rope = settings.rope()
    rope.expect("partial_rotary_factor", 1.0)
    theta = rope.number("rope_theta", settings.number("rope_theta", 10_000.0), low=1.0)
    kind = rope.values.get("rope_type") or rope.values.get("type") or "default"
    if kind not in ("default", "linear", "llama3", "yarn"):
        raise ValueError(f"config.json: rotary positions of kind {kind!r:.40} are not supported")
    if head_dim % 2:
        raise ValueError(f"config.json: heads of {head_dim} channels cannot be rotated in pairs")
    radians_P = 1.0 / theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32, device="cpu") / head_dim)
    if kind == "default":
        return tuple(radians_P.tolist()), 1.0

    factor = rope.number("factor")
    kept_P = torch.zeros_like(radians_P)  # 1 = this plane turns as before, 0 = slower by `factor`
    scale = 1.0
    original = rope.integer("original_max_position_embeddings", settings.values.get("max_position_embeddings"))
    if kind == "llama3":  # meta-llama/llama-models
        low = rope.number("low_freq_factor")
        high = rope.number("high_freq_factor", low=low)
        turns_P = original * radians_P / (2 * math.pi)
        kept_P = ((turns_P - low) / (high - low)).clamp(0, 1)
    elif kind == "yarn":  # arXiv 2309.00071
        rope.expect("mscale", None)
        rope.expect("mscale_all_dim", None)
        # Planes before `first` make more than beta_fast turns in the original context, those after `last` fewer than
        # beta_slow: plane p makes original · theta^(-2p/D) / 2π turns, solved for p.
        plane_per_log = head_dim / (2 * math.log(theta))
        first = plane_per_log * math.log(original / (2 * math.pi * rope.number("beta_fast", 32.0)))
        last = plane_per_log * math.log(original / (2 * math.pi * rope.number("beta_slow", 1.0)))
        if rope.flag("truncate", True):
            first = math.floor(first)
            last = math.ceil(last)
        first = max(first, 0)
        last = min(last, head_dim - 1)
        planes_P = torch.arange(head_dim // 2, dtype=torch.float32, device="cpu")
        kept_P = 1 - ((planes_P - first) / max(last - first, 0.001)).clamp(0, 1)
        # Attention over more positions is flatter: larger queries and keys sharpen it again (section 3.4 there).
        scale = rope.number("attention_factor", 0.1 * math.log(factor) + 1 if factor > 1 else 1.0)
    stretched_P = radians_P * kept_P + radians_P / factor * (1 - kept_P)
    return tuple(stretched_P.tolist()), scale


class Attention(nn.Module):
    """Causal grouped-query attention; norms of queries and keys, biases, windows and sinks as the config has them."""

    def __init__(self, config: LlamaConfig, layer: int) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        self.heads = [config.n_head, config.n_kv_head]
        self.window = config.windows[layer]
        q_channels = config.n_head * config.head_dim
        kv_channels = config.n_kv_head * config.head_dim
        self.q_proj = Linear(config.n_embd, q_channels, bias=config.qkv_bias)
        self.k_proj = Linear(config.n_embd, kv_channels, bias=config.qkv_bias)
        self.v_proj = Linear(config.n_embd, kv_channels, bias=config.qkv_bias)
        self.o_proj = Linear(q_channels, config.n_embd, bias=config.out_bias)
        self.sinks = nn.Parameter(torch.empty(config.n_head)) if config.sinks else None
        self.qk_norm = config.qk_norm
        if config.qk_norm:
            self.q_norm = nn.RMSNorm(config.head_dim, config.eps)
            self.k_norm = nn.RMSNorm(config.head_dim, config.eps)
            self.qkv: Any = Together((self.q_proj,), (self.k_proj,), (self.v_proj,))
        else:
            self.qkv = Together((self.q_proj, self.k_proj), (self.v_proj,))

    def forward(self, x_C: torch.Tensor, cos_1D: torch.Tensor, sin_1D: torch.Tensor, attend: Any) -> torch.Tensor:
        # Queries and keys are one tensor where the model is prepacked and they have no norms, which saves operations.
        *qk, v_KD = [y.unflatten(-1, (-1, self.head_dim)) for y in self.qkv(x_C)]
        if self.qk_norm:
            q_HD, k_KD = qk
            qk = [self.q_norm(q_HD), self.k_norm(k_KD)]
        qk = [rotate(y_HD, cos_1D, sin_1D) for y_HD in qk]
        q_HD, k_KD = qk if len(qk) == 2 else qk[0].split(self.heads, dim=-2)
        y_HD = attend(q_HD, k_KD, v_KD, self.window, self.sinks)
        return self.o_proj(y_HD.flatten(-2))


class MLP(nn.Module):
    """SwiGLU (arXiv 2002.05202): one matrix up, another that gates it, one down."""

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
        self.input_layernorm = nn.RMSNorm(config.n_embd, config.eps)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = nn.RMSNorm(config.n_embd, config.eps)
        self.mlp = mlp

    def forward(self, x_C: torch.Tensor, cos_1D: torch.Tensor, sin_1D: torch.Tensor, attend: Any) -> torch.Tensor:
        x_C = x_C + self.self_attn(self.input_layernorm(x_C), cos_1D, sin_1D, attend)
        return x_C + self.mlp(self.post_attention_layernorm(x_C))


class Llama(OpenModel):
    """The model."""

    config_type: Any = LlamaConfig
    mlp_type: Any = MLP  # what follows attention in a block
    radians_P: torch.Tensor

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.n_embd)
        self.layers = nn.ModuleList(Block(config, layer, self.mlp_type(config)) for layer in range(config.n_layer))
        self.norm = nn.RMSNorm(config.n_embd, config.eps)
        self.lm_head = Linear(config.n_embd, config.vocab_size)
        self.readout = Together((self.lm_head,))
        self.tie_head()
        self.register_buffer("radians_P", torch.tensor(config.rotary, device="cpu"), persistent=False)

    @staticmethod
    def rename(name: str) -> str | None:
        """Return the model's name of a tensor in a file; None = not needed."""
        if name.endswith("rotary_emb.inv_freq"):  # old files hold what config.json says, too
            return None
        return name.removeprefix("model.")

    @property
    def cache_needs(self) -> list[LayerNeed]:
        """Return what each layer keeps of a token in the KV cache."""
        config = self.config
        return [LayerNeed(config.n_kv_head, config.head_dim, window) for window in config.windows]

    def hidden(self, idx: torch.Tensor, context: Any) -> torch.Tensor:
        """Return the normed residual that the head reads, (..., C)."""
        x_C = self.embed_tokens(idx)
        cos_1D, sin_1D = rotation(context.positions, self.radians_P, x_C.dtype, self.config.rotary_scale)
        for layer, block in enumerate(self.layers):
            x_C, cos_1D, sin_1D = bring(block.input_layernorm.weight.device, x_C, cos_1D, sin_1D)
            x_C = block(x_C, cos_1D, sin_1D, context.layer(layer))
        (x_C,) = bring(self.norm.weight.device, x_C)
        return self.norm(x_C)
