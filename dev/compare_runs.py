"""One training run of dev.compare: its flags, the program that is run, and what its output shows.

`train` starts scripts.base_train of one side in a process of its own through dev/reference.py. Our losses are
read from metrics.jsonl, those of the reference from the lines that it prints.
"""

import json
import os
import re
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dev.measure import ROOT
from nanochat import cli


@dataclass(frozen=True)
class Compare:
    """Flags of the comparison."""

    baseline_dir: str = cli.option("", "checkout of karpathy/nanochat, outside this repository")
    work_dir: str | None = cli.option(None, "folder for data, runs and logs; unset: a new temporary one")
    data: str = cli.option("builtin", "training text: builtin, or a folder of .parquet, .jsonl or .txt")
    depth: int = cli.option(4, "depth of the model")
    vocab_size: int = cli.option(4096, "tokenizer size")
    seq_len: int = cli.option(512, "context in tokens")
    head_dim: int = cli.option(64, "channels of a head")
    window_pattern: str = cli.option("L", "attention windows")
    batch_tokens: int = cli.option(8192, "tokens a step")
    device_batch_size: int = cli.option(16, "rows a device takes at once")
    steps: int = cli.option(200, "steps of each run at equal tokens; the reference warms up for 40 of them")
    repeats: int = cli.option(2, "rounds; every side runs once in each")
    evals: int = cli.option(4, "evaluations in a run, the last at its end")
    eval_tokens: int = cli.option(131072, "validation tokens")
    minutes: float | None = cli.option(None, "also train every side for so long")
    baseline_dtypes: str = cli.option("float32,bfloat16", "the reference's NANOCHAT_DTYPE; one side for each")
    our_flags: str = cli.option("", "more flags for our base_train, in one string")
    baseline_flags: str = cli.option("", "more flags for the reference's base_train")
    device_type: str | None = cli.option(None, "cuda or cpu; unset: cuda where there is one")
    parity: bool = cli.option(False, "instead: equal losses from equal rows, weights and hyperparameters")
    out: str | None = cli.option(None, "JSON record to write; unset: compare.json in --work-dir")

    def __post_init__(self) -> None:
        if not (Path(self.baseline_dir) / "scripts" / "base_train.py").is_file():
            raise ValueError(f"--baseline-dir {self.baseline_dir}: clone karpathy/nanochat and name its folder")
        cli.require_positive(self, "depth", "batch_tokens", "steps", "repeats", "evals", "eval_tokens", "minutes")
        if self.batch_tokens % (self.seq_len * self.device_batch_size):
            raise ValueError(f"--batch-tokens {self.batch_tokens}: no multiple of --device-batch-size rows")


@dataclass(frozen=True)
class Side:
    """One of the programs compared: ours, or the reference in one of its dtypes. `root` is its checkout."""

    name: str
    root: Path
    base: Path  # its NANOCHAT_BASE_DIR
    flags: list[str]
    given: dict[str, Any]  # what is held equal inside its process: see `train` in reference.py
    dtype: str | None = None


@dataclass
class Curve:
    """Losses, times and scores of one training run. Its clock counts from the process's start, without evaluations."""

    losses: list[float]  # of each step, in nats a token
    seconds: list[float]  # of each step, as the side itself reports them
    evals: dict[int, float]  # bits per byte after so many steps
    first_step: float  # seconds from the start of the process to the end of the first step

    def clock(self, step: int) -> float:
        """Return the seconds from the start to the end of this step."""
        return self.first_step + sum(self.seconds[1:step])


@dataclass(frozen=True)
class Outcome:
    """One training run of one side."""

    side: str
    curve: Curve
    tokens_per_second: float


Line = tuple[float, str]  # of a process's output: seconds since its start, text


def train(side: Side, config: Compare, steps: int, eval_tokens: int, eval_every: int, log: Path) -> Outcome:
    """Run one side to its end. Raises ValueError with the last lines of its output when it fails."""
    flags = [
        f"--depth={config.depth}",
        f"--head-dim={config.head_dim}",
        f"--window-pattern={config.window_pattern}",
        f"--max-seq-len={config.seq_len}",
        f"--device-batch-size={config.device_batch_size}",
        f"--total-batch-size={config.batch_tokens}",
        f"--num-iterations={steps}",
        f"--eval-every={eval_every}",
        f"--eval-tokens={eval_tokens}",
        *side.flags,
    ]
    command = [sys.executable, "dev/reference.py", "train", str(side.root), json.dumps(side.given), *flags]
    environment = {name: value for name, value in os.environ.items() if name != "NANOCHAT_DTYPE"}
    environment["NANOCHAT_BASE_DIR"] = str(side.base)
    environment["PYTHONUNBUFFERED"] = "1"
    if side.dtype is not None:
        environment["NANOCHAT_DTYPE"] = side.dtype
    print(f"{side.name}: {steps} steps, log in {log}", flush=True)
    began = time.monotonic()
    lines: list[Line] = []
    pipe = subprocess.PIPE
    with subprocess.Popen(
        command, env=environment, cwd=ROOT, stdout=pipe, stderr=subprocess.STDOUT, text=True
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            lines.append((time.monotonic() - began, line))
    log.parent.mkdir(parents=True, exist_ok=True)
    log.write_text("".join(line for _, line in lines), encoding="utf-8")
    if process.returncode:
        raise ValueError(f"{side.name} ended with status {process.returncode}: see {log}")
    curve = read_ours(side, lines) if side.root == ROOT else read_reference(lines)
    # the first steps compile and warm up
    rate = config.batch_tokens / statistics.median(curve.seconds[min(10, len(curve.seconds) // 4) :])
    print(f"  {rate:,.0f} tokens/s, {curve.evals[max(curve.evals)]:.4f} bits per byte at the end", flush=True)
    return Outcome(side.name, curve, rate)


def read_ours(side: Side, lines: list[Line]) -> Curve:
    """Read our run from its metrics; only the clock of the first step comes from what it printed."""
    path = side.base / "runs" / "base" / "compare" / "metrics.jsonl"
    metrics = [json.loads(line) for line in path.read_text().splitlines()]
    steps = [line for line in metrics if "loss" in line]
    return Curve(
        losses=[line["loss"] for line in steps],
        seconds=[line["dt"] for line in steps],
        evals={line["step"]: line["val_bpb"] for line in metrics if "val_bpb" in line},
        first_step=next(when for when, text in lines if re.match(r"step +1/", text)),
    )


def read_reference(lines: list[Line]) -> Curve:
    """Read what the reference printed.

    Its loss is a moving average, m = 0.9·m + 0.1·loss, divided by 1 - 0.9^step; undone here, losses are right to 1e-5.
    """
    curve = Curve(losses=[], seconds=[], evals={}, first_step=0.0)
    average = 0.0
    evaluating = 0.0  # seconds that evaluations took before the first step
    before = 0.0
    for when, text in lines:
        if match := re.match(r"step (\d+)/\d+ .*\| loss: (\S+) .*\| dt: ([\d.]+)ms", text):
            step = int(match[1]) + 1
            previous = average
            average = float(match[2]) * (1 - 0.9**step)
            if not curve.losses:
                curve.first_step = when - evaluating
            curve.losses.append((average - 0.9 * previous) / 0.1)
            curve.seconds.append(float(match[3]) / 1000)
        elif match := re.match(r"Step (\d+) \| Validation bpb: (\S+)", text):
            curve.evals[int(match[1])] = float(match[2])
            if not curve.losses:
                evaluating += when - before
        before = when
    return curve
