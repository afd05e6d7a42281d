"""The built-in skills together: what is trained on, in which shares, and what is scored."""

from collections.abc import Callable

from tasks.arithmetic import Arithmetic
from tasks.common import Task, TaskMixture
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


def mixture(split: str, scale: float, seed: int, identity: bool) -> TaskMixture:
    """Conversations of all skills, shuffled; `scale` 1 is 1,000 of each of the larger ones.

    identity: also who the model is, and small talk.
    """
    if not scale > 0:
        raise ValueError(f"--scale {scale}: must be above 0")

    def size(n: int) -> int:
        return max(20, round(n * scale))

    tasks: list[Task] = [
        Arithmetic(split, size=size(1300), seed=seed),
        SpellingBee(split, size=size(1500), seed=seed),
        Spelling(split, size=size(250), seed=seed),
        WorldFacts(split, size=size(1000), seed=seed),
        WorldChoice(split, size=size(2500), seed=seed),
        LetterList(split, size=size(1300), seed=seed),
    ]
    if identity:
        tasks.append(Identity(split, size=size(2500), seed=seed))
    return TaskMixture(tasks, seed=seed)
