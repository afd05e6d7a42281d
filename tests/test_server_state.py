"""A server's memory and guards: sessions, kept answers, the queue, keys, origins, the access log, metrics, sockets."""

import base64
import contextlib
import json
import re
import socket
import threading
import time
import types

import pytest
import torch
from tiny_chat import ANSWERS, held, leave, running_server, text_of, tiny_chat, wait_for

from dev import load_test
from nanochat.conversation import ChatFormat
from nanochat.engine import Engine
from nanochat.serve.app import read_api_keys
from nanochat.serve.hosts import Hosts
from nanochat.serve.metrics import ENGINE_FIGURES, Metrics

HELLO = [{"role": "user", "content": "Hello"}]
CHAT = "/v1/chat/completions"


@pytest.fixture(scope="module")
def server():
    with running_server() as server:
        yield server


@contextlib.contextmanager
def answering(server, **options):
    """While a question is answered, from its first step on; the list has the status and the reply afterwards."""
    reply = []
    with held(server.engine) as release:
        thread = threading.Thread(target=lambda: reply.extend(server.chat("Hello", max_tokens=4, **options)))
        thread.start()
        assert wait_for(lambda: server.engine.busy)
        yield reply
        release.set()
        thread.join()


# ---- Sessions


def test_a_session(server):
    """Only what is new is sent; the answer, the accounting and the end of it are the server's."""
    status, first = server.chat("What is 37*48?", session_id="s1")
    assert status == 200 and first["session"]["turns"] == 1 and first["session"]["context"] == 768
    assert first["session"]["tokens"] == first["usage"]["total_tokens"]
    account = server.stream("Hello", session_id="s1")[-1]["session"]
    assert account["turns"] == 2 and account["dropped_turns"] == 0
    whole = server.chat("What is 37*48?", ANSWERS["What is 37*48?"], "Hello")[1]["usage"]
    assert account["tokens"] == whole["total_tokens"]
    kept = server.get("/v1/sessions/s1")
    assert [message["role"] for message in kept["messages"]] == ["user", "assistant"] * 2
    assert kept["messages"][1]["content"] == ANSWERS["What is 37*48?"]
    turns = [server.chat("Tell me a story", session_id="s1", max_tokens=60)[1]["session"] for _ in range(20)]
    assert turns[1]["cached_tokens"] > 40  # of the turns before, read then
    last = turns[-1]
    assert last["dropped_turns"] + last["turns"] == 22 and last["dropped_turns"] > 3 and last["tokens"] <= 768
    assert server.chat("Hello", session_id="s2")[1]["session"]["turns"] == 1
    assert json.loads(server.ask("DELETE", "/v1/sessions/s1")[2]) == {"id": "s1", "deleted": True}
    assert server.ask("GET", "/v1/sessions/s1")[0] == server.ask("DELETE", "/v1/sessions/s1")[0] == 404


def test_a_new_system_message_replaces_the_old_one(server):
    for text in ("Be brief.", "Be kind."):
        body = {"messages": [{"role": "system", "content": text}, *HELLO], "session_id": "sys", "max_tokens": 4}
        assert server.ask("POST", CHAT, body)[0] == 200
    roles = [message["role"] for message in server.get("/v1/sessions/sys")["messages"]]
    assert roles == ["system", "user", "assistant", "user", "assistant"]
    assert server.get("/v1/sessions/sys")["messages"][0]["content"] == "Be kind."


def test_a_session_survives_what_goes_wrong(server):
    server.chat("Hello", session_id="s3")
    body = {"messages": [{"role": "user", "content": ""}], "session_id": "s3"}
    assert server.ask("POST", CHAT, body)[0] == 400
    with held(server.engine):
        begun = server.begin("Hello", session_id="s3")
        assert server.chat("Hello", session_id="s3")[1]["error"]["code"] == "session_busy"
        leave(begun)  # the server looks four times a second
        assert wait_for(lambda: server.models.n_open == 0)
    assert server.chat("Hello", session_id="s3")[1]["session"]["turns"] == 2


def test_what_is_deleted_while_it_answers_stays_deleted(server):
    """A session with its answer on the way, its first as well as a later one; and kept answers."""
    for turns in range(2):
        for _ in range(turns):
            server.chat("Hello", session_id="d")
        with answering(server, session_id="d") as reply:
            assert server.ask("DELETE", "/v1/sessions/d")[0] == 200
        assert reply[0] == 200 and reply[1]["session"]["turns"] == turns + 1
        assert server.ask("GET", "/v1/sessions/d")[0] == 404
    assert server.chat("Hello", session_id="d")[1]["session"]["turns"] == 1
    body = {"messages": HELLO, "seed": 77, "max_tokens": 4}
    with answering(server, seed=77):
        server.ask("POST", "/cache/invalidate")
    assert [server.ask("POST", CHAT, body)[1]["X-Cache"] for _ in range(2)] == ["miss", "hit"]


def test_a_session_of_two_models():
    """Each has its own; the newest is shown, and all are deleted together."""
    model, tokenizer = tiny_chat()
    other = Engine(model, tokenizer, max_batch=1), ChatFormat(tokenizer)
    with running_server(more={"other": other}) as server:
        for name in ("tiny", "other", "other"):
            assert server.chat("Hello", model=name, session_id="s", max_tokens=2)[0] == 200
            time.sleep(0.15)  # times are told in tenths of a second
        assert server.get("/v1/sessions/s")["model"] == "other"
        assert [server.ask("DELETE", "/v1/sessions/s")[0] for _ in range(2)] == [200, 404]


def test_sessions_end_by_time_and_number():
    def kept(server):
        return [server.ask("GET", f"/v1/sessions/{name}")[0] == 200 for name in "abc"]

    with running_server(max_sessions=2) as server:
        for name in ("a", "b", "a", "c"):
            assert server.chat("Hello", session_id=name)[0] == 200
        assert kept(server) == [True, False, True]
    with running_server(session_seconds=0.3) as server:
        assert server.chat("Hello", session_id="a")[1]["session"]["expires_in"] == 0.3
        time.sleep(0.35)
        assert kept(server) == [False, False, False]


# ---- Kept answers, and the queue


def test_answers_are_kept_while_they_are_the_same():
    """Deterministic requests only; stream and whole share them; by time, by size, and on demand they go."""

    def cached(question, **options):
        body = {"messages": [{"role": "user", "content": question}], **options}
        _, headers, text = server.ask("POST", CHAT, body)
        return headers["X-Cache"] == "hit", text

    with running_server(temperature=1.0) as server:
        for options in ({"temperature": 0}, {"seed": 5, "n": 2}):
            hit, text = cached("What is 37*48?", **options)
            again, same = cached("What is 37*48?", **options)
            first = json.loads(text)
            second = json.loads(same)
            assert (hit, again) == (False, True) and first["choices"] == second["choices"]
            assert first["usage"] == second["usage"] and first["id"] != second["id"]
            deltas = [event["choices"][0]["delta"] for event in server.stream("What is 37*48?", **options)]
            whole = [choice["message"]["content"] for choice in first["choices"]]
            assert "".join(delta.get("content", "") for delta in deltas) == "".join(whole)
        assert [cached("Hello", max_tokens=4)[0] for _ in range(2)] == [False, False]  # drawn anew each time
        assert not cached("What is 37*48?", seed=6)[0]
        assert json.loads(server.ask("POST", "/cache/invalidate")[2])["responses"] == 3
        assert not cached("What is 37*48?", temperature=0)[0]
    with running_server(cache_seconds=0.3) as server:
        for _ in range(2):
            assert not cached("Hello")[0]
            time.sleep(0.35)
    with running_server(cache_mb=2e-3) as server:
        assert [cached("Hello", max_tokens=4)[0] for _ in range(2)] == [False, True]
        assert [cached("Tell me a story")[0] for _ in range(2)] == [False, False]  # larger than all of the cache
    with running_server(cache_mb=0) as server:
        assert [cached("Hello", max_tokens=4)[0] for _ in range(2)] == [False, False]


def test_a_full_queue_says_when_to_come_back():
    with running_server(max_batch=1, max_waiting=1) as server:
        with held(server.engine) as release:
            begun = [server.begin("Hello", seed=seed) for seed in range(2)]
            status, headers, text = server.ask("POST", CHAT, {"messages": HELLO})
            assert status == 429 and 1 <= int(headers["Retry-After"]) <= 60
            assert json.loads(text)["error"]["code"] == "queue_full"
            assert server.get("/health") == {"status": "ok"}
            release.set()
            for _, response in begun:
                assert response.read().endswith(b"data: [DONE]\n\n")
        assert server.chat("Hello")[0] == 200


# ---- Keys, origins, the access log, metrics


def test_keys(tmp_path, monkeypatch):
    """Everything but /health wants one, as bearer token or as a password; sessions belong to their key."""
    (tmp_path / "keys").write_text("\ufefffirst-key-0\n# ours\n\n second-key \n")
    monkeypatch.setenv("NANOCHAT_API_KEYS", "third-key-x,")
    basic = "Basic " + base64.b64encode(b"anyone:second-key").decode()
    with running_server(api_keys=str(tmp_path / "keys")) as server:
        assert server.get("/health") == {"status": "ok"}
        for path in ("/", "/stats", "/metrics", "/openapi.json", "/v1/models", "/v1/sessions/x", "/nothing"):
            status, headers, text = server.ask("GET", path)
            assert status == 401 and "Basic" in headers["Www-Authenticate"]
            assert json.loads(text)["error"]["code"] == "invalid_api_key"
        for header in (
            "Bearer ",
            "Bearer wrong-key",
            "Bearer first-key",
            "Bearer first-key-0x",
            "Basic !",
            "first-key-0",
            "Bearer é",
        ):
            assert server.ask("POST", CHAT, {"messages": HELLO}, {"Authorization": header.encode("latin-1")})[0] == 401
        for header in ("Bearer first-key-0", "Bearer third-key-x", basic):
            body = {"messages": HELLO, "session_id": "mine"}
            reply = server.ask("POST", CHAT, body, {"Authorization": header})
            assert reply[0] == 200 and json.loads(reply[2])["session"]["turns"] == 1  # none sees another's
            assert server.ask("GET", "/", headers={"Authorization": header})[0] == 200
    for text, what in (("short\n", "8 characters"), ("# none\n", "no key")):
        (tmp_path / "keys").write_text(text)
        with pytest.raises(ValueError, match=what):
            read_api_keys(str(tmp_path / "keys"))


def test_other_origins_are_let_in_only_when_asked(server):
    here = {"Origin": "https://a.example", "Access-Control-Request-Method": "POST"}
    for method in ("GET", "OPTIONS"):
        headers = server.ask(method, "/v1/models", headers=here)[1]
        assert not any(name.startswith("Access-Control") for name in headers)
    with running_server(cors_origin="https://a.example, https://b.example/") as open_server:
        asked = {"Access-Control-Request-Headers": "authorization,content-type,x-stainless-lang"}  # as openai-node does
        status, headers, _ = open_server.ask("OPTIONS", CHAT, headers={**here, **asked})
        assert status == 204 and headers["Access-Control-Allow-Origin"] == "https://a.example"
        assert headers["Access-Control-Allow-Headers"] == asked["Access-Control-Request-Headers"]
        status, headers, _ = open_server.ask("OPTIONS", "/", headers={**here, "Origin": "https://b.example"})
        assert status == 204 and "Authorization" in headers["Access-Control-Allow-Headers"]
        headers = open_server.ask("GET", "/v1/models", headers=here)[1]
        assert headers["Access-Control-Allow-Origin"] == "https://a.example"
        other = open_server.ask("GET", "/v1/models", headers={"Origin": "https://c.example"})[1]
        assert "Access-Control-Allow-Origin" not in other and "Origin" in other["Vary"]


def test_the_access_log_tells_what_was_done_and_not_what_was_said(server, caplog):
    caplog.set_level("INFO", "nanochat.access")
    secret = "What is 37*48?"
    body = {"messages": [{"role": "user", "content": secret}], "user": "ada\nline"}
    assert server.ask("POST", CHAT, body, {"X-Request-Id": "my-id.1"})[1]["X-Request-Id"] == "my-id.1"
    made = server.ask("GET", "/v1/nothing?q=secret", headers={"X-Request-Id": "not one\tword"})[1]["X-Request-Id"]
    assert re.fullmatch("[0-9a-f]{32}", made)
    server.stream(secret, seed=1)
    assert wait_for(lambda: len(caplog.records) == 3)
    lines = [json.loads(record.getMessage()) for record in caplog.records]
    assert [line["status"] for line in lines] == [200, 404, 200] and lines[0]["request_id"] == "my-id.1"
    assert lines[0]["user"] == "ada\nline" and lines[0]["completion_tokens"] > 5 and lines[0]["finish_reason"] == "stop"
    assert lines[1]["path"] == "/v1/nothing" and lines[2]["stream"] and lines[2]["completion_tokens"] > 5
    assert all(line["seconds"] >= 0 and line["time"] for line in lines)
    assert not any(word in caplog.text for word in ("37*48", "1776", "secret"))


def test_metrics_count_what_was_done():
    with running_server() as server:
        usages = [server.chat(question)[1]["usage"] for question in ("Hello", "What is 37*48?")]
        usages.append(server.chat("Hello", max_tokens=3)[1]["usage"])
        server.ask("GET", "/nothing")
        server.chat("Hello")  # from the cache: made no tokens
        assert wait_for(lambda: not server.engine.busy)
        seen = server.metrics()
        of = '{model_name="tiny"}'
        assert seen[f"nanochat_prompt_tokens_total{of}"] == sum(usage["prompt_tokens"] for usage in usages)
        assert seen[f"nanochat_generation_tokens_total{of}"] == sum(usage["completion_tokens"] for usage in usages)
        ends = 'nanochat_request_success_total{finished_reason="%s",model_name="tiny"}'
        assert seen[ends % "stop"] == 2 and seen[ends % "length"] == 1
        assert seen['nanochat_requests_refused_total{status="404"}'] == 1
        assert seen[f"nanochat_response_cache_hits_total{of}"] == 1
        for name in ("time_to_first_token", "e2e_request_latency", "request_queue_time"):
            assert seen[f"nanochat_{name}_seconds_count{of}"] == 3
        n_later = sum(usage["completion_tokens"] for usage in usages) - 3
        assert 0 < seen[f"nanochat_inter_token_latency_seconds_count{of}"] <= n_later
        assert seen[f"nanochat_num_requests_running{of}"] == seen[f"nanochat_num_requests_waiting{of}"] == 0
        assert seen['nanochat_replica_up{model_name="tiny",replica="0"}'] == 1
        stats = server.get("/stats")["models"]["tiny"]
        assert stats["output_tokens"] == seen[f"nanochat_generation_tokens_total{of}"] and stats["context"] == 768


def test_the_load_test_sees_what_the_server_did():
    """Its counts are those of /metrics, and a client that leaves is no error."""
    with running_server(cache_mb=0) as server:
        config = load_test.Config(url=f"http://127.0.0.1:{server.port}", clients=4, seconds=1, max_tokens=9, leave=0.3)
        record = load_test.load(config)
        seen = server.metrics()
    assert record["errors"] == {} and record["stuck_clients"] == 0 and record["answers"] > 4
    assert not any(record["server_after"][name] for name in load_test.GAUGES)
    ends = [value for name, value in seen.items() if name.startswith("nanochat_request_success_total")]
    assert sum(ends) == record["answers"] + record["left_by_client"]
    assert record["time_to_first_token_ms"]["p50"] <= record["whole_answer_ms"]["max"]
    with pytest.raises(ValueError, match="--url ftp"):
        load_test.Config(url="ftp://127.0.0.1")


def test_a_name_that_is_not_the_servers_own_is_refused(server, monkeypatch):
    """Without keys, a page of another site could otherwise let its own name point here (DNS rebinding)."""
    for host in ("evil.example", f"evil.example:{server.port}", "127.0.0.1.evil.example", "localhost.evil.example", ""):
        for method, path in (
            ("GET", "/"),
            ("GET", "/v1/models"),
            ("POST", CHAT),
            ("OPTIONS", CHAT),
            ("GET", "/metrics"),
        ):
            body = {"messages": HELLO} if method == "POST" else None
            status, _, text = server.ask(method, path, body, {"Host": host})
            assert status == 403 and "--allowed-host" in json.loads(text)["error"]["message"]
    assert server.ask("GET", "/health", headers={"Host": "evil.example"})[0] == 200  # for load balancers
    monkeypatch.setenv("NANOCHAT_API_KEYS", "a-long-random-key")
    with running_server() as keyed:  # the page has no key
        key = {"Authorization": "Bearer a-long-random-key", "Host": "evil.example"}
        assert keyed.ask("GET", "/v1/models", headers=key)[0] == 200


OWN = socket.gethostname()
LOCAL = [
    "localhost",
    "LOCALHOST:8000",
    "localhost.",
    "127.0.0.1",
    "127.0.0.1:80",
    "[::1]",
    "[::1]:8000",
    "192.168.1.5:8000",
]
EVIL = [
    "evil.example",
    "evil.example:80",
    "localhost.evil.example",
    "127.0.0.1.nip.io",
    "a@localhost",
    "localhost/x",
    "",
]
EVIL += [
    "localhost:x",
    "localhost,evil.example",
    "[::1].evil.example",
    "evil.example#localhost",
    "127.0.0.1 evil.example",
]


@pytest.mark.parametrize(
    ("listen", "allowed", "served", "refused"),
    [
        ("127.0.0.1", (), [*LOCAL, None], [*EVIL, "nanochat", "my.name"]),
        ("::1", (), LOCAL, EVIL),
        ("localhost", ("chat.example.org", "My.Name"), [*LOCAL, "chat.example.org:443", "my.name"], EVIL),
        ("0.0.0.0", (), [*LOCAL, "nanochat:8000", OWN, f"{OWN}.local"], EVIL),
        ("chat.example.org", (), [*LOCAL, "chat.example.org"], EVIL),
        ("127.0.0.1", ("*",), [*LOCAL, *EVIL], []),
        ("127.0.0.1", ("box.lan:8000",), ["box.lan", "box.lan:80"], EVIL),
    ],
)
def test_names_of_a_server(listen, allowed, served, refused):
    hosts = Hosts(listen, allowed)
    assert [name for name in served if not hosts.serve(name)] == []
    assert [name for name in refused if hosts.serve(name)] == []


@pytest.mark.parametrize("given", ["http://box.lan", "*.lan", "a.lan,b.lan", "box.lan/", ""])
def test_what_is_not_a_name_is_refused_at_the_start(given):
    with pytest.raises(ValueError, match="--allowed-host"):
        Hosts("127.0.0.1", [given])


def test_a_stream_without_news_gives_a_sign_of_life():
    with running_server(keep_alive_seconds=0.05) as server, held(server.engine) as release:
        connection, response = server.begin("Hello")
        assert response.readline() == b"\n"
        lines = [response.readline() for _ in range(4)]
        assert lines[0].startswith(b": ") and lines[1] == b"\n" and lines[2:] == lines[:2]
        release.set()
        rest = response.read().decode()
        assert rest.endswith("data: [DONE]\n\n") and ": " not in rest.split("data: ", 1)[0].replace(": still", "")
        connection.close()


def test_gpu_memory_is_among_the_metrics(monkeypatch):
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 10)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 20)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 15)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (60, 80))
    model = types.SimpleNamespace(device=torch.device("cuda", 1))
    cache = types.SimpleNamespace(layers=[])
    engine = types.SimpleNamespace(model=model, cache=cache, stats=lambda: dict.fromkeys(ENGINE_FIGURES, 0))
    metrics = Metrics()
    metrics.add_model("m", [engine])
    seen = {}
    for kind in ("tensors", "reserved", "peak", "total"):
        labels = {"device": "cuda:1", "kind": kind}
        seen[kind] = metrics.registry.get_sample_value("nanochat_gpu_memory_bytes", labels)
    assert seen == {"tensors": 10, "reserved": 20, "peak": 15, "total": 80}


# ---- Sockets

GARBAGE = [
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",  # a TLS hello
    b"GET / HTTP/9.9\r\n\r\n",
    b"\r\n" * 1000,
    b"POST /v1/chat/completions HTTP/1.1\r\nHost: [::]\r\nContent-Length: -5\r\n\r\n",
    b"POST /v1/chat/completions HTTP/1.1\r\nHost: [::]\r\nContent-Length: 99999999999\r\n\r\n{",
    b"POST /v1/chat/completions HTTP/1.1\r\nHost: [::]\r\nTransfer-Encoding: chunked\r\n\r\nZZ\r\n",
    b"POST /v1/completions HTTP/1.1\r\nHost: [::]\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    b"GET /%ff%fe/../../etc/passwd HTTP/1.1\r\nHost: \x00\r\n\r\n",
    b"GET / HTTP/1.1\r\nX: " + b"a" * 300_000 + b"\r\n\r\n",
    bytes(range(256)) * 40,
]


def test_garbage_and_slow_clients_leave_the_server_standing(server):
    half = b"POST /v1/chat/completions HTTP/1.1\r\nHost: [::]\r\nContent-Length: 1000\r\n\r\n{"
    lasting = []
    for data in [*GARBAGE, *(half[: 20 + i] for i in range(100))]:  # half a request each, never finished
        raw = socket.create_connection(("127.0.0.1", server.port), timeout=10)
        with contextlib.suppress(ConnectionError):
            raw.sendall(data)
        lasting.append(raw)
    started = time.time()
    assert server.say("Hello", seed=5) == text_of("Hello")
    assert time.time() - started < 5
    for raw in lasting:
        raw.close()
    assert server.get("/health") == {"status": "ok"} and wait_for(lambda: not server.engine.busy)


def test_a_client_that_leaves_before_a_whole_answer_is_noticed(server):
    """Within the quarter of a second after which a handler looks."""
    body = json.dumps({"messages": HELLO, "logit_bias": {"33": 100}, "max_tokens": 700}).encode()
    head = (
        f"POST {CHAT} HTTP/1.1\r\nHost: [::]\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    with held(server.engine):
        raw = socket.create_connection(("127.0.0.1", server.port), timeout=10)
        raw.sendall(head.encode() + body)
        assert wait_for(lambda: server.models.n_open == 1)
        raw.close()
        left = time.monotonic()
        assert wait_for(lambda: server.models.n_open == 0) is True
        assert time.monotonic() - left < 2  # on a busy machine
