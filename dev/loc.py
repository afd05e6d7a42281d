"""Lines of each folder, and whether nanochat, scripts and tasks keep to their budget."""

import ast
import io
import tokenize
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from dev.bench import markdown_table
from nanochat import cli

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("nanochat", "scripts", "tasks", "dev", "tests")
BUDGETED, BUDGET = FOLDERS[:3], 9_000


@dataclass(frozen=True)
class Config:
    """Flags."""

    files: bool = cli.option(False, "a line for each file, too")


def count(source: str) -> Counter[str]:
    """Lines of Python `source` by kind: code, text (docstrings and lines that hold only a comment), blank; and their
    sum, lines."""
    lines = source.splitlines()
    text: set[int] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and ast.get_docstring(
            node
        ):
            text |= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT and token.line.lstrip().startswith("#"):
            text.add(token.start[0])
    blank = {number for number, line in enumerate(lines, 1) if not line.strip()} - text
    kinds = {"code": len(lines) - len(text) - len(blank), "text": len(text), "blank": len(blank), "lines": len(lines)}
    return Counter(kinds)


def main() -> None:
    config = cli.parse(Config, description=__doc__)
    rows, budgeted = [], 0
    for folder in FOLDERS:
        paths = sorted((ROOT / folder).glob("*.py"))
        counts = {path: count(path.read_text(encoding="utf-8")) for path in paths}
        if config.files:
            rows += [{"": str(path.relative_to(ROOT)), "files": 1, **counts[path]} for path in paths]
        whole = sum(counts.values(), Counter(code=0, text=0, blank=0, lines=0))
        rows.append({"": f"{folder}/", "files": len(paths), **{kind: whole[kind] for kind in counts[paths[0]]}})
        budgeted += whole["lines"] if folder in BUDGETED else 0
    print(markdown_table(rows))
    print(f"{' + '.join(BUDGETED)}: {budgeted:,} of {BUDGET:,} lines")
    if budgeted > BUDGET:
        raise ValueError(f"{budgeted - BUDGET:,} lines above the budget: delete some")


if __name__ == "__main__":
    cli.run(main)
