"""Where the time of a training step goes: `python -m dev.bench train --profile`.

`profiled` watches whatever trains within it by wrapping the optimizer's step, the one call that ends every step.
`profile_table` sums what the profiler saw into groups of operators.
"""

import contextlib
import re
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any
from unittest.mock import patch

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from nanochat.optim import MuonAdamW

# The group of an operator is that of the first pattern found in its own name or in that of an operator around it.
GROUPS = {
    "optimizer": r"^part: optimizer$",
    "loss": r"ChunkedLoss|cross_entropy|log_softmax|nll_loss",
    "attention": r"attention|flash|sdpa|flex",
}
PRODUCT = r"(^|::)(add|badd)?b?mm$|linear|matmul|scaled_mm|gemm"  # by the operator's own name alone


@contextlib.contextmanager
def profiled(warmup: int, steps: int) -> Iterator[dict[str, Any]]:
    """Profile optimizer steps warmup+1 to warmup+steps of whatever trains within; the dict gets seconds and events."""
    result: dict[str, Any] = {}
    cuda = torch.cuda.is_available()
    activities = [ProfilerActivity.CPU, ProfilerActivity.CUDA] if cuda else [ProfilerActivity.CPU]
    profiler = profile(activities=activities)
    original_step = MuonAdamW.step
    done = 0

    def step(*args: Any, **kwargs: Any) -> Any:
        nonlocal done
        with record_function("part: optimizer"):
            value = original_step(*args, **kwargs)
        done += 1
        if done == warmup:
            profiler.start()
            result["began"] = time.perf_counter()
        elif done == warmup + steps:
            if cuda:
                torch.cuda.synchronize()
            result["seconds"] = time.perf_counter() - result["began"]
            profiler.stop()
            result["events"] = list(profiler.events())
        return value

    with patch.object(MuonAdamW, "step", step):
        yield result


def group_of(event: Any) -> str:
    """Return the part of a step that an operator belongs to, by its name and by those of the operators around it."""
    names = [event.name]
    parent = event.cpu_parent
    while parent is not None:
        names.append(parent.name)
        parent = parent.cpu_parent
    for group, pattern in GROUPS.items():
        if any(re.search(pattern, name) for name in names):
            return group
    return "matrix products" if re.search(PRODUCT, event.name) else "norms, activations, embeddings, copies"


def kernel_time(event: Any) -> float:
    """Return the microseconds of the kernels that an operator launched itself.

    A kernel is listed twice: here, and as an event of its own on the GPU, which has no kernels and so counts nothing.
    A range of `record_function` also has one "kernel" of its own name, which spans all kernels within the range.
    """
    return sum(kernel.duration for kernel in event.kernels if kernel.name != event.name)


def profile_table(result: dict[str, Any], steps: int) -> list[dict[str, Any]]:
    """Sum the operators' own time (of the kernels on CUDA, else of the calling thread) by group, largest first."""
    cuda = torch.cuda.is_available()
    groups: Counter[str] = Counter()
    for event in result["events"]:
        groups[group_of(event)] += kernel_time(event) if cuda else event.self_cpu_time_total
    groups["outside operators (Python, waiting)"] = max(0.0, result["seconds"] * 1e6 - groups.total())
    rows = []
    for group, microseconds in groups.most_common():
        share = microseconds / groups.total()
        rows.append({"part of a step": group, "ms": microseconds / 1e3 / steps, "share": share})
    return rows
