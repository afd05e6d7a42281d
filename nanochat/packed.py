"""GPT packed for inference: the same function as gpt.py in fewer steps, for decoding is bound by steps and by memory.

Tokens of all rows go through the products together, so a step reads the weights once. Query, key, value and gate are
one product. What follows from a token alone (its normed embedding, how much smear it takes) is looked up, not computed.
On CPU the matrices lie as a library's own product wants them. The residual is fp32.

Shapes: N tokens of any rows, C width, H query heads, K kv heads, D head dim, P = D/2 planes, O outputs, V vocabulary.
"""

import functools
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import nn

from nanochat.gpt import GPT, norm
from nanochat.kv_cache import CacheBatch, LayerNeed

Form = Literal["plain", "onednn", "int8"]


class PackedLinear(nn.Module):
    """x·Wᵀ for rows x_NC, with or without a ReLU after it, in one of several forms.

    plain: PyTorch's product. onednn: oneDNN's, packed for it: the best rate. int8: weights in 8 bits with a scale for
    each output, activations in bf16; ValueError where they cannot be.
    invariant: on CPU a row's result has the same bits whatever rows stand beside it. int8 is so by nature, as is oneDNN
    in bf16, and in fp32 from two rows on; PyTorch where the rows are a multiple of eight.
    """

    packed: torch.Tensor
    scale_O: torch.Tensor

    def __init__(self, weight_OC: torch.Tensor, form: Form, relu: bool = False, invariant: bool = True) -> None:
        super().__init__()
        self.form, self.relu, self.rows = form, relu, 1  # rows: how many the product wants a multiple of
        self.weights, self.bytes, dtype = weight_OC.numel(), weight_OC.nbytes, weight_OC.dtype
        if form == "int8":
            if dtype != torch.bfloat16 or weight_OC.size(1) % 16 or weight_OC.device.type != "cpu":
                raise ValueError("int8 weights need a CPU, NANOCHAT_DTYPE=bfloat16, and a width of whole sixteens")
            self.bytes //= 2
            self.register_buffer("scale_O", (weight_OC.float().abs().amax(dim=1).clamp(min=1e-12) / 127).to(dtype))
            packed = (weight_OC.float() / self.scale_O.float()[:, None]).round().clamp(-127, 127).to(torch.int8)
        elif form == "onednn":
            packed = torch.ops.mkldnn._reorder_linear_weight(weight_OC.contiguous(), 16)
            self.rows = 2 if invariant and dtype == torch.float32 else 1
        else:
            packed = weight_OC.detach()
            self.rows = 8 if invariant and weight_OC.device.type == "cpu" else 1
        self.register_buffer("packed", packed)

    def forward(self, x_NC: torch.Tensor) -> torch.Tensor:
        N = x_NC.size(0)
        if self.rows > 1 and N % self.rows:
            return self._product(F.pad(x_NC, (0, 0, 0, -N % self.rows)))[:N]
        return self._product(x_NC)

    def _product(self, x_NC: torch.Tensor) -> torch.Tensor:
        if self.form == "onednn":
            return (_onednn_relu if self.relu else _onednn)(x_NC, self.packed)
        int8 = self.form == "int8"
        y_NO = torch._weight_int8pack_mm(x_NC, self.packed, self.scale_O) if int8 else F.linear(x_NC, self.packed)
        return y_NO.relu_() if self.relu else y_NO


@torch.jit.script_if_tracing  # the tracer alone cannot write down a list of optional numbers
def _onednn(x_NC: torch.Tensor, packed: torch.Tensor) -> torch.Tensor:
    return torch.ops.mkldnn._linear_pointwise(x_NC, packed, None, "none", [], "")


@torch.jit.script_if_tracing
def _onednn_relu(x_NC: torch.Tensor, packed: torch.Tensor) -> torch.Tensor:
    return torch.ops.mkldnn._linear_pointwise(x_NC, packed, None, "relu", [], "")


@functools.cache
def _works(form: Form, dtype: torch.dtype) -> bool:
    """Whether a form runs here and gives what the plain one gives."""
    w_OC, x_NC = (torch.randn(n, 64, generator=torch.Generator().manual_seed(n)).to(dtype) for n in (96, 3))
    try:
        y_NO = PackedLinear(w_OC, form, relu=True)(x_NC)
    except (RuntimeError, AttributeError):
        return False
    return torch.allclose(y_NO.float(), F.linear(x_NC.float(), w_OC.float()).relu(), atol=0.1, rtol=0.02)


def choose_form(dtype: torch.dtype, device: torch.device) -> Form:
    """The fastest form of a model's products that is exact in its dtype."""
    return "onednn" if device.type == "cpu" and dtype != torch.float16 and _works("onednn", dtype) else "plain"


class _Norm:
    """gpt.py's RMSNorm of fp32 with `n` channels, times `scale`, made of fewer steps than F.rms_norm is on CPU."""

    def __init__(self, n: int, dtype: torch.dtype, device: torch.device, scale: float = 1.0) -> None:
        self.share = 1 / n / scale**2
        self.eps = torch.tensor(torch.finfo(dtype).eps / scale**2, device=device)  # of gpt.py's, in the compute dtype

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        root = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        return x * torch.addcmul(self.eps, root, root, value=self.share).rsqrt_()


def _paired(weight_OC: torch.Tensor, head_dim: int) -> torch.Tensor:
    """Rows of queries or keys with the two coordinates of each rotating plane side by side: halves, in gpt.py."""
    return weight_OC.unflatten(0, (-1, 2, head_dim // 2)).transpose(1, 2).flatten(0, 2)


class _Block(nn.Module):
    """One layer's matrices and tables."""

    def __init__(self, model: GPT, layer: int, form: Form, invariant: bool) -> None:
        super().__init__()
        config, attn, mlp = model.config, model.blocks[layer].attn, model.blocks[layer].mlp
        rows = [matrix.weight.to(model.dtype) for matrix in (attn.q, attn.k, attn.v)]
        rows[:2] = (_paired(weight_OC, config.head_dim) for weight_OC in rows[:2])
        if attn.gate is not None:
            gate_KC = rows[0].new_zeros(-(-config.n_kv_head // 2) * 2, config.n_embd)  # even, for the view as complex
            gate_KC[: config.n_kv_head, : config.value_gate_channels] = attn.gate.weight
            rows.append(gate_KC)
        self.sizes = [len(rows[0]) + len(rows[1]), *map(len, rows[2:])]  # outputs for queries and keys, values, gate
        self.qkvg = PackedLinear(torch.cat(rows), form, False, invariant)
        self.out = PackedLinear(attn.out.weight.to(model.dtype), form, False, invariant)
        self.up = PackedLinear(mlp.up.weight.to(model.dtype), form, True, invariant)
        self.down = PackedLinear(mlp.down.weight.to(model.dtype), form, False, invariant)


class PackedGPT(nn.Module):
    """A GPT's weights as they are now, packed. See the model protocol in engine.py.

    invariant: see PackedLinear and `attention.attend_to_slots`.
    """

    embed_VC: torch.Tensor
    smear_V1: torch.Tensor
    value_VLKD: torch.Tensor | None
    turn_S1P: torch.Tensor
    skips_L11: torch.Tensor
    scales_L: torch.Tensor
    minus_backout: torch.Tensor
    blocks: Any  # of _Block, in an nn.ModuleList

    @torch.inference_mode()
    def __init__(self, model: GPT, invariant: bool = True, int8: bool = False) -> None:
        super().__init__()
        config, dtype = model.config, model.dtype
        self.config, self.device, self.dtype = config, model.device, dtype
        self.cache_needs = [LayerNeed(config.n_kv_head, config.head_dim, window) for window in config.windows]
        embed_VC = norm(model.embed.weight[: config.vocab_size].to(dtype))
        # the last row is what stands before the first token: nothing
        self.register_buffer("embed_VC", F.pad(embed_VC, (0, 0, 0, 1)))
        if config.smear_channels:
            gate_V1 = torch.sigmoid(model.smear_gate(embed_VC[:, : config.smear_channels]))
            self.register_buffer("smear_V1", (model.smear_scale * gate_V1).float())
        tables = [table[: config.vocab_size].to(dtype) for table in model.value_embeds.parameters()]
        shape = -1, len(tables), config.n_kv_head, config.head_dim
        self.register_buffer("value_VLKD", 3 * torch.stack(tables, dim=1).view(shape) if tables else None)
        cos_1S1P, sin_1S1P = model._rotation(torch.arange(config.sequence_len, device=model.device)[None])
        self.register_buffer("turn_S1P", torch.complex(cos_1S1P.float(), sin_1S1P.float())[0])
        form = "int8" if int8 else choose_form(dtype, model.device)
        self.blocks = nn.ModuleList(_Block(model, layer, form, invariant) for layer in range(config.n_layer))
        self.register_buffer("skips_L11", model.embed_skip.detach().float()[:, None, None])
        self.register_buffer("scales_L", model.resid_scale.detach().float())
        self.register_buffer("minus_backout", -model.backout.detach().float() if config.backout else None)
        self.head = PackedLinear(model.head.weight[: config.vocab_size].to(dtype), form, False, invariant)
        self.products = [each for b in self.blocks for each in (b.qkvg, b.out, b.up, b.down)] + [self.head]
        self.norm = _Norm(config.n_embd, dtype, model.device)
        # half of attention's scale goes to the queries, and half to the keys
        self.norm_heads = _Norm(config.head_dim, dtype, model.device, config.qk_scale / config.head_dim**0.25)

    def forward(
        self,
        idx_N: torch.Tensor,
        previous_N: torch.Tensor,
        positions_N: torch.Tensor,
        cache: CacheBatch,
        wanted_R: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Logits in fp32 after each token, (N, V), or after the `wanted` ones of them, (R, V).

        previous_N: the token before each, -1 before the first. positions_N: where they stand in their rows.
        """
        config, values = self.config, []
        x_NC = self.embed_VC.index_select(0, idx_N).float()
        if config.smear_channels:
            x_NC = torch.addcmul(x_NC, self.smear_V1.index_select(0, idx_N), self.embed_VC[previous_N])
        if self.value_VLKD is not None:
            values = list(self.value_VLKD.index_select(0, idx_N).unbind(1))
        turn_N1P, skipped_LNC = self.turn_S1P.index_select(0, positions_N), self.skips_L11 * x_NC
        for layer, block in enumerate(self.blocks):
            x_NC = torch.addcmul(skipped_LNC[layer], x_NC, self.scales_L[layer])
            q_NHD, k_NKD, v_NKD = self._project(block, x_NC, turn_N1P, values)
            x_NC += block.out(cache.attend(layer, q_NHD, k_NKD, v_NKD))
            hidden_NH = block.up(self.norm(x_NC).to(self.dtype))
            x_NC += block.down(hidden_NH * hidden_NH)
            if layer == config.n_layer // 2:
                middle_NC = x_NC
        if config.backout:
            x_NC = torch.addcmul(x_NC, middle_NC, self.minus_backout)
        if wanted_R is not None:
            x_NC = x_NC[wanted_R]
        logits_NV = self.head(self.norm(x_NC).to(self.dtype)).float()
        if cap := config.softcap:  # cap·tanh(z/cap), which takes twice as long
            return cap - 2 * cap / logits_NV.mul_(2 / cap).exp_().add_(1)
        return logits_NV

    def _project(
        self, block: _Block, x_NC: torch.Tensor, turn_N1P: torch.Tensor, values: list[torch.Tensor]
    ) -> tuple[torch.Tensor, ...]:
        """Queries, keys (both rotated and normed, with attention's scale) and values, in the compute dtype. `values`:
        what the layers to come add to theirs; this layer's is taken off.

        Rotation is a product of complex numbers, of which each pair of channels is one.
        """
        H, K, D = self.config.n_head, self.config.n_kv_head, self.config.head_dim
        qk, v, *gate = block.qkvg(self.norm(x_NC).to(self.dtype)).split(block.sizes, dim=1)
        qk_NHP = torch.view_as_complex(qk.float().view(-1, H + K, D // 2, 2)) * turn_N1P
        q_NHD, k_NKD = self.norm_heads(torch.view_as_real(qk_NHP).flatten(2)).to(self.dtype).split((H, K), dim=1)
        v_NKD = v.view(-1, K, D)
        if gate:
            v_NKD = torch.addcmul(v_NKD, gate[0].sigmoid()[:, :K, None], values.pop(0))
        return q_NHD, k_NKD, v_NKD
