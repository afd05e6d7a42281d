"""The model, only the model: a decoder-only transformer with the switches that section "The model" of the README names.

Shapes: B sequences, T positions, C channels (width), H query heads, K kv heads, D head dim, V vocabulary.
"""

import functools
from dataclasses import dataclass, fields
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from nanochat import attention, fp8
from nanochat.attention import Attend
from nanochat.compute import pick_dtype
from nanochat.fused_mlp import fused_mlp, fused_mlp_pays
from nanochat.loss import softcap, softcap_cross_entropy


@dataclass(frozen=True)
class GPTConfig:
    """Shape of the model and its switches; older, plainer nanochat models are other values of the same fields."""

    sequence_len: int = 2048
    vocab_size: int = 32768
    n_layer: int = 12
    n_head: int = 6
    n_kv_head: int = 6
    n_embd: int = 768
    window_pattern: str = "SSSL"  # tiled over the layers, S = short, L = long; the last layer is always long
    rope_base: float = 100_000.0
    qk_scale: float = 1.2  # factor on normalised queries and keys; 1 = off
    softcap: float = 15.0  # of the logits; 0 = off
    value_embed_every: int = 2  # value embeddings on every n-th layer counted back from the last; 0 = off
    value_gate_channels: int = 12
    resid_scale_first: float = 1.15  # initial residual scale of the first and of the last layer; 1 = off
    resid_scale_last: float = 1.05
    embed_skip_first: float = 0.20  # initial share of the embedding added before each layer; 0 = off
    embed_skip_last: float = 0.05
    smear_channels: int = 24  # channels that gate how much of the previous token's embedding is added; 0 = off
    backout: float = 0.2  # initial fraction of the mid-layer residual subtracted before the head; 0 = off
    dropout: float = 0.0  # on each sublayer's output, for runs of many epochs over small data

    def __post_init__(self) -> None:
        sizes = (self.n_layer, self.sequence_len, self.vocab_size, self.n_head, self.n_kv_head, self.n_embd)
        if min(sizes) < 1:
            raise ValueError(f"depth, sequence length, vocabulary, heads and width must be positive: {self}")
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd {self.n_embd} is not divisible by n_head {self.n_head}: change --head-dim")
        if self.n_head % self.n_kv_head:
            raise ValueError(f"n_head {self.n_head} is not divisible by n_kv_head {self.n_kv_head}")
        if self.head_dim % 2:
            raise ValueError(f"head dim {self.head_dim} must be even for rotary positions: change --head-dim")
        if max(self.smear_channels, self.value_gate_channels if self.value_embed_every else 0) > self.n_embd:
            raise ValueError(
                f"n_embd {self.n_embd} is narrower than its gates: raise --depth, --aspect-ratio or --head-dim"
            )
        if not 0 <= self.softcap <= 80:
            raise ValueError(f"softcap {self.softcap} must be between 0 and 80: the loss takes e^softcap in fp32")
        if not self.window_pattern or set(self.window_pattern) - set("SL"):
            raise ValueError(f"--window-pattern {self.window_pattern!r} must be made of the letters S and L")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout {self.dropout} must be at least 0 and below 1")

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "GPTConfig":
        """The config that `dataclasses.asdict` wrote; an unknown key raises ValueError."""
        unknown = sorted(set(values) - {field.name for field in fields(cls)})
        if unknown:
            raise ValueError(f"unknown model config key {', '.join(unknown)}: made by another version of this project?")
        return cls(**values)

    @property
    def head_dim(self) -> int:
        """Channels of one head, D."""
        return self.n_embd // self.n_head

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding and head: the vocabulary rounded up to a multiple of 64."""
        return -(-self.vocab_size // 64) * 64

    @property
    def windows(self) -> tuple[int, ...]:
        """Positions each layer attends to, its own included. Short = a quarter of the context, rounded up to 128."""
        short = min(-(-self.sequence_len // 4 // 128) * 128, self.sequence_len)
        tiled = [self.window_pattern[i % len(self.window_pattern)] for i in range(self.n_layer)]
        return (*(short if kind == "S" else self.sequence_len for kind in tiled[:-1]), self.sequence_len)

    def has_value_embed(self, layer: int) -> bool:
        """Whether this layer mixes a value embedding into its values (arXiv 2410.17897)."""
        return self.value_embed_every > 0 and (self.n_layer - 1 - layer) % self.value_embed_every == 0


def norm(x: torch.Tensor) -> torch.Tensor:
    """RMSNorm over the last dimension, without parameters (arXiv 1910.07467)."""
    return F.rms_norm(x, (x.size(-1),))


def rotate(x_BTHD: torch.Tensor, cos_BT1D: torch.Tensor, sin_BT1D: torch.Tensor) -> torch.Tensor:
    """Rotary positions (arXiv 2104.09864): the halves of D are the two coordinates of D/2 rotating planes."""
    a, b = x_BTHD.chunk(2, dim=-1)
    return torch.cat((a * cos_BT1D - b * sin_BT1D, b * cos_BT1D + a * sin_BT1D), dim=-1)


class Linear(nn.Linear):
    """A matrix without bias, kept in fp32 and used in the dtype of its input, or in training in fp8."""

    fp8 = False  # set by `fp8.convert`

    def __init__(self, n_in: int, n_out: int) -> None:
        super().__init__(n_in, n_out, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.fp8 and self.training:
            return fp8.linear(x, self.weight)
        return F.linear(x, self.weight.to(x.dtype))


class Attention(nn.Module):
    """Causal grouped-query attention with rotary positions, QK-norm and, on some layers, value embeddings."""

    def __init__(self, config: GPTConfig, layer: int) -> None:
        super().__init__()
        self.n_head, self.n_kv_head, self.head_dim = config.n_head, config.n_kv_head, config.head_dim
        self.qk_scale, self.window = config.qk_scale, config.windows[layer]
        kv_channels = config.n_kv_head * config.head_dim
        self.q = Linear(config.n_embd, config.n_embd)
        self.k = Linear(config.n_embd, kv_channels)
        self.v = Linear(config.n_embd, kv_channels)
        self.out = Linear(config.n_embd, config.n_embd)
        self.gate = Linear(config.value_gate_channels, config.n_kv_head) if config.has_value_embed(layer) else None

    def forward(self, x_BTC, ve_BTC, cos_BT1D, sin_BT1D, attend: Attend) -> torch.Tensor:
        B, T, _ = x_BTC.shape
        q_BTHD = self.q(x_BTC).view(B, T, self.n_head, self.head_dim)
        k_BTKD = self.k(x_BTC).view(B, T, self.n_kv_head, self.head_dim)
        v_BTKD = self.v(x_BTC).view(B, T, self.n_kv_head, self.head_dim)
        if self.gate is not None:
            gate_BTK1 = 3 * torch.sigmoid(self.gate(x_BTC[..., : self.gate.in_features])).unsqueeze(-1)
            v_BTKD = v_BTKD + gate_BTK1 * ve_BTC.view_as(v_BTKD)
        q_BTHD = norm(rotate(q_BTHD, cos_BT1D, sin_BT1D)) * self.qk_scale
        k_BTKD = norm(rotate(k_BTKD, cos_BT1D, sin_BT1D)) * self.qk_scale
        y_BTHD = attend(q_BTHD, k_BTKD, v_BTKD, self.window)
        return self.out(y_BTHD.reshape(B, T, -1))


class MLP(nn.Module):
    """Two matrices around a squared ReLU (arXiv 2109.08668), four times as wide inside."""

    fused = False  # set by `GPT.compile_blocks` where `fused_mlp_pays`

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.up = Linear(config.n_embd, 4 * config.n_embd)
        self.down = Linear(4 * config.n_embd, config.n_embd)

    def forward(self, x_BTC: torch.Tensor) -> torch.Tensor:
        if self.fused and not self.up.fp8:
            return fused_mlp(x_BTC, self.up.weight, self.down.weight)
        return self.down(F.relu(self.up(x_BTC)).square())


class Block(nn.Module):
    """Attention, then MLP, each on the normed residual, which is rescaled and joined by the embedding first."""

    def __init__(self, config: GPTConfig, layer: int) -> None:
        super().__init__()
        self.attn = Attention(config, layer)
        self.mlp = MLP(config)
        self.dropout = config.dropout

    def forward(self, x_BTC, x0_BTC, ve_BTC, scale_1, skip_1, cos_BT1D, sin_BT1D, attend: Attend) -> torch.Tensor:
        x_BTC = scale_1 * x_BTC + skip_1 * x0_BTC
        y_BTC = self.attn(norm(x_BTC), ve_BTC, cos_BT1D, sin_BT1D, attend)
        x_BTC = x_BTC + F.dropout(y_BTC, self.dropout, self.training)
        return x_BTC + F.dropout(self.mlp(norm(x_BTC)), self.dropout, self.training)


class LanguageModel(nn.Module):
    """Logits or loss over a model's `hidden` and its `head_weight`, (V, C); its config may have a `softcap`."""

    config: Any
    hidden: Any
    head_weight: Any
    compiled = False

    def positions(self, idx_BT: torch.Tensor, cache: Any | None, positions_BT: torch.Tensor | None) -> torch.Tensor:
        """Where tokens stand: what is said of it beside a cache, else from 0 on. ValueError beyond the context."""
        if cache is None:
            if idx_BT.size(1) > self.config.sequence_len:
                raise ValueError(f"{idx_BT.size(1)} tokens exceed the model's context of {self.config.sequence_len}")
            positions_BT = torch.arange(idx_BT.size(1), device=idx_BT.device)[None]
        assert positions_BT is not None, "with a cache, say where the tokens stand"
        return positions_BT

    def forward(
        self,
        idx_BT: torch.Tensor,
        targets_BT: torch.Tensor | None = None,
        *,
        loss_reduction: str = "mean",
        cache: Any | None = None,
        positions_BT: torch.Tensor | None = None,
        last_only: bool = False,
    ) -> torch.Tensor:
        """Logits (B, T, V) in fp32, or with targets the loss in nats; a target of -1 is ignored.

        loss_reduction: "mean" | "sum" | "none" (per token, (B, T)). cache: keys and values of earlier positions (see
        kv_cache.py); positions_BT says where idx_BT stands in it, -1 marks padding. last_only: the last column's
        logits alone, (B, 1, V). Raises ValueError when idx_BT is longer than the context.
        """
        x_BTC, cap = self.hidden(idx_BT, cache, positions_BT), getattr(self.config, "softcap", 0.0)
        if targets_BT is None:
            x_BTC = x_BTC[:, -1:] if last_only else x_BTC
            return softcap(F.linear(x_BTC, self.head_weight.to(x_BTC.dtype)), cap)
        x_NC, targets_N = x_BTC.flatten(0, 1), targets_BT.flatten().to(x_BTC.device)
        loss = softcap_cross_entropy(x_NC, self.head_weight, targets_N, cap, loss_reduction, compiled=self.compiled)
        return loss.view(targets_BT.shape) if loss_reduction == "none" else loss


class GPT(LanguageModel):
    """The language model. Build it on any device, `meta` too, then call `init_weights()` or load a checkpoint.

    Activations are in `dtype`, matrices and scalars in fp32, embeddings in `embed_dtype` (default: `dtype`). Training
    on CPU keeps embeddings in fp32 too: rows of a bf16 gradient would be summed in bf16, in an order that depends
    on the number of ranks.
    """

    def __init__(
        self, config: GPTConfig, dtype: torch.dtype = torch.float32, embed_dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        self.config, self.dtype = config, dtype
        embed_dtype = embed_dtype or dtype
        kv_channels = config.n_kv_head * config.head_dim
        self.embed = nn.Embedding(config.padded_vocab_size, config.n_embd, dtype=embed_dtype)
        layers = [layer for layer in range(config.n_layer) if config.has_value_embed(layer)]
        tables = {str(n): nn.Embedding(config.padded_vocab_size, kv_channels, dtype=embed_dtype) for n in layers}
        self.value_embeds = nn.ModuleDict(tables)
        self.blocks: Any = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        self.head = Linear(config.n_embd, config.padded_vocab_size)
        self.resid_scale = nn.Parameter(torch.empty(config.n_layer))
        self.embed_skip = nn.Parameter(torch.empty(config.n_layer))
        if config.smear_channels:
            self.smear_gate = Linear(config.smear_channels, 1)
            self.smear_scale = nn.Parameter(torch.empty(()))
        if config.backout:
            self.backout = nn.Parameter(torch.empty(()))
        self.checkpointing = False  # keep a block's inputs alone for the backward pass (arXiv 1604.06174)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.embed.weight.device

    @property
    def head_weight(self) -> torch.Tensor:
        """The matrix that gives the logits, (V, C)."""
        return self.head.weight[: self.config.vocab_size]

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator | None = None) -> None:
        """Set every parameter to its initial value (README, "The model"), drawing from `generator`."""
        config, width = self.config, self.config.n_embd
        bound = (3 / width) ** 0.5  # a uniform of standard deviation 1/√width
        nn.init.normal_(self.embed.weight, std=0.8, generator=generator)
        nn.init.normal_(self.head.weight, std=0.001, generator=generator)
        for table in self.value_embeds.parameters():
            nn.init.uniform_(table, -bound, bound, generator=generator)
        for block in self.blocks:
            for matrix in (block.attn.q, block.attn.k, block.attn.v):
                nn.init.uniform_(matrix.weight, -bound, bound, generator=generator)
            nn.init.uniform_(block.mlp.up.weight, -0.4 * bound, 0.4 * bound, generator=generator)
            nn.init.zeros_(block.attn.out.weight)
            nn.init.zeros_(block.mlp.down.weight)
            if block.attn.gate is not None:
                nn.init.uniform_(block.attn.gate.weight, 0, 0.02, generator=generator)
        steps = torch.linspace(0, 1, config.n_layer, device=self.device)
        for name in ("resid_scale", "embed_skip"):
            ends = [getattr(config, f"{name}_first"), getattr(config, f"{name}_last")]
            first, last = torch.tensor(ends, device=self.device)
            getattr(self, name).copy_(torch.lerp(first, last, steps))
        if config.smear_channels:
            nn.init.uniform_(self.smear_gate.weight, 0, 0.02, generator=generator)
            self.smear_scale.fill_(1.0)
        if config.backout:
            self.backout.fill_(config.backout)

    def compile_blocks(self) -> None:
        """Fuse with torch.compile: one graph for each kind of block, shared by all layers, and one for the loss."""
        torch._dynamo.config.recompile_limit = 64  # windows, gates, shapes and gradient modes each make one
        fused = fused_mlp_pays(self.device, self.dtype, self.config.n_embd)
        for block in self.blocks:
            block.mlp.fused = fused
            block.compile(dynamic=False)
        self.compiled = True

    def flops_per_token(self) -> int:
        """Training FLOPs a token: 6 a matrix weight, 12·H·D a position attended to (PaLM, appendix B)."""
        matrices = sum(p.numel() for p in self.blocks.parameters()) + self.head.weight.numel()
        attended = sum(min(window, self.config.sequence_len) for window in self.config.windows)
        return 6 * matrices + 12 * self.config.n_embd * attended

    def _smear(self, x_BTC: torch.Tensor, previous_BTC: torch.Tensor) -> torch.Tensor:
        gate_BT1 = torch.sigmoid(self.smear_gate(x_BTC[..., : self.config.smear_channels]))
        return x_BTC + self.smear_scale * gate_BT1 * previous_BTC

    def _previous(self, idx_BT: torch.Tensor, x_BTC: torch.Tensor, cache: Any | None) -> torch.Tensor:
        """The embedding of the token before each token; zero before the first."""
        if cache is None:
            return F.pad(x_BTC[:, :-1], (0, 0, 1, 0))
        before_B1 = cache.last_token_B[:, None]
        first_B1C = norm(self.embed(before_B1.clamp(min=0)).to(self.dtype)) * (before_B1 >= 0).unsqueeze(-1)
        return torch.cat((first_B1C, x_BTC[:, :-1]), dim=1)

    def hidden(self, idx_BT: torch.Tensor, cache: Any = None, positions_BT: torch.Tensor | None = None) -> torch.Tensor:
        """The normed residual that the head reads, (B, T, C); arguments as in `forward`."""
        config, positions_BT = self.config, self.positions(idx_BT, cache, positions_BT)
        cos_BT1D, sin_BT1D = self._rotation(positions_BT)
        x_BTC = norm(self.embed(idx_BT).to(self.dtype))
        if config.smear_channels:
            x_BTC = self._smear(x_BTC, self._previous(idx_BT, x_BTC, cache))
        x0_BTC = x_BTC.view_as(x_BTC)  # the same tensor twice would be one more graph to compile for the first block
        whole = None  # attention to these tokens alone, where there are no earlier ones
        if cache is None or _from_the_first(positions_BT):
            windowed = min(config.windows) < idx_BT.size(1)
            whole = attend = attention.choose(self.device, self.dtype, config.head_dim, windowed)[1]
        for layer, block in enumerate(self.blocks):
            ve_BTC = self.value_embeds[str(layer)](idx_BT).to(self.dtype) if config.has_value_embed(layer) else None
            if cache is not None:
                attend = functools.partial(_attend_cached, cache, layer, positions_BT, whole)
            again = self.checkpointing and torch.is_grad_enabled()
            run = functools.partial(checkpoint, block, use_reentrant=False) if again else block
            x_BTC = run(
                x_BTC, x0_BTC, ve_BTC, self.resid_scale[layer], self.embed_skip[layer], cos_BT1D, sin_BT1D, attend
            )
            if config.backout and layer == config.n_layer // 2:
                middle_BTC = x_BTC
        if config.backout:
            x_BTC = x_BTC - self.backout * middle_BTC
        return norm(x_BTC)

    def _rotation(self, positions_BT: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin of each position's angles, (B, T, 1, D/2), made in fp32 and rounded to the compute dtype."""
        D = self.config.head_dim
        planes = torch.arange(0, D, 2, device=positions_BT.device, dtype=torch.float32) / D
        angles_BTD = positions_BT[..., None].float() * self.config.rope_base**-planes
        return angles_BTD.cos().to(self.dtype)[:, :, None], angles_BTD.sin().to(self.dtype)[:, :, None]


def _from_the_first(positions_BT: torch.Tensor) -> bool:
    """Whether each row begins at its first token. A step of one token is not asked: the answer waits for the device."""
    column_T = torch.arange(positions_BT.size(1), device=positions_BT.device)
    return len(column_T) > 1 and bool(((positions_BT == column_T) | (positions_BT < 0)).all())


def _attend_cached(cache, layer: int, positions_BT, whole: Attend | None, q_BTHD, k_BTKD, v_BTKD, window: int):
    k_BSKD, v_BSKD = cache.update(layer, k_BTKD, v_BTKD, positions_BT)
    if whole is not None:
        return whole(q_BTHD, k_BTKD, v_BTKD, window)
    return attention.cached_attention(q_BTHD, k_BSKD, v_BSKD, positions_BT, window)


def build_model(config: GPTConfig, device: torch.device | str, *, train: bool) -> GPT:
    """Build a model on `device` whose weights hold no values yet: call `init_weights`, or load a checkpoint into it.

    Activations are in this machine's compute dtype (`compute.pick_dtype`). For training, matrices stay in fp32; for
    inference they are cast to the compute dtype, which rounds each once instead of at every use. Raises ValueError
    when training is asked for in float16: without loss scaling its gradients would underflow.
    """
    device = torch.device(device)
    dtype = pick_dtype(device)
    if train and dtype == torch.float16:
        raise ValueError("NANOCHAT_DTYPE=float16 is for inference only: train in bfloat16 or float32")
    embed_dtype = torch.float32 if device.type == "cpu" else dtype  # see GPT
    with torch.device("meta"):  # no memory and no time for values that are overwritten at once
        model = GPT(config, dtype=dtype, embed_dtype=embed_dtype)
        if not train:
            for module in model.modules():
                if isinstance(module, Linear):
                    module.to(dtype)
    return model.to_empty(device=device)
