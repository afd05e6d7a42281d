"""What the open-weights families share: checked reading of config.json, and the base class of their models.

Each family is a file, as in mlx-lm: its config, its modules, and how the tensors in its files are named. A family gives
`hidden`, from tokens to the last norm; `OpenModel.forward` makes logits or a loss of that. Modules have the names that
they have in the files, so that most weights find their place without a table. At the top these are, in every family:

    embed_tokens     tokens in; the first device, where layers are spread over several
    layers           blocks, each with all of its weights on one device
    norm, lm_head    the last norm and the head; where the head is the embedding, `lm_head.weight` is its weight, too

Shapes as in gpt.py: B sequences, T positions, C channels, H query heads, K kv heads, D head dim, V vocabulary.
"""

from typing import Any

import torch
import torch.nn as nn

from nanochat import attention
from nanochat.language_model import LanguageModel, Linear, WholeRows
from nanochat.loss import softcap_cross_entropy


class Settings:
    """A config.json whose values are checked as they are read; null counts as absent.

    Raises ValueError that names the value when it is missing, of another kind or out of range.
    """

    def __init__(self, values: dict[str, Any], where: str = "config.json") -> None:
        if not isinstance(values, dict):
            raise ValueError(f"{where} must hold an object, not {type(values).__name__}")
        self.values = {name: value for name, value in values.items() if value is not None}
        self.where = where

    def _read(self, name: str, kinds: tuple[type, ...], what: str, default: Any) -> Any:
        value = self.values.get(name, default)
        if value is None:
            raise ValueError(f"{self.where} lacks '{name}'")
        is_number_for_python = isinstance(value, bool) and bool not in kinds  # True == 1 there
        if not isinstance(value, kinds) or is_number_for_python:
            raise ValueError(f"{self.where}: '{name}' must be {what}, not {value!r:.40}")
        return value

    def integer(self, name: str, default: int | None = None, low: int = 1, high: int = 1 << 28) -> int:
        """Return a whole number from `low` to `high`."""
        value = self._read(name, (int,), "a whole number", default)
        if not low <= value <= high:
            raise ValueError(f"{self.where}: '{name}' is {value!r:.40}, which is not from {low} to {high}")
        return value

    def number(self, name: str, default: float | None = None, low: float = 0.0) -> float:
        """Return a finite number above `low`."""
        value = self._read(name, (int, float), "a number", default)
        if not low < value < 1e30:
            raise ValueError(f"{self.where}: '{name}' is {value!r:.40}, which is not a number above {low:g}")
        return float(value)

    def flag(self, name: str, default: bool = False) -> bool:
        """Return true or false."""
        return self._read(name, (bool,), "true or false", default)

    def expect(self, name: str, *known: Any) -> None:
        """Refuse any value but `known`, of which the first is the default: others mean other maths."""
        value = self.values.get(name, known[0])
        if value not in known:
            raise ValueError(f"{self.where}: '{name}' {value!r:.40} is not supported, only {known[0]!r}")

    def rope(self) -> "Settings":
        """Return the settings of rotary positions, which older files call `rope_scaling`; without any, none."""
        name = "rope_parameters" if self.values.get("rope_parameters") else "rope_scaling"
        return Settings(self.values.get(name, {}), f"{self.where}: {name}")


def attend_whole(
    q_BTHD: torch.Tensor, k_BTKD: torch.Tensor, v_BTKD: torch.Tensor, window: int, sinks_H: torch.Tensor | None = None
) -> torch.Tensor:
    """Attend in rows that are read whole: by the plain kernel of the device, or with sinks by the definition."""
    if sinks_H is None:
        return attention.attend(q_BTHD, k_BTKD, v_BTKD, window)
    return attention.attend_naive(q_BTHD, k_BTKD, v_BTKD, window, sinks_H)


def bring(device: torch.device, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Return `tensors`, which lie together, on the device of the next layer."""
    if tensors[0].device == device:  # `.to` would do nothing, but each call would be an operation in cpu_trace.py
        return tensors
    return tuple(tensor.to(device) for tensor in tensors)


class OpenModel(LanguageModel):
    """A model of any family. It holds no values until `hf/load.py` fills it."""

    config_type: Any  # its `from_json` reads config.json
    embed_tokens: nn.Embedding
    layers: Any
    norm: Any
    lm_head: Linear
    readout: Any  # Together((lm_head,)), made by the family, since prepacking replaces it

    @staticmethod
    def rename(name: str) -> str | None:
        """Return the model's name of a tensor in a file; None = not needed."""
        raise NotImplementedError

    @staticmethod
    def is_transposed(name: str) -> bool:
        """Return whether files hold the matrix of this name, the model's, as (inputs, outputs)."""
        return False

    def hidden(self, idx: torch.Tensor, context: Any) -> torch.Tensor:
        """Return the normed residual that the head reads, (..., C), of tokens (B, T) or (N) in their context."""
        raise NotImplementedError

    def tie_head(self) -> None:
        """Let the head use the embedding's weight, if config.json says that the two are tied."""
        if self.config.tied:
            self.lm_head.weight = self.embed_tokens.weight

    def layer_of(self, name: str) -> int:
        """Return the layer beside which a parameter belongs when layers are spread over devices.

        Tokens come in at the first layer and leave after the last. A tied head pulls the norm back to the first, where
        the embedding is."""
        if name.startswith("layers."):
            return int(name.split(".")[1])
        is_output = name.startswith(("norm.", "lm_head."))
        return self.config.n_layer - 1 if is_output and not self.config.tied else 0

    @property
    def device(self) -> torch.device:
        """The device where tokens come in."""
        return self.embed_tokens.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of weights and activations."""
        return self.embed_tokens.weight.dtype

    @property
    def whole(self) -> bool:
        """Return whether all weights are plain tensors on one device; not so after `hf/parallel.py`."""
        return len({(type(p), p.device) for p in self.parameters()}) == 1

    @property
    def graphs(self) -> bool:
        """Return whether decoding may be replayed as a CUDA graph."""
        return self.whole

    def forward(
        self,
        idx: torch.Tensor,
        targets: torch.Tensor | None = None,
        *,
        loss_reduction: str = "mean",
        context: Any = None,
        wanted_R: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return logits in fp32, or with targets the loss in nats; the arguments are those of `gpt.GPT.forward`."""
        x_C = self.hidden(idx, context or WholeRows(idx, attend_whole, self.config.sequence_len))
        if targets is not None:
            return softcap_cross_entropy(x_C, self.lm_head.weight, targets, 0.0, loss_reduction)
        if wanted_R is not None:
            x_C = x_C[wanted_R.to(x_C.device)]
        (logits_V,) = self.readout(x_C)
        return logits_V.float()
