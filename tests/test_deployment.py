"""dev/deployment.md: its nginx and systemd texts run, its sizes are those of a real engine, its names exist."""

import configparser
import contextlib
import dataclasses
import http.client
import json
import os
import pwd
import re
import shutil
import socket
import ssl
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import tiny_chat
import yaml

from scripts import chat_web

ROOT = Path(__file__).resolve().parent.parent
DOCUMENT = (ROOT / "dev" / "deployment.md").read_text(encoding="utf-8")
BODY = {"messages": [{"role": "user", "content": "Tell me a story"}]}


def block(language):
    """The one fenced text of a language."""
    (text,) = re.findall(rf"```{language}\n(.*?)```", DOCUMENT, re.DOTALL)
    return text


def test_names_and_flags_exist():
    with tiny_chat.running_server() as (_, port, _):
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
        connection.request("GET", "/metrics")
        exposed = connection.getresponse().read().decode()
        connection.close()
    names = set(re.findall(r"\b(?:nanochat|process)_\w+", DOCUMENT)) - set(re.findall(r"\$(nanochat_\w+)", DOCUMENT))
    names -= {"nanochat_open", "nanochat_client"}  # nginx's
    names.discard("nanochat_gpu_memory_bytes")  # only where there is a GPU
    assert len(names) > 8 and all(re.search(rf"^(# TYPE )?{name}\b", exposed, re.MULTILINE) for name in names), names
    flags = {field.name.replace("_", "-") for field in dataclasses.fields(chat_web.Config)}
    commands = [line for line in DOCUMENT.splitlines() if "scripts.chat_web" in line or "nanochat chat-web" in line]
    used = {flag for line in commands for flag in re.findall(r"--([a-z-]+)", line)}
    assert used and used <= flags


def test_the_container_gets_what_it_needs():
    """That it installs and serves is test_install.py's. The checkout's own names and flags, and time to drain."""
    service = yaml.safe_load((ROOT / "dev" / "compose.yaml").read_text(encoding="utf-8"))["services"]["nanochat"]
    build = service["build"]
    assert (ROOT / "dev" / build["context"]).resolve() == ROOT and (ROOT / build["dockerfile"]).is_file()
    flags, seconds = service["command"]
    assert flags == "--drain-seconds" and int(seconds) < int(service["stop_grace_period"].removesuffix("s"))


def test_the_workflow_runs_what_ci_runs():
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8"))
    commands = [step["run"] for step in workflow["jobs"]["test"]["steps"] if "run" in step]
    assert commands == (ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines()[-2:]


def test_the_unit_is_one(tmp_path):
    """systemd reads it, where there is a systemd; paths and user are put to what is here."""
    unit = configparser.ConfigParser(interpolation=None, strict=False)
    unit.optionxform = str
    unit.read_string(block("ini"))
    assert set(unit) == {"DEFAULT", "Unit", "Service", "Install"}
    drain = int(re.search(r"--drain-seconds (\d+)", unit["Service"]["ExecStart"])[1])
    assert int(unit["Service"]["TimeoutStopSec"]) > drain
    if (verify := shutil.which("systemd-analyze")) is None:
        pytest.skip("no systemd here")
    text = block("ini").replace("/opt/nanochat/.venv/bin/python", sys.executable).replace("/opt/nanochat", str(ROOT))
    path = tmp_path / "nanochat@.service"
    path.write_text(text.replace("User=nanochat", f"User={pwd.getpwuid(os.getuid()).pw_name}"))
    run = subprocess.run([verify, "verify", str(path)], capture_output=True, text=True, timeout=120)
    assert str(path) not in run.stderr and path.name not in run.stderr, run.stderr


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@pytest.fixture
def proxied(tmp_path):
    """nginx with the text of the page before two servers: (ask, their engines, their models)."""
    if not (shutil.which("nginx") and shutil.which("openssl")):
        pytest.skip("nginx and openssl are not installed")
    pem = [str(tmp_path / name) for name in ("own.key", "own.pem")]
    sign = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1", "-subj", "/CN=localhost"]
    subprocess.run([*sign, "-keyout", pem[0], "-out", pem[1]], check=True, capture_output=True, timeout=120)
    with (
        tiny_chat.running_server(model_name="one") as (one, a, models_one),
        tiny_chat.running_server(model_name="two") as (two, b, models_two),
    ):
        port = free_port()
        text = block("nginx").replace(":8001", f":{a}").replace(":8002", f":{b}").replace("443", f"127.0.0.1:{port}")
        places = {"/var/log/nginx": str(tmp_path), "/etc/nginx/chat.example.org.key": pem[0]}
        for shown, here in (places | {"/etc/nginx/chat.example.org.pem": pem[1]}).items():
            text = text.replace(shown, here)
        temporary = "".join(
            f"{kind}_temp_path {tmp_path}/{kind};\n" for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
        )
        user = pwd.getpwuid(os.getuid()).pw_name
        (tmp_path / "nginx.conf").write_text(
            f"user {user};\ndaemon off;\npid {tmp_path}/pid;\nevents {{}}\n"
            f"http {{\naccess_log off;\n{temporary}{text}}}\n"
        )
        command = ["nginx", "-p", str(tmp_path), "-c", str(tmp_path / "nginx.conf"), "-e", str(tmp_path / "error.log")]
        checked = subprocess.run([*command, "-t"], capture_output=True, text=True, timeout=120)
        assert checked.returncode == 0, checked.stderr
        nginx = subprocess.Popen(command)
        trusting = ssl.create_default_context()
        trusting.check_hostname, trusting.verify_mode = False, ssl.CERT_NONE

        def ask(method, path, body=None, key=None):
            connection = http.client.HTTPSConnection("127.0.0.1", port, timeout=120, context=trusting)
            headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
            connection.request(method, path, json.dumps(body) if body else None, headers)
            return connection.getresponse()

        try:
            deadline = time.monotonic() + 60
            while time.monotonic() < deadline:
                with contextlib.suppress(OSError):
                    socket.create_connection(("127.0.0.1", port), timeout=5).close()
                    break
                time.sleep(0.05)
            yield ask, {"one": one, "two": two}, {"one": models_one, "two": models_two}
        finally:
            nginx.terminate()
            nginx.wait(60)


def test_two_replicas_behind_nginx(proxied, tmp_path):
    """Streams pass piece by piece, a client keeps its replica, and a replica that ends is passed over."""
    ask, engines, models = proxied

    def replica(key):
        return json.loads(ask("GET", "/v1/models", key=key).read())["data"][0]["id"]

    of = {f"key-{i}": replica(f"key-{i}") for i in range(12)}
    assert set(of.values()) == {"one", "two"}
    assert all(replica(key) == name for key, name in of.items())
    for path in ("/metrics", "/stats", "/cache/invalidate"):
        assert ask("GET", path).status == 404

    answer = ask("GET", "/v1/models", key="key-0")
    line = f" 200 .* {answer.getheader('X-Request-Id')}$"
    deadline = time.monotonic() + 60
    while not re.search(line, (tmp_path / "nanochat.log").read_text(), re.MULTILINE):
        assert time.monotonic() < deadline, line

    key, name = next(iter(of.items()))
    engine = engines[name]
    release = threading.Event()
    step = engine.step
    engine.step = lambda: step() if release.is_set() or not engine.running or len(engine.running[0].output) < 6 else []
    try:
        response = ask("POST", "/v1/chat/completions", {**BODY, "stream": True}, key)
        text = b""
        while text.count(b"data: ") < 3:  # while the engine stands still in the middle of the answer
            text += response.read1(65536)
        assert b"[DONE]" not in text and response.getheader("Content-Type").startswith("text/event-stream")
    finally:
        release.set()
        engine.step = step
    assert (text + response.read()).endswith(b"data: [DONE]\n\n")

    models[name].draining.set()
    answer = ask("POST", "/v1/chat/completions", {**BODY, "max_tokens": 2}, key)
    other = json.loads(answer.read())
    assert answer.status == 200 and other["model"] == ({"one", "two"} - {name}).pop()
    assert all(ask("POST", "/v1/chat/completions", {**BODY, "max_tokens": 2}, k).status == 200 for k in of)
