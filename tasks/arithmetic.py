"""Arithmetic through the calculator: the model writes the expression and repeats the tool's result."""

import random
import re
from fractions import Fraction
from pathlib import Path

from nanochat.common import read_lists
from nanochat.tools import calculate
from nanochat.world_facts import side_of
from tasks.common import Conversation, MadeTask, after_tools, single_turn


def _number(rng: random.Random) -> int:
    """Return a whole number of one to six digits, most often two."""
    digits = rng.choices((1, 2, 3, 4, 5, 6), (20, 45, 20, 10, 3, 2))[0]
    return rng.randint(10 ** (digits - 1) if digits > 1 else 0, 10**digits - 1)


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


def _problem(rng: random.Random) -> tuple[str, str, str]:
    """Return a question, its expression in plain signs, and the operands that it is split by."""
    sign = rng.choice("+-*/")
    a, b = _operands(rng, sign)
    kind = rng.random()
    form = ""
    said = read_lists(Path(__file__).with_suffix(".txt"))
    if kind < 0.07:
        form = rng.choice(said["long"])
        template = rng.choice(said["asked"]).format(form)
    elif kind < 0.42:
        template = rng.choice(said["asked"]).format(rng.choice(said["bare"][:2]))
    elif kind < 0.52:
        template = rng.choice(said["bare"])
    elif kind < 0.79:
        template = rng.choice(said["asked"]).format(rng.choice(said[f"words {sign}"]))
    elif kind < 0.90:
        template = rng.choice(said[f"orders {sign}"])
    else:
        template = rng.choice(said[f"stories {sign}"])
    values = {"a": a, "b": b, "o": sign, "c": rng.randint(1, 99), "p": rng.choice("+-*")}
    question = template.format(who=rng.choice(said["people"]), things=rng.choice(said["things"]), **values)
    return question, (form or "{a}{o}{b}").format(**values).replace(" ", ""), f"{a} {b}"


class Arithmetic(MadeTask):
    """ "What is 37*48?": a calculator call, its output, and a sentence. Operand pairs are split by hash."""

    name = "arithmetic"
    train_size, test_size = 20_000, 1000

    def make(self, rng: random.Random, item: None) -> Conversation:
        result = None
        while result is None:  # the other split's operands, and a zero divisor, are drawn again
            question, expression, operands = _problem(rng)
            if side_of(operands, "train", "test", 0.9) == self.split:
                result = calculate(expression)
        parts = [
            {"type": "python", "text": expression},
            {"type": "python_output", "text": result},
            {"type": "text", "text": f"{expression} = {result}."},
        ]
        return single_turn(question, parts, expression=expression)

    def evaluate(self, conversation: Conversation, completion: str) -> bool:
        """Return True if the calculator was called and the last number after its output is the right result."""
        truth = calculate(conversation["expression"])
        numbers = re.findall(r"(?<![\d)])-?\d+(?:\.\d+)?", after_tools(completion).replace(",", ""))
        called = "<|python_start|>" in completion and "<|output_end|>" in completion
        return called and bool(numbers) and Fraction(numbers[-1]) == Fraction(truth)
