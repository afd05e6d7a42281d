"""GSM8K: grade-school word problems, worked out with the calculator (arXiv:2110.14168).

A published solution marks its calculations and ends in the result:

    She has 3 bags of 4 apples: 3*4=<<3*4=12>>12.
    #### 12

The marks become calls of the calculator with their outputs, so a model learns to leave the sums to its tool.
"""

import re
import unicodedata
from fractions import Fraction
from typing import Any

from nanochat.tools import calculate
from tasks.common import Conversation, after_tools, single_turn
from tasks.parquet import ParquetTask


class GSM8K(ParquetTask):
    """A word problem and its worked solution. An answer is right if it ends in the right number."""

    name = "gsm8k"
    repo = "openai/gsm8k"
    config = "main"
    licence = "MIT"
    columns = ("question", "answer")

    def conversation(self, row: dict[str, Any]) -> Conversation:
        result = final_number(row["answer"])
        if result is None:
            raise ValueError("the answer has no number after ####")
        return single_turn(row["question"], solution_parts(row["answer"]), result=str(result))

    def evaluate(self, conversation: Conversation, completion: str) -> bool:
        """Return True if the number after the first `####` is the reference's."""
        return final_number(completion) == Fraction(conversation["result"])


def solution_parts(solution: str) -> list[dict[str, str]]:
    """Return a reference solution as parts, its marks `<<3*4=12>>` as calls of the calculator and their outputs.

    A mark that our calculator would answer otherwise is left out: the number stands in the text behind it anyway.
    """
    parts: list[dict[str, str]] = []
    text = ""
    for i, piece in enumerate(re.split(r"<<([^<>]*)>>", solution)):
        if i % 2 == 0:  # split gives text and marks in turn
            text += piece
            continue
        expression, _, stated = piece.rpartition("=")
        value = calculate(expression)
        if value is not None and Fraction(value) == _first_number(stated):
            if text:
                parts.append({"type": "text", "text": text})
            parts.append({"type": "python", "text": expression})
            parts.append({"type": "python_output", "text": value})
            text = ""
    if text:
        parts.append({"type": "text", "text": text})
    return parts


def final_number(text: str) -> Fraction | None:
    """Return the number on the line after a `####`; None where there is no mark or no number.

    The first one counts, as in other graders: a model that does not stop goes on with a problem and an answer of its
    own. Lines that begin with a number come before headings such as `#### Step 1`.
    """
    _, *tails = text.split("####")
    lines = [after_tools(tail.strip().partition("\n")[0]).strip() for tail in tails]
    for line in sorted(lines, key=lambda line: re.match(r"\W*\d", line) is None):
        number = _first_number(line)
        if number is not None:
            return number
    return None


# A minus may stand before, apart from, or after the sign of a currency, which `_plain` removes.
NUMBER = re.compile(
    r"(?P<minus>-?)\s{0,9}"
    r"(?:(?P<over>\d+)\s*/\s*(?P<under>0*[1-9]\d*)"  # 3/4
    r"|(?P<decimal>\d*\.?\d+)"  # 18 or 1234.50 or .5
    r"(?:(?:e|\s*(?:[x×*]|times)\s*10(?:\^|\*\*))(?P<exponent>[-+]?\d+)"  # 1e3 or 1.5 x 10^3
    r"|\s+(?:and\s+)?(?P<part>\d+)\s*/\s*(?P<whole>0*[1-9]\d*))?)",  # 2 1/2
    re.IGNORECASE,
)
FRACTION_SIGN = re.compile("[¼-¾⅐-⅞]")


def _first_number(text: str) -> Fraction | None:
    """Return the first number of a text, such as -5, $1,234.50, 3/4, 2 1/2, 1e3 or .5; None if there is none."""
    found = NUMBER.search(_plain(text[:200]))
    if not found or len(found[0]) > 100 or len(found["exponent"] or "") > 3:  # no answer is so long
        return None
    if found["over"]:
        value = Fraction(int(found["over"]), int(found["under"]))
    else:
        value = Fraction(found["decimal"]) * Fraction(10) ** int(found["exponent"] or 0)
    if found["part"]:
        value += Fraction(int(found["part"]), int(found["whole"]))
    return -value if found["minus"] else value


def _plain(text: str) -> str:
    """Return a text with its numbers as Python would write them: 8{,}000 and 8 000 are 8000, \\frac{1}{2} is 1/2."""
    text = re.sub("[\N{MINUS SIGN}\N{EN DASH}]", "-", text)
    text = re.sub(r"\\[dt]?frac(?:(\d)(\d)|\{(\d+)\}\{(\d+)\})", r" \1\3/\2\4", text)  # \frac12 is 1/2, too
    text = FRACTION_SIGN.sub(lambda sign: " " + unicodedata.normalize("NFKC", sign[0]).replace("\u2044", "/"), text)
    text = re.sub(r"\\[,:;! ]|[\\{}$€£¥₹]", "", text)
    text = re.sub(r"(?<=\d)[,_'\u00a0\u2009\u202f](?=\d)", "", text)
    # Spaces between thousands count if nothing follows: "5 100-dollar bills" are five.
    return re.sub(r"(?<!\d)\d{1,3}(?: \d{3})+(?=[.%\s]*$)", lambda number: number[0].replace(" ", ""), text)
