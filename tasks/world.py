"""Facts of the built-in world as questions: open ones, and with four choices. Train and test share no fact.

The train split asks facts of the "chat" side, the test split those of the "held_out" side, which the model has met in
pretraining text alone (see nanochat/world_facts.py).
"""

import random
import re
from collections.abc import Sequence

from nanochat.world import letter_questions, render_choices, words
from nanochat.world_facts import LETTERS, Fact, World
from tasks.common import Conversation, MadeTask, single_turn

SIDES = {"train": "chat", "test": "held_out"}


class FactTask(MadeTask):
    """Conversations about facts of the world: of the side that the split may show."""

    def __init__(self, split: str, size: int | None = None, seed: int = 0) -> None:
        self.world = World()
        super().__init__(split, size, seed)


class WorldFacts(FactTask):
    """ "What is the capital of France?" in many wordings, answered in the words of a pretraining sentence.

    "train" asks in new wordings for as long as `size` goes. "test" asks every held-out fact once. Item i asks fact i of
    a shuffled order, so that any first part is a sample of all relations.
    """

    name = "world_facts"
    train_size = 8  # times each fact
    test_size = 1

    def items(self) -> list[Fact]:
        return self.world.on_side(SIDES[self.split])

    def make(self, rng: random.Random, fact: Fact) -> Conversation:
        return single_turn(
            fact.question(rng),
            fact.sentence,
            category=fact.relation.category,
            subject=fact.subject,
            answer=fact.answer,
        )

    def evaluate(self, conversation: Conversation, completion: str) -> bool:
        """Return True if the completion names the answer and no other answer of its category.

        Names that the question names may be repeated: "The opposite of hot is cold."
        """
        category = conversation["category"]
        answer = {_bare(conversation["answer"], category)}
        repeated = self._named(conversation["subject"], category) - answer
        return self._named(completion, category) - repeated == answer

    def _named(self, text: str, category: str) -> set[str]:
        """Return the answers of a category that `text` names, as whole words."""
        names = {_bare(name, category) for name in self.world.answers[category]}
        longest_first = sorted(names, key=len, reverse=True)  # Papua New Guinea is not Guinea
        either = "|".join(map(re.escape, longest_first))
        if category == "symbol":
            # Case counts, and a word after the symbol must be "is" or "stands": "I do not know" does not name iodine.
            found = re.findall(rf"(?<!\w)(?:{either})(?!\w| (?!is\b|stands\b)[a-z])", text)
        else:
            found = re.findall(rf"(?<!\w)(?:{either})(?!\w)", text, re.IGNORECASE)
        return {_bare(name, category) for name in found}


def _bare(name: str, category: str) -> str:
    """Return a name as it is compared: without "the", and in lower case unless case tells symbols apart."""
    name = name.removeprefix("the ")
    return name if category == "symbol" else name.lower()


class WorldChoice(FactTask):
    """A fact asked with four choices, the right letter uniform over A to D; the answer is the letter alone.

    "train" goes on to ask about the other choices, in further turns: many letters to learn from for few tokens.
    """

    name = "world_choice"
    eval_type = "categorical"
    baseline = 0.25
    train_size = 12
    test_size = 1

    def items(self) -> list[Fact]:
        return self.world.choice_facts(SIDES[self.split])

    def make(self, rng: random.Random, fact: Fact) -> Conversation:
        if self.split == "test":
            choices, place = self.world.choices(fact, rng)
            drawn = [(fact, LETTERS[place])]
        else:
            choices, drawn = self.world.choice_questions(fact, rng, side="chat")
        return _choice_talk(choices, [(known.question(rng), letter) for known, letter in drawn])


class LetterList(MadeTask):
    """Words with letters, and questions which letter a word has: how to answer with a letter, for training."""

    name = "letter_list"

    def __init__(self, split: str, size: int | None = None, seed: int = 0) -> None:
        self.words = words()
        super().__init__(split, size, seed)

    def make(self, rng: random.Random, item: None) -> Conversation:
        choices = [rng.choice(self.words) for _ in LETTERS]
        return _choice_talk(choices, letter_questions(rng, choices))


def _choice_talk(choices: Sequence[str], asked: Sequence[tuple[str, str]]) -> Conversation:
    """Return a conversation of four choices, and one (question, letter) about them after another."""
    (question, letter), *more = asked
    talk = single_turn(render_choices(question, LETTERS, choices), letter, letters=list(LETTERS))
    for question, letter in more:
        talk["messages"] += single_turn(question, letter)["messages"]
    return talk
