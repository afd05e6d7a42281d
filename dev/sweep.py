"""Grid or random search over the flags of a training stage, and IsoFLOP curves with their fit.

    python -m dev.sweep --name lr --space "matrix-lr=.02,.04; depth=2,4" --seeds 3 --jobs 2 -- --num-iterations 200
    python -m dev.sweep --name scaling --space "target-flops=1e12,3e12,1e13; depth=2,3,4,6" -- --max-seq-len 512

Flags after -- go to every run. A sweep writes to sweeps/NAME in the base directory, a base directory of its own with
links to datasets, tokenizer and the checkpoints of earlier stages, so that its runs appear in no report. A run is named
by the hash of its flags, and `results/ID.json` marks it finished: the same command goes on where it was stopped.

A sweep over target-flops and depth is a scaling study: its IsoFLOP curves are fitted and drawn, too (isoflop.py).
"""

import csv
import hashlib
import itertools
import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean, median, stdev
from typing import Any

import numpy as np
import torch

from dev.isoflop import draw_isoflops, fit_isoflops
from dev.measure import ROOT, split_argv
from nanochat import cli
from nanochat.common import atomic_write, get_base_dir, read_json, sha256_file, write_record
from nanochat.compute import usable_cores
from nanochat.table import to_table

STAGES = {"scripts.base_train": "base", "scripts.mid_train": "mid", "scripts.chat_sft": "sft", "scripts.chat_rl": "rl"}
OWN_FLAGS = ("seed", "model-tag", "resume")  # the sweep sets these for each run

Point = dict[str, str]  # flag without dashes -> value
Record = dict[str, Any]


@dataclass(frozen=True)
class Config:
    """Flags of a sweep."""

    space: str = cli.option("", "flags to search: 'depth=2,4; matrix-lr=log(.005,.1)'; also uniform(a,b), int(a,b)")
    script: str = cli.option("scripts.base_train", "training stage to run", tuple(STAGES))
    name: str = cli.option("sweep", "name of the sweep and of its folder")
    draws: int | None = cli.option(None, "random points of the space; unset: every combination")
    seeds: int = cli.option(1, "runs of each point, with --seed 0, 1, ...")
    jobs: int = cli.option(1, "runs at once; they share the cores, and take the GPUs in turn")
    metric: str = cli.option("val_bpb", "metric of the last evaluation by which points are ordered")
    maximize: bool = cli.option(False, "the highest metric is best, not the lowest")
    keep_checkpoints: bool = cli.option(False, "keep the models of finished runs")

    def __post_init__(self) -> None:
        cli.require_positive(self, "draws", "seeds", "jobs")
        if not re.fullmatch(r"\w[\w.-]*", self.name):
            raise ValueError(f"--name {self.name!r}: use letters, digits, '_', '-' and '.' only")


# --- the points of a space --------------------------------------------------------------------------------------------


RANGE = re.compile(r"(log|uniform|int)\(([^,]+),([^,]+)\)")


def parse_space(text: str) -> dict[str, list[str]]:
    """Parse `flag=a,b; flag=log(x,y)` into values by flag; a range stays one text such as `log(.1,1)`.

    Raises ValueError for anything else.
    """
    space: dict[str, list[str]] = {}
    for part in text.split(";"):
        part = part.strip()
        if not part:
            continue
        found = re.fullmatch(r"-*([a-z][a-z0-9_-]*) *= *(.+)", part)
        name = found[1].replace("_", "-") if found else ""
        if not found or name in space or name in OWN_FLAGS:
            raise ValueError(f"--space {part!r}: write each flag once, as flag=value,value or flag=log(low,high)")
        values = found[2]
        is_range = RANGE.fullmatch(values)
        if "(" in values and not (is_range and float(is_range[2]) < float(is_range[3])):
            raise ValueError(f"--space {part!r}: use log(a,b), uniform(a,b) or int(a,b) with a < b")
        space[name] = [values] if is_range else [value.strip() for value in values.split(",")]
    return space


def draw(values: list[str], rng: np.random.Generator) -> str:
    """Draw one of the values, or a number of the range that stands alone in the list."""
    found = RANGE.fullmatch(values[0])
    if not found:
        return values[rng.integers(len(values))]
    low = float(found[2])
    high = float(found[3])
    if found[1] == "int":
        return str(rng.integers(int(low), int(high) + 1))
    if found[1] == "log":
        return f"{math.exp(rng.uniform(math.log(low), math.log(high))):.4g}"
    return f"{rng.uniform(low, high):.4g}"


def points_of(space: dict[str, list[str]], draws: int | None) -> list[Point]:
    """Return every combination of the values, or `draws` random points; more draws begin with the same ones.

    Raises ValueError for a range without `draws`.
    """
    if draws is None:
        if any("(" in values[0] for values in space.values()):
            raise ValueError("--space has a range: say how many points with --draws")
        return [dict(zip(space, values)) for values in itertools.product(*space.values())]
    points = []
    for i in range(draws):
        rng = np.random.default_rng((0, i))
        points.append({name: draw(values, rng) for name, values in space.items()})
    return list({json.dumps(point): point for point in points}.values())


# --- running ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """One training run of a sweep."""

    script: str
    point: Point
    seed: int
    argv: list[str]
    id: str

    def __str__(self) -> str:
        return " ".join([*(f"{name}={value}" for name, value in self.point.items()), f"seed={self.seed}"])


def plan(config: Config, points: Sequence[Point], common: list[str]) -> list[Run]:
    """Return the runs of a sweep. Raises ValueError when a flag of `common` is searched as well, or the sweep's own."""
    given = {argument.split("=")[0].lstrip("-").replace("_", "-") for argument in common if argument.startswith("--")}
    searched = {name for point in points for name in point}
    clash = given & {*OWN_FLAGS, *searched}
    if clash:
        raise ValueError(f"--{min(clash)} is given after -- and set by the sweep as well: leave it out there")
    tokenizer = get_base_dir() / "tokenizer" / "tokenizer.json"
    state = sha256_file(tokenizer) if tokenizer.exists() else None
    runs = []
    for point, seed in itertools.product(points, range(config.seeds)):
        identity = json.dumps([config.script, sorted(point.items()), seed, common, state])
        run_id = hashlib.sha256(identity.encode()).hexdigest()[:12]
        flags = [to_flag(name, value) for name, value in point.items()]
        argv = [*common, *flags, f"--seed={seed}", f"--model-tag={run_id}", "--resume=auto"]
        runs.append(Run(config.script, point, seed, argv, run_id))
    return runs


def to_flag(name: str, value: str) -> str:
    """Return `--name=value`; fp8=true,false becomes --fp8 and --no-fp8."""
    if value == "true":
        return f"--{name}"
    if value == "false":
        return f"--no-{name}"
    return f"--{name}={value}"


def start(run: Run, slot: int, jobs: int, folder: Path) -> subprocess.Popen:
    """Start a run with its share of the cores and its GPU, its output in logs/ID.log."""
    environment = {**os.environ, "NANOCHAT_BASE_DIR": str(folder), "PYTHONUNBUFFERED": "1"}
    if jobs > 1:
        environment.setdefault("OMP_NUM_THREADS", str(max(1, usable_cores() // jobs)))
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        gpus = visible.split(",") if visible else [str(index) for index in range(torch.cuda.device_count())]
        if gpus:
            environment["CUDA_VISIBLE_DEVICES"] = gpus[slot % len(gpus)]
    log = folder / "logs" / f"{run.id}.log"
    log.parent.mkdir(exist_ok=True)
    print(f"{run}: log in {log}", flush=True)
    with open(log, "a", encoding="utf-8") as file:
        command = [sys.executable, "-m", run.script, *run.argv]
        # a session of its own: Ctrl-C reaches this process alone, which then interrupts each run once
        return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=file, stderr=file, start_new_session=True)


def finish(run: Run, code: int, folder: Path, keep_checkpoints: bool) -> Record:
    """Return the record of a run that has ended, and write it to results/ID.json when it succeeded.

    Raises ValueError when it ended before its first step: then its flags are wrong. A run that breaks down later, as a
    diverging one does, gets a record with "error" and is tried again by the next sweep.
    """
    stage = STAGES[run.script]
    log = folder / "logs" / f"{run.id}.log"
    metrics_path = folder / "runs" / stage / run.id / "metrics.jsonl"
    lines = metrics_path.read_text().splitlines() if metrics_path.exists() else []
    metrics = [json.loads(line) for line in lines]
    steps = [line for line in metrics if "loss" in line]
    last_words = log.read_text(errors="replace").strip().split("\n")[-1]
    if code and not steps:
        raise ValueError(f"{run} ended before its first step: {last_words} ({log})")
    record = {
        **asdict(run),
        "steps": steps[-1]["step"],
        "tokens": steps[-1]["tokens"],
        "loss": fmean(line["loss"] for line in steps[-10:]),
        "tok_per_sec": median(line["tok_per_sec"] for line in steps),
        "seconds": sum(line["dt"] for line in steps),
    }
    if code:
        print(f"FAILED {run}: {last_words}", flush=True)
        record["error"] = last_words
        return record
    record.update({name: value for name, value in metrics[-1].items() if isinstance(value, float)})  # final scores
    record["model_config"] = read_json(metrics_path.with_name("run.json"))["model_config"]
    write_record(folder / "results" / f"{run.id}.json", record)
    if not keep_checkpoints:
        shutil.rmtree(folder / "checkpoints" / stage / run.id)
    return record


def execute(runs: list[Run], config: Config, folder: Path) -> list[Record]:
    """Run what is not finished yet, `--jobs` at once, and return all records. On Ctrl-C all runs save and end."""
    base = get_base_dir().resolve()
    earlier = [path for path in (base / "checkpoints").glob("*") if path.name != STAGES[config.script]]
    for source in (base / "datasets", base / "tokenizer", base / "tasks", *earlier):
        link = folder / source.relative_to(base)
        link.parent.mkdir(parents=True, exist_ok=True)
        if not link.is_symlink():
            link.symlink_to(source)
    done = [folder / "results" / f"{run.id}.json" for run in runs]
    records = [read_json(path) for path in done if path.exists()]
    waiting = [run for run, path in zip(runs, done) if not path.exists()]
    total = len(waiting)
    print(f"{total} of {len(runs)} runs to do, the others are finished", flush=True)
    active: dict[int, tuple[Run, subprocess.Popen]] = {}  # by slot
    try:
        while waiting or active:
            for slot in range(config.jobs):
                if slot not in active and waiting:
                    run = waiting.pop(0)
                    active[slot] = run, start(run, slot, config.jobs, folder)
            time.sleep(0.1)
            for slot, (run, process) in list(active.items()):
                if process.poll() is not None:
                    del active[slot]
                    records.append(finish(run, process.returncode, folder, config.keep_checkpoints))
                    print(f"{total - len(waiting) - len(active)} of {total} runs done", flush=True)
                    write_results(folder, records, config)
    finally:
        for _, process in active.values():
            process.send_signal(signal.SIGINT)
        for _, process in active.values():
            process.wait()
    return records


# --- results ----------------------------------------------------------------------------------------------------------


def summarize(records: list[Record], metric: str, maximize: bool = False) -> list[Record]:
    """Return one row a point, best first: mean and standard error (None for one run) of `metric` over its seeds."""
    groups: dict[str, list[Record]] = {}
    for record in records:
        groups.setdefault(json.dumps(record["point"], sort_keys=True), []).append(record)
    rows = []
    for group in groups.values():
        scores = [record[metric] for record in group if "error" not in record and metric in record]
        row = {
            **group[0]["point"],
            metric: fmean(scores) if scores else None,
            "standard error": stdev(scores) / len(scores) ** 0.5 if len(scores) > 1 else None,
            "runs": len(scores),
            "failed": sum("error" in record for record in group),
            "tok/s": median(record["tok_per_sec"] for record in group),
            "minutes": fmean(record["seconds"] for record in group) / 60,
        }
        rows.append(row)
    sign = -1 if maximize else 1
    return sorted(rows, key=lambda row: (row[metric] is None, sign * (row[metric] or 0.0)))


def write_results(folder: Path, records: list[Record], config: Config) -> None:
    """Write results.json, results.csv (a line a run) and summary.md, after every run."""
    rows = summarize(records, config.metric, config.maximize)
    command = shlex.join(["python", "-m", "dev.sweep", *sys.argv[1:]])
    record = {"command": command, "metric": config.metric, "summary": rows, "runs": records}
    write_record(folder / "results.json", record)
    atomic_write(folder / "summary.md", f"`{command}`\n\n{to_table(rows)}")
    lines = []
    for each in records:
        plain = {name: value for name, value in each.items() if isinstance(value, int | float | str)}
        lines.append({**each["point"], **plain})
    with open(folder / "results.csv", "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(name for line in lines for name in line)))
        writer.writeheader()
        writer.writerows(lines)


def main() -> None:
    own, common = split_argv(sys.argv[1:])
    config = cli.parse(Config, own, __doc__)
    space = parse_space(config.space)
    points = points_of(space, config.draws)
    folder = get_base_dir() / "sweeps" / config.name
    print(f"{len(points)} points x {config.seeds} seeds of {config.script} in {folder}", flush=True)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: runs are ended, not orphaned
    records = execute(plan(config, points, common), config, folder)
    write_results(folder, records, config)
    print((folder / "summary.md").read_text())
    if {"target-flops", "depth"} <= space.keys():
        fit = fit_isoflops(records)
        write_record(folder / "isoflop.json", fit)
        draw_isoflops(fit, folder / "isoflop.png")
        print(f"{to_table(fit['points'])}\nlaws (factor, exponent of C): {fit['laws']}\n{folder / 'isoflop.png'} drawn")
    failed = sum("error" in record for record in records)
    if failed:
        raise ValueError(f"{failed} of {len(records)} runs failed; the same command tries them again")


if __name__ == "__main__":
    cli.run(main)
