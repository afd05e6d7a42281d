"""Keys and values of beginnings that were read before, so that requests that share one read it once.

A beginning is a chain of blocks of 16 tokens. A block is found by its predecessor and its tokens, compared and not
hashed, so nobody can craft a prompt that is answered from another's. Blocks are copies, filled as a row is read: layers
with a window have theirs before their ring is overwritten, so a chain can be taken up again at any block.
"""

import itertools
from collections import OrderedDict
from collections.abc import Sequence

import torch

from nanochat.kv_cache import KVCache, allocate

BLOCK = 16  # tokens
Key = tuple[int, tuple[int, ...]]  # the predecessor's name, 0 = none, and a block's tokens


class PrefixCache:
    """Blocks of at most `max_tokens` tokens in all; those unused for longest go first."""

    def __init__(self, cache: KVCache, max_tokens: int) -> None:
        self.cache, self.n_blocks = cache, max_tokens // BLOCK
        self._blocks: OrderedDict[Key, tuple[int, int]] = OrderedDict()  # name, place in memory; the oldest first
        self._names = itertools.count(1)  # never used again
        self._memory: list[tuple[torch.Tensor, ...]] = []  # of each layer: keys and values, (P, 16, K, D)

    def clear(self) -> None:
        """Forget everything."""
        self._blocks.clear()
        self._memory.clear()

    def load(self, row: int, tokens: Sequence[int], limit: int) -> list[Key]:
        """Fill a cache row with the longest known beginning of `tokens`, at most `limit` of them; returns its chain."""
        chain: list[Key] = []
        places, name = [], 0
        for end in range(BLOCK, limit + 1, BLOCK):
            key = (name, tuple(tokens[end - BLOCK : end]))
            if key not in self._blocks:
                break
            name, place = self._blocks[key]
            chain.append(key)
            places.append(place)
        self._use(chain)
        for layer, known in enumerate(self._memory if chain else ()):
            first = max(0, len(chain) - (self.cache.ring(layer) or len(tokens)) // BLOCK)  # a ring holds the end alone
            slots, blocks = self._where(layer, range(BLOCK * first, BLOCK * len(chain)), places[first:])
            for each_RSKD, known_PSKD in zip(self.cache.memory(layer, known[0]), known, strict=True):
                each_RSKD[row, slots] = known_PSKD[blocks].flatten(0, 1)
        return chain

    def save(self, row: int, tokens: Sequence[int], chain: list[Key]) -> None:
        """Keep the whole blocks of `tokens`, all of which `row` has read; `chain`, of those known before, grows."""
        fresh: dict[int, int] = {}  # place -> end of the block; a later block may take an earlier one's
        for end in range(BLOCK * (len(chain) + 1), len(tokens) + 1, BLOCK):
            name, _ = self._blocks.get(chain[-1], (None, 0)) if chain else (0, 0)
            if name is None or not self.n_blocks:  # what it would follow is gone
                break
            key = (name, tuple(tokens[end - BLOCK : end]))
            if key not in self._blocks:
                full = len(self._blocks) == self.n_blocks
                place = self._blocks.popitem(last=False)[1][1] if full else len(self._blocks)
                self._blocks[key] = (next(self._names), place)
                fresh[place] = end
            chain.append(key)
        self._use(chain)
        if fresh:
            self._copy(row, fresh)

    def _use(self, chain: Sequence[Key]) -> None:
        """Make a chain the newest, its first block newest of all: without it the others cannot be found."""
        for key in reversed(chain):
            if key in self._blocks:
                self._blocks.move_to_end(key)

    def _where(self, layer: int, positions: Sequence[int], places: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        slots = self.cache.slots(layer, torch.tensor(positions))
        return slots.to(self.cache.device), torch.tensor(places, device=self.cache.device)

    def _copy(self, row: int, fresh: dict[int, int]) -> None:
        positions = [position for end in fresh.values() for position in range(end - BLOCK, end)]
        for layer, memory in enumerate(self.cache.layers):
            if layer == len(self._memory):
                self._memory.append(allocate(memory[0], self.n_blocks, BLOCK, *memory[0].shape[2:]))
            slots, blocks = self._where(layer, positions, list(fresh))
            for each_RSKD, known_PSKD in zip(memory, self._memory[layer], strict=True):
                known_PSKD[blocks] = each_RSKD[row, slots].unflatten(0, (-1, BLOCK))
