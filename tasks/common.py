"""Chat tasks: numbered conversations, each with a function that judges a completion.

A task is used twice. Its "train" split is rendered into rows that midtraining and fine-tuning learn from. Its "test"
split is shown to the model up to the last question, and `evaluate` says whether the answer is right. Every conversation
is a function of the task's arguments and its index, so runs, ranks and resumed runs see the same ones.

`TaskMixture` shuffles tasks together, `TaskSequence` puts one after another, and `Multiturn` joins single exchanges
into longer conversations.
"""

import random
import string
from collections.abc import Iterable, Sequence
from typing import Any

from nanochat.common import print0
from nanochat.world import render_choices as render_choices  # the layout that pretraining text shows too

Conversation = dict[str, Any]


class Task:
    """Conversations by index, and `evaluate` to judge a completion.

    A subclass sets `name` and writes `example(i)` for i in range(total). `eval_type` is "generative" (the completion is
    text that the model wrote) or "categorical" (it is the most probable of conversation["letters"], found without
    sampling). `baseline` is the accuracy of guessing, from 0 to 1.
    """

    name = "task"
    eval_type = "generative"
    baseline = 0.0
    skipped = 0  # items of the source that made no conversation

    def __init__(self, total: int) -> None:
        self._indices = range(total)

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: int) -> Conversation:
        return self.example(self._indices[index])

    def example(self, index: int) -> Conversation:
        """Return conversation `index`."""
        raise NotImplementedError

    def evaluate(self, conversation: Conversation, completion: str) -> bool:
        """Return whether `completion`, the assistant's decoded text with its tool calls, is right.

        By default it is right if it is the reference's last answer, such as a letter.
        """
        return completion.strip() == conversation["messages"][-1]["content"]


class MadeTask(Task):
    """Conversations that are made when they are asked for, by `make(rng, item)`; another `seed` makes others.

    There are `size` of them, by default `train_size` or `test_size`. A subclass with `items(split)` is given these in
    turn, in a shuffled order; its default sizes then count passes over the items.
    """

    train_size = test_size = 1000

    def __init__(self, split: str, size: int | None = None, seed: int = 0) -> None:
        self.split = require_split(split)
        self.seed = seed
        self.deck = list(self.items(split))
        random.Random(f"{self.name} {split}").shuffle(self.deck)
        default_size = self.train_size if split == "train" else self.test_size
        if self.deck:
            default_size *= len(self.deck)
        super().__init__(default_size if size is None else size)

    def items(self, split: str) -> Iterable[Any]:
        """Return what a split asks about; nothing if everything is drawn at random."""
        return ()

    def example(self, index: int) -> Conversation:
        item = self.deck[index % len(self.deck)] if self.deck else None
        rng = random.Random(f"{self.name} {self.seed} {self.split} {index}")
        return self.make(rng, item)

    def make(self, rng: random.Random, item: Any) -> Conversation:
        """Return a conversation, about `item` if there are items. Everything random is drawn from `rng`."""
        raise NotImplementedError


class TaskSequence(Task):
    """Tasks one after another."""

    name = "sequence"

    def __init__(self, tasks: Sequence[Task]) -> None:
        self._places = [(task, index) for task in tasks for index in range(len(task))]
        super().__init__(len(self._places))

    def example(self, index: int) -> Conversation:
        task, place = self._places[index]
        return task[place]


class TaskMixture(TaskSequence):
    """Tasks shuffled together, in the same order for the same seed; at most `limit` conversations of them.

    A task that is listed twice contributes each conversation twice.
    """

    name = "mixture"

    def __init__(self, tasks: Sequence[Task], seed: int = 0, limit: int | None = None) -> None:
        super().__init__(tasks)
        random.Random(f"mixture {seed}").shuffle(self._places)
        self._indices = self._indices[:limit]


class Multiturn(Task):
    """Conversations of 1 to `max_turns` exchanges, joined from single exchanges of `task`; for training only.

    Each conversation of `task` opens one; the exchanges that follow are drawn at random. A model that has only seen
    single questions answers the first of a chat well, and the second badly.
    """

    name = "multiturn"

    def __init__(self, task: Task, max_turns: int = 4, seed: int = 0) -> None:
        self.task = task
        self.max_turns = max_turns
        self.seed = seed
        super().__init__(len(task))

    def example(self, index: int) -> Conversation:
        rng = random.Random(f"multiturn {self.seed} {index}")
        later = [rng.randrange(len(self.task)) for _ in range(rng.randrange(self.max_turns))]
        messages = [message for place in (index, *later) for message in self.task[place]["messages"]]
        return {"messages": messages}


def require_split(split: str, known: Sequence[str] = ("train", "test")) -> str:
    """Return `split`. Raises ValueError if it is not one of `known`."""
    if split not in known:
        raise ValueError(f"unknown split '{split}'; known: {', '.join(known)}")
    return split


def single_turn(question: str, answer: str | list[dict[str, str]], /, **extra: Any) -> Conversation:
    """Return a conversation of one question and its answer (text or parts). `extra` keys are for `evaluate`."""
    messages = [
        {"role": "user", "content": question},
        {"role": "assistant", "content": answer},
    ]
    return {"messages": messages, **extra}


def multiple_choice(question: str, choices: Sequence[str], place: int) -> Conversation:
    """Return a question with lettered choices, whose answer is the letter of `choices[place]` alone.

    Raises ValueError if there are not 2 to 26 choices, or if `place` is not one of them.
    """
    if not 2 <= len(choices) <= 26 or not all(isinstance(text, str) and text for text in choices):
        raise ValueError(f"choices must be 2 to 26 texts, not {choices!r:.80}")
    if not 0 <= place < len(choices):
        raise ValueError(f"the answer {place} is none of {len(choices)} choices")
    letters = list(string.ascii_uppercase[: len(choices)])
    return single_turn(render_choices(question, letters, choices), letters[place], letters=letters)


def name_skipped(source: str, problems: Sequence[str], total: int) -> int:
    """Print the first five `problems`, and how many of the source's `total` items are skipped. Return that number."""
    for problem in problems[:5]:
        print0(problem)
    if problems:
        print0(f"{source}: skipped {len(problems)} of {total:,} conversations")
    return len(problems)


def after_tools(completion: str) -> str:
    """Return the completion's text after its last tool output: all of it if no tool was called."""
    return completion.rpartition("<|output_end|>")[2]
