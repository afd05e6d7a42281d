"""The KV cache: keys and values of the tokens that running requests have read, so that each is computed once.

    KVCache       a row of slots per running request, in a LayerCache per layer
    PrefixCache   blocks of 16 tokens that were read before, so that a prefix that requests share is computed once

The engine reserves memory (`KVCache.reserve`) and runs the model, which writes and reads the rows (cache_batch.py).
After the step the engine saves whole blocks (`PrefixCache.save`). A new request begins with the blocks that it shares
with earlier ones (`PrefixCache.load`).

Slot s of a row holds position s. A layer with a window needs the newest positions only, so it keeps a ring buffer, in
which slot s holds the newest position p with p % ring = s. A ring of 4 slots after 6 positions:

    slot       0  1  2  3
    position   4  5  2  3

Shapes: R rows, N = all new positions of a forward, S slots, K kv heads, D head dim, G = K times the number of rows that
are viewed, P places of blocks, L = 16 positions of a block.
"""

from collections import OrderedDict
from collections.abc import Sequence

import torch

from nanochat.language_model import LayerNeed

ROUND = 128  # attention reads slots in multiples of this, which fixes the order of its sums
BLOCK = 16  # tokens of a block of the prefix cache; divides ROUND, so blocks never straddle the end of a ring


def round_up(n: int) -> int:
    """Return `n` rounded up to a multiple of ROUND."""
    return -(-n // ROUND) * ROUND


def allocate(like: torch.Tensor, n_rows: int, n_slots: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return keys and values of zeros, (R, S, K, D) each, for tensors like `like` (..., K, D).

    On CPU keys have their slots innermost in memory, which makes q·k five times as fast in bf16 (dev/LOG.md). Fused
    attention on a GPU wants their channels there.
    """
    kv_heads, head_dim = like.shape[-2:]
    values_RSKD = like.new_zeros(n_rows, kv_heads, n_slots, head_dim).transpose(1, 2)
    if like.device.type == "cpu":
        keys_RSKD = like.new_zeros(n_rows, kv_heads, head_dim, n_slots).permute(0, 3, 1, 2)
    else:
        keys_RSKD = torch.zeros_like(values_RSKD)
    return keys_RSKD, values_RSKD


class LayerCache:
    """Keys and values of one layer.

    Its memory is made on the first write, in the shape, dtype and device of what is written: layers may lie on
    different devices, or hold some of the heads only (hf/parallel.py).
    """

    def __init__(self, ring: int | None) -> None:
        self.ring = ring  # slots of the ring buffer; None = a slot per position
        self.n_rows = 1
        self.n_slots = ROUND
        self.memory: tuple[torch.Tensor, ...] = ()  # keys and values, (R, S, K, D) each
        self._views: dict[tuple[int, int, int], tuple[torch.Tensor, torch.Tensor]] = {}

    def resize(self, n_rows: int, n_slots: int) -> None:
        """Change the size of the memory; what fits stays."""
        self.n_rows = n_rows
        self.n_slots = n_slots if self.ring is None else min(n_slots, self.ring)
        if self.memory:
            self._reallocate(self.memory[0])

    def _reallocate(self, like: torch.Tensor) -> None:
        old_memory = self.memory
        self.memory = allocate(like, self.n_rows, self.n_slots)
        for new_RSKD, old_RSKD in zip(self.memory, old_memory, strict=False):
            rows = min(self.n_rows, old_RSKD.size(0))
            slots = min(self.n_slots, old_RSKD.size(1))
            new_RSKD[:rows, :slots] = old_RSKD[:rows, :slots]
        self._views.clear()

    def slots(self, positions: torch.Tensor) -> torch.Tensor:
        """Return the slots of these positions."""
        return positions if self.ring is None else positions % self.ring

    def block_slots(self, index: int) -> slice:
        """Return the slots of block `index` of a row, as a slice: index tensors copy several times as slowly."""
        start = BLOCK * index if self.ring is None else BLOCK * index % self.ring
        return slice(start, start + BLOCK)

    def write(self, rows_N: torch.Tensor, slots_N: torch.Tensor, k_NKD: torch.Tensor, v_NKD: torch.Tensor) -> None:
        """Store keys and values of new positions."""
        if not self.memory:
            self._reallocate(k_NKD)
        keys_RSKD, values_RSKD = self.memory
        keys_RSKD.index_put_((rows_N, slots_N), k_NKD)
        values_RSKD.index_put_((rows_N, slots_N), v_NKD)

    def n_visible(self, length: int) -> int:
        """Return how many slots `views` shows of rows up to `length`."""
        return min(round_up(length), self.n_slots)

    def views(self, first_row: int, n_rows: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return keys (G, D, S) and values (G, S, D) of some rows up to `length`, as attention's products want them.

        They are kept until memory moves: making them anew costs a small model as much as attending to them.
        """
        n_slots = self.n_visible(length)
        key = (first_row, n_rows, n_slots)
        if key not in self._views:
            if len(self._views) >= 16:  # batches change their shape all the time: keep it bounded
                self._views.clear()
            rows = slice(first_row, first_row + n_rows)
            keys_RSKD, values_RSKD = self.memory
            keys_GDS = keys_RSKD[rows, :n_slots].permute(0, 2, 3, 1).flatten(0, 1)
            values_GSD = values_RSKD[rows, :n_slots].transpose(1, 2).flatten(0, 1)
            self._views[key] = (keys_GDS, values_GSD)
        return self._views[key]


class KVCache:
    """A row per running request. All rows are as long as the longest needs; memory grows by doubling.

    chunk: the most positions that one forward adds to a row; a ring has room for them beside its window.
    max_tokens: limit of rows times slots (None = no limit). prefix_tokens: room of the prefix cache.
    """

    def __init__(
        self,
        needs: Sequence[LayerNeed],
        context: int,
        chunk: int = ROUND,
        max_tokens: int | None = None,
        prefix_tokens: int = 0,
    ) -> None:
        self.context = context
        self.max_tokens = max_tokens
        self.layers: list[LayerCache] = []
        self._spare = context  # positions that every ring holds beyond its window
        for need in needs:
            ring = round_up(need.window + chunk)
            if ring < context:
                self.layers.append(LayerCache(ring))
                self._spare = min(self._spare, ring - need.window)
            else:
                self.layers.append(LayerCache(None))
        self.n_rows = 1
        self.n_slots = ROUND
        self.version = 0  # grows when memory moves: CUDA graphs of an older version read freed memory
        self.prefixes = PrefixCache(self.layers, prefix_tokens)

    def fits(self, sizes: Sequence[int]) -> bool:
        """Return whether sequences of these sizes (tokens) have room at the same time."""
        return self.max_tokens is None or len(sizes) * self._row_slots(max(sizes, default=0)) <= self.max_tokens

    def _row_slots(self, size: int) -> int:
        """Return the slots of a row for `size` tokens: the next power of two, but no more than the context needs."""
        return min(max(ROUND, 1 << size.bit_length()), round_up(self.context + 1))

    def reserve(self, n_rows: int, size: int) -> None:
        """Make room for `n_rows` rows, the longest of `size` tokens. The caller has checked that they fit."""
        needed = self._row_slots(size)
        if n_rows <= self.n_rows and needed <= self.n_slots:
            return
        rows = self.n_rows if n_rows <= self.n_rows else max(n_rows, 2 * self.n_rows)
        slots = max(self.n_slots, needed)
        if self.max_tokens is not None and rows * slots > self.max_tokens:
            # No room to spare: exactly what is needed.
            rows = n_rows
            slots = needed
        for layer in self.layers:
            layer.resize(rows, slots)
        self.n_rows = rows
        self.n_slots = slots
        self.version += 1

    def copy_row(self, source: int, target: int, length: int) -> None:
        """Make row `target` equal to row `source` in its first `length` positions."""
        for layer in self.layers:
            for memory_RSKD in layer.memory:
                slots = slice(layer.ring or length)
                memory_RSKD[target, slots] = memory_RSKD[source, slots]

    def clear_row(self, row: int, length: int) -> None:
        """Set the first `length` positions of a row to zero."""
        for layer in self.layers:
            for memory_RSKD in layer.memory:
                memory_RSKD[row, slice(layer.ring or length)] = 0

    def can_truncate(self, read: int, length: int) -> bool:
        """Can a row of `read` tokens be cut to `length`? Not if a ring has overwritten what its window then shows."""
        return read - length <= self._spare


class Block:
    """The keys and values of 16 tokens after a certain prefix: a node in the tree of all known prefixes.

    The path from the root to a block spells the prefix. Tokens are compared and not hashed, so nobody can craft a
    prompt that is answered from another's.
    """

    def __init__(self, parent: "Block | None", tokens: tuple[int, ...], place: int) -> None:
        self.parent = parent
        self.tokens = tokens
        self.place = place  # its row in the memory of the prefix cache
        self.children: dict[tuple[int, ...], Block] = {}


class PrefixCache:
    """Copies of blocks that were read before, at most `max_tokens` tokens; the least recently used are evicted.

    Blocks are copied as a row is read. So a layer with a window has them before its ring is overwritten, and a new
    request can begin at the end of any block.
    """

    def __init__(self, layers: Sequence[LayerCache], max_tokens: int) -> None:
        self.layers = layers
        self.n_blocks = max_tokens // BLOCK
        self._root = Block(parent=None, tokens=(), place=-1)  # the empty prefix
        self._by_age: OrderedDict[Block, None] = OrderedDict()  # least recently used first
        self._memory: list[tuple[torch.Tensor, ...]] = []  # per layer: keys and values, (P, 16, K, D) each

    def clear(self) -> None:
        """Forget everything."""
        self._root.children.clear()
        self._by_age.clear()
        self._memory.clear()

    def load(self, row: int, tokens: Sequence[int]) -> list[Block]:
        """Fill `row` with the longest known prefix of `tokens`; return its blocks."""
        chain: list[Block] = []
        node = self._root
        for start in range(0, len(tokens) - BLOCK + 1, BLOCK):
            child = node.children.get(tuple(tokens[start : start + BLOCK]))
            if child is None:
                break
            chain.append(child)
            node = child
        self._touch(chain)
        for layer, known in zip(self.layers, self._memory, strict=False):
            # A ring has room for the end of the prefix only.
            first = 0 if layer.ring is None else max(0, len(chain) - layer.ring // BLOCK)
            for index, block in enumerate(chain[first:], first):
                slots = layer.block_slots(index)
                for memory_RSKD, known_PLKD in zip(layer.memory, known, strict=True):
                    memory_RSKD[row, slots] = known_PLKD[block.place]
        return chain

    def save(self, row: int, tokens: Sequence[int], chain: list[Block]) -> None:
        """Keep the whole blocks of `tokens`, all of which `row` has read.

        chain: the blocks of this row that are known already; the new ones are appended.
        """
        if chain and chain[-1] not in self._by_age:
            return  # it was evicted, so blocks after it could not be found
        self._touch(chain)  # before evictions, so that they spare this chain
        node = chain[-1] if chain else self._root
        fresh: list[Block] = []
        n_blocks = min(len(tokens) // BLOCK, self.n_blocks)
        for start in range(BLOCK * len(chain), BLOCK * n_blocks, BLOCK):
            block_tokens = tuple(tokens[start : start + BLOCK])
            child = node.children.get(block_tokens)
            if child is None:  # then no later block is known either
                child = Block(node, block_tokens, self._free_place())
                node.children[block_tokens] = child
                fresh.append(child)
            self._by_age[child] = None
            self._by_age.move_to_end(child)
            chain.append(child)
            node = child
        self._touch(chain)
        if not fresh:
            return
        if not self._memory:
            self._memory += [allocate(layer.memory[0], self.n_blocks, BLOCK) for layer in self.layers]
        for layer, known in zip(self.layers, self._memory, strict=True):
            for index, block in enumerate(fresh, len(chain) - len(fresh)):
                slots = layer.block_slots(index)
                for memory_RSKD, known_PLKD in zip(layer.memory, known, strict=True):
                    known_PLKD[block.place] = memory_RSKD[row, slots]

    def _free_place(self) -> int:
        """Return a place that no block uses, if need be that of the least recently used one."""
        if len(self._by_age) < self.n_blocks:
            return len(self._by_age)
        oldest, _ = self._by_age.popitem(last=False)
        assert oldest.parent is not None
        del oldest.parent.children[oldest.tokens]
        return oldest.place

    def _touch(self, chain: Sequence[Block]) -> None:
        """Mark a chain as just used, its first block last: without the first, the others could not be found."""
        for block in reversed(chain):
            if block in self._by_age:
                self._by_age.move_to_end(block)
