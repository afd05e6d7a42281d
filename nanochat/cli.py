"""Command lines from dataclasses: flags, `--config FILE.yaml`, one-line errors and exit codes.

A stage states its flags once, as a frozen dataclass whose fields are made by `option`:

    @dataclass(frozen=True)
    class Config:
        depth: int = option(12, "layers")                     # --depth 4
        model_tag: str | None = option(None, "name")          # --model-tag d4, or --model-tag unset
        compile: bool = option(True, "fuse")                  # --compile, --no-compile
        device: tuple[str, ...] = option((), "a device")      # --device cuda:0 --device cuda:1

`parse` builds the argument parser from it and returns an instance. A YAML file is turned into the same flags and read
by the same parser. `run` wraps a script's main and turns its end into an exit code.
"""

import argparse
import dataclasses
import io
import os
import re
import sys
import types
import typing
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from nanochat.common import is_checkout

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


def parse(config: type[T], argv: Sequence[str] | None = None, description: str | None = None) -> T:
    """Fill the dataclass `config` from the command line, over `--config FILE.yaml`, over its defaults.

    A wrong flag or value ends the process with status 2 and one line on stderr.
    """
    parser = Parser(description=description, argument_default=argparse.SUPPRESS, allow_abbrev=False)
    add_flags(parser, config)
    parser.add_argument("--config", metavar="FILE.yaml", help="flags from a YAML file; the command line wins")
    given = vars(parser.parse_args(argv))
    path = given.pop("config", None)
    try:
        if path is not None:
            # A parser of its own, whose errors name the file.
            file_parser = Parser(prog=f"--config {path}", argument_default=argparse.SUPPRESS, allow_abbrev=False)
            add_flags(file_parser, config)
            given = {**vars(file_parser.parse_args(flags_from_file(path, config))), **given}
        return config(**given)
    except ValueError as error:
        parser.error(str(error))


class Parser(argparse.ArgumentParser):
    """An argument parser that ends with status 2 and one line on stderr."""

    def error(self, message: str) -> typing.NoReturn:
        self.exit(2, f"{self.prog}: error: {' '.join(message.split())} (see --help)\n")


def add_flags(parser: argparse.ArgumentParser, config: type) -> None:
    """Add one flag per field of the dataclass `config`. Flags that are not given leave nothing in the result."""
    kinds = flag_types(config)
    for field in dataclasses.fields(config):
        kind, optional = kinds[field.name]
        default = "unset" if field.default is None else field.default
        arguments: dict[str, Any] = {
            "dest": field.name,
            "help": f"{field.metadata['help']} (default: {default})".replace("%", "%%"),  # argparse formats it with %
        }
        if kind is bool:
            arguments["action"] = argparse.BooleanOptionalAction
        elif kind is tuple:
            arguments["action"] = "append"  # given several times, each adds a value
        else:
            choices = field.metadata["choices"]
            arguments["type"] = reader(kind, optional)
            arguments["metavar"] = "|".join(choices) if choices else kind.__name__.upper()
            if choices:
                arguments["choices"] = [*choices, None] if optional else choices
            if field.metadata["bare"] is not None:
                arguments["nargs"] = "?"
                arguments["const"] = field.metadata["bare"]
        names = ["--" + field.name.replace("_", "-")]
        if field.metadata["flag"]:
            names.append(field.metadata["flag"])
        parser.add_argument(*names, **arguments)


def flag_types(config: type) -> dict[str, tuple[type, bool]]:
    """Return for each field its type, and whether it may be None: int | None -> (int, True)."""
    kinds = {}
    for name, hint in typing.get_type_hints(config).items():
        optional = typing.get_origin(hint) in (typing.Union, types.UnionType)
        if optional:
            hint = next(part for part in typing.get_args(hint) if part is not type(None))
        kinds[name] = (typing.get_origin(hint) or hint, optional)  # tuple[str, ...] -> tuple
    return kinds


def reader(kind: type, optional: bool) -> Callable[[str], Any]:
    """Return the function that reads a flag's text as `kind`, and "unset" (for numbers also "auto") as None."""
    unset = ("unset",) if kind is str else ("unset", "auto")

    def read(text: str) -> Any:
        return None if optional and text in unset else kind(text)

    read.__name__ = kind.__name__  # for argparse's message: "invalid int value"
    return read


def flags_from_file(path: str, config: type) -> list[str]:
    """Return the flags of `config` that a YAML file states. Raises ValueError when it cannot be read."""
    import yaml

    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}
    except OSError as error:
        raise ValueError(f"--config {path}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"--config {path} is not valid YAML: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"--config {path} must hold 'flag: value' lines")
    repeatable = [name for name, (kind, _) in flag_types(config).items() if kind is tuple]
    flags = []
    for key, value in values.items():
        name = str(key).lstrip("-").replace("_", "-")
        if isinstance(value, bool):
            flags.append(f"--{name}" if value else f"--no-{name}")
        elif value is None:
            flags.append(f"--{name}=unset")
        elif isinstance(value, list) and name.replace("-", "_") in repeatable:
            flags += [f"--{name}={item}" for item in value]
        else:
            flags.append(f"--{name}={value}")
    return flags


def commands_here(text: str) -> str:
    """Return `text` with its commands as they are typed here: without a checkout `python -m scripts.x` is `nanochat x`.

    See nanochat/__main__.py and pyproject.toml.
    """
    if is_checkout():
        return text
    return re.sub(r"python -m (?:scripts|tasks)\.(\w+)", lambda found: f"nanochat {found[1].replace('_', '-')}", text)


def run(main: Callable[[], None]) -> typing.NoReturn:
    """Run a script's `main` and exit with 0 when done, 2 for bad input, 130 when interrupted.

    A user's mistake (ValueError, a missing file, a full disk) becomes one line on stderr; a bug keeps its traceback.
    """
    # A character that cannot be read or shown must not end a command. Pipes of Windows know 256 of them.
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
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
        print(f"error: {' '.join(commands_here(str(error)).split())}", file=sys.stderr)
        code = 2
    sys.exit(code)
