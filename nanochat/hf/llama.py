"""Llama 2 and 3, SmolLM, Mistral, Qwen2 and Qwen3: one decoder with RMSNorm, SwiGLU, grouped queries, rotary positions.

The families differ in few things, each of which is a field of `LlamaConfig`: biases, norms of queries and keys,
windows, and how far rotary positions are stretched. gpt_oss.py adds sinks and experts.

Shapes as in open_model.py, and P = D/2 planes of rotation. The parts of the model take any leading dimensions: x_C is
(..., C), q_HD is (..., H, D), and cos_1D broadcasts over the heads.
"""

import math
from typing import Any, ClassVar, Literal

import torch
import torch.nn as nn
import torch.nn.functional as F
from pydantic import Field, model_validator
from typing_extensions import Self

from nanochat.hf.open_model import Count, Heads, Layers, OpenConfig, OpenModel, Positive, bring
from nanochat.language_model import Linear, Together, rotate, rotation


class Rope(OpenConfig):
    """`rope_parameters` of config.json: how fast each of the P = D/2 planes of rotary positions turns.

    A model that was trained on short texts reads longer ones when its planes turn slower, by `factor`. Slowing all of
    them (linear) blurs neighbours. So llama3 and yarn keep the planes that turn often within the original context,
    which tell near positions apart, slow those that turn seldom, and blend in between.
    """

    kind: Literal["default", "linear", "llama3", "yarn"] = Field(alias="rope_type")
    # Plane p turns by theta^(-2p/D) radians per position: the first by a whole radian, the last hardly at all.
    theta: float = Field(alias="rope_theta", gt=1, lt=1e30)
    partial_rotary_factor: float = Field(1.0, ge=1, le=1)  # refused unless 1: else some channels would not be rotated
    factor: Positive | None = None
    # The context of the model's training, before it was stretched.
    original: Count = Field(alias="original_max_position_embeddings")
    # llama3: a plane that makes fewer turns than `low` within the original context is slowed, one that makes more than
    # `high` is kept.
    low_freq_factor: Positive = 1.0
    high_freq_factor: Positive = 1.0
    # yarn: the same by other names, and in the other order.
    beta_fast: Positive = 32.0
    beta_slow: Positive = 1.0
    truncate: bool = True  # round the planes between which it blends
    attention_factor: Positive | None = None
    # These two are refused unless they are absent: they would change `scale`, and no family here has them.
    mscale: None = None
    mscale_all_dim: None = None

    @model_validator(mode="after")
    def check(self) -> Self:
        """Raise ValueError for numbers that are missing or do not fit together."""
        if self.kind != "default" and self.factor is None:
            raise ValueError(f"{self.kind} lacks 'factor'")
        if self.kind == "llama3" and self.high_freq_factor <= self.low_freq_factor:
            raise ValueError("'high_freq_factor' must be above 'low_freq_factor'")
        return self

    def radians_P(self, head_dim: int) -> torch.Tensor:
        """Return radians per position of each plane, in fp32."""
        plain_P = 1.0 / self.theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32, device="cpu") / head_dim)
        if self.factor is None or self.kind == "default":
            return plain_P
        slowed_P = torch.ones_like(plain_P)  # 1 = this plane is slowed by `factor`, 0 = it is kept
        if self.kind == "llama3":  # meta-llama/llama-models
            turns_P = self.original * plain_P / (2 * math.pi)
            slowed_P = (self.high_freq_factor - turns_P) / (self.high_freq_factor - self.low_freq_factor)
        elif self.kind == "yarn":  # arXiv 2309.00071: blends by the number of the plane
            first = self.plane_that_turns(self.beta_fast, head_dim)
            last = self.plane_that_turns(self.beta_slow, head_dim)
            if self.truncate:
                first = math.floor(first)
                last = math.ceil(last)
            first = max(first, 0)
            # The authors' code has D - 1 here and not P - 1, the number of the last plane. Models are trained with it,
            # so it stays, although the blend may then end beyond the last plane.
            last = min(last, head_dim - 1)
            slowed_P = (torch.arange(len(plain_P), device="cpu") - first) / max(last - first, 0.001)
        slowed_P = slowed_P.clamp(0, 1)
        return plain_P * (1 - slowed_P) + plain_P / self.factor * slowed_P

    def plane_that_turns(self, turns: float, head_dim: int) -> float:
        """Return the place in 0..P of the plane that makes so many turns within the original context.

        Plane p makes original · theta^(-2p/D) / 2π turns; this is that, solved for p.
        """
        return head_dim * math.log(self.original / (2 * math.pi * turns)) / (2 * math.log(self.theta))

    @property
    def scale(self) -> float:
        """Return the factor on cos and sin: attention over more positions is flatter, and yarn sharpens it."""
        if self.kind != "yarn" or self.factor is None:
            return 1.0
        return self.attention_factor or 0.1 * math.log(max(self.factor, 1.0)) + 1


class LlamaConfig(OpenConfig):
    """config.json of a Llama-like model."""

    # What differs in gpt_oss.py. A sink is one more logit per head, which takes its share of the softmax.
    default_theta: ClassVar[float] = 10_000.0
    sinks: ClassVar[bool] = False

    family: str = Field(alias="model_type")
    vocab_size: Count
    sequence_len: Count = Field(alias="max_position_embeddings")
    n_layer: Layers = Field(alias="num_hidden_layers")
    n_head: Heads = Field(alias="num_attention_heads")
    n_kv_head: Heads = Field(0, alias="num_key_value_heads")  # absent: one for each head
    head_dim: Heads = 0  # absent: the width divided among the heads
    n_embd: Count = Field(alias="hidden_size")
    n_inner: Count = Field(alias="intermediate_size")
    eps: Positive = Field(1e-6, alias="rms_norm_eps")
    tied: bool = Field(False, alias="tie_word_embeddings")
    attention_bias: bool = False  # qwen2 has biases for queries, keys and values whatever this says
    mlp_bias: bool = False
    hidden_act: Literal["silu"] = "silu"
    # Which layers attend to the last `sliding_window` positions alone: see `slides`.
    layer_types: list[Literal["full_attention", "sliding_attention"]] | None = None
    sliding_window: Count | None = None
    use_sliding_window: bool = False
    max_window_layers: int = Field(28, ge=0)
    rope: Rope = Field(alias="rope_parameters")

    @model_validator(mode="before")
    @classmethod
    def bring_rope_up_to_date(cls, values: Any) -> Any:
        """Let `rope_parameters` hold everything about rotary positions, which older files spread over three places."""
        rope = values.get("rope_parameters") or values.get("rope_scaling") or {}
        if isinstance(rope, dict):
            defaults = {
                "rope_type": rope.get("type", "default"),
                "rope_theta": values.get("rope_theta", cls.default_theta),
                "original_max_position_embeddings": values.get("max_position_embeddings"),
            }
            rope = {**defaults, **rope}
        return {**values, "rope_parameters": rope}

    @model_validator(mode="after")
    def complete(self) -> Self:
        """Fill in what is absent. Raises ValueError for numbers that do not fit together."""
        self.n_kv_head = self.n_kv_head or self.n_head
        if self.n_head % self.n_kv_head:
            raise ValueError(f"{self.n_head} attention heads cannot share {self.n_kv_head} key-value heads evenly")
        if not self.head_dim and self.n_embd % self.n_head:
            raise ValueError(f"'hidden_size' {self.n_embd} is not divisible by {self.n_head} attention heads")
        self.head_dim = self.head_dim or self.n_embd // self.n_head
        if self.head_dim % 2:
            raise ValueError(f"heads of {self.head_dim} channels cannot be rotated in pairs")
        if self.layer_types is not None and len(self.layer_types) != self.n_layer:
            raise ValueError(f"'layer_types' must name the kind of each of the {self.n_layer} layers")
        if self.sliding_window is None and any(self.slides(layer) for layer in range(self.n_layer)):
            raise ValueError("some layers attend to a window, but 'sliding_window' is missing")
        return self

    def slides(self, layer: int) -> bool:
        """Return whether a layer attends to a window; older files do not list this, and each family has its rule."""
        if self.layer_types is not None:
            return self.layer_types[layer] == "sliding_attention"
        if self.family == "mistral":
            return self.sliding_window is not None
        return self.use_sliding_window and layer >= self.max_window_layers

    @property
    def windows(self) -> list[int]:
        """Positions each layer attends to, its own included."""
        short = min(self.sliding_window or self.sequence_len, self.sequence_len)
        return [short if self.slides(layer) else self.sequence_len for layer in range(self.n_layer)]


class Attention(nn.Module):
    """Causal grouped-query attention; norms of queries and keys, biases, windows and sinks as the config has them."""

    def __init__(self, config: LlamaConfig, layer: int) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        self.heads = [config.n_head, config.n_kv_head]
        self.window = config.windows[layer]
        q_channels = config.n_head * config.head_dim
        kv_channels = config.n_kv_head * config.head_dim
        qkv_bias = config.attention_bias or config.family == "qwen2"
        self.q_proj = Linear(config.n_embd, q_channels, bias=qkv_bias)
        self.k_proj = Linear(config.n_embd, kv_channels, bias=qkv_bias)
        self.v_proj = Linear(config.n_embd, kv_channels, bias=qkv_bias)
        self.o_proj = Linear(q_channels, config.n_embd, bias=config.attention_bias)
        self.sinks = nn.Parameter(torch.empty(config.n_head)) if config.sinks else None
        self.qk_norm = config.family == "qwen3"
        if self.qk_norm:
            self.q_norm = nn.RMSNorm(config.head_dim, config.eps)
            self.k_norm = nn.RMSNorm(config.head_dim, config.eps)
            # Each has a norm of its own, so they are never one tensor.
            self.qkv: Any = Together((self.q_proj,), (self.k_proj,), (self.v_proj,))
        else:
            self.qkv = Together((self.q_proj, self.k_proj), (self.v_proj,))

    def forward(self, x_C: torch.Tensor, cos_1D: torch.Tensor, sin_1D: torch.Tensor, attend: Any) -> torch.Tensor:
        # `qkv` returns queries and keys apart, or side by side once the model is prepacked (packed.py). Then one
        # rotation does for both, which pays: decoding on CPU is bound by the number of operations.
        *qk, v_KD = [y.unflatten(-1, (-1, self.head_dim)) for y in self.qkv(x_C)]
        if self.qk_norm:
            qk = [self.q_norm(qk[0]), self.k_norm(qk[1])]
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
        # Not persistent: the files do not hold it. On the CPU even where parameters have no values yet
        # (`load.skeleton`).
        self.register_buffer("radians_P", config.rope.radians_P(config.head_dim), persistent=False)

    @staticmethod
    def rename(name: str) -> str | None:
        """Return the model's name of a tensor in a file; None = not needed."""
        if name.endswith("rotary_emb.inv_freq"):  # old files hold what config.json says, too
            return None
        return name.removeprefix("model.")

    def hidden(self, idx: torch.Tensor, context: Any) -> torch.Tensor:
        """Return the normed residual that the head reads, (..., C)."""
        x_C = self.embed_tokens(idx)
        # All layers rotate by the same angles, so these are computed once.
        cos_1D, sin_1D = rotation(context.positions, self.radians_P, x_C.dtype, self.config.rope.scale)
        for layer, block in enumerate(self.layers):
            # A layer may lie on another device than the one before (hf/parallel.py).
            x_C, cos_1D, sin_1D = bring(block.input_layernorm.weight.device, x_C, cos_1D, sin_1D)
            x_C = block(x_C, cos_1D, sin_1D, context.layer(layer))
        (x_C,) = bring(self.norm.weight.device, x_C)
        return self.norm(x_C)
