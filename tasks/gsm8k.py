"""GSM8K: grade-school word problems, worked out with the calculator (arXiv:2110.14168).

A published solution marks its calculations and ends in the result:

    She has 3 bags of 4 apples: 3*4=<<3*4=12>>12.
    #### 12

The marks become calls of the calculator with their outputs, so a model learns to leave the sums to its tool.
"""

import re
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
        """Return True if the number after the last `####` is the reference's."""
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
    """Return the number on the line after the last `####`; None where there is no mark or no number."""
    _, mark, tail = text.rpartition("####")
    if not mark:
        return None
    line, _, _ = after_tools(tail).strip().partition("\n")
    return _first_number(line)


def _first_number(text: str) -> Fraction | None:
    """Return the first number of a text, such as -5, $1,234.50, 3/4 or .5; None if there is none."""
    plain = re.sub("[,$€£]", "", text.replace("\N{MINUS SIGN}", "-"))
    found = re.search(r"-?\s*(?:\d+\s*/\s*0*[1-9]\d*|\d*\.?\d+)", plain)
    if not found or len(found[0]) > 100:  # no answer is so long, and Fraction would take its time
        return None
    return Fraction("".join(found[0].split()))
