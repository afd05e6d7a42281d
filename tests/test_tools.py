"""Oracle: Python's own parser and exact fractions (`eval` in tests only); closed answers; fuzzing for the bounds."""

import re
import threading
import time
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanochat.tools import MAX_DEPTH, MAX_DIGITS, MAX_LENGTH, calculate


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("37*48", "1776"),
        (" 2 + 3 * 4 ", "14"),
        ("(2+3)*4", "20"),
        ("4/2", "2"),
        ("7/2", "3.5"),
        ("1/3", "0.3333333333"),
        ("-2/3", "-0.6666666667"),
        ("10**30/7", "142857142857142857142857142857.1428571429"),
        ("1/10**12", "0.000000000001"),
        ("0.1+0.2", "0.3"),
        ("1.50", "1.5"),
        (".5*2", "1"),
        ("2**10", "1024"),
        ("2**-2", "0.25"),
        ("9**0.5", "3"),
        ("2**0.5", "1.4142135624"),
        ("-2**2", "-4"),
        ("2**3**2", "512"),
        ("2**-1**2", "0.5"),
        ("--3", "3"),
        ("-7//2", "-4"),
        ("-7%3", "2"),
        ("5.5 % 2", "1.5"),
        ("1,234+1", "1235"),
        ("1,234,567.5*2", "2469135"),
        ("(-1)**99999999999", "-1"),
        ("0**0", "1"),
        ("'strawberry'.count('r')", "3"),
        ('"strawberry".count("r")', "3"),
        ("'a,b,c'.count(',')", "2"),
        ('"to be or not".count(" ")', "3"),
        ("'it is \"so\"'.count('\"')", "2"),
        ("'banana'.count('ana')", "1"),
        ("'ab'.count('')", "3"),
        ("'日本日'.count('日')", "2"),
        ("'a+b'.count('+') * 2 + len('abc')", "5"),
        ("len('1,234')", "5"),
    ],
)
def test_values(expression, value):
    assert calculate(expression) == value


@pytest.mark.parametrize(
    "expression",
    [
        *(
            "",
            " ",
            "hello",
            "2+",
            "*2",
            "2 3",
            "(2",
            "2)",
            "()",
            "1/0",
            "1//0",
            "1%0",
            "0**-1",
            "(-8)**0.5",
            "1..2",
            "7.",
        ),
        *("1,23", "12,34", "1,2345", "1,234,5", ",123", "0,123", "1e5", "0x10", "1_000", "2(3)", "3!", "5%", "٣+١"),
        *("'a'", "'a'+'b'", "'a'*3", "'ab'.upper()", "'a'.zfill(99999999)", "'a'.count('a', 1)", "'a'.count(1)"),
        *("'a'.count", "'a.count('a')", "'a\\'b'.count('b')", "'a\n'.count('a')", "len(3)", "len", "lenx('a')"),
        *("abs(1)", "__import__('os').system('true')", "().__class__", "x=1", "1;2", "1\n+2", "1<2", "lambda: 1"),
    ],
)
def test_anything_else_is_none(expression):
    assert calculate(expression) is None


@pytest.mark.parametrize(
    "expression",
    [
        *(
            "9**9**9",
            "2**99999999999",
            "7**3000000",
            "1.5**3000000",
            "10**100",
            "9**99999999.5",
            "0.5**1000",
            "(1/3)**9999",
            "10**-100",
            "10**99*10",
        ),
        "9" * (MAX_DIGITS + 1),
        "*".join(["99999"] * 100),
        "1" + "+1" * MAX_LENGTH,
        "(" * 100 + "1" + ")" * 100,
        "-" * 200 + "1",
        "2**" * 200 + "1",
        "(" * 100_000,
    ],
)
def test_costly_expressions_are_refused_at_once(expression):
    start = time.process_time()
    assert calculate(expression) is None
    assert time.process_time() - start < 0.2


def test_bounds_are_reached():
    assert calculate(f"10**{MAX_DIGITS - 1}") == "1" + "0" * (MAX_DIGITS - 1)
    depth = MAX_DEPTH - 1
    assert calculate("(" * depth + "1" + ")" * depth) == "1"
    assert calculate("+".join(["1"] * 500)) == "500"


def test_works_off_the_main_thread():
    results = []
    thread = threading.Thread(target=lambda: results.append(calculate("6*7")))
    thread.start()
    thread.join()
    assert results == ["42"]


# Six numbers of at most 100.00 squared stay within MAX_DIGITS, whatever is done to them.
numbers = st.one_of(
    st.integers(0, 100).map(str), st.decimals(0, 100, places=2, allow_nan=False, allow_infinity=False).map(str)
)
leaves = st.one_of(numbers, numbers.map("{}**2".format), st.sampled_from(["2**-3", "2**3**2", "-2**2", "1,000"]))
operators = st.sampled_from([" + ", "-", "*", "/", " // ", "%"])
expressions = st.recursive(
    leaves,
    lambda inner: st.one_of(
        st.tuples(inner, operators, inner).map("".join), inner.map("({})".format), inner.map("-{}".format)
    ),
    max_leaves=6,
)


def python_value(expression: str) -> Fraction | None:
    """Python's value with every literal an exact fraction; None where it divides by zero."""
    exact = re.sub(r"[\d.]+", lambda number: f"Fraction('{number[0]}')", expression.replace(",", ""))
    try:
        return Fraction(eval(exact, {"Fraction": Fraction}))
    except ZeroDivisionError:
        return None


@settings(max_examples=300, deadline=None)
@given(expressions)
def test_arithmetic_equals_python(expression):
    expected, result = python_value(expression), calculate(expression)
    if expected is None or expected.denominator == 1:
        assert result == (None if expected is None else str(expected.numerator))
    else:  # half a unit of the last of ten digits
        error = abs(Fraction(result) - expected)
        assert error * 2 <= (Fraction(1, 10**10) if abs(expected) >= 1 else abs(expected) / 10**9)
        assert re.fullmatch(r"-?\d+(\.\d*[1-9])?", result)


quoted = st.text(st.characters(codec="utf-8", exclude_characters="\\\n\"'", exclude_categories=["Cc"]), max_size=20)


@settings(max_examples=100, deadline=None)
@given(quoted, st.one_of(quoted, st.sampled_from(["a", ",", " "])), st.sampled_from("'\""), st.sampled_from("'\""))
def test_counts_equal_python(word, letter, a, b):
    expression = f"{a}{word}{a}.count({b}{letter}{b})"
    assert calculate(expression) == str(eval(expression))


@settings(max_examples=500, deadline=None)
@given(
    st.one_of(
        st.text(st.characters(exclude_categories=()), max_size=200),
        st.text("0123456789+-*/%()., '\"rcountle", max_size=60),
        st.lists(st.sampled_from(["9**", "(", ")", "-", "99", "1/3", "*", "**", "'a'", ".count("])).map("".join),
    )
)
def test_never_raises_and_is_quick(text):
    start = time.process_time()
    result = calculate(text)
    assert result is None or (Fraction(result) is not None and len(result) <= 2 * MAX_DIGITS + 20)
    assert time.process_time() - start < 0.2
