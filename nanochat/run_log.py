"""What a run tells while it goes on: metrics.jsonl, wandb, and the screen."""

import contextlib
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from nanochat.common import atomic_write, print0


@contextlib.contextmanager
def open_log(
    folder: Path, title: str, step: int, steps: int, wandb_name: str | None, config: dict[str, Any], rank: int
) -> Iterator[Callable[[dict[str, Any]], None]]:
    """A function that takes a line of metrics: to metrics.jsonl, to wandb where it has a name, and to the screen.

    `step` of `steps` are made already. On ranks but the first it does nothing. ValueError where wandb is not to be had.
    """
    if rank:
        yield lambda line: None
        return
    bar = None
    if sys.stderr.isatty():
        with contextlib.suppress(ImportError):
            from tqdm import tqdm

            bar = tqdm(total=steps, initial=step, desc=title, dynamic_ncols=True)
    wandb = None if wandb_name is None else _start_wandb(wandb_name, config, folder)
    with open(folder / "metrics.jsonl", "a", buffering=1) as file:

        def log(line: dict[str, Any]) -> None:
            file.write(json.dumps(line) + "\n")
            if wandb is not None:
                wandb.log(line, step=line["step"])
            if "loss" not in line:
                scores = ", ".join(f"{k} {v:.4f}" for k, v in line.items() if isinstance(v, float))
                (bar.write if bar is not None else print0)(f"step {line['step']}: {scores}")
            elif bar is not None:
                bar.set_postfix_str(f"{_scores(line)}, {line['tok_per_sec']:,.0f} tok/s")
                bar.update()
            elif line["step"] <= 3 or line["step"] % max(1, steps // 50) == 0:
                print0(_plain(line, steps))

        try:
            yield log
        finally:
            if bar is not None:
                bar.close()
            if wandb is not None:
                wandb.finish()


def forget_after(folder: Path, step: int) -> None:
    """Drop the metrics of steps that will be made again, and a line that a kill cut short."""
    path = folder / "metrics.jsonl"
    kept = []
    for line in path.read_text().splitlines() if path.exists() else ():
        with contextlib.suppress(json.JSONDecodeError):
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
    atomic_write(path, "".join(kept))


def _scores(line: dict[str, Any]) -> str:
    return ", ".join(f"{name} {line[name]:.4f}" for name in ("loss", "reward") if name in line)


def _plain(line: dict[str, Any], steps: int) -> str:
    mfu = "n/a" if line["mfu"] is None else f"{line['mfu']:.1%}"
    left = (steps - line["step"]) * line["dt"] / 60
    return (
        f"step {line['step']:5d}/{steps} | {_scores(line)} | lr x{line['lr_mult']:.3f} | "
        f"{line['tok_per_sec']:,.0f} tok/s | mfu {mfu} | epoch {line['epoch']} | {left:.1f} min left"
    )


def _start_wandb(name: str, config: dict[str, Any], folder: Path) -> Any:
    try:
        import wandb

        wandb.init(project="nanochat", name=name, config=config, dir=str(folder))
    except ImportError as error:
        raise ValueError(f"--run {name} needs wandb: pip install wandb, or leave --run out") from error
    except wandb.Error as error:
        raise ValueError(f"--run {name}: {error}: log in to wandb, or set WANDB_MODE=offline") from error
    return wandb
