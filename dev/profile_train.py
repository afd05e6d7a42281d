"""Where the time of a training step goes: runs scripts.base_train with the flags after -- under torch's profiler and
groups the operators' own time. For example: python -m dev.profile_train --steps 5 -- --depth 4 --max-seq-len 512
"""

import re
import shutil
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
from dev.runner import split_argv
from torch.profiler import ProfilerActivity, profile, record_function

import nanochat.gpt
from dev.bench_old import markdown_table, write_report
from nanochat import cli
from nanochat.common import get_base_dir
from nanochat.optim import MuonAdamW
from scripts import base_train

# The group of an operator is that of the first pattern found in its own name or in that of an operator it is part of.
GROUPS = {
    "optimizer": r"^part: optimizer$",
    "loss": r"^part: loss$|ChunkedLoss|cross_entropy|log_softmax|nll_loss",
    "attention": r"attention|flash|sdpa|flex",
}
MATMUL = r"(^|::)(add|badd)?b?mm$|linear|matmul|scaled_mm|gemm"  # by its own name alone
REST = "rest (norms, activations, embeddings, copies)"
IDLE = "outside operators (Python, waiting for rows)"


@dataclass(frozen=True)
class Config:
    """Flags of the profile."""

    steps: int = cli.option(5, "steps profiled")
    warmup: int = cli.option(5, "steps before them")
    top: int = cli.option(12, "operators listed by name")
    out: str | None = cli.option(None, "record to write, without suffix; unset = evals/profile_train")

    def __post_init__(self) -> None:
        if self.steps < 1 or self.warmup < 1:
            raise ValueError("--steps and --warmup must be at least 1")


def group_of(names: Iterable[str]) -> str:
    """The group of an operator by its name, the first, and those of what it is part of, from the inside out."""
    names = list(names)
    for group, pattern in GROUPS.items():
        if any(re.search(pattern, name) for name in names):
            return group
    return "matmul" if re.search(MATMUL, names[0]) else REST


def own_time(events: Iterable[Any], cuda: bool) -> tuple[Counter[str], Counter[str]]:
    """Microseconds by group and by operator, of the device's kernels on CUDA, of the processor elsewhere."""
    groups: Counter[str] = Counter()
    operators: Counter[str] = Counter()
    for event in events:
        spent = event.self_device_time_total if cuda else event.self_cpu_time_total
        names, parent = [event.name], event.cpu_parent
        while parent is not None:
            names.append(parent.name)
            parent = parent.cpu_parent
        groups[group_of(names)] += spent
        operators[event.name] += spent
    return groups, operators


@contextmanager
def steps_profiled(warmup: int, steps: int) -> Iterator[dict[str, Any]]:
    """Profile `steps` training steps of whatever trains within, after `warmup` of them.

    Yields a dict that holds their "events" and "seconds" at the end.
    """
    result: dict[str, Any] = {"events": []}
    cuda = torch.cuda.is_available()
    profiler = profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])])
    step, loss, done = MuonAdamW.step, nanochat.gpt.softcap_cross_entropy, 0

    def profiled_step(*args: Any, **kwargs: Any) -> Any:
        nonlocal done
        with record_function("part: optimizer"):
            value = step(*args, **kwargs)
        done += 1
        if done == warmup:
            profiler.start()
            result["seconds"] = -time.perf_counter()
        elif done == warmup + steps:
            if cuda:
                torch.cuda.synchronize()
            result["seconds"] += time.perf_counter()
            profiler.stop()
            result["events"] = list(profiler.events())
        return value

    def marked_loss(*args: Any, **kwargs: Any) -> Any:
        with record_function("part: loss"):
            return loss(*args, **kwargs)

    with patch.object(MuonAdamW, "step", profiled_step), patch("nanochat.gpt.softcap_cross_entropy", marked_loss):
        yield result


def table_of(result: dict[str, Any], steps: int, cuda: bool) -> tuple[list[dict[str, Any]], Counter[str]]:
    """Milliseconds a step and share by group, largest first, and microseconds by operator."""
    groups, operators = own_time(result["events"], cuda)
    groups[IDLE] = max(0.0, result["seconds"] * 1e6 - groups.total())
    whole = groups.total()
    rows = [
        {"part of a step": group, "ms": spent / 1e3 / steps, "share": f"{spent / whole:.1%}"}
        for group, spent in groups.most_common()
    ]
    return rows, operators


def main() -> None:
    own, flags = split_argv(sys.argv[1:])
    config = cli.parse(Config, own, __doc__)
    last = config.warmup + config.steps
    sys.argv = ["scripts.base_train", *flags, f"--num-iterations={last}", "--model-tag=profile", "--eval-every=0"]
    sys.argv += ["--sample-every=0", "--eval-tokens=4096", "--warmup-steps=0"]
    with steps_profiled(config.warmup, config.steps) as result:
        base_train.main()
    for left in ("checkpoints", "runs"):  # no run to be reported on
        shutil.rmtree(get_base_dir() / left / "base" / "profile")
    cuda = torch.cuda.is_available()
    rows, operators = table_of(result, config.steps, cuda)
    named = [{"operator": name, "ms a step": us / 1e3 / config.steps} for name, us in operators.most_common(config.top)]
    clock = "device time" if cuda else "processor time of the calling thread"
    spent = f"{result['seconds'] / config.steps * 1e3:,.1f} ms a step under the profiler; operators' own {clock}"
    page = f"# Profile of {config.steps} training steps\n\n`{' '.join(flags)}`\n\n{spent}.\n\n"
    page += f"{markdown_table(rows)}\n{markdown_table(named)}"
    record = {"flags": flags, "seconds_per_step": result["seconds"] / config.steps, "groups": rows, "operators": named}
    write_report(config.out or get_base_dir() / "evals" / "profile_train", record, page)


if __name__ == "__main__":
    cli.run(main)
