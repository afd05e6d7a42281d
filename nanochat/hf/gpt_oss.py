"""gpt-oss (OpenAI 2025, arXiv 2508.10925): a Llama-like decoder with sinks, alternating windows, YaRN, and experts.

The experts' matrices come plain, or in MXFP4, which stays packed in memory and is unpacked one expert at a time.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F

from nanochat.hf.layers import Settings
from nanochat.hf.llama import Llama, LlamaConfig, shape
from nanochat.language_model import Linear

BLOCK = 32  # values of MXFP4 that share a scale


def byte_values() -> torch.Tensor:
    """Return the two values that each byte of MXFP4 holds, the first in its low half: (256, 2) in fp32."""
    magnitudes = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0], device="cpu")
    values = torch.cat((magnitudes, -magnitudes))  # by four-bit code: the highest bit is the sign
    byte = torch.arange(256, device="cpu")
    return torch.stack((values[byte & 15], values[byte >> 4]), dim=1)


def dequantize(
    blocks_NGB: torch.Tensor, scales_NG: torch.Tensor, values: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """Unpack MXFP4 (OCP Microscaling Formats 1.0): blocks of 32 four-bit floats that share a power of two.

    (..., N, G, 16) u8 blocks and (..., N, G) u8 scales, biased by 127 -> (..., N, 32 G) in `dtype`; `values`: what
    `byte_values` returns.
    """
    plain = F.embedding(blocks_NGB.int(), values).flatten(-2)
    return torch.ldexp(plain, scales_NG.int()[..., None] - 127).flatten(-2).to(dtype)


@dataclass(frozen=True)
class GptOssConfig(LlamaConfig):
    """config.json of a gpt-oss, checked."""

    n_expert: int
    n_expert_per_token: int
    packed: bool  # experts in MXFP4
    alpha: float  # of the gate's sigmoid
    limit: float  # of gate and up projection

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "GptOssConfig":
        """Raises ValueError that names what is missing, wrong or not supported."""
        settings = Settings(values)
        biased, experts = settings.flag("attention_bias", True), settings.integer("num_local_experts", high=1 << 16)
        config = cls(
            **shape(settings, 150_000.0, lambda layer: layer % 2 == 0),
            qkv_bias=biased,
            out_bias=biased,
            mlp_bias=True,
            qk_norm=False,
            sinks=True,
            n_expert=experts,
            n_expert_per_token=settings.integer("num_experts_per_tok", high=experts),
            packed="quantization_config" in settings.values,
            alpha=settings.number("swiglu_alpha", 1.702),
            limit=settings.number("swiglu_limit", 7.0),
        )
        if config.packed and (config.n_embd % BLOCK or config.n_inner % BLOCK):
            raise ValueError(f"config.json: MXFP4 needs sizes that {BLOCK} divides")
        return config


class Experts(nn.Module):
    """All experts of a layer: E gate-and-up matrices C -> 2I, E down matrices I -> C, each with a bias."""

    def __init__(self, config: GptOssConfig) -> None:
        super().__init__()
        self.config = config
        E, C, inner = config.n_expert, config.n_embd, config.n_inner
        for name, n_in, n_out in (("gate_up_proj", C, 2 * inner), ("down_proj", inner, C)):
            if config.packed:
                groups = (E, n_out, n_in // BLOCK)
                self.register_buffer(f"{name}_blocks", torch.empty(*groups, BLOCK // 2, dtype=torch.uint8))
                self.register_buffer(f"{name}_scales", torch.empty(groups, dtype=torch.uint8))
            else:
                self.register_parameter(name, nn.Parameter(torch.empty(E, n_in, n_out)))
            self.register_parameter(f"{name}_bias", nn.Parameter(torch.empty(E, n_out)))
        if config.packed:
            self.register_buffer("byte_values", byte_values(), persistent=False)

    def _product(self, name: str, x_RC: torch.Tensor, expert: int) -> torch.Tensor:
        """Return rows times one expert's matrix, which is unpacked for this product alone."""
        bias = self.get_parameter(f"{name}_bias")[expert]
        if not self.config.packed:
            return torch.addmm(bias, x_RC, self.get_parameter(name)[expert])
        blocks = self.get_buffer(f"{name}_blocks")[expert]
        scales = self.get_buffer(f"{name}_scales")[expert]
        return torch.addmm(bias, x_RC, dequantize(blocks, scales, self.get_buffer("byte_values"), x_RC.dtype).t())

    def _activate(self, both: torch.Tensor) -> torch.Tensor:
        """The clamped SwiGLU with an offset; gate and up stand in even and odd columns."""
        gate = both[..., ::2].clamp(max=self.config.limit)
        up = both[..., 1::2].clamp(-self.config.limit, self.config.limit)
        return (up + 1) * gate * torch.sigmoid(self.config.alpha * gate)

    def forward(self, x_NC: torch.Tensor, expert_NK: torch.Tensor, weight_NK: torch.Tensor) -> torch.Tensor:
        """Return the weighted sum of each token's K experts, (N, C)."""
        y_NC = torch.zeros_like(x_NC)
        for expert in expert_NK.unique().tolist():
            token_R, place_R = (expert_NK == expert).nonzero(as_tuple=True)
            inner_RI = self._activate(self._product("gate_up_proj", x_NC[token_R], expert))
            out_RC = self._product("down_proj", inner_RI, expert)
            y_NC.index_add_(0, token_R, out_RC * weight_NK[token_R, place_R, None])
        return y_NC


class MoE(nn.Module):
    """A router that sends each token to its top K experts, weighted by the softmax over those K."""

    def __init__(self, config: GptOssConfig) -> None:
        super().__init__()
        self.n_expert_per_token = config.n_expert_per_token
        self.router = Linear(config.n_embd, config.n_expert, bias=True)
        self.experts = Experts(config)

    def forward(self, x_C: torch.Tensor) -> torch.Tensor:
        x_NC = x_C.flatten(0, -2)
        logits_NK, expert_NK = self.router(x_NC).topk(self.n_expert_per_token, dim=-1)
        weight_NK = logits_NK.float().softmax(-1).to(x_NC.dtype)
        return self.experts(x_NC, expert_NK, weight_NK).view_as(x_C)


class GptOss(Llama):
    """The model, without values until `hf/load.py` fills it."""

    config_type = GptOssConfig
    mlp = MoE
    graphs = False  # each layer asks which experts its tokens were sent to, and waits for the answer
