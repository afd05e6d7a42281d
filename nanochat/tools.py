"""The calculator the model may call: arithmetic and letter counts, read by a grammar of its own.

    sum     = product (("+" | "-") product)*
    product = unary (("*" | "/" | "//" | "%") unary)*
    unary   = ("+" | "-") unary | atom ("**" unary)?
    atom    = NUMBER | "(" sum ")" | STRING "." "count" "(" STRING ")" | "len" "(" STRING ")"

Precedence is Python's. Numbers are exact fractions. No `eval`, no signals: it works in any thread, and its cost is
bounded by the length, nesting and number of digits below.
"""

import decimal
import re
from fractions import Fraction
from operator import mod, mul, truediv

MAX_LENGTH = 1000  # characters of an expression
MAX_DEPTH = 32  # parentheses and signs inside each other
MAX_DIGITS = 100  # of numerator and denominator of every intermediate value
PRECISION = 10  # significant digits after the point; the digits before it are exact

# Thousands commas count only where well-formed: 1,234 is a number and 12,34 is an error.
_TOKEN = re.compile(
    r"""[ \t]*(?:
        (?P<number> [1-9][0-9]{0,2}(?:,[0-9]{3})+(?:\.[0-9]+)? | [0-9]+(?:\.[0-9]+)? | \.[0-9]+ )
      | (?P<string> "[^"\\\n]*" | '[^'\\\n]*' )
      | (?P<symbol> \*\* | // | [-+*/%().] | len\b | count\b )
    )[ \t]*""",
    re.VERBOSE,
)


class _Invalid(Exception):
    """Not an expression of the grammar, or too costly."""


def calculate(expression: str) -> str | None:
    """The value of `expression` as text, e.g. "12*3" -> "36", "'strawberry'.count('r')" -> "3".

    Whole results have no point, others 10 significant digits after it. None when the expression is not of the
    grammar, divides by zero or is too costly; never raises.
    """
    try:
        parser = _Parser(_tokenize(expression.strip()))
        value = parser.sum()
        parser.expect("end")
        return _format(value)
    except (_Invalid, ZeroDivisionError, OverflowError):
        return None


def _tokenize(text: str) -> list[tuple[str, str]]:
    """(kind, text) pairs, ended by ("end", ""); a symbol is its own kind."""
    if len(text) > MAX_LENGTH:
        raise _Invalid
    tokens, position = list[tuple[str, str]](), 0
    while position < len(text):
        if (match := _TOKEN.match(text, position)) is None:
            raise _Invalid
        kind, word = (name := str(match.lastgroup)), match[name]
        tokens.append((word if kind == "symbol" else kind, word))
        position = match.end()
    return [*tokens, ("end", "")]


class _Parser:
    """Recursive descent: one method a rule, each returning its value."""

    def __init__(self, tokens: list[tuple[str, str]]) -> None:
        self.tokens, self.position, self.depth = tokens, 0, 0

    def accept(self, *kinds: str) -> str | None:
        """Step over the next token if it is of one of `kinds`, and return its text."""
        kind, text = self.tokens[self.position]
        if kind not in kinds:
            return None
        self.position += 1
        return text

    def expect(self, *kinds: str) -> str:
        text = self.accept(*kinds)
        if text is None:
            raise _Invalid
        return text

    def sum(self) -> Fraction:
        value = self.product()
        while operator := self.accept("+", "-"):
            other = self.product()
            value = _bounded(value + other if operator == "+" else value - other)
        return value

    def product(self) -> Fraction:
        value = self.unary()
        while operator := self.accept("*", "/", "//", "%"):
            value = _bounded(_PRODUCTS[operator](value, self.unary()))
        return value

    def unary(self) -> Fraction:
        self.depth += 1  # every recursion of the grammar comes through here
        if self.depth > MAX_DEPTH:
            raise _Invalid
        if sign := self.accept("+", "-"):
            value = self.unary() if sign == "+" else -self.unary()
        else:
            value = self.atom()
            if self.accept("**"):
                value = _power(value, self.unary())
        self.depth -= 1
        return value

    def atom(self) -> Fraction:
        if number := self.accept("number"):
            return _bounded(Fraction(number.replace(",", "")))
        if self.accept("("):
            value = self.sum()
            self.expect(")")
            return value
        if self.accept("len"):
            return Fraction(len(self.string_argument()))
        text = self.expect("string")[1:-1]
        self.expect(".")
        self.expect("count")
        return Fraction(text.count(self.string_argument()))

    def string_argument(self) -> str:
        self.expect("(")
        text = self.expect("string")[1:-1]
        self.expect(")")
        return text


_PRODUCTS = {"*": mul, "/": truediv, "//": lambda a, b: Fraction(a // b), "%": mod}


def _bounded(value: Fraction) -> Fraction:
    if max(abs(value.numerator), value.denominator) >= 10**MAX_DIGITS:
        raise _Invalid
    return value


def _power(base: Fraction, exponent: Fraction) -> Fraction:
    """base ** exponent: exact for whole exponents, through floats for roots; bounded before it is computed."""
    if exponent.denominator > 1:
        if base < 0:
            raise _Invalid
        return _bounded(Fraction(float(base) ** float(exponent)))
    bits = max(base.numerator.bit_length(), base.denominator.bit_length())
    if bits > 1 and (bits - 1) * abs(exponent) > 4 * MAX_DIGITS:  # |base| >= 2**(bits-1), and 16**100 > 10**100
        raise _Invalid
    return _bounded(base ** int(exponent))


def _format(value: Fraction) -> str:
    """Plain decimal notation without trailing zeros."""
    if value.denominator == 1:
        return str(value.numerator)
    before_point = len(str(abs(int(value)))) if abs(value) >= 1 else 0
    context = decimal.Context(prec=before_point + PRECISION)
    quotient = context.divide(decimal.Decimal(value.numerator), decimal.Decimal(value.denominator))
    return format(quotient.normalize(context), "f")
