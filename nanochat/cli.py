"""Command lines from dataclasses: flags, `--config FILE.yaml`, one-line errors and exit codes.

A stage states its flags once, as a frozen dataclass whose fields are made by `option`. `parse` builds the argument
parser from it and returns an instance, so that defaults, types and help texts stand in one place. `run` wraps a
script's main and turns its end into an exit code.
"""

import argparse
import dataclasses
import os
import sys
import types
import typing
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")


def option(default: Any, help: str, choices: Sequence | None = None, flag: str | None = None, bare: Any = None) -> Any:
    """Declare a dataclass field that is also a flag.

    choices: allowed values. flag: a short form, such as `-n`. bare: the value of the flag when it stands alone.
    """
    metadata = {"help": help, "choices": choices, "flag": flag, "bare": bare}
    return dataclasses.field(default=default, metadata=metadata)


def require_positive(config: Any, *names: str, zero: bool = False) -> None:
    """Raise ValueError for the first of these flags that is set to 0 or less (with `zero`: less than 0) or NaN."""
    for name in names:
        value = getattr(config, name)
        if value is not None and not (value > 0 or (zero and value == 0)):
            wanted = "0 or more" if zero else "above 0"
            raise ValueError(f"--{name.replace('_', '-')} {value}: must be {wanted}")


def _value_type(annotation: Any) -> type:
    """Return the type that a flag's text is read as: int for `int | None`, tuple for `tuple[str, ...]`."""
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        annotation = next(a for a in typing.get_args(annotation) if a is not type(None))
    return typing.get_origin(annotation) or annotation


class Parser(argparse.ArgumentParser):
    """An argument parser that ends with status 2 and one line on stderr."""

    def error(self, message: str) -> typing.NoReturn:
        self.exit(2, f"{self.prog}: error: {' '.join(message.split())} (see --help)\n")


def build_parser(config: type, description: str | None = None) -> argparse.ArgumentParser:
    """Make a parser with one flag per field of the dataclass `config`; absent flags are left out of its result."""
    parser = Parser(description=description, argument_default=argparse.SUPPRESS, allow_abbrev=False)
    hints = typing.get_type_hints(config)
    for field in dataclasses.fields(config):
        kind = _value_type(hints[field.name])
        metadata = field.metadata
        names = ["--" + field.name.replace("_", "-")]
        if metadata.get("flag"):
            names.append(metadata["flag"])
        default = "unset" if field.default is None else field.default
        text = f"{metadata.get('help', '')} (default: {default})".replace("%", "%%")  # argparse formats it with %
        if kind is bool:
            parser.add_argument(*names, dest=field.name, help=text, action=argparse.BooleanOptionalAction)
        elif kind is tuple:
            # given several times, each adds a value
            parser.add_argument(*names, dest=field.name, help=text, action="append")
        else:
            # words that are taken as they are: ("auto",) of `int | Literal["auto"] | None`
            words = tuple(word for part in typing.get_args(hints[field.name]) for word in typing.get_args(part))

            def read(text: str, kind: type = kind, words: tuple[str, ...] = words) -> Any:
                return text if text in words else kind(text)

            read.__name__ = kind.__name__  # argparse names it to the user
            choices = metadata.get("choices")
            bare = metadata.get("bare")
            parser.add_argument(
                *names,
                dest=field.name,
                help=text,
                type=read,
                choices=choices,
                metavar=None if choices else "|".join((kind.__name__.upper(), *words)),
                nargs=None if bare is None else "?",
                const=bare,
            )
    parser.add_argument("--config", metavar="FILE.yaml", help="flags from a YAML file; the command line wins")
    return parser


def _read_config_file(path: str, config: type) -> dict[str, Any]:
    """Read flags from a YAML file. Raises ValueError for an unknown key or a value of the wrong type."""
    import yaml
    from pydantic import TypeAdapter, ValidationError

    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}
    except OSError as error:
        raise ValueError(f"--config {path}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"--config {path} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise ValueError(f"--config {path} must hold 'flag: value' lines")
    fields = {field.name: field for field in dataclasses.fields(config)}
    hints = typing.get_type_hints(config)
    result = {}
    for key, value in values.items():
        name = str(key).lstrip("-").replace("-", "_")
        if name not in fields:
            raise ValueError(f"--config {path}: unknown key '{key}'; known: {', '.join(sorted(fields))}")
        if isinstance(value, str) and _value_type(hints[name]) is tuple:
            value = [value]
        try:
            # Numbers in text are read, too: for YAML 1e-3, which has no point, is text.
            strict = not isinstance(value, str | list)
            result[name] = TypeAdapter(hints[name]).validate_python(value, strict=strict)
        except ValidationError as error:
            raise ValueError(f"--config {path}: '{key}' is {value!r}: {error.errors()[0]['msg']}") from error
        choices = fields[name].metadata.get("choices")
        if choices and result[name] not in (None, *choices):
            raise ValueError(f"--config {path}: '{key}' must be one of {', '.join(map(str, choices))}")
    return result


def parse(config: type[T], argv: Sequence[str] | None = None, description: str | None = None) -> T:
    """Fill the dataclass `config` from the command line, over `--config FILE.yaml`, over its defaults.

    A wrong flag or value ends the process with status 2 and one line on stderr.
    """
    parser = build_parser(config, description)
    given = vars(parser.parse_args(argv))
    try:
        return fill(config, given)
    except ValueError as error:
        parser.error(str(error))


def fill(config: type[T], given: dict[str, Any]) -> T:
    """Fill the dataclass `config` from the result of its parser, over the file that it names under "config"."""
    values = dict(given)
    path = values.pop("config", None)
    from_file = _read_config_file(path, config) if path else {}
    return config(**{**from_file, **values})


def run(main: Callable[[], None]) -> typing.NoReturn:
    """Run a script's `main` and exit with 0 when done, 2 for bad input, 130 when interrupted.

    A user's mistake (ValueError, a missing file, a full disk) becomes one line on stderr; a bug keeps its traceback.
    """
    try:
        main()
        sys.stdout.flush()
        code = 0
    except BrokenPipeError:  # the reader of our output went away, as in `... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    except KeyboardInterrupt:
        code = 130
    except (ValueError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        code = 2
    sys.exit(code)
