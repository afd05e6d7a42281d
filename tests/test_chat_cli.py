"""The terminal chat and the server's script as a user runs them: processes, pipes, a terminal, a real checkpoint."""

import itertools
import json
import os
import pty
import re
import select
import signal
import sys
import time
import types
from pathlib import Path

import pytest
import tiny_run
import torch
from tiny_chat import INJECTION, STORY, save_tiny_chat, tiny_chat

from nanochat.compute import Compute
from nanochat.conversation import ChatFormat
from nanochat.detokenizer import Reasoning, ToolCall
from nanochat.engine import Engine
from scripts.chat_cli import HELP, Chat, Config

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def base_dir(tmp_path_factory):
    """A base directory with the tiny model as its fine-tuned checkpoint, and as its base model."""
    return save_tiny_chat(tmp_path_factory.mktemp("base"), "sft", "base")


def run(base_dir, *flags, script="chat_cli", stdin=b""):
    with tiny_run.base_dir(base_dir):
        return tiny_run.script(
            f"scripts.{script}", "--device-type", "cpu", *flags, stdin=stdin, NANOCHAT_DTYPE="float32"
        )


def test_one_answer(base_dir):
    result = run(base_dir, "-p", "What is 37*48?")
    assert (result.code, result.out) == (0, "37*48 is 1776.\n")


def test_a_session_through_a_pipe(base_dir):
    lines = ["Hello", "", "What is 37*48?", "/what", "/clear", "/temp 0.0", "Inject something", "/quit", "Hello"]
    result = run(base_dir, "--seed", "1", stdin="\n".join(lines).encode())
    answers = ["Hello! Grüße 🎉 from a tiny model.", "37*48 is 1776.", f"unknown command /what. {HELP}"]
    answers += ["temperature 0", INJECTION]
    assert result.code == 0 and result.out.splitlines() == answers


@pytest.mark.parametrize("script", ["chat_cli", "chat_web"])
def test_without_a_checkpoint(tmp_path, base_dir, script):
    result = run(tmp_path / "base" if script == "chat_cli" else base_dir, "--stage", "rl", script=script)
    assert result.out == "" and "python -m scripts." in result.error_line


def test_bytes_that_are_no_text_do_not_end_a_session(base_dir):
    result = run(base_dir, "--max-tokens", "3", stdin=b"\xff\n/what\n")
    assert result.code == 0 and "unknown command /what" in result.out


def test_a_base_model_continues_texts(base_dir):
    """Those of a pipe, line by line, as they are; and an error names the flag that is missing."""
    texts = ["Once there was", "  On day ", "On day 2 it"]
    result = run(base_dir, "--stage", "base", "--raw", "--max-tokens", "8", stdin="\n".join(texts).encode())
    assert (result.code, result.out.split("\n")) == (0, [*map(continuation, texts), ""])
    result = run(base_dir, "--stage", "base", "-p", "Once")
    assert result.code == 2 and "--raw" in result.err.splitlines()[-1] and result.out == ""


class Terminal:
    """chat_cli on a pseudo-terminal."""

    def __init__(self, base_dir):
        argv = [sys.executable, "-m", "scripts.chat_cli", "--device-type", "cpu"]
        own = {"NANOCHAT_BASE_DIR": str(base_dir), "NANOCHAT_DTYPE": "float32", "OMP_NUM_THREADS": "1"}
        self.pid, self.fd = pty.fork()
        if self.pid == 0:
            os.chdir(ROOT)
            os.execvpe(argv[0], argv, {**os.environ, **own})
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
    terminal = Terminal(base_dir)
    terminal.expect("sft/tiny, step 000007: 0.00 GB of weights")
    terminal.expect("> ")
    terminal.send("What is 37*48?\n")
    terminal.expect("[37*48 = 1776]")
    terminal.expect("1776.")
    assert re.search(r"17 tokens, [\d.]+ tokens/s", terminal.expect("> "))
    terminal.send("Tell me a story\n")
    terminal.expect("Once there")
    terminal.send("\x03")
    assert STORY[-20:] not in terminal.expect("[stopped]")
    terminal.expect("> ")
    terminal.send("/reset\n")
    terminal.expect("> ")
    terminal.send("Hello\n")
    terminal.expect("tiny model.")
    terminal.expect("> ")
    terminal.send("\x1b[A\x1b[A\x1b[A\x1b[A")  # the arrow goes back through the history
    terminal.expect("What is 37*48?")
    terminal.send("\n")
    terminal.expect("1776.")
    terminal.expect("> ")
    time.sleep(0.5)  # the prompt is written a moment before readline listens for signals
    terminal.send("\x03")
    assert terminal.exit_code() == 130
    assert "Tell me a story" in (base_dir / "chat_history").read_text().splitlines()
    terminal = Terminal(base_dir)
    terminal.expect("> ")
    terminal.send("\x1b[A")
    terminal.expect("What is 37*48?")  # from the session before
    terminal.send("\x15" + "Hello " * 400 + "\n")
    terminal.expect("reading: 256 of ", 60)
    terminal.send("\x03")
    terminal.expect("> ")
    terminal.send("/quit\n")
    assert terminal.exit_code() == 0


CPU = Compute(torch.device("cpu"), torch.float32)


def new_chat(live=False, **options):
    model, tokenizer = tiny_chat()
    return Chat(Engine(model, tokenizer, max_batch=1), ChatFormat(tokenizer), Config(**options), CPU, live)


class OneEvent(ChatFormat):
    """Answers are the same events, which come when the answer ends."""

    def __init__(self, tokenizer, events):
        super().__init__(tokenizer)
        self.events = events

    def decoder(self, prompt=(), stop=()):
        return types.SimpleNamespace(feed=lambda token: [], finish=lambda: self.events, stopped=False)


def test_the_speed_is_that_of_tokens(monkeypatch, capsys):
    """From the first token on, however late its text can be shown: here, at the end."""
    chat = new_chat(max_tokens=9)
    chat.form = OneEvent(chat.form.tokenizer, ["all of it"])
    clock = itertools.count(1)
    now = [0]
    step = chat.engine.step

    def tick():
        now[0] = next(clock)
        return step()

    monkeypatch.setattr("scripts.chat_cli.time.monotonic", lambda: now[0])
    monkeypatch.setattr(chat.engine, "step", tick)
    chat.ask("Hello")
    assert capsys.readouterr() == ("all of it\n", "[9 tokens, 1.0 tokens/s]\n")


def continuation(text, n=8):
    """The n likeliest tokens after a text, by whole forwards of the model."""
    model, tokenizer = tiny_chat()
    ids = tokenizer.encode(text, prepend="<|bos|>")
    for _ in range(n):
        likeliest = int(model(torch.tensor([ids]))[0, -1].argmax())
        if likeliest in tokenizer.special_tokens.values():  # which end an answer
            break
        ids.append(likeliest)
    return tokenizer.decode(ids)[len("<|bos|>") + len(text) :]


def test_raw_continues_a_text(capsys):
    """Any model, whatever it was trained for. Special tokens in the text are text, and "" begins a document."""
    chat = new_chat(raw=True, max_tokens=8)
    for text in ("Once there", "<|user_start|>On day", ""):
        chat.ask(text)
        assert capsys.readouterr().out == f"{continuation(text)}\n"
    with pytest.raises(ValueError, match="leaves no room"):
        chat.ask("Hello " * 900)
    with pytest.raises(ValueError, match="--raw"):
        Config(raw=True, system="Be brief.")


@pytest.mark.parametrize("live", [True, False])
def test_an_answer_does_not_steer_the_terminal(live, capsys):
    """Its escape sequences would set titles and colours, move the cursor or write to the clipboard."""
    text = "a\x1b]52;c;aGk=\x07\tb\x9b31mc\r\nd\x7f 🎉"
    chat = new_chat(live, max_tokens=2)
    chat.form = OneEvent(chat.form.tokenizer, [Reasoning(text), ToolCall(text, None), text])
    chat.ask("Hello")
    out, err = capsys.readouterr()
    if live:
        shown = re.sub(r"\x1b\[[02]m|\x1b\[K|\rreading: [\d,]+ of [\d,]+ tokens|\r", "", out)
        text = "a]52;c;aGk=\tb31mc\nd 🎉"
        assert shown.startswith(f"{text}\n[{text} = not valid] {text}\n[2 tokens")
    else:
        assert out == f"{text}\n" and err.startswith(f"{text}\n[{text} = not valid] [2 tokens")


def test_history_is_kept_cleared_and_dropped(capsys):
    chat = new_chat(max_tokens=40)
    for _ in range(40):  # far past the context of 768 tokens
        chat.ask("Hello")
    assert len(chat.messages) == 80
    chat.ask("What is 37*48?")
    assert chat.messages[-1]["content"][1:3] == [
        {"type": "python", "text": "37*48"},
        {"type": "python_output", "text": "1776"},
    ]
    lines = iter(["/help", "/clear", "Hello", "/exit", "never read"])
    chat.talk(lines)
    assert len(chat.messages) == 2 and next(lines) == "never read"
    end = "37*48 is 1776.\n" + HELP + "\nHello! Grüße 🎉 from a tiny model.\n"
    assert capsys.readouterr().out.endswith(end)


def test_a_conversation_is_saved_and_loaded(tmp_path, capsys):
    chat = new_chat(system="Be kind.")
    file = tmp_path / "talk.json"
    chat.ask("What is 37*48?")
    chat.talk([f"/save {file}", "/quit"])
    other = new_chat()
    other.talk([f"/load {file}", "/quit"])
    assert other.messages == chat.messages and other.config.system == "Be kind."
    assert capsys.readouterr().out.count("2 messages") == 2
    chat.ask("Hello")
    other.ask("Hello")
    assert chat.messages == other.messages
    parts = [{"type": "text", "text": "Be "}, {"type": "text", "text": "kind."}]
    question = {"role": "user", "content": "What was never answered"}
    conversation = {"messages": [{"role": "system", "content": parts}, *chat.messages, question]}
    file.write_text(json.dumps(conversation))
    other.talk([f"/load {file}", "/quit"])
    assert other.messages == chat.messages and other.config.system == "Be kind."


@pytest.mark.parametrize(("name", "value"), [("top_p", 2.0), ("top_k", -1), ("temperature", -1.0), ("max_tokens", 0)])
def test_a_setting_out_of_range_is_refused_before_a_model_is_loaded(name, value):
    with pytest.raises(ValueError, match=f"{name} {value} must be a number from"):
        Config(**{name: value})


def test_wrong_commands_are_answered_and_change_nothing(tmp_path, capsys):
    chat = new_chat()
    (tmp_path / "bad.json").write_text("{")
    (tmp_path / "odd.json").write_text('{"messages": [{"role": "wizard", "content": "x"}]}')
    wrong = {
        "/save": "needs a file",
        f"/save {tmp_path}/x": "nothing has been said",
        "/load": "needs a file",
        "/load /nowhere/x": "No such file",
        f"/load {tmp_path}/bad.json": "not valid JSON",
        f"/load {tmp_path}/odd.json": "wizard",
        "/temp hot": "hot",
        "/temp -1": "-1",
        "/temp nan": "nan",
        "/": "unknown command",
    }
    for line, words in wrong.items():
        chat.talk([line, "/quit"])
        assert words in capsys.readouterr().out, line
    assert (chat.messages, chat.config) == ([], Config())
    chat.ask("Hello")
    chat.talk(["/load ~nobody-of-that-name/x", "/quit"])
    assert "No such file" in capsys.readouterr().out and len(chat.messages) == 2
    chat.talk(["/system Be brief.", "/temp 1.5", "/system", "/quit"])
    assert chat.config == Config(temperature=1.5)
