"""Who the model is, and the small talk around it; the test asks in wordings that training never shows.

    user: hello. who are you
    assistant: I am nanochat, a small language model.

identity.txt lists the answers, each with its questions and with a pattern that a right answer matches.
"""

import random
import re
from pathlib import Path

from nanochat.common import read_lists
from tasks.common import Conversation, MadeTask, single_turn

WORDINGS = Path(__file__).with_suffix(".txt")


class Identity(MadeTask):
    """Questions about the model, greetings, thanks and goodbyes, with one short answer to each intent."""

    name = "identity"
    train_size = 20  # times each wording
    test_size = 4

    def items(self) -> list[tuple[str, str, str]]:
        """Return (answer, pattern, wording) for each wording of the split. Every fourth wording is for the test."""
        found = []
        for answer, (pattern, *wordings) in read_lists(WORDINGS).items():
            for number, wording in enumerate(wordings, start=1):
                split = "test" if number % 4 == 0 else "train"
                if split == self.split:
                    found.append((answer, pattern, wording))
        return found

    def make(self, rng: random.Random, item: tuple[str, str, str]) -> Conversation:
        answer, pattern, wording = item
        return single_turn(_as_typed(wording, rng), answer, pattern=pattern)

    def evaluate(self, conversation: Conversation, completion: str) -> bool:
        """Return True if the completion says what an answer to this intent must say."""
        return re.search(conversation["pattern"], completion, re.IGNORECASE) is not None


def _as_typed(wording: str, rng: random.Random) -> str:
    """Return the wording as people type it: with or without capitals and its last mark, perhaps after a greeting."""
    if rng.random() < 0.3:
        wording = wording.rstrip("?.!")
    if rng.random() < 0.35:
        wording = wording.lower()
    if len(wording.split()) > 2 and rng.random() < 0.2:
        wording = rng.choice(("Hi! ", "Hello. ", "Hey, ", "One question: ")) + wording
    return wording
