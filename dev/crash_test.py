"""Kill training with SIGKILL at random moments, again and again: python -m dev.crash_test --kills 200

Real scripts on tiny models, each forked from a process that has torch imported already. After every kill all finished
checkpoints must be whole, none may be lost, and the run must go on; a run that reaches its end must have the losses,
weights and optimizer state of one that nobody touched, bit for bit. One kill in two waits for a checkpoint to be begun.
"""

import dataclasses
import itertools
import json
import multiprocessing
import os
import random
import runpy
import shutil
import signal
import sys
import tempfile
import time
import warnings
from collections import Counter
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from nanochat import checkpoint, cli, dataset, world
from nanochat.common import get_base_dir, print0, write_record
from nanochat.table import to_table
from nanochat.tokenizer import Tokenizer

SCRIPTS = {"base": "scripts.base_train", "mid": "scripts.mid_train", "sft": "scripts.chat_sft"}
SHAPE = ["--depth=2", "--aspect-ratio=16", "--head-dim=16", "--max-seq-len=64"]
RUN = ["--no-compile", "--device-type=cpu", "--total-batch-size=512", "--eval-tokens=512", "--sample-every=0"]
FORK = multiprocessing.get_context("forkserver")


@dataclass(frozen=True)
class Config:
    """Flags of the test."""

    kills: int = cli.option(200, "kills in all, shared among the stages")
    stages: str = cli.option("base,mid,sft", "stages to kill, by commas")
    steps: int = cli.option(24, "steps of a run")
    save_every: int = cli.option(2, "steps between its checkpoints")
    seed: int | None = cli.option(None, "seed of the moments; unset = a new one, which the record states")
    out: str | None = cli.option(None, "JSON record to write; unset: bench/crash_test.json in the base directory")

    def __post_init__(self) -> None:
        if min(self.kills, self.steps, self.save_every) < 1:
            raise ValueError("--kills, --steps and --save-every must be above 0")
        if unknown := set(self.stages.split(",")) - set(SCRIPTS):
            raise ValueError(f"--stages {', '.join(sorted(unknown))}: choose among {', '.join(SCRIPTS)}")


def make_world(folder: Path, characters: int = 120_000) -> None:
    """A dataset "corpus" of the built-in world and a tokenizer of 600 ids in the base directory `folder`/base."""
    texts = list(world.documents(1, characters))
    (folder / "corpus").mkdir(parents=True)
    for i in range(3):
        lines = "".join(json.dumps({"text": text}) + "\n" for text in texts[i::3])
        (folder / "corpus" / f"{i}.jsonl").write_text(lines)
    os.environ["NANOCHAT_BASE_DIR"] = str(folder / "base")
    dataset.prepare(str(folder / "corpus"))
    Tokenizer.train_from_iterator(texts, 600).save(folder / "base" / "tokenizer")


def run_module(module: str, argv: list[str], log: str) -> None:
    """Run what a forked process does: `python -m module argv`, its output into a file."""
    warnings.filterwarnings("ignore", message=".*found in sys.modules")  # it was imported before the fork
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for fd in (1, 2):
        os.dup2(file, fd)
    sys.argv = [module, *argv]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


class Stage:
    """A stage's runs: one that nobody touches, then others that are killed."""

    def __init__(self, name: str, config: Config, rng: random.Random, folder: Path) -> None:
        self.name = name
        self.config = config
        self.rng = rng
        self.log = str(folder / "log.txt")
        self.counts: Counter[str] = Counter()
        began = time.monotonic()
        process = self._start("whole")
        self.save_seconds = self._watch_a_save(process)
        process.join()
        if process.exitcode:
            raise ValueError(f"the {name} stage fails by itself: {Path(self.log).read_text(encoding='utf-8')[-2000:]}")
        self.seconds = time.monotonic() - began
        self.expected = self._result("whole")

    def _start(self, tag: str) -> BaseProcess:
        flags = [*RUN, f"--num-iterations={self.config.steps}", f"--save-every={self.config.save_every}"]
        flags += ["--eval-every=10", "--grad-clip=0.5", f"--model-tag={tag}", "--resume=auto"]
        flags += ["--dataset=corpus", "--dropout=0.1", *SHAPE] if self.name == "base" else ["--scale=0.05"]
        flags += {"mid": ["--source-tag=whole"], "sft": ["--source-tag=whole"]}.get(self.name, [])
        process = FORK.Process(target=run_module, args=(SCRIPTS[self.name], flags, self.log))
        process.start()
        return process

    def _saving(self, tag: str) -> bool:
        folder = checkpoint.checkpoint_dir(self.name, tag)
        return folder.exists() and any(name.startswith(".writing_") for name in os.listdir(folder))

    def _wait_for_save(self, process: BaseProcess, tag: str, saving: bool = True) -> None:
        while process.is_alive() and self._saving(tag) != saving:
            time.sleep(0.0003)

    def _watch_a_save(self, process: BaseProcess) -> float:
        """Seconds that saving a checkpoint takes here."""
        self._wait_for_save(process, "whole")
        began = time.monotonic()
        self._wait_for_save(process, "whole", saving=False)
        return time.monotonic() - began

    def _result(self, tag: str) -> dict[str, Any]:
        """Return the part of a finished run's result that must not depend on kills."""
        path = get_base_dir() / "runs" / self.name / tag / "metrics.jsonl"
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        files = checkpoint.read_meta(self.name, tag, self.config.steps)["files"]
        kept = ("step", "loss", "val_bpb", "grad_norm", "lr_mult", "tokens", "epoch")
        return {"files": files, "metrics": [{k: line[k] for k in kept if k in line} for line in lines]}

    def _verify(self, tag: str, before: list[int]) -> list[int]:
        """The finished checkpoints, every file of which has its hash and loads. None newer has been lost."""
        steps = checkpoint.list_steps(self.name, tag)
        for step in steps:
            meta = checkpoint.read_meta(self.name, tag, step)  # checks the hashes
            for file in meta["files"]:
                load_file(checkpoint.checkpoint_dir(self.name, tag) / f"step_{step:06d}" / file)
            self.counts["checkpoints verified"] += 1
        if max(steps, default=0) < max(before, default=0) or len(steps) < min(len(before), 2):
            raise AssertionError(f"{self.name}/{tag}: checkpoints {before} became {steps}")
        return steps

    def _kill(self, tag: str) -> bool:
        """Start or go on with a run and kill it at a random moment; False when it was over before."""
        before = checkpoint.list_steps(self.name, tag)
        process = self._start(tag)
        if self.rng.random() < 0.5:
            for _ in range(self.rng.randint(1, 4)):
                self._wait_for_save(process, tag, saving=False)
                self._wait_for_save(process, tag)
            time.sleep(self.rng.random() * self.save_seconds)
        else:
            process.join(self.rng.random() * self.seconds * (1 - max(before, default=0) / self.config.steps))
        if process.is_alive():
            os.kill(process.pid, signal.SIGKILL)
        process.join()
        killed = process.exitcode == -signal.SIGKILL
        if process.exitcode not in (0, -signal.SIGKILL):
            raise AssertionError(
                f"{self.name}/{tag} did not go on: {Path(self.log).read_text(encoding='utf-8')[-2000:]}"
            )
        self.counts["kills"] += killed
        self.counts["while saving"] += killed and self._saving(tag)
        self.counts["resumes"] += bool(before)
        self._verify(tag, before)
        return killed

    def run(self, kills: int) -> dict[str, Any]:
        """Kill `kills` times, over as many runs as that takes, and let each run come to its end."""
        for number in itertools.count():
            tag = f"killed{number}"
            finished = False
            while self.counts["kills"] < kills and not finished:
                finished = not self._kill(tag)
                print0(
                    f"{self.name}: {self.counts['kills']} of {kills} kills, {self.counts['while saving']} while saving"
                )
            if not finished:
                process = self._start(tag)
                process.join()
            if self._result(tag) != self.expected:
                raise AssertionError(f"{self.name}/{tag} differs from the run that nobody touched")
            self.counts["runs"] += 1
            self.counts["exact"] += 1
            shutil.rmtree(checkpoint.checkpoint_dir(self.name, tag))
            if self.counts["kills"] >= kills:
                return {"stage": self.name, **{key: self.counts[key] for key in COLUMNS}, "run seconds": self.seconds}


COLUMNS = ("kills", "while saving", "resumes", "checkpoints verified", "runs", "exact")


def main() -> None:
    config = cli.parse(Config, description=__doc__)
    seed = random.SystemRandom().randrange(10**9) if config.seed is None else config.seed
    rng = random.Random(seed)
    stages = config.stages.split(",")
    rows = []
    path = Path(config.out) if config.out else get_base_dir() / "bench" / "crash_test.json"
    os.environ |= {"NANOCHAT_DTYPE": "float32", "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory(prefix="nanochat-crash-") as temporary:
        folder = Path(temporary)
        began = time.monotonic()
        make_world(folder)
        FORK.set_forkserver_preload(
            ["torch._dynamo", "nanochat.trainer", "nanochat.engine", "scripts.chat_sft", "scripts.base_train"]
        )
        warm = FORK.Process(target=int)
        warm.start()
        warm.join()
        for name in list(SCRIPTS)[: 1 + max(map(list(SCRIPTS).index, stages))]:
            stage = Stage(name, config, rng, folder)  # all of them: each starts from the one before
            if name in stages:
                share = config.kills // len(stages) + (stages.index(name) < config.kills % len(stages))
                rows.append(stage.run(share))
        seconds = time.monotonic() - began
    total = {"stage": "all", **{key: sum(row[key] for row in rows) for key in COLUMNS}, "run seconds": seconds}
    print(f"\nNo checkpoint lost or damaged, every finished run exact; seed {seed}\n\n{to_table([*rows, total])}")
    write_record(path, {"config": dataclasses.asdict(config), "seed": seed, "stages": rows, "all": total})
    print(f"{path} written")


if __name__ == "__main__":
    cli.run(main)
