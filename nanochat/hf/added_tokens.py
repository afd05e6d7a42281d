"""Tokens that were added to a vocabulary: which they are, and which of them are special.

Two files describe one tokenizer and need not agree. tokenizer.json has what the `tokenizers` package runs, and
tokenizer_config.json, or two files of older folders, what transformers adds to it on loading:

    tokenizer.json           added_tokens          the tokens, their ids, and whether each is special
    tokenizer_config.json    added_tokens_decoder  the same; some folders have tokens here alone
                             eos_token, ...        tokens that are special because they have a role
    added_tokens.json        older: names and ids
    special_tokens_map.json  older: roles

`add_described_tokens` makes what the package runs complete.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field

from nanochat.common import read_json
from nanochat.hf.open_model import OpenConfig

if TYPE_CHECKING:
    import tokenizers

LARGEST_ID = 1 << 22  # a file with larger ids would ask for tables of any size


class TokenEntry(OpenConfig):
    """An added token, as tokenizer_config.json describes it."""

    content: str = Field(min_length=1)
    lstrip: bool = False
    normalized: bool = True
    rstrip: bool = False
    single_word: bool = False
    special: bool = False


def read_object(path: Path) -> dict[str, Any]:
    """Return the JSON object in `path`, or an empty one where there is no such file."""
    values = read_json(path) if path.is_file() else {}
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold an object")
    return values


def add_described_tokens(backend: "tokenizers.Tokenizer", folder: Path, settings: dict[str, Any]) -> None:
    """Add the tokens that tokenizer.json lacks, and make special those that the other files call special.

    Raises ValueError, which names the file, for a wrong description, or one with another id than tokenizer.json's.
    """
    import tokenizers

    described: dict[int, tokenizers.AddedToken] = {}
    path = folder / "added_tokens.json"  # the oldest of these files: names and ids
    for name, i in read_object(path).items():
        described[_token_id(i, path)] = tokenizers.AddedToken(name, normalized=False)
    path = folder / "tokenizer_config.json"
    entries = settings.get("added_tokens_decoder") or {}
    if not isinstance(entries, dict):
        raise ValueError(f"{path}: added_tokens_decoder must be an object")
    for i, entry in entries.items():
        fields = TokenEntry.from_json(entry, f"{path}: added_tokens_decoder, {i:.20}")
        described[_token_id(i, path)] = tokenizers.AddedToken(**fields.model_dump())

    known = backend.get_vocab(with_added_tokens=True)
    new = {i: token for i, token in described.items() if token.content not in known}
    if new:
        # The package numbers new tokens on from the last one, so gaps between them are filled.
        following = range(len(known), max(new) + 1)
        backend.add_tokens([new.get(i) or tokenizers.AddedToken(f"<|unused {i}|>", special=True) for i in following])
        for i, token in new.items():
            if backend.token_to_id(token.content) != i:
                raise ValueError(
                    f"{folder}: its files disagree about the id of {token.content!r:.60}, which is {i} in one"
                )

    special = {token.content: token for token in described.values() if token.special}
    added = {token.content: token for token in backend.get_added_tokens_decoder().values()}
    for name in _special_names(settings):
        special.setdefault(name, added.get(name) or tokenizers.AddedToken(name, normalized=False))
    make_special(backend, [token for name, token in special.items() if backend.token_to_id(name) is not None])


def _token_id(value: Any, path: Path) -> int:
    """Return a token's id, which JSON has as a number or, where it is a key, as text. Raises ValueError for others."""
    digits = str(value)
    if not re.fullmatch("[0-9]{1,9}", digits) or int(digits) > LARGEST_ID:
        raise ValueError(f"{path}: {value!r:.40} is not the id of a token")
    return int(digits)


def _special_names(settings: dict[str, Any]) -> list[str]:
    """Return the names of the tokens that tokenizer_config.json gives a role (eos_token) or lists as special."""
    values: list[Any] = []
    for name, value in settings.items():
        # Some folders pad with a token that is a word as well, such as "!".
        if name.endswith("_token") and name != "pad_token":
            values.append(value)
        elif name in ("additional_special_tokens", "extra_special_tokens"):
            if isinstance(value, list):
                values += value
            elif isinstance(value, dict):
                values += value.values()
    contents = [value.get("content") if isinstance(value, dict) else value for value in values]
    return [content for content in contents if isinstance(content, str) and content]


def make_special(backend: "tokenizers.Tokenizer", tokens: Sequence["tokenizers.AddedToken"]) -> None:
    """Make tokens special that are not so in tokenizer.json. They keep their ids."""
    for token in tokens:
        token.special = True
    backend.add_special_tokens(list(tokens))
