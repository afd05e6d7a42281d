"""Several servers behind one address: what is passed on and to whom, and what happens when one of them, or all, end."""

import collections
import contextlib
import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from test_chat_cli import base_dir, command  # noqa: F401  (a fixture: the tiny model as a checkpoint)
from test_server import GARBAGE
from tiny_chat import running_server, text_of, tiny_chat

from nanochat.engine import Engine
from nanochat.serve import replicas
from nanochat.serve.app import make_server
from nanochat.serve.replicas import Replicas, create_front, environments, session_of
from nanochat.serve.service import Models, ServerConfig
from scripts import chat_web

ROOT = Path(__file__).resolve().parent.parent
KEY = {"Authorization": "Bearer the-key-of-all"}

# A server as small as can be, which does what the path says: for all that a front does whatever is behind it.
SERVER = r"""
import http.server, json, os, pathlib, sys, threading, time
here = os.environ["NANOCHAT_REPLICA"]

class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def answer(self):
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0)).decode()
        what, _, which = self.path.partition("?")
        status = int(what[1:]) if what[1:].isdigit() and here in which else 200
        if what == "/die":
            os._exit(9)
        if what == "/hold":
            while not pathlib.Path(which).exists():
                time.sleep(0.02)
        if what == "/half":
            self.send_response(200)
            self.send_header("Content-Type", "text/event-stream")
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            self.wfile.write(b"E\r\ndata: 1\n\ndata:\r\n")
            self.wfile.flush()
            os._exit(9)
        seen = {"headers": {k.lower(): v for k, v in self.headers.items()}, "body": body, "line": self.requestline}
        text = json.dumps({**seen, "process": os.getpid(), "threads": os.environ.get("OMP_NUM_THREADS")}).encode()
        self.send_response(status)
        for name, value in [("Content-Length", len(text)), ("Content-Type", "application/json"), ("X-Kept", "yes")]:
            self.send_header(name, str(value))
        for name, value in [("Connection", "X-Hop"), ("X-Hop", "1"), ("Keep-Alive", "timeout=5"), ("Upgrade", "h2c")]:
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(text)

    do_GET = do_POST = do_DELETE = do_OPTIONS = answer
    log_message = lambda *arguments: None

server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
threading.Thread(target=lambda: (sys.stdin.read(), os._exit(0)), daemon=True).start()
print(f"at http://127.0.0.1:{server.server_address[1]}", flush=True)
server.serve_forever()
"""


def ask(port, method, path, body=None, headers=None):
    """(status, headers, body) of an answer."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
    try:
        connection.request(method, path, body, headers or {})
        response = connection.getresponse()
        return response.status, dict(response.getheaders()), response.read()
    finally:
        connection.close()


def wait_for(condition, seconds=120):
    """Whether it comes to be, within a long time."""
    until = time.monotonic() + seconds
    while not (there := condition()) and time.monotonic() < until:
        time.sleep(0.05)
    return there


@contextlib.contextmanager
def front_of(n, program=SERVER, max_body=1000):
    """(port, replicas) of a front with n of the small servers."""
    each = Replicas([sys.executable, "-c", program], environments(n, "cpu"), 8 * n)
    server = make_server(create_front(each, max_body), "127.0.0.1", 0)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    try:
        each.start()
        yield server.effective_port, each
    finally:
        each.close()
        with contextlib.suppress(OSError):
            server.trigger.pull_trigger(lambda: [one.close() for one in list(server._map.values())])
        thread.join(10)
        server.task_dispatcher.shutdown()


@pytest.fixture(scope="module")
def three():
    with front_of(3) as front:
        yield front


def test_what_a_replica_has_of_the_machine(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(replicas, "usable_cores", lambda: 8)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    for device_type in (None, "cpu"):
        assert environments(3, device_type) == [{"OMP_NUM_THREADS": "2"}] * 3
    assert environments(9, "cpu") == [{"OMP_NUM_THREADS": "1"}] * 9
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    assert environments(2, None) == [{"CUDA_VISIBLE_DEVICES": "0"}, {"CUDA_VISIBLE_DEVICES": "1"}]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,GPU-5,-1,7")  # what follows an invalid one is not visible
    assert environments(2, "cuda") == [{"CUDA_VISIBLE_DEVICES": "2"}, {"CUDA_VISIBLE_DEVICES": "GPU-5"}]
    with pytest.raises(ValueError, match=r"--replicas 3: .* are 2"):
        environments(3, "cuda")
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    assert environments(2, "cpu") == [{"OMP_NUM_THREADS": "5"}] * 2


def test_what_is_passed_on(three):
    """All but the fields of one connection; the client's address is what the front saw, whatever the client says."""
    sent = {"Connection": "close, X-Mine", "X-Mine": "1", "Te": "trailers", "Upgrade": "h2c", "Proxy-Connection": "x"}
    sent |= {"Expect": "100-continue", "X-Forwarded-For": "1.2.3.4", "Forwarded": "for=1.2.3.4", "X-Request-Id": "id.1"}
    sent |= {"Authorization": "Bearer é", "Accept-Encoding": "gzip", "Content-Type": "application/json"}
    given = {name: value.encode("latin-1") for name, value in sent.items()}
    status, headers, body = ask(three[0], "POST", "/v1/x%2Fy?a=%20b&c", b'{"a": "\xc3\xa9"}', given)
    seen = json.loads(body)
    assert status == 200 and seen["line"] == "POST /v1/x%2Fy?a=%20b&c HTTP/1.1" and seen["body"] == '{"a": "é"}'
    kept = {"authorization": "Bearer é", "accept-encoding": "gzip", "content-type": "application/json"}
    kept |= {
        "content-length": "11",
        "host": f"127.0.0.1:{three[0]}",
        "x-request-id": "id.1",
        "x-forwarded-for": "127.0.0.1",
    }
    assert seen["headers"] == kept
    assert headers["X-Kept"] == "yes" and headers["X-Request-Id"] == "id.1" and int(headers["X-Replica"]) in range(3)
    assert not {"X-Hop", "Keep-Alive", "Upgrade"} & set(headers) and len(headers) == len({h.lower() for h in headers})
    made = json.loads(ask(three[0], "GET", "/", headers={"X-Request-Id": "no id"})[2])["headers"]["x-request-id"]
    assert re.fullmatch("[0-9a-f]{32}", made)
    for method in ("DELETE", "OPTIONS"):
        assert json.loads(ask(three[0], method, "/v1/z")[2])["line"] == f"{method} /v1/z HTTP/1.1"
    assert ask(three[0], "HEAD", "/v1/z")[0] == 501  # as the small server says


def test_what_the_front_refuses(three):
    for body in (b"x" * 1001, iter([b"x" * 600, b"x" * 600])):
        status, headers, answer = ask(three[0], "POST", "/v1/x", body)
        assert status == 413 and set(json.loads(answer)["error"]) == {"message", "type", "param", "code"}
        assert headers["X-Request-Id"]
    assert ask(three[0], "POST", "/v1/x", b"x" * 1000)[0] == 200
    lasting = []
    for data in [*GARBAGE, b"GET /\xe9 HTTP/1.1\r\nHost: x\r\n\r\n", b"G\x01T / HTTP/1.1\r\nHost: x\r\n\r\n"]:
        raw = socket.create_connection(("127.0.0.1", three[0]), timeout=60)
        with contextlib.suppress(ConnectionError):
            raw.sendall(data)
        lasting.append(raw)
    for raw in lasting[-2:]:
        assert raw.recv(65536).split()[1] == b"400"
    for raw in lasting:
        raw.close()
    assert ask(three[0], "GET", "/health")[0] == 200
    assert wait_for(lambda: not three[1].open)


def test_the_load_is_spread(three, tmp_path):
    """Each next request goes to who has the fewest open; a new one to who has ended one."""
    port, each = three
    threads = []
    for i in range(6):
        go = tmp_path / str(i)
        threads.append(threading.Thread(target=ask, args=(port, "GET", f"/hold?{go}")))
        threads[-1].start()
        assert wait_for(lambda i=i: len(each.open) == i + 1)
    assert collections.Counter(one.replica for one in each.open) == {0: 2, 1: 2, 2: 2}
    (tmp_path / "1").touch()
    threads[1].join(60)
    assert ask(port, "GET", "/v1/x")[1]["X-Replica"] == "1"
    for i in range(6):
        (tmp_path / str(i)).touch()
    for thread in threads:
        thread.join(60)
    assert not each.open


def test_who_is_full_or_ends_is_passed_over(three):
    for status in (429, 503):
        assert ask(three[0], "GET", f"/{status}?01")[1]["X-Replica"] == "2"
        assert ask(three[0], "GET", f"/{status}?012")[0] == status
    ours = json.dumps({"session_id": "ours"})
    home = ask(three[0], "POST", "/v1/x", ours)[1]["X-Replica"]
    assert ask(three[0], "POST", f"/429?{home}", ours)[0] == 429  # the conversation is there and nowhere else
    assert ask(three[0], "POST", f"/503?{home}", ours)[1]["X-Replica"] != home
    assert ask(three[0], "GET", "/500?012")[0] == 500


def test_which_session_is_meant():
    assert session_of("/v1/sessions/a/b", b"") == "a/b"
    assert session_of("/v1/chat/completions", b'{"session_id": "ada", "n": 1}') == "ada"
    wrong = [b"", b"[1]", b'"x"', b"3", b"\xff", b'{"a": 1}', b"[" * 100_000, b"1" * 10_000, b'{"session_id": null}']
    assert {session_of("/v1/chat/completions", body) for body in wrong} == {None}


def test_sessions_stay_where_they_are():
    """A third is with each replica; when one has gone its own move and no others, and come home when it is back."""
    with front_of(3) as (port, each):

        def homes():
            bodies = [json.dumps({"session_id": f"s{i}"}) for i in range(90)]
            return [ask(port, "POST", "/v1/chat/completions", body)[1]["X-Replica"] for body in bodies]

        before = homes()
        assert all(15 < count < 45 for count in collections.Counter(before).values()) and len(set(before)) == 3
        assert homes() == before and ask(port, "GET", "/v1/sessions/s7")[1]["X-Replica"] == before[7]
        odd = json.dumps({"session_id": "\ud800"})  # half a character
        assert ask(port, "POST", "/v1/x", odd)[0] == ask(port, "POST", "/v1/x", '{"session_id": {"a": 1}}')[0] == 200
        first = each.processes[1]
        first.kill()
        first.wait()
        during = homes()  # 1 s until it starts again
        assert all(b == a or a == "1" for a, b in zip(before, during, strict=True))
        assert wait_for(lambda: 1 in each.ports and each.processes[1] is not first)
        assert homes() == before


def test_a_replica_that_ends_in_the_middle():
    """Its request is told so, in the API's shape; a stream by an event, after whole ones alone; others go on."""
    with front_of(2) as (port, each):
        first = each.processes[0]
        status, headers, body = ask(port, "GET", "/die")
        error = json.loads(body)["error"]
        assert status == 502 and error["type"] == "server_error" and "ask again" in error["message"]
        assert wait_for(lambda: first.poll() is not None)
        status, headers, body = ask(port, "GET", "/half")
        events = body.decode().split("\n\n")
        assert status == 200 and events[0] == "data: 1" and events[2:] == [""]
        assert json.loads(events[1].removeprefix("data: "))["error"]["type"] == "server_error"
        if not each.ports:  # both are being started again
            status, headers, body = ask(port, "GET", "/")
            assert status in (200, 503) and (status == 200 or (headers["Retry-After"] and b"no replica" in body))
        assert wait_for(lambda: len(each.ports) == 2) and each.processes[0].pid != first.pid
        assert ask(port, "GET", "/")[0] == ask(port, "GET", "/health")[0] == 200
        each.draining = True
        assert json.loads(ask(port, "GET", "/health")[2]) == {"status": "shutting down"}


def test_starting_again_is_bounded(tmp_path):
    """One that ends at once is started after 1, 2, 4 ... seconds; the others, if any, answer meanwhile."""
    program = f"import time; open({str(tmp_path / 'starts')!r}, 'a').write(f'{{time.time()}}\\n')\n"
    program += "print('http://127.0.0.1:9', flush=True); time.sleep(0.3)"
    with front_of(1, program) as (port, each):
        assert ask(port, "GET", "/")[0] == 503  # nobody listens there
        assert wait_for(lambda: len((tmp_path / "starts").read_text().split()) >= 3)
        times = [float(line) for line in (tmp_path / "starts").read_text().split()]
        assert times[1] - times[0] > 1 and times[2] - times[1] > 2
        wait_for(lambda: not each.ports)
        assert ask(port, "GET", "/health")[0] == 503


def test_one_that_never_gets_ready_is_an_error():
    with (
        pytest.raises(ValueError, match=r"replica 0 .* ended with status 7 before it was ready"),
        front_of(1, "exit(7)"),
    ):
        pass


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--replicas", "0"], "--replicas 0"),
        (["--replicas", "2", "--device-type", "cuda"], "--replicas 2: .* here are 0"),
        (["--replicas", "2", "--device-type", "cpu", "--stage", "rl"], "rl"),
        (["--replicas", "2", "--device-type", "cpu", "--api-keys", "/nowhere/keys"], "/nowhere/keys"),
    ],
)
def test_mistakes_are_told_before_anything_is_started(flags, said, base_dir, monkeypatch):  # noqa: F811
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(base_dir))
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    monkeypatch.setattr(subprocess, "Popen", lambda *arguments, **options: pytest.fail("a replica"))
    monkeypatch.setattr(sys, "argv", ["chat_web", "--port", "0", *flags])
    with pytest.raises((ValueError, OSError), match=said):
        chat_web.main()


# From here on with the real server, and the tiny model in it.


@pytest.fixture(scope="module")
def real(base_dir):  # noqa: F811
    """(process, port, its lines) of `chat_web --replicas 2`, with a key; the last test ends it."""
    flags = [
        "--port",
        "0",
        "--replicas",
        "2",
        "--cache-mb",
        "0",
        "--max-batch",
        "4",
        "--cors-origin",
        "https://a.example",
    ]
    argv, environment = command(base_dir, "chat_web", *flags)
    environment["NANOCHAT_API_KEYS"] = "the-key-of-all"
    process = subprocess.Popen(
        argv, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    lines = [process.stdout.readline() for _ in range(3)]
    try:
        yield process, int(re.search(r"http://127.0.0.1:(\d+)", lines[2])[1]), lines
    finally:
        process.kill()
        process.communicate()


def chat(port, question, **options):
    """(status, headers, body) of a chat's answer."""
    body = {"messages": [{"role": "user", "content": question}], **options}
    return ask(port, "POST", "/v1/chat/completions", json.dumps(body), {**KEY, "Content-Type": "application/json"})


def begin(port, **options):
    """The response to an endless answer, of which the first piece has come."""
    body = {"messages": [{"role": "user", "content": "Tell me a story"}], "stream": True, **options}
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
    connection.request("POST", "/v1/chat/completions", json.dumps(body), {**KEY, "Content-Type": "application/json"})
    response = connection.getresponse()
    return connection, response, response.read1()


ENDLESS = {"logit_bias": {"33": 100}, "max_tokens": 700}


def stats(port):
    return json.loads(ask(port, "GET", "/stats", headers=KEY)[2])["models"]["sft/tiny"]


def figures(port):
    """Sample -> value of /metrics."""
    lines = ask(port, "GET", "/metrics", headers=KEY)[2].decode().splitlines()
    assert len({line for line in lines if line.startswith("# TYPE")}) == sum(
        line.startswith("# TYPE") for line in lines
    )
    return {line.rsplit(" ", 1)[0]: float(line.rsplit(" ", 1)[1]) for line in lines if not line.startswith("#")}


def pids(lines):
    return [int(pid) for line in lines for pid in re.findall(r"process (\d+) is ready", line)]


def test_equal_answers_and_sessions(real):
    """The same seed gives what one server alone gives, on whichever replica; a session grows where it began."""
    _, port, lines = real
    assert sorted(line.split()[1] for line in lines[:2]) == ["0", "1"] and len(pids(lines)) == 2
    asked = {"seed": 5, "temperature": 1.5, "max_tokens": 12}
    with running_server(model_name="sft/tiny") as (_, alone):
        wanted = json.loads(chat(alone, "Hello", **asked)[2])["choices"]
    homes = collections.Counter()
    for i in range(8):
        _, headers, body = chat(port, "Hello", session_id=f"s{i}", **asked)
        assert json.loads(body)["choices"] == wanted
        _, again, body = chat(port, "What is 37*48?", session_id=f"s{i}")
        assert json.loads(body)["session"]["turns"] == 2 and again["X-Replica"] == headers["X-Replica"]
        kept = ask(port, "GET", f"/v1/sessions/s{i}", headers=KEY)
        assert json.loads(kept[2])["turns"] == 2
        homes[headers["X-Replica"]] += 1
    assert set(homes) == {"0", "1"} == set(stats(port))
    assert {i: each["sessions"] for i, each in stats(port).items()} == homes
    assert json.loads(ask(port, "DELETE", "/v1/sessions/s3", headers=KEY)[2]) == {"id": "s3", "deleted": True}
    seen = figures(port)
    for name, key in (("prompt_tokens_total", "prompt_tokens"), ("generation_tokens_total", "output_tokens")):
        for i, each in stats(port).items():
            assert seen[f'nanochat_{name}{{model_name="sft/tiny",replica="{i}"}}'] == each[key] > 0
    assert json.loads(ask(port, "POST", "/cache/invalidate", headers=KEY)[2]) == {"responses": 0}
    assert json.loads(chat(port, "Hello")[2])["choices"][0]["message"]["content"] == text_of("Hello")


def test_keys_origins_and_limits_are_those_of_the_replicas(real):
    _, port, _ = real
    assert ask(port, "GET", "/health")[0] == 200
    for method, path in [("GET", "/"), ("GET", "/stats"), ("GET", "/metrics"), ("POST", "/cache/invalidate")]:
        for headers in ({}, {"Authorization": "Bearer wrong-key-of-all"}):
            status, answer, body = ask(port, method, path, headers=headers)
            assert status == 401 and answer["Www-Authenticate"] and b"invalid_api_key" in body
    assert ask(port, "GET", "/", headers=KEY)[1]["Content-Security-Policy"]
    asked = {"Origin": "https://a.example", "Access-Control-Request-Method": "POST"}
    status, headers, _ = ask(port, "OPTIONS", "/v1/chat/completions", headers=asked)
    assert status == 204 and headers["Access-Control-Allow-Origin"] == "https://a.example"
    assert ask(port, "POST", "/v1/completions", b"x" * (1 << 21), KEY)[0] == 413
    assert json.loads(chat(port, "Hello", colour="red")[2])["error"]["param"] == "colour"


def test_clients_that_leave_free_their_places(real):
    """Streams and whole answers, made or waited for: each replica aborts what nobody reads any more."""
    _, port, _ = real
    open_ = [begin(port, **ENDLESS) for _ in range(12)]  # more than there are places
    assert collections.Counter(response.getheader("X-Replica") for _, response, _ in open_) == {"0": 6, "1": 6}
    whole = socket.create_connection(("127.0.0.1", port))
    body = json.dumps({"messages": [{"role": "user", "content": "Hello"}], **ENDLESS})
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nAuthorization: {KEY['Authorization']}\r\n"
    whole.sendall(f"{head}Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n{body}".encode())
    assert wait_for(lambda: sum(each["open_requests"] for each in stats(port).values()) == 13)
    for connection, response, _ in open_:
        response.close()
        connection.close()
    whole.close()
    assert wait_for(lambda: not any(each["open_requests"] + each["running"] for each in stats(port).values()))
    aborted = [
        value for name, value in figures(port).items() if 'request_success_total{finished_reason="abort"' in name
    ]
    assert sum(aborted) == 13


def gone(pid):
    """Whether no such process runs (any more)."""
    with contextlib.suppress(OSError):
        os.kill(pid, 0)
        return False
    return True


def test_a_replica_is_frozen(real):
    """What is asked of all takes no longer than their patience, and says who is missing; then all is as before."""
    _, port, lines = real
    victim = pids(lines)[0]
    number = lines[0].split()[1]
    up = [f'nanochat_replica_up{{replica="{i}"}}' for i in "01"]
    os.kill(victim, signal.SIGSTOP)
    try:
        seen = figures(port)
        assert [seen[name] for name in up] == [float(i != number) for i in "01"]
        assert stats(port)[number] is None
        assert not any(f'replica="{number}"' in name for name in set(seen) - set(up))
        status, _, body = ask(port, "POST", "/cache/invalidate", headers=KEY)
        assert status == 503 and f"replica {number} does not answer" in json.loads(body)["error"]["message"]
    finally:
        os.kill(victim, signal.SIGCONT)
    assert wait_for(lambda: all(figures(port)[name] == 1 for name in up)) and stats(port)[number]["context"] == 768
    assert ask(port, "POST", "/cache/invalidate", headers=KEY)[0] == 200


def test_a_replica_is_killed(real):
    """What it made is told so, the other answers, /health is ok, and another takes its place."""
    process, port, lines = real
    open_ = [begin(port, **ENDLESS) for _ in range(2)]
    victim = dict(zip((line.split()[1] for line in lines[:2]), pids(lines), strict=True))["0"]
    os.kill(victim, signal.SIGKILL)
    for connection, response, first in open_:
        if response.getheader("X-Replica") == "0":
            last = (first + response.read()).decode().split("\n\n")[-2]
            assert json.loads(last.removeprefix("data: "))["error"]["type"] == "server_error"
        else:
            assert response.read1()
        connection.close()
    assert wait_for(lambda: gone(victim))
    assert ask(port, "GET", "/health")[0] == 200 and chat(port, "Hello", max_tokens=2)[0] == 200
    line = process.stdout.readline()  # when it is ready
    assert line.startswith("replica 0 ") and pids([line])[0] != victim
    assert set(stats(port)) == {"0", "1"}
    lines[:2] = [line, next(old for old in lines[:2] if old.startswith("replica 1 "))]


def test_sigterm_under_load(real):
    """What was begun ends, new requests get 503, and no process is left; also where systemd tells each process."""
    process, port, lines = real
    open_ = [begin(port, seed=i) for i in range(6)]
    for pid in (process.pid, *pids(lines)):
        os.kill(pid, signal.SIGTERM)
    assert wait_for(lambda: chat(port, "Hello")[0] == 503)
    assert all((first + response.read()).endswith(b"data: [DONE]\n\n") for _, response, first in open_)
    assert process.wait(120) == 0
    assert all(gone(pid) for pid in pids(lines)) and len(pids(lines)) == 2
    with pytest.raises(ConnectionRefusedError):
        ask(port, "GET", "/health")


def test_ctrl_c_while_they_load(base_dir):  # noqa: F811
    """The front is told, its replicas end with it: all that hold its stderr."""
    argv, environment = command(base_dir, "chat_web", "--port", "0", "--replicas", "2")
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(argv, cwd=ROOT, env=environment, **pipes)
    try:
        assert process.stderr.readline().startswith("replica ")
        process.send_signal(signal.SIGINT)
        rest = process.stderr.read()
        assert process.wait(120) == 0 and "chat at" not in process.stdout.read() and "Traceback" not in rest
    finally:
        process.kill()
        process.communicate()


def test_a_replica_ends_with_its_front(base_dir):  # noqa: F811
    """Whatever ended the front: the other end of its stdin is closed."""
    argv, environment = command(base_dir, "chat_web", "--port", "0", "--replicas", "9")
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(argv, cwd=ROOT, env={**environment, replicas.VARIABLE: "3"}, **pipes)
    try:
        port = int(re.search(r":(\d+)", process.stdout.readline())[1])
        ask(port, "GET", "/v1/models", headers={"X-Forwarded-For": "10.9.8.7"})
        process.stdin.close()
        assert process.wait(120) == 0
        log = process.stderr.read()
        assert log.startswith("replica 3: ") and '"client": "10.9.8.7"' in log
    finally:
        process.kill()
        process.wait()


def test_a_replica_ends_when_its_engine_has_died(caplog):
    """So that another takes its place: the same signal as from outside."""
    models, told, (reading, writing), stdin = Models(ServerConfig()), threading.Event(), os.pipe(), os.dup(0)
    engine = Engine(*tiny_chat(), max_batch=1)
    models.add("tiny", engine)
    before = signal.signal(signal.SIGTERM, lambda *arguments: told.set())
    os.dup2(reading, 0)
    try:
        threading.Thread(target=replicas.end_with_front, args=(models,), daemon=True).start()
        assert not told.wait(0.1) and models.dead == [] and models.trouble is None
        engine.step = lambda: 1 / 0
        models.get(None).loop.call(lambda: None)
        assert wait_for(lambda: models.dead) == ["tiny"] and models.trouble == "the engine died: tiny"
        assert wait_for(told.is_set)
    finally:
        os.dup2(stdin, 0)
        signal.signal(signal.SIGTERM, before)
        for fd in (reading, writing, stdin):
            os.close(fd)
