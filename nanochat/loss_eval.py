"""How well a model predicts text: bits per byte, nats per token and perplexity.

A model with a larger vocabulary predicts fewer, longer tokens, so losses per token compare models of one tokenizer
alone. Divided by the bytes of text that the targets stand for, they compare whatever the tokenizers.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch

from nanochat.compute import Compute
from nanochat.loss import IGNORED


@dataclass(frozen=True)
class TextLoss:
    """How well a model predicts a text."""

    bits_per_byte: float
    nats_per_token: float  # the mean that training minimises

    @property
    def perplexity(self) -> float:
        """e to the loss: the model is as unsure as if it chose among so many equally likely tokens."""
        return math.exp(min(self.nats_per_token, 700.0))  # e^710 is more than a float holds


@torch.no_grad()
def evaluate_loss(
    model: Callable[..., torch.Tensor],
    batches: Iterable[tuple[torch.Tensor, torch.Tensor]],
    token_bytes: Sequence[int] | torch.Tensor,
    compute: Compute | None = None,
) -> TextLoss:
    """Return the loss of `model` on all batches of all ranks.

    batches: (inputs_BT, targets_BT) pairs; IGNORED targets are not counted. Ranks may have unequally many batches.
    token_bytes: bytes of each token id. Special tokens have 0: bits per byte leave their loss out, nats per token count
    it, as training does. Raises ValueError when no byte was scored.
    """
    device = torch.device("cpu") if compute is None else compute.device
    # Sums are added up before they are divided: a mean then does not depend on how the text is divided into batches and
    # ranks. The sums outgrow float32's 24 bits, but MPS has nothing wider.
    sum_dtype = torch.float32 if device.type == "mps" else torch.float64
    sums_4 = torch.zeros(4, dtype=sum_dtype, device=device)  # nats and bytes of text; nats and number of all tokens
    bytes_V = torch.as_tensor(token_bytes)
    for inputs_BT, targets_BT in batches:
        bytes_V = bytes_V.to(targets_BT.device)
        counts_BT = targets_BT > IGNORED
        nats_BT = model(inputs_BT, targets_BT, loss_reduction="none").view_as(targets_BT)
        nats_BT = torch.where(counts_BT, nats_BT, 0.0)
        bytes_BT = torch.where(counts_BT, bytes_V[targets_BT.clamp(min=0)], 0)
        parts = [
            torch.where(bytes_BT > 0, nats_BT, 0.0).sum(dtype=sum_dtype),
            bytes_BT.sum(),
            nats_BT.sum(dtype=sum_dtype),
            counts_BT.sum(),
        ]
        sums_4 += torch.stack([part.to(sum_dtype) for part in parts]).to(device)
    if compute is not None:
        compute.all_reduce_sum(sums_4)
    text_nats, n_bytes, nats, n_tokens = sums_4.tolist()
    if n_bytes == 0:
        raise ValueError("bits per byte: not one byte of text to score: give more evaluation tokens or a fuller shard")
    return TextLoss(bits_per_byte=text_nats / (math.log(2) * n_bytes), nats_per_token=nats / n_tokens)
