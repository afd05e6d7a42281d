"""The context of one forward of the engine: it writes new keys and values to the KV cache, and attends to its rows.

The engine describes the new tokens of a step by a `CacheBatch` and runs the model, which asks `CacheBatch.layer` for
the attention of each layer. Neighbouring rows that read equally many tokens form a part, and attend together.

Shapes: B rows of a part, T new positions of each, N = all new positions of a forward, S slots, H query heads, K kv
heads, D head dim, G = B·K.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch

from nanochat.cached_attention import attend_fused, attend_to_slots, slot_mask
from nanochat.kv_cache import LayerCache


class Part(NamedTuple):
    """`n_rows` neighbouring rows that read `n_tokens` each, none past position `length` - 1."""

    first_row: int
    n_rows: int
    n_tokens: int
    length: int


class LayerPlan(NamedTuple):
    """The row and slot of each new token, and for each part its `slot_mask`: -inf at slots hidden from a query."""

    rows_N: torch.Tensor
    slots_N: torch.Tensor
    masks: list[torch.Tensor]


class CacheBatch:
    """The context of one forward over new tokens of many rows (see language_model.py): part after part, row after row.

    rows_N, positions_N: where each token goes, with room made by `KVCache.reserve`; positions count up along a row.
    previous_N: the token before each, -1 before the first of a row.
    """

    def __init__(
        self,
        layers: Sequence[LayerCache],
        parts: Sequence[Part],
        rows_N: torch.Tensor,
        positions_N: torch.Tensor,
        previous_N: torch.Tensor,
    ) -> None:
        self.layers = layers
        self.parts = parts
        self.rows_N = rows_N
        self.positions = positions_N
        self.previous_N = previous_N
        # Layers with the same ring, window and device share one plan, so it is made once per forward.
        self._plans: dict[tuple[int | None, int, torch.device], LayerPlan] = {}

    def layer(self, layer: int) -> functools.partial[torch.Tensor]:
        """Return attend(q, k, v, window) of a layer."""
        return functools.partial(self._attend, self.layers[layer])

    def _attend(
        self,
        layer: LayerCache,
        q_NHD: torch.Tensor,
        k_NKD: torch.Tensor,
        v_NKD: torch.Tensor,
        window: int,
        sinks_H: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Write new keys and values, and attend to all that the window shows of each row; return (N, H, D)."""
        kind = (layer.ring, window, q_NHD.device)
        if kind not in self._plans:
            group = int(q_NHD.size(1)) // int(k_NKD.size(1))
            self._plans[kind] = self._plan(layer, window, group, q_NHD)
        plan = self._plans[kind]
        # New tokens attend to themselves, so they are written first.
        layer.write(plan.rows_N, plan.slots_N, k_NKD, v_NKD)
        outputs = []
        for part, q_part, mask in zip(self.parts, self._split(q_NHD), plan.masks, strict=True):
            q_BTHD = q_part.unflatten(0, (part.n_rows, part.n_tokens))
            keys_GDS, values_GSD = layer.views(part.first_row, part.n_rows, part.length)
            if q_NHD.device.type == "cuda" and part.n_tokens > 1 and sinks_H is None:
                y_BTHD = attend_fused(q_BTHD, keys_GDS, values_GSD, mask)
            else:
                y_BTHD = attend_to_slots(q_BTHD, keys_GDS, values_GSD, mask, sinks_H)
            outputs.append(y_BTHD.flatten(0, 1))
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)

    def _split(self, x_N: torch.Tensor) -> Sequence[torch.Tensor]:
        """Cut a tensor of all new tokens into one tensor per part."""
        if len(self.parts) == 1:
            return [x_N]
        return x_N.split([part.n_rows * part.n_tokens for part in self.parts])

    def _plan(self, layer: LayerCache, window: int, group: int, like: torch.Tensor) -> LayerPlan:
        """Return where a layer writes the new tokens, and a mask for each part.

        A query sees a slot if the position that the slot holds is not after its own and inside its window.
        """
        positions_N = self.positions.to(like.device)
        masks = []
        for part, positions in zip(self.parts, self._split(positions_N), strict=True):
            positions_BT1 = positions.view(part.n_rows, part.n_tokens, 1)
            slots_S = torch.arange(layer.n_visible(part.length), device=like.device)
            held_BTS = slots_S.view(1, 1, -1)  # the position that each slot holds: slot s holds position s
            if layer.ring is not None and part.length > layer.ring:
                # But where the ring has wrapped, slot s holds the newest position p with p % ring = s.
                newest_B11 = positions_BT1[:, -1:]
                held_BTS = newest_B11 - (newest_B11 - slots_S) % layer.ring
            hidden_BTS = held_BTS > positions_BT1  # causal
            if window < part.length:  # otherwise no position is outside of the window
                hidden_BTS = hidden_BTS | (held_BTS <= positions_BT1 - window)
            if layer.ring is not None:
                # The formula gives a negative position for a slot that a shorter row has not written yet.
                hidden_BTS = hidden_BTS | (held_BTS < 0)
            masks.append(slot_mask(hidden_BTS, group, like.dtype))
        return LayerPlan(rows_N=self.rows_N.to(like.device), slots_N=layer.slots(positions_N), masks=masks)
