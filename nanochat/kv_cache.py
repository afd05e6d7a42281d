"""Keys and values of what each running request has read so far, so that a new token costs one position of work.

Shapes: B rows of this forward, T new positions, S slots, K kv heads, D head dim.
"""

import torch


class KVCache:
    """One row a request; slot s of a row holds its position s. Rows and slots are added by doubling, as needed.

    A layer's memory is made on its first write, in the shape and dtype of what is written: the cache needs to know
    nothing about the model.
    """

    def __init__(self, device: torch.device) -> None:
        self.last_token = torch.full((1,), -1, dtype=torch.int64, device=device)  # of each row; -1 = none yet
        self.layers: list[tuple[torch.Tensor, torch.Tensor]] = []  # keys and values, (rows, slots, K, D)
        self.n_rows, self.n_slots = 1, 64

    def rows(self, start: int, stop: int, length: int) -> "CacheRows":
        """Rows start..stop-1 with their first `length` slots, as the `cache` argument of one model forward."""
        # one slot more than anyone reads: padding is written to position -1, which is the last slot
        self._reserve(stop, length + 1)
        return CacheRows(self, slice(start, stop), length)

    def clear_row(self, row: int) -> None:
        """Let a new sequence begin in `row`. Its old keys stay until overwritten: no query looks past its position."""
        self._reserve(row + 1, 1)
        self.last_token[row] = -1

    def copy_row(self, source: int, target: int, length: int) -> None:
        """Make row `target` equal to row `source` in its first `length` positions."""
        self._reserve(target + 1, length + 1)
        self.last_token[target] = self.last_token[source]
        for keys, values in self.layers:
            keys[target, :length] = keys[source, :length]
            values[target, :length] = values[source, :length]

    def _memory(self, like: torch.Tensor) -> torch.Tensor:
        """Zeros for all rows and slots, heads outermost underneath: attention multiplies whole (row, head) matrices."""
        n_heads, head_dim = like.shape[2:]
        return like.new_zeros(self.n_rows, n_heads, self.n_slots, head_dim).transpose(1, 2)

    def _reserve(self, n_rows: int, n_slots: int) -> None:
        if n_rows <= self.n_rows and n_slots <= self.n_slots:
            return
        old = slice(self.n_rows), slice(self.n_slots)
        if n_rows > self.n_rows:
            self.n_rows = max(n_rows, 2 * self.n_rows)
        if n_slots > self.n_slots:
            self.n_slots = max(n_slots, 2 * self.n_slots)

        def grown(tensor: torch.Tensor) -> torch.Tensor:
            larger = self._memory(tensor)
            larger[old] = tensor
            return larger

        self.layers = [(grown(keys), grown(values)) for keys, values in self.layers]
        last_token = self.last_token.new_full((self.n_rows,), -1)
        last_token[old[0]] = self.last_token
        self.last_token = last_token


class CacheRows:
    """Neighbouring rows of a KVCache: what the model sees of it. Everything here is a view, nothing is copied out."""

    def __init__(self, cache: KVCache, rows: slice, length: int) -> None:
        self._cache, self._rows, self._length = cache, rows, length
        self._row_B1 = torch.arange(rows.start, rows.stop, device=cache.last_token.device)[:, None]

    @property
    def last_token_B(self) -> torch.Tensor:
        """The token each row read last, (B,) int64; -1 before the first."""
        return self._cache.last_token[self._rows]

    def update(
        self, layer: int, k_BTKD: torch.Tensor, v_BTKD: torch.Tensor, positions_BT: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write a layer's new keys and values at their positions (-1 = padding, lost); return all, (B, S, K, D)."""
        cache = self._cache
        if layer == len(cache.layers):
            cache.layers.append((cache._memory(k_BTKD), cache._memory(v_BTKD)))
        keys, values = cache.layers[layer]
        keys[self._row_B1, positions_BT] = k_BTKD
        values[self._row_B1, positions_BT] = v_BTKD
        return keys[self._rows, : self._length], values[self._rows, : self._length]

    def advance(self, idx_BT: torch.Tensor, positions_BT: torch.Tensor) -> None:
        """Note the last token of each row that was read; padding, where there is any, stands at the end of a row."""
        n_read_B1 = (positions_BT >= 0).sum(dim=1, keepdim=True)
        last_B = idx_BT.gather(1, (n_read_B1 - 1).clamp(min=0))[:, 0]
        self.last_token_B.copy_(torch.where(n_read_B1[:, 0] > 0, last_B, self.last_token_B))
