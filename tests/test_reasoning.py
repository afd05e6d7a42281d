"""What a model says to itself before it answers is told apart from its answer: by the server, and in the terminal."""

import http.client
import json

import pytest
import torch

pytest.importorskip("transformers", reason="the oracle, transformers, is not installed")
import tiny_hf
from tiny_chat import running_server, text_of

from nanochat.compute import Compute
from nanochat.serve.app import create_app_for
from nanochat.serve.loop import Models, ServerConfig
from scripts.chat_cli import Chat, Config

HELLO = [{"role": "user", "content": "Hello"}]


@pytest.fixture(scope="module")
def oss(tmp_path_factory):
    return tiny_hf.scripted_gpt_oss(tmp_path_factory.mktemp("oss"))


@pytest.fixture(scope="module")
def port(oss):
    """Of a server of two models: the tiny one, trained here, and a gpt-oss whose words are known."""
    with running_server(more={"me/oss": oss}) as (_, port, _):
        yield port


def ask(port, method, path, body=None):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
    connection.request(method, path, json.dumps(body) if body else None, {"Content-Type": "application/json"})
    response = connection.getresponse()
    data = response.read()
    connection.close()
    return response.status, data.decode()


def chat(port, **options):
    status, data = ask(port, "POST", "/v1/chat/completions", {"messages": HELLO, "model": "me/oss", **options})
    assert status == 200, data
    return json.loads(data)


def test_the_answer_comes_without_its_reasoning(port):
    reply = chat(port)
    message = {"role": "assistant", "content": tiny_hf.ANSWER, "reasoning_content": tiny_hf.REASONING}
    assert reply["choices"][0]["message"] == message and reply["choices"][0]["finish_reason"] == "stop"
    script = 4 + reply["usage"]["completion_tokens"]
    assert script > len(tiny_hf.ANSWER.encode()) // 4 and reply["model"] == "me/oss"
    again = {"messages": [*HELLO, message, *HELLO], "model": "me/oss"}  # as clients send it back
    bare = {"messages": [*HELLO, {**message, "reasoning_content": None}, *HELLO], "model": "me/oss"}
    counts = [
        json.loads(ask(port, "POST", "/v1/chat/completions", b)[1])["usage"]["prompt_tokens"] for b in (again, bare)
    ]
    assert counts[0] == counts[1]
    assert chat(port, stop=["and", ", "])["choices"][0]["message"]["content"] == "Four", "it ends the answer alone"


def test_a_stream_tells_them_apart(port):
    body = {"messages": HELLO, "model": "me/oss", "stream": True, "logprobs": True, "seed": 5}
    lines = ask(port, "POST", "/v1/chat/completions", body)[1].split("\n\n")
    assert lines[-2] == "data: [DONE]"
    deltas = [json.loads(line.removeprefix("data: "))["choices"][0]["delta"] for line in lines[:-2]]
    assert "".join(delta.get("reasoning_content", "") for delta in deltas) == tiny_hf.REASONING
    assert "".join(delta.get("content", "") for delta in deltas) == tiny_hf.ANSWER
    kinds = [key for delta in deltas for key in delta if key != "role" and delta[key]]
    assert kinds == sorted(kinds, reverse=True), "all reasoning first"


def test_a_session_keeps_the_answer_alone(port):
    for turn in (1, 2):
        assert chat(port, session_id="s")["session"]["turns"] == turn
    kept = json.loads(ask(port, "GET", "/v1/sessions/s")[1])
    assert kept["model"] == "me/oss" and 0 < kept["expires_in"] <= 3600
    assert kept["messages"][1] == {"role": "assistant", "content": [{"type": "text", "text": tiny_hf.ANSWER}]}
    own = chat(port, session_id="s", model="tiny")  # another model knows nothing of it
    assert own["session"]["turns"] == 1 and own["choices"][0]["message"]["content"] == text_of("Hello")


def test_plain_completions_show_all_that_is_said(port):
    body = {"prompt": "Hello", "model": "me/oss"}
    text = json.loads(ask(port, "POST", "/v1/completions", body)[1])["choices"][0]["text"]
    assert tiny_hf.REASONING in text and tiny_hf.ANSWER in text


def test_models_by_name(port):
    """All are listed; a request picks one, without a name the first; each is measured for itself."""
    status, data = ask(port, "GET", "/v1/models")
    assert status == 200 and [model["id"] for model in json.loads(data)["data"]] == ["tiny", "me/oss"]
    assert json.loads(ask(port, "GET", "/v1/models/me/oss")[1])["context_length"] == 1024
    assert chat(port, model=None)["model"] == "tiny"
    for method, path, body in (
        ("GET", "/v1/models/nobody", None),
        ("POST", "/v1/chat/completions", {"messages": HELLO, "model": "oss"}),
        ("POST", "/v1/completions", {"prompt": "x", "model": "me/os"}),
    ):
        status, data = ask(port, method, path, body)
        assert status == 404 and json.loads(data)["error"]["code"] == "model_not_found" and "tiny, me/oss" in data
    before = json.loads(ask(port, "GET", "/stats")[1])["models"]
    metrics = ask(port, "GET", "/metrics")[1]
    assert before["tiny"]["output_tokens"] and before["me/oss"]["output_tokens"]
    for name in before:
        line = f'nanochat_generation_tokens_total{{model_name="{name}"}} {float(before[name]["output_tokens"])}'
        assert line in metrics.splitlines()


def test_a_model_that_is_being_loaded(oss):
    models = Models(ServerConfig(), ["me/oss"])
    client = create_app_for(models).test_client()
    try:
        assert (client.get("/health").status_code, client.get("/health").json) == (503, {"status": "loading"})
        assert client.get("/").status_code == 200 and client.get("/v1/models").json["data"] == []
        body = {"messages": HELLO}
        early = client.post("/v1/chat/completions", json=body)
        assert early.status_code == 503 and early.headers["Retry-After"] and "being loaded" in early.text
        assert client.post("/v1/chat/completions", json={**body, "model": "x"}).status_code == 404
        engine, chat_format = oss
        models.add("me/oss", [engine], chat_format)
        assert (client.get("/health").status_code, client.get("/health").json) == (200, {"status": "ok"})
        reply = client.post("/v1/chat/completions", json=body).json
        assert reply["choices"][0]["message"]["content"] == tiny_hf.ANSWER
    finally:
        models.close()


def test_one_dead_engine_leaves_the_others(tmp_path):
    with running_server(more={"me/oss": tiny_hf.scripted_gpt_oss(tmp_path)}) as (engine, port, _):
        engine.step = lambda: 1 / 0
        assert ask(port, "POST", "/v1/chat/completions", {"messages": HELLO})[0] == 503
        assert ask(port, "GET", "/health") == (503, '{"status":"the engine died: tiny"}\n')
        assert chat(port)["choices"][0]["message"]["content"] == tiny_hf.ANSWER


def test_an_unknown_effort_is_refused_by_its_name(oss):
    with running_server(more={"me/oss": oss}) as server:
        for given, param in [
            ({"reasoning_effort": "xhigh"}, "reasoning_effort"),
            ({"reasoning_effort": "xhigh", "chat_template_kwargs": {"reasoning_effort": "low"}}, "reasoning_effort"),
            ({"chat_template_kwargs": {"reasoning_effort": ["low"]}}, "chat_template_kwargs"),
        ]:
            status, reply = server.chat("Hello", model="me/oss", **given)
            assert status == 400 and reply["error"]["param"] == param and "low, medium, high" in str(reply)


def test_in_the_terminal_reasoning_is_an_aside(oss, capsys):
    engine, form = oss
    talk = Chat(engine, form, Config(), Compute(torch.device("cpu"), torch.float32))
    talk.ask("What is 2 and 2?")
    out, err = capsys.readouterr()
    assert out == f"{tiny_hf.ANSWER}\n"
    assert err.startswith(f"{tiny_hf.REASONING}\n[")
    assert talk.messages[-1]["content"] == [{"type": "text", "text": tiny_hf.ANSWER}]


def test_settings_reach_the_sampler(oss):
    """Each is in the request that the terminal's chat makes of them."""
    engine, form = oss
    config = Config(temperature=0.7, top_k=5, top_p=0.4, max_tokens=9, seed=3, system="Be brief.")
    request = Chat(engine, form, config, Compute(torch.device("cpu"), torch.float32)).request(HELLO)
    given = (request.temperature, request.top_k, request.top_p, request.max_tokens, request.seed)
    assert given == (0.7, 5, 0.4, 9, 3) and "Be brief." in engine.tokenizer.decode(request.tokens)
