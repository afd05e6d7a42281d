"""Command lines from dataclasses: flags, `--config FILE.yaml`, one-line errors and exit codes."""

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
    """A dataclass field that is also a flag: default, help, allowed values, short form (`-n`), its value when bare."""
    meta = {"help": help, "choices": choices, "flag": flag, "bare": bare}
    return dataclasses.field(default=default, metadata=meta)


def require_positive(config: Any, *names: str, zero: bool = False) -> None:
    """Raise ValueError for the first of these flags that is set to 0 or less (with `zero`: less than 0) or NaN."""
    for name in names:
        value = getattr(config, name)
        if value is not None and not (value > 0 or (zero and value == 0)):
            wanted = "0 or more" if zero else "above 0"
            raise ValueError(f"--{name.replace('_', '-')} {value}: must be {wanted}")


def _value_type(annotation: Any) -> type:
    """`int | None` -> int: the type that a flag's text is read as. A tuple's flag may be given several times."""
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        annotation = next(a for a in typing.get_args(annotation) if a is not type(None))
    return typing.get_origin(annotation) or annotation


class Parser(argparse.ArgumentParser):
    """An argument parser that ends with status 2 and one line on stderr."""

    def error(self, message: str) -> typing.NoReturn:
        self.exit(2, f"{self.prog}: error: {' '.join(message.split())} (see --help)\n")


def build_parser(config: type, description: str | None = None) -> argparse.ArgumentParser:
    """An argument parser with one flag a field of the dataclass `config`; absent flags are left out of the result."""
    parser = Parser(description=description, argument_default=argparse.SUPPRESS, allow_abbrev=False)
    hints = typing.get_type_hints(config)
    for field in dataclasses.fields(config):
        kind, meta = _value_type(hints[field.name]), field.metadata
        names = ["--" + field.name.replace("_", "-")] + ([meta["flag"]] if meta.get("flag") else [])
        default = "unset" if field.default is None else field.default
        text = f"{meta.get('help', '')} (default: {default})".replace("%", "%%")
        if kind is bool:
            parser.add_argument(*names, dest=field.name, help=text, action=argparse.BooleanOptionalAction)
        elif kind is tuple:
            parser.add_argument(*names, dest=field.name, help=text, action="append")
        else:
            # values that are taken as they are: ("auto",) of `int | Literal["auto"] | None`
            words = tuple(word for part in typing.get_args(hints[field.name]) for word in typing.get_args(part))

            def read(text: str, kind: type = kind, words: tuple[str, ...] = words) -> Any:
                return text if text in words else kind(text)

            read.__name__ = kind.__name__  # argparse names it to the user
            metavar = None if meta.get("choices") else "|".join((kind.__name__.upper(), *words))
            value: dict[str, Any] = {"type": read, "choices": meta.get("choices"), "metavar": metavar}
            if meta.get("bare") is not None:
                value |= {"nargs": "?", "const": meta["bare"]}
            parser.add_argument(*names, dest=field.name, help=text, **value)
    parser.add_argument("--config", metavar="FILE.yaml", help="flags from a YAML file; the command line wins")
    return parser


def _read_config_file(path: str, config: type) -> dict[str, Any]:
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
        value = [value] if _value_type(hints[name]) is tuple and isinstance(value, str) else value
        try:  # text is read, too: YAML takes 1e-3, which has no point, for that
            strict = not isinstance(value, str | list)
            result[name] = TypeAdapter(hints[name]).validate_python(value, strict=strict)
        except ValidationError as error:
            raise ValueError(f"--config {path}: '{key}' is {value!r}: {error.errors()[0]['msg']}") from error
        choices = fields[name].metadata.get("choices")
        if choices and result[name] not in (None, *choices):
            raise ValueError(f"--config {path}: '{key}' must be one of {', '.join(map(str, choices))}")
    return result


def parse(config: type[T], argv: Sequence[str] | None = None, description: str | None = None) -> T:
    """The dataclass `config` filled from the command line, over `--config FILE.yaml`, over its defaults.

    A wrong flag or value ends the process with status 2 and one line on stderr.
    """
    parser = build_parser(config, description)
    given = vars(parser.parse_args(argv))
    try:
        return fill(config, given)
    except ValueError as error:
        parser.error(str(error))


def fill(config: type[T], given: dict[str, Any]) -> T:
    """The dataclass `config` from what a parser of `build_parser` found, over the file it names as `config`."""
    path = given.pop("config", None)
    return config(**{**(_read_config_file(path, config) if path else {}), **given})


def run(main: Callable[[], None]) -> typing.NoReturn:
    """Run a script's `main` and turn its end into an exit code: 0 done, 2 bad input, 130 interrupted.

    A user's mistake (ValueError, a missing file, a full disk) becomes a line on stderr; a bug keeps its traceback.
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
