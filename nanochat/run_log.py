"""The log of a run: metrics.jsonl for programs, wandb where it was asked for, and a progress line for people."""

import contextlib
import json
import sys
from pathlib import Path
from typing import Any

from nanochat.common import atomic_write, print0


class RunLog:
    """Writes one line of metrics per step or evaluation. Rank 0 writes; on other ranks every method does nothing.

    A line with `loss` belongs to a step, one without to an evaluation. Close it at the end (contextlib.closing).
    """

    def __init__(
        self,
        folder: Path,
        *,
        title: str,
        first_step: int,
        num_iterations: int,
        wandb_name: str | None,
        config: dict[str, Any],
        rank: int,
    ) -> None:
        """Open `folder`/metrics.jsonl for appending. Raises ValueError when wandb is wanted and cannot be used."""
        self.num_iterations = num_iterations
        self.file = None
        self.wandb = None
        self.bar = None
        if rank != 0:
            return
        if wandb_name is not None:
            self.wandb = start_wandb(wandb_name, config, folder)
        # A bar redraws its line, which is right for a terminal and wrong for a file.
        if sys.stderr.isatty():
            with contextlib.suppress(ImportError):
                from tqdm import tqdm

                self.bar = tqdm(total=num_iterations, initial=first_step, desc=title, dynamic_ncols=True)
        # Line buffering: a killed run loses at most the line in hand.
        self.file = open(folder / "metrics.jsonl", "a", buffering=1)  # noqa: SIM115

    def write(self, line: dict[str, Any]) -> None:
        """Append a line of metrics to metrics.jsonl and wandb, and show it on the screen."""
        if self.file is None:
            return
        self.file.write(json.dumps(line) + "\n")
        if self.wandb is not None:
            self.wandb.log(line, step=line["step"])
        if "loss" not in line:
            scores = [f"{name} {value:.4f}" for name, value in line.items() if isinstance(value, float)]
            self.say(f"step {line['step']}: {', '.join(scores)}")
        elif self.bar is not None:
            self.bar.set_postfix_str(f"{_scores(line)}, {line['tok_per_sec']:,.0f} tok/s")
            self.bar.update()
        elif line["step"] <= 3 or line["step"] % max(1, self.num_iterations // 50) == 0:
            # Without a bar about fifty lines tell of a whole run, and the first three show that it has begun.
            print0(self._progress(line))

    def say(self, text: str) -> None:
        """Print a message without tearing the progress bar."""
        if self.file is None:
            return
        if self.bar is not None:
            self.bar.write(text)
        else:
            print0(text)

    def close(self) -> None:
        """Close the file, the bar and the wandb run."""
        if self.bar is not None:
            self.bar.close()
        if self.wandb is not None:
            self.wandb.finish()
        if self.file is not None:
            self.file.close()

    def _progress(self, line: dict[str, Any]) -> str:
        mfu = "n/a" if line["mfu"] is None else f"{line['mfu']:.1%}"
        minutes_left = (self.num_iterations - line["step"]) * line["dt"] / 60
        return (
            f"step {line['step']:5d}/{self.num_iterations} | {_scores(line)} | lr x{line['lr_mult']:.3f} | "
            f"{line['tok_per_sec']:,.0f} tok/s | mfu {mfu} | epoch {line['epoch']} | {minutes_left:.1f} min left"
        )


def drop_lines_after(folder: Path, step: int) -> None:
    """Remove the metrics of steps that a resumed run will repeat, and a line that a kill has cut short."""
    path = folder / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    kept = []
    for line in lines:
        with contextlib.suppress(json.JSONDecodeError):
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
    atomic_write(path, "".join(kept))


def start_wandb(name: str, config: dict[str, Any], folder: Path) -> Any:
    """Start the wandb run `name`; raises ValueError when wandb is not installed or refuses."""
    try:
        import wandb
    except ImportError as error:
        raise ValueError(f"--run {name} needs wandb: pip install wandb, or leave --run out") from error
    try:
        wandb.init(project="nanochat", name=name, config=config, dir=str(folder))
    except wandb.Error as error:
        raise ValueError(f"--run {name}: {error}: log in to wandb, or set WANDB_MODE=offline") from error
    return wandb


def _scores(line: dict[str, Any]) -> str:
    return ", ".join(f"{name} {line[name]:.4f}" for name in ("loss", "reward") if name in line)
