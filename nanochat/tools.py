"""The calculator that the model may call between <|python_start|> and <|python_end|>: arithmetic and letter counts.

    calculate("12*3") -> "36"      calculate("'strawberry'.count('r')") -> "3"      calculate("exit()") -> None

A model writes these expressions, so nothing is ever run: `ast.parse` only reads the text, `_evaluate` matches the few
kinds of nodes that are allowed, and everything else is refused. Numbers are exact fractions (0.1 + 0.2 is 0.3), which
Python's parser has not: it sees their places in a list instead, `1,234*0.5` as `(0)*(1)`. The cost is bounded by the
four limits below instead of a timer, so the calculator works in any thread.
"""

import ast
import decimal
import operator
import re
from fractions import Fraction
from typing import Any

MAX_LENGTH = 1000  # characters of an expression
MAX_DEPTH = 32  # nested parentheses, signs or powers
MAX_DIGITS = 100  # digits of the numerator and the denominator of every intermediate value
PRECISION = 10  # significant digits after the decimal point; the digits before it are exact

STRING = r"'[^'\\\n]*'|\"[^\"\\\n]*\""
# Thousands commas count only where they are well-formed: 1,234 is a number, 12,34 is refused (Python sees a tuple).
NUMBER = r"[1-9][0-9]{0,2}(?:,[0-9]{3})+(?:\.[0-9]+)?(?![0-9,])|[0-9]+(?:\.[0-9]+)?|\.[0-9]+"
# All that may stand outside of strings: no letter but those of two names.
ALLOWED = r"(?:len|count|[-+*/%().,0-9 \t])*"


class Calculator:
    """Watches sampled tokens for expressions between the calculator's marks, and answers them in tokens.

    The model then reads the result as if it had written it. Where a tokenizer lacks the marks, nothing is calculated.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._marks = {
            name: tokenizer.special_tokens.get(name)
            for name in ("<|python_start|>", "<|python_end|>", "<|output_start|>", "<|output_end|>")
        }

    def feed(self, request: Any, token: int) -> list[int]:
        """Collect the expression that a request's tokens open; at its end return the result, if it is valid."""
        if token == self._marks["<|python_start|>"]:
            request.expression = []
        elif request.expression is not None and token == self._marks["<|python_end|>"]:
            result = calculate(self._tokenizer.decode(request.expression))
            request.expression = None
            if result is not None:
                return [
                    self._marks["<|output_start|>"],
                    *self._tokenizer.encode(result),
                    self._marks["<|output_end|>"],
                ]
        elif request.expression is not None:
            request.expression.append(token)
        return []


class _Refused(Exception):
    """The expression is not allowed, or costs too much."""


def calculate(expression: str) -> str | None:
    """Return the value of `expression` as text, or None if it is refused or divides by zero. Never raises.

    Whole results have no decimal point; others have at most 10 significant digits after it.
    """
    outside = re.sub(STRING, "", expression)
    # The tree has no parentheses any more, so their nesting is bounded here.
    depth = max_depth = 0
    for character in outside:
        depth += (character == "(") - (character == ")")
        max_depth = max(depth, max_depth)
    if len(expression) > MAX_LENGTH or max_depth > MAX_DEPTH or not re.fullmatch(ALLOWED, outside):
        return None
    numbers: list[Fraction] = []

    def place_of(match: re.Match[str]) -> str:
        if match["string"]:
            return match[0]
        numbers.append(Fraction(match[0].replace(",", "")))
        return f"({len(numbers) - 1})"

    source = re.sub(f"(?P<string>{STRING})|{NUMBER}", place_of, expression.strip())
    try:
        return _format(_evaluate(ast.parse(source, mode="eval").body, numbers, depth=1))
    except (_Refused, SyntaxError, ValueError, ArithmeticError, RecursionError, MemoryError):
        # ValueError: lone surrogates. RecursionError and MemoryError are how Python's parser reports deep nesting.
        return None


def _evaluate(node: ast.expr, numbers: list[Fraction], depth: int) -> Fraction:
    """Return the value of a node; raises _Refused for any node that is not arithmetic, a count or a length."""
    if depth > MAX_DEPTH:
        raise _Refused
    match node:
        case ast.Constant(value=int(place)):
            value = numbers[place]
        case ast.UnaryOp(op=ast.UAdd(), operand=operand):
            value = _evaluate(operand, numbers, depth + 1)
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            value = -_evaluate(operand, numbers, depth + 1)
        case ast.BinOp(left=left, op=op, right=right):
            # 1+2+3 is ((1+2)+3) in the tree, so only the right side counts as nesting.
            a = _evaluate(left, numbers, depth)
            b = _evaluate(right, numbers, depth + 1)
            value = Fraction(OPERATORS[type(op)](a, b))
        case ast.Call(func=ast.Name(id="len"), args=[ast.Constant(value=str(word))], keywords=[]):
            value = Fraction(len(word))
        case ast.Call(
            func=ast.Attribute(value=ast.Constant(value=str(word)), attr="count"),
            args=[ast.Constant(value=str(part))],
            keywords=[],
        ):
            value = Fraction(word.count(part))
        case _:
            raise _Refused
    if max(abs(value.numerator), value.denominator) >= 10**MAX_DIGITS:
        raise _Refused
    return value


def _power(base: Fraction, exponent: Fraction) -> Fraction:
    """Return base ** exponent: exact for whole exponents, through floats for roots."""
    if exponent.denominator > 1:
        if base < 0:  # the root is a complex number
            raise _Refused
        return Fraction(float(base) ** float(exponent))
    # Bounded before it is computed: |base| >= 2**(bits-1), and a result above 2**400 has more than 100 digits.
    bits = max(base.numerator.bit_length(), base.denominator.bit_length())
    if bits > 1 and (bits - 1) * abs(exponent) > 4 * MAX_DIGITS:
        raise _Refused
    return base ** int(exponent)


OPERATORS = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: _power,
}


def _format(value: Fraction) -> str:
    """Return plain decimal notation without trailing zeros and without an exponent."""
    if value.denominator == 1:
        return str(value.numerator)
    digits_before_point = len(str(abs(int(value)))) if abs(value) >= 1 else 0
    context = decimal.Context(prec=digits_before_point + PRECISION)
    quotient = context.divide(decimal.Decimal(value.numerator), decimal.Decimal(value.denominator))
    return format(quotient.normalize(context), "f")
