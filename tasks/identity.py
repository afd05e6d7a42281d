"""Who the model is, and the small talk around it; the test asks in wordings that training never shows."""

import random
import re
from pathlib import Path

from nanochat.common import read_lists
from tasks.common import Conversation, MadeTask, single_turn


def _styled(wording: str, rng: random.Random) -> str:
    """The wording as people type it: with or without capitals and its last mark, perhaps after a greeting."""
    if rng.random() < 0.3:
        wording = wording.rstrip("?.!")
    if rng.random() < 0.35:
        wording = wording.lower()
    if len(wording.split()) > 2 and rng.random() < 0.2:
        wording = rng.choice(("Hi! ", "Hello. ", "Hey, ", "One question: ")) + wording
    return wording


class Identity(MadeTask):
    """Questions about the model, greetings, thanks and goodbyes, with one short answer to each intent."""

    name = "identity"
    train_size, test_size = 20, 4

    def items(self, split: str) -> list[tuple[str, str, str]]:
        """An answer, the pattern that a right one matches, and a wording, of which every fourth is for the test."""
        found = []
        for answer, (pattern, *wordings) in read_lists(Path(__file__).with_suffix(".txt")).items():
            kept = [text for i, text in enumerate(wordings) if (i % 4 == 3) == (split == "test")]
            found += [(answer, pattern, text) for text in kept]
        return found

    def make(self, rng: random.Random, item: tuple[str, str, str]) -> Conversation:
        answer, pattern, wording = item
        return single_turn(_styled(wording, rng), answer, pattern=pattern)

    def evaluate(self, conversation: Conversation, completion: str) -> bool:
        """Return whether the completion says what an answer to this intent must say."""
        return re.search(conversation["pattern"], completion, re.IGNORECASE) is not None
