"""speedrun.sh over a stand-in for Python (fake_stages.py): which stages run, and what each of them has read.

What is left at the end must all belong together: it must be what a run in an empty base directory leaves.
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from record_check import problem

from nanochat.record_fields import RECORDS

HERE = Path(__file__).parent
CPU = "d6-cpu"  # the tag of a run without flags on a machine without a GPU


class Speedrun:
    """A copy of speedrun.sh with the stand-in as its Python, and a base directory."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.base = folder / "base"
        self.base.mkdir()
        python = folder / ".venv" / "bin" / "python"
        python.parent.mkdir(parents=True)
        python.write_text(f'#!/bin/sh\nexec {sys.executable} -IS {HERE}/fake_stages.py "$@"\n')
        python.chmod(0o755)
        shutil.copy(HERE.parent / "speedrun.sh", folder)

    def run(self, *arguments: str, code: int = 0, **variables: str) -> list[str]:
        """Run it, and return the modules that it called, in order."""
        calls = self.base / "calls"
        calls.write_text("")
        environment = {"PATH": "/usr/bin:/bin", "HOME": str(self.folder), "NANOCHAT_BASE_DIR": str(self.base)}
        command = ["bash", str(self.folder / "speedrun.sh"), *arguments]
        ended = subprocess.run(command, env={**environment, **variables}, capture_output=True, text=True, timeout=60)
        assert ended.returncode == code, ended.stdout + ended.stderr
        return calls.read_text().split()

    def results(self, tag: str = CPU) -> dict[str, str]:
        """What runs of this tag have left: file -> content."""
        found = [*self.base.rglob(f"{tag}/step_1/meta.json"), *self.base.glob(f"evals/*{tag}.json")]
        found += [self.base / "tokenizer" / "tokenizer.json", self.base / "evals" / "tok_eval.json"]
        return {str(path.relative_to(self.base)): path.read_text() for path in found}


@pytest.fixture
def speedrun(tmp_path):
    return Speedrun(tmp_path)


@pytest.fixture(scope="module")
def builtin(tmp_path_factory):
    """A run without flags in a base directory that was empty."""
    fresh = Speedrun(tmp_path_factory.mktemp("fresh"))
    fresh.run()
    return fresh


def test_stopped_then_smoke_then_again_then_nothing(speedrun, builtin):
    """The third run must not train on the text and the tokenizer of the second."""
    (speedrun.base / "stop-scripts.base_train").touch()
    assert speedrun.run(code=130)[-1] == "scripts.base_train"
    speedrun.run("--smoke")
    speedrun.run()
    assert speedrun.results() == builtin.results()
    times = [json.loads(line) for line in (speedrun.base / "runs" / "stages.jsonl").read_text().splitlines()]
    assert {line["tag"] for line in times} == {CPU, "d2-smoke"}
    assert not any(problem(line, RECORDS["runs/stages.jsonl"]) for line in times)
    assert speedrun.run() == ["scripts.report"], "all else was done before"


def test_a_folder_is_used_whole_and_another_text_is_noticed(speedrun):
    text = speedrun.folder / "my texts"
    text.mkdir()
    (text / "a.txt").write_text("one")
    (text / "b.txt").write_text("two")
    first = speedrun.run(DATASET=str(text))
    manifest = (speedrun.base / "datasets" / "my-texts" / "manifest.json").read_text()
    assert "--name" in manifest and "-n " not in manifest
    for name in ("b.txt", "test.txt"):  # two files change places, then one gets a name that gives it another role
        (text / "a.txt").rename(text / "c.txt")
        (text / "b.txt").rename(text / "a.txt")
        (text / "c.txt").rename(text / name)
        before = speedrun.results()
        assert speedrun.run(DATASET=str(text)) == first
        assert all(before[path] != content for path, content in speedrun.results().items())


def test_what_was_deleted_is_made_again(speedrun, builtin):
    shutil.copytree(builtin.base, speedrun.base, dirs_exist_ok=True)
    for lost, first in (
        (["datasets"], "nanochat.dataset"),
        (["tokenizer", "checkpoints/base"], "scripts.tok_train"),
        (["evals", "checkpoints/sft"], "scripts.tok_eval"),
    ):
        for folder in lost:
            shutil.rmtree(speedrun.base / folder)
        assert speedrun.run()[0] == first
        assert speedrun.results() == builtin.results()


def test_other_conversations(speedrun, builtin):
    shutil.copytree(builtin.base, speedrun.base, dirs_exist_ok=True)
    tasks = speedrun.folder / "my tasks"
    tasks.mkdir()
    results = [builtin.results()]
    for text in ("one", "two"):
        (tasks / "a.parquet").write_text(text)
        assert "scripts.base_train" not in speedrun.run(TASKS_DIR=str(tasks))
        results.append(speedrun.results())
    for stage in ("mid", "sft"):
        assert len({each[f"checkpoints/{stage}/{CPU}/step_1/meta.json"] for each in results}) == 3
