"""The rows of training step s for rank r.

Rows are packed and on disk (token_shards.py), so this file decides their order and copies them to the device.

The order is a function of (seed, step) alone. Number all rows that a run will ever see 0, 1, 2, ...: step s of N rows
takes numbers s*N to s*N + N - 1, and rank r of w takes every w-th of them, from the r-th on. So any number of ranks
trains on the same rows, and a run resumes from one integer, its step.

An epoch is a permutation of the rows: each row, and so each token, comes once. Shards are taken in groups, in their
order, and the rows of a group are shuffled together. A group is first asked for when its turn comes, so training can
begin while later shards are still being downloaded; the order is the same as if all had been there.
"""

import bisect
import contextlib
import itertools
import queue
import threading
from collections.abc import Generator, Iterator

import numpy as np
import torch

from nanochat.token_shards import PackedRows

MicroBatch = tuple[torch.Tensor, torch.Tensor]  # inputs_BT, targets_BT


class RowLoader:
    """Steps of `rows_per_step` rows over all ranks, as micro-batches of `device_rows` rows for this rank."""

    def __init__(
        self,
        rows: PackedRows,
        rows_per_step: int,
        device_rows: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        device: torch.device | str = "cpu",
    ) -> None:
        """Raises ValueError if the rows of a step do not divide over ranks and micro-batches."""
        if rows_per_step < 1 or rows_per_step % (device_rows * world_size):
            T = rows.sequence_len
            raise ValueError(
                f"--total-batch-size of {rows_per_step * T} tokens is {rows_per_step} rows of {T}, which "
                f"--device-batch-size {device_rows} on {world_size} processes does not divide: make it a multiple of "
                f"{device_rows * world_size * T}"
            )
        self.rows = rows
        self.sequence_len = rows.sequence_len
        self.rows_per_step = rows_per_step
        self.device_rows = device_rows
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.device = torch.device(device)
        # Group g begins at row _begins[g] of an epoch, and the last known one ends at _begins[-1]. It grows as groups
        # are reached: counting the rows of a shard that is not there means to wait for it.
        self._begins = [0]
        self._growing = threading.Lock()  # the prefetching thread and its owner may both ask for the same group
        self._prepared = 0  # the last group that a thread was started for
        self._order: tuple[tuple[int, int], np.ndarray] = ((-1, -1), np.empty(0, np.int64))

    @property
    def rows_in_epoch(self) -> int:
        """Return the rows of an epoch. This needs every shard, so it waits for those that are still to come."""
        while len(self._begins) <= len(self.rows.groups):
            self._count_next_group()
        return self._begins[-1]

    def epoch(self, step: int) -> int:
        """Return the epoch of the first row of `step`."""
        return self._locate(step * self.rows_per_step)[0]

    def step(self, step: int) -> list[MicroBatch]:
        """Return this rank's micro-batches of a step: (inputs_BT, targets_BT), int64. Targets of -1 do not count."""
        staging_2NT = self._staging(pin=False)
        self._fill(step, staging_2NT.numpy())
        return self._micro_batches(staging_2NT.to(self.device))

    def first_rows(self, count: int) -> Iterator[MicroBatch]:
        """Yield this rank's share of the first `count` rows, which are the same rows on any number of ranks."""
        for first in range(0, count, self.rows_per_step):
            mine = len(range(first + self.rank, min(first + self.rows_per_step, count), self.world_size))
            for inputs_BT, targets_BT in self.step(first // self.rows_per_step):
                if mine > 0:
                    yield inputs_BT[:mine], targets_BT[:mine]
                mine -= self.device_rows

    def iterate(self, start_step: int = 0) -> Generator[tuple[int, list[MicroBatch]], None, None]:
        """Yield (step, micro-batches) from `start_step` on, forever. A thread prepares the next step meanwhile.

        It works with two staging buffers. On CUDA they are pinned: only from pinned memory is a copy to the GPU
        asynchronous. An event says when the copy is done, and only then is its buffer filled again.
        """
        cuda = self.device.type == "cuda"
        free: queue.Queue = queue.Queue()
        ready: queue.Queue = queue.Queue()
        for _ in range(2):
            free.put((self._staging(pin=cuda), None))

        def produce() -> None:
            try:
                for step in itertools.count(start_step):
                    slot = free.get()
                    if slot is None:
                        return
                    staging_2NT, copied = slot
                    if copied is not None:
                        copied.synchronize()
                    self._fill(step, staging_2NT.numpy())
                    ready.put((step, staging_2NT))
                    self._prepare_next_group(step)
            except BaseException as error:  # raised again by the consumer, which would otherwise wait forever
                ready.put((error, None))

        thread = threading.Thread(target=produce, name="rows", daemon=True)
        thread.start()
        try:
            while True:
                step, staging_2NT = ready.get()
                if isinstance(step, BaseException):
                    raise step
                batch_2NT = staging_2NT.to(self.device, non_blocking=True, copy=True)
                copied = None
                if cuda:
                    copied = torch.cuda.Event()
                    copied.record()
                free.put((staging_2NT, copied))
                yield step, self._micro_batches(batch_2NT)
        finally:
            free.put(None)
            thread.join(timeout=5)  # it may be waiting for a shard; as a daemon it does not keep the process alive

    def _staging(self, pin: bool) -> torch.Tensor:
        """Return an empty buffer for this rank's inputs and targets of a step, side by side."""
        shape = (2, self.rows_per_step // self.world_size, self.sequence_len)
        return torch.empty(shape, dtype=torch.int64, pin_memory=pin)

    def _micro_batches(self, batch_2NT: torch.Tensor) -> list[MicroBatch]:
        inputs_NT, targets_NT = batch_2NT
        return list(zip(inputs_NT.split(self.device_rows), targets_NT.split(self.device_rows)))

    # --- from row numbers to rows on disk

    def _count_next_group(self) -> None:
        with self._growing:
            group = len(self._begins) - 1
            if group < len(self.rows.groups):  # another thread may have been faster
                rows = sum(self.rows.count(shard) for shard in self.rows.groups[group])
                self._begins.append(self._begins[-1] + rows)

    def _locate(self, number: int) -> tuple[int, int, int]:
        """Return (epoch, group, place in the group) of the row of this number."""
        while number >= self._begins[-1] and len(self._begins) <= len(self.rows.groups):
            self._count_next_group()
        # While not all groups are known, `number` is below what is known, so this says epoch 0, as it should.
        epoch, in_epoch = divmod(number, self._begins[-1])
        group = bisect.bisect_right(self._begins, in_epoch) - 1
        return epoch, group, in_epoch - self._begins[group]

    def _fill(self, step: int, staging_2NT: np.ndarray) -> None:
        """Write this rank's rows of a step: inputs and targets are the same row, one token apart."""
        inputs_NT, targets_NT = staging_2NT
        number = step * self.rows_per_step + self.rank
        end = (step + 1) * self.rows_per_step
        filled = 0
        while number < end:
            epoch, group, place = self._locate(number)
            # those of this rank's rows that lie in this group, in this epoch
            group_rows = self._begins[group + 1] - self._begins[group]
            places_M = np.arange(place, min(group_rows, place + end - number), self.world_size)
            part = slice(filled, filled + len(places_M))
            self._copy(epoch, group, places_M, inputs_NT[part], targets_NT[part])
            filled += len(places_M)
            number += len(places_M) * self.world_size

    def _copy(
        self, epoch: int, group: int, places_M: np.ndarray, inputs_MT: np.ndarray, targets_MT: np.ndarray
    ) -> None:
        """Copy the rows at `places_M` of a group's order in this epoch."""
        rows_M = self._order_of(epoch, group)[places_M]
        first_row = 0
        for shard in self.rows.groups[group]:
            file_rows = self.rows.count(shard)
            here_K = np.flatnonzero((first_row <= rows_M) & (rows_M < first_row + file_rows))
            if len(here_K):
                file = self.rows.open(shard)
                in_file_K = rows_M[here_K] - first_row
                rows_KT1 = file.rows_RT1[in_file_K]
                inputs_MT[here_K] = rows_KT1[:, :-1]
                targets_KT = rows_KT1[:, 1:].astype(np.int64)
                if file.mask_RT1 is not None:
                    targets_KT[file.mask_RT1[in_file_K, 1:] == 0] = -1
                elif file.padding:
                    targets_KT[in_file_K == file_rows - 1, -file.padding :] = -1
                targets_MT[here_K] = targets_KT
            first_row += file_rows

    def _order_of(self, epoch: int, group: int) -> np.ndarray:
        """Return the order of a group's rows in this epoch. The last one is kept: many steps read the same."""
        key, order = self._order
        if key != (epoch, group):
            group_rows = self._begins[group + 1] - self._begins[group]
            order = np.random.default_rng((self.seed, epoch, group)).permutation(group_rows)
            self._order = ((epoch, group), order)
        return order

    def _prepare_next_group(self, step: int) -> None:
        """Let another thread tokenize and pack the next group while this one is being read."""
        upcoming = self._locate(step * self.rows_per_step)[1] + 1
        known = len(self._begins) - 1
        if upcoming < known or upcoming == len(self.rows.groups) or upcoming == self._prepared:
            return
        self._prepared = upcoming

        def prepare() -> None:
            with contextlib.suppress(Exception):  # whoever needs the group will meet the error
                self._count_next_group()

        threading.Thread(target=prepare, name="next group", daemon=True).start()
