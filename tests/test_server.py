"""The API over real sockets, with a real engine and a real (tiny) model: what it answers, and what it refuses."""

import json

import pytest
from tiny_chat import ANSWERS, held, leave, running_server, text_of, wait_for

from nanochat.conversation import render_for_completion
from nanochat.serve.app import create_app
from nanochat.serve.information import OPERATIONS
from nanochat.serve.loop import ServerConfig
from nanochat.serve.schema import ApiError, ChatRequest, CompletionRequest, read_body

HELLO = [{"role": "user", "content": "Hello"}]
CHAT = "/v1/chat/completions"


@pytest.fixture(scope="module")
def server():
    with running_server() as server:
        yield server


def complete(server, prompt, **options):
    """The completion object of a plain prompt."""
    status, _, text = server.ask("POST", "/v1/completions", {"prompt": prompt, **options})
    assert status == 200, text
    return json.loads(text)


def test_page_health_and_models(server):
    status, headers, page = server.ask("GET", "/")
    assert status == 200 and headers["Content-Type"].startswith("text/html")
    assert "https://" not in page and 'src="http' not in page  # asks nothing of other machines
    assert server.get("/health") == {"status": "ok"}
    models = server.get("/v1/models")
    assert models["object"] == "list" and [model["id"] for model in models["data"]] == ["tiny"]


def test_an_answer_with_a_tool_call(server):
    status, reply = server.chat("What is 37*48?", model="tiny", temperature=0)
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
    chunks = server.stream(question)
    assert len({chunk["id"] for chunk in chunks}) == 1
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    reasons = [chunk["choices"][0]["finish_reason"] for chunk in chunks]
    assert deltas[0]["role"] == "assistant" and not any("role" in delta for delta in deltas[1:])
    assert deltas[-1] == {} and reasons == [None] * (len(reasons) - 1) + ["stop"]
    whole = server.chat(question)[1]["choices"][0]["message"]
    assert "".join(delta.get("content", "") for delta in deltas) == whole["content"] == text_of(question)
    assert [d["tool_trace"] for d in deltas if "tool_trace" in d] == whole.get("tool_trace", [])
    assert len(deltas) > 5


def test_usage_in_a_stream(server):
    *chunks, last = server.stream("What is 37*48?", stream_options={"include_usage": True}, n=2)
    assert all(chunk["usage"] is None for chunk in chunks)
    assert last["choices"] == [] and last["usage"] == server.chat("What is 37*48?", n=2)[1]["usage"]
    said = [chunk["choices"][0] for chunk in chunks]
    for index in (0, 1):
        mine = [choice for choice in said if choice["index"] == index]
        assert "".join(c["delta"].get("content", "") for c in mine) == "37*48 is 1776."
        assert mine[0]["delta"]["role"] == "assistant" and mine[-1]["finish_reason"] == "stop"


def test_history_with_tool_parts_and_lengths(server):
    status, reply = server.chat("What is 37*48?", ANSWERS["What is 37*48?"], "Hello", max_tokens=3)
    assert status == 200 and reply["choices"][0]["finish_reason"] == "length"
    assert reply["usage"]["completion_tokens"] == 3
    assert server.say([{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}]) == text_of("Hello")
    turns = ["Hello", text_of("Hello")] * 60
    assert server.say(*turns, "What is 37*48?") == "37*48 is 1776."  # far past the context


def test_plain_completions(server):
    """Text, ids, several of them and several answers each; special tokens come from ids only."""
    tokenizer = server.engine.tokenizer
    bos = tokenizer.get_bos_token_id()
    ids = render_for_completion({"messages": HELLO}, tokenizer)
    reply = complete(server, ids)
    (choice,) = reply["choices"]
    assert reply["object"] == "text_completion" and choice["text"] == text_of("Hello")
    assert reply["usage"]["prompt_tokens"] == len(ids)

    text = "<|user_start|>Hello"  # text that looks like a mark is text
    prompt = [bos, *tokenizer.encode(text)]
    one, same = (complete(server, each, max_tokens=5)["choices"][0]["text"] for each in (text, prompt))
    mark = [bos, tokenizer.encode_special("<|user_start|>"), *tokenizer.encode("Hello")]
    assert one == same and complete(server, mark)["usage"]["prompt_tokens"] < len(prompt)

    several = complete(server, [ids, ids[:-1]], n=2, max_tokens=4, seed=3, temperature=1.5)
    assert [choice["index"] for choice in several["choices"]] == [0, 1, 2, 3]
    assert several["usage"]["prompt_tokens"] == 2 * len(ids) - 1 and several["usage"]["completion_tokens"] <= 16
    alone = complete(server, ids, n=2, max_tokens=4, seed=3, temperature=1.5)
    assert [c["text"] for c in alone["choices"]] == [c["text"] for c in several["choices"][:2]]

    status, _, text = server.ask("POST", "/v1/completions", {"prompt": ["x"] * 73})  # never, not only now
    assert status == 400 and "at most 72" in json.loads(text)["error"]["message"]


def test_sampling_parameters_reach_the_engine(server):
    """Each parameter does what it says, seen from outside."""
    token = server.engine.tokenizer.encode("!")[0]
    assert server.say("Hello") == text_of("Hello")
    hot = {"temperature": 2, "max_tokens": 12}
    assert len({server.say("Hello", seed=seed, **hot) for seed in range(5)}) > 2
    assert server.say("Hello", seed=1, **hot) == server.say("Hello", seed=1, **hot)
    for narrow in ({"top_k": 1}, {"top_p": 1e-9}, {"min_p": 1.0}):
        said = {server.say("Hello", seed=seed, **hot, **narrow) for seed in range(3)}
        assert said == {server.say("Hello", max_tokens=12)}
    assert "!" not in server.say("Hello", logit_bias={str(token): -100})
    assert server.say("Hello", logit_bias={str(token): 100}, max_tokens=4) == "!!!!"
    drawn = [server.say("Hello", seed=seed, **hot) for seed in range(4)]
    for penalty in ({"presence_penalty": 2}, {"frequency_penalty": 2}, {"repetition_penalty": 10}):
        assert [server.say("Hello", seed=seed, **hot, **penalty) for seed in range(4)] != drawn


def test_stop_texts_never_show(server):
    """Whatever is asked for, and wherever tokens and characters are cut, a stream shows what the whole answer has."""
    text = text_of("Hello")
    for stop in ("tiny", "🎉", "lo! Gr", ["zzz", "ß"], ["!", "Hello!"], "H", "never said"):
        stops = [stop] if isinstance(stop, str) else stop
        cut = min((text.find(s) for s in stops if s in text), default=len(text))
        (choice,) = server.chat("Hello", stop=stop)[1]["choices"]
        assert (choice["message"]["content"], choice["finish_reason"]) == (text[:cut], "stop")
        pieces = [chunk["choices"][0]["delta"].get("content", "") for chunk in server.stream("Hello", stop=stop)]
        assert "".join(pieces) == text[:cut]


def test_logprobs(server):
    """They are those of the model itself; a stream has the same; both formats."""
    ids = render_for_completion({"messages": HELLO}, server.engine.tokenizer)
    wanted = {"logprobs": True, "top_logprobs": 3}
    (choice,) = server.chat("Hello", **wanted)[1]["choices"]
    content = choice["logprobs"]["content"]
    data = bytes(byte for entry in content for byte in entry["bytes"])
    assert data.decode() == text_of("Hello") == choice["message"]["content"]
    for entry in content:
        assert entry["top_logprobs"][0]["logprob"] == entry["logprob"]  # greedy: the likeliest is said
        assert len(entry["top_logprobs"]) == 3 and entry["logprob"] <= 0
    scored = [chunk["choices"][0]["logprobs"] for chunk in server.stream("Hello", **wanted)]
    assert [entry for logprobs in scored if logprobs for entry in logprobs["content"]] == content

    whole = complete(server, ids, logprobs=2)["choices"][0]["logprobs"]
    assert whole["token_logprobs"] == [entry["logprob"] for entry in content]
    assert [len(top) for top in whole["top_logprobs"]] == [2] * len(content)
    assert whole["text_offset"][:2] == [0, len(whole["tokens"][0])]
    _, _, text = server.ask("POST", "/v1/completions", {"prompt": ids, "logprobs": 2, "stream": True})
    chunks = [json.loads(line.removeprefix("data: ")) for line in text.split("\n\n")[:-2]]
    pieces = [logprobs for chunk in chunks if (logprobs := chunk["choices"][0]["logprobs"])]
    for key, values in whole.items():
        assert [value for piece in pieces for value in piece[key]] == values


def test_a_limit_on_every_answer():
    with running_server(max_tokens=4) as server:
        for options in ({}, {"max_tokens": 100}):
            assert server.chat("Hello", **options)[1]["usage"]["completion_tokens"] == 4
        assert server.chat("Hello", max_tokens=2)[1]["usage"]["completion_tokens"] == 2


def test_many_clients_at_once(server):
    begun = [(question, server.begin(question, seed=seed)) for seed in range(3) for question in ANSWERS]
    for question, (_, response) in begun:
        lines = response.read().decode().strip().split("\n\n")
        deltas = [json.loads(line[6:])["choices"][0]["delta"] for line in lines if line.startswith("data: {")]
        assert "".join(delta.get("content", "") for delta in deltas) == text_of(question)
    assert wait_for(lambda: not server.engine.busy)


# ---- What is refused


def test_other_refusals_have_the_same_shape(server):
    body = {"messages": HELLO}
    for status, (path, data, *headers) in [
        (404, (CHAT, {**body, "model": "gpt-9"})),
        (404, ("/v1/nothing", {})),
        (405, ("/v1/models", {})),
        (400, (CHAT, b"{not json")),
        (400, (CHAT, b"\xff\xfe")),
        (400, (CHAT, b"[" * 500_000)),
        (400, (CHAT, b'{"\xed\xa0\x80": 1}')),  # half a surrogate pair, not UTF-8
        (400, (CHAT, json.dumps(body).encode("utf-16"))),
        (400, (CHAT, b'{"seed": ' + b"9" * 10_000 + b"}")),
        (415, (CHAT, b"a=b", {"Content-Type": "text/plain"})),
        (415, (CHAT, b"\x1f\x8b", {"Content-Encoding": "gzip"})),
        (413, (CHAT, {"messages": [{"role": "user", "content": "x" * (2 << 20)}]})),
    ]:
        answer = server.ask("POST", path, data, *headers)
        error = json.loads(answer[2])["error"]
        assert answer[0] == status and set(error) == {"message", "type", "param", "code"} and error["message"]
        assert status != 405 or "Allow" in answer[1]
        assert path != "/v1/nothing" or CHAT in error["message"]  # where to go instead
    assert server.ask("GET", CHAT)[0] == 405
    assert server.chat("Hello")[0] == 200


def test_a_body_of_mistakes_costs_little(server, monkeypatch):
    """Half a million of them, or of prompts, come in one body: the first is told, and nothing is made of the others."""
    for kind, body in [(ChatRequest, {"messages": [1] * 9999}), (CompletionRequest, {"prompt": [True] * 9999})]:
        with pytest.raises(ApiError) as caught:
            read_body(json.dumps(body).encode(), kind)
        assert caught.value.__cause__.error_count() < 5
    monkeypatch.setattr(server.engine.tokenizer, "encode", lambda text: pytest.fail("a prompt was read"))
    status, _, text = server.ask("POST", "/v1/completions", {"prompt": ["x"] * 9999})
    assert status == 400 and "9999 answers at once" in json.loads(text)["error"]["message"]


def test_strange_text_is_answered(server):
    for text in ("\ud800 alone", "NUL \0 here", "<|assistant_start|>", "🎉" * 3000):
        assert server.chat(text, max_tokens=3)[0] == 200


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


def test_the_description_has_every_route(server):
    """A route that is added without its line in OPERATIONS is missed by everybody who reads /openapi.json."""
    app = create_app(server.engine)
    try:
        routes = {
            (method.lower(), rule.rule.replace("<path:name>", "{name}").replace("<name>", "{name}"))
            for rule in app.url_map.iter_rules()
            for method in rule.methods - {"HEAD", "OPTIONS"}
        }
    finally:
        app.extensions["models"].close()
    assert routes == {(operation.method, operation.path) for operation in OPERATIONS}
    document = server.get("/openapi.json")
    assert routes == {(method, path) for path, methods in document["paths"].items() for method in methods}
    fields = document["components"]["schemas"]["ChatRequest"]["properties"]
    assert set(fields) == set(ChatRequest.model_fields)


# ---- Clients that leave, and an engine that dies


def test_clients_that_leave_free_their_places(server):
    with held(server.engine):
        begun = [server.begin("Hello", temperature=2, seed=seed) for seed in range(12)]
        for each in begun:
            leave(each)
        assert wait_for(lambda: server.models.n_open == 0)
    assert server.say("Hello") == text_of("Hello")
    assert wait_for(lambda: not server.engine.busy) and not server.engine.waiting and not server.engine.running


def test_a_dead_engine_is_said_to_be_dead():
    """In the middle of a stream by an event; afterwards nothing is answered, not even what had been kept."""
    with running_server() as server:
        assert [server.chat("Hello", max_tokens=2)[0] for _ in range(2)] == [200, 200]
        step = server.engine.step

        def fail():
            if server.engine.running and len(server.engine.running[0].output) > 5:
                raise RuntimeError("out of memory")
            return step()

        server.engine.step = fail
        assert server.stream("Tell me a story")[-1]["error"]["type"] == "server_error"
        assert server.ask("GET", "/health")[0] == 503
        assert [server.chat("Hello", max_tokens=2)[0] for _ in range(2)] == [503, 503]
