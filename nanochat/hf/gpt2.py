"""GPT-2 (Radford et al. 2019): LayerNorm, learned positions, tanh-GELU, biases everywhere, a tied head."""

import re
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F

from nanochat.hf.layers import OpenModel, Settings, TiedHead, bring
from nanochat.language_model import LayerNeed, Linear, Together

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


class Conv1D(Linear):
    """A matrix with bias, stored (in, out)."""

    def __init__(self, n_in: int, n_out: int) -> None:
        super().__init__(n_in, n_out, bias=True)
        self.weight = nn.Parameter(torch.empty(n_in, n_out))

    @property
    def matrix_OC(self) -> torch.Tensor:
        """The matrix as (outputs, inputs)."""
        return self.weight.t()

    def forward(self, x_C: torch.Tensor) -> torch.Tensor:
        return F.linear(x_C, self.weight.t(), self.bias)


class Attention(nn.Module):
    """Queries, keys and values from one matrix; every head has its own keys."""

    def __init__(self, config: GPT2Config) -> None:
        super().__init__()
        self.n_head = config.n_head
        self.window = config.sequence_len
        self.c_attn = Conv1D(config.n_embd, 3 * config.n_embd)
        self.c_proj = Conv1D(config.n_embd, config.n_embd)

    def forward(self, x_C: torch.Tensor, attend: Any) -> torch.Tensor:
        q_HD, k_HD, v_HD = self.c_attn(x_C).unflatten(-1, (3, self.n_head, -1)).unbind(-3)
        return self.c_proj(attend(q_HD, k_HD, v_HD, self.window).flatten(-2))


class Block(nn.Module):
    """Attention, then two matrices around a GELU in its tanh form, each on the normed residual."""

    def __init__(self, config: GPT2Config) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, config.eps)
        self.ln_2 = nn.LayerNorm(config.n_embd, config.eps)
        self.attn = Attention(config)
        self.mlp = nn.ModuleDict(
            {"c_fc": Conv1D(config.n_embd, config.n_inner), "c_proj": Conv1D(config.n_inner, config.n_embd)}
        )

    def forward(self, x_C: torch.Tensor, attend: Any) -> torch.Tensor:
        x_C = x_C + self.attn(self.ln_1(x_C), attend)
        inner_I = F.gelu(self.mlp["c_fc"](self.ln_2(x_C)), approximate="tanh")
        return x_C + self.mlp["c_proj"](inner_I)


class GPT2(OpenModel):
    """The model, without values until `hf/load.py` fills it."""

    config_type = GPT2Config

    def __init__(self, config: GPT2Config) -> None:
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.sequence_len, config.n_embd)
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd, config.eps)
        self.stack = [self.wte, self.wpe], self.h, self.ln_f
        self.lm_head = None if config.tied else Linear(config.n_embd, config.vocab_size)
        self.readout = Together((self.lm_head or TiedHead(self.wte),))

    @staticmethod
    def rename(name: str) -> str | None:
        """Return the model's name of a tensor in a file; None = not needed."""
        name = name.removeprefix("transformer.")
        return None if _MASKS.fullmatch(name) else name

    @property
    def cache_needs(self) -> list[LayerNeed]:
        """What each layer keeps of a token in the KV cache."""
        config = self.config
        return [LayerNeed(config.n_head, config.n_embd // config.n_head, config.sequence_len)] * config.n_layer

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
        x_C = self.wte(idx) + self.wpe(context.positions)
        for layer, block in enumerate(self.h):
            (x_C,) = bring(block.ln_1, x_C)
            x_C = block(x_C, context.layer(layer))
        x_C = self.ln_f(*bring(self.ln_f, x_C))
        return self.predict(x_C, targets, loss_reduction, wanted_R)
