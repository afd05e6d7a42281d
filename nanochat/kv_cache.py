"""Keys and values of what each running request has read so far, so that a new token costs one position of work.

Shapes: R rows, B of them in a rectangle of T new positions each, N = all new positions of a forward, S slots, H query
heads, K kv heads, D head dim.
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


def allocate(like: torch.Tensor, n_rows: int, n_slots: int, kv_heads: int, head_dim: int) -> tuple[torch.Tensor, ...]:
    """Keys and values, (R, S, K, D), of zeros. In memory keys have their slots innermost and values their channels, as
    products with them want it (see `attention.attend_to_slots`)."""
    keys_RSKD = like.new_zeros(n_rows, kv_heads, head_dim, n_slots).permute(0, 3, 1, 2)
    return keys_RSKD, like.new_zeros(n_rows, kv_heads, n_slots, head_dim).transpose(1, 2)


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
        self.device, self.context, self.max_tokens, self.invariant = device, context, max_tokens, invariant
        self.last_token = torch.full((1,), -1, dtype=torch.int64, device=device)  # of each row; -1 = none yet
        self.layers: list[tuple[torch.Tensor, ...]] = []  # keys and values, (R, S, K, D)
        self._seen: tuple[tuple[int, ...], list[torch.Tensor]] = (), []
        self.n_rows, self.n_slots, self.version = 1, ROUND, 0  # version: how often memory has moved
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

    def copy_row(self, source: int, target: int, length: int) -> None:
        """Make row `target` equal to row `source` in its first `length` positions."""
        self.reserve(target + 1, length)
        self.last_token[target] = self.last_token[source]
        for layer, memory in enumerate(self.layers):
            n = self.ring(layer) or length
            for each_RSKD in memory:
                each_RSKD[target, :n] = each_RSKD[source, :n]

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

    def memory(self, layer: int, k: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """A layer's keys and values, (R, S, K, D), made if this is their first use, for keys like these (..., K, D)."""
        if layer == len(self.layers):
            n_slots = min(self.n_slots, self.ring(layer) or self.n_slots)
            self.layers.append(allocate(k, self.n_rows, n_slots, *k.shape[-2:]))
        return self.layers[layer]

    def write(
        self, layer: int, places: tuple[torch.Tensor, torch.Tensor], k: torch.Tensor, v: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        """Put keys and values (..., K, D) in a layer's (rows, slots), (...) each; returns all of it, (R, S, K, D)."""
        keys_RSKD, values_RSKD = self.memory(layer, k)
        keys_RSKD.index_put_(places, k)
        values_RSKD.index_put_(places, v)
        return keys_RSKD, values_RSKD

    def views(self, n_rows: int, length: int) -> list[torch.Tensor]:
        """The first rows, as far as `length` tokens reach: keys and values of each layer in turn, all in one list."""
        key = n_rows, _up(length), self.version
        if key != self._seen[0]:  # steps that follow share them
            self._seen = key, [each_RSKD[:n_rows, : key[1]] for memory in self.layers for each_RSKD in memory]
        return self._seen[1]

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
        kept = min(rows, self.n_rows)
        for layer, old in enumerate(self.layers):
            self.layers[layer] = allocate(old[0], rows, min(slots, self.ring(layer) or slots), *old[0].shape[2:])
            for each_RSKD, old_RSKD in zip(self.layers[layer], old, strict=True):
                common = min(each_RSKD.size(1), old_RSKD.size(1))
                each_RSKD[:kept, :common] = old_RSKD[:kept, :common]
        last_token = self.last_token.new_full((rows,), -1)
        last_token[:kept] = self.last_token[:kept]
        self.last_token, self.n_rows, self.n_slots, self.version = last_token, rows, slots, self.version + 1


class CacheRows:
    """Neighbouring rows of a KVCache that read equally many tokens: what a model sees of it in one forward."""

    def __init__(self, cache: KVCache, rows: slice, length: int) -> None:
        self._cache, self._rows, self._length = cache, rows, length
        self._row_B1 = torch.arange(rows.start, rows.stop, device=cache.device)[:, None]
        self.last_token_B = cache.last_token[rows]  # that each row read, int64; -1 before the first

    def update(
        self, layer: int, k_BTKD: torch.Tensor, v_BTKD: torch.Tensor, positions_BT: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write a layer's new keys and values at their positions (-1 = padding, lost); return all, (B, S, K, D), slot s
        being position s: not for layers that keep a ring. Views, nothing is copied out."""
        assert self._cache.ring(layer) is None, "a ring has no slot for each position: use CacheBatch"
        self._row_B1 = self._row_B1.to(k_BTKD.device)  # a layer's memory lies where the layer does
        memory = self._cache.write(layer, (self._row_B1, positions_BT), k_BTKD, v_BTKD)
        keys_BSKD, values_BSKD = (each_RSKD[self._rows, : _up(self._length)] for each_RSKD in memory)
        return keys_BSKD, values_BSKD

    def advance(self, idx_BT: torch.Tensor, positions_BT: torch.Tensor) -> None:
        """Note the last token of each row that was read; padding, where there is any, stands at the end of a row."""
        n_read_B1 = (positions_BT >= 0).sum(dim=1, keepdim=True)
        last_B = idx_BT.gather(1, (n_read_B1 - 1).clamp(min=0))[:, 0]
        self.last_token_B.copy_(torch.where(n_read_B1[:, 0] > 0, last_B, self.last_token_B))


class Part(NamedTuple):
    """`n_rows` neighbouring rows that read `n_tokens` each, none past position `length` - 1. Where n_rows is -1 it
    is all rows and slots that there are: a trace leaves open how many."""

    first_row: int
    n_rows: int
    n_tokens: int
    length: int

    def of(self, each_RSKD: torch.Tensor) -> torch.Tensor:
        """What a layer keeps of these rows, as far as they reach."""
        return each_RSKD if self.n_rows < 0 else each_RSKD[self.first_row :][: self.n_rows, : _up(self.length)]


class CacheBatch:
    """Rows of a KVCache that read unequally many tokens in one forward, flat: part after part, row after row in it.

    rows_N, positions_N: where each token goes, with room made by `KVCache.reserve`; along a row positions count up.
    """

    def __init__(self, cache: KVCache, parts: Sequence[Part], rows_N: torch.Tensor, positions_N: torch.Tensor) -> None:
        self._cache, self.parts, self._rows_N, self._positions_N = cache, parts, rows_N, positions_N
        # slots of the new tokens, and of each part what its queries see, for layers that look the same way back
        self._seen: dict[tuple[int | None, int], tuple[torch.Tensor, list[torch.Tensor]]] = {}

    def attend(self, layer: int, q_NHD: torch.Tensor, k_NKD: torch.Tensor, v_NKD: torch.Tensor) -> torch.Tensor:
        """Write new keys and values, and have the queries attend to all that their layer's window shows of their rows.

        Queries and keys come with attention's scale in them. Returns (N, H·D).
        """
        cache, (H, D) = self._cache, map(int, q_NHD.shape[1:])
        looks = cache.ring(layer), cache.windows[layer]
        memory = cache.memory(layer, k_NKD)
        if looks not in self._seen:
            self._seen[looks] = self._look(*looks, memory[0], H // int(k_NKD.size(1)))
        slots_N, masks = self._seen[looks]
        cache.write(layer, (self._rows_N, slots_N), k_NKD, v_NKD)
        outputs = []
        for part, q, mask_B1MS in zip(self.parts, self._split(q_NHD), masks, strict=True):
            q_BTHD = q.view(part.n_rows, part.n_tokens, H, D)
            k, v = map(part.of, memory)
            y_BTHD = attention.attend_to_slots(q_BTHD, k, v, mask_B1MS, 1.0, None, cache.invariant)
            outputs.append(y_BTHD.reshape(-1, H * D))
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)

    def _split(self, each_N: torch.Tensor) -> Sequence[torch.Tensor]:
        return each_N.split([part.n_rows * part.n_tokens for part in self.parts]) if len(self.parts) > 1 else [each_N]

    def _look(
        self, ring: int | None, window: int, keys_RSKD: torch.Tensor, group: int
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Where layers with this ring write the new positions, and the mask of what each part's queries see."""
        masks = []
        for part, positions in zip(self.parts, self._split(self._positions_N), strict=True):
            positions_BT1 = positions.view(part.n_rows, part.n_tokens, 1)
            S = part.of(keys_RSKD).size(1)
            held_BTS = torch.arange(S, device=positions.device)  # the position that each slot holds
            if ring is not None and part.length > ring:
                newest_B11 = positions_BT1[:, -1:]
                held_BTS = newest_B11 - (newest_B11 - held_BTS) % ring
            hidden_BTS = held_BTS > positions_BT1
            if window < part.length:
                hidden_BTS = hidden_BTS | (held_BTS <= positions_BT1 - window)
            if ring is not None:
                hidden_BTS = hidden_BTS | (held_BTS < 0)
            masks.append(attention.mask(hidden_BTS, group, keys_RSKD.dtype, self._cache.invariant))
        return self._positions_N if ring is None else self._positions_N % ring, masks
