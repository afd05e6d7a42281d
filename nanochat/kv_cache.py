"""The KV cache: keys and values of the tokens that running requests have read, so that each is computed once.

    KVCache       one row of slots per running request; layers with a window keep a ring buffer
    CacheBatch    the context of one forward: writes new keys and values, then attends to the rows
    PrefixCache   blocks of 16 tokens that were read before, so that a prefix that requests share is computed once

The engine reserves memory (`KVCache.reserve`), describes the new tokens of a step by a CacheBatch, and runs the model,
which asks `CacheBatch.layer` for the attention of each layer. After the step it saves whole blocks
(`PrefixCache.save`); a new request begins with the blocks it shares (`KVCache.attach`, `PrefixCache.load`).

Shapes: R rows, B of them in a rectangle of T new positions each, N = all new positions of a forward, S slots, H query
heads, K kv heads, D head dim, G = B·K.
"""

import functools
import itertools
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch

from nanochat import attention
from nanochat.language_model import LayerNeed

ROUND = 128  # slots are read in multiples of this, which fixes the order in which attention sums
BLOCK = 16  # tokens of a block of the prefix cache
Key = tuple[int, tuple[int, ...]]  # the name of the block before (0 = none), and a block's tokens


def _up(n: int) -> int:
    """Return `n` rounded up to a multiple of ROUND."""
    return -(-n // ROUND) * ROUND


def allocate(like: torch.Tensor, n_rows: int, n_slots: int, kv_heads: int, head_dim: int) -> tuple[torch.Tensor, ...]:
    """Return keys and values, (R, S, K, D) each, of zeros, in the dtype and on the device of `like`.

    On CPU keys have their slots innermost in memory, which makes q·k five times as fast in bf16 (dev/LOG.md); fused
    attention on a GPU wants their channels there.
    """
    values_RSKD = like.new_zeros(n_rows, kv_heads, n_slots, head_dim).transpose(1, 2)
    if like.device.type != "cpu":
        return torch.zeros_like(values_RSKD), values_RSKD
    return like.new_zeros(n_rows, kv_heads, head_dim, n_slots).permute(0, 3, 1, 2), values_RSKD


class KVCache:
    """Rows of slots, one row per running request. All rows are as long as the longest needs, by doubling.

    Slot s of a row holds its position s. A layer with a window keeps a ring instead, in which slot s holds the newest
    position p with p % ring = s; it has room for the window and for `chunk` positions, the most that one forward adds.

    A layer's memory is made on its first write, in the shape, dtype and place of what is written. max_tokens: rows
    times slots, at most (None: no limit). prefix_tokens: room of the prefix cache. deterministic: see attention.py.
    """

    def __init__(
        self,
        device: torch.device,
        needs: Sequence[LayerNeed],
        context: int,
        chunk: int = ROUND,
        max_tokens: int | None = None,
        prefix_tokens: int = 0,
        deterministic: bool = True,
    ) -> None:
        self.device = device
        self.context = context
        self.max_tokens = max_tokens
        self.deterministic = deterministic
        self.layers: list[tuple[torch.Tensor, ...]] = []  # keys and values, (R, S, K, D)
        self.windows = [need.window for need in needs]
        rings = [_up(window + chunk) for window in self.windows]
        self.rings = [None if ring >= context else ring for ring in rings]
        self.n_rows = 1
        self.n_slots = ROUND
        self.version = 0  # how often memory has moved: views and CUDA graphs of an older version are stale
        self.prefixes = PrefixCache(self, prefix_tokens)
        self.n_queried = 0  # tokens of requests that began,
        self.n_reused = 0  # and how many of those were in the cache already
        self._views: dict[tuple[int, ...], tuple[torch.Tensor, torch.Tensor]] = {}

    # What the scheduler asks (see scheduler.Slots).

    def fits(self, sizes: Sequence[int]) -> bool:
        """Return whether sequences of so many tokens have room at the same time."""
        return self.max_tokens is None or len(sizes) * self._length(max(sizes, default=0)) <= self.max_tokens

    def attach(self, request: Any, running: Sequence[Any], twin: Any | None) -> int:
        """Begin `request` in its row; return how many of its first tokens are in the cache already.

        They come from `twin`, a running request with the same prompt, or from the prefix cache. The last token is
        always read, for its logits.
        """
        limit = request.size - 1  # all but the last token
        self.reserve(request.slot + 1, max(each.size for each in (*running, request)))
        shared = min(twin.n_read, len(request.tokens), limit) if twin else 0
        if twin and shared and self.can_truncate(twin.n_read, shared):
            # A copied row is not rounded down to whole blocks.
            self.move(twin.slot, request.slot, shared)
            request.chain = twin.chain[: shared // BLOCK]
        else:
            request.chain = self.prefixes.load(request.slot, request.pending(limit), limit)
            shared = BLOCK * len(request.chain)
        self.n_queried += request.size
        self.n_reused += shared
        return shared

    def move(self, source: int, target: int, length: int) -> None:
        """Make row `target` equal to row `source` in its first `length` positions."""
        self.reserve(target + 1, length)
        for memory, ring in zip(self.layers, self.rings, strict=False):
            for each_RSKD in memory:
                each_RSKD[target, : ring or length] = each_RSKD[source, : ring or length]

    def can_truncate(self, read: int, length: int) -> bool:
        """Can a row of `read` tokens be truncated to `length`? Not if a ring has overwritten what its window needs."""
        # A ring has ring - window positions more than its window shows, which may be taken back.
        spare = (ring - window for ring, window in zip(self.rings, self.windows, strict=True) if ring is not None)
        return read - length <= min(spare, default=read)

    # Memory.

    def memory(self, layer: int, like: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Return a layer's keys and values, (R, S, K, D), made on their first use for keys like these (..., K, D)."""
        if layer == len(self.layers):
            n_slots = min(self.n_slots, self.rings[layer] or self.n_slots)
            self.layers.append(allocate(like, self.n_rows, n_slots, *like.shape[-2:]))
        return self.layers[layer]

    def slots(self, layer: int, positions: torch.Tensor) -> torch.Tensor:
        """Return where a layer keeps these positions."""
        ring = self.rings[layer]
        return positions if ring is None else positions % ring

    def write(
        self, layer: int, rows_N: torch.Tensor, slots_N: torch.Tensor, k_NKD: torch.Tensor, v_NKD: torch.Tensor
    ) -> None:
        """Put keys and values of new positions in a layer's memory."""
        keys_RSKD, values_RSKD = self.memory(layer, k_NKD)
        keys_RSKD.index_put_((rows_N, slots_N), k_NKD)
        values_RSKD.index_put_((rows_N, slots_N), v_NKD)

    def views(self, layer: int, first_row: int, n_rows: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return keys (G, D, S) and values (G, S, D) of some rows up to `length`, as attention's products want them.

        They are kept until memory moves: cutting them out anew costs a small model as much as attending to them.
        """
        key = layer, first_row, n_rows, _up(length)
        if key not in self._views:
            if len(self._views) >= 16 * len(self.layers):  # batches change shape all the time: keep it bounded
                self._views.clear()
            keys_RSKD, values_RSKD = self.layers[layer]
            rows = slice(first_row, first_row + n_rows)
            keys_GDS = keys_RSKD[rows, : _up(length)].permute(0, 2, 3, 1).flatten(0, 1)
            self._views[key] = keys_GDS, values_RSKD[rows, : _up(length)].transpose(1, 2).flatten(0, 1)
        return self._views[key]

    def _length(self, size: int) -> int:
        """Return the slots of rows that hold `size` tokens: a power of two, but no more than the context needs."""
        power_of_two = 1 << size.bit_length()  # the smallest that is larger than `size`
        return min(max(ROUND, power_of_two), _up(self.context + 1))

    def reserve(self, n_rows: int, size: int) -> None:
        """Make room for so many rows, the longest of `size` tokens; what is held stays.

        Memory doubles as needed, up to `max_tokens`, where longer rows mean fewer of them.
        """
        slots = self._length(size)
        if n_rows <= self.n_rows and slots <= self.n_slots:
            return
        rows = self.n_rows if n_rows <= self.n_rows else max(n_rows, 2 * self.n_rows)
        slots = max(self.n_slots, slots)
        if self.max_tokens is not None and rows * slots > self.max_tokens:
            # Doubling would exceed the limit: give back slots that no running request needs, then add as many rows
            # as fit.
            slots = slots if n_rows * slots <= self.max_tokens else self._length(size)
            rows = max(n_rows, self.max_tokens // slots)
        kept = min(rows, self.n_rows)
        for layer, old in enumerate(self.layers):
            n_slots = min(slots, self.rings[layer] or slots)  # a ring never grows
            self.layers[layer] = allocate(old[0], rows, n_slots, *old[0].shape[2:])
            for new_RSKD, old_RSKD in zip(self.layers[layer], old, strict=True):
                common = min(n_slots, old_RSKD.size(1))
                new_RSKD[:kept, :common] = old_RSKD[:kept, :common]
        self.n_rows = rows
        self.n_slots = slots
        self.version += 1
        self._views.clear()


class Part(NamedTuple):
    """`n_rows` neighbouring rows that read `n_tokens` each, none past position `length` - 1."""

    first_row: int
    n_rows: int
    n_tokens: int
    length: int


class LayerPlan(NamedTuple):
    """The row and slot of each new token, and each part's mask of the slots that its queries do not see."""

    rows_N: torch.Tensor
    slots_N: torch.Tensor
    masks: list[torch.Tensor]


class CacheBatch:
    """The context of one forward over new tokens of many rows (see language_model.py): part after part, row after row.

    rows_N, positions_N: where each token goes, with room made by `KVCache.reserve`; along a row positions count up.
    previous_N: the token before each, -1 before the first of a row.
    """

    def __init__(
        self,
        cache: KVCache,
        parts: Sequence[Part],
        rows_N: torch.Tensor,
        positions_N: torch.Tensor,
        previous_N: torch.Tensor,
    ) -> None:
        self.positions = positions_N
        self.previous_N = previous_N
        self.cache = cache
        self._parts = parts
        self.rows_N = rows_N
        # Layers with the same ring, window and device share one plan, so it is made once per forward.
        self._plans: dict[tuple[Any, ...], LayerPlan] = {}

    def layer(self, layer: int) -> attention.Attend:
        """Return the function by which queries of this layer meet keys and values."""
        return functools.partial(self._attend, layer)

    def _attend(
        self,
        layer: int,
        q_NHD: torch.Tensor,
        k_NKD: torch.Tensor,
        v_NKD: torch.Tensor,
        window: int,
        sinks_H: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Write new keys and values, and attend to all that the window shows of each row; return (N, H, D)."""
        cache = self.cache
        kind = (cache.rings[layer], window, q_NHD.device)
        if kind not in self._plans:
            self._plans[kind] = self._plan(layer, window, q_NHD, k_NKD)
        plan = self._plans[kind]
        # New tokens attend to themselves, so they are written first.
        cache.write(layer, plan.rows_N, plan.slots_N, k_NKD, v_NKD)
        outputs = []
        for part, q_part, mask in zip(self._parts, self._split(q_NHD), plan.masks, strict=True):
            q_BTHD = q_part.unflatten(0, (part.n_rows, part.n_tokens))
            keys_GDS, values_GSD = cache.views(layer, part.first_row, part.n_rows, part.length)
            if q_NHD.device.type == "cuda" and part.n_tokens > 1 and sinks_H is None:
                y_BTHD = attention.attend_fused(q_BTHD, keys_GDS, values_GSD, mask)
            else:
                y_BTHD = attention.attend_to_slots(
                    q_BTHD, keys_GDS, values_GSD, mask, int(q_BTHD.size(3)) ** -0.5, sinks_H, cache.deterministic
                )
            outputs.append(y_BTHD.flatten(0, 1))
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)

    def _split(self, each_N: torch.Tensor) -> Sequence[torch.Tensor]:
        """Cut a tensor of all new tokens into one tensor per part."""
        if len(self._parts) == 1:
            return [each_N]
        return each_N.split([part.n_rows * part.n_tokens for part in self._parts])

    def _plan(self, layer: int, window: int, q_NHD: torch.Tensor, k_NKD: torch.Tensor) -> LayerPlan:
        """Return where a layer writes the new tokens, and a mask for each part.

        A query sees a slot if the position that the slot holds is not after its own and inside its window. In plain
        rows slot s holds position s. In a ring buffer the slot's position has to be computed from the newest one.
        """
        ring = self.cache.rings[layer]
        self.cache.memory(layer, k_NKD)  # makes the memory on first use, for `views` below
        device = q_NHD.device
        positions_N = self.positions.to(device)
        masks = []
        for part, positions in zip(self._parts, self._split(positions_N), strict=True):
            positions_BT1 = positions.view(part.n_rows, part.n_tokens, 1)
            keys_GDS, _ = self.cache.views(layer, part.first_row, part.n_rows, part.length)
            n_slots = keys_GDS.size(2)
            held_BTS = torch.arange(n_slots, device=device)  # the position that each slot holds
            if ring is not None and part.length > ring:
                # The ring has wrapped: slot s holds the newest position p <= newest with p % ring = s. Example:
                # ring 4 and newest 5 hold positions 4, 5, 2, 3.
                newest_B11 = positions_BT1[:, -1:]
                held_BTS = newest_B11 - (newest_B11 - held_BTS) % ring
            hidden_BTS = held_BTS > positions_BT1  # causal
            if window < part.length:  # otherwise no position can be outside of the window
                hidden_BTS = hidden_BTS | (held_BTS <= positions_BT1 - window)
            if ring is not None:
                # The formula gives a negative position for a slot that a shorter row has not written yet.
                hidden_BTS = hidden_BTS | (held_BTS < 0)
            group = int(q_NHD.size(1)) // int(k_NKD.size(1))
            masks.append(attention.mask(hidden_BTS, group, q_NHD.dtype, self.cache.deterministic))
        return LayerPlan(rows_N=self.rows_N.to(device), slots_N=self.cache.slots(layer, positions_N), masks=masks)


class PrefixCache:
    """Keys and values of prefixes that were read before, at most `max_tokens` of them; the oldest go first.

    A prefix is a chain of blocks of 16 tokens. A block is found by the block before it and its tokens, which are
    compared and not hashed, so nobody can craft a prompt that is answered from another's. Blocks are copies, made as
    a row is read: a layer with a window has its part copied before its ring is overwritten, so a chain can end at any
    block.
    """

    def __init__(self, cache: KVCache, max_tokens: int) -> None:
        self.cache = cache
        self.n_blocks = max_tokens // BLOCK
        self._blocks: OrderedDict[Key, tuple[int, int]] = OrderedDict()  # name and place of each; the oldest first
        self._names = itertools.count(1)  # never used again
        self._memory: list[tuple[torch.Tensor, ...]] = []  # of each layer: keys and values, (P, 16, K, D)

    def clear(self) -> None:
        """Forget everything."""
        self._blocks.clear()
        self._memory.clear()

    def load(self, row: int, tokens: Sequence[int], limit: int) -> list[Key]:
        """Fill a row with the longest known prefix of `tokens`, at most `limit` of them; return its chain."""
        chain: list[Key] = []
        places: list[int] = []
        name = 0  # of the block before the first
        for end in range(BLOCK, limit + 1, BLOCK):
            key = (name, tuple(tokens[end - BLOCK : end]))
            if key not in self._blocks:
                break
            name, place = self._blocks[key]
            chain.append(key)
            places.append(place)
        self._touch(chain)
        if not chain:
            return chain
        for layer, known in enumerate(self._memory):
            # A ring has room for the end of the prefix only.
            first = max(0, len(chain) - (self.cache.rings[layer] or len(tokens)) // BLOCK)
            memory = self.cache.memory(layer, known[0])
            for slots, blocks in self._runs(layer, first, places[first:]):
                for each_RSKD, known_PSKD in zip(memory, known, strict=True):
                    each_RSKD[row, slots].unflatten(0, (-1, BLOCK)).copy_(known_PSKD[blocks])
        return chain

    def save(self, row: int, tokens: Sequence[int], chain: list[Key]) -> None:
        """Keep the whole blocks of `tokens`, all of which `row` has read; `chain`, of those known before, grows."""
        # The name of the last block of the chain, by which the next one is found; None if it was evicted.
        name: int | None = self._blocks.get(chain[-1], (None, 0))[0] if chain else 0
        fresh: dict[Key, int] = {}  # names of blocks that are not known yet; what follows one is not known either
        first_end = BLOCK * (len(chain) + 1)
        last_end = BLOCK * min(len(tokens) // BLOCK, self.n_blocks)
        for end in range(first_end, last_end + 1, BLOCK):
            if name is None:  # without its predecessor, a block could never be found again
                break
            key = (name, tuple(tokens[end - BLOCK : end]))
            if key not in self._blocks:
                fresh[key] = next(self._names)
            name = fresh[key] if key in fresh else self._blocks[key][0]
            chain.append(key)
        # Touched before the eviction, so that the chain's own blocks are not the ones that go.
        self._touch(chain)
        # First the places that were never used, then those of the oldest blocks.
        places = list(range(len(self._blocks), min(self.n_blocks, len(self._blocks) + len(fresh))))
        places += [self._blocks.popitem(last=False)[1][1] for _ in range(len(fresh) - len(places))]
        places.sort()  # neighbours are copied together
        for key, place in zip(fresh, places, strict=True):
            self._blocks[key] = fresh[key], place
        self._touch(chain)
        if fresh:
            self._copy(row, len(chain) - len(fresh), places)

    def _touch(self, chain: Sequence[Key]) -> None:
        """Make a chain the newest, its first block newest of all: without it the others cannot be found."""
        for key in reversed(chain):
            if key in self._blocks:
                self._blocks.move_to_end(key)

    def _runs(self, layer: int, first: int, places: Sequence[int]) -> Iterator[tuple[slice, slice]]:
        """Yield slots of a row, and places here, of the row's blocks from `first` on: neighbours in both together."""
        ring = (self.cache.rings[layer] or 0) // BLOCK  # in blocks; 0 for a layer without a ring
        pairs = [((first + i) % ring if ring else first + i, place) for i, place in enumerate(places)]
        # A run starts wherever a pair does not follow its predecessor by one in both: one copy per run, not per block.
        starts = [i for i, (slot, place) in enumerate(pairs) if not i or pairs[i - 1] != (slot - 1, place - 1)]
        for start, end in itertools.pairwise([*starts, len(pairs)]):
            slot, place = pairs[start]
            n = end - start
            yield slice(BLOCK * slot, BLOCK * (slot + n)), slice(place, place + n)

    def _copy(self, row: int, first: int, places: Sequence[int]) -> None:
        """Copy blocks of a row, from its `first` on, to these places."""
        for layer, memory in enumerate(self.cache.layers):
            if layer == len(self._memory):
                self._memory.append(allocate(memory[0], self.n_blocks, BLOCK, *memory[0].shape[2:]))
            for slots, blocks in self._runs(layer, first, places):
                for each_RSKD, known_PSKD in zip(memory, self._memory[layer], strict=True):
                    known_PSKD[blocks].copy_(each_RSKD[row, slots].unflatten(0, (-1, BLOCK)))
