"""The calculator that the model may call between <|python_start|> and <|python_end|>: arithmetic and letter counts.

    calculate("12*3") -> "36"      calculate("'strawberry'.count('r')") -> "3"

A model writes these expressions, so nothing is ever run: `ast.parse` only reads the text, `_evaluate` matches the few
kinds of nodes that are allowed, and everything else is refused. Numbers are exact fractions (0.1 + 0.2 is 0.3). The
cost is bounded by the four limits below instead of a timer, so the calculator works in any thread.
"""

import ast
import decimal
import re
from fractions import Fraction

MAX_LENGTH = 1000  # characters of an expression
MAX_DEPTH = 32  # nested parentheses, signs or powers
MAX_DIGITS = 100  # digits of the numerator and the denominator of every intermediate value
PRECISION = 10  # significant digits after the decimal point; the digits before it are exact

# Thousands commas count only where they are well-formed: 1,234 is a number, 12,34 is refused (Python sees a tuple).
_COMMA_NUMBER = r"[1-9][0-9]{0,2}(?:,[0-9]{3})+(?:\.[0-9]+)?(?![0-9,])"
_NUMBER = r"[0-9]+(?:\.[0-9]+)?|\.[0-9]+"
_STRING = r"'[^'\\\n]*'|\"[^\"\\\n]*\""
_LITERAL = re.compile(f"(?P<string>{_STRING})|{_COMMA_NUMBER}|{_NUMBER}")
# All that may stand outside of strings. No letter but those of two names: Python's parser never sees 1e5, 0x10 or an
# f-string, and warns about nothing.
_ALLOWED = re.compile(r"(?:len|count|[-+*/%().,0-9 \t])*")


class _Refused(Exception):
    """The expression is not allowed, or costs too much."""


def calculate(expression: str) -> str | None:
    """Return the value of `expression` as text, or None if it is refused or divides by zero. Never raises.

    Whole results have no decimal point; others have at most 10 significant digits after it.
    """
    try:
        source = _normalize(expression.strip())
        tree = ast.parse(source, mode="eval")
        return _format(_evaluate(tree.body, source.encode(), depth=1))
    except (_Refused, SyntaxError, ValueError, ArithmeticError, RecursionError, MemoryError):
        # ValueError: lone surrogates. RecursionError and MemoryError are how Python's parser reports deep nesting.
        return None


def _normalize(text: str) -> str:
    """Refuse what Python's parser should not see, and write numbers as Python does: 1,234 -> 1234, 07 -> 7."""
    if len(text) > MAX_LENGTH:
        raise _Refused
    outside = re.sub(_STRING, "", text)
    if not _ALLOWED.fullmatch(outside):
        raise _Refused
    # The tree keeps no parentheses, so their nesting is bounded here.
    depth = 0
    for character in outside:
        depth += (character == "(") - (character == ")")
        if depth > MAX_DEPTH:
            raise _Refused

    def rewrite(match: re.Match[str]) -> str:
        if match["string"]:
            return match[0]
        return match[0].replace(",", "").lstrip("0") or "0"

    return _LITERAL.sub(rewrite, text)


def _evaluate(node: ast.expr, source: bytes, depth: int) -> Fraction:
    """Return the value of a node; raises _Refused for any node that is not arithmetic, a count or a length."""
    if depth > MAX_DEPTH:
        raise _Refused
    # 1+2+3 is ((1+2)+3) in the tree. The left side is followed in a loop, so that only true nesting counts as depth.
    operations = []
    while isinstance(node, ast.BinOp):
        operations.append(node)
        node = node.left
    match node:
        case ast.Constant(value=int() | float()):
            # From the source, since 0.1 as a float is no longer one tenth. Refuses what only Python calls a number: 7.
            value = Fraction(_literal(node, source, _NUMBER))
        case ast.UnaryOp(op=ast.UAdd()):
            value = _evaluate(node.operand, source, depth + 1)
        case ast.UnaryOp(op=ast.USub()):
            value = -_evaluate(node.operand, source, depth + 1)
        case ast.Call(func=ast.Name(id="len"), args=[ast.Constant(value=str()) as word], keywords=[]):
            value = Fraction(len(_text(word, source)))
        case ast.Call(
            func=ast.Attribute(value=ast.Constant(value=str()) as word, attr="count"),
            args=[ast.Constant(value=str()) as part],
            keywords=[],
        ):
            value = Fraction(_text(word, source).count(_text(part, source)))
        case _:
            raise _Refused
    value = _bounded(value)
    for operation in reversed(operations):
        other = _evaluate(operation.right, source, depth + 1)
        value = _bounded(_apply(operation.op, value, other))
    return value


def _apply(operator: ast.operator, left: Fraction, right: Fraction) -> Fraction:
    match operator:
        case ast.Add():
            return left + right
        case ast.Sub():
            return left - right
        case ast.Mult():
            return left * right
        case ast.Div():
            return left / right
        case ast.FloorDiv():
            return Fraction(left // right)
        case ast.Mod():
            return left % right
        case ast.Pow():
            return _power(left, right)
    raise _Refused


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


def _literal(node: ast.Constant, source: bytes, pattern: str) -> str:
    """Return the literal as it was written; raises _Refused if Python allows the form and the calculator does not."""
    text = source[node.col_offset : node.end_col_offset].decode()
    if not re.fullmatch(pattern, text):
        raise _Refused
    return text


def _text(node: ast.Constant, source: bytes) -> str:
    return _literal(node, source, _STRING)[1:-1]


def _bounded(value: Fraction) -> Fraction:
    if max(abs(value.numerator), value.denominator) >= 10**MAX_DIGITS:
        raise _Refused
    return value


def _format(value: Fraction) -> str:
    """Return plain decimal notation without trailing zeros and without an exponent."""
    if value.denominator == 1:
        return str(value.numerator)
    digits_before_point = len(str(abs(int(value)))) if abs(value) >= 1 else 0
    context = decimal.Context(prec=digits_before_point + PRECISION)
    quotient = context.divide(decimal.Decimal(value.numerator), decimal.Decimal(value.denominator))
    return format(quotient.normalize(context), "f")
