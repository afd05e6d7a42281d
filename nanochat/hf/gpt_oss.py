"""gpt-oss (OpenAI 2025, arXiv 2508.10925): a Llama-like decoder with sinks, alternating windows, YaRN, and experts.

The experts' matrices come plain, or in MXFP4, which stays packed in memory and is unpacked one expert at a time.

Shapes: N tokens, K experts per token, R of the tokens, those that one expert is given.
"""

import re
from typing import Any, ClassVar

import torch
import torch.nn as nn
import torch.nn.functional as F
from pydantic import Field, model_validator
from typing_extensions import Self

from nanochat.hf.llama import Llama, LlamaConfig
from nanochat.hf.open_model import Heads, Positive
from nanochat.language_model import Linear

BLOCK = 32  # values of MXFP4 that share a scale
# ...experts.down_proj_bias is a tensor of the module experts.down_proj here; plain matrices have no ending.
EXPERT_TENSOR = re.compile(r"(.*\.experts\.(?:gate_up|down)_proj)(?:_(blocks|scales|bias))?")


def byte_values(device: torch.device) -> torch.Tensor:
    """Return the two values that each byte of MXFP4 holds, the first in its low half: (256, 2) in fp32."""
    magnitudes = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0], device=device)
    values = torch.cat((magnitudes, -magnitudes))  # by four-bit code: the highest bit is the sign
    byte = torch.arange(256, device=device)
    return torch.stack((values[byte & 15], values[byte >> 4]), dim=1)


def dequantize(blocks_NGB: torch.Tensor, scales_NG: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Unpack MXFP4 (OCP Microscaling Formats 1.0): blocks of 32 four-bit floats that share a power of two.

    (..., N, G, 16) u8 blocks and (..., N, G) u8 scales, biased by 127 -> (..., N, 32 G) in `dtype`.
    """
    # One lookup per byte gives two values. The scale is an exponent, so ldexp applies it without rounding.
    values = F.embedding(blocks_NGB.int(), byte_values(blocks_NGB.device)).flatten(-2)
    exponents_NG1 = scales_NG.int().unsqueeze(-1) - 127
    return torch.ldexp(values, exponents_NG1).flatten(-2).to(dtype)


class GptOssConfig(LlamaConfig):
    """config.json of a gpt-oss."""

    default_theta: ClassVar[float] = 150_000.0
    # A head that finds nothing to attend to can give its attention to the sink (arXiv 2309.17453).
    sinks: ClassVar[bool] = True

    attention_bias: bool = True
    mlp_bias: bool = True
    n_expert: Heads = Field(alias="num_local_experts")
    n_expert_per_token: Heads = Field(alias="num_experts_per_tok")
    alpha: Positive = Field(1.702, alias="swiglu_alpha")  # of the gate's sigmoid
    limit: Positive = Field(7.0, alias="swiglu_limit")  # of gate and up projection
    quantization_config: dict[str, Any] | None = None

    @model_validator(mode="after")
    def check_experts(self) -> Self:
        """Raise ValueError for numbers that do not fit together."""
        if self.n_expert_per_token > self.n_expert:
            raise ValueError(f"'num_experts_per_tok' {self.n_expert_per_token} is above {self.n_expert} experts")
        if self.packed and (self.n_embd % BLOCK or self.n_inner % BLOCK):
            raise ValueError(f"MXFP4 needs sizes that {BLOCK} divides")
        return self

    @property
    def packed(self) -> bool:
        """Return whether the experts are in MXFP4, the only quantization that `read_config` lets through."""
        return self.quantization_config is not None

    def slides(self, layer: int) -> bool:
        """Return whether a layer attends to a window: every other one, where `layer_types` does not say it."""
        return layer % 2 == 0 if self.layer_types is None else super().slides(layer)


class ExpertMatrices(nn.Module):
    """One matrix and bias for each of E experts, in MXFP4 or plain; plain ones are stored as (inputs, outputs)."""

    def __init__(self, config: GptOssConfig, n_in: int, n_out: int) -> None:
        super().__init__()
        self.packed = config.packed
        self.bias = nn.Parameter(torch.empty(config.n_expert, n_out))
        if self.packed:
            groups = (config.n_expert, n_out, n_in // BLOCK)
            # Parameters, so that they are loaded, placed and counted as all others; integers have no gradient.
            blocks = torch.empty(*groups, BLOCK // 2, dtype=torch.uint8)
            scales = torch.empty(*groups, dtype=torch.uint8)
            self.blocks = nn.Parameter(blocks, requires_grad=False)
            self.scales = nn.Parameter(scales, requires_grad=False)
        else:
            self.weight = nn.Parameter(torch.empty(config.n_expert, n_in, n_out))

    def forward(self, x_RC: torch.Tensor, expert: int) -> torch.Tensor:
        """Return rows times one expert's matrix; a packed one is unpacked for this product alone."""
        if self.packed:
            matrix = dequantize(self.blocks[expert], self.scales[expert], x_RC.dtype).t()
        else:
            matrix = self.weight[expert]
        return torch.addmm(self.bias[expert], x_RC, matrix)


class Experts(nn.Module):
    """All experts of a layer, each an MLP of its own."""

    def __init__(self, config: GptOssConfig) -> None:
        super().__init__()
        self.alpha = config.alpha
        self.limit = config.limit
        self.gate_up_proj = ExpertMatrices(config, config.n_embd, 2 * config.n_inner)
        self.down_proj = ExpertMatrices(config, config.n_inner, config.n_embd)

    def forward(self, x_NC: torch.Tensor, expert_NK: torch.Tensor, weight_NK: torch.Tensor) -> torch.Tensor:
        """Return the weighted sum of each token's K experts, (N, C)."""
        y_NC = torch.zeros_like(x_NC)
        # Expert by expert: each matrix is unpacked once for all tokens that need it, and no other ever is.
        for expert in expert_NK.unique().tolist():
            token_R, place_R = (expert_NK == expert).nonzero(as_tuple=True)
            gate_up = self.gate_up_proj(x_NC[token_R], expert)
            # A clamped SwiGLU with an offset; gate and up stand in even and odd columns.
            gate = gate_up[:, ::2].clamp(max=self.limit)
            up = gate_up[:, 1::2].clamp(-self.limit, self.limit)
            inner = (up + 1) * gate * torch.sigmoid(self.alpha * gate)
            out_RC = self.down_proj(inner, expert)
            weight_R = weight_NK[token_R, place_R]
            y_NC.index_add_(0, token_R, out_RC * weight_R.unsqueeze(-1))
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
        # Softmax after the choice: the K weights sum to one, whatever the others' logits.
        logits_NK, expert_NK = self.router(x_NC).topk(self.n_expert_per_token, dim=-1)
        weight_NK = logits_NK.float().softmax(-1).to(x_NC.dtype)
        return self.experts(x_NC, expert_NK, weight_NK).view_as(x_C)


class GptOss(Llama):
    """The model."""

    config_type = GptOssConfig
    mlp_type = MoE
    graphs = False  # each layer asks which experts its tokens were sent to, and waits for the answer

    @staticmethod
    def rename(name: str) -> str | None:
        """Return the model's name of a tensor in a file; None = not needed."""
        if match := EXPERT_TENSOR.fullmatch(name):
            name = f"{match[1]}.{match[2] or 'weight'}"
        return Llama.rename(name)
