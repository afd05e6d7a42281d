"""The facts of the built-in world as a benchmark of base models, in the format of CORE (DCLM, arXiv:2406.11794).

A base model continues text, so a task shows it a sentence of pretraining without its end:

    multiple_choice    "The capital of Peru is": which of Quito, Lima, Oslo and Cairo is most probable?
    language_modeling  "The chemical symbol of iron is": is "Fe" what follows?
    schema             "cold" after "The opposite of hot is", or after "The opposite of up is"?

core_eval.py scores it like the public bundle, in seconds and without a download.
"""

import json
import random
from pathlib import Path
from typing import Any

from nanochat.common import atomic_write
from nanochat.world_facts import Fact, World

# label: (type of CORE task, examples shown, relations)
CORE_TASKS = {
    "world_capitals": ("multiple_choice", 0, ["capital"]),
    "world_nature": ("multiple_choice", 0, ["class", "color", "young"]),
    "world_elements": ("language_modeling", 0, ["symbol", "number", "number_of"]),
    "world_words": ("language_modeling", 3, ["plural", "past", "word", "month_after"]),
    "world_opposites": ("schema", 0, ["opposite"]),
}
CORE_BASELINES = {"multiple_choice": 25, "language_modeling": 0, "schema": 50}  # percent right by guessing


def core_bundle(folder: Path | str, max_items: int = 200) -> None:
    """Write small tasks of the world into `folder` as a CORE bundle.

    The files are core.yaml, eval_meta_data.csv and eval_data/*.jsonl, with the same bytes each time.
    """
    folder = Path(folder)
    rng = random.Random("world core")
    world = World()
    config = "icl_tasks:\n"
    table = "Eval Task,Task Category,Task Type,#shots,#datapoints,Random baseline,Centered Metric?,Description\n"
    for label, (kind, shots, relations) in CORE_TASKS.items():
        facts = [fact for fact in world.facts if fact.relation.name in relations and _opening(fact)]
        chosen = rng.sample(facts, min(max_items, len(facts)))
        rows = [_core_row(kind, fact, world, rng) for fact in chosen]
        atomic_write(folder / "eval_data" / f"{label}.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
        config += (
            f"  - label: {label}\n"
            f"    dataset_uri: {label}.jsonl\n"
            f"    num_fewshot: [{shots}]\n"
            f"    icl_task_type: {kind}\n"
        )
        task_type = kind.replace("_", " ")
        about = f"Facts of the built-in world: {label.removeprefix('world_')}."
        table += f"{label},built-in world,{task_type},{shots},{len(rows)},{CORE_BASELINES[kind]},,{about}\n"
    atomic_write(folder / "core.yaml", config)
    atomic_write(folder / "eval_meta_data.csv", table)


def _opening(fact: Fact) -> str:
    """Return the fact's sentence without its end " Lima.", or "" if the sentence does not end in the answer."""
    end = f" {fact.answer}."
    return fact.sentence.removesuffix(end) if fact.sentence.endswith(end) else ""


def _core_row(kind: str, fact: Fact, world: World, rng: random.Random) -> dict[str, Any]:
    """Return a row of a task about `fact`. `gold` is the index of the right choice."""
    opening = _opening(fact)
    if kind == "multiple_choice":
        choices, gold = world.choices(fact, rng)
        return {"query": opening, "choices": choices, "gold": gold}
    if kind == "language_modeling":
        return {"context": opening, "continuation": fact.answer}
    others = [each for each in world.facts if each.relation == fact.relation and each.answer != fact.answer]
    other = rng.choice(others)
    options = [opening, _opening(other)]
    gold = rng.randrange(2)
    if gold == 1:
        options.reverse()
    return {"context_options": options, "continuation": fact.answer, "gold": gold}
