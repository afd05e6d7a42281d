"""The server's script as a user runs it: processes, signals, a real checkpoint."""

import contextlib
import http.client
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from test_chat_cli import base_dir  # noqa: F401  (a fixture: the tiny model as a checkpoint)
from tiny_chat import wait_for

from scripts import chat_web

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--replicas", "0"], "--replicas 0"),
        (["--replicas", "2", "--devices", "cpu"], "--devices"),
        (["--replicas", "2", "--device-type", "cpu", "--stage", "rl"], "rl"),
        (["--replicas", "2", "--device-type", "cpu", "--api-keys", "/nowhere/keys"], "/nowhere/keys"),
        (["--port", "99999"], "--port 99999"),  # the system would listen on 34463
    ],
)
def test_mistakes_are_told_before_anything_is_loaded(flags, said, base_dir, monkeypatch, capsys):  # noqa: F811
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(base_dir))
    monkeypatch.setattr(torch, "set_num_threads", lambda n: None)
    monkeypatch.setattr(chat_web, "load_models", lambda *arguments: pytest.fail("a model was loaded"))
    monkeypatch.setattr(sys, "argv", ["chat_web", "--port", "0", *flags])
    with pytest.raises((ValueError, OSError, SystemExit)) as caught:
        chat_web.main()
    assert said in str(caught.value) + capsys.readouterr().err


def command(base_dir, script, *flags):  # noqa: F811
    """(argv, environment) of a script run on `base_dir`."""
    own = {"NANOCHAT_BASE_DIR": str(base_dir), "NANOCHAT_DTYPE": "float32", "OMP_NUM_THREADS": "1"}
    return [sys.executable, "-m", f"scripts.{script}", "--device-type", "cpu", *flags], {**os.environ, **own}


@contextlib.contextmanager
def serving(base_dir, *flags):  # noqa: F811
    """The process of a server that has loaded its model, and its address."""
    argv, environment = command(base_dir, "chat_web", "--port", "0", *flags)
    process = subprocess.Popen(
        argv, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        yield process, process.stdout.readline().split()[2].removeprefix("http://")
    finally:
        process.kill()
        process.communicate()


def get(address, path):
    """The response, with its body still to be read."""
    connection = http.client.HTTPConnection(address, timeout=60)
    connection.request("GET", path)
    return connection.getresponse()


def post(address, **options):
    """The response to a streamed chat, with its body still to be read."""
    connection = http.client.HTTPConnection(address, timeout=60)
    body = {"messages": [{"role": "user", "content": "Tell me a story"}], "stream": True, **options}
    connection.request("POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"})
    return connection.getresponse()


ENDLESS = {"logit_bias": {"33": 100}, "max_tokens": 700}  # an answer to the end of the context


def test_sigterm_with_two_replicas(base_dir):  # noqa: F811
    """The script with two replicas: what was begun on either ends, new requests are refused, the process ends."""
    with serving(base_dir, "--replicas", "2", "--max-batch", "4") as (process, address):
        begun = [post(address, seed=i) for i in range(6)]
        assert all(response.read(1) for response in begun)
        process.send_signal(signal.SIGTERM)
        assert all(response.read().endswith(b"data: [DONE]\n\n") for response in begun)
        assert process.wait(60) == 0
        log = process.stderr.read()
        assert {json.loads(line)["replica"] for line in log.splitlines() if '"replica"' in line} == {0, 1}
        assert "Traceback" not in log


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT])
def test_the_server_script_serves_and_ends_cleanly(base_dir, how):  # noqa: F811
    with serving(base_dir, "--host", "localhost") as (process, address):
        assert b'"sft/tiny"' in get(address, "/v1/models").read()
        process.send_signal(how)
        assert process.wait(20) == 0
        log = process.stderr.read()
        assert "sft/tiny: attention by" in log and "Traceback" not in log


def test_the_server_ends_while_it_loads(base_dir):  # noqa: F811
    """However deep inside torch that is: a thread that is ended there took the process with it, by SIGABRT."""
    slow = "lambda *_: [torch.mm(a, a) for a in [torch.ones(700, 700)] for _ in range(10**6)]"
    code = f"import torch; from nanochat.hf import store; store.NamedModel.load = {slow}\n"
    argv, environment = command(base_dir, "chat_web", "--port", "0")
    argv[1:3] = ["-c", f"{code}from scripts.chat_web import main; main()"]
    process = subprocess.Popen(argv, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True)
    try:
        process.stderr.readline()
        time.sleep(2)
        process.send_signal(signal.SIGTERM)
        assert (process.wait(60), process.stderr.read()) == (0, "")
    finally:
        process.kill()
        process.communicate()


def test_a_model_that_cannot_be_loaded_ends_the_server(base_dir):  # noqa: F811
    """With status 2 and the reason in one line, though the port is open by then."""
    broken = "def load(*_): raise ValueError('model.safetensors: not a file of weights')"
    code = f"from nanochat.hf import store\n{broken}\nstore.NamedModel.load = load\n"
    argv, environment = command(base_dir, "chat_web", "--port", "0")
    argv[1:3] = ["-c", f"{code}from nanochat import cli\nfrom scripts.chat_web import main\ncli.run(main)"]
    result = subprocess.run(argv, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert result.returncode == 2 and "chat at" not in result.stdout
    assert "not a file of weights" in result.stderr.splitlines()[-1] and "Traceback" not in result.stderr


def test_a_second_sigterm_does_not_wait_for_answers(base_dir):  # noqa: F811
    with serving(base_dir, "--drain-seconds", "300") as (process, address):
        responses = [post(address, seed=i, **ENDLESS) for i in range(9)]
        assert all(response.read(1) for response in responses)
        process.send_signal(signal.SIGTERM)
        assert wait_for(lambda: get(address, "/health").status == 503)
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0
        assert "Traceback" not in process.stderr.read()


@pytest.mark.parametrize("patience", [30, 0.3])
def test_sigterm_under_load(base_dir, patience):  # noqa: F811
    """What was begun ends, or is told that it was cut off; new requests get 503; nothing is left."""
    with serving(base_dir, "--max-batch", "2", "--drain-seconds", str(patience)) as (process, address):
        asked = ENDLESS if patience < 1 else {}
        responses = [post(address, seed=i, **asked) for i in range(6)]
        begun = [response.read(1) for response in responses]
        process.send_signal(signal.SIGTERM)
        time.sleep(0.05 if patience < 1 else 0.2)
        late = post(address, seed=99)
        assert late.status == 503 and late.getheader("Retry-After") and b"shutting down" in late.read()
        texts = [(first + response.read()).decode() for first, response in zip(begun, responses, strict=True)]
        if patience > 1:
            assert all(text.endswith("data: [DONE]\n\n") and '"stop"' in text for text in texts)
        else:
            assert any('"server_error"' in text.split("\n\n")[-2] for text in texts)
        assert process.wait(20) == 0
        assert "Traceback" not in process.stderr.read()
        with pytest.raises(ConnectionRefusedError):
            post(address)
