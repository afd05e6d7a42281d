"""Rows of values as a Markdown table, as reports and benchmarks print them."""

from collections.abc import Sequence
from typing import Any

NOT_RUN = "not run"


def to_text(value: Any) -> str:
    """Format a cell: floats to five digits, integers with commas, a dash for None."""
    if value is None:
        return "–"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1e5 else f"{value:.5g}"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    if isinstance(value, dict):
        return ", ".join(f"{key} {to_text(item)}" for key, item in value.items())
    return " ".join(str(value).split()).replace("|", "\\|")  # a bar or a new line would end the cell


def to_table(rows: Sequence[dict[str, Any]]) -> str:
    """Return a Markdown table of rows, each a dict by column name; "not run" if there are none.

    The keys of the first row are the columns. All but the first column are aligned right.
    """
    if not rows:
        return NOT_RUN
    header = list(rows[0])
    lines = [header, ["---"] + ["---:"] * (len(header) - 1)]
    lines += [[to_text(row[name]) for name in header] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
