"""What the design promises of the code as a whole: layers, sizes, and that an import does nothing."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("nanochat", "scripts", "tasks")
FILES = sorted(path for package in PACKAGES for path in (ROOT / package).glob("*.py"))


def module_name(path):
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imported_names(path):
    """All modules, and names of modules, that a file imports, anywhere in it."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name} imports relatively"
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            names |= {each.value for each in node.args if isinstance(each, ast.Constant)}
    return names


def imported_by(path):
    """The project's modules among them."""
    return imported_names(path) & set(MODULES)


MODULES = {module_name(path): path for path in FILES}


def test_the_listing_is_as_flat_as_it_says():
    for package in PACKAGES:
        assert not list((ROOT / package).glob("*/*.py"))
    assert "nanochat.gpt" in MODULES and "scripts.base_train" in MODULES and "tasks.common" in MODULES


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_files_and_functions_are_short(path):
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 400
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = node.end_lineno - node.lineno + 1
            assert length <= 90, f"{node.name} has {length} lines"
        assert not isinstance(node, ast.Global), f"line {node.lineno}: a global"


ARCHITECTURE = (ROOT / "dev" / "architecture.md").read_text(encoding="utf-8")


def stated_layers():
    """Layer -> (its modules, the layers it may import from), as the table of dev/architecture.md has them."""
    _, _, table = ARCHITECTURE.partition("| may import |\n")
    rows = re.findall(r"^\| ([a-z]+) \| ([\w/, ]+?) \| ?([a-z, ]*) ?\|$", table, re.MULTILINE)
    layers = {}
    for layer, files, others in rows:
        names = [file.strip() for file in files.split(",")]
        if names == [f"{layer}/"]:
            modules = [name for name in MODULES if name.split(".")[0] == layer]
        else:
            modules = [f"nanochat.{name}" for name in names]
        layers[layer] = (modules, {other.strip() for other in others.split(",")} - {""})
    return layers


LAYERS = stated_layers()
LAYER_OF = {module: layer for layer, (modules, _) in LAYERS.items() for module in modules}


def test_every_module_has_one_layer():
    listed = [module for modules, _ in LAYERS.values() for module in modules]
    assert sorted(listed) == sorted(set(MODULES) - {"nanochat"}), "add it to the table in dev/architecture.md"
    assert {other for _, others in LAYERS.values() for other in others} <= set(LAYERS)


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_layers(path):
    """A module imports its own layer and those named in its row, anywhere in the file; scripts import no scripts."""
    name = module_name(path)
    if name in PACKAGES:
        return
    mine = LAYER_OF[name]
    outside = {other for other in imported_names(path) if other.split(".")[0] in ("dev", "tests")}
    assert not outside or name == "scripts.infer_bench", f"an installation has no {outside}"
    for other in imported_by(path) - {"nanochat"}:
        assert LAYER_OF[other] in LAYERS[mine][1] | ({mine} - {"scripts"}), f"{mine} may not import {other}"


def test_the_diagram_of_layers_is_the_table():
    """Its arrows are those of the table that do not follow from others, and lead downwards."""

    def reaches(layer, target):
        return layer == target or any(reaches(other, target) for other in LAYERS[layer][1])

    shortest = {
        (layer, other)
        for layer, (_, others) in LAYERS.items()
        for other in others
        if not any(reaches(between, other) for between in others - {other})
    }
    _, _, drawn = ARCHITECTURE.partition("flowchart BT\n")
    assert set(re.findall(r"^    (\w+) --> (\w+)$", drawn, re.MULTILINE)) == shortest
    order = list(LAYERS)
    assert all(order.index(other) < order.index(layer) for layer, (_, others) in LAYERS.items() for other in others)


def test_no_circle_of_imports():
    """Walking imports always ends: each module can be read after those it imports."""
    done, open_ = set(), []

    def visit(name):
        assert name not in open_, " -> ".join([*open_[open_.index(name) :], name])
        if name not in done:
            open_.append(name)
            for other in imported_by(MODULES[name]):
                visit(other)
            done.add(open_.pop())

    for name in MODULES:
        visit(name)


def python(code, cwd, **environment):
    environment = {"PATH": "", "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1", **environment}
    run = [sys.executable, "-c", code]
    return subprocess.run(run, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300)


IMPORT_ALL = """
import importlib, logging, os, sys
import numpy, safetensors.torch, tiktoken, torch, torch.distributed, torch.utils.checkpoint  # what they do is theirs
done = []

def audit(event, args):
    writes = event == "open" and isinstance(args[1], str) and set(args[1]) & set("wax+")
    if writes or event in ("os.mkdir", "os.putenv", "os.unsetenv", "subprocess.Popen", "socket.connect", "os.chdir"):
        done.append((event, args))

threads, precision = torch.get_num_threads(), torch.get_float32_matmul_precision()
before = dict(os.environ)
sys.addaudithook(audit)
for name in sys.argv[1:] or NAMES:
    importlib.import_module(name)
    assert not done, (name, done)
assert dict(os.environ) == before
assert not logging.getLogger().handlers and not logging.getLogger("nanochat").handlers
assert (threads, precision) == (torch.get_num_threads(), torch.get_float32_matmul_precision())
assert not torch.distributed.is_initialized()
"""


def test_importing_every_module_does_nothing(tmp_path):
    home, work = tmp_path / "home", tmp_path / "work"
    home.mkdir(), work.mkdir()
    code = f"NAMES = {sorted(MODULES)!r}\n{IMPORT_ALL}"
    result = python(code, work, HOME=str(home), NANOCHAT_BASE_DIR=str(tmp_path / "base"))
    assert (result.returncode, result.stdout, result.stderr) == (0, "", ""), result.stderr
    assert not (tmp_path / "base").exists()
    assert list(home.rglob("*")) == list(work.rglob("*")) == []


BLOCKED = ["wandb", "flask", "waitress", "rustbpe", "matplotlib", "pyarrow", "yaml", "requests", "tqdm"]
BLOCKED += ["tokenizers", "jinja2", "transformers"]

WITHOUT = """
import importlib, importlib.machinery, sys

class Without(importlib.machinery.PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.split(".")[0] in BLOCKED else super().find_spec(name, path, target)

sys.meta_path[sys.meta_path.index(importlib.machinery.PathFinder)] = Without
for name in BLOCKED:  # the measure sees what it looks for
    try:
        importlib.import_module(name)
    except ModuleNotFoundError:
        continue
    raise AssertionError(name)
for name in NAMES:
    importlib.import_module(name)
"""


def test_training_and_inference_need_only_four_packages(tmp_path):
    """torch, numpy, tiktoken, safetensors; whatever else a stage can use is imported where it is used."""
    names = [
        f"nanochat.{n}"
        for n in ("gpt", "optim", "trainer", "checkpoint", "dataloader", "engine", "chat_eval", "hf_load")
    ]
    names += ["scripts.base_train", "scripts.mid_train", "scripts.chat_sft", "scripts.chat_cli"]
    result = python(f"BLOCKED = {BLOCKED!r}\nNAMES = {names!r}\n{WITHOUT}", tmp_path, HOME=str(tmp_path))
    assert result.returncode == 0, result.stderr
