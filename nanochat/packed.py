"""GPT packed for inference: the same function as gpt.py in fewer steps, for decoding is bound by steps and by memory.

Query, key, value and gate are one product. What follows from a token alone (its normed embedding, how much smear it
takes) is looked up, not computed. On CPU the matrices lie in oneDNN's blocked layout, or in int8. The residual is fp32.

Shapes: N = B·T tokens, C width, H query heads, K kv heads, D head dim, O outputs, V vocabulary.
"""

import functools

import torch
import torch.nn.functional as F

from nanochat.gpt import GPT, norm
from nanochat.kv_cache import CacheRows, LayerNeed
from nanochat.loss import softcap


@functools.cache
def _onednn_works(dtype: torch.dtype) -> bool:
    """Whether PyTorch's prepacked oneDNN product runs here and gives what F.linear gives."""
    if not torch.backends.mkldnn.is_available() or dtype == torch.float16:
        return False
    w_OC, x_NC = (torch.randn(n, 64, generator=torch.Generator().manual_seed(n)).to(dtype) for n in (96, 3))
    try:
        packed = torch.ops.mkldnn._reorder_linear_weight(w_OC, 16)
        y_NO = torch.ops.mkldnn._linear_pointwise(x_NC, packed, None, "relu", [], "")
    except (RuntimeError, AttributeError):
        return False
    return torch.allclose(y_NO.float(), F.linear(x_NC, w_OC).relu().float(), atol=0.1, rtol=0.02)


class PackedLinear:
    """x·Wᵀ for rows x_NC, with or without a ReLU after it, in the fastest form there is.

    invariant: on CPU a row's result has the same bits whatever rows stand beside it. oneDNN's packed product is so by
    nature, in fp32 from two rows on; PyTorch's plain one where the rows are a multiple of eight.
    int8: weights rounded to 8 bits, with a scale for each output (on CPU and in bf16 alone).
    """

    def __init__(self, weight_OC: torch.Tensor, relu: bool = False, invariant: bool = True, int8: bool = False) -> None:
        cpu, dtype, self.relu = weight_OC.device.type == "cpu", weight_OC.dtype, relu
        self.rows = 1  # how many the product wants at least, or a multiple of
        if int8:
            if not cpu or dtype != torch.bfloat16:
                raise ValueError("int8 weights are for CPUs, and bf16 activations: set NANOCHAT_DTYPE=bfloat16")
            self.scale_O = (weight_OC.float().abs().amax(dim=1).clamp(min=1e-12) / 127).to(dtype)
            self.weight = (weight_OC.float() / self.scale_O.float()[:, None]).round().clamp(-127, 127).to(torch.int8)
            self.product = lambda x_NC: torch._weight_int8pack_mm(x_NC, self.weight, self.scale_O)
        elif cpu and _onednn_works(dtype):
            self.weight, self.relu = torch.ops.mkldnn._reorder_linear_weight(weight_OC.contiguous(), 16), False
            settings = None, "relu" if relu else "none", [], ""
            self.product = lambda x_NC: torch.ops.mkldnn._linear_pointwise(x_NC, self.weight, *settings)
            self.rows = 2 if invariant and dtype == torch.float32 else 1
        else:
            self.weight, self.rows = weight_OC, 8 if cpu and invariant else 1
            self.product = lambda x_NC: F.linear(x_NC, self.weight)

    def __call__(self, x_NC: torch.Tensor) -> torch.Tensor:
        N, padding = x_NC.size(0), -x_NC.size(0) % self.rows
        y_NO = self.product(F.pad(x_NC, (0, 0, 0, padding)))[:N] if padding else self.product(x_NC)
        return y_NO.relu_() if self.relu else y_NO


class _Block:
    """One layer's matrices and tables."""

    def __init__(self, model: GPT, layer: int, **form: bool) -> None:
        config, attn, mlp = model.config, model.blocks[layer].attn, model.blocks[layer].mlp
        rows = [matrix.weight.to(model.dtype) for matrix in (attn.q, attn.k, attn.v)]
        self.value_embed_VKD = None
        if attn.gate is not None:
            gate_KC = rows[0].new_zeros(config.n_kv_head, config.n_embd)
            gate_KC[:, : config.value_gate_channels] = attn.gate.weight
            rows.append(gate_KC)
            table = 3 * model.value_embeds[str(layer)].weight[: config.vocab_size]
            self.value_embed_VKD = table.to(model.dtype).unflatten(1, (config.n_kv_head, config.head_dim))
        self.qkvg = PackedLinear(torch.cat(rows), **form)
        self.out = PackedLinear(attn.out.weight.to(model.dtype), **form)
        self.up = PackedLinear(mlp.up.weight.to(model.dtype), relu=True, **form)
        self.down = PackedLinear(mlp.down.weight.to(model.dtype), **form)
        self.scale, self.skip = model.resid_scale[layer].item(), model.embed_skip[layer].item()


class PackedGPT:
    """A GPT's weights as they are now, packed. Called as the GPT is with a cache; see the model protocol in engine.py.

    invariant and int8 as in PackedLinear.
    """

    @torch.inference_mode()
    def __init__(self, model: GPT, invariant: bool = True, int8: bool = False) -> None:
        config, dtype = model.config, model.dtype
        self.config, self.device, self.dtype = config, model.device, dtype
        self.eps = torch.finfo(dtype).eps  # of F.rms_norm in gpt.py
        self.cache_needs = [LayerNeed(config.n_kv_head, config.head_dim, window) for window in config.windows]
        self.attention_scale = config.qk_scale**2 / config.head_dim**0.5
        embed_VC = norm(model.embed.weight[: config.vocab_size].to(dtype))
        self.embed_VC = F.pad(embed_VC, (0, 0, 0, 1))  # the last row is what stands before the first token: nothing
        self.smear_V1 = None
        if config.smear_channels:
            gate_V1 = torch.sigmoid(model.smear_gate(embed_VC[:, : config.smear_channels]))
            self.smear_V1 = (model.smear_scale * gate_V1).float()
        cos_1S1D, sin_1S1D = model._rotation(torch.arange(config.sequence_len, device=model.device)[None])
        self.cos_S1D = torch.cat((cos_1S1D, cos_1S1D), dim=-1)[0].float()
        self.sin_S1D = torch.cat((-sin_1S1D, sin_1S1D), dim=-1)[0].float()
        form = {"invariant": invariant, "int8": int8}
        self.blocks = [_Block(model, layer, **form) for layer in range(config.n_layer)]
        self.backout = model.backout.item() if config.backout else 0.0
        self.head = PackedLinear(model.head.weight[: config.vocab_size].to(dtype), **form)

    def __call__(
        self, idx_BT: torch.Tensor, *, cache: CacheRows, positions_BT: torch.Tensor, last_only: bool = False
    ) -> torch.Tensor:
        """Logits (B, T, V) in fp32, of the last column alone (B, 1, V) with `last_only`; arguments as GPT.forward's."""
        (B, T), config, idx_N = idx_BT.shape, self.config, idx_BT.flatten()
        x_NC = self.embed_VC[idx_N].float()
        if self.smear_V1 is not None:
            previous_BT = torch.cat((cache.last_token_B[:, None], idx_BT[:, :-1]), dim=1)
            x_NC = torch.addcmul(x_NC, self.smear_V1[idx_N], self.embed_VC[previous_BT.flatten()])
        cos_N1D, sin_N1D = self.cos_S1D[positions_BT.flatten()], self.sin_S1D[positions_BT.flatten()]
        x0_NC = x_NC
        for layer, block in enumerate(self.blocks):
            x_NC = torch.add(block.scale * x_NC, x0_NC, alpha=block.skip)
            q_NHD, k_NKD, v_NKD = self._project(block, x_NC, idx_N, cos_N1D, sin_N1D)
            q_BTHD, k_BTKD, v_BTKD = (y.view(B, T, -1, config.head_dim) for y in (q_NHD, k_NKD, v_NKD))
            y_BTHD = cache.attend(layer, q_BTHD, k_BTKD, v_BTKD, positions_BT, self.attention_scale)
            x_NC = x_NC + block.out(y_BTHD.reshape(B * T, -1))
            hidden_NH = block.up(self._norm(x_NC))
            x_NC = x_NC + block.down(hidden_NH * hidden_NH)
            if layer == config.n_layer // 2:
                middle_NC = x_NC
        if self.backout:
            x_NC = torch.add(x_NC, middle_NC, alpha=-self.backout)
        x_BTC = x_NC.view(B, T, -1)[:, -1:] if last_only else x_NC.view(B, T, -1)
        logits_NV = softcap(self.head(self._norm(x_BTC.flatten(0, 1))), config.softcap)
        return logits_NV.view(B, -1, config.vocab_size)

    def _norm(self, x: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x, x.shape[-1:], eps=self.eps).to(self.dtype)

    def _project(self, block: _Block, x_NC, idx_N, cos_N1D, sin_N1D) -> tuple[torch.Tensor, ...]:
        """Queries, keys (both rotated and normed; qk_scale is left to the softmax) and values, in the compute dtype."""
        H, K, D = self.config.n_head, self.config.n_kv_head, self.config.head_dim
        qkvg_NO = block.qkvg(self._norm(x_NC))
        heads_NHD = qkvg_NO[:, : (H + 2 * K) * D].unflatten(1, (H + 2 * K, D))
        qk_NHD, v_NKD = heads_NHD[:, : H + K].float(), heads_NHD[:, H + K :]
        qk_NHD = self._norm(torch.addcmul(qk_NHD * cos_N1D, qk_NHD.roll(D // 2, dims=-1), sin_N1D))
        if block.value_embed_VKD is not None:
            v_NKD = torch.addcmul(v_NKD, qkvg_NO[:, -K:, None].sigmoid(), block.value_embed_VKD[idx_N])
        return qk_NHD[:, :H], qk_NHD[:, H:], v_NKD
