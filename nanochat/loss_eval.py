"""Bits per byte: a loss that compares models whatever their tokenizers."""

import math
from collections.abc import Callable, Iterable, Sequence

import torch

from nanochat.compute import Compute


@torch.no_grad()
def evaluate_bpb(
    model: Callable[..., torch.Tensor],
    batches: Iterable[tuple[torch.Tensor, torch.Tensor]],
    token_bytes: Sequence[int] | torch.Tensor,
    compute: Compute | None = None,
) -> float:
    """Bits that `model` needs for a byte of text, over all batches of all ranks; ValueError when no byte was scored.

    The nats of every target that stands for text, over ln 2 times the bytes of those targets: a mean over bytes,
    so neither the vocabulary nor the division into batches and ranks changes its meaning.
    batches: (inputs_BT, targets_BT) pairs; targets below 0 are not counted. Ranks may differ in how many they give.
    token_bytes: bytes of each token id, 0 for special tokens, which are not counted.
    """
    device = compute.device if compute else torch.device("cpu")
    # nats, bytes; the sums outgrow float32's 24 bits, but MPS has nothing wider
    totals = torch.zeros(2, dtype=torch.float32 if device.type == "mps" else torch.float64, device=device)
    bytes_V = torch.as_tensor(token_bytes)
    for inputs_BT, targets_BT in batches:
        bytes_V = bytes_V.to(targets_BT.device)
        nats_BT = model(inputs_BT, targets_BT, loss_reduction="none").view_as(targets_BT)
        bytes_BT = torch.where(targets_BT >= 0, bytes_V[targets_BT.clamp(min=0)], 0)
        nats_BT = torch.where(bytes_BT > 0, nats_BT, 0.0)
        totals += torch.stack([nats_BT.sum(dtype=totals.dtype), bytes_BT.sum().to(totals.dtype)]).to(device)
    if compute:
        compute.all_reduce_sum(totals)
    nats, count = totals.tolist()
    if count == 0:
        raise ValueError("bits per byte: not one byte of text to score: give more evaluation tokens or a fuller shard")
    return nats / (math.log(2) * count)
