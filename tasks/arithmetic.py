"""Arithmetic through the calculator: the model writes the expression and repeats the tool's result."""

import random
import re
from fractions import Fraction

from nanochat.tools import calculate
from nanochat.world_facts import side_of
from tasks.common import Conversation, MadeTask, after_tools, single_turn

_BARE = (
    "{a}{o}{b}", "{a} {o} {b}", "{a}{o}{b}=", "{a} {o} {b} =", "{a}{o}{b}?", "{a} {o} {b} = ?", "{a}{o}{b}=?",
    "{a} {o} {b}?",
)  # fmt: skip
_ASKED = (
    "What is {}?", "what is {}", "What's {}?", "what's {}", "Calculate {}.", "calculate {}", "Compute {}.",
    "How much is {}?", "how much is {}", "Tell me {}.", "Can you work out {}?", "Please calculate {}.",
    "What does {} make?", "Work out {}.", "{} is what?", "What is the result of {}?", "Solve {}.",
    "What do you get for {}?", "Use the calculator: {}", "{}", "Can you compute {}, please?", "I need to know {}.",
    "Evaluate {}.", "what does {} equal?", "Give me the value of {}.",
)  # fmt: skip
_WORDS = {
    "+": ("{a} plus {b}", "{a} and {b} together", "the sum of {a} and {b}", "{a} added to {b}"),
    "-": ("{a} minus {b}", "{a} take away {b}", "the difference of {a} and {b}", "{a} less {b}"),
    "*": ("{a} times {b}", "{a} multiplied by {b}", "the product of {a} and {b}", "{a} x {b}", "{a}x{b}"),
    "/": ("{a} divided by {b}", "{a} over {b}", "the quotient of {a} and {b}"),
}
_ORDERS = {
    "+": ("Add {a} and {b}.", "add {a} to {b}", "Add {a} to {b}.", "Sum {a} and {b}."),
    "-": ("Subtract {b} from {a}.", "subtract {b} from {a}", "Take {b} away from {a}.", "take {b} from {a}"),
    "*": ("Multiply {a} by {b}.", "multiply {a} by {b}", "Multiply {a} and {b}.", "multiply {a} with {b}"),
    "/": ("Divide {a} by {b}.", "divide {a} by {b}", "Split {a} into {b} equal parts. How big is each?"),
}
_STORIES = {
    "+": ("{who} has {a} {things} and gets {b} more. How many {things} does {who} have now?",
    "There are {a} {things} in one box and {b} in another. How many {things} are there in all?"),
    "-": ("{who} has {a} {things} and gives away {b}. How many {things} are left?",
    "There were {a} {things} and {b} were sold. How many {things} remain?"),
    "*": ("{who} buys {a} boxes with {b} {things} each. How many {things} is that?",
    "There are {a} bags and {b} {things} in every bag. How many {things} are there?"),
    "/": ("{who} shares {a} {things} among {b} friends. How many {things} does each friend get?",
    "{a} {things} are put into {b} equal boxes. How many {things} are in each box?"),
}  # fmt: skip
_PEOPLE = ("Anna", "Ben", "Carla", "David", "Eva", "Frank", "Grace", "Henry", "Ida", "Jack", "Tom", "Mia")
_THINGS = ("apples", "books", "coins", "stones", "cards", "eggs", "pencils", "shells", "stamps", "marbles")
_LONG = ("{a} {o} {b} {p} {c}", "{a}{o}{b}{p}{c}", "({a}{o}{b}){p}{c}", "({a} {o} {b}) {p} {c}", "{a}{o}({b}{p}{c})")


def _number(rng: random.Random) -> int:
    """A whole number of one to six digits, most often two."""
    digits = rng.choices((1, 2, 3, 4, 5, 6), (20, 45, 20, 10, 3, 2))[0]
    return rng.randint(10 ** (digits - 1) if digits > 1 else 0, 10**digits - 1)


def _operands(rng: random.Random, sign: str) -> tuple[str, str]:
    """Two numbers; most divisions come out whole, most differences above zero, and few numbers have a point."""
    a, b = _number(rng), _number(rng)
    if sign == "/":
        a, b = (a % 100 or 1, b % 100 or 1) if rng.random() < 0.8 else (a, rng.choice((2, 3, 4, 5, 8, 10)))
        a *= b if b > 10 or rng.random() < 0.8 else 1
    elif sign == "-" and rng.random() < 0.8:
        a, b = max(a, b), min(a, b)
    return (f"{a}.{rng.randint(1, 9)}" if rng.random() < 0.04 else str(a)), str(b)


def _problem(rng: random.Random) -> tuple[str, str, str]:
    """A question, its expression in plain signs, and the operands that it is split by."""
    sign = rng.choice("+-*/")
    a, b = _operands(rng, sign)
    kind, form = rng.random(), ""
    if kind < 0.07:
        form = rng.choice(_LONG)
        template = rng.choice(_ASKED).format(form)
    elif kind < 0.42:
        template = rng.choice(_ASKED).format(rng.choice(_BARE[:2]))
    elif kind < 0.52:
        template = rng.choice(_BARE)
    elif kind < 0.79:
        template = rng.choice(_ASKED).format(rng.choice(_WORDS[sign]))
    elif kind < 0.90:
        template = rng.choice(_ORDERS[sign])
    else:
        template = rng.choice(_STORIES[sign])
    values = {"a": a, "b": b, "o": sign, "c": rng.randint(1, 99), "p": rng.choice("+-*")}
    question = template.format(who=rng.choice(_PEOPLE), things=rng.choice(_THINGS), **values)
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
        """Whether the calculator was called and the last number after its output is the right result."""
        truth = calculate(conversation["expression"])
        numbers = re.findall(r"(?<![\d)])-?\d+(?:\.\d+)?", after_tools(completion).replace(",", ""))
        called = "<|python_start|>" in completion and "<|output_end|>" in completion
        return called and bool(numbers) and Fraction(numbers[-1]) == Fraction(truth)
