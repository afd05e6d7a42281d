"""Training runs for sweeps and scaling laws: named by their flags, several at once, resumable, safe to interrupt.

Each study has a base directory of its own with links to datasets, tokenizer and the checkpoints of earlier stages, so
that its runs appear in no report. `results/ID.json` there marks a finished run; ID hashes script, flags, tokenizer.
"""

import contextlib
import dataclasses
import fcntl
import hashlib
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median
from typing import Any

import torch

from nanochat.common import get_base_dir, read_json, sha256_file, write_record
from nanochat.compute import usable_cores

STAGE_OF = {
    "scripts.base_train": "base",
    "scripts.mid_train": "mid",
    "scripts.chat_sft": "sft",
    "scripts.chat_rl": "rl",
}
OWN_FLAGS = ("seed", "model-tag", "resume")  # set for each run here
ROOT = Path(__file__).resolve().parent.parent

Point = dict[str, str]  # flag, without dashes, to value
Record = dict[str, Any]


def split_argv(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """What stands before and after `--`."""
    at = argv.index("--") if "--" in argv else len(argv)
    return list(argv[:at]), list(argv[at + 1 :])


def to_argv(point: Mapping[str, str]) -> list[str]:
    """A point as command line arguments; the values true and false make a switch, --flag or --no-flag."""
    switches = {"true": "--{}", "false": "--no-{}"}
    return [switches.get(value, "--{}={}").format(name, value) for name, value in point.items()]


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


def plan(script: str, points: Sequence[Point], seeds: int, common: Sequence[str]) -> list[Run]:
    """The runs of a sweep. Raises ValueError when a flag of `common` is also searched, or the sweep's own."""
    names = {argument.split("=")[0].lstrip("-").replace("_", "-") for argument in common if argument[:2] == "--"}
    if clash := names & {*OWN_FLAGS, *(name for point in points for name in point)}:
        raise ValueError(f"--{min(clash)} is given after -- and set by the sweep as well: leave it out there")
    tokenizer = get_base_dir() / "tokenizer" / "tokenizer.json"
    state = sha256_file(tokenizer) if tokenizer.exists() else None
    runs = []
    for point, seed in itertools.product(points, range(seeds)):
        identity = json.dumps([script, sorted(point.items()), seed, list(common), state])
        run_id = hashlib.sha256(identity.encode()).hexdigest()[:12]
        own = [f"--seed={seed}", f"--model-tag={run_id}", "--resume=auto"]
        runs.append(Run(script, point, seed, [*common, *to_argv(point), *own], run_id))
    return runs


def read_metrics(path: Path) -> list[Record]:
    """The lines of a metrics.jsonl, but for a last one that is still being written; [] when there is no file."""
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    return [json.loads(line) for line in text.split("\n")[:-1] if line]


class Runner:
    """Executes runs in the base directory `folder` and collects what came out; `failed` holds what broke down."""

    def __init__(self, folder: Path, jobs: int = 1, keep_checkpoints: bool = False) -> None:
        self.folder, self.jobs, self.keep_checkpoints = folder, jobs, keep_checkpoints
        self.failed: list[Record] = []

    def execute(self, runs: Sequence[Run], report: Callable[[list[Record]], None]) -> None:
        """Run what is not finished yet, `jobs` at once; `report` gets all records so far, at first and after each run.

        A run that breaks down later than its first step, as a diverging one does, becomes a record with an "error"
        and is tried again next time; one that does not get there raises ValueError, for its flags are wrong. On
        KeyboardInterrupt all runs save and end.
        """
        self._link_inputs(STAGE_OF[runs[0].script])
        waiting = deque(run for run in runs if not self._result(run).exists())
        total, done, began = len(waiting), 0, time.monotonic()
        print(f"{total} of {len(runs)} runs to do, the others are finished", flush=True)
        report(self._records(runs))
        active: dict[int, tuple[Run, subprocess.Popen]] = {}  # by slot
        with self._alone() as lock:
            try:
                while waiting or active:
                    for slot in range(self.jobs):
                        if slot not in active and waiting:
                            run = waiting.popleft()
                            active[slot] = run, self._start(run, slot, lock)
                            print(f"[{total - len(waiting)}/{total}] {run}: log in {self._log(run)}", flush=True)
                    time.sleep(0.1)
                    for slot, (run, process) in list(active.items()):
                        if process.poll() is not None:
                            del active[slot]
                            self._finish(run, process.returncode)
                            done += 1
                            left = (time.monotonic() - began) / done * (total - done) / 60
                            print(f"{done} of {total} runs done, about {left:.1f} min left", flush=True)
                            report(self._records(runs))
            finally:
                _stop([process for _, process in active.values()])

    def _result(self, run: Run) -> Path:
        return self.folder / "results" / f"{run.id}.json"

    def _log(self, run: Run) -> Path:
        return self.folder / "logs" / f"{run.id}.log"

    def _records(self, runs: Sequence[Run]) -> list[Record]:
        return [read_json(self._result(run)) for run in runs if self._result(run).exists()] + self.failed

    def _link_inputs(self, stage: str) -> None:
        """Links to what a run reads; what it writes, models and metrics of its own stage, stays below `folder`."""
        base = get_base_dir().resolve()
        earlier = [path.relative_to(base) for path in (base / "checkpoints").glob("*") if path.name != stage]
        for name in (*map(Path, ("datasets", "tokenizer", "tasks", "hub")), *earlier):
            link = self.folder / name
            link.parent.mkdir(parents=True, exist_ok=True)
            if not link.is_symlink():
                link.symlink_to(base / name)

    @contextlib.contextmanager
    def _alone(self) -> Iterator[int]:
        """A lock on the folder. Runs inherit it, so that those of a killed sweep are not joined by a second set."""
        with open(self.folder / ".lock", "w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise ValueError(f"runs are under way in {self.folder}: wait, or choose another --name") from error
            yield file.fileno()

    def _start(self, run: Run, slot: int, lock: int) -> subprocess.Popen:
        environment = {**os.environ, "NANOCHAT_BASE_DIR": str(self.folder), "PYTHONUNBUFFERED": "1"}
        if self.jobs > 1:
            environment.setdefault("OMP_NUM_THREADS", str(max(1, usable_cores() // self.jobs)))
            gpus = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(torch.cuda.device_count())))
            environment["CUDA_VISIBLE_DEVICES"] = gpus.split(",")[slot % len(gpus.split(","))]
        self._log(run).parent.mkdir(exist_ok=True)
        with open(self._log(run), "a") as log:
            return subprocess.Popen(
                [sys.executable, "-m", run.script, *run.argv],
                cwd=ROOT,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,  # Ctrl-C reaches this process alone, which then tells each run once
                pass_fds=(lock,),
            )

    def _finish(self, run: Run, code: int) -> None:
        """Turn what a run left into its record."""
        stage = STAGE_OF[run.script]
        metrics = read_metrics(self.folder / "runs" / stage / run.id / "metrics.jsonl")
        steps = [line for line in metrics if "loss" in line]
        if code and not steps:
            raise ValueError(f"{run} ended before its first step: {self._last_words(run)} ({self._log(run)})")
        record = {
            **dataclasses.asdict(run),
            "steps": steps[-1]["step"],
            "tokens": steps[-1]["tokens"],
            "loss": fmean(line["loss"] for line in steps[-10:]),
            "tok_per_sec": median(line["tok_per_sec"] for line in steps),
            "seconds": sum(line["dt"] for line in steps),
            "peak_mem_bytes": max(line["peak_mem_bytes"] for line in steps),
        }
        if code:
            print(f"FAILED {run}: {self._last_words(run)}", flush=True)
            self.failed.append({**record, "error": self._last_words(run)})
            return
        scores = {name: value for name, value in metrics[-1].items() if isinstance(value, float)}  # of the end
        made = read_json(self.folder / "runs" / stage / run.id / "run.json")
        write_record(self._result(run), {**record, **scores, "model_config": made["model_config"]})
        if not self.keep_checkpoints:
            shutil.rmtree(self.folder / "checkpoints" / stage / run.id)
        print(f"{run}: " + ", ".join(f"{name} {value:.4f}" for name, value in scores.items()), flush=True)

    def _last_words(self, run: Run) -> str:
        return self._log(run).read_text(errors="replace").strip().split("\n")[-1]


def _stop(processes: Sequence[subprocess.Popen], seconds: float = 120) -> None:
    """Tell runs to save and end; kill what has not after `seconds`, or when interrupted again."""
    if processes:
        print(f"ending {len(processes)} run(s), each with a checkpoint; Ctrl-C again ends them at once", flush=True)
    for process in processes:
        process.send_signal(signal.SIGINT)
    deadline = time.monotonic() + seconds
    try:
        for process in processes:
            process.wait(max(0.0, deadline - time.monotonic()))
    except (subprocess.TimeoutExpired, KeyboardInterrupt):
        for process in processes:
            process.kill()
            process.wait()
