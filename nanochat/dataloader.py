"""The rows of training step s for rank r.

Rows are packed and on disk (token_shards.py), so this file decides their order and copies them to the device.

The order is a function of (seed, step) alone. Number all rows that a run will ever see 0, 1, 2, ...: step s of N rows
takes numbers s*N to s*N + N - 1, and rank r of w takes every w-th of them, from the r-th on. So any number of ranks
trains on the same rows, and a run resumes from one integer, its step. Steps of 4 rows on 2 ranks:

    step       0        1        2
    rank 0     0  2     4  6     8  10
    rank 1     1  3     5  7     9  11

An epoch is a permutation of the rows: each row, and so each token, comes once. Shards are taken in groups, in their
order, and the rows of a group are shuffled together. A group is first asked for when its turn comes, so training can
begin while later shards are still being downloaded; the order is the same as if all had been there.
"""

import itertools
import threading
from collections.abc import Callable, Generator, Iterator
from typing import Any

import numpy as np
import torch

from nanochat.token_shards import PackedRows

MicroBatch = tuple[torch.Tensor, torch.Tensor]  # inputs_BT, targets_BT


class Background(threading.Thread):
    """A function that runs in a thread of its own. As a daemon it does not keep the process alive, whatever happens."""

    def __init__(self, function: Callable[..., object], *arguments: Any) -> None:
        super().__init__(daemon=True)
        self.function = function
        self.arguments = arguments
        self.error: BaseException | None = None
        self.start()

    def run(self) -> None:
        """Call the function, and keep its error for `result`."""
        try:
            self.function(*self.arguments)
        except BaseException as error:
            self.error = error

    def result(self) -> None:
        """Wait for the end, and raise the error that the function raised."""
        self.join()
        if self.error is not None:
            raise self.error


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
        self._last_order: tuple[tuple[int, int], np.ndarray] = ((-1, -1), np.empty(0, np.int64))

    @property
    def rows_in_epoch(self) -> int:
        """Return the rows of an epoch. This needs every shard, so it waits for those that are still to come."""
        return self.rows.total()

    def epoch(self, step: int) -> int:
        """Return the epoch of the first row of `step`."""
        epoch, _, _ = self._locate(step * self.rows_per_step)
        return epoch

    def step(self, step: int) -> list[MicroBatch]:
        """Return this rank's micro-batches of a step: (inputs_BT, targets_BT), int64; see loss.IGNORED."""
        batch_2NT = self._buffer(pin=False)
        self._fill(step, batch_2NT)
        return self._micro_batches(batch_2NT.to(self.device))

    def first_rows(self, count: int) -> Iterator[MicroBatch]:
        """Yield this rank's share of the first `count` rows, which are the same rows on any number of ranks.

        Every rank yields equally many batches of one shape: ranks may communicate after each, and a GPU compiles no
        kernel for a smaller last one. Where a rank has fewer rows than that, the targets of the others are -1.
        """
        for first in range(0, count, self.rows_per_step):
            end = min(first + self.rows_per_step, count)
            mine = len(range(first + self.rank, end, self.world_size))
            for inputs_BT, targets_BT in self.step(first // self.rows_per_step):
                targets_BT[max(0, mine) :] = -1
                yield inputs_BT, targets_BT
                mine -= self.device_rows

    def iterate(self, start_step: int = 0) -> Generator[tuple[int, list[MicroBatch]], None, None]:
        """Yield (step, micro-batches) from `start_step` on, forever. The next step is read in the background.

        On CUDA the buffer that rows are read into is pinned: only from pinned memory is a copy to the GPU asynchronous.
        """
        cuda = self.device.type == "cuda"
        buffer_2NT = self._buffer(pin=cuda)
        copied = torch.cuda.Event() if cuda else None
        next_group = 0  # the last group that was asked for ahead of time

        def read(step: int) -> None:
            if copied is not None:
                # A thread begins on GPU 0, whichever its process uses. Without this, the threads of all ranks would
                # each take some hundred MB of GPU 0 for a CUDA context.
                torch.cuda.set_device(self.device)
                copied.synchronize()  # the GPU may still be copying the step before
            self._fill(step, buffer_2NT)

        reading = Background(read, start_step)
        try:
            for step in itertools.count(start_step):
                reading.result()
                batch_2NT = buffer_2NT.to(self.device, non_blocking=True, copy=True)
                if copied is not None:
                    copied.record()
                reading = Background(read, step + 1)

                # Tokenizing and packing a group takes longer than a step: begin when its predecessor's turn has come.
                # An error is met again by whoever needs the group.
                _, group, _ = self._locate(step * self.rows_per_step)
                if next_group <= group and group + 1 < len(self.rows.groups):
                    next_group = group + 1
                    Background(self.rows.count_group, next_group)
                yield step, self._micro_batches(batch_2NT)
        finally:
            reading.join(timeout=5)  # it may be waiting for a shard

    def _buffer(self, pin: bool) -> torch.Tensor:
        """Return memory for this rank's inputs and targets of a step, side by side."""
        shape = (2, self.rows_per_step // self.world_size, self.sequence_len)
        return torch.empty(shape, dtype=torch.int64, pin_memory=pin)

    def _micro_batches(self, batch_2NT: torch.Tensor) -> list[MicroBatch]:
        inputs_NT, targets_NT = batch_2NT
        return list(zip(inputs_NT.split(self.device_rows), targets_NT.split(self.device_rows)))

    # --- from row numbers to rows on disk

    def _locate(self, number: int) -> tuple[int, int, int]:
        """Return (epoch, group, place in the group) of the row of this number.

        Groups are counted up to the one that holds the row: counting one that is not there means to wait for it.
        """
        begin = 0
        for group in range(len(self.rows.groups)):
            end = begin + self.rows.count_group(group)
            if number < end:
                return 0, group, number - begin
            begin = end
        # The number lies beyond the first epoch, which ends at `begin`.
        epoch, number_in_epoch = divmod(number, begin)
        _, group, place = self._locate(number_in_epoch)
        return epoch, group, place

    def _fill(self, step: int, buffer_2NT: torch.Tensor) -> None:
        """Write this rank's rows of a step: inputs and targets are the same row, one token apart."""
        inputs_NT, targets_NT = buffer_2NT.numpy()
        number = step * self.rows_per_step + self.rank
        end = (step + 1) * self.rows_per_step
        filled = 0
        while number < end:
            epoch, group, place = self._locate(number)
            # those of this rank's rows that lie in this group, in this epoch
            end_place = min(self.rows.count_group(group), place + end - number)
            rows_M = self._group_order(epoch, group)[place : end_place : self.world_size]
            part = slice(filled, filled + len(rows_M))
            self._copy(group, rows_M, inputs_NT[part], targets_NT[part])
            filled += len(rows_M)
            number += len(rows_M) * self.world_size

    def _group_order(self, epoch: int, group: int) -> np.ndarray:
        """Return the order of a group's rows in this epoch. The last one is kept: many steps read the same."""
        key, order_R = self._last_order
        if key != (epoch, group):
            generator = np.random.default_rng((self.seed, epoch, group))
            order_R = generator.permutation(self.rows.count_group(group))
            self._last_order = ((epoch, group), order_R)
        return order_R

    def _copy(self, group: int, rows_M: np.ndarray, inputs_MT: np.ndarray, targets_MT: np.ndarray) -> None:
        """Copy rows of a group, numbered over all of its shards."""
        first_row = 0
        for shard in self.rows.groups[group]:
            end_row = first_row + self.rows.count(shard)
            here_K = np.flatnonzero((first_row <= rows_M) & (rows_M < end_row))
            if len(here_K):
                rows_KT1, targets_KT = self.rows.open(shard).read(rows_M[here_K] - first_row)
                inputs_MT[here_K] = rows_KT1[:, :-1]
                targets_MT[here_K] = targets_KT
            first_row = end_row
