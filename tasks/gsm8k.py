"""GSM8K: grade-school word problems, worked out with the calculator; the result follows `####` (arXiv:2110.14168)."""

import re
from fractions import Fraction
from typing import Any

from nanochat.tools import calculate
from tasks.common import Conversation, after_tools, single_turn
from tasks.parquet import ParquetTask

_NUMBER = re.compile(r"-?\s*(?:\d+\s*/\s*0*[1-9]\d*|\d*\.?\d+)")


def _number(text: str) -> Fraction | None:
    """The first number of a text: digits with or without commas, sign, point, currency, or as a fraction."""
    found = _NUMBER.search(re.sub("[,$€£]", "", text.replace("\N{MINUS SIGN}", "-")))
    return Fraction("".join(found[0].split())) if found and len(found[0]) <= 100 else None


def final_number(text: str) -> Fraction | None:
    """The number on the line after the last `####`; None where there is no mark or no number."""
    _, mark, tail = text.rpartition("####")
    return _number(after_tools(tail).strip().partition("\n")[0]) if mark else None


def solution_parts(solution: str) -> list[dict[str, str]]:
    """A reference solution with its marks `<<2*3=6>>` as calls of the calculator and their outputs.

    A mark that our calculator would answer otherwise is left out: the number stands in the text behind it anyway.
    """
    parts: list[dict[str, str]] = [{"type": "text", "text": ""}]
    for i, piece in enumerate(re.split(r"<<([^<>]*)>>", solution)):
        if i % 2 == 0 and parts[-1]["type"] == "text":
            parts[-1]["text"] += piece
        elif i % 2 == 0:
            parts.append({"type": "text", "text": piece})
        else:
            expression, _, stated = piece.rpartition("=")
            value = calculate(expression)
            if value is not None and Fraction(value) == _number(stated):
                parts += [{"type": "python", "text": expression}, {"type": "python_output", "text": value}]
    return [part for part in parts if part["text"]]


class GSM8K(ParquetTask):
    """A word problem and its worked solution. Right is what ends in the right number."""

    name = "gsm8k"
    repo, config, licence = "openai/gsm8k", "main", "MIT"
    columns = ("question", "answer")

    def conversation(self, row: dict[str, Any]) -> Conversation:
        result = final_number(row["answer"])
        if result is None:
            raise ValueError("the answer has no number after ####")
        return single_turn(row["question"], solution_parts(row["answer"]), result=str(result))

    def evaluate(self, conversation: Conversation, completion: str) -> bool:
        """Return whether the number after the last `####` is the reference's."""
        return final_number(completion) == Fraction(conversation["result"])
