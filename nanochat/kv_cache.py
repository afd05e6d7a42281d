"""Keys and values of what each running request has read so far, so that a new token costs one position of work.

Shapes: B rows of this forward, T new positions, S slots, K kv heads, D head dim.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch

from nanochat import attention

ROUND = 128  # slots are read in multiples of it, for the order of attention's sums


class LayerNeed(NamedTuple):
    """What one layer of a model keeps of each position, and how many positions, its own included, it looks back."""

    kv_heads: int
    head_dim: int
    window: int


def _up(n: int) -> int:
    return -(-n // ROUND) * ROUND


class KVCache:
    """One row a request. Slot s of a row holds its position s; layers with a window keep a ring, in which slot s holds
    the newest position p with p % ring = s. Rows are equally long, as long as the longest needs, by doubling.

    A layer's memory is made on its first write, in the shape and dtype of what is written. `needs` has to be known for
    rings alone, which have room for a window and `chunk` positions more, the most that one forward may add. max_tokens:
    rows times slots, at most. invariant: see `attention.attend_to_slots`.
    """

    def __init__(
        self,
        device: torch.device,
        needs: Sequence[LayerNeed] = (),
        context: int | None = None,
        chunk: int = ROUND,
        max_tokens: int | None = None,
        invariant: bool = True,
    ) -> None:
        self.last_token = torch.full((1,), -1, dtype=torch.int64, device=device)  # of each row; -1 = none yet
        self.layers: list[tuple[torch.Tensor, torch.Tensor]] = []  # keys (rows, K, D, S) and values (rows, K, S, D)
        self.n_rows, self.n_slots, self.version = 1, ROUND, 0  # version: how often memory has moved
        self.context, self.max_tokens, self.invariant = context, max_tokens, invariant
        self.windows = [need.window for need in needs]
        rings = [_up(window + chunk) for window in self.windows]
        self.rings = [None if context is None or ring >= context else ring for ring in rings]

    def fits(self, sizes: Sequence[int]) -> bool:
        """Whether rows of so many tokens may be held at the same time."""
        return self.max_tokens is None or len(sizes) * self._length(max(sizes, default=0)) <= self.max_tokens

    def rows(self, start: int, stop: int, length: int) -> "CacheRows":
        """Rows start..stop-1 with their first `length` slots, as the `cache` argument of one model forward."""
        self.reserve(stop, length)
        return CacheRows(self, slice(start, stop), length)

    def clear_row(self, row: int) -> None:
        """Let a new sequence begin in `row`. Its old keys stay until overwritten: no query looks past its position."""
        self.reserve(row + 1, 1)
        self.last_token[row] = -1

    def copy_row(self, source: int, target: int, length: int) -> None:
        """Make row `target` equal to row `source` in its first `length` positions."""
        self.reserve(target + 1, length)
        self.last_token[target] = self.last_token[source]
        for layer, (keys, values) in enumerate(self.layers):
            n = length if self.ring(layer) is None else keys.size(-1)
            keys[target, :, :, :n] = keys[source, :, :, :n]
            values[target, :, :n] = values[source, :, :n]

    def rewinds(self, read: int, length: int) -> bool:
        """Whether a row that has read so many tokens still holds what its first `length` alone would have left."""
        lost = (ring - window for ring, window in zip(self.rings, self.windows) if ring is not None)
        return read - length <= min(lost, default=read)

    def ring(self, layer: int) -> int | None:
        """The ring's size in a layer that keeps one, else None."""
        return self.rings[layer] if layer < len(self.rings) else None

    def slots(self, layer: int, positions: torch.Tensor) -> torch.Tensor:
        """Where a layer keeps these positions."""
        ring = self.ring(layer)
        return positions if ring is None else positions % ring

    def memory(self, layer: int, k_BTKD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """A layer's keys and values, made if this is their first use, in the shape and dtype of these new keys."""
        if layer == len(self.layers):
            n_slots = min(self.n_slots, self.ring(layer) or self.n_slots)
            K, D = k_BTKD.shape[2:]
            shapes = (self.n_rows, K, D, n_slots), (self.n_rows, K, n_slots, D)
            self.layers.append((k_BTKD.new_zeros(shapes[0]), k_BTKD.new_zeros(shapes[1])))
        return self.layers[layer]

    def _length(self, size: int) -> int:
        """Slots of rows that hold `size` tokens: a power of two, at most the context, with one that nobody reads, as
        padding is written to position -1, the last slot."""
        slots = max(ROUND, 1 << size.bit_length())
        return slots if self.context is None else min(slots, _up(self.context + 1))

    def reserve(self, n_rows: int, size: int) -> None:
        """Make room for so many rows, the longest of `size` tokens; what is held stays. Memory doubles as needed, up to
        `max_tokens`, where longer rows mean fewer."""
        slots = self._length(size)
        if n_rows <= self.n_rows and slots <= self.n_slots:
            return
        rows, slots = self.n_rows, max(self.n_slots, slots)
        if n_rows > rows:
            rows = max(n_rows, 2 * rows)
        if self.max_tokens is not None and rows * slots > self.max_tokens:
            slots = slots if n_rows * slots <= self.max_tokens else self._length(size)
            rows = max(n_rows, self.max_tokens // slots)
        kept = slice(min(rows, self.n_rows))

        def recut(old: torch.Tensor, dim: int, ring: int | None) -> torch.Tensor:
            shape = list(old.shape)
            shape[0], shape[dim] = rows, min(slots, ring or slots)
            new, common = old.new_zeros(shape), min(shape[dim], old.size(dim))
            new[kept].narrow(dim, 0, common).copy_(old[kept].narrow(dim, 0, common))
            return new

        for layer, (keys, values) in enumerate(self.layers):
            self.layers[layer] = (recut(keys, 3, self.ring(layer)), recut(values, 2, self.ring(layer)))
        last_token = self.last_token.new_full((rows,), -1)
        last_token[kept] = self.last_token[kept]
        self.last_token, self.n_rows, self.n_slots, self.version = last_token, rows, slots, self.version + 1


class CacheRows:
    """Neighbouring rows of a KVCache: what the model sees of it in one forward."""

    def __init__(self, cache: KVCache, rows: slice, length: int) -> None:
        self._cache, self._rows, self._length = cache, rows, length
        self._row_B1 = torch.arange(rows.start, rows.stop, device=cache.last_token.device)[:, None]
        self._seen: dict[tuple[int | None, int], tuple[torch.Tensor, torch.Tensor]] = {}

    @property
    def last_token_B(self) -> torch.Tensor:
        """The token each row read last, (B,) int64; -1 before the first."""
        return self._cache.last_token[self._rows]

    def update(
        self, layer: int, k_BTKD: torch.Tensor, v_BTKD: torch.Tensor, positions_BT: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write a layer's new keys and values at their positions (-1 = padding, lost); return all, (B, S, K, D), slot s
        being position s: not for layers that keep a ring. Views, nothing is copied out."""
        assert self._cache.ring(layer) is None, "a ring has no slot for each position: use `attend`"
        keys, values = self._write(layer, k_BTKD, v_BTKD, positions_BT)
        S = _up(self._length)
        return keys[..., :S].permute(0, 3, 1, 2), values[:, :, :S].transpose(1, 2)

    def attend(
        self,
        layer: int,
        q_BTHD: torch.Tensor,
        k_BTKD: torch.Tensor,
        v_BTKD: torch.Tensor,
        positions_BT: torch.Tensor,
        scale: float | None = None,
        sinks_H: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Write new keys and values, and have the queries attend to all that their layer's window shows of their rows.

        Returns (B, T, H, D). positions_BT, the same for all layers of a forward, counts up along a row.
        """
        cache = self._cache
        ring, window = cache.ring(layer), cache.windows[layer]
        if (ring, window) not in self._seen:
            self._seen[ring, window] = self._look(ring, window, positions_BT)
        slots_BT, mask_BTS = self._seen[ring, window]
        keys, values = self._write(layer, k_BTKD, v_BTKD, slots_BT)
        S, scale = mask_BTS.size(-1), scale or q_BTHD.size(3) ** -0.5
        settings = mask_BTS, scale, sinks_H, cache.invariant
        return attention.attend_to_slots(q_BTHD, keys[..., :S], values[:, :, :S], *settings)

    def advance(self, idx_BT: torch.Tensor, positions_BT: torch.Tensor) -> None:
        """Note the last token of each row that was read; padding, where there is any, stands at the end of a row."""
        n_read_B1 = (positions_BT >= 0).sum(dim=1, keepdim=True)
        last_B = idx_BT.gather(1, (n_read_B1 - 1).clamp(min=0))[:, 0]
        self.last_token_B.copy_(torch.where(n_read_B1[:, 0] > 0, last_B, self.last_token_B))

    def _write(self, layer: int, k_BTKD: torch.Tensor, v_BTKD: torch.Tensor, slots_BT: torch.Tensor):
        keys, values = self._cache.memory(layer, k_BTKD)
        keys[self._row_B1, :, :, slots_BT] = k_BTKD
        values[self._row_B1, :, slots_BT] = v_BTKD
        return keys[self._rows], values[self._rows]

    def _look(self, ring: int | None, window: int, positions_BT: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Where layers with this ring write the new positions, and the mask of what their queries see, (B, T, S)."""
        S = min(_up(self._length), ring or self._cache.n_slots)
        held_BS = torch.arange(S, device=positions_BT.device)[None]  # the position that each slot holds
        if ring is not None and self._length > ring:
            newest_B1 = positions_BT[:, -1:]
            held_BS = newest_B1 - (newest_B1 - held_BS) % ring
        distance_BTS = positions_BT[:, :, None] - held_BS[:, None]
        hidden_BTS = (distance_BTS < 0) | (distance_BTS >= window)
        if ring is None:
            return positions_BT, attention.mask(hidden_BTS)
        return positions_BT % ring, attention.mask(hidden_BTS | (held_BS[:, None] < 0))
