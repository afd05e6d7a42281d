"""`pip install .` gives one command, `nanochat`, and no top-level packages with common names.

Oracles: pip, which builds and installs; and the checkout, whose stages the command has to run as they are.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from nanochat.__main__ import COMMANDS

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("nanochat", "scripts", "tasks")


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """A folder into which pip has installed the project, with nothing of the checkout in reach."""
    copy = tmp_path_factory.mktemp("copy")
    for name in PACKAGES:
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    target = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*command, "--target", target, copy], check=True)
    return target


@pytest.fixture
def nanochat(site, tmp_path):
    """Run the installed command in an empty folder."""
    (tmp_path / "empty").mkdir()

    def run(*arguments):
        environment = {**os.environ, "PYTHONPATH": str(site), "PYTHONDONTWRITEBYTECODE": "1"}
        command = [sys.executable, site / "bin" / "nanochat", *arguments]
        return subprocess.run(command, cwd=tmp_path / "empty", env=environment, capture_output=True, text=True)

    return run


def test_all_files_are_installed_inside_one_package(site):
    assert {path.name for path in site.iterdir()} - {"bin"} == {"nanochat", "nanochat-0.1.0.dist-info"}
    for name in PACKAGES:
        installed = site / "nanochat" if name == "nanochat" else site / "nanochat" / "tree" / name
        for path in (ROOT / name).rglob("*"):
            if path.is_file() and "__pycache__" not in path.parts:
                assert (installed / path.relative_to(ROOT / name)).read_bytes() == path.read_bytes(), path


def test_every_script_is_a_command():
    scripts = {f"scripts.{path.stem}" for path in (ROOT / "scripts").glob("*.py")} - {"scripts.__init__"}
    assert scripts <= {module for module, _ in COMMANDS.values()}


def test_stages_run_anywhere(nanochat, tiny_world):
    result = nanochat("tok_train", "--dataset", "corpus", "--vocab-size", "600")
    assert result.returncode == 0, result.stderr
    shutil.rmtree(tiny_world / "tokenizer")
    result = nanochat("tok-eval", "--dataset", "corpus")
    assert result.returncode == 2
    assert result.stderr.count("\n") == 1 and "nanochat tok-train" in result.stderr  # and not python -m scripts...


def test_the_command_names_its_commands(nanochat):
    result = nanochat("--help")
    assert result.returncode == 0
    for name in COMMANDS:
        assert f"\n  {name} " in result.stdout
    result = nanochat("base-trian")
    assert result.returncode == 2 and result.stderr.count("\n") == 1 and "base-train" in result.stderr


def test_a_stage_is_the_same_by_either_name():
    """Its help and its exit status, in the checkout."""
    for flags in (["--help"], ["--price", "x"]):
        by_command, by_module = (
            subprocess.run([sys.executable, "-m", *name, *flags], cwd=ROOT, capture_output=True)
            for name in (["nanochat", "report"], ["scripts.report"])
        )
        assert by_command.returncode == by_module.returncode
        assert (by_command.stdout, by_command.stderr) == (by_module.stdout, by_module.stderr)
