"""What the open-weights families share: checked reading of config.json, rotary frequencies, attention, devices.

Shapes as in gpt.py: B sequences, T positions, C channels, H query heads, K kv heads, D head dim, V vocabulary.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F

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
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            raise ValueError(f"{self.where}: '{name}' must be {what}, not {value!r:.40}")
        return value

    def integer(self, name: str, default: int | None = None, low: int = 1, high: int = 1 << 28) -> int:
        """A whole number from `low` to `high`."""
        value = self._read(name, (int,), "a whole number", default)
        if not low <= value <= high:
            raise ValueError(f"{self.where}: '{name}' is {value!r:.40}, which is not from {low} to {high}")
        return value

    def number(self, name: str, default: float | None = None, low: float = 0.0) -> float:
        """A finite number above `low`."""
        value = self._read(name, (int, float), "a number", default)
        if not low < value < 1e30:
            raise ValueError(f"{self.where}: '{name}' is {value!r:.40}, which is not a number above {low:g}")
        return float(value)

    def flag(self, name: str, default: bool = False) -> bool:
        """true or false."""
        return self._read(name, (bool,), "true or false", default)

    def expect(self, name: str, *known: Any) -> None:
        """Refuse any value but `known`, of which the first is the default: others mean other maths."""
        value = self.values.get(name, known[0])
        if value not in known:
            raise ValueError(f"{self.where}: '{name}' {value!r:.40} is not supported, only {known[0]!r}")

    def windows(self, layers: int, context: int, fallback: Callable[[int], bool]) -> tuple[int, ...]:
        """Positions each layer attends to, its own included, from `layer_types`, else sliding where `fallback` says."""
        kinds = self.values.get("layer_types")
        if kinds is None:
            kinds = ["sliding_attention" if fallback(layer) else "full_attention" for layer in range(layers)]
        if not isinstance(kinds, list) or len(kinds) != layers:
            raise ValueError(f"{self.where}: 'layer_types' must name the kind of each of the {layers} layers")
        if wrong := next((kind for kind in kinds if kind not in ("sliding_attention", "full_attention")), None):
            raise ValueError(f"{self.where}: layer type {wrong!r:.40} is not supported")
        window = min(self.integer("sliding_window"), context) if "sliding_attention" in kinds else context
        return tuple(window if kind == "sliding_attention" else context for kind in kinds)


def rotary_frequencies(settings: Settings, head_dim: int, theta: float) -> tuple[tuple[float, ...], float]:
    """Return radians per position for each of the D/2 planes, and the factor on cos and sin, as config.json says.

    Both spellings are read: `rope_parameters`, and `rope_theta` beside `rope_scaling`. theta: the family's default.
    Kinds: default; linear (positions / factor); llama3 (long waves only, meta-llama/llama-models); yarn
    (arXiv 2309.00071); others raise ValueError.
    """
    values = settings.values.get("rope_parameters") or settings.values.get("rope_scaling") or {}
    rope = Settings(values, f"{settings.where}: rope_parameters")
    theta = rope.number("rope_theta", settings.number("rope_theta", theta), low=1.0)
    kind = rope.values.get("rope_type") or rope.values.get("type") or "default"
    rope.expect("partial_rotary_factor", 1.0)
    if head_dim % 2:
        raise ValueError(f"{settings.where}: heads of {head_dim} channels cannot be rotated in pairs")
    plain = 1.0 / theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32, device="cpu") / head_dim)
    if kind == "default":
        return tuple(plain.tolist()), 1.0
    if kind not in ("linear", "llama3", "yarn"):
        raise ValueError(f"{settings.where}: rotary positions of kind {kind!r:.40} are not supported")
    factor = rope.number("factor")
    if kind == "linear":
        return tuple((plain / factor).tolist()), 1.0
    original = rope.integer("original_max_position_embeddings", settings.values.get("max_position_embeddings"))
    if kind == "llama3":
        low = rope.number("low_freq_factor")
        high = rope.number("high_freq_factor", low=low)
        turns = original * plain / (2 * math.pi)  # in the original context
        kept = ((turns - low) / (high - low)).clamp(0, 1)
        return tuple((plain * kept + plain / factor * (1 - kept)).tolist()), 1.0

    def plane(turns: float) -> float:
        """Return the place in 0..D/2 of the plane that makes so many turns over the original context."""
        return head_dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(theta))

    first, last = plane(rope.number("beta_fast", 32.0)), plane(rope.number("beta_slow", 1.0))
    if rope.flag("truncate", True):
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, head_dim - 1)
    last += 0.001 if first == last else 0
    slow = ((torch.arange(head_dim // 2, dtype=torch.float32, device="cpu") - first) / (last - first)).clamp(0, 1)
    rope.expect("mscale", None)
    rope.expect("mscale_all_dim", None)
    scale = rope.number("attention_factor", 0.1 * math.log(factor) + 1 if factor > 1 else 1.0)
    return tuple((plain / factor * slow + plain * (1 - slow)).tolist()), scale


def attend_whole(
    q_BTHD: torch.Tensor, k_BTKD: torch.Tensor, v_BTKD: torch.Tensor, window: int, sinks_H: torch.Tensor | None = None
) -> torch.Tensor:
    """Attention in rows that are read whole: by the fastest kernel, or with windows or sinks by the definition."""
    if sinks_H is None and window >= q_BTHD.size(1):
        _, fastest = attention.choose(q_BTHD.device, q_BTHD.dtype, q_BTHD.size(3), False)
        return fastest(q_BTHD, k_BTKD, v_BTKD, window)
    positions_1T = torch.arange(q_BTHD.size(1), device=q_BTHD.device)[None]
    return attention.cached_attention(q_BTHD, k_BTKD, v_BTKD, positions_1T, window, sinks_H)


def bring(norm: Any, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Return `tensors` on the device of a layer, which its first norm shows; they move once, where devices change."""
    home = norm.weight.device
    return tensors if tensors[0].device == home else tuple(each.to(home) for each in tensors)


class OpenModel(LanguageModel):
    """A model of any family, over its `stack`; its parameters have the names that they have in the family's files."""

    config_type: Any  # its `from_json` reads config.json
    stack: tuple[list[Any], nn.ModuleList, nn.Module]  # what reads the tokens, embedding first; layers; the last norm
    readout: Any  # Together((head,))
    lm_head: Linear | None  # None: the embedding is the head, too

    @staticmethod
    def rename(name: str) -> str | None:
        """Return the model's name of a tensor in a file; None = not needed."""
        raise NotImplementedError

    @property
    def parts(self) -> list[nn.ModuleList]:
        """The model cut into as many parts as it has layers, which may lie on several devices."""
        inputs, layers, norm = self.stack
        parts = [nn.ModuleList([layer]) for layer in layers]
        parts[0].extend(inputs)
        parts[-1 if self.lm_head else 0].extend(filter(None, (norm, self.lm_head)))
        return parts

    @property
    def head_weight(self) -> torch.Tensor:
        """The matrix that gives the logits, (V, C)."""
        return (self.lm_head or self.stack[0][0]).weight

    @property
    def device(self) -> torch.device:
        """The device where tokens come in."""
        return self.stack[0][0].weight.device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of weights and activations."""
        return self.stack[0][0].weight.dtype

    @property
    def whole(self) -> bool:
        """Return whether all weights are plain tensors on one device; not so after `hf/parallel.py`."""
        return len({(type(p), p.device) for p in self.parameters()}) == 1

    @property
    def graphs(self) -> bool:
        """Return whether decoding may be replayed as a CUDA graph."""
        return self.whole

    def whole_rows(self, idx_BT: torch.Tensor) -> WholeRows:
        """Return the context of rows that are read from their first token on."""
        return WholeRows(idx_BT, attend_whole, self.config.sequence_len)

    def predict(
        self, x_C: torch.Tensor, targets: torch.Tensor | None, loss_reduction: str, wanted_R: torch.Tensor | None
    ) -> torch.Tensor:
        """Return logits in fp32, or with targets the loss, of the normed residual: the end of each family's forward."""
        if targets is not None:
            return softcap_cross_entropy(x_C, self.head_weight, targets, 0.0, loss_reduction)
        if wanted_R is not None:
            x_C = x_C[wanted_R.to(x_C.device)]
        (logits_V,) = self.readout(x_C)
        return logits_V.float()


class TiedHead:
    """The embedding, used as the head."""

    bias = None

    def __init__(self, embedding: nn.Embedding) -> None:
        self.embedding = embedding

    @property
    def matrix_OC(self) -> torch.Tensor:
        """The matrix as (outputs, inputs)."""
        return self.embedding.weight

    def __call__(self, x_C: torch.Tensor) -> torch.Tensor:
        return F.linear(x_C, self.embedding.weight)
