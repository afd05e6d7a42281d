"""How many rows of a step a device takes at once, and whether it recomputes activations.

A step's rows rarely fit a device together. They are taken in micro-batches, whose gradients add up: more rows at once
are faster, until memory runs out. On CUDA `choose_device_batch` finds by trial what fits.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from nanochat.compute import Compute
from nanochat.fp8 import weights_quantised
from nanochat.gpt import GPT
from nanochat.recipe import TrainConfig

# The most rows that a device takes at once by default. 2^16 tokens keep a GPU busy, so more rows gain nothing; on a CPU
# more rows only need more memory.
CPU_ROWS = 32
CUDA_TOKENS = 2**16


@dataclass(frozen=True)
class DeviceBatch:
    """How a device takes its share of a step: `accumulation` micro-batches of `rows` rows."""

    rows: int
    accumulation: int
    recompute: bool  # recompute activations in the backward pass (arXiv 1604.06174)
    peak: int | None  # bytes of memory at the peak, measured on CUDA; None elsewhere


def choose_device_batch(model: GPT, config: TrainConfig, compute: Compute, share: int) -> DeviceBatch:
    """Choose how many of its `share` of a step's rows each device takes at once.

    A given --device-batch-size is taken as it is if it fits. On CUDA the choice is tried: rows are halved until a
    forward and backward pass fits, then once more with recomputation. A step that ran out of memory on one rank would
    leave the others waiting for it, so all ranks agree here. Raises ValueError if nothing fits.
    """
    cuda = compute.device.type == "cuda"
    most_rows = max(1, CUDA_TOKENS // model.config.sequence_len) if cuda else CPU_ROWS
    if config.device_batch_size is None:
        candidates = halvings(share, most_rows)
    else:
        candidates = [config.device_batch_size, *halvings(share, config.device_batch_size // 2)]
    recompute_options = [False, True]
    if config.activation_checkpointing is not None:
        recompute_options = [config.activation_checkpointing]
    for recompute in recompute_options:
        for rows in candidates:
            peak = try_device_batch(model, compute, rows, recompute) if cuda else None
            # Memory may differ between devices, but the number of rows must not.
            if not compute.any_rank(cuda and peak is None):
                return DeviceBatch(rows=rows, accumulation=max(1, share // rows), recompute=recompute, peak=peak)
    raise out_of_memory(candidates[-1])


def halvings(share: int, most: int) -> list[int]:
    """Return divisors of `share`: the largest up to `most`, then each time the largest up to half the one before.

    halvings(24, 32) -> [24, 12, 6, 3, 1]
    """
    result = []
    while most >= 1:
        rows = next(n for n in range(min(share, most), 0, -1) if share % n == 0)
        result.append(rows)
        most = rows // 2
    return result


def try_device_batch(model: GPT, compute: Compute, rows: int, recompute: bool) -> int | None:
    """Run two forward and backward passes on `rows` rows; return the peak in bytes, or None when out of memory."""
    n_parameters = sum(p.numel() for p in model.parameters())
    if compute.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(compute.device)
    model.train()
    try:
        # Takes the memory of the temporary fp32 copies of this rank's parameters that the optimizer's step makes.
        copies = torch.empty(8 * n_parameters // compute.world_size, dtype=torch.uint8, device=compute.device)
        idx_BT = torch.zeros(rows, model.config.sequence_len, dtype=torch.int64, device=compute.device)
        # The second pass runs beside the gradients of the first, as it does when micro-batches accumulate.
        with weights_quantised(model):
            for _ in range(2):
                model(idx_BT, idx_BT, loss_reduction="sum", recompute=recompute).backward()
        compute.synchronize()
        peak = compute.peak_memory()
        del copies, idx_BT
    except torch.OutOfMemoryError:
        peak = None
    for parameter in model.parameters():
        parameter.grad = None
    if compute.device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(compute.device)
    return peak


def out_of_memory(rows: int) -> ValueError:
    """Return the error for a device that cannot take `rows` rows at once."""
    less = "--device-batch-size, --depth or --max-seq-len, or --activation-checkpointing"
    return ValueError(f"out of memory with {rows} rows at once: try a smaller {less}")


@contextlib.contextmanager
def explain_out_of_memory(rows: int) -> Iterator[None]:
    """Turn an out-of-memory error in the block into a ValueError that names the remedy."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise ValueError(f"{out_of_memory(rows)}; then --resume auto goes on from the newest checkpoint") from error
