"""Letters in words: counting them through the tool, and spelling.

    user: How many r are in strawberry?
    assistant: <|python_start|>" strawberry".count("r")<|python_end|> <|output_start|>3<|output_end|>
               The letter r occurs 3 times in strawberry.

A model sees tokens, not letters, so it has to copy the word into the call. A word's tokens depend on what stands before
it, and only the same tokens are easy to copy. So the call writes the word as the question shows it: after a space
(`" strawberry".count("r")`) or bare, as it is after a quote or at the start (` "strawberry".count("r")`).
"""

import random
import re
import string
from pathlib import Path

from nanochat.common import read_lists
from nanochat.tools import calculate
from nanochat.world import pseudo_word, words
from tasks.common import Conversation, MadeTask, after_tools, single_turn, split_of, tool_answer

WORDINGS = Path(__file__).with_suffix(".txt")


class WordTask(MadeTask):
    """Conversations about single words, which are split by hash."""

    def __init__(self, split: str, size: int | None = None, seed: int = 0) -> None:
        self.words = words()
        self.wordings = read_lists(WORDINGS)
        super().__init__(split, size, seed)

    def word(self, rng: random.Random) -> str:
        """Return a word of the split: a real one, or for training often a made-up one."""
        while True:
            if self.split == "train" and rng.random() < 0.4:
                word = pseudo_word(rng)
            else:
                word = rng.choice(self.words)
            if split_of(word) == self.split:
                return word


class SpellingBee(WordTask):
    """How often a letter occurs in a word: a tool call, its output, and a sentence."""

    name = "spellingbee"
    train_size = 20_000
    test_size = 1000

    def make(self, rng: random.Random, item: None) -> Conversation:
        word = self.word(rng)
        letter = rng.choice(word) if rng.random() < 0.8 else rng.choice(string.ascii_lowercase)
        if rng.random() < 0.1 and letter != word[0]:  # the tool minds upper case, so the first letter is not asked
            word = word.capitalize()

        template = rng.choice(self.wordings["counting"])
        quote = rng.choice(("", "", "", '"', "'")) if " {w}" in template else ""
        letter_form = rng.choice(self.wordings["letters"])  # such as 'r', the letter r, r's
        shown_letter = letter.upper() if rng.random() < 0.1 else letter
        question = template.format(l=letter_form.format(l=shown_letter), w=f"{quote}{word}{quote}")

        if quote or template.startswith("{w}"):
            expression = f' "{word}".count("{letter}")'
            said = f'"{word}"'
        else:
            expression = f'" {word}".count("{letter}")'
            said = word
        count = calculate(expression)
        times = "time" if count == "1" else "times"
        answer = tool_answer(expression, count, f"The letter {letter} occurs {count} {times} in {said}.")
        return single_turn(question, answer, word=word, letter=letter)

    def evaluate(self, conversation: Conversation, completion: str) -> bool:
        """Return True if the first number after the last tool output is the count."""
        number = re.search(r"\d+", after_tools(completion))
        return number is not None and int(number[0]) == conversation["word"].count(conversation["letter"])


class Spelling(WordTask):
    """ "Spell apple." answered "a-p-p-l-e"."""

    name = "spelling"
    train_size = 10_000
    test_size = 1000

    def make(self, rng: random.Random, item: None) -> Conversation:
        word = self.word(rng)
        template = rng.choice(self.wordings["spelling"])
        return single_turn(template.format(w=word), "-".join(word), word=word)

    def evaluate(self, conversation: Conversation, completion: str) -> bool:
        """Return True if the completion is the word's letters joined by hyphens."""
        return completion.strip().rstrip(".") == "-".join(conversation["word"])
