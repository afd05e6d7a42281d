"""The published data sets together: which are scored, and which join a stage's training. To fetch them all:

python -m tasks.public
"""

from dataclasses import dataclass
from pathlib import Path

from nanochat import cli
from nanochat.common import print0
from tasks.arc import ARCChallenge, ARCEasy
from tasks.common import Task, TaskMixture
from tasks.customjson import CustomJSON
from tasks.gsm8k import GSM8K
from tasks.humaneval import HumanEval
from tasks.mmlu import MMLU
from tasks.parquet import ParquetTask, fetch
from tasks.smoltalk import SmolTalk

# What is scored, each on its split "test".
SCORED: dict[str, type[ParquetTask]] = {task.name: task for task in (ARCEasy, ARCChallenge, MMLU, GSM8K, HumanEval)}
# The splits that a stage trains on, and of how many conversations at most; "val" is for its validation loss.
JOINED: dict[str, tuple[tuple[type[ParquetTask], str, int | None], ...]] = {
    "mid": ((SmolTalk, "train", None), (MMLU, "auxiliary_train", None), (MMLU, "dev", None), (GSM8K, "train", None)),
    "sft": (
        (SmolTalk, "train", 10_000),
        (ARCEasy, "train", None),
        (ARCChallenge, "train", None),
        (GSM8K, "train", None),
    ),
    "val": ((SmolTalk, "test", 2000),),
}


def join(
    stage: str, skills: Task, seed: int, tasks_dir: Path | str | None = None, custom_json: Path | str | None = None
) -> Task:
    """The built-in `skills`, shuffled with the published data sets of a stage that are there, and with your own file.

    They are looked for in `tasks_dir`, or else among the downloads. Raises ValueError when `tasks_dir` has none.
    """
    there = [entry for entry in JOINED[stage] if entry[0].local(entry[1], tasks_dir)]
    if tasks_dir is not None and stage != "val" and not there:
        known = ", ".join(f"{task.name}/{split}.parquet" for task, split, _ in JOINED[stage])
        raise ValueError(f"--tasks-dir {tasks_dir} holds none of {known}")
    tasks = [TaskMixture([task(split, tasks_dir)], seed=seed, limit=limit) for task, split, limit in there]
    names = [task.name for task, _, _ in there]
    if custom_json is not None:
        tasks, names = [*tasks, CustomJSON(custom_json)], [*names, str(custom_json)]
    if not tasks:
        return skills
    sizes = (f"{len(task):,} of {name}" for task, name in zip([skills, *tasks], ["the built-in skills", *names]))
    print0(f"{stage} conversations: {', '.join(sizes)}")
    return TaskMixture([skills, *tasks], seed=seed)


@dataclass(frozen=True)
class Config:
    """No flags: HF_ENDPOINT names another hub, NANOCHAT_BASE_DIR where things are kept."""


def main() -> None:
    """Fetch every split that is scored or trained on."""
    cli.parse(Config, description=__doc__)
    wanted = [(task, "test") for task in SCORED.values()]
    wanted += [(task, split) for entries in JOINED.values() for task, split, _ in entries]
    for task, split in dict.fromkeys(wanted):
        size = sum(path.stat().st_size for path in fetch(task, split))
        print0(f"{task.name} {split}: {size / 1e6:.1f} MB, licence {task.licence}")


if __name__ == "__main__":
    cli.run(main)
