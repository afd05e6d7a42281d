"""A training loop that is timed part by part, for our model or another one: forward, backward, optimizer.

    side = Trainable(device, kernels, forward, update)
    measure(side, batches, steps=3)          losses, and the milliseconds of each part of a step
    busy_milliseconds(side, batches)         how long the GPU computed in a step

This file imports nothing of nanochat: dev/reference.py uses it in a process where `nanochat` is another project.
"""

import contextlib
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

Batch = tuple[torch.Tensor, torch.Tensor]  # inputs_BT, targets_BT
Batches = Iterator[list[Batch]]  # the micro-batches of each step


@dataclass(frozen=True)
class Trainable:
    """A model with its optimizer."""

    device: torch.device
    kernels: str  # which it runs with
    forward: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # mean loss of a micro-batch
    update: Callable[[], Any]  # of the weights, by their gradients, which it clears
    around: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext  # all micro-batches of a step


class Stopwatch:
    """Laps on the device's own clock: marks in its queue of work, which are read when all of it is done."""

    def __init__(self, device: torch.device) -> None:
        self.on_gpu = device.type == "cuda"
        self.marks = [("", self._now())]

    def _now(self) -> Any:
        if not self.on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def lap(self, name: str) -> None:
        """End a lap; those of one name are added up."""
        self.marks.append((name, self._now()))

    def milliseconds(self) -> dict[str, float]:
        """Return the time of the laps by their names."""
        if self.on_gpu:
            torch.cuda.synchronize()
        laps: Counter[str] = Counter()
        for (_, began), (name, ended) in zip(self.marks, self.marks[1:]):
            laps[name] += began.elapsed_time(ended) if self.on_gpu else 1e3 * (ended - began)
        return dict(laps)


def measure(side: Trainable, batches: Batches, steps: int) -> dict[str, Any]:
    """Train so many steps; return the loss of each, the time of a step, and that of its parts, in milliseconds.

    The part `rows` is the time that the device stood still, or copied, before it had the rows of a step.
    """
    if side.device.type == "cuda":
        torch.cuda.synchronize()
    watch = Stopwatch(side.device)
    losses = []
    for _ in range(steps):
        micro_batches = next(batches)
        watch.lap("rows")
        with side.around():
            for idx_BT, targets_BT in micro_batches:
                loss = side.forward(idx_BT, targets_BT) / len(micro_batches)
                watch.lap("forward")
                loss.backward()
                watch.lap("backward")
                losses.append(loss.detach())
        side.update()
        watch.lap("optimizer")
    parts = {name: ms / steps for name, ms in watch.milliseconds().items()}
    by_step = torch.stack(losses).view(steps, -1).sum(1)
    return {"losses": by_step.tolist(), "ms": sum(parts.values()), **{f"{name} ms": ms for name, ms in parts.items()}}


def facts(side: Trainable) -> dict[str, Any]:
    """Return how many graphs torch.compile has made in this process, and the most memory of the GPU that it held."""
    on_gpu = side.device.type == "cuda"
    return {
        "kernels": side.kernels,
        "graphs": torch._dynamo.utils.counters["stats"]["unique_graphs"],
        "peak bytes": torch.cuda.max_memory_allocated(side.device) if on_gpu else None,
    }


def busy_milliseconds(side: Trainable, batches: Batches) -> float | None:
    """Return how long the GPU was computing in one step, as the profiler sees it; None on a CPU."""
    on_gpu = side.device.type == "cuda"
    activities = [ProfilerActivity.CPU, ProfilerActivity.CUDA] if on_gpu else [ProfilerActivity.CPU]
    with profile(activities=activities) as profiler:
        measure(side, batches, steps=1)
    busy = covered_milliseconds(profiler.events())
    return busy if on_gpu else None


def covered_milliseconds(events: Any) -> float:
    """Return the time that kernels and copies cover: two at once count once, ranges that name others not at all."""
    spans = [
        (event.time_range.start, event.time_range.end)
        for event in events
        if event.device_type == DeviceType.CUDA and not event.is_user_annotation
    ]
    covered = 0.0
    end = 0.0
    for began, ended in sorted(spans):
        covered += max(0.0, ended - max(began, end))
        end = max(end, ended)
    return covered / 1e3
