"""The built-in skills together: what is trained on, in which shares, and what is scored."""

from collections.abc import Callable

from tasks.arithmetic import Arithmetic
from tasks.common import MadeTask, Task, TaskMixture
from tasks.identity import Identity
from tasks.spellingbee import Spelling, SpellingBee
from tasks.world import LetterList, WorldChoice, WorldFacts

SCORED: dict[str, Callable[[str], Task]] = {"arithmetic": Arithmetic, "spellingbee": SpellingBee, "world": WorldFacts}
SCORED |= {"choice": WorldChoice, "identity": Identity}


def mixture(split: str, scale: float, seed: int, identity: bool) -> TaskMixture:
    """Conversations of all skills, shuffled; `scale` 1 is 1,000 of each larger one, 0 a ValueError.

    identity: also who the model is, and small talk.
    """
    if not scale > 0:
        raise ValueError(f"--scale {scale}: must be above 0")
    sizes: dict[type[MadeTask], int] = {Arithmetic: 1300, SpellingBee: 1500, Spelling: 250}
    sizes |= {WorldFacts: 1000, WorldChoice: 2500, LetterList: 1300, **({Identity: 2500} if identity else {})}
    return TaskMixture([task(split, max(20, round(n * scale)), seed) for task, n in sizes.items()], seed)
