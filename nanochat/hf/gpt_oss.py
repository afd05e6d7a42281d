"""gpt-oss (OpenAI 2025, arXiv 2508.10925): a Llama-like decoder with sinks, alternating windows, YaRN, and experts.

The experts' matrices come plain, or in MXFP4, which stays packed in memory and is unpacked at each use.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn as nn

import nanochat.hf.mxfp4 as mxfp4
from nanochat.hf.layers import Settings
from nanochat.hf.llama import Llama, LlamaConfig, shape

_FEW_PAIRS = 128  # of a token and an expert: as many as the kernel for packed matrices takes at once


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
        if config.packed and (config.n_embd % mxfp4.BLOCK or config.n_inner % mxfp4.BLOCK):
            raise ValueError(f"config.json: MXFP4 needs sizes that {mxfp4.BLOCK} divides")
        return config


class Experts(nn.Module):
    """All experts of a layer: E gate-and-up matrices C -> 2I, E down matrices I -> C, each with a bias."""

    def __init__(self, config: GptOssConfig) -> None:
        super().__init__()
        self.config = config
        E, C, inner = config.n_expert, config.n_embd, config.n_inner
        for name, n_in, n_out in (("gate_up_proj", C, 2 * inner), ("down_proj", inner, C)):
            if config.packed:
                groups = (E, n_out, n_in // mxfp4.BLOCK)
                self.register_buffer(f"{name}_blocks", torch.empty(*groups, mxfp4.BLOCK // 2, dtype=torch.uint8))
                self.register_buffer(f"{name}_scales", torch.empty(groups, dtype=torch.uint8))
            else:
                self.register_parameter(name, nn.Parameter(torch.empty(E, n_in, n_out)))
            self.register_parameter(f"{name}_bias", nn.Parameter(torch.empty(E, n_out)))

    def _one(self, name: str, x_RC: torch.Tensor, expert: int) -> torch.Tensor:
        """Rows times one expert's matrix, which is unpacked for it."""
        bias = getattr(self, f"{name}_bias")[expert]
        if not self.config.packed:
            return torch.addmm(bias, x_RC, getattr(self, name)[expert])
        blocks, scales = (getattr(self, f"{name}_{part}")[expert] for part in ("blocks", "scales"))
        return torch.addmm(bias, x_RC, mxfp4.dequantize(blocks, scales, x_RC.dtype).t())

    def _pairs(self, name: str, x_PC: torch.Tensor, expert_P: torch.Tensor) -> torch.Tensor:
        """Each row times the packed matrix of its own expert."""
        blocks, scales, bias = (getattr(self, f"{name}_{part}") for part in ("blocks", "scales", "bias"))
        return mxfp4.matvec(x_PC, blocks, scales, expert_P) + bias[expert_P]

    def _activate(self, both: torch.Tensor) -> torch.Tensor:
        """The clamped SwiGLU with an offset; gate and up stand in even and odd columns."""
        gate, up = both[..., ::2].clamp(max=self.config.limit), both[..., 1::2]
        up = up.clamp(-self.config.limit, self.config.limit)
        return (up + 1) * gate * torch.sigmoid(self.config.alpha * gate)

    def forward(self, x_NC: torch.Tensor, expert_NK: torch.Tensor, weight_NK: torch.Tensor) -> torch.Tensor:
        """The weighted sum of each token's K experts, (N, C)."""
        N, K = expert_NK.shape
        kernel = self.config.packed and mxfp4.kernel_works(x_NC.device, x_NC.dtype)
        if kernel and (N * K <= _FEW_PAIRS or torch.cuda.is_current_stream_capturing()):
            inner = self._activate(self._pairs("gate_up_proj", x_NC.repeat_interleave(K, 0), expert_NK.flatten()))
            out_NKC = self._pairs("down_proj", inner, expert_NK.flatten()).view(N, K, -1)
            return (out_NKC * weight_NK[..., None]).sum(1)
        y_NC = torch.zeros_like(x_NC)
        for expert in expert_NK.unique().tolist():
            token_R, place_R = (expert_NK == expert).nonzero(as_tuple=True)
            inner = self._activate(self._one("gate_up_proj", x_NC[token_R], expert))
            out_RC = self._one("down_proj", inner, expert) * weight_NK[token_R, place_R, None]
            y_NC.index_add_(0, token_R, out_RC)
        return y_NC


class MoE(nn.Module):
    """A router that sends each token to its top K experts, weighted by the softmax over those K."""

    def __init__(self, config: GptOssConfig) -> None:
        super().__init__()
        self.n_expert_per_token = config.n_expert_per_token
        self.router = nn.Linear(config.n_embd, config.n_expert)
        self.experts = Experts(config)

    def forward(self, x_BTC: torch.Tensor) -> torch.Tensor:
        x_NC = x_BTC.flatten(0, 1)
        logits_NK, expert_NK = self.router(x_NC).topk(self.n_expert_per_token, dim=-1)
        weight_NK = logits_NK.float().softmax(-1).to(x_NC.dtype)
        return self.experts(x_NC, expert_NK, weight_NK).view_as(x_BTC)


class GptOss(Llama):
    """The model, without values until `hf_load` fills it."""

    config_type, mlp = GptOssConfig, MoE

    @property
    def graphs(self) -> bool:
        """As in `OpenModel`; without the kernel for packed experts the CPU asks which experts there are."""
        head = self.head_weight
        return super().graphs and self.config.packed and mxfp4.kernel_works(head.device, head.dtype)
