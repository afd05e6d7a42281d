"""`pip install .` gives one command, `nanochat`, and no top-level packages with common names.

Oracles: pip, which builds and installs; and the checkout, whose stages the command has to run as they are.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest
import tiny_chat

from nanochat.__main__ import COMMANDS

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("nanochat", "scripts", "tasks")


CONTAINER = (ROOT / "dev" / "Containerfile").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """A folder into which pip has installed what dev/Containerfile copies, with nothing of the checkout in reach."""
    copy = tmp_path_factory.mktemp("copy")
    for line in re.findall(r"^COPY (.+)$", CONTAINER, re.MULTILINE):
        *sources, target = line.split()
        for source in sources:
            if (ROOT / source).is_dir():
                shutil.copytree(ROOT / source, copy / target, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                (copy / target).mkdir(exist_ok=True)
                shutil.copy(ROOT / source, copy / target)
    target = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*command, "--target", target, copy], check=True)
    return target


@pytest.fixture
def start(site, tmp_path):
    """Start the installed command in an empty folder."""
    (tmp_path / "empty").mkdir()

    def start(command, *arguments):
        return subprocess.Popen(
            [sys.executable, site / "bin" / command, *arguments],
            cwd=tmp_path / "empty",
            env={**os.environ, "PYTHONPATH": str(site), "PYTHONDONTWRITEBYTECODE": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    return start


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


def test_the_container_serves(start, tmp_path, monkeypatch):
    """Its entry point, from anywhere, over a base directory that it may not write."""
    base = tmp_path / "data"
    tiny_chat.save_tiny_chat(base, "sft")
    for path in (base, *base.rglob("*")):
        path.chmod(0o555)
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(base))
    command = json.loads(re.search(r"^ENTRYPOINT (.+)$", CONTAINER, re.MULTILINE)[1])
    server = start(*command, "--port", "0", "--device-type", "cpu")
    try:
        address = next(line for line in server.stdout if "http://" in line).split("http://")[1].split()[0]
        port = address.rsplit(":", 1)[1].strip("/")
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=60) as answer:
            assert answer.status == 200
    finally:
        server.terminate()
        assert server.wait(60) == 0, server.stderr.read()
    assert {path.name for path in base.iterdir()} == {"checkpoints", "tokenizer"}


def test_a_mistake_is_answered_with_a_command_that_is_there(start, tmp_path, monkeypatch):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "base"))
    evaluating = start("nanochat", "tok_eval")
    _, error = evaluating.communicate()
    assert evaluating.returncode == 2
    assert error.count("\n") == 1 and "nanochat tok-train" in error  # and not python -m scripts.tok_train


def test_the_command_names_its_commands(start):
    out, _ = start("nanochat", "--help").communicate()
    for name in COMMANDS:
        assert f"\n  {name} " in out
    mistyped = start("nanochat", "base-trian")
    _, error = mistyped.communicate()
    assert mistyped.returncode == 2 and error.count("\n") == 1 and "base-train" in error


def test_a_stage_is_the_same_by_either_name():
    """Its help and its exit status, in the checkout."""
    for flags in (["--help"], ["--price", "x"]):
        by_command, by_module = (
            subprocess.run([sys.executable, "-m", *name, *flags], cwd=ROOT, capture_output=True)
            for name in (["nanochat", "report"], ["scripts.report"])
        )
        assert by_command.returncode == by_module.returncode
        assert (by_command.stdout, by_command.stderr) == (by_module.stdout, by_module.stderr)
