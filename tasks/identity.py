"""Who the model is, and the small talk around it; the test asks in wordings that training never shows."""

import random
import re
from pathlib import Path
from typing import NamedTuple

from nanochat.common import read_lists
from tasks.common import Conversation, MadeTask, single_turn


class Intent(NamedTuple):
    """One thing people say: its answer, a pattern that a right answer matches, and its wordings."""

    answer: str
    pattern: str
    wordings: list[str]

    def asked(self, split: str) -> list[str]:
        """The wordings of a split: every fourth one is kept for the test."""
        return [text for i, text in enumerate(self.wordings) if (i % 4 == 3) == (split == "test")]


def intents() -> list[Intent]:
    """All that is asked, as identity.txt has it."""
    parts = read_lists(Path(__file__).with_suffix(".txt")).items()
    return [Intent(answer, pattern, wordings) for answer, (pattern, *wordings) in parts]


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

    def items(self, split: str) -> list[tuple[Intent, str]]:
        return [(intent, wording) for intent in intents() for wording in intent.asked(split)]

    def make(self, rng: random.Random, item: tuple[Intent, str]) -> Conversation:
        intent, wording = item
        return single_turn(_styled(wording, rng), intent.answer, pattern=intent.pattern)

    def evaluate(self, conversation: Conversation, completion: str) -> bool:
        """Whether the completion says what an answer to this intent must say."""
        return re.search(conversation["pattern"], completion, re.IGNORECASE) is not None
