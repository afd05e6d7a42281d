"""The documents: every file, function and figure that they name is there, and every link leads somewhere."""

import ast
import dataclasses
import functools
import importlib
import inspect
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = sorted([ROOT / "README.md", *(path for path in (ROOT / "dev").glob("*.md") if path.name != "LOG.md")])
PLACE = re.compile(r"`((?:nanochat|scripts|tasks|dev|tests)/[\w/.-]+?\.(?:py|sh|md|html|txt))(?::([\w.]+))?`")


def names_in(path):
    """Classes, functions and constants of a file, methods as Class.method."""
    found = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            found.add(node.name)
        if isinstance(node, ast.ClassDef):
            found |= {f"{node.name}.{inner.name}" for inner in node.body if isinstance(inner, ast.FunctionDef)}
        if isinstance(node, ast.Assign):
            found |= {target.id for target in node.targets if isinstance(target, ast.Name)}
    return found


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_what_a_document_names_exists(document):
    for file, name in PLACE.findall(document.read_text()):
        path = ROOT / file
        assert path.is_file(), f"{document.name} names {file}"
        assert not name or name in names_in(path), f"{document.name} names {file}:{name}"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_relative_links_and_figures_exist(document):
    for target in re.findall(r"\]\(([^)#]+)\)", document.read_text()):
        assert "://" in target or (document.parent / target).exists(), f"{document.name} links to {target}"


def test_links_into_a_document_find_their_heading():
    for document in [*DOCUMENTS, ROOT / "dev" / "LOG.md"]:
        for target, anchor in re.findall(r"\]\(([\w./-]*)#([^)]+)\)", document.read_text()):
            text = (document.parent / target if target else document).read_text()
            headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
            slugs = {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}  # as GitHub's
            assert anchor in slugs, f"{document.name} links to {target}#{anchor}"


def test_files_in_diagrams_exist():
    for document in DOCUMENTS:
        for diagram in re.findall(r"```mermaid\n(.*?)```", document.read_text(), re.DOTALL):
            for file in re.findall(r"\w+\.py", diagram):
                assert (ROOT / "nanochat" / file).is_file(), f"{document.name} draws {file}"


def test_modules_that_commands_run_exist():
    for document in DOCUMENTS:
        for module in re.findall(r"python -m ((?:nanochat|scripts|dev)[.\w]*)", document.read_text()):
            assert (ROOT / f"{module.replace('.', '/')}.py").is_file(), f"{document.name} runs {module}"


@functools.cache
def flags_of(module):
    """What a module's command line takes: the fields of its dataclasses, and flags that its source spells out."""
    found, imported = {"config", "help"}, importlib.import_module(module)
    for value in vars(imported).values():
        if inspect.isclass(value) and dataclasses.is_dataclass(value):
            found |= {field.name.replace("_", "-") for field in dataclasses.fields(value)}
    return found | set(re.findall(r'"--([a-z][a-z0-9-]*)"', inspect.getsource(imported)))


def test_flags_of_commands_exist():
    """Of every command shown; after a bare -- they are those of the script that is started for it, base_train."""
    seen = 0
    for document in [*DOCUMENTS, ROOT / "dev" / "microgpt.py"]:
        command = r"-m ((?:nanochat|scripts|tasks|dev)\.\w+)((?: (?![`#|<&])[^\s`|]+)*)"
        for module, rest in re.findall(command, document.read_text()):
            own, _, passed_on = rest.partition(" -- ")
            for name, words in ((module, own), ("scripts.base_train", passed_on)):
                for flag in re.findall(r" --([a-z][a-z0-9-]*)", f" {words}"):
                    seen += 1
                    assert flag in flags_of(name), f"{document.name}: {name} has no --{flag}"
    assert seen > 50


def source_of(file, name):
    """The text of a function, class or Class.method, in single spaces."""
    text = (ROOT / file).read_text()
    nodes = ast.parse(text).body
    for part in name.split("."):
        (node,) = (n for n in nodes if isinstance(n, ast.ClassDef | ast.FunctionDef) and n.name == part)
        nodes = node.body
    return " ".join(ast.get_source_segment(text, node).split())


def test_theory_quotes_the_code_as_it_is():
    """Beside an equation stands a line of the function that computes it."""
    text = (ROOT / "dev" / "theory.md").read_text()
    quotes = re.findall(r"^\* `([\w/]+\.py):([\w.]+)` — `(.*)`$", text, re.MULTILINE)
    assert len(quotes) >= 25 and len(quotes) == text.count("` — `")
    for file, name, line in quotes:
        assert line in source_of(file, name), f"theory.md quotes {file}:{name} with {line}"


def test_theory_has_all_its_figures_and_they_their_script():
    shown = set(re.findall(r"\]\(figures/(\w+)\.png\)", (ROOT / "dev" / "theory.md").read_text()))
    drawn = set(
        re.findall(r'^        "(\w+)": \w+_figure,$', (ROOT / "dev" / "theory_figures.py").read_text(), re.MULTILINE)
    )
    assert shown == drawn == {path.stem for path in (ROOT / "dev" / "figures").glob("*.png")}
