"""The terminal chat and the server's script as a user runs them: processes, pipes, a terminal, a real checkpoint."""

import dataclasses
import http.client
import os
import pty
import select
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest
from tiny_chat import INJECTION, STORY, tiny_chat

from nanochat import checkpoint
from nanochat.compute import Compute
from nanochat.engine import Engine
from scripts.chat_cli import HELP, Chat, Config, talk

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def base_dir(tmp_path_factory):
    """A base directory with the tiny model as its fine-tuned checkpoint."""
    folder = tmp_path_factory.mktemp("base")
    model, tokenizer = tiny_chat()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NANOCHAT_BASE_DIR", str(folder))
        tokenizer.save(folder / "tokenizer")
        meta = {"model_config": dataclasses.asdict(model.config), "tokenizer_hash": tokenizer.hash}
        no_optimizer = types.SimpleNamespace(state_dict=dict)
        checkpoint.save("sft", "tiny", 7, model, no_optimizer, meta, Compute.create("cpu"))
    return folder


def command(base_dir, script, *flags):
    """(argv, environment) of a script run on `base_dir`."""
    environment = {
        **os.environ,
        "NANOCHAT_BASE_DIR": str(base_dir),
        "NANOCHAT_DTYPE": "float32",
        "OMP_NUM_THREADS": "1",
    }
    return [sys.executable, "-m", f"scripts.{script}", "--device-type", "cpu", *flags], environment


def run(base_dir, *flags, stdin=""):
    argv, environment = command(base_dir, "chat_cli", *flags)
    return subprocess.run(argv, cwd=ROOT, env=environment, input=stdin, capture_output=True, text=True, timeout=120)


def test_one_answer(base_dir):
    result = run(base_dir, "-p", "What is 37*48?")
    assert (result.returncode, result.stdout) == (0, "37*48 is 1776.\n")


def test_a_session_through_a_pipe(base_dir):
    lines = ["Hello", "", "What is 37*48?", "/what", "/clear", "Inject something"]
    result = run(base_dir, "--seed", "1", stdin="\n".join(lines))
    answers = ["Hello! Grüße 🎉 from a tiny model.", "37*48 is 1776.", f"unknown command /what. {HELP}", INJECTION]
    assert result.returncode == 0 and result.stdout.splitlines() == answers


@pytest.mark.parametrize("script", ["chat_cli", "chat_web"])
def test_without_a_checkpoint(tmp_path, base_dir, script):
    argv, environment = command(tmp_path if script == "chat_cli" else base_dir, script, "--stage", "rl")
    result = subprocess.run(argv, cwd=ROOT, env=environment, input="", capture_output=True, text=True, timeout=120)
    assert result.returncode == 2 and result.stdout == ""
    assert (
        result.stderr.startswith("error: ") and result.stderr.count("\n") == 1 and "python -m scripts." in result.stderr
    )


class Terminal:
    """A process on a pseudo-terminal."""

    def __init__(self, argv, environment):
        self.pid, self.fd = pty.fork()
        if self.pid == 0:
            os.chdir(ROOT)
            os.execvpe(argv[0], argv, environment)
        self.seen = ""

    def expect(self, text, seconds=30):
        """Read until `text` appears; what came before it is forgotten."""
        deadline = time.time() + seconds
        while text not in self.seen:
            ready, _, _ = select.select([self.fd], [], [], max(0, deadline - time.time()))
            assert ready, f"waited for {text!r}, saw {self.seen!r}"
            self.seen += os.read(self.fd, 4096).decode(errors="replace")
        before, self.seen = self.seen.split(text, 1)
        return before

    def send(self, text):
        os.write(self.fd, text.encode())

    def exit_code(self, seconds=30):
        deadline = time.time() + seconds
        while time.time() < deadline:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                return os.waitstatus_to_exitcode(status)
            time.sleep(0.05)
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        raise AssertionError(f"still running, saw {self.seen!r}")


def test_a_session_on_a_terminal(base_dir):
    """A tool call is shown; Ctrl-C ends an answer and keeps the session, at the prompt it ends the session with 130."""
    terminal = Terminal(*command(base_dir, "chat_cli"))
    terminal.expect("sft model tiny, step 7")
    terminal.expect("> ")
    terminal.send("What is 37*48?\n")
    terminal.expect("[37*48 = 1776]")
    terminal.expect("1776.")
    terminal.expect("> ")
    terminal.send("Tell me a story\n")
    terminal.expect("Once there")
    terminal.send("\x03")
    assert STORY[-20:] not in terminal.expect("[stopped]")
    terminal.expect("> ")
    terminal.send("/clear\n")
    terminal.expect("> ")
    terminal.send("Hello\n")
    terminal.expect("tiny model.")
    terminal.expect("> ")
    time.sleep(0.5)  # the prompt is written a moment before readline listens for signals
    terminal.send("\x03")
    assert terminal.exit_code() == 130


def test_history_is_kept_cleared_and_dropped():
    written = []
    chat = Chat(Engine(*tiny_chat(), max_batch=1), Config(max_tokens=40), written.append, dim=False)
    for _ in range(40):  # far past the context of 768 tokens
        chat.ask("Hello")
    assert len(chat.messages) == 80
    chat.ask("What is 37*48?")
    assert chat.messages[-1]["content"][1:3] == [
        {"type": "python", "text": "37*48"},
        {"type": "python_output", "text": "1776"},
    ]
    lines = iter(["/help", "/clear", "Hello", "/exit", "never read"])
    talk(chat, lambda: next(lines))
    assert len(chat.messages) == 2 and next(lines) == "never read"
    assert "".join(written).endswith("37*48 is 1776.\n" + HELP + "\nHello! Grüße 🎉 from a tiny model.\n")


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT])
def test_the_server_script_serves_and_ends_cleanly(base_dir, how):
    argv, environment = command(base_dir, "chat_web", "--port", "0", "--host", "localhost")
    process = subprocess.Popen(
        argv, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        address = process.stdout.readline().split()[2].removeprefix("http://")
        connection = http.client.HTTPConnection(address, timeout=30)
        connection.request("GET", "/v1/models")
        assert b"nanochat-sft-tiny" in connection.getresponse().read()
        process.send_signal(how)
        assert process.wait(20) == 0 and "Traceback" not in process.stderr.read()
    finally:
        process.kill()
        process.communicate()
