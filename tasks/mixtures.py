"""Conversations that a stage trains on: the built-in skills, published data sets, and your own file."""

from pathlib import Path

from nanochat.common import print0
from tasks.arc import ARCChallenge, ARCEasy
from tasks.common import Task, TaskMixture
from tasks.customjson import CustomJSON
from tasks.gsm8k import GSM8K
from tasks.mmlu import MMLU
from tasks.parquet import ParquetTask
from tasks.smoltalk import SmolTalk

# stage: (data set, split, at most so many conversations). "val" is for the validation loss of both stages.
PUBLISHED: dict[str, list[tuple[type[ParquetTask], str, int | None]]] = {
    "mid": [
        (SmolTalk, "train", None),
        (MMLU, "auxiliary_train", None),
        (MMLU, "dev", None),
        (GSM8K, "train", None),
    ],
    "sft": [
        (SmolTalk, "train", 10_000),
        (ARCEasy, "train", None),
        (ARCChallenge, "train", None),
        (GSM8K, "train", None),
    ],
    "val": [
        (SmolTalk, "test", 2000),
    ],
}


def join(
    stage: str, skills: Task, seed: int, tasks_dir: Path | str | None = None, custom_json: Path | str | None = None
) -> Task:
    """Shuffle the built-in `skills` together with a stage's published data sets that are here, and with your own file.

    They are looked for in `tasks_dir`, or else among the downloads; nothing is fetched. Raises ValueError if
    `tasks_dir` holds none of them.
    """
    tasks = [skills]
    names = ["the built-in skills"]
    for task, split, limit in PUBLISHED[stage]:
        if task.local(split, tasks_dir):
            tasks.append(TaskMixture([task(split, tasks_dir)], seed=seed, limit=limit))
            names.append(task.name)
    if tasks_dir is not None and stage != "val" and len(tasks) == 1:
        known = ", ".join(f"{task.name}/{split}.parquet" for task, split, _ in PUBLISHED[stage])
        raise ValueError(f"--tasks-dir {tasks_dir} holds none of {known}")
    if custom_json is not None:
        tasks.append(CustomJSON(custom_json))
        names.append(str(custom_json))
    if len(tasks) == 1:
        return skills
    sizes = [f"{len(task):,} of {name}" for task, name in zip(tasks, names)]
    print0(f"{stage} conversations: {', '.join(sizes)}")
    return TaskMixture(tasks, seed=seed)
