"""Facts of the built-in world as questions: open ones, and with four choices. Train and test share no fact."""

import functools
import random
import re
from collections.abc import Sequence

from nanochat.world import LETTERS, category_answers, choice_facts, choice_questions, choices_for, listed_choice, words
from nanochat.world_facts import Fact, facts_on
from tasks.common import Conversation, MadeTask, render_choices, single_turn

SIDES = {"train": "chat", "test": "held_out"}


def _bare(name: str, category: str) -> str:
    """Return a name as it is compared: without "the", and in lower case but for chemical symbols."""
    name = name.removeprefix("the ")
    return name if category == "symbol" else name.lower()


@functools.cache
def _any_answer(category: str) -> re.Pattern[str]:
    """Return a pattern that finds the whole-word answers of a category, the longest first."""
    names = sorted({_bare(name, category) for name in category_answers(category)}, key=len, reverse=True)
    if category == "symbol":
        # The case counts, and a word after the symbol must be "is" or "stands": "I do not know" does not name iodine.
        flags = 0
        end = r"(?!\w| (?!is\b|stands\b)[a-z])"
    else:
        flags = re.IGNORECASE
        end = r"(?!\w)"
    return re.compile(rf"(?<!\w)(?:{'|'.join(map(re.escape, names))}){end}", flags)


def _named(text: str, category: str) -> set[str]:
    """Return the answers of a category that `text` names."""
    return {_bare(name, category) for name in _any_answer(category).findall(text)}


class WorldFacts(MadeTask):
    """ "What is the capital of France?" in many wordings, answered in the words of a pretraining sentence.

    "train" asks facts of the chat side, in new wordings for as long as `size` goes; "test" asks every held-out fact
    once. Item i asks fact i of a shuffled order, so that any first part is a sample of all relations.
    """

    name = "world_facts"
    train_size, test_size = 8, 1

    def items(self, split: str) -> tuple[Fact, ...]:
        return facts_on(SIDES[split])

    def make(self, rng: random.Random, fact: Fact) -> Conversation:
        known = {"category": fact.relation.category, "subject": fact.subject, "answer": fact.answer}
        return single_turn(fact.question(rng), fact.sentence, **known)

    def evaluate(self, conversation: Conversation, completion: str) -> bool:
        """Return True if the completion names the answer and no other of its category (but what the subject names)."""
        category = conversation["category"]
        answer = {_bare(conversation["answer"], category)}
        named = _named(completion, category) - (_named(conversation["subject"], category) - answer)
        return named == answer


def _choice_talk(choices: Sequence[str], asked: Sequence[tuple[str, str]]) -> Conversation:
    """Return a talk of four choices, and one (question, letter) after another: many letters for few tokens."""
    (question, letter), *more = asked
    talk = single_turn(render_choices(question, LETTERS, choices), letter, letters=list(LETTERS))
    for question, letter in more:
        talk["messages"] += single_turn(question, letter)["messages"]
    return talk


class LetterList(MadeTask):
    """Words with letters, and questions which letter a word has: how to answer with a letter, for training."""

    name = "letter_list"

    def make(self, rng: random.Random, item: None) -> Conversation:
        return _choice_talk(*listed_choice(rng, lambda: rng.choice(words())))


class WorldChoice(MadeTask):
    """A fact asked with four choices, the right letter uniform over A to D; the answer is the letter alone.

    "train" goes on to ask about the other choices, in further turns.
    """

    name = "world_choice"
    eval_type = "categorical"
    baseline = 0.25
    train_size, test_size = 12, 1

    def items(self, split: str) -> tuple[Fact, ...]:
        return choice_facts(SIDES[split])

    def make(self, rng: random.Random, fact: Fact) -> Conversation:
        if self.split == "test":
            choices, place = choices_for(fact, rng)
            asked = [(fact, LETTERS[place])]
        else:
            choices, asked = choice_questions(fact, rng, side="chat")
        return _choice_talk(choices, [(f.question(rng), letter) for f, letter in asked])
