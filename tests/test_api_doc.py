"""dev/api.md against a real server: every request in it is sent, every answer compared with the one it shows."""

import contextlib
import http.client
import json
import re
import threading
from pathlib import Path
from typing import NamedTuple

import pytest
import tiny_chat

DOCUMENT = (Path(__file__).resolve().parent.parent / "dev" / "api.md").read_text(encoding="utf-8")
MODEL = "sft/d6-cpu"


class Exchange(NamedTuple):
    method: str
    path: str
    headers: dict[str, str]
    body: str
    status: int
    answer_headers: dict[str, str]
    answer: str


def split(block):
    """First line, headers and body of an HTTP message."""
    head, _, body = block.partition("\n\n")
    first, *lines = head.strip().split("\n")
    return first, dict(line.split(": ", 1) for line in lines), body.strip()


def read_document():
    """(server, its exchanges) in the order of the page; a comment `<!-- server {...} -->` begins another server."""
    begun = [({}, [])]
    blocks = re.findall(r"<!-- server (.*?) -->|```http\n(.*?)```", DOCUMENT, re.DOTALL)
    requests = iter(blocks)
    for server, request in requests:
        if server:
            begun.append((json.loads(server), []))
            continue
        first, headers, body = split(request)
        method, path = first.split(" ")
        status, answer_headers, answer = split(next(requests)[1])
        protocol, code, *_ = status.split(" ")
        assert protocol == "HTTP/1.1", f"{first}: an answer must follow it"
        begun[-1][1].append(Exchange(method, path, headers, body, int(code), answer_headers, answer))
    return begun


SERVERS = read_document()


def problem(shown, got, where="answer"):
    """Where `got` is not what is shown, in words, or None. `…` is anything, in lists any number of things."""
    if shown == "…":
        return None
    if isinstance(shown, str) and "…" in shown:
        pattern = ".*".join(map(re.escape, shown.split("…")))
        fits = isinstance(got, str) and re.fullmatch(pattern, got, re.DOTALL)
        return None if fits else f"{where}: {got!r} is not {shown!r}"
    if isinstance(shown, dict) and isinstance(got, dict):
        if "…" in shown:  # one value shown, for any keys
            shown = dict.fromkeys(got, shown["…"])
        if set(shown) != set(got):
            return f"{where}: keys {sorted(got)}, shown are {sorted(shown)}"
        return first_problem(problem(shown[key], got[key], f"{where}.{key}") for key in shown)
    if isinstance(shown, list) and isinstance(got, list):
        return list_problem(shown, got, where)
    if type(shown) in (int, float):
        kinds = int if isinstance(shown, int) else (int, float)
        return None if isinstance(got, kinds) and not isinstance(got, bool) else f"{where}: {got!r} is not a number"
    return None if type(shown) is type(got) and shown == got else f"{where}: {got!r} is not {shown!r}"


def first_problem(problems):
    """The first that is one."""
    return next(filter(None, problems), None)


def list_problem(shown, got, where):
    """As `problem`, of lists."""
    if not shown:
        return f"{where}: {len(got)} more than shown" if got else None
    if shown[0] == "…":
        rests = [list_problem(shown[1:], got[i:], where) for i in range(len(got) + 1)]
        return None if None in rests else rests[0]
    if not got:
        return f"{where}: shorter than shown"
    return problem(shown[0], got[0], f"{where}[]") or list_problem(shown[1:], got[1:], where)


def parsed(text, kind):
    """A body as a value that `problem` compares."""
    if kind.startswith("application/json"):
        return json.loads(text)
    if kind.startswith("text/event-stream"):
        events = [event.removeprefix("data: ") for event in text.split("\n\n") if event]
        return [json.loads(event) if event.startswith("{") else event for event in events]
    return text


def ask(port, method, path, body=None, headers=None):
    """The open connection and the response of one request."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
    connection.request(method, path, body.encode() if body else None, headers or {})
    return connection, connection.getresponse()


@contextlib.contextmanager
def server_of(settings, monkeypatch):
    """The port of a server as a comment of the page wants it."""
    settings = dict(settings)
    opened = settings.pop("open", [])
    draining = settings.pop("draining", False)
    monkeypatch.setenv("NANOCHAT_API_KEYS", settings.pop("keys", ""))
    with (
        tiny_chat.running_server(model_name=MODEL, **settings) as server,
        contextlib.ExitStack() as at_end,
    ):
        engine = server.engine
        port = server.port
        release = threading.Event()
        step = engine.step
        if opened:  # answers that are not finished while the requests of the page are sent
            engine.step = lambda: [] if not release.wait(0.05) else step()
        at_end.callback(release.set)
        for body in opened:
            headers = {"Content-Type": "application/json"}
            body = json.dumps({**body, "stream": True})
            connection, response = ask(port, "POST", "/v1/chat/completions", body, headers)
            assert response.status == 200
            at_end.callback(connection.close)
        if draining:
            server.models.draining.set()
        yield port


@pytest.mark.parametrize(("settings", "exchanges"), SERVERS, ids=[json.dumps(s)[:40] for s, _ in SERVERS])
def test_every_request_is_answered_as_shown(settings, exchanges, monkeypatch):
    assert exchanges
    with server_of(settings, monkeypatch) as port:
        for each in exchanges:
            connection, response = ask(port, each.method, each.path, each.body, each.headers)
            text = response.read().decode()
            kind = response.getheader("Content-Type") or ""
            connection.close()
            where = f"{each.method} {each.path} {each.body}"
            assert response.status == each.status, f"{where}: {response.status} {text}"
            for name, shown in each.answer_headers.items():
                assert problem(shown, response.getheader(name)) is None, f"{where}: {name}: {response.getheader(name)}"
            if kind.startswith("text/") and "event-stream" not in kind:
                lines = iter(text.splitlines())  # those shown are there, in their order
                for shown in each.answer.splitlines():
                    assert any(problem(shown, line) is None for line in lines), f"{where}: no line {shown}"
            elif each.answer or text:
                found = problem(parsed(each.answer, kind), parsed(text, kind), where)
                assert found is None, f"{found}\n{text}"


def test_the_comparison_tells_differences():
    """What is not as shown is found: the oracle of this file."""
    same = [({"a": 1, "b": ["x…", "…"]}, {"a": 2, "b": ["xy", 3, 4]}), (["…", 2], [2]), (["…", "b", "…"], ["a", "b"])]
    assert all(problem(shown, got) is None for shown, got in same)
    different = [({"a": 1}, {}), ({"a": 1}, {"a": 1, "b": 2}), ({"a": 1}, {"a": "1"}), (1, 1.5), (1, True)]
    different += [(["…", "b"], ["a"]), ([1], [1, 2]), (None, 0), ("x…", "yx"), (False, None), ("a", "b"), ([1], [])]
    assert all(problem(shown, got) for shown, got in different)
