"""The language model, and only the model: a decoder-only transformer, told from top to bottom.

    tokens -> embedding -> norm -> smear -> n x [ rescale + embedding skip -> attention -> MLP ] -> backout -> norm
           -> head -> softcap -> logits

The parts come in the order in which a token meets them: norm, attention, MLP, block, model. One forward serves training
and generation; language_model.py says how. Everything beyond a plain pre-norm transformer
(value embeddings, smear, backout, QK scale, embedding skips, softcap) has a switch in `GPTConfig`, and a comment that
says why it is there. Most of these were found in the speedruns of modded-nanogpt and karpathy/nanochat.

Shapes: B sequences, T positions, C channels (width), H query heads, K kv heads, D head dim, P = D/2 planes of rotation,
R tokens whose logits are wanted, V vocabulary. Leading dimensions have no letter where they may be (B, T), in training,
or (N), tokens of any rows.
"""

import functools
from dataclasses import dataclass, fields
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from nanochat.attention import Attend
from nanochat.compute import pick_dtype
from nanochat.fp8 import Fp8Linear, Fp8Together
from nanochat.fused_mlp import fused_mlp
from nanochat.kernels import PLAIN, Kernels, choose_kernels
from nanochat.language_model import Gate, LanguageModel, LayerNeed, Linear, Together, WholeRows, rotate, rotation
from nanochat.loss import softcap, softcap_cross_entropy

# RMSNorm adds this to the mean square. Compiled graphs take float32's epsilon for bf16 input, eager PyTorch takes
# bf16's (0.008): stating it makes the two agree, and training agree with the engine.
NORM_EPS = torch.finfo(torch.float32).eps


@dataclass(frozen=True)
class GPTConfig:
    """Shape of the model and its switches. Older, plainer nanochat models are other values of the same fields."""

    sequence_len: int = 2048
    vocab_size: int = 32768
    n_layer: int = 12
    n_head: int = 6
    n_kv_head: int = 6  # fewer than n_head: query heads share kv heads (GQA, arXiv 2305.13245), the cache shrinks
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
    norm_scales: bool = False  # learned scales of the channels after the norms before the MLPs and the head
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
        """Build the config that `dataclasses.asdict` wrote. Raises ValueError for an unknown key."""
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
        """Rows of the embedding and head: the vocabulary rounded up to a multiple of 64, which tensor cores like."""
        return -(-self.vocab_size // 64) * 64

    @property
    def windows(self) -> tuple[int, ...]:
        """Positions each layer attends to, its own included. Short = a quarter of the context, rounded up to 128."""
        short = min(-(-self.sequence_len // 4 // 128) * 128, self.sequence_len)
        tiled = [self.window_pattern[i % len(self.window_pattern)] for i in range(self.n_layer)]
        return (*(short if kind == "S" else self.sequence_len for kind in tiled[:-1]), self.sequence_len)

    @property
    def has_windows(self) -> bool:
        """True if some layer attends to less than the whole context."""
        return min(self.windows) < self.sequence_len

    def has_value_embed(self, layer: int) -> bool:
        """Return whether this layer mixes a value embedding into its values (arXiv 2410.17897)."""
        return self.value_embed_every > 0 and (self.n_layer - 1 - layer) % self.value_embed_every == 0


def norm(x: torch.Tensor, scale_C: torch.Tensor | None = None) -> torch.Tensor:
    """RMSNorm over the last dimension (arXiv 1910.07467), then a scale for each channel if one is given."""
    C = int(x.size(-1))  # int: a constant in a trace (cpu_trace.py), where a size is an operation
    # is_compiling comes first: it ends the tracing of this line, and is_inference_mode_enabled would break the graph.
    if not torch.compiler.is_compiling() and torch.is_inference_mode_enabled() and x.device.type == "cpu":
        # Decoding on CPU is bound by the number of operations, and F.rms_norm is ten of them there (a quarter of a d4's
        # time). LayerNorm is one, and the mean of (x, -x) is zero: what is left of it is RMSNorm, to the bit.
        mirrored = torch.cat((x, -x), dim=-1)
        y = torch.native_layer_norm(mirrored, (2 * C,), None, None, NORM_EPS)[0][..., :C]
    else:
        y = F.rms_norm(x, (C,), eps=NORM_EPS)
    return y if scale_C is None else y * scale_C.to(y.dtype)


class Attention(nn.Module):
    """Causal grouped-query attention with rotary positions, QK-norm and, on some layers, value embeddings."""

    def __init__(self, config: GPTConfig, layer: int, linear: type[Linear], together: type[Together]) -> None:
        super().__init__()
        self.heads = [config.n_head, config.n_kv_head]
        self.head_dim = config.head_dim
        self.qk_scale = config.qk_scale
        self.window = config.windows[layer]
        kv_channels = config.n_kv_head * config.head_dim
        self.q = linear(config.n_embd, config.n_embd)
        self.k = linear(config.n_embd, kv_channels)
        self.v = linear(config.n_embd, kv_channels)
        self.out = linear(config.n_embd, config.n_embd)
        self.gate = Gate(config.value_gate_channels, config.n_kv_head) if config.has_value_embed(layer) else None
        # They read the same input, so the engine makes one product of them (packed.py), and so does fp8.
        gates = () if self.gate is None else ((self.gate,),)
        self.qkvg: Any = together((self.q, self.k), (self.v,), *gates)

    def forward(self, x_C, ve_KD, cos_1D, sin_1D, attend: Attend) -> torch.Tensor:
        """ve_KD: value embeddings of the tokens, or None. attend: how queries meet keys and values."""
        # qk is [q, k], or one tensor with the heads of both after packing: what follows treats them alike anyway.
        if ve_KD is None:
            *qk, v = self.qkvg(x_C)
            v_KD = v.unflatten(-1, (-1, self.head_dim))
        else:
            *qk, v, gate_K = self.qkvg(x_C)
            v_KD = v.unflatten(-1, (-1, self.head_dim))
            # Value embeddings (arXiv 2410.17897) give each token a value that depends on the token alone, without any
            # mixing before it: cheap parameters (a lookup costs no FLOPs) that carry the token's identity into deep
            # layers. A gate per kv head, read from the first few channels, says how much of it is wanted; it begins
            # near 3·σ(0) = 1.5.
            gate_K1 = torch.sigmoid(gate_K).unsqueeze(-1)
            v_KD = torch.addcmul(v_KD, gate_K1, ve_KD.view_as(v_KD), value=3)

        # QK-norm bounds the attention logits, which otherwise grow until training diverges (arXiv 2302.05442). On unit
        # vectors alone the softmax could not become sharp: each side is scaled by 1.2, as if the logits' scale were
        # 1.44 (a value of karpathy/nanochat's).
        turned = []
        for x in qk:
            x_HD = rotate(x.unflatten(-1, (-1, self.head_dim)), cos_1D, sin_1D)
            turned.append(norm(x_HD) * self.qk_scale)
        q_HD, k_KD = turned if len(turned) == 2 else turned[0].split(self.heads, dim=-2)
        y_HD = attend(q_HD, k_KD, v_KD, self.window)
        return self.out(y_HD.flatten(-2))


class MLP(nn.Module):
    """Two matrices around a squared ReLU (arXiv 2109.08668), four times as wide inside."""

    def __init__(self, config: GPTConfig, linear: type[Linear], fused: bool) -> None:
        super().__init__()
        self.fused = fused
        self.up = linear(config.n_embd, 4 * config.n_embd)
        self.down = linear(4 * config.n_embd, config.n_embd)

    def forward(self, x_C: torch.Tensor) -> torch.Tensor:
        if self.fused:
            return fused_mlp(x_C, self.up.weight, self.down.weight)
        return self.down(F.relu(self.up(x_C)).square())


class Block(nn.Module):
    """Attention, then MLP, each on the normed residual.

    Before both the residual is rescaled and joined by a share of the embedding: scale·x + skip·x0, both learned per
    layer. Deep layers then still see which token they stand on, and each layer sets how loud its input is.
    """

    def __init__(self, config: GPTConfig, layer: int, kernels: Kernels) -> None:
        super().__init__()
        linear = Fp8Linear if kernels.fp8 else Linear
        together = Fp8Together if kernels.fp8 else Together
        self.attn = Attention(config, layer, linear, together)
        self.mlp = MLP(config, linear, kernels.fused_mlp)
        self.dropout = config.dropout

    def forward(self, x_C, x0_C, ve_KD, scale_1, skip_1, norm_scale_C, cos_1D, sin_1D, attend: Attend) -> torch.Tensor:
        """norm_scale_C: scale of the channels that the MLP reads, or None."""
        x_C = torch.addcmul(skip_1 * x0_C, x_C, scale_1)
        y_C = self.attn(norm(x_C), ve_KD, cos_1D, sin_1D, attend)
        x_C = x_C + F.dropout(y_C, self.dropout, self.training)
        y_C = self.mlp(norm(x_C, norm_scale_C))
        return x_C + F.dropout(y_C, self.dropout, self.training)


class GPT(LanguageModel):
    """The language model. Build it on any device, `meta` too, then call `init_weights()` or load a checkpoint.

    Activations are in `dtype`, matrices and scalars in fp32, embeddings in `embed_dtype` (default: `dtype`). Training
    on CPU keeps embeddings in fp32 too: rows of a bf16 gradient would be summed in bf16, in an order that depends
    on the number of ranks.
    """

    def __init__(
        self,
        config: GPTConfig,
        dtype: torch.dtype = torch.float32,
        embed_dtype: torch.dtype | None = None,
        kernels: Kernels = PLAIN,
    ) -> None:
        super().__init__()
        self.config = config
        self.dtype = dtype
        self.kernels = kernels
        embed_dtype = embed_dtype or dtype
        kv_channels = config.n_kv_head * config.head_dim
        self.embed = nn.Embedding(config.padded_vocab_size, config.n_embd, dtype=embed_dtype)
        self.value_embeds = nn.ModuleDict()
        for layer in range(config.n_layer):
            if config.has_value_embed(layer):
                self.value_embeds[str(layer)] = nn.Embedding(config.padded_vocab_size, kv_channels, dtype=embed_dtype)
        self.blocks: Any = nn.ModuleList(Block(config, layer, kernels) for layer in range(config.n_layer))
        # The head is not tied to the embedding: the two want different learning rates and initial sizes.
        self.head = Linear(config.n_embd, config.padded_vocab_size)
        self.readout = Together((self.head,))
        self.resid_scale = nn.Parameter(torch.empty(config.n_layer))
        self.embed_skip = nn.Parameter(torch.empty(config.n_layer))
        if config.smear_channels:
            self.smear_gate = Gate(config.smear_channels, 1)
            self.smear_scale = nn.Parameter(torch.empty(()))
        if config.backout:
            self.backout = nn.Parameter(torch.empty(()))
        if config.norm_scales:
            # One row a block, and the last for the norm before the head. Without scales all channels of a norm are
            # equally loud, and how much one of them matters has to be said by the matrix behind it, of which Muon moves
            # all directions equally far. karpathy/nanochat's pull request 830 scales these norms alone, and so do we.
            self.norm_scale = nn.Parameter(torch.empty(config.n_layer + 1, config.n_embd))
        if kernels.compiled:
            # One graph for each kind of block, shared by all layers: windows, gates, shapes and gradient modes each
            # make one, which is more than the eight that PyTorch allows.
            torch._dynamo.config.recompile_limit = 64
            for block in self.blocks:
                block.compile(dynamic=False)

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        return self.embed.weight.device

    @property
    def cache_needs(self) -> list[LayerNeed]:
        """Return what each layer keeps of a token in the KV cache."""
        return [LayerNeed(self.config.n_kv_head, self.config.head_dim, window) for window in self.config.windows]

    def flops_per_token(self) -> int:
        """Return training FLOPs per token: 6 per matrix weight, 12·H·D per position attended to (PaLM, appendix B)."""
        matrices = sum(p.numel() for p in self.blocks.parameters()) + self.head.weight.numel()
        attended = sum(self.config.windows)
        return 6 * matrices + 12 * self.config.n_embd * attended

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator | None = None) -> None:
        """Set every parameter to its initial value, drawing from `generator`.

        Projections back into the residual are zero, so that at first every layer passes its input on unchanged and
        gradients reach all layers alike. The head is tiny, so that the first loss is that of a uniform guess.
        """
        config = self.config
        bound = (3 / config.n_embd) ** 0.5  # a uniform on ±√3·σ has standard deviation σ, here 1/√width
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
            # Gates begin almost, but not quite, indifferent: exactly zero would give their inputs no gradient.
            if block.attn.gate is not None:
                nn.init.uniform_(block.attn.gate.weight, 0, 0.02, generator=generator)
        depth = torch.linspace(0, 1, config.n_layer, device=self.device)  # 0 at the first layer, 1 at the last
        self.resid_scale.copy_(config.resid_scale_first + (config.resid_scale_last - config.resid_scale_first) * depth)
        self.embed_skip.copy_(config.embed_skip_first + (config.embed_skip_last - config.embed_skip_first) * depth)
        if config.smear_channels:
            nn.init.uniform_(self.smear_gate.weight, 0, 0.02, generator=generator)
            self.smear_scale.fill_(1.0)
        if config.backout:
            self.backout.fill_(config.backout)
        if config.norm_scales:
            self.norm_scale.fill_(1.0)

    def forward(
        self,
        idx: torch.Tensor,
        targets: torch.Tensor | None = None,
        *,
        loss_reduction: str = "mean",
        context: Any = None,
        wanted_R: torch.Tensor | None = None,
        recompute: bool = False,
    ) -> torch.Tensor:
        """Return logits in fp32, or with targets the loss in nats; a target of -1 (loss.IGNORED) counts for nothing.

        Without a context, idx is (B, T), whole rows from position 0, and logits are (B, T, V). With one (see
        language_model.py), idx is (N), and logits are (R, V), of the `wanted` tokens or of all.
        loss_reduction: "mean" | "sum" | "none" (per token). recompute: keep a block's inputs alone for the backward
        pass (arXiv 1604.06174). Raises ValueError when rows are longer than the context.
        """
        config = self.config
        if context is None:
            context = WholeRows(idx, self.kernels.attend, config.sequence_len)
        planes_P = torch.arange(0, config.head_dim, 2, device=idx.device, dtype=torch.float32)
        radians_P = config.rope_base ** (-planes_P / config.head_dim)
        cos_1D, sin_1D = rotation(context.positions, radians_P, self.dtype)

        # The norm makes the residual start at the same size for every token, whatever its embedding has grown to.
        x_C = norm(self.embed(idx).to(self.dtype))
        if config.smear_channels:
            x_C = self._smear(x_C, context)
        x0_C = x_C.view_as(x_C)  # the same tensor twice would be one more graph to compile for the first block
        scales = self.resid_scale.unbind()
        skips = self.embed_skip.unbind()
        norm_scales = self.norm_scale.unbind() if config.norm_scales else (None,) * (config.n_layer + 1)
        middle_C = x_C
        for layer, block in enumerate(self.blocks):
            run = functools.partial(checkpoint, block, use_reentrant=False) if recompute else block
            ve_KD = self.value_embeds[str(layer)](idx).to(self.dtype) if config.has_value_embed(layer) else None
            attend = context.layer(layer)
            x_C = run(x_C, x0_C, ve_KD, scales[layer], skips[layer], norm_scales[layer], cos_1D, sin_1D, attend)
            if layer == config.n_layer // 2:
                middle_C = x_C
        if config.backout:
            # The first half of the network gathers context, much of which only helps the second half to think and
            # says nothing of the next token: a learned fraction of the mid-layer residual is taken out again.
            x_C = x_C - self.backout * middle_C
        x_C = norm(x_C, norm_scales[-1])

        if targets is not None:
            loss_sum = self.kernels.loss_sum
            n_vocab = config.vocab_size  # the head's rows after it pad the vocabulary, and are left out of the loss
            return softcap_cross_entropy(
                x_C, self.head.weight, targets, config.softcap, loss_reduction, loss_sum, n_vocab
            )
        if wanted_R is not None:
            x_C = x_C[wanted_R]
        (logits_V,) = self.readout(x_C)
        return softcap(logits_V[..., : config.vocab_size], config.softcap)

    def _smear(self, x_C: torch.Tensor, context: Any) -> torch.Tensor:
        """Add to each token a gated bit of the previous token's embedding.

        So every layer sees the bigram, which a first attention layer would otherwise have to learn, at almost no cost.
        """
        if context.previous_N is None:
            before_C = F.pad(x_C[:, :-1], (0, 0, 1, 0))  # nothing stands before the first token of a row
        else:
            known_N1 = (context.previous_N >= 0)[:, None]
            before_C = norm(self.embed(context.previous_N.clamp(min=0)).to(self.dtype)) * known_N1
        gate_1 = torch.sigmoid(self.smear_gate(x_C))
        return torch.addcmul(x_C, self.smear_scale * gate_1, before_C)


def build_model(
    config: GPTConfig,
    device: torch.device | str,
    *,
    train: bool,
    compiled: bool = False,
    fp8: bool = False,
    kernels: Kernels | None = None,
) -> GPT:
    """Build a model on `device` whose weights hold no values yet: call `init_weights`, or load a checkpoint into it.

    Activations are in this machine's compute dtype. For training, matrices stay in fp32; for inference they are cast,
    which rounds each once instead of at every use. kernels: those to train with; None = what `choose_kernels` chooses
    for `compiled` and `fp8`, with its errors.
    """
    device = torch.device(device)
    dtype = pick_dtype(device)
    if not train:
        kernels = PLAIN
    elif kernels is None:
        kernels = choose_kernels(
            device,
            width=config.n_embd,
            head_dim=config.head_dim,
            windowed=config.has_windows,
            compiled=compiled,
            fp8_products=fp8,
        )
    embed_dtype = torch.float32 if device.type == "cpu" else dtype  # see GPT
    with torch.device("meta"):  # no memory and no time for values that are overwritten at once
        model = GPT(config, dtype, embed_dtype, kernels)
        if not train:
            for module in model.modules():
                if isinstance(module, Linear):
                    module.to(dtype)
    return model.to_empty(device=device)
