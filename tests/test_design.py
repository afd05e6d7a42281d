"""What the design promises of the code as a whole: layers, sizes, and that an import does nothing."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("nanochat", "scripts", "tasks")
FILES = sorted(path for package in PACKAGES for path in (ROOT / package).glob("*.py"))


def module_name(path):
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imported_by(path, top_level_only=False):
    """The project's modules that a file imports, anywhere in it or only when it is itself imported."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    names = set()
    for node in tree.body if top_level_only else ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name} imports relatively"
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names & set(MODULES)


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


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_layers(path):
    name, imports = module_name(path), imported_by(path)
    allowed = {"nanochat": ("nanochat",), "tasks": ("nanochat", "tasks"), "scripts": ("nanochat", "tasks")}
    package = name.split(".")[0]
    wrong = {other for other in imports if other.split(".")[0] not in allowed[package]}
    assert not wrong
    forbidden = {
        "nanochat.gpt": {"nanochat.optim", "nanochat.engine"},
        "nanochat.engine": {"nanochat.checkpoint"},
        "nanochat.recipe": {"nanochat.compute"},
    }
    assert not imports & forbidden.get(name, set())


def test_no_circle_of_imports():
    """Walking imports always ends: each module can be read after those it imports."""
    done, open_ = set(), []

    def visit(name):
        assert name not in open_, " -> ".join([*open_[open_.index(name) :], name])
        if name not in done:
            open_.append(name)
            for other in imported_by(MODULES[name], top_level_only=True):
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
