"""The built-in skills: what the chat stages train on without a network, in which shares, and what is scored."""

from collections.abc import Callable

from tasks.arithmetic import Arithmetic
from tasks.common import MadeTask, Task, TaskMixture
from tasks.identity import Identity
from tasks.spellingbee import Spelling, SpellingBee
from tasks.world import LetterList, WorldChoice, WorldFacts

SCORED: dict[str, Callable[[str], Task]] = {
    "arithmetic": Arithmetic,
    "spellingbee": SpellingBee,
    "world": WorldFacts,
    "choice": WorldChoice,
    "identity": Identity,
}

# Conversations of each skill at scale 1. Choices take most: binding a letter to its choice is learned last.
SIZES: dict[type[MadeTask], int] = {
    Arithmetic: 1300,
    SpellingBee: 1500,
    Spelling: 250,
    WorldFacts: 1000,
    WorldChoice: 2500,
    LetterList: 1300,
    Identity: 2500,
}


def mixture(split: str, scale: float, seed: int, identity: bool) -> TaskMixture:
    """Return conversations of all skills, shuffled. At `scale` 1 there are 1,000 world facts.

    identity: include who the model is, and small talk. Raises ValueError if `scale` is not above 0.
    """
    if not scale > 0:
        raise ValueError(f"--scale {scale}: must be above 0")
    tasks = []
    for task, size in SIZES.items():
        if task is not Identity or identity:
            tasks.append(task(split, size=max(20, round(size * scale)), seed=seed))
    return TaskMixture(tasks, seed)
