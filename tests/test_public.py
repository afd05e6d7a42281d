"""Public names are documented and typed; and the check of what tests have run tells what they have not."""

import ast
import dataclasses
import functools
import importlib
import inspect
import json
import os
import re
import subprocess
import sys
import textwrap
import types

import pytest
from test_design import MODULES

from dev import coverage_check

KINDS = (classmethod, staticmethod, property, functools.cached_property, types.FunctionType)
NAMES = sorted(set(MODULES) - {"nanochat", "scripts", "tasks"})


def public_names(module):
    """(name, object) of what a module defines for others: functions, classes, and methods and properties of these."""
    for name, value in vars(module).items():
        if name.startswith("_") or getattr(value, "__module__", None) != module.__name__:
            continue
        if inspect.isclass(value):
            yield name, value
            for inner, member in vars(value).items():
                made_of = getattr(member, "func", member)  # of a cached property
                foreign = getattr(made_of, "__module__", module.__name__) != module.__name__  # as a Protocol's __init__
                if not foreign and (inner == "__init__" or not inner.startswith("_")) and isinstance(member, KINDS):
                    yield f"{name}.{inner}", getattr(value, inner)
        elif callable(value):
            yield name, value


def functions(module):
    """The functions among them, unwrapped."""
    for name, value in public_names(module):
        value = getattr(value, "fget", None) or getattr(value, "func", None) or inspect.unwrap(value)
        if (inspect.isfunction(value) or inspect.ismethod(value)) and value.__name__ != "<lambda>":
            yield name, value


@pytest.mark.parametrize("name", NAMES)
def test_public_names_say_what_they_are(name):
    """A docstring each, a method's may be that of what it overrides; an __init__ may leave it to its class."""
    module = importlib.import_module(name)
    assert module.__doc__, "the file says what it holds"
    for place, value in public_names(module):
        if place.endswith("__init__") or place == "main" or getattr(value, "__name__", "") == "<lambda>":
            continue
        text = inspect.getdoc(value)
        if inspect.isclass(value):  # neither a base class's, nor the signature that dataclass and NamedTuple write
            text = re.sub(rf"^{value.__name__}\(.*\)$", "", vars(value).get("__doc__") or "")
        assert text and len(text.split()) > 1, f"{place} has no docstring"


@pytest.mark.parametrize("name", NAMES)
def test_public_functions_are_typed(name):
    """All parameters and the result; a parameter that is named for its shape (x_BTC) is a tensor."""
    for place, function in functions(importlib.import_module(name)):
        signature = inspect.signature(function)
        untyped = [
            parameter.name
            for parameter in signature.parameters.values()
            if parameter.annotation is parameter.empty and not re.search("^self$|^cls$|_[A-Z0-9]+$", parameter.name)
        ]
        assert not untyped, f"{place}: {', '.join(untyped)}"
        made = function.__qualname__.endswith(".__init__") and not signature.parameters.keys() - {"self"}
        assert made or signature.return_annotation is not signature.empty, f"{place} does not say what it returns"


def raised(node):
    """Names of the exceptions that a function raises itself, without those of functions inside of it."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Raise) and child.exc is not None:
            yield ast.unparse(getattr(child.exc, "func", child.exc))
        if not isinstance(child, ast.FunctionDef | ast.Lambda | ast.ClassDef):
            yield from raised(child)


@pytest.mark.parametrize("name", NAMES)
def test_what_users_mistakes_raise_is_said(name):
    """ValueError and ApiError, in the docstring of the function or of its class."""
    module = importlib.import_module(name)
    for place, function in functions(module):
        code = function.__code__.co_filename
        if place == "main" or code != module.__file__:  # a main ends with status 2; dataclass and NamedTuple write some
            continue
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
        owner = vars(module).get(place.split(".")[0])
        text = f"{inspect.getdoc(function) or ''} {owner.__doc__ or ''}"
        if {"ValueError", "ApiError"} & set(raised(tree.body[0])):
            assert re.search(r"ValueError|ApiError|[Rr]aise|[Rr]efuse|\berror", text), (
                f"{place} does not say what it raises"
            )


SHAPED = re.compile(r"_[A-Z0-9]+$|^x$|^[a-z]$")


@pytest.mark.parametrize("name", [name for name in NAMES if name.startswith("nanochat")])
def test_tensors_that_cross_a_function_have_their_shape_told(name):
    """In the parameter's name (x_BTC), or in the docstring, which then speaks of it or of any shape."""
    module = importlib.import_module(name)
    for place, function in functions(module):
        owner = vars(module).get(place.split(".")[0])
        if dataclasses.is_dataclass(owner) and place.endswith("__init__"):
            continue  # fields have comments
        text = f"{inspect.getdoc(function) or ''} {owner.__doc__ or ''}"
        for parameter in inspect.signature(function).parameters.values():
            if str(parameter.annotation) in ("<class 'torch.Tensor'>", "torch.Tensor", "torch.Tensor | None"):
                told = SHAPED.search(parameter.name) or re.search(rf"\b{parameter.name}\b", text)
                assert told or re.search(r"\(([A-Z]\w*, )+|_[A-Z]{2,}|shape|row|whole", text), (
                    f"{place}: {parameter.name}"
                )


def test_what_no_test_ran_is_found():
    def function(lines, executed):
        return {"summary": {"num_statements": lines}, "executed_lines": executed}

    functions = {
        "": function(9, [1]),
        "run": function(2, [3]),
        "idle": function(2, []),
        "_own": function(2, []),
        "Shape.area": function(1, []),
        "Shape._area": function(1, []),
        "Protocol.empty": function(0, []),
        "run.inner": function(3, []),
    }
    assert coverage_check.never_run({"nanochat/gpt.py": {"functions": functions}}) == ["gpt.Shape.area", "gpt.idle"]
    assert coverage_check.never_run({"nanochat/sandbox.py": {"functions": functions}}) == []
    for module, name in (each.split(".") for each in coverage_check.ON_GPU):
        assert coverage_check.never_run({f"nanochat/{module}.py": {"functions": {name: function(1, [])}}}) == []
        assert callable(getattr(importlib.import_module(f"nanochat.{module}"), name))


def test_what_no_test_ran_is_found_in_what_coverage_writes(tmp_path):
    """Of a package of its own: a real report, of lines that ran and lines that did not."""
    package = tmp_path / "own"
    package.mkdir()
    functions = "def run():\n    return 1\n\n\ndef idle():\n    'No line that runs.'\n    return 2\n"
    methods = "class Shape:\n    def area(self):\n        return 3\n\n    def _own(self):\n        return 4\n"
    (package / "__init__.py").write_text(f"{functions}\n\n{methods}\n\nrun()\n")
    (tmp_path / "use.py").write_text("import own\n")
    outer = ("COVERAGE_PROCESS_START", "COVERAGE_PROCESS_CONFIG")  # of the run that this test may be a part of
    environment = {name: value for name, value in os.environ.items() if name not in outer}
    environment |= {"COVERAGE_FILE": str(tmp_path / "data"), "PYTHONPATH": str(tmp_path)}
    for command in (["run", "--source=own", "use.py"], ["json", "-o", "lines.json"]):
        command = [sys.executable, "-m", "coverage", *command]
        subprocess.run(command, cwd=tmp_path, env=environment, check=True, capture_output=True, timeout=120)
    files = json.loads((tmp_path / "lines.json").read_text())["files"]
    assert coverage_check.never_run(files) == ["__init__.Shape.area", "__init__.idle"]
