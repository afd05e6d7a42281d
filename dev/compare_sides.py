"""The two sides of a comparison: how each is prepared, started, watched and read. The reference is driven from outside.

Both are run as users run them (`scripts.base_train` with flags) by this interpreter, each in its own base directory.
"""

import contextlib
import json
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from nanochat.dataloader import RowLoader
from nanochat.dataset import list_shards
from nanochat.token_shards import TextRows
from nanochat.tokenizer import Tokenizer, load_tokenizer

ROOT = Path(__file__).resolve().parent.parent
CHILD = ROOT / "dev" / "compare_child.py"


# --- a run and what came of it ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Outcome:
    """What one training run showed. Its clock counts from the start of the process and stops during evaluations."""

    losses: list[float]  # of each step, in nats a token
    seconds: list[float]  # of each step, as the side itself reports them
    evals: dict[int, float]  # bits per byte after so many steps
    first_step: float  # seconds from process start to the end of the first step, without evaluation
    wall: float  # seconds of the whole process
    peak_bytes: int  # resident memory of the process; on CUDA, memory allocated on the device

    def clock(self, step: int) -> float:
        """Seconds until the end of `step`: the first step with all that precedes it, then the steps alone."""
        return self.first_step + sum(self.seconds[1:step])


@dataclass(frozen=True)
class Transcript:
    """A process's output lines with the seconds at which they came."""

    lines: list[tuple[float, str]]
    wall: float
    peak_bytes: int

    def when(self, pattern: str) -> float:
        """Seconds at which the first line that matches came."""
        found = next((seconds for seconds, line in self.lines if re.match(pattern, line)), None)
        if found is None:
            raise ValueError(f"a run left no line like {pattern!r}: see its log in --work-dir")
        return found


def supervise(command: Sequence[str], env: dict[str, str], log: Path, label: str = "") -> Transcript:
    """Run a command to its end, showing a line of progress now and then; its whole output goes to `log`.

    However this call ends, by Ctrl-C too, no process of the command is left. ValueError when the command fails.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    began, shown, peak, lines = time.monotonic(), 0.0, 0, []
    process = subprocess.Popen(
        command, env=env, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    try:
        with open(log, "w", buffering=1) as file:
            for line in process.stdout:
                now = time.monotonic() - began
                lines.append((now, line.rstrip()))
                file.write(line)
                peak = max(peak, _resident_peak(process.pid))
                if re.match("step", line, re.I) and (now - shown > 15 or "bpb" in line):
                    shown = now
                    print(f"  {label} {now:6.1f} s  {line.strip()[:100]}", flush=True)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    finally:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        process.stdout.close()
        process.wait()
    if process.returncode:
        last = next((line for _, line in reversed(lines) if line.strip()), "no output")
        raise ValueError(
            f"{label or command[0]} ended with status {process.returncode} ({last}): its output is in {log}"
        )
    return Transcript(lines, time.monotonic() - began, peak or usage.ru_maxrss * 1024)


def _resident_peak(pid: int) -> int:
    """Most bytes a process has held; 0 where the system does not say. (What wait4 says includes its parent's.)"""
    with contextlib.suppress(OSError):
        found = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
        return int(found[1]) * 1024 if found else 0
    return 0


def child_environment(base: Path, dtype: str | None) -> dict[str, str]:
    """The environment of a run: its own base directory and compiler cache; `dtype` unset leaves the choice to it."""
    env = {name: value for name, value in os.environ.items() if name != "NANOCHAT_DTYPE"}
    env |= {"NANOCHAT_BASE_DIR": str(base), "PYTHONUNBUFFERED": "1"}
    env["TORCHINDUCTOR_CACHE_DIR"] = str(base / f"compiled-{dtype or 'default'}")
    return env | ({"NANOCHAT_DTYPE": dtype} if dtype else {})


# --- the sides -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Side(ABC):
    """One of the programs compared: `ours`, or the reference in one of its settings."""

    name: str
    base: Path  # its NANOCHAT_BASE_DIR
    dtype: str | None = None  # NANOCHAT_DTYPE
    flags: Sequence[str] = ()  # added to the flags that all sides share
    hooks: dict[str, Any] = field(default_factory=dict)  # see compare_child

    @abstractmethod
    def run(self, shared: Sequence[str], log: Path) -> Outcome:
        """Train with the shared flags and read what came of it."""

    def _train(self, root: Path, flags: Iterable[str], log: Path) -> Transcript:
        for left in ("runs", "checkpoints", "base_checkpoints"):  # of an earlier run: nothing is resumed
            shutil.rmtree(self.base / left, ignore_errors=True)
        command = [sys.executable, str(CHILD), str(root), json.dumps(self.hooks), *flags, *self.flags]
        return supervise(command, child_environment(self.base, self.dtype), log, self.name)


class Ours(Side):
    """This project."""

    def run(self, shared: Sequence[str], log: Path) -> Outcome:
        transcript = self._train(ROOT, [*shared, "--model-tag", "compare", "--sample-every", "0"], log)
        path = self.base / "runs" / "base" / "compare" / "metrics.jsonl"
        metrics = [json.loads(line) for line in path.read_text().splitlines()]
        steps = [line for line in metrics if "loss" in line]
        cuda = "cuda" in shared
        return Outcome(
            losses=[line["loss"] for line in steps],
            seconds=[line["dt"] for line in steps],
            evals={line["step"]: line["val_bpb"] for line in metrics if "val_bpb" in line},
            first_step=transcript.when(r"step +1/"),
            wall=transcript.wall,
            peak_bytes=max(line["peak_mem_bytes"] for line in steps) if cuda else transcript.peak_bytes,
        )


@dataclass(frozen=True)
class Reference(Side):
    """A checkout of karpathy/nanochat, at `checkout`."""

    checkout: Path = Path()

    def run(self, shared: Sequence[str], log: Path) -> Outcome:
        off = [f"--{name}=-1" for name in ("core-metric-every", "sample-every", "save-every")]
        return read_reference(self._train(self.checkout, [*shared, *off], log))


_STEP = re.compile(r"step (\d+)/\d+ .*\| loss: (\S+) .*\| dt: ([\d.]+)ms")
_EVAL = re.compile(r"Step (\d+) \| Validation bpb: (\S+)")
_PEAK = re.compile(r"Peak memory usage: ([\d.]+)MiB")


def read_reference(transcript: Transcript) -> Outcome:
    """What the reference printed. Its loss is a debiased moving average (0.9) with six digits; the losses themselves
    follow from it within 1e-5. With gradient accumulation they are those of each step's last micro-batch."""
    losses, seconds, evals, average = [], [], {}, 0.0
    first_step = evaluating = before = 0.0
    peak = transcript.peak_bytes
    for when, line in transcript.lines:
        if match := _STEP.match(line):
            step = int(match[1]) + 1
            previous, average = average, float(match[2]) * (1 - 0.9**step)
            losses.append((average - 0.9 * previous) / 0.1)
            seconds.append(float(match[3]) / 1000)
            first_step = first_step or when - evaluating
        elif match := _EVAL.match(line):
            evals[int(match[1])] = float(match[2])
            evaluating += when - before if not losses else 0.0
        elif (match := _PEAK.match(line)) and float(match[1]):
            peak = round(float(match[1]) * 2**20)
        before = when
    if not losses:
        raise ValueError("the reference printed no training step: is --baseline-dir a checkout of karpathy/nanochat?")
    return Outcome(losses, seconds, evals, first_step, transcript.wall, peak)


# --- equal data ------------------------------------------------------------------------------------------------------


def save_rows(path: Path, batches: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> int:
    """Write rows of inputs and targets (-1 = not counted) for `compare_child.serve`; returns their number."""
    inputs, targets = zip(*batches)
    rows = {"inputs": torch.cat(inputs), "targets": torch.cat(targets)}
    torch.save(rows, path)
    return len(rows["inputs"])


def save_validation_rows(path: Path, dataset: str, seq_len: int, tokens: int, batch_rows: int) -> int:
    """Write the rows that our trainer evaluates on, at most `tokens` in whole batches; returns their tokens."""
    loader = RowLoader(TextRows(dataset, "val", load_tokenizer(), seq_len), batch_rows, batch_rows, 0)
    rows = min(tokens // seq_len, loader.rows_in_epoch) // batch_rows * batch_rows
    if not rows:
        raise ValueError(
            f"{dataset} has {loader.rows_in_epoch} rows of {seq_len} tokens for validation, and a batch takes "
            f"{batch_rows}: give --data more text, or lower --seq-len or --batch-tokens"
        )
    return save_rows(path, loader.first_rows(rows)) * seq_len


def prepare_ours(base: Path, data: str, vocab_size: int, logs: Path) -> Tokenizer:
    """Make dataset and tokenizer in our base directory, by our own entry points; what is there whole is kept.

    From here on `base` is this process's base directory too.
    """
    os.environ["NANOCHAT_BASE_DIR"] = str(base)
    env = child_environment(base, None)
    python = [sys.executable, "-m"]
    supervise([*python, "nanochat.dataset", "--name", data], env, logs / "dataset.log", "dataset")
    if not (base / "tokenizer" / "tokenizer.json").exists():
        train = [*python, "scripts.tok_train", "--dataset", data, "--vocab-size", str(vocab_size)]
        supervise(train, env, logs / "tokenizer.log", "tokenizer")
    return load_tokenizer()


def prepare_reference(base: Path, data: str, tokenizer: Tokenizer) -> None:
    """Give the reference's base directory the same text (validation shard last, as it wants it) and tokenizer."""
    folder = base / "base_data_climbmix"
    for path in (folder, base / "tokenizer"):
        path.mkdir(parents=True, exist_ok=True)
    for old in folder.iterdir():
        old.unlink()
    for index, shard in enumerate([*list_shards(data, "train"), *list_shards(data, "val")]):
        (folder / f"shard_{index:05d}.parquet").symlink_to(shard.resolve())
    with open(base / "tokenizer" / "tokenizer.pkl", "wb") as file:
        pickle.dump(tokenizer.encoding, file)
    torch.save(torch.tensor(tokenizer.token_bytes, dtype=torch.int32), base / "tokenizer" / "token_bytes.pt")
