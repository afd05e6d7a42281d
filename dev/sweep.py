"""Grid or random search over the flags of a training stage, several runs at once. Flags after -- go to every run. The
same command goes on where it was stopped: finished runs are skipped, interrupted ones resume. For example:
python -m dev.sweep --name lr --space "matrix-lr=.02,.04; depth=2,4" --seeds 3 --jobs 2 -- --num-iterations 200

A sweep has a base directory of its own, `sweeps/NAME` under the base directory, with links to datasets, tokenizer and
the checkpoints of earlier stages, so that its runs appear in no report. `results/ID.json` marks a finished run, where
ID hashes script, flags and tokenizer; `results.csv`, `results.json` and `summary.md` are written after every run.
"""

import csv
import io
import itertools
import json
import math
import re
import shlex
import signal
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median, stdev

import numpy as np

from dev.bench_old import markdown_table
from dev.runner import OWN_FLAGS, STAGE_OF, Point, Record, Runner, plan, split_argv
from nanochat import cli
from nanochat.common import atomic_write, get_base_dir, read_json, write_record


@dataclass(frozen=True)
class Config:
    """Flags of a sweep."""

    space: str = cli.option("", "flags to search: 'depth=2,4; matrix-lr=log(.005,.1)'; also uniform(a,b), int(a,b)")
    script: str = cli.option("scripts.base_train", "training stage to run", tuple(STAGE_OF))
    name: str = cli.option("sweep", "name of the sweep and of its folder")
    draws: int | None = cli.option(None, "random points of the space; unset = every combination")
    seeds: int = cli.option(1, "runs of each point, with --seed 0, 1, ...")
    jobs: int = cli.option(1, "runs at once; they share the cores, and take the GPUs in turn")
    metric: str = cli.option("val_bpb", "metric of the last evaluation that says which point is best")
    maximize: bool = cli.option(False, "the highest metric is best, not the lowest")
    keep_checkpoints: bool = cli.option(False, "keep the models of finished runs")

    def __post_init__(self) -> None:
        for name in ("draws", "seeds", "jobs"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"--{name} {value}: must be at least 1")
        if not re.fullmatch(r"\w[\w.-]*", self.name):
            raise ValueError(f"--name {self.name!r}: use letters, digits, '_', '-' and '.' only")


# --- the points of a space --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Range:
    """Values between two ends: drawn evenly, evenly in the logarithm, or as whole numbers, both ends included."""

    kind: str
    low: float
    high: float

    def draw(self, rng: np.random.Generator) -> str:
        if self.kind == "int":
            return str(rng.integers(int(self.low), int(self.high) + 1))
        if self.kind == "log":
            return f"{math.exp(rng.uniform(math.log(self.low), math.log(self.high))):.4g}"
        return f"{rng.uniform(self.low, self.high):.4g}"


def parse_space(text: str) -> dict[str, list[str] | Range]:
    """`flag=a,b; flag=log(x,y)` as values or a range by flag. Raises ValueError for anything else."""
    space: dict[str, list[str] | Range] = {}
    for part in filter(None, (part.strip() for part in text.split(";"))):
        name, equals, values = (piece.strip() for piece in part.partition("="))
        name = name.lstrip("-").replace("_", "-")
        if not equals or not values or not re.fullmatch(r"[a-z][a-z0-9-]*", name) or name in space:
            raise ValueError(f"--space {part!r}: write each flag once, as flag=value,value or flag=log(low,high)")
        if name in OWN_FLAGS:
            raise ValueError(f"--space {part!r}: the sweep sets --{name} itself (see --seeds)")
        if found := re.fullmatch(r"(\w+)\(([^,]+),([^,]+)\)", values):
            try:
                low, high = float(found[2]), float(found[3])
            except ValueError:
                low, high = math.nan, math.nan
            if found[1] not in ("log", "uniform", "int") or not low < high or (found[1] == "log" and low <= 0):
                raise ValueError(f"--space {part!r}: use log(a,b) with 0 < a < b, uniform(a,b) or int(a,b)")
            space[name] = Range(found[1], low, high)
        else:
            space[name] = [value.strip() for value in values.split(",")]
    return space


def points_of(space: Mapping[str, list[str] | Range], draws: int | None = None) -> list[Point]:
    """Every combination of the values, or `draws` random points, each once; more draws begin with the same ones."""
    if draws is None:
        if ranges := [name for name, values in space.items() if isinstance(values, Range)]:
            raise ValueError(f"--space has a range for {', '.join(ranges)}: say how many points with --draws")
        return [dict(zip(space, values)) for values in itertools.product(*space.values())]
    points = []
    for i in range(draws):
        rng = np.random.default_rng((0, i))
        points.append({n: v.draw(rng) if isinstance(v, Range) else v[rng.integers(len(v))] for n, v in space.items()})
    return list({json.dumps(point): point for point in points}.values())


# --- what came out ----------------------------------------------------------------------------------------------------


def summarize(records: Sequence[Record], metric: str, maximize: bool = False) -> list[Record]:
    """One record a point, best first: n, mean and standard error (None for one run) of `metric` over its seeds."""
    by_point: dict[str, list[Record]] = {}
    for record in records:
        by_point.setdefault(json.dumps(record["point"], sort_keys=True), []).append(record)
    rows = []
    for group in by_point.values():
        scores = [record[metric] for record in group if "error" not in record and metric in record]
        rows.append(
            {
                "point": group[0]["point"],
                "n": len(scores),
                "failed": sum("error" in record for record in group),
                "mean": fmean(scores) if scores else None,
                "stderr": stdev(scores) / len(scores) ** 0.5 if len(scores) > 1 else None,
                "tok_per_sec": median(record["tok_per_sec"] for record in group),
                "seconds": fmean(record["seconds"] for record in group),
            }
        )
    sign = -1 if maximize else 1
    return sorted(rows, key=lambda row: (row["mean"] is None, sign * (row["mean"] or 0.0)))


def summary_table(rows: Sequence[Record], metric: str) -> str:
    """`summarize`'s rows as a Markdown table."""
    flags = list(dict.fromkeys(name for row in rows for name in row["point"]))
    return markdown_table(
        [
            {
                **{name: row["point"].get(name, "") for name in flags},
                metric: "failed" if row["mean"] is None else f"{row['mean']:.4f}",
                "± standard error": None if row["stderr"] is None else f"{row['stderr']:.4f}",
                "runs": f"{row['n']}, {row['failed']} failed" if row["failed"] else row["n"],
                "tok/s": row["tok_per_sec"],
                "minutes": f"{row['seconds'] / 60:.1f}",
            }
            for row in rows
        ]
    )


def write_results(folder: Path, records: Sequence[Record], metric: str, maximize: bool, command: str) -> str:
    """Write results.csv (a line a run), results.json and summary.md to `folder`; the summary's table is returned."""
    rows = summarize(records, metric, maximize)
    table = summary_table(rows, metric) if rows else ""
    write_record(
        folder / "results.json", {"command": command, "metric": metric, "summary": rows, "runs": list(records)}
    )
    lines = []
    for record in records:
        plain = {name: value for name, value in record.items() if isinstance(value, int | float | str)}
        lines.append({**record["point"], **plain, "argv": shlex.join(record["argv"])})
    text = io.StringIO()
    writer = csv.DictWriter(text, list(dict.fromkeys(name for line in lines for name in line)))
    writer.writeheader()
    writer.writerows(lines)
    atomic_write(folder / "results.csv", text.getvalue())
    made = read_json(folder / "results.json")
    origin = f"commit {made['commit']}, {made['hardware']['processor']}, {made['date'][:10]}"
    atomic_write(folder / "summary.md", f"`{command}`, {origin}\n\n{table}")
    return table


def main() -> None:
    own, common = split_argv(sys.argv[1:])
    config = cli.parse(Config, own, (__doc__ or "").split("\n\n")[0])
    points = points_of(parse_space(config.space), config.draws)
    runs = plan(config.script, points, config.seeds, common)
    folder = get_base_dir() / "sweeps" / config.name
    command = shlex.join(["python", "-m", "dev.sweep", *sys.argv[1:]])
    print(f"{len(points)} points x {config.seeds} seeds of {config.script} in {folder}", flush=True)
    runner = Runner(folder, config.jobs, config.keep_checkpoints)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # runs are ended, not orphaned
    runner.execute(runs, lambda records: write_results(folder, records, config.metric, config.maximize, command))
    print(f"\n{(folder / 'summary.md').read_text()}\n{folder}/results.csv, results.json and summary.md written")
    if runner.failed:
        raise ValueError(f"{len(runner.failed)} of {len(runs)} runs failed; the same command tries them again")


if __name__ == "__main__":
    cli.run(main)
