"""Compares the records that a run has left with what nanochat/record_fields.py says of them."""

import json
import re
from pathlib import Path
from typing import Any

from nanochat.record_fields import RECORDS


def listed_names(value: Any, listed: set[str], prefix: str = "") -> set[str]:
    """The names of a record's fields, as the page would list them: an object is opened if fields of it are listed."""
    if isinstance(value, list):
        return set().union(*(listed_names(item, listed, prefix) for item in value))
    names = set()
    for key, item in value.items():
        name = prefix + key
        if isinstance(item, dict) and any(each.startswith(f"{prefix}*.") for each in listed):
            name = f"{prefix}*"
        if any(each.startswith(f"{name}.") for each in listed):
            names |= listed_names(item, listed, f"{name}.")
        else:
            names.add(name)
    return names


def problem(record: dict[str, Any], fields: dict[str, str]) -> str:
    """What is on only one side; "" if nothing is."""
    listed = {name.removesuffix("?") for name in fields}
    required = {name for name in fields if not name.endswith("?")}
    # Of an empty list or object, the names of its fields are not to be seen.
    seen = listed_names(record, listed)
    empty = {key for key, value in record.items() if value in ([], {})}
    missing = {name for name in required - seen if not any(name.startswith(f"{key}.") for key in empty)}
    unknown = seen - listed
    return f"missing {sorted(missing)}, not listed {sorted(unknown)}" if missing or unknown else ""


def check_records(base_dir: Path) -> set[str]:
    """Check every record under `base_dir` and return the kinds that were there."""
    found = set()
    for path_name in dict.fromkeys(name.partition(":")[0] for name in RECORDS):
        kinds = {name: fields for name, fields in RECORDS.items() if name.partition(":")[0] == path_name}
        for path in base_dir.glob(re.sub(r"[A-Z]+", "*", path_name)):
            text = path.read_text(encoding="utf-8")
            for record in map(json.loads, text.splitlines() if path.suffix == ".jsonl" else [text]):
                problems = {name: problem(record, fields) for name, fields in kinds.items()}
                assert not all(problems.values()), f"{path}: {problems}"
                found |= {name for name, what in problems.items() if not what}
    return found
