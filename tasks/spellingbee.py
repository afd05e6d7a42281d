"""Letters in words: counting them through the tool, and spelling.

A word's tokens depend on what stands before it, so the call copies the word as the question shows it: after a space
(`" strawberry".count("r")`) or bare, as it is after a quote or at the start (` "strawberry".count("r")`).
"""

import random
import re
import string
from pathlib import Path

from nanochat.common import read_lists
from nanochat.tools import calculate
from nanochat.world import pseudo_word, words
from nanochat.world_facts import side_of
from tasks.common import Conversation, MadeTask, after_tools, single_turn

WORDINGS = Path(__file__).with_suffix(".txt")


def _word(rng: random.Random, split: str) -> str:
    """Return a word of the split: a real one, or for training often a made-up one."""
    while True:
        word = pseudo_word(rng) if split == "train" and rng.random() < 0.4 else rng.choice(words())
        if side_of(word, "train", "test", 0.9) == split:
            return word


class SpellingBee(MadeTask):
    """ "How many r are in strawberry?": a tool call, its output, and a sentence. Words are split by hash."""

    name = "spellingbee"
    train_size, test_size = 20_000, 1000

    def make(self, rng: random.Random, item: None) -> Conversation:
        word = _word(rng, self.split)
        letter = rng.choice(word) if rng.random() < 0.8 else rng.choice(string.ascii_lowercase)
        if rng.random() < 0.1 and letter != word[0]:  # the tool minds upper case, so the first letter is not asked
            word = word.capitalize()
        template = rng.choice(read_lists(WORDINGS)["counting"])
        quote = rng.choice(("", "", "", '"', "'")) if " {w}" in template else ""
        shown = rng.choice(read_lists(WORDINGS)["letters"]).format(l=letter.upper() if rng.random() < 0.1 else letter)
        bare = quote or not template.partition("{w}")[0]
        expression = f' "{word}".count("{letter}")' if bare else f'" {word}".count("{letter}")'
        count = calculate(expression)
        said = f'"{word}"' if bare else word
        parts = [
            {"type": "python", "text": expression},
            {"type": "python_output", "text": count},
            {"type": "text", "text": f"The letter {letter} occurs {count} time{'s' * (count != '1')} in {said}."},
        ]
        return single_turn(template.format(l=shown, w=f"{quote}{word}{quote}"), parts, word=word, letter=letter)

    def evaluate(self, conversation: Conversation, completion: str) -> bool:
        """Return True if the first number after the last tool output is the count."""
        number = re.search(r"\d+", after_tools(completion))
        return number is not None and int(number[0]) == conversation["word"].count(conversation["letter"])


class Spelling(MadeTask):
    """ "Spell apple." answered "a-p-p-l-e". Words are split by hash."""

    name = "spelling"
    train_size, test_size = 10_000, 1000

    def make(self, rng: random.Random, item: None) -> Conversation:
        word = _word(rng, self.split)
        return single_turn(rng.choice(read_lists(WORDINGS)["spelling"]).format(w=word), "-".join(word), word=word)

    def evaluate(self, conversation: Conversation, completion: str) -> bool:
        """Return True if the completion is the word's letters joined by hyphens."""
        return completion.strip().rstrip(".") == "-".join(conversation["word"])
