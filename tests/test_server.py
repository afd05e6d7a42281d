"""The HTTP server, over real sockets, a real engine and a real (tiny) model."""

import http.client
import json
import threading
import time

import pytest
from tiny_chat import ANSWERS, running_server, text_of


@pytest.fixture(scope="module")
def server():
    with running_server(model_name="tiny") as (engine, port):
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
    ({"messages": HELLO, "top_p": 0.5}, "top_p"),
    ({"messages": HELLO, "tools": [{}]}, "tools"),
    ({"messages": HELLO, "colour": "red"}, "colour"),
    ({"messages": HELLO, "temperature": -1}, "temperature"),
    ({"messages": HELLO, "temperature": "hot"}, "temperature"),
    ({"messages": HELLO, "temperature": True}, "temperature"),
    ({"messages": HELLO, "temperature": float("nan")}, "temperature"),
    ({"messages": HELLO, "top_k": -1}, "top_k"),
    ({"messages": HELLO, "top_k": 1.5}, "top_k"),
    ({"messages": HELLO, "max_tokens": 0}, "max_tokens"),
    ({"messages": HELLO, "seed": "x"}, "seed"),
    ({"messages": HELLO, "stream": "yes"}, "stream"),
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
    assert status == 400 and error["param"] == param and error["type"] == "invalid_request_error"
    assert set(error) == {"message", "type", "param", "code"} and error["message"]


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
        (415, request(port, "POST", path, b"a=b", {"Content-Type": "text/plain"})),
        (413, request(port, "POST", path, {"messages": [{"role": "user", "content": "x" * (2 << 20)}]})),
    ]:
        assert answer[0] == status
        error = json.loads(answer[2])["error"]
        assert set(error) == {"message", "type", "param", "code"} and error["message"]
        assert status != 405 or "Allow" in answer[1]
    assert chat(port, "Hello")[0] == 200


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
