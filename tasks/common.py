"""Chat tasks: numbered conversations, each with a judge that says whether a completion is right.

    task = MMLU("test")
    len(task)                                   14042
    task[0]                                     {"messages": [question, answer], "letters": ["A", "B", "C", "D"]}
    task.evaluate(task[0], "B")                 True or False

A task is used twice. Its "train" split is rendered into rows that midtraining and fine-tuning learn from. Its "test"
split is shown to the model up to the last question, and `evaluate` judges what the model says. Conversation i is a
function of the task's arguments and of i alone, so runs, ranks and resumed runs see the same ones.

To add a benchmark, write a file like mmlu.py (rows of a published data set) or identity.py (conversations that are made
here), and list it in public.py or builtin.py to have it scored, in mixtures.py or builtin.py to have it trained on.

The last part of this file combines tasks: `TaskSequence` puts one after another, `TaskMixture` shuffles them together,
and `Multiturn` joins single exchanges into longer conversations.
"""

import random
import string
from collections.abc import Iterable, Sequence
from typing import Any

from nanochat.common import print0
from nanochat.world import render_choices
from nanochat.world_facts import hash_fraction

Conversation = dict[str, Any]  # {"messages": [...]}, and further keys for `evaluate`


class Task:
    """Conversations by index, and `evaluate` to judge a completion.

    A subclass sets `name` and writes `example(i)` for i in range(size). `eval_type` is "generative" (the completion is
    text that the model wrote) or "categorical" (it is the most probable of conversation["letters"], found without
    sampling). `baseline` is the accuracy of guessing, from 0 to 1.
    """

    name = "task"
    eval_type = "generative"
    baseline = 0.0
    skipped = 0  # items of the source that made no conversation

    def __init__(self, size: int) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Conversation:
        return self.example(range(self.size)[index])  # IndexError past the end, which is what ends a `for`

    def example(self, index: int) -> Conversation:
        """Return conversation `index`."""
        raise NotImplementedError

    def evaluate(self, conversation: Conversation, completion: str) -> bool:
        """Return True if `completion`, the assistant's decoded text with its tool calls, is right.

        By default it is right if it is the reference's last answer, such as a letter.
        """
        return completion.strip() == conversation["messages"][-1]["content"]


class MadeTask(Task):
    """Conversations that are made when they are asked for, by `make(rng, item)`; another `seed` makes others.

    There are `size` of them, by default `train_size` or `test_size`. A subclass whose `items` are not empty is given
    them in turn, in a shuffled order; its default sizes then count passes over the items. A subclass loads what `items`
    and `make` need before it calls this `__init__`, which asks for the items.
    """

    train_size = 1000
    test_size = 1000

    def __init__(self, split: str, size: int | None = None, seed: int = 0) -> None:
        require_split(split, ("train", "test"))
        self.split = split
        self.seed = seed
        self.deck = list(self.items())
        random.Random(f"{self.name} {split}").shuffle(self.deck)
        if size is None:
            size = self.train_size if split == "train" else self.test_size
            if self.deck:
                size *= len(self.deck)
        super().__init__(size)

    def items(self) -> Iterable[Any]:
        """Return what conversations of `self.split` are about; nothing if they are drawn at random."""
        return []

    def make(self, rng: random.Random, item: Any) -> Conversation:
        """Return a conversation, about `item` if there are items. Everything random is drawn from `rng`."""
        raise NotImplementedError

    def example(self, index: int) -> Conversation:
        rng = random.Random(f"{self.name} {self.seed} {self.split} {index}")
        item = self.deck[index % len(self.deck)] if self.deck else None
        return self.make(rng, item)


def require_split(split: str, known: Sequence[str]) -> None:
    """Raise ValueError if `split` is not one of `known`."""
    if split not in known:
        raise ValueError(f"unknown split '{split}'; known: {', '.join(known)}")


def split_of(name: str) -> str:
    """Return the split that may show `name`, by its hash: "train" for nine names in ten, else "test".

    Tasks that draw their words and numbers at random draw again until they are of the right split, so that no test
    item was ever trained on.
    """
    return "train" if hash_fraction(name) < 0.9 else "test"


# --- conversations


def single_turn(question: str, answer: str | list[dict[str, str]], /, **extra: Any) -> Conversation:
    """Return a conversation of one question and its answer (text or parts). `extra` keys are for `evaluate`."""
    messages = [
        {"role": "user", "content": question},
        {"role": "assistant", "content": answer},
    ]
    return {"messages": messages, **extra}


def tool_answer(expression: str, result: str, sentence: str) -> list[dict[str, str]]:
    """Return the parts of an answer that calls the calculator: the call, its output, and what is said of it."""
    return [
        {"type": "python", "text": expression},
        {"type": "python_output", "text": result},
        {"type": "text", "text": sentence},
    ]


def after_tools(completion: str) -> str:
    """Return the completion's text after its last tool output: all of it if no tool was called."""
    return completion.rpartition("<|output_end|>")[2]


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


# --- tasks made of tasks


class TaskSequence(Task):
    """Tasks one after another."""

    name = "sequence"

    def __init__(self, tasks: Sequence[Task]) -> None:
        self.places = [(task, index) for task in tasks for index in range(len(task))]
        super().__init__(len(self.places))

    def example(self, index: int) -> Conversation:
        task, place = self.places[index]
        return task[place]


class TaskMixture(TaskSequence):
    """Tasks shuffled together, in the same order for the same seed; at most `limit` conversations of them.

    A task that is listed twice contributes each conversation twice.
    """

    name = "mixture"

    def __init__(self, tasks: Sequence[Task], seed: int = 0, limit: int | None = None) -> None:
        super().__init__(tasks)
        random.Random(f"mixture {seed}").shuffle(self.places)
        if limit is not None:
            self.size = min(limit, self.size)


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
        n_later = rng.randrange(self.max_turns)
        messages = list(self.task[index]["messages"])
        for _ in range(n_later):
            later = self.task[rng.randrange(len(self.task))]
            messages += later["messages"]
        return {"messages": messages}
