"""Bits per byte: a loss that compares models whatever their tokenizers.

A model with a larger vocabulary predicts fewer, longer tokens, so losses per token do not compare. Divided by the bytes
of text that the targets stand for, they do.
"""

import math
from collections.abc import Callable, Iterable, Sequence

import torch

from nanochat.compute import Compute
from nanochat.loss import IGNORED


@torch.no_grad()
def evaluate_bpb(
    model: Callable[..., torch.Tensor],
    batches: Iterable[tuple[torch.Tensor, torch.Tensor]],
    token_bytes: Sequence[int] | torch.Tensor,
    compute: Compute | None = None,
) -> float:
    """Return the bits that `model` needs per byte of text, over all batches of all ranks.

    batches: (inputs_BT, targets_BT) pairs; IGNORED targets are not counted. Ranks may differ in how many they give.
    token_bytes: bytes of each token id, 0 for special tokens, which are not counted. Raises ValueError when no byte
    was scored.
    """
    device = torch.device("cpu") if compute is None else compute.device
    # Nats and bytes are summed before they are divided: a mean over bytes does not depend on how they are divided into
    # batches and ranks. The sums outgrow float32's 24 bits, but MPS has nothing wider.
    sum_dtype = torch.float32 if device.type == "mps" else torch.float64
    total_nats = torch.zeros((), dtype=sum_dtype, device=device)
    total_bytes = torch.zeros((), dtype=sum_dtype, device=device)
    bytes_V = torch.as_tensor(token_bytes)
    for inputs_BT, targets_BT in batches:
        bytes_V = bytes_V.to(targets_BT.device)
        nats_BT = model(inputs_BT, targets_BT, loss_reduction="none").view_as(targets_BT)
        bytes_BT = torch.where(targets_BT > IGNORED, bytes_V[targets_BT.clamp(min=0)], 0)
        nats_BT = torch.where(bytes_BT > 0, nats_BT, 0.0)
        total_nats += nats_BT.sum(dtype=sum_dtype).to(device)
        total_bytes += bytes_BT.sum().to(device)
    if compute is not None:
        compute.all_reduce_sum(total_nats)
        compute.all_reduce_sum(total_bytes)
    n_bytes = total_bytes.item()
    if n_bytes == 0:
        raise ValueError("bits per byte: not one byte of text to score: give more evaluation tokens or a fuller shard")
    return total_nats.item() / (math.log(2) * n_bytes)
