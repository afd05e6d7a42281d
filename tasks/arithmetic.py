"""Arithmetic through the calculator: the model writes the expression and repeats the tool's result.

    user: What is 37 times 48?
    assistant: <|python_start|>37*48<|python_end|> <|output_start|>1776<|output_end|> 37*48 = 1776.

The wordings are in arithmetic.txt. Pairs of operands are split by hash, so the test asks pairs that were never trained.
"""

import random
import re
from fractions import Fraction
from pathlib import Path

from nanochat.common import read_lists
from nanochat.tools import calculate
from tasks.common import Conversation, MadeTask, after_tools, single_turn, split_of, tool_answer

WORDINGS = Path(__file__).with_suffix(".txt")


class Arithmetic(MadeTask):
    """A question in words, signs or a little story; a call of the calculator; and a sentence with its result."""

    name = "arithmetic"
    train_size = 20_000
    test_size = 1000

    def __init__(self, split: str, size: int | None = None, seed: int = 0) -> None:
        self.wordings = read_lists(WORDINGS)
        super().__init__(split, size, seed)

    def make(self, rng: random.Random, item: None) -> Conversation:
        while True:
            question, expression, operands = self._problem(rng)
            if split_of(operands) != self.split:
                continue
            result = calculate(expression)
            if result is None:  # a division by zero
                continue
            answer = tool_answer(expression, result, f"{expression} = {result}.")
            return single_turn(question, answer, expression=expression)

    def _problem(self, rng: random.Random) -> tuple[str, str, str]:
        """Return a question, its expression in plain signs, and the operands that it is split by."""
        said = self.wordings
        sign = rng.choice("+-*/")
        a, b = _operands(rng, sign)
        kind = rng.random()
        expression = "{a}{o}{b}"
        if kind < 0.07:  # three operands: (12+7)*3
            expression = rng.choice(said["long"])
            template = rng.choice(said["asked"]).format(expression)
        elif kind < 0.42:  # What is 12+7?
            template = rng.choice(said["asked"]).format(rng.choice(said["bare"][:2]))
        elif kind < 0.52:  # 12 + 7 =
            template = rng.choice(said["bare"])
        elif kind < 0.79:  # What is 12 plus 7?
            template = rng.choice(said["asked"]).format(rng.choice(said[f"words {sign}"]))
        elif kind < 0.90:  # Add 7 to 12.
            template = rng.choice(said[f"orders {sign}"])
        else:  # Anna has 12 apples and gets 7 more. ...
            template = rng.choice(said[f"stories {sign}"])
        third = rng.randint(1, 99)
        second_sign = rng.choice("+-*")
        values = {"a": a, "o": sign, "b": b, "p": second_sign, "c": third}
        who = rng.choice(said["people"])
        things = rng.choice(said["things"])
        question = template.format(who=who, things=things, **values)
        return question, expression.format(**values).replace(" ", ""), f"{a} {b}"

    def evaluate(self, conversation: Conversation, completion: str) -> bool:
        """Return True if the calculator was called and the last number after its output is the right result."""
        called = "<|python_start|>" in completion and "<|output_end|>" in completion
        numbers = re.findall(r"(?<![\d)])-?\d+(?:\.\d+)?", after_tools(completion).replace(",", ""))
        truth = calculate(conversation["expression"])
        return called and bool(numbers) and Fraction(numbers[-1]) == Fraction(truth)


def _operands(rng: random.Random, sign: str) -> tuple[str, str]:
    """Return two numbers; most divisions come out whole, most differences above zero, and few numbers have a point."""
    a = _number(rng)
    b = _number(rng)
    if sign == "/":
        if rng.random() < 0.8:
            a = a % 100 or 1
            b = b % 100 or 1
        else:
            b = rng.choice((2, 3, 4, 5, 8, 10))
        if b > 10 or rng.random() < 0.8:
            a *= b  # so that the division has no remainder
    elif sign == "-" and rng.random() < 0.8:
        a, b = max(a, b), min(a, b)
    if rng.random() < 0.04:
        return f"{a}.{rng.randint(1, 9)}", str(b)
    return str(a), str(b)


def _number(rng: random.Random) -> int:
    """Return a whole number of one to six digits, most often two."""
    [digits] = rng.choices(range(1, 7), weights=(20, 45, 20, 10, 3, 2))
    smallest = 10 ** (digits - 1) if digits > 1 else 0
    return rng.randint(smallest, 10**digits - 1)
