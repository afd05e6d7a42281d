"""The HTTP server, over real sockets, a real engine and a real (tiny) model."""

import base64
import contextlib
import http.client
import json
import re
import socket
import threading
import time

import pytest
from tiny_chat import ANSWERS, running_server, text_of, tiny_chat

from nanochat.conversation import render_for_completion
from nanochat.engine import Engine
from nanochat.serve.app import read_api_keys
from nanochat.serve.schema import ApiError, ChatRequest, CompletionRequest, read_body
from nanochat.serve.service import ServerConfig


@pytest.fixture(scope="module")
def server():
    with running_server() as (engine, port):
        yield engine, port


def request(port, method, path, body=None, headers=None):
    """(status, headers, body bytes) of one request."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    data = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
    connection.request(method, path, data, {"Content-Type": "application/json", **(headers or {})})
    response = connection.getresponse()
    result = response.status, dict(response.getheaders()), response.read()
    connection.close()
    return result


def chat(port, *contents, **options):
    """The completion object after messages alternating from the user's."""
    messages = [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]
    status, _, body = request(port, "POST", "/v1/chat/completions", {"messages": messages, **options})
    return status, json.loads(body)


def stream(port, question, **options):
    """The data lines of a streamed completion."""
    body = {"messages": [{"role": "user", "content": question}], "stream": True, **options}
    status, headers, data = request(port, "POST", "/v1/chat/completions", body)
    assert status == 200 and headers["Content-Type"].startswith("text/event-stream")
    lines = data.decode().split("\n\n")
    assert lines.pop() == "" and all(line.startswith("data: ") for line in lines)
    return [line.removeprefix("data: ") for line in lines]


def wait_until_idle(engine):
    deadline = time.time() + 10
    while engine.busy and time.time() < deadline:
        time.sleep(0.02)
    return not engine.busy


def test_page_health_and_models(server):
    _, port = server
    status, headers, page = request(port, "GET", "/")
    assert status == 200 and headers["Content-Type"].startswith("text/html")
    assert b"https://" not in page and b'src="http' not in page  # asks nothing of other machines
    assert json.loads(request(port, "GET", "/health")[2]) == {"status": "ok"}
    models = json.loads(request(port, "GET", "/v1/models")[2])
    assert models["object"] == "list" and [model["id"] for model in models["data"]] == ["tiny"]


def test_an_answer_with_a_tool_call(server):
    _, port = server
    status, reply = chat(port, "What is 37*48?", model="tiny", temperature=0)
    (choice,) = reply["choices"]
    assert status == 200 and reply["object"] == "chat.completion" and reply["model"] == "tiny"
    assert choice["finish_reason"] == "stop" and choice["index"] == 0
    assert choice["message"] == {
        "role": "assistant",
        "content": "37*48 is 1776.",
        "tool_trace": [{"expression": "37*48", "result": "1776"}],
    }
    usage = reply["usage"]
    assert usage["prompt_tokens"] + usage["completion_tokens"] == usage["total_tokens"] > 10


@pytest.mark.parametrize("question", list(ANSWERS))
def test_stream_equals_the_whole_answer(server, question):
    _, port = server
    *chunks, done = stream(port, question)
    chunks = [json.loads(chunk) for chunk in chunks]
    assert done == "[DONE]"
    assert len({chunk["id"] for chunk in chunks}) == 1
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    reasons = [chunk["choices"][0]["finish_reason"] for chunk in chunks]
    assert deltas[0]["role"] == "assistant" and not any("role" in delta for delta in deltas[1:])
    assert deltas[-1] == {} and reasons == [None] * (len(reasons) - 1) + ["stop"]
    whole = chat(port, question)[1]["choices"][0]["message"]
    assert "".join(delta.get("content", "") for delta in deltas) == whole["content"] == text_of(question)
    assert [d["tool_trace"] for d in deltas if "tool_trace" in d] == whole.get("tool_trace", [])
    assert len(deltas) > 5


def test_history_with_tool_parts_and_lengths(server):
    _, port = server
    status, reply = chat(port, "What is 37*48?", ANSWERS["What is 37*48?"], "Hello", max_tokens=3)
    assert status == 200 and reply["choices"][0]["finish_reason"] == "length"
    assert reply["usage"]["completion_tokens"] == 3
    parts = [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}]
    assert chat(port, parts)[1]["choices"][0]["message"]["content"] == text_of("Hello")
    turns = ["Hello", text_of("Hello")] * 60
    status, reply = chat(port, *turns, "What is 37*48?")  # far past the context
    assert status == 200 and reply["choices"][0]["message"]["content"] == "37*48 is 1776."


def test_a_seed_repeats_an_answer(server):
    _, port = server
    draw = {"temperature": 2, "max_tokens": 12}
    answers = [chat(port, "Hello", seed=seed, **draw)[1]["choices"][0]["message"] for seed in (1, 1, 2, 3, 4)]
    assert answers[0] == answers[1] and len({message["content"] for message in answers}) > 2


def test_many_clients_at_once(server):
    engine, port = server
    answers = {}

    def ask(i, question):
        answers[i] = question, chat(port, question)[1]["choices"][0]["message"]["content"]

    threads = [threading.Thread(target=ask, args=(i, q)) for i, q in enumerate(list(ANSWERS) * 3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(answers) == 15 and all(content == text_of(question) for question, content in answers.values())
    assert wait_until_idle(engine)


HELLO = [{"role": "user", "content": "Hello"}]
BAD_BODIES = [
    ({"messages": HELLO, "tools": [{}]}, "tools"),
    ({"messages": HELLO, "priority": 1}, "priority"),
    ({"messages": HELLO, "colour": "red"}, "colour"),
    ({"messages": HELLO, "response_format": {"type": "json_object"}}, "response_format"),
    ({"messages": HELLO, "temperature": -1}, "temperature"),
    ({"messages": HELLO, "temperature": "hot"}, "temperature"),
    ({"messages": HELLO, "temperature": True}, "temperature"),
    ({"messages": HELLO, "temperature": float("nan")}, "temperature"),
    ({"messages": HELLO, "top_k": -1}, "top_k"),
    ({"messages": HELLO, "top_k": 1.5}, "top_k"),
    ({"messages": HELLO, "top_p": 0}, "top_p"),
    ({"messages": HELLO, "min_p": 2}, "min_p"),
    ({"messages": HELLO, "repetition_penalty": 0}, "repetition_penalty"),
    ({"messages": HELLO, "presence_penalty": 3}, "presence_penalty"),
    ({"messages": HELLO, "frequency_penalty": "1"}, "frequency_penalty"),
    ({"messages": HELLO, "logit_bias": {"x": 1}}, "logit_bias"),
    ({"messages": HELLO, "logit_bias": {"100000": 1}}, "logit_bias"),
    ({"messages": HELLO, "logit_bias": {"1": 101}}, "logit_bias"),
    ({"messages": HELLO, "logprobs": 3}, "logprobs"),
    ({"messages": HELLO, "top_logprobs": 3}, "top_logprobs"),
    ({"messages": HELLO, "logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    ({"messages": HELLO, "stop": ""}, "stop"),
    ({"messages": HELLO, "stop": ["a", 5]}, "stop"),
    ({"messages": HELLO, "stop": list("abcde")}, "stop"),
    ({"messages": HELLO, "n": 0}, "n"),
    ({"messages": HELLO, "n": 2, "session_id": "s"}, "n"),
    ({"messages": HELLO, "session_id": "../etc"}, "session_id"),
    ({"messages": HELLO, "max_tokens": 0}, "max_tokens"),
    ({"messages": HELLO, "max_tokens": 1, "max_completion_tokens": 2}, "max_tokens"),
    ({"messages": HELLO, "seed": "x"}, "seed"),
    ({"messages": HELLO, "seed": 2**64}, "seed"),
    ({"messages": HELLO, "stream": "yes"}, "stream"),
    ({"messages": HELLO, "stream_options": {"include_usage": True}}, "stream_options"),
    ({"messages": HELLO, "stream": True, "stream_options": {"speed": 9}}, "stream_options"),
    ({"messages": HELLO, "user": 5}, "user"),
    ({}, "messages"),
    ({"messages": []}, "messages"),
    ({"messages": "Hello"}, "messages"),
    ({"messages": ["Hello"]}, "messages"),
    ({"messages": [{"role": "user"}]}, "messages"),
    ({"messages": [{"role": "user", "content": ""}]}, "messages"),
    ({"messages": [{"role": "user", "content": 5}]}, "messages"),
    ({"messages": [{"role": "user", "content": []}]}, "messages"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url", "text": "x"}]}]}, "messages"),
    ({"messages": [{"role": "user", "content": [{"type": "python", "text": "1+1"}]}]}, "messages"),
    ({"messages": [{"role": "user", "content": [{"type": ["text"], "text": "x"}]}]}, "messages"),
    ({"messages": [{"role": "user", "content": "x", "name": "Ada"}]}, "messages"),
    ({"messages": [{"role": "wizard", "content": "Hello"}]}, "messages"),
    ({"messages": [{"role": "system", "content": "Hello"}]}, "messages"),
    ({"messages": HELLO + HELLO}, "messages"),
    ({"messages": [*HELLO, {"role": "assistant", "content": "Hi"}]}, "messages"),
    ([1], None),
]


@pytest.mark.parametrize(("body", "param"), BAD_BODIES)
def test_bad_bodies_are_named(server, body, param):
    _, port = server
    status, _, data = request(port, "POST", "/v1/chat/completions", body)
    error = json.loads(data)["error"]
    assert (status, error["param"]) == (400, param) and error["type"] == "invalid_request_error"
    assert set(error) == {"message", "type", "param", "code"} and (param or "").rstrip("s") in error["message"]


BAD_PROMPTS = [
    5,
    [],
    [[]],
    ["a", 5],
    [1, "a"],
    [-1],
    [10**6],
    [True],
    [1.5],
    {"a": 1},
    [list(range(5)), "a"],
    [0] * 800,
]


@pytest.mark.parametrize("prompt", BAD_PROMPTS, ids=repr)
def test_bad_prompts_are_named(server, prompt):
    _, port = server
    status, _, data = request(port, "POST", "/v1/completions", {"prompt": prompt})
    assert status == 400 and json.loads(data)["error"]["param"] == "prompt"


def test_other_refusals_have_the_same_shape(server):
    _, port = server
    path, body = "/v1/chat/completions", {"messages": HELLO}
    for status, answer in [
        (404, request(port, "POST", path, {**body, "model": "gpt-9"})),
        (404, request(port, "GET", "/v1/nothing")),
        (405, request(port, "GET", path)),
        (405, request(port, "POST", "/v1/models", {})),
        (400, request(port, "POST", path, b"{not json")),
        (400, request(port, "POST", path, b"\xff\xfe")),
        (400, request(port, "POST", path, b"[" * 500_000)),
        (400, request(port, "POST", path, b'{"\xed\xa0\x80": 1}')),  # half a surrogate pair, not UTF-8
        (400, request(port, "POST", path, json.dumps(body).encode("utf-16"))),
        (400, request(port, "POST", path, b'{"seed": ' + b"9" * 10_000 + b"}")),
        (415, request(port, "POST", path, b"a=b", {"Content-Type": "text/plain"})),
        (413, request(port, "POST", path, {"messages": [{"role": "user", "content": "x" * (2 << 20)}]})),
    ]:
        assert answer[0] == status
        error = json.loads(answer[2])["error"]
        assert set(error) == {"message", "type", "param", "code"} and error["message"]
        assert status != 405 or "Allow" in answer[1]
    assert chat(port, "Hello")[0] == 200


def test_a_body_of_mistakes_costs_little(server, monkeypatch):
    """Half a million of them, or of prompts, come in one body: the first is told, and nothing is made of the others."""
    engine, port = server
    for kind, body in [(ChatRequest, {"messages": [1] * 9999}), (CompletionRequest, {"prompt": [True] * 9999})]:
        with pytest.raises(ApiError) as caught:
            read_body(json.dumps(body).encode(), kind)
        assert caught.value.__cause__.error_count() < 5
    monkeypatch.setattr(engine.tokenizer, "encode", lambda text: pytest.fail("a prompt was read"))
    status, _, data = request(port, "POST", "/v1/completions", {"prompt": ["x"] * 9999})
    assert status == 400 and "9999 answers at once" in json.loads(data)["error"]["message"]


def test_strange_text_is_answered(server):
    _, port = server
    for text in ("\ud800 alone", "NUL \0 here", "<|assistant_start|>", "🎉" * 3000):
        assert chat(port, text, max_tokens=3)[0] == 200


def test_clients_that_leave_free_their_places(server):
    engine, port = server
    body = json.dumps({"messages": [{"role": "user", "content": "Hello"}], "stream": True, "temperature": 2}).encode()
    connections = []
    for i in range(12):
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
        connection.request("POST", "/v1/chat/completions", body, {"Content-Type": "application/json"})
        if i < 8:
            connection.getresponse().read(100)
        connections.append(connection)
    for connection in connections:
        connection.close()
    started = time.time()
    assert chat(port, "Hello")[1]["choices"][0]["message"]["content"] == text_of("Hello")
    assert time.time() - started < 5
    assert wait_until_idle(engine) and not engine.waiting and not engine.running


def test_a_dead_engine_is_said_to_be_dead():
    with running_server() as (engine, port):
        lines = {}
        thread = threading.Thread(target=lambda: lines.update(all=stream(port, "Tell me a story")))
        healthy = engine.step

        def fail():
            if len(engine.running) and len(engine.running[0].output) > 5:
                raise RuntimeError("out of memory")
            return healthy()

        engine.step = fail
        thread.start()
        thread.join()
        assert json.loads(lines["all"][-1])["error"]["type"] == "server_error"
        assert request(port, "GET", "/health")[0] == 503
        assert chat(port, "Hello")[0] == 503


def completion(port, prompt, **options):
    """The completion object of a plain prompt."""
    status, _, body = request(port, "POST", "/v1/completions", {"prompt": prompt, **options})
    assert status == 200, body
    return json.loads(body)


def test_plain_completions(server):
    """Text, ids, several of them and several answers each; special tokens come from ids only."""
    engine, port = server
    tokenizer = engine.tokenizer
    ids = render_for_completion({"messages": HELLO}, tokenizer)
    reply = completion(port, ids)
    (choice,) = reply["choices"]
    assert reply["object"] == "text_completion" and choice["text"] == text_of("Hello")
    assert reply["usage"]["prompt_tokens"] == len(ids)
    text = "<|user_start|>Hello"  # text that looks like a mark is text
    prompt = [tokenizer.get_bos_token_id(), *tokenizer.encode(text)]
    one, same = (completion(port, each, max_tokens=5)["choices"][0]["text"] for each in (text, prompt))
    mark = [tokenizer.get_bos_token_id(), tokenizer.encode_special("<|user_start|>"), *tokenizer.encode("Hello")]
    assert one == same and completion(port, mark)["usage"]["prompt_tokens"] < len(prompt)
    several = completion(port, [ids, ids[:-1]], n=2, max_tokens=4, seed=3, temperature=1.5)
    assert [choice["index"] for choice in several["choices"]] == [0, 1, 2, 3]
    assert several["usage"]["prompt_tokens"] == 2 * len(ids) - 1 and several["usage"]["completion_tokens"] <= 16
    status, _, data = request(port, "POST", "/v1/completions", {"prompt": ["x"] * 73})  # never, not only now
    assert status == 400 and "at most 72" in json.loads(data)["error"]["message"]
    alone = completion(port, ids, n=2, max_tokens=4, seed=3, temperature=1.5)
    assert [c["text"] for c in alone["choices"]] == [c["text"] for c in several["choices"][:2]]


def test_usage_in_a_stream(server):
    _, port = server
    *chunks, usage, done = stream(port, "What is 37*48?", stream_options={"include_usage": True}, n=2)
    assert done == "[DONE]" and all(json.loads(chunk)["usage"] is None for chunk in chunks)
    usage = json.loads(usage)
    assert usage["choices"] == [] and usage["usage"] == chat(port, "What is 37*48?", n=2)[1]["usage"]
    said = [json.loads(chunk)["choices"][0] for chunk in chunks]
    for index in (0, 1):
        mine = [choice for choice in said if choice["index"] == index]
        assert "".join(c["delta"].get("content", "") for c in mine) == "37*48 is 1776."
        assert mine[0]["delta"]["role"] == "assistant" and mine[-1]["finish_reason"] == "stop"


def test_sampling_parameters_reach_the_engine(server):
    """Each parameter does what it says, seen from outside."""
    engine, port = server
    text = text_of("Hello")
    token = engine.tokenizer.encode("!")[0]

    def said(**options):
        return chat(port, "Hello", **options)[1]["choices"][0]["message"]["content"]

    assert said() == text
    hot = {"temperature": 2, "max_tokens": 12}
    assert len({said(seed=i, **hot) for i in range(5)}) > 2
    for narrow in ({"top_k": 1}, {"top_p": 1e-9}, {"min_p": 1.0}):
        assert {said(seed=i, **hot, **narrow) for i in range(3)} == {said(max_tokens=12)}
    assert "!" in said() and "!" not in said(logit_bias={str(token): -100})
    assert said(logit_bias={str(token): 100}, max_tokens=4) == "!!!!"
    drawn = [said(seed=i, **hot) for i in range(4)]
    for penalty in ({"presence_penalty": 2}, {"frequency_penalty": 2}, {"repetition_penalty": 10}):
        assert [said(seed=i, **hot, **penalty) for i in range(4)] != drawn


def test_stop_texts_never_show(server):
    """Whatever is asked for, and wherever tokens and characters are cut, a stream shows what the whole answer has."""
    _, port = server
    text = text_of("Hello")
    for stop in ("tiny", "🎉", "lo! Gr", ["zzz", "ß"], ["!", "Hello!"], "H", "never said"):
        stops = [stop] if isinstance(stop, str) else stop
        cut = min((text.find(s) for s in stops if s in text), default=len(text))
        (choice,) = chat(port, "Hello", stop=stop)[1]["choices"]
        assert (choice["message"]["content"], choice["finish_reason"]) == (text[:cut], "stop")
        chunks = [json.loads(line) for line in stream(port, "Hello", stop=stop)[:-1]]
        pieces = [chunk["choices"][0]["delta"].get("content", "") for chunk in chunks]
        assert "".join(pieces) == text[:cut]


def test_logprobs(server):
    """They are those of the model itself; a stream has the same; both formats."""
    engine, port = server
    ids = render_for_completion({"messages": HELLO}, engine.tokenizer)
    (choice,) = chat(port, "Hello", logprobs=True, top_logprobs=3)[1]["choices"]
    content = choice["logprobs"]["content"]
    data = bytes(byte for entry in content for byte in entry["bytes"])
    assert data.decode() == text_of("Hello") == choice["message"]["content"]
    reply = completion(port, ids, logprobs=2)["choices"][0]["logprobs"]
    assert reply["token_logprobs"] == [entry["logprob"] for entry in content]
    assert [len(top) for top in reply["top_logprobs"]] == [2] * len(content)
    assert reply["text_offset"][:2] == [0, len(reply["tokens"][0])]
    for entry in content:
        assert entry["top_logprobs"][0]["logprob"] == entry["logprob"]  # greedy: the likeliest is said
        assert len(entry["top_logprobs"]) == 3 and entry["logprob"] <= 0
    chunks = [json.loads(line)["choices"][0] for line in stream(port, "Hello", logprobs=True, top_logprobs=3)[:-1]]
    assert [e for chunk in chunks if chunk["logprobs"] for e in chunk["logprobs"]["content"]] == content


def test_a_session(server):
    """Only what is new is sent; the answer, the accounting and the end of it are the server's."""
    _, port = server
    status, first = chat(port, "What is 37*48?", session_id="s1")
    assert status == 200 and first["session"]["turns"] == 1 and first["session"]["context"] == 768
    assert first["session"]["tokens"] == first["usage"]["total_tokens"]
    *_, end, done = stream(port, "Hello", session_id="s1")
    account = json.loads(end)["session"]
    assert done == "[DONE]" and account["turns"] == 2 and account["dropped_turns"] == 0
    whole = chat(port, "What is 37*48?", ANSWERS["What is 37*48?"], "Hello")[1]["usage"]
    assert account["tokens"] == whole["total_tokens"]
    status, _, kept = request(port, "GET", "/v1/sessions/s1")
    kept = json.loads(kept)
    assert status == 200 and [message["role"] for message in kept["messages"]] == ["user", "assistant"] * 2
    assert kept["messages"][1]["content"] == ANSWERS["What is 37*48?"]
    turns = [chat(port, "Tell me a story", session_id="s1", max_tokens=60)[1]["session"] for _ in range(20)]
    assert turns[1]["cached_tokens"] > 40  # of the turns before, read then
    last = turns[-1]
    assert last["dropped_turns"] + last["turns"] == 22 and last["dropped_turns"] > 3 and last["tokens"] <= 768
    assert chat(port, "Hello", session_id="s2")[1]["session"]["turns"] == 1
    assert json.loads(request(port, "DELETE", "/v1/sessions/s1")[2]) == {"id": "s1", "deleted": True}
    assert request(port, "GET", "/v1/sessions/s1")[0] == request(port, "DELETE", "/v1/sessions/s1")[0] == 404


def test_a_session_survives_what_goes_wrong(server):
    engine, port = server
    chat(port, "Hello", session_id="s3")
    body = {"messages": [{"role": "assistant", "content": "Hi"}, *HELLO], "session_id": "s3"}
    assert request(port, "POST", "/v1/chat/completions", body)[0] == 400
    with held(engine):
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
        body = {"messages": HELLO, "session_id": "s3", "stream": True}
        connection.request("POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"})
        connection.getresponse().read(20)
        assert chat(port, "Hello", session_id="s3")[1]["error"]["code"] == "session_busy"
        connection.close()
        time.sleep(1)  # the server looks four times a second
    assert wait_until_idle(engine)
    assert chat(port, "Hello", session_id="s3")[1]["session"]["turns"] == 2


@contextlib.contextmanager
def answering(engine, port, **options):
    """While a question is answered, from its first step on; the list has the status and the reply afterwards."""
    reply, lines = [], {"max_tokens": 4, **options}
    with held(engine):
        thread = threading.Thread(target=lambda: reply.extend(chat(port, "Hello", **lines)))
        thread.start()
        while not engine.busy:
            time.sleep(0.01)
        yield reply
        engine.release.set()
        thread.join()


def test_what_is_deleted_while_it_answers_stays_deleted(server):
    """A session with its answer on the way, its first as well as a later one; and kept answers."""
    engine, port = server
    for turns in range(2):
        for _ in range(turns):
            chat(port, "Hello", session_id="d")
        with answering(engine, port, session_id="d") as reply:
            assert request(port, "DELETE", "/v1/sessions/d")[0] == 200
        assert reply[0] == 200 and reply[1]["session"]["turns"] == turns + 1
        assert request(port, "GET", "/v1/sessions/d")[0] == 404
    assert chat(port, "Hello", session_id="d")[1]["session"]["turns"] == 1
    body = {"messages": HELLO, "seed": 77, "max_tokens": 4}
    with answering(engine, port, seed=77):
        request(port, "POST", "/cache/invalidate")
    caches = [request(port, "POST", "/v1/chat/completions", body)[1]["X-Cache"] for _ in range(2)]
    assert caches == ["miss", "hit"]


def test_a_session_of_two_models():
    """Each has its own; the newest is shown, and all are deleted together."""
    other = Engine(*tiny_chat(), max_batch=1), None
    with running_server(more={"other": other}) as (_, port):
        for model in ("tiny", "other", "other"):
            assert chat(port, "Hello", model=model, session_id="s", max_tokens=2)[0] == 200
            time.sleep(0.15)  # times are told in tenths of a second
        assert json.loads(request(port, "GET", "/v1/sessions/s")[2])["model"] == "other"
        assert [request(port, "DELETE", "/v1/sessions/s")[0] for _ in range(2)] == [200, 404]


def test_sessions_end_by_time_and_number():
    def kept(port):
        return [request(port, "GET", f"/v1/sessions/{name}")[0] == 200 for name in "abc"]

    with running_server(max_sessions=2) as (_, port):
        for name in ("a", "b", "a", "c"):
            assert chat(port, "Hello", session_id=name)[0] == 200
        assert kept(port) == [True, False, True]
    with running_server(session_seconds=0.3) as (_, port):
        assert chat(port, "Hello", session_id="a")[1]["session"]["expires_in"] == 0.3
        time.sleep(0.35)
        assert kept(port) == [False, False, False]


def test_answers_are_kept_while_they_are_the_same():
    """Deterministic requests only; stream and whole share them; by time, by size, and on demand they go."""

    def cached(question, **options):
        body = {"messages": [{"role": "user", "content": question}], **options}
        _, headers, data = request(port, "POST", "/v1/chat/completions", body)
        return headers["X-Cache"] == "hit", data

    with running_server(temperature=1.0) as (_, port):
        for options in ({"temperature": 0}, {"seed": 5, "n": 2}):
            hit, data = cached("What is 37*48?", **options)
            again, same = cached("What is 37*48?", **options)
            assert (hit, again) == (False, True) and json.loads(data)["choices"] == json.loads(same)["choices"]
            assert (
                json.loads(data)["usage"] == json.loads(same)["usage"] and json.loads(data)["id"] not in same.decode()
            )
            again, lines = cached("What is 37*48?", **options, stream=True)
            *lines, done, _ = lines.decode().split("\n\n")
            deltas = [json.loads(line.removeprefix("data: "))["choices"][0]["delta"] for line in lines]
            assert again and done == "data: [DONE]"
            whole = [choice["message"]["content"] for choice in json.loads(data)["choices"]]
            assert "".join(delta.get("content", "") for delta in deltas) == "".join(whole)
        assert [cached("Hello", max_tokens=4)[0] for _ in range(2)] == [False, False]  # drawn anew each time
        assert not cached("What is 37*48?", seed=6)[0]
        assert json.loads(request(port, "POST", "/cache/invalidate")[2])["responses"] == 3
        assert not cached("What is 37*48?", temperature=0)[0]
    with running_server(cache_seconds=0.3) as (_, port):
        for _ in range(2):
            assert not cached("Hello")[0]
            time.sleep(0.35)
    with running_server(cache_mb=2e-3) as (_, port):
        assert [cached("Hello", max_tokens=4)[0] for _ in range(2)] == [False, True]
        assert [cached("Tell me a story")[0] for _ in range(2)] == [False, False]  # larger than all of the cache
    with running_server(cache_mb=0) as (_, port):
        assert [cached("Hello", max_tokens=4)[0] for _ in range(2)] == [False, False]


def test_who_ends_answers_nothing_not_even_from_memory():
    with running_server() as (engine, port):
        assert [chat(port, "Hello", max_tokens=2)[0] for _ in range(2)] == [200, 200]
        with answering(engine, port):
            engine.step = lambda: 1 / 0
        assert [chat(port, "Hello", max_tokens=2)[0] for _ in range(2)] == [503, 503]


def test_a_full_queue_says_when_to_come_back():
    with running_server(max_batch=1, max_waiting=1) as (engine, port), held(engine):
        threads = [threading.Thread(target=chat, args=(port, "Hello")) for _ in range(2)]
        for thread in threads:
            thread.start()
        while json.loads(request(port, "GET", "/stats")[2])["models"]["tiny"]["open_requests"] < 2:
            time.sleep(0.02)
        status, headers, data = request(port, "POST", "/v1/chat/completions", {"messages": HELLO})
        assert status == 429 and 1 <= int(headers["Retry-After"]) <= 60
        assert json.loads(data)["error"]["code"] == "queue_full"
        assert request(port, "GET", "/health")[0] == 200
        engine.release.set()
        for thread in threads:
            thread.join()
        assert chat(port, "Hello")[0] == 200


@contextlib.contextmanager
def held(engine):
    """An engine whose next step waits for `engine.release`."""
    engine.release, step = threading.Event(), engine.step

    def wait():
        engine.release.wait(20)
        return step()

    engine.step = wait
    try:
        yield engine
    finally:
        engine.release.set()
        engine.step = step


def test_keys(tmp_path, monkeypatch):
    """Everything but /health wants one, as bearer token or as a password; sessions belong to their key."""
    (tmp_path / "keys").write_text("\ufefffirst-key-0\n# ours\n\n second-key \n")
    monkeypatch.setenv("NANOCHAT_API_KEYS", "third-key-x,")
    basic = "Basic " + base64.b64encode(b"anyone:second-key").decode()
    with running_server(api_keys=str(tmp_path / "keys")) as (_, port):
        assert request(port, "GET", "/health")[0] == 200
        paths = ["/", "/stats", "/metrics", "/openapi.json", "/v1/models", "/v1/sessions/x", "/nothing"]
        for path in paths:
            status, headers, data = request(port, "GET", path)
            assert status == 401 and "Basic" in headers["Www-Authenticate"]
            assert json.loads(data)["error"]["code"] == "invalid_api_key"
        wrong = [
            "Bearer ",
            "Bearer wrong-key",
            "Bearer first-key",
            "Bearer first-key-0x",
            "Basic !",
            "first-key-0",
            "Bearer é",
        ]
        for header in wrong:
            headers = {"Authorization": header.encode("latin-1")}
            assert request(port, "POST", "/v1/chat/completions", {"messages": HELLO}, headers)[0] == 401
        for header in ("Bearer first-key-0", "Bearer third-key-x", basic):
            headers = {"Authorization": header}
            body = {"messages": HELLO, "session_id": "mine"}
            reply = request(port, "POST", "/v1/chat/completions", body, headers)
            assert reply[0] == 200 and json.loads(reply[2])["session"]["turns"] == 1  # none sees another's
            assert request(port, "GET", "/", headers=headers)[0] == 200
    for text, what in (("short\n", "8 characters"), ("# none\n", "no key")):
        (tmp_path / "keys").write_text(text)
        with pytest.raises(ValueError, match=what):
            read_api_keys(str(tmp_path / "keys"))


def test_other_origins_are_let_in_only_when_asked(server):
    _, port = server
    here = {"Origin": "https://a.example", "Access-Control-Request-Method": "POST"}
    for method in ("GET", "OPTIONS"):
        headers = request(port, method, "/v1/models", headers=here)[1]
        assert not any(name.startswith("Access-Control") for name in headers)
    with running_server(cors_origin="https://a.example, https://b.example/") as (_, port):
        asked = {"Access-Control-Request-Headers": "authorization,content-type,x-stainless-lang"}  # as openai-node does
        status, headers, _ = request(port, "OPTIONS", "/v1/chat/completions", headers={**here, **asked})
        assert status == 204 and headers["Access-Control-Allow-Origin"] == "https://a.example"
        assert headers["Access-Control-Allow-Headers"] == asked["Access-Control-Request-Headers"]
        status, headers, _ = request(port, "OPTIONS", "/", headers={**here, "Origin": "https://b.example"})
        assert status == 204 and "Authorization" in headers["Access-Control-Allow-Headers"]
        assert request(port, "GET", "/v1/models", headers=here)[1]["Access-Control-Allow-Origin"] == "https://a.example"
        other = request(port, "GET", "/v1/models", headers={"Origin": "https://c.example"})[1]
        assert "Access-Control-Allow-Origin" not in other and "Origin" in other["Vary"]


def test_the_access_log_tells_what_was_done_and_not_what_was_said(server, caplog):
    _, port = server
    caplog.set_level("INFO", "nanochat.access")
    mine = {"X-Request-Id": "my-id.1"}
    secret = "What is 37*48?"
    body = {"messages": [{"role": "user", "content": secret}], "user": "ada\nline"}
    headers = request(port, "POST", "/v1/chat/completions", body, mine)[1]
    assert headers["X-Request-Id"] == "my-id.1"
    made = request(port, "GET", "/v1/nothing?q=secret", headers={"X-Request-Id": "not one\tword"})[1]["X-Request-Id"]
    assert re.fullmatch("[0-9a-f]{32}", made)
    stream(port, secret)
    deadline = time.time() + 5
    while len(caplog.records) < 3 and time.time() < deadline:
        time.sleep(0.02)
    lines = [json.loads(record.getMessage()) for record in caplog.records]
    assert [line["status"] for line in lines] == [200, 404, 200] and lines[0]["request_id"] == "my-id.1"
    assert lines[0]["user"] == "ada\nline" and lines[0]["completion_tokens"] > 5 and lines[0]["finish_reason"] == "stop"
    assert lines[1]["path"] == "/v1/nothing" and lines[2]["stream"] and lines[2]["completion_tokens"] > 5
    assert all(line["seconds"] >= 0 and line["time"] for line in lines)
    assert not any(word in caplog.text for word in ("37*48", "1776", "secret"))


def scrape(port):
    """Sample -> value of /metrics."""
    lines = request(port, "GET", "/metrics")[2].decode().splitlines()
    return {line.rsplit(" ", 1)[0]: float(line.rsplit(" ", 1)[1]) for line in lines if not line.startswith("#")}


def test_metrics_count_what_was_done():
    with running_server() as (engine, port):
        usages = [chat(port, question)[1]["usage"] for question in ("Hello", "What is 37*48?")]
        usages.append(chat(port, "Hello", max_tokens=3)[1]["usage"])
        request(port, "GET", "/nothing")
        chat(port, "Hello")  # from the cache: made no tokens
        assert wait_until_idle(engine)
        seen, of = scrape(port), '{model_name="tiny"}'
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
        stats = json.loads(request(port, "GET", "/stats")[2])["models"]["tiny"]
        assert stats["output_tokens"] == seen[f"nanochat_generation_tokens_total{of}"] and stats["context"] == 768


def test_a_limit_on_every_answer():
    with running_server(max_tokens=4) as (_, port):
        for options in ({}, {"max_tokens": 100}):
            assert chat(port, "Hello", **options)[1]["usage"]["completion_tokens"] == 4
        assert chat(port, "Hello", max_tokens=2)[1]["usage"]["completion_tokens"] == 2


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        *[(name, 0) for name in ("max_batch", "max_tokens", "max_body", "max_sessions", "session_seconds")],
        *[(name, -1) for name in ("cache_seconds", "max_waiting", "cache_mb")],
        ("temperature", float("nan")),
    ],
)
def test_flags_with_which_nothing_could_be_answered(flag, value):
    with pytest.raises(ValueError, match=f"--{flag.replace('_', '-')} {value}"):
        ServerConfig(**{flag: value})


GARBAGE = [
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",  # a TLS hello
    b"GET / HTTP/9.9\r\n\r\n",
    b"\r\n" * 1000,
    b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: -5\r\n\r\n",
    b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 99999999999\r\n\r\n{",
    b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nZZ\r\n",
    b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    b"GET /%ff%fe/../../etc/passwd HTTP/1.1\r\nHost: \x00\r\n\r\n",
    b"GET / HTTP/1.1\r\nX: " + b"a" * 300_000 + b"\r\n\r\n",
    bytes(range(256)) * 40,
]


def test_garbage_and_slow_clients_leave_the_server_standing(server):
    engine, port = server
    lasting = []
    for data in GARBAGE:
        raw = socket.create_connection(("127.0.0.1", port), timeout=10)
        with contextlib.suppress(ConnectionError):
            raw.sendall(data)
        lasting.append(raw)
    for i in range(100):  # half a request each, never finished
        raw = socket.create_connection(("127.0.0.1", port), timeout=10)
        raw.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n{"[: 20 + i])
        lasting.append(raw)
    started = time.time()
    assert chat(port, "Hello")[1]["choices"][0]["message"]["content"] == text_of("Hello")
    assert time.time() - started < 5
    for raw in lasting:
        raw.close()
    assert request(port, "GET", "/health")[0] == 200 and wait_until_idle(engine)
