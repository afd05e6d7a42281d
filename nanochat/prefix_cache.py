"""Keys and values of beginnings that were read before, so that requests that share one read it once.

A beginning is a chain of blocks of 16 tokens. A block is found by its predecessor and its tokens, compared and not
hashed, so nobody can craft a prompt that is answered from another's. Blocks are copies, filled as a row is read: layers
with a window have theirs before their ring is overwritten, so a chain can be taken up again at any block.
"""

import itertools
from collections import OrderedDict
from collections.abc import Iterator, Sequence

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
            memory = self.cache.memory(layer, known[0])
            for slots, blocks in self._runs(layer, first, places[first:]):
                for each_RSKD, known_PSKD in zip(memory, known, strict=True):
                    each_RSKD[row, slots].unflatten(0, (-1, BLOCK)).copy_(known_PSKD[blocks])
        return chain

    def save(self, row: int, tokens: Sequence[int], chain: list[Key]) -> None:
        """Keep the whole blocks of `tokens`, all of which `row` has read; `chain`, of those known before, grows."""
        name = self._blocks.get(chain[-1], (None, 0))[0] if chain else 0
        fresh: dict[Key, int] = {}  # names of blocks that are not known yet; what follows one is not known either
        for end in range(BLOCK * (len(chain) + 1), BLOCK * min(len(tokens) // BLOCK, self.n_blocks) + 1, BLOCK):
            if name is None:  # what it would follow is gone
                break
            key = (name, tuple(tokens[end - BLOCK : end]))
            if key not in self._blocks:
                fresh[key] = next(self._names)
            name = fresh[key] if key in fresh else self._blocks[key][0]
            chain.append(key)
        self._use(chain)
        places = list(range(len(self._blocks), min(self.n_blocks, len(self._blocks) + len(fresh))))
        places += [self._blocks.popitem(last=False)[1][1] for _ in range(len(fresh) - len(places))]
        for key, place in zip(fresh, sorted(places)):  # neighbours are copied together
            self._blocks[key] = fresh[key], place
        self._use(chain)
        if fresh:
            self._copy(row, len(chain) - len(fresh), sorted(places))

    def _use(self, chain: Sequence[Key]) -> None:
        """Make a chain the newest, its first block newest of all: without it the others cannot be found."""
        for key in reversed(chain):
            if key in self._blocks:
                self._blocks.move_to_end(key)

    def _runs(self, layer: int, first: int, places: Sequence[int]) -> Iterator[tuple[slice, slice]]:
        """Slots in a row, and places here, of a row's blocks from its `first` on: neighbours in both together."""
        ring = (self.cache.ring(layer) or 0) // BLOCK
        pairs = [((first + i) % ring if ring else first + i, place) for i, place in enumerate(places)]
        starts = [i for i, (slot, place) in enumerate(pairs) if not i or pairs[i - 1] != (slot - 1, place - 1)]
        for start, end in itertools.pairwise([*starts, len(pairs)]):
            slot, place = pairs[start]
            yield slice(BLOCK * slot, BLOCK * (slot + end - start)), slice(place, place + end - start)

    def _copy(self, row: int, first: int, places: Sequence[int]) -> None:
        for layer, memory in enumerate(self.cache.layers):
            if layer == len(self._memory):
                self._memory.append(allocate(memory[0], self.n_blocks, BLOCK, *memory[0].shape[2:]))
            for slots, blocks in self._runs(layer, first, places):
                for each_RSKD, known_PSKD in zip(memory, self._memory[layer], strict=True):
                    known_PSKD[blocks].copy_(each_RSKD[row, slots].unflatten(0, (-1, BLOCK)))
