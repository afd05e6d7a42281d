"""What all models share: one forward for training, evaluation and generation, whatever the family.

The modules of a model do not care about leading dimensions: training gives them rows (B, T, C), the engine gives them a
flat list of tokens (N, C) taken from many requests. All that differs between the two is in a small context object:

    context.positions        where the tokens stand, (1, T) or (N)
    context.previous_N       the token before each; None where it is the left neighbour in the row
    context.layer(i)         attend(q, k, v, window) of layer i: how queries meet keys and values

`WholeRows` is the context of rows that are read from their first token on; `cache_batch.CacheBatch` is the engine's.

    model(idx_BT) -> logits_BTV, model(idx_BT, targets_BT) -> loss      training, evaluation
    model(idx_N, context=context, wanted_R=places) -> logits_RV         the engine
    model.cache_needs                                                   what each layer keeps of a token

Shapes: B sequences, T positions, N tokens of any rows, R those that are wanted, C channels, H heads, D head dim,
P = D/2 planes of rotation, V vocabulary; no letter for leading dimensions that may be (B, T) or (N).
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F

from nanochat.attention import Attend
from nanochat.common import print0


class LayerNeed(NamedTuple):
    """What one layer keeps of each position in the KV cache, and how many positions it looks back, its own included."""

    kv_heads: int
    head_dim: int
    window: int


class Linear(nn.Linear):
    """A matrix that is used in the dtype of its input: weights stay in fp32 in training, activations may be bf16.

    There is no autocast anywhere: this cast and the embeddings' dtype say all about precision.
    """

    def __init__(self, n_in: int, n_out: int, bias: bool = False) -> None:
        super().__init__(n_in, n_out, bias=bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.linear(x, self.weight.to(x.dtype), bias)


class Gate(Linear):
    """A small matrix that reads the first few channels of its input: how much of something is let through.

    The sigmoid is the caller's.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # A copy: for a view, the backward pass would keep all of x alive (in fp8, 1.8 GB at d24 and 16 rows).
        return super().forward(x[..., : self.in_features].contiguous())


class Together:
    """Matrices that read the same input: `q, k, v = Together((q, k), (v,))(x)`.

    In training each is a product of its own, because torch.compile does not gain from one. For inference
    `packed.prepack` puts one single product in its place, and the outputs of a group come as one tensor, side by side:
    `qk, v = ...`. Callers take either. The matrices stay attributes of the module that owns them, so this is no
    nn.Module and appears in no state dict.
    """

    def __init__(self, *groups: Sequence[Any]) -> None:
        self.groups = groups

    def __call__(self, x: torch.Tensor) -> Sequence[torch.Tensor]:
        return [matrix(x) for group in self.groups for matrix in group]


def rotation(positions: torch.Tensor, radians_P: torch.Tensor, dtype: torch.dtype, scale: float = 1.0):
    """Return cos and sin of the rotary angles, (..., 1, D) each, for `rotate`; P = D/2 planes, radians per position.

    Both are computed in fp32, because bf16 cannot tell position 1000 from 1001, and then rounded to `dtype`.
    """
    angles_P = positions[..., None, None].float() * radians_P
    cos_P = angles_P.cos() * scale
    sin_P = angles_P.sin() * scale
    cos_1D = torch.cat((cos_P, cos_P), dim=-1).to(dtype)
    sin_1D = torch.cat((-sin_P, sin_P), dim=-1).to(dtype)
    return cos_1D, sin_1D


def rotate(x_HD: torch.Tensor, cos_1D: torch.Tensor, sin_1D: torch.Tensor) -> torch.Tensor:
    """Rotary positions (RoPE, arXiv 2104.09864): channel i of the first half and of the second half are one plane.

    (a, b) -> (a·cos - b·sin, b·cos + a·sin), written as one product with cos and one, of the swapped halves, with
    (-sin, sin): decoding is bound by the number of operations, and this is the form with the fewest.
    """
    a, b = x_HD.chunk(2, dim=-1)
    return torch.addcmul(x_HD * cos_1D, torch.cat((b, a), dim=-1), sin_1D)


class WholeRows:
    """Context of rows that are read whole, from position 0 on: training, evaluation, scoring.

    attend: the attention kernel, `attend(q_BTHD, k_BTKD, v_BTKD, window)`. It is one and the same function for all
    layers, so that all blocks of a kind share one compiled graph. Raises ValueError when rows are longer than
    `sequence_len`.
    """

    previous_N = None  # the token before each is its left neighbour in the row

    def __init__(self, idx_BT: torch.Tensor, attend: Attend, sequence_len: int) -> None:
        if idx_BT.size(1) > sequence_len:
            raise ValueError(f"{idx_BT.size(1)} tokens exceed the model's context of {sequence_len}")
        self.positions = torch.arange(idx_BT.size(1), device=idx_BT.device)[None]
        self.attend = attend

    def layer(self, layer: int) -> Attend:
        """Return the function by which queries of this layer meet keys and values."""
        return self.attend


class LanguageModel(nn.Module):
    """The protocol of all models, with `forward` as described above; the engine asks for no more than this."""

    config: Any  # its sequence_len and vocab_size
    device: Any  # where tokens come in
    dtype: Any  # of activations
    cache_needs: Any  # a LayerNeed for each layer
    whole: Any = True  # all weights are plain tensors on one device, so that they may be prepacked
    graphs: Any = True  # decoding never waits for the device, so that it may be replayed as a CUDA graph


def warn_if_not_finite(model: nn.Module, origin: Path | str) -> None:
    """Print one line, which names the first tensor at fault, if weights are NaN or infinite.

    They come from a run that diverged, or from a damaged file, and leave a model of no use.
    """
    # A sum shows both, as nothing that is added to them is finite. It reads the weights once and makes no copy: .03 s
    # per GB, where `isfinite` takes 1 s. Numbers in float16 may overflow it, so that has the last word.
    wrong = []
    for name, value in model.named_parameters():
        if value.is_floating_point() and not value.detach().sum().isfinite() and not value.isfinite().all():
            wrong.append(name)
    if wrong:
        more = f" and {len(wrong) - 1} more tensors" if len(wrong) > 1 else ""
        print0(
            f"warning: weights of {origin} are NaN or infinite, in {wrong[0]}{more}: it cannot answer; use an earlier "
            "step, or fetch the model again",
            file=sys.stderr,
        )
