"""What a chat task is: numbered conversations with a judge; and how tasks are sliced, mixed and chained."""

import random
import string
from collections.abc import Iterable, Sequence
from typing import Any

from nanochat.common import print0
from nanochat.world import render_choices as render_choices  # the layout that pretraining text shows too

Conversation = dict[str, Any]


class Task:
    """Conversations by index, and `evaluate` to judge a completion.

    A subclass sets `name` and writes `example(i)`, a function of the task's arguments and i alone, for i in
    range(total). `eval_type` is "generative" (the completion is text that the model wrote) or "categorical" (it is
    one of conversation["letters"], the most probable one). `baseline` is the accuracy of guessing, 0 to 1.
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
        """Conversation `index`."""
        raise NotImplementedError

    def evaluate(self, conversation: Conversation, completion: str) -> bool:
        """Whether `completion` (the assistant's decoded text, tool calls included) answers the conversation rightly.

        Here: whether it is the reference's last answer, such as a letter.
        """
        return completion.strip() == conversation["messages"][-1]["content"]


class MadeTask(Task):
    """Conversations made up as they are asked for, by `make(rng, item)`; another `seed` draws others.

    There are `size` of them, unset: `train_size` or `test_size`. A subclass that has `items(split)` to ask is given
    these in turn, in a shuffled order, and its sizes count passes over them.
    """

    train_size = test_size = 1000

    def __init__(self, split: str, size: int | None = None, seed: int = 0) -> None:
        self.split, self.seed, self.deck = require_split(split), seed, list(self.items(split))
        random.Random(f"{self.name} {split}").shuffle(self.deck)
        default = (self.train_size if split == "train" else self.test_size) * (len(self.deck) or 1)
        super().__init__(default if size is None else size)

    def items(self, split: str) -> Iterable[Any]:
        """What a split asks about; nothing where everything is drawn."""
        return ()

    def example(self, index: int) -> Conversation:
        item = self.deck[index % len(self.deck)] if self.deck else None
        return self.make(random.Random(f"{self.name} {self.seed} {self.split} {index}"), item)

    def make(self, rng: random.Random, item: Any) -> Conversation:
        """A conversation, about `item` where there are items; all that is drawn is drawn from `rng`."""
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
    """Tasks shuffled together, the same way for the same seed in any process; at most `limit` conversations of them.

    A task that is named twice has every conversation twice.
    """

    name = "mixture"

    def __init__(self, tasks: Sequence[Task], seed: int = 0, limit: int | None = None) -> None:
        super().__init__(tasks)
        random.Random(f"mixture {seed}").shuffle(self._places)
        self._indices = self._indices[:limit]


class Multiturn(Task):
    """Conversations of 1 to `max_turns` exchanges, joined from single ones of `task`; for training only.

    Each conversation of `task` opens one; those that follow are drawn at random.
    """

    name = "multiturn"

    def __init__(self, task: Task, max_turns: int = 4, seed: int = 0) -> None:
        self.task, self.max_turns, self.seed = task, max_turns, seed
        super().__init__(len(task))

    def example(self, index: int) -> Conversation:
        rng = random.Random(f"multiturn {self.seed} {index}")
        later = [rng.randrange(len(self.task)) for _ in range(rng.randrange(self.max_turns))]
        return {"messages": [message for place in (index, *later) for message in self.task[place]["messages"]]}


def require_split(split: str, known: Sequence[str] = ("train", "test")) -> str:
    """`split`, if it is a known one; else ValueError."""
    if split not in known:
        raise ValueError(f"unknown split '{split}'; known: {', '.join(known)}")
    return split


def single_turn(question: str, answer: str | list[dict[str, str]], /, **extra: Any) -> Conversation:
    """A conversation of one question and its answer (text or parts); `extra` keys are for the judge."""
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"messages": messages, **extra}


def multiple_choice(question: str, choices: Sequence[str], place: int) -> Conversation:
    """A question with lettered choices, answered with the letter of `choices[place]` alone.

    Raises ValueError when there is nothing to choose from, or no such choice.
    """
    if not 2 <= len(choices) <= 26 or not all(isinstance(text, str) and text for text in choices):
        raise ValueError(f"choices must be 2 to 26 texts, not {choices!r:.80}")
    if not 0 <= place < len(choices):
        raise ValueError(f"the answer {place} is none of {len(choices)} choices")
    letters = list(string.ascii_uppercase[: len(choices)])
    return single_turn(render_choices(question, letters, choices), letters[place], letters=letters)


def name_skipped(source: str, problems: Sequence[str], total: int) -> int:
    """Print what is wrong with the first five items that a source of `total` loses, a line each; their number."""
    for problem in problems[:5]:
        print0(problem)
    if problems:
        print0(f"{source}: skipped {len(problems)} of {total:,} conversations")
    return len(problems)


def after_tools(completion: str) -> str:
    """What the completion says after its last tool output (all of it where no tool was called)."""
    return completion.rpartition("<|output_end|>")[2]
