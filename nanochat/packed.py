"""GPT packed for inference: the same function as gpt.py in fewer steps, for decoding is bound by steps and by memory.

Tokens of all rows go through the products together, so a step reads the weights once. Query, key, value and gate are
one product. What follows from a token alone (its normed embedding, how much smear it takes) is looked up, not computed.
On CPU the matrices lie as a library's own product wants them. The residual is fp32.

Shapes: N tokens of any rows, C width, H query heads, K kv heads, D head dim, P = D/2 planes, O outputs, V vocabulary.
"""

import functools
import warnings
from typing import Literal

import torch
import torch.nn.functional as F

from nanochat.gpt import GPT, norm
from nanochat.kv_cache import CacheBatch, LayerNeed

NARROW = 384  # up to this width a product's fixed cost counts for more than its rate (dev/LOG.md)
Form = Literal["plain", "onednn", "fp16", "int8"]


class PackedLinear:
    """x·Wᵀ for rows x_NC, with or without a ReLU after it, in one of several forms.

    plain: PyTorch's product. onednn: oneDNN's, packed for it: the best rate. fp16: FBGEMM's, of weights in fp16 (which
    hold what bf16 does, but for values below 6e-5) and activations in fp32: half of oneDNN's rate, but twice as fast
    at a single row. int8: weights in 8 bits with a scale for each output, activations in bf16.
    invariant: on CPU a row's result has the same bits whatever rows stand beside it. The last two are so by nature, as
    is oneDNN in bf16, and in fp32 from two rows on; PyTorch where the rows are a multiple of eight.
    """

    def __init__(
        self, weight_OC: torch.Tensor, form: Form = "plain", relu: bool = False, invariant: bool = True
    ) -> None:
        self.inputs, self.relu, self.rows = weight_OC.dtype, relu, 1  # rows: how many the product wants a multiple of
        self.weights, self.bytes = weight_OC.numel(), weight_OC.nbytes
        if form == "int8":
            if self.inputs != torch.bfloat16 or weight_OC.size(1) % 16 or weight_OC.device.type != "cpu":
                raise ValueError("int8 weights need a CPU, NANOCHAT_DTYPE=bfloat16, and a width of whole sixteens")
            self.bytes //= 2
            scale_O = (weight_OC.float().abs().amax(dim=1).clamp(min=1e-12) / 127).to(self.inputs)
            weight = (weight_OC.float() / scale_O.float()[:, None]).round().clamp(-127, 127).to(torch.int8)
            self.product = lambda x_NC: torch._weight_int8pack_mm(x_NC, weight, scale_O)
        elif form == "fp16":
            self.inputs, packed = torch.float32, torch.ops.quantized.linear_prepack_fp16(weight_OC.float(), None)
            ops, self.relu = torch.ops.quantized, False
            product = (ops.linear_relu_dynamic_fp16 if relu else ops.linear_dynamic_fp16).op  # without Python's checks
            self.product = lambda x_NC: product(x_NC, packed)
        elif form == "onednn":
            packed, self.relu = torch.ops.mkldnn._reorder_linear_weight(weight_OC.contiguous(), 16), False
            settings: tuple[object, ...] = packed, None, "relu" if relu else "none", [], ""
            self.product = lambda x_NC: torch.ops.mkldnn._linear_pointwise(x_NC, *settings)
            self.rows = 2 if invariant and self.inputs == torch.float32 else 1
        else:
            self.product = lambda x_NC: F.linear(x_NC, weight_OC)
            self.rows = 8 if invariant and weight_OC.device.type == "cpu" else 1

    def __call__(self, x_NC: torch.Tensor) -> torch.Tensor:
        N = x_NC.size(0)
        if padding := -N % self.rows:
            x_NC = F.pad(x_NC, (0, 0, 0, padding))
        y_NO = self.product(x_NC)
        y_NO = y_NO.relu_() if self.relu else y_NO
        return y_NO[:N] if padding else y_NO


@functools.cache
def _works(form: Form, dtype: torch.dtype) -> bool:
    """Whether a form runs here and gives what the plain one gives."""
    w_OC, x_NC = (torch.randn(n, 64, generator=torch.Generator().manual_seed(n)).to(dtype) for n in (96, 3))
    try:
        with warnings.catch_warnings(action="ignore"):
            packed = PackedLinear(w_OC, form, relu=True)
            y_NO = packed(x_NC.to(packed.inputs))
    except (RuntimeError, AttributeError):
        return False
    return torch.allclose(y_NO.float(), F.linear(x_NC.float(), w_OC.float()).relu(), atol=0.1, rtol=0.02)


def choose_form(width: int, dtype: torch.dtype, device: torch.device) -> Form:
    """The fastest form of a model's products that is exact in its dtype."""
    if device.type == "cpu" and dtype == torch.bfloat16 and width <= NARROW and _works("fp16", dtype):
        return "fp16"
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


class _Block:
    """One layer's matrices and tables."""

    def __init__(self, model: GPT, layer: int, form: Form, invariant: bool) -> None:
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
        self.scale = model.resid_scale[layer].item()


class PackedGPT:
    """A GPT's weights as they are now, packed. See the model protocol in engine.py.

    invariant: see PackedLinear and `attention.attend_to_slots`.
    """

    @torch.inference_mode()
    def __init__(self, model: GPT, invariant: bool = True, int8: bool = False) -> None:
        config, dtype = model.config, model.dtype
        self.config, self.device, self.dtype = config, model.device, dtype
        self.cache_needs = [LayerNeed(config.n_kv_head, config.head_dim, window) for window in config.windows]
        embed_VC = norm(model.embed.weight[: config.vocab_size].to(dtype))
        self.embed_VC = F.pad(embed_VC, (0, 0, 0, 1))  # the last row is what stands before the first token: nothing
        self.smear_V1 = None
        if config.smear_channels:
            gate_V1 = torch.sigmoid(model.smear_gate(embed_VC[:, : config.smear_channels]))
            self.smear_V1 = (model.smear_scale * gate_V1).float()
        tables = [table[: config.vocab_size].to(dtype) for table in model.value_embeds.parameters()]
        shape = -1, len(tables), config.n_kv_head, config.head_dim
        self.value_VLKD = 3 * torch.stack(tables, dim=1).view(shape) if tables else None
        cos_1S1P, sin_1S1P = model._rotation(torch.arange(config.sequence_len, device=model.device)[None])
        self.turn_S1P = torch.complex(cos_1S1P.float(), sin_1S1P.float())[0]
        form = "int8" if int8 else choose_form(config.n_embd, dtype, model.device)
        self.blocks = [_Block(model, layer, form, invariant) for layer in range(config.n_layer)]
        self.skips_L11 = model.embed_skip.detach().float()[:, None, None]
        self.backout = model.backout.item() if config.backout else 0.0
        self.head = PackedLinear(model.head.weight[: config.vocab_size].to(dtype), form, False, invariant)
        self.inputs = self.head.inputs  # the dtype that products read
        self.products = [each for b in self.blocks for each in (b.qkvg, b.out, b.up, b.down)] + [self.head]
        self.norm = _Norm(config.n_embd, dtype, model.device)
        # half of attention's scale goes to the queries, and half to the keys
        self.norm_heads = _Norm(config.head_dim, dtype, model.device, config.qk_scale / config.head_dim**0.25)
        self.norm_last = _Norm(config.n_embd, dtype, model.device, 1 / (config.softcap or 1))

    def __call__(
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
        x_NC = self.embed_VC[idx_N].float()
        if self.smear_V1 is not None:
            x_NC = torch.addcmul(x_NC, self.smear_V1[idx_N], self.embed_VC[previous_N])
        if self.value_VLKD is not None:
            values = list(self.value_VLKD[idx_N].to(self.inputs).unbind(1))
        turn_N1P, skipped_LNC = self.turn_S1P[positions_N], self.skips_L11 * x_NC
        for layer, (block, skipped_NC) in enumerate(zip(self.blocks, skipped_LNC.unbind(), strict=True)):
            x_NC = torch.add(skipped_NC, x_NC, alpha=block.scale)
            q_NHD, k_NKD, v_NKD = self._project(block, x_NC, turn_N1P, values)
            x_NC += block.out(cache.attend(layer, q_NHD, k_NKD, v_NKD).to(self.inputs))
            hidden_NH = block.up(self._cast(self.norm(x_NC)))
            x_NC += block.down(hidden_NH * hidden_NH)
            if layer == config.n_layer // 2:
                middle_NC = x_NC
        if self.backout:
            x_NC = torch.add(x_NC, middle_NC, alpha=-self.backout)
        if wanted_R is not None:
            x_NC = x_NC[wanted_R]
        logits_NV = self.head(self._cast(self.norm_last(x_NC))).float()
        return logits_NV.tanh_().mul_(config.softcap) if config.softcap else logits_NV

    def _cast(self, x: torch.Tensor) -> torch.Tensor:
        """`x`, in fp32, as products read it."""
        return x if self.inputs == torch.float32 else x.to(self.inputs)

    def _project(
        self, block: _Block, x_NC: torch.Tensor, turn_N1P: torch.Tensor, values: list[torch.Tensor]
    ) -> tuple[torch.Tensor, ...]:
        """Queries, keys (both rotated and normed, with attention's scale) and values, in the compute dtype. `values`:
        what the layers to come add to theirs; this layer's is taken off.

        Rotation is a product of complex numbers, of which each pair of channels is one.
        """
        H, K, D = self.config.n_head, self.config.n_kv_head, self.config.head_dim
        qk, v, *gate = block.qkvg(self._cast(self.norm(x_NC))).split(block.sizes, dim=1)
        qk_NHP = qk.float().view(torch.complex64).view(-1, H + K, D // 2) * turn_N1P
        q_NHD, k_NKD = self.norm_heads(qk_NHP.view(torch.float32)).to(self.dtype).split((H, K), dim=1)
        v_NKD = v.view(-1, K, D)
        if gate:
            v_NKD = torch.addcmul(v_NKD, gate[0].sigmoid()[:, :K, None], values.pop(0))
        return q_NHD, k_NKD, v_NKD.to(self.dtype)
