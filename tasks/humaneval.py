"""HumanEval: Python functions to complete, judged by running their tests (arXiv:2107.03374).

    prompt      def add(a, b):
                    "Return the sum."
    completion  ```python
                    return a + b
                ```

The completion is put together with the prompt to a program, which runs isolated (see nanochat/execution.py).
"""

import re
import textwrap
from pathlib import Path
from typing import Any

from nanochat import execution
from tasks.common import Conversation, single_turn
from tasks.parquet import ParquetTask


class HumanEval(ParquetTask):
    """A function's head and description, to be completed.

    Raises ValueError if this machine cannot isolate the programs well enough, unless they may run `unsafe`.
    """

    name = "humaneval"
    repo = "openai/openai_humaneval"
    config = "openai_humaneval"
    licence = "MIT"
    splits = ("test",)
    columns = ("prompt", "canonical_solution", "test", "entry_point")

    def __init__(self, split: str, tasks_dir: Path | str | None = None, unsafe: bool = False) -> None:
        execution.require_isolation(unsafe)
        self.unsafe = unsafe
        super().__init__(split, tasks_dir)

    def conversation(self, row: dict[str, Any]) -> Conversation:
        prompt = row["prompt"]
        entry_point = row["entry_point"]
        if not _definition(entry_point, prompt):
            raise ValueError(f"the prompt does not define {entry_point}")
        solution = prompt + row["canonical_solution"]
        return single_turn(
            f"Complete this Python function.\n```python\n{prompt.rstrip()}\n```",
            f"```python\n{solution.rstrip()}\n```",
            prompt=prompt,
            entry_point=entry_point,
            test=f"{row['test']}\ncheck({entry_point})",
        )

    def evaluate(self, conversation: Conversation, completion: str) -> bool:
        """Return True if the completed function passes its tests."""
        prompt = conversation["prompt"]
        entry_point = conversation["entry_point"]
        result = execution.check(
            program=program(prompt, entry_point, completion),
            entry_point=entry_point,
            test=conversation["test"],
            prelude=prompt[: _definition(entry_point, prompt).start()],  # the imports and helpers before it
            unsafe=self.unsafe,
        )
        return result.passed


def program(prompt: str, entry_point: str, completion: str) -> str:
    """Return the program that a completion makes of a prompt, which ends with the head of function `entry_point`.

    The code is the fenced block that defines the function, else the first block, else all of the completion. If it
    defines the function, the imports and helpers before it in the prompt are kept; else it is the function's body.
    """
    blocks = fenced_blocks(completion) or [completion]
    head = _definition(entry_point, prompt)
    for code in (*blocks, *map(textwrap.dedent, blocks)):
        if head and _definition(entry_point, code):
            return prompt[: head.start()] + code
    code = blocks[0]
    is_indented = code.lstrip("\n")[:1].isspace()
    return prompt + (code if is_indented else textwrap.indent(code, "    "))


# Three or more ` or ~, perhaps in a list. A block that is never closed ends with the text.
FENCE = re.compile(
    r"^(?P<before>[ \t]*(?:(?:[-*+]|\d+[.)])[ \t]+)?)(?P<mark>`{3,}|~{3,})[^\n`]*\n"
    r"(?P<code>.*?)(?:^[ \t]*(?P=mark)|\Z)",
    re.DOTALL | re.MULTILINE,
)


def fenced_blocks(text: str) -> list[str]:
    """Return the code blocks of a Markdown text. Where a fence is indented, as in a list, so is its code."""
    blocks = []
    for fence in FENCE.finditer(text):
        code = fence["code"]
        indent = re.sub(r"\S", " ", fence["before"])
        if indent and code.startswith(indent):
            code = re.sub(f"^{indent}", "", code, flags=re.MULTILINE)
        blocks.append(code)
    return blocks


def _definition(name: str, code: str) -> re.Match[str] | None:
    """Find the line that defines function `name` at the top level of `code`."""
    return re.search(rf"^def {re.escape(name)}\b", code, re.MULTILINE)
