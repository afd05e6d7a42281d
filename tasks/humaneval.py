"""HumanEval: Python functions to complete, judged by running their tests (arXiv:2107.03374)."""

import re
import textwrap
from pathlib import Path
from typing import Any

from tasks.common import Conversation, single_turn
from tasks.parquet import ParquetTask

_FENCE = re.compile(r"^[ \t]*```[^\n`]*\n(.*?)(?:^[ \t]*```|\Z)", re.DOTALL | re.MULTILINE)


def _definition(name: str, code: str) -> re.Match[str] | None:
    return re.search(rf"^def {re.escape(name)}\b", code, re.MULTILINE)


def program(prompt: str, entry_point: str, completion: str) -> str:
    """The program that a completion makes of a prompt, which ends with the head of function `entry_point`.

    The code is the fenced block that defines the function, else the first block, else all of the completion. Where it
    defines the function, the imports and helpers before it in the prompt are kept; else it is the function's body.
    """
    blocks = _FENCE.findall(completion) or [completion]
    code = next((block for block in blocks if _definition(entry_point, block)), blocks[0])
    head = _definition(entry_point, prompt)
    if head and _definition(entry_point, code):
        return prompt[: head.start()] + code
    return prompt + (code if code.lstrip("\n")[:1].isspace() else textwrap.indent(code, "    "))


class HumanEval(ParquetTask):
    """A function's head and description, to be completed.

    Raises ValueError where this machine cannot isolate the programs well enough, unless they may run `unsafe`.
    """

    name = "humaneval"
    repo, config, licence = "openai/openai_humaneval", "openai_humaneval", "MIT"
    splits = ("test",)
    columns = ("prompt", "canonical_solution", "test", "entry_point")

    def __init__(self, split: str, tasks_dir: Path | str | None = None, unsafe: bool = False) -> None:
        from nanochat import execution

        execution.require_isolation(unsafe)
        self.unsafe = unsafe
        super().__init__(split, tasks_dir)

    def conversation(self, row: dict[str, Any]) -> Conversation:
        prompt, entry_point = row["prompt"], row["entry_point"]
        if not _definition(entry_point, prompt):
            raise ValueError(f"the prompt does not define {entry_point}")
        fenced = [f"```python\n{code.rstrip()}\n```" for code in (prompt, prompt + row["canonical_solution"])]
        tests = f"{row['test']}\ncheck({entry_point})"
        question = f"Complete this Python function.\n{fenced[0]}"
        return single_turn(question, fenced[1], prompt=prompt, entry_point=entry_point, test=tests)

    def evaluate(self, conversation: Conversation, completion: str) -> bool:
        """Return whether the completed function passes its tests."""
        from nanochat import execution

        prompt, entry_point = conversation["prompt"], conversation["entry_point"]
        result = execution.check(
            program=program(prompt, entry_point, completion),
            entry_point=entry_point,
            test=conversation["test"],
            prelude=prompt[: _definition(entry_point, prompt).start()],
            unsafe=self.unsafe,
        )
        return result.passed
