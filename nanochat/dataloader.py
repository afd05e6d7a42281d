"""Rows for training: which documents a step sees is a function of (seed, step) alone, on any number of ranks.

Rank r of w reads rows r, r+w, ... of each step. Shards are planned independently, so resuming replays no earlier row.
"""

import bisect
import contextlib
import functools
import itertools
import queue
import threading
from collections.abc import Callable, Generator, Iterator, Sequence

import numpy as np
import torch

from nanochat.token_shards import TokenShard

MicroBatch = tuple[torch.Tensor, torch.Tensor]  # inputs_BT, targets_BT


class RowLoader:
    """Steps of `rows_per_step` rows over all ranks, each row `sequence_len` inputs and their targets.

    A step is given as micro-batches of `device_batch_rows` rows for this rank. Epoch 0 takes the shards in their
    order, later ones in others; each packs and orders a shard's rows anew. They never end; ValueError for misfits.
    """

    def __init__(
        self,
        shards: Sequence[TokenShard],
        sequence_len: int,
        rows_per_step: int,
        device_batch_rows: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        device: torch.device | str = "cpu",
    ) -> None:
        if rows_per_step < 1 or rows_per_step % (device_batch_rows * world_size):
            raise ValueError(
                f"--total-batch-size of {rows_per_step * sequence_len} tokens is {rows_per_step} rows of "
                f"{sequence_len}, which --device-batch-size {device_batch_rows} on {world_size} processes does not "
                f"divide: make it a multiple of {device_batch_rows * world_size * sequence_len}"
            )
        self.shards, self.sequence_len, self.rows_per_step = list(shards), sequence_len, rows_per_step
        self.device_batch_rows, self.seed, self.rank, self.world_size = device_batch_rows, seed, rank, world_size
        self.device = torch.device(device)
        # A visit is one shard in one epoch; visit v begins at row self._begins[v], and the last known one ends at [-1].
        self._begins = [0]
        self._visiting = threading.Lock()
        self._prepared = 0
        self._plan = functools.lru_cache(maxsize=4)(self._load_plan)

    @property
    def rows_in_epoch(self) -> int:
        """Rows of epoch 0 (later epochs may differ by a few); needs every shard, so it waits for those to arrive."""
        self._extend(lambda: len(self._begins) <= len(self.shards))
        return self._begins[len(self.shards)]

    def epoch(self, step: int) -> int:
        """The epoch that the first row of `step` lies in."""
        return self._locate(step * self.rows_per_step)[0] // len(self.shards)

    def step(self, step: int) -> list[MicroBatch]:
        """The micro-batches (inputs_BT, targets_BT), int64, of a step for this rank; targets of -1 are not counted."""
        batch_2NT = self._staging(pin=False)
        self._fill(step, *batch_2NT.numpy())
        return self._micro_batches(batch_2NT.to(self.device))

    def first_rows(self, rows: int) -> Iterator[MicroBatch]:
        """This rank's share of the first `rows` rows, batch by batch: the same rows in all on any number of ranks."""
        for first in range(0, rows, self.rows_per_step):
            mine = len(range(first + self.rank, min(first + self.rows_per_step, rows), self.world_size))
            for inputs_BT, targets_BT in self.step(first // self.rows_per_step):
                if mine > 0:
                    yield inputs_BT[:mine], targets_BT[:mine]
                mine -= self.device_batch_rows

    def iterate(self, start_step: int = 0) -> Generator[tuple[int, list[MicroBatch]], None, None]:
        """Steps from `start_step` on, with their numbers, prepared ahead by a thread, which ends with the iterator.

        Two staging buffers, pinned for a GPU; one is filled again only when an event says that its copy is done.
        """
        cuda = self.device.type == "cuda"
        free: queue.Queue = queue.Queue()
        ready: queue.Queue = queue.Queue()

        def produce() -> None:
            try:
                for step in itertools.count(start_step):
                    slot = free.get()
                    if slot is None:
                        return
                    buffer_2NT, copied = slot
                    if copied is not None:
                        copied.synchronize()
                    self._fill(step, *buffer_2NT.numpy())
                    ready.put((step, buffer_2NT))
                    self._prepare_next(step)
            except BaseException as error:
                ready.put((error, None))

        for _ in range(2):
            free.put((self._staging(pin=cuda), None))
        thread = threading.Thread(target=produce, name="rows", daemon=True)
        thread.start()
        try:
            while True:
                step, buffer_2NT = ready.get()
                if isinstance(step, BaseException):
                    raise step
                batch_2NT = buffer_2NT.to(self.device, non_blocking=True, copy=True)
                copied = torch.cuda.Event() if cuda else None
                if copied is not None:
                    copied.record()
                free.put((buffer_2NT, copied))
                yield step, self._micro_batches(batch_2NT)
        finally:
            free.put(None)
            thread.join(timeout=5)  # it may be waiting for a shard; as a daemon it keeps nobody else waiting

    def _staging(self, pin: bool) -> torch.Tensor:
        rows = self.rows_per_step // self.world_size
        return torch.empty((2, rows, self.sequence_len), dtype=torch.int64, pin_memory=pin)

    def _micro_batches(self, batch_2NT: torch.Tensor) -> list[MicroBatch]:
        return [tuple(part) for part in batch_2NT.split(self.device_batch_rows, dim=1)]

    # Finding a row: visits are walked once, by their row counts alone.

    def _visit(self, visit: int) -> tuple[TokenShard, tuple[int, int, int]]:
        """The shard of a visit, and the key of its plan."""
        epoch, place = divmod(visit, len(self.shards))
        if epoch:
            place = np.random.default_rng((self.seed, epoch)).permutation(len(self.shards))[place]
        return self.shards[place], (self.sequence_len + 1, self.seed, epoch)

    def _load_plan(self, visit: int) -> tuple[TokenShard, tuple[np.ndarray, ...]]:
        shard, key = self._visit(visit)
        return shard, shard.plan(*key)

    def _extend(self, more: Callable[[], bool]) -> None:
        while more():
            with self._visiting:
                if not more():  # another thread was faster
                    return
                visit = len(self._begins) - 1
                if visit == len(self.shards) and self._begins[-1] == 0:
                    raise ValueError("no row with anything to learn: give the dataset more text or longer rows")
                shard, key = self._visit(visit)
                self._begins.append(self._begins[-1] + shard.row_count(*key))

    def _locate(self, row: int) -> tuple[int, int]:
        """The visit that holds global row `row`, and the row's place in it."""
        self._extend(lambda: row >= self._begins[-1])
        visit = bisect.bisect_right(self._begins, row) - 1
        return visit, row - self._begins[visit]

    def _prepare_next(self, step: int) -> None:
        """Tokenize and plan the next shard while this one is being read."""
        visit = self._locate(step * self.rows_per_step)[0] + 1
        if visit < len(self._begins) - 1 or visit == self._prepared:
            return
        self._prepared = visit
        shard, key = self._visit(visit)

        def prepare() -> None:
            with contextlib.suppress(Exception):  # whoever needs the shard will meet the error
                shard.row_count(*key)

        threading.Thread(target=prepare, name="next shard", daemon=True).start()

    def _fill(self, step: int, inputs_NT: np.ndarray, targets_NT: np.ndarray) -> None:
        """Write this rank's rows of a step into inputs and targets, which are the same row shifted by one."""
        rows_NT1 = np.empty((len(inputs_NT), self.sequence_len + 1), np.int64)
        counted_NT1 = np.zeros(rows_NT1.shape, bool)
        first_row = step * self.rows_per_step
        numbers = range(first_row + self.rank, first_row + self.rows_per_step, self.world_size)
        for number, row, counted in zip(numbers, rows_NT1, counted_NT1):
            visit, r = self._locate(number)
            shard, (rows_R2, start, length) = self._plan(visit)
            ids, mask, bos = shard.ids, shard.mask, shard.meta["bos"]
            first, last = rows_R2[r].tolist()
            at = 0
            for s, n in zip(start[first:last].tolist(), length[first:last].tolist()):
                if mask is None:
                    row[at] = bos
                    row[at + 1 : at + 1 + n] = ids[s : s + n]
                    at += 1 + n
                else:
                    row[at : at + n] = ids[s : s + n]
                    counted[at : at + n] = mask[s : s + n]
                    at += n
            row[at:] = bos
            if mask is None:
                counted[:at] = True  # each BOS, too: it says where the document before it ended
        inputs_NT[:] = rows_NT1[:, :-1]
        targets_NT[:] = np.where(counted_NT1[:, 1:], rows_NT1[:, 1:], -1)
