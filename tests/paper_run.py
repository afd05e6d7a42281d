"""Runs of the real training loop on a FakeGpu: rows without values, and nothing written to disk but the metrics."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from nanochat import checkpoint, gpt, trainer
from nanochat.compute import Compute
from nanochat.dataloader import MicroBatch, RowLoader
from nanochat.optim import MuonAdamW
from nanochat.recipe import LEARNING_RATES, TrainConfig
from nanochat.run import Run

VOCABULARY = 32768
TOKENIZER: Any = SimpleNamespace(
    hash="0",
    token_bytes=[1] * VOCABULARY,
    special_tokens={},
    stop_tokens=(),
    get_vocab_size=lambda: VOCABULARY,
    encode_special=lambda name: 3,
    encode=lambda text, prepend: [1, 2],
    decode=lambda ids: "x" * len(ids),
)


class PaperRows:
    """Some number of packed rows that nobody reads."""

    groups = ((),)
    folders = ()
    may_grow = False

    def __init__(self, sequence_len: int, count: int) -> None:
        self.sequence_len = sequence_len
        self.count = count

    def total(self) -> int:
        return self.count

    def count_group(self, group: int) -> int:
        return self.count


class PaperLoader(RowLoader):
    """The real loader, except that a step's rows appear on the device instead of being copied there."""

    def step(self, step: int) -> list[MicroBatch]:
        shape = (2, self.rows_per_step // self.world_size, self.sequence_len)
        return self._micro_batches(torch.zeros(shape, dtype=torch.int64, device=self.device))

    def iterate(self, start_step: int = 0) -> Iterator[tuple[int, list[MicroBatch]]]:
        while True:
            yield start_step, self.step(start_step)
            start_step += 1


def make_run(model: gpt.GPT, compute: Compute, config: TrainConfig, total_batch_size: int) -> Run:
    optimizer = MuonAdamW(model, dict(LEARNING_RATES), 0.28, compute)
    return Run(
        stage="base",
        tag="paper",
        config=config,
        model=model,
        optimizer=optimizer,
        tokenizer=TOKENIZER,
        compute=compute,
        total_batch_size=total_batch_size,
        num_iterations=config.num_iterations,
        facts={"dataset": "paper", "depth": model.config.n_layer},
    )


def written(tensors: dict[str, torch.Tensor], path: Path) -> str:
    """Stands in for checkpoint._write_tensors: tensors without values are not written, and have no hash."""
    return "hash"


def gathered(values: list[Any], value: Any) -> None:
    """Stands in for dist.all_gather_object, which pickles to tensors; a barrier stands for it in what is sent."""
    dist.barrier()
    values[:] = [value] * len(values)


def train(run: Run, **arguments: Any) -> None:
    """The real `trainer.train`."""
    T = run.model.config.sequence_len
    with mock.patch.object(trainer, "RowLoader", PaperLoader), mock.patch.object(checkpoint, "_write_tensors", written):
        trainer.train(run, PaperRows(T, 10_000), PaperRows(T, 1000), **arguments)


@contextlib.contextmanager
def one_of_ranks(rank: int, world_size: int) -> Iterator[Compute]:
    """Be one of so many ranks. PyTorch's "fake" process group checks what it is given, and sends nothing."""
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    places = {"RANK": str(rank), "WORLD_SIZE": str(world_size)}
    try:
        with (
            mock.patch.dict(os.environ, places),
            mock.patch.object(dist, "all_gather_object", gathered),
            mock.patch.object(Compute, "from_rank_0", lambda self, make: make()),
        ):
            yield Compute.create("cuda")
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
