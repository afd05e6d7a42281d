"""The import rule of dev/architecture.md, and that importing a module does nothing.

gpt.py imports neither the optimizer nor the engine; engine.py imports no checkpoint, HTTP or evaluation code; hf/ and
serve/ are imported by the entry points alone (scripts, and models.py for programs of others) and not by each other;
nothing imports scripts, models.py or dev; there are no circles.
"""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FILES = [path for package in ("nanochat", "scripts", "tasks") for path in sorted((ROOT / package).rglob("*.py"))]


def module_name(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts).removesuffix(".__init__")


MODULES = {module_name(path): path for path in FILES}


def imported_modules(path):
    """The project's modules that a file imports, anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names & (set(MODULES) | {"dev", "tests"})


GRAPH = {name: imported_modules(path) for name, path in MODULES.items()}


def reachable(name):
    """Every module that importing `name` can bring in."""
    seen, todo = set(), [name]
    while todo:
        for imported in GRAPH[todo.pop()]:
            if imported not in seen:
                seen.add(imported)
                todo.append(imported)
    return seen


@pytest.mark.parametrize(
    ("module", "forbidden"),
    [
        ("nanochat.gpt", ("nanochat.optim", "nanochat.engine", "nanochat.trainer", "nanochat.checkpoint")),
        (
            "nanochat.engine",
            ("nanochat.checkpoint", "nanochat.core_eval", "nanochat.chat_eval", "nanochat.trainer", "nanochat.optim"),
        ),
    ],
)
def test_model_and_engine_stand_alone(module, forbidden):
    assert not reachable(module) & set(forbidden)


@pytest.mark.parametrize("package", ["hf", "serve"])
def test_subpackages_are_imported_by_entry_points_alone(package):
    prefix = f"nanochat.{package}"
    for name, imports in GRAPH.items():
        if not name.startswith((prefix, "scripts.", "nanochat.models")):
            assert not [each for each in imports if each.startswith(prefix)], name


def test_nothing_imports_scripts_dev_or_tests():
    for name, imports in GRAPH.items():
        for each in imports:
            assert each.split(".")[0] not in ("dev", "tests"), (name, each)
            assert not each.startswith(("scripts.", "nanochat.models")), (name, each)


def test_there_are_no_circles():
    for name in GRAPH:
        assert name not in reachable(name), name


def python(code, cwd, **env):
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=cwd,
        env={"PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1", **env},
        capture_output=True,
        text=True,
    )


IMPORT_ALL = """
import builtins, importlib, logging, os, sys
import torch
usual_import = builtins.__import__
def import_as_windows_does(name, globals=None, *arguments, **named):
    if name in POSIX_ONLY and (globals or {}).get("__name__") in NAMES:
        raise ModuleNotFoundError(f"{globals['__name__']} imports {name}, which Windows lacks")
    return usual_import(name, globals, *arguments, **named)
builtins.__import__ = import_as_windows_does
done = []
def audit(event, arguments):
    if event in ("socket.connect", "subprocess.Popen", "os.mkdir", "os.remove", "os.rename"):
        done.append((event, arguments))
    if event == "open" and isinstance(arguments[1], str) and set(arguments[1]) & set("wax+"):
        done.append((event, arguments))
threads = torch.get_num_threads()
environment = dict(os.environ)
sys.addaudithook(audit)
for name in NAMES:
    importlib.import_module(name)
    assert not done, (name, done)
assert dict(os.environ) == environment
assert not logging.getLogger().handlers
assert threads == torch.get_num_threads()
assert not torch.distributed.is_initialized()
"""


# https://docs.python.org/3/library/unix.html, and readline
POSIX_ONLY = [
    "crypt",
    "fcntl",
    "grp",
    "nis",
    "posix",
    "pty",
    "pwd",
    "readline",
    "resource",
    "spwd",
    "syslog",
    "termios",
]
POSIX_ONLY += ["tty"]


def test_importing_every_module_does_nothing_and_takes_no_posix(tmp_path):
    home = tmp_path / "home"
    home.mkdir()
    # modeling_nanochat.py is copied into bundles and runs where transformers is installed, which here is optional.
    names = sorted(set(MODULES) - {"nanochat.hf.modeling_nanochat"})
    code = f"NAMES = {names!r}\nPOSIX_ONLY = {POSIX_ONLY!r}\n{IMPORT_ALL}"
    result = python(code, tmp_path, HOME=str(home), NANOCHAT_BASE_DIR=str(tmp_path / "base"))
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
    assert not (tmp_path / "base").exists()
    assert list(home.rglob("*")) == []


LAZY = ["wandb", "flask", "waitress", "rustbpe", "matplotlib", "pyarrow", "yaml", "requests", "jinja2", "transformers"]
LAZY += ["huggingface_hub"]


def test_training_and_inference_import_only_what_they_need(tmp_path):
    """Packages that only some commands need are imported where they are used."""
    names = ["nanochat.gpt", "nanochat.optim", "nanochat.trainer", "nanochat.engine"]
    names += ["scripts.base_train", "scripts.chat_sft", "scripts.chat_cli"]
    code = f"import sys\nimport {', '.join(names)}\nprint(sorted(set({LAZY!r}) & set(sys.modules)))"
    result = python(code, tmp_path, HOME=str(tmp_path))
    assert (result.returncode, result.stdout.strip()) == (0, "[]"), result.stderr
