"""Which bodies the API answers, and which it refuses by the name of what is wrong."""

import json

import pytest
from tiny_chat import running_server, text_of, tiny_chat

from nanochat.conversation import ChatFormat
from nanochat.engine import Engine, Request
from nanochat.serve.messages import Message, mend
from nanochat.serve.schema import NOTHING, ChatRequest, CompletionRequest, Parameters, read_body

HELLO = [{"role": "user", "content": "Hello"}]
CHAT = "/v1/chat/completions"
TEXT = "/v1/completions"


@pytest.fixture(scope="module")
def server():
    with running_server() as server:
        yield server


def user(content="Hello", **fields):
    return {"role": "user", "content": content, **fields}


def assistant(content="Hi", **fields):
    return {"role": "assistant", "content": content, **fields}


def system(content="Be brief."):
    return {"role": "system", "content": content}


# ---- What is answered, though rules for training data or a stricter reading would refuse it

ANSWERED = {
    "a blank system prompt": {"messages": [system(""), user()]},
    "a system prompt of spaces": {"messages": [system(" \n"), user()]},
    "two system messages": {"messages": [system(), system("Be kind."), user()]},
    "a system message in the middle": {"messages": [user(), assistant(), system(), user()]},
    "a system message at the end": {"messages": [user(), system()]},
    "a system message after an answer": {"messages": [user(), assistant(), system()]},
    "a developer and a system message": {"messages": [{"role": "developer", "content": "x"}, system(), user()]},
    "two user messages": {"messages": [user("Context: cats."), user()]},
    "text and parts of one role": {"messages": [user("a"), user([{"type": "text", "text": "b"}]), user()]},
    "two answers": {"messages": [user(), assistant(), assistant("Yes?"), user()]},
    "an answer without a question": {"messages": [assistant("How can I help?"), user()]},
    "a greeting after a system message": {"messages": [system(), assistant("How can I help?"), user()]},
    "an empty question earlier": {"messages": [user(""), assistant("Yes?"), user()]},
    "an empty answer earlier": {"messages": [user(), assistant(""), user()]},
    "an answer of null": {"messages": [user(), assistant(None), user()]},
    "an empty answer at the end": {"messages": [user(), assistant("")]},
    "an empty part": {"messages": [user([{"type": "text", "text": ""}, {"type": "text", "text": "Hello"}])]},
    "a name": {"messages": [user(name="ada")]},
    "fields that an answer came without": {
        "messages": [
            user(),
            assistant(refusal=None, annotations=[], audio=None, tool_calls=[], function_call=None, parsed=None),
            user(),
        ]
    },
    "parts of the Responses API": {
        "messages": [
            user([{"type": "input_text", "text": "Hello"}]),
            assistant([{"type": "output_text", "text": "Hi", "annotations": []}]),
            user([{"type": "text", "text": "Hello", "cache_control": {"type": "ephemeral"}}]),
        ]
    },
    "refusals": {
        "messages": [
            user(),
            assistant(None, refusal="I can't."),
            user(),
            assistant([{"type": "refusal", "refusal": "No."}]),
            user(cache_control={"type": "ephemeral"}),
        ]
    },
    "a beginning, as DeepSeek's and Mistral's clients send it": {"messages": [user(), assistant("Hel", prefix=True)]},
    "fields that litellm adds": {
        "messages": [
            user(),
            assistant(
                provider_specific_fields={"tool_trace": []}, thinking_blocks=[{}], annotations=[{}], reasoning="x"
            ),
            user(),
        ]
    },
    "a beginning of the answer": {"messages": [user(), assistant("Hello! Gr")]},
    "a beginning, as vLLM's clients send it": {
        "messages": [user(), assistant("Hello! Gr")],
        "continue_final_message": True,
        "add_generation_prompt": False,
    },
    "no share of the probability": {"top_p": 0},
    "no limits": {"top_k": -1, "max_completion_tokens": -1, "seed": -1},
    "counts that are not asked for": {"stream_options": {"include_usage": False}},
    "no likeliest tokens": {"top_logprobs": 0, "logprobs": False},
    "no padding": {"stream": True, "stream_options": {"include_usage": True, "include_obfuscation": False}},
    "one token": {"max_completion_tokens": 1, "max_tokens": -1},
    "who asks": {"user": "ada", "safety_identifier": "a1", "prompt_cache_key": "chat-7"},
    "no arguments of the template": {"chat_template_kwargs": {}},
    "no effort": {"reasoning_effort": None},
    "an empty effort": {"reasoning_effort": ""},
    "an empty name of the model": {"model": ""},
    "whole numbers with a point": {"max_tokens": 2.0, "n": 1.0, "seed": 1e3, "top_k": 40.0, "stop_token_ids": [3.0]},
    "tools that must not be called": {"tools": [{"type": "function"}], "tool_choice": "none"},
    "functions that must not be called": {"functions": [{"name": "f"}], "function_call": "none"},
    "counts only at the end": {
        "stream": True,
        "stream_options": {"include_usage": True, "continuous_usage_stats": False},
    },
    "no tokens that stop": {"stop_token_ids": [], "stop": [], "logit_bias": {}},
    "neutral settings": {"n": 1, "presence_penalty": 0, "frequency_penalty": 0, "repetition_penalty": 1, "min_p": 0},
    **{f"no {name}": {name: value} for name in ("tools", "functions", "guided_json") for value in ([], None)},
    **{f"empty {name}": {name: value} for name, value in {"metadata": {}, "grammar": "", "logit_bias": {}}.items()},
    **{f"{name} {value}": {name: value} for name, values in NOTHING.items() for value in values},
}


@pytest.mark.parametrize("body", ANSWERED.values(), ids=ANSWERED)
def test_what_asks_for_nothing_special_is_answered(server, body):
    status, _, text = server.ask("POST", CHAT, {"messages": HELLO, "max_tokens": 2, **body})
    assert status == 200, text


@pytest.mark.parametrize(
    "more", [{"echo": False}, {"logprobs": False}, {"best_of": 1}, {"suffix": None}, {"suffix": ""}, {"tools": []}]
)
def test_text_that_asks_for_nothing_special_is_continued(server, more):
    status, _, text = server.ask("POST", TEXT, {"prompt": "Hello", "max_tokens": 2, **more})
    assert status == 200, text


def test_messages_are_mended():
    """What the model reads of them."""
    part = {"type": "text", "text": "b"}
    for messages, mended in [
        ([system("a"), system("b"), user("c"), user("d")], [system("a\n\nb"), user("c\n\nd")]),
        ([user("a"), system("b")], [system("b"), user("a")]),
        ([user("a"), assistant("b"), system("c")], [user("a"), assistant("b"), user("c")]),
        ([system(" "), user("a"), assistant(""), user("b")], [user("a\n\nb")]),
        ([assistant("a"), user("b")], [user(""), assistant("a"), user("b")]),
        ([user(""), assistant("a"), user("b")], [user(""), assistant("a"), user("b")]),
        ([user("a"), assistant("b")], [user("a"), assistant("b")]),
        ([user(" ")], [user(" ")]),
        ([user("a"), user([part])], [user([{"type": "text", "text": t} for t in ("a", "\n\n", "b")])]),
    ]:
        assert mend(messages) == mended
        assert mend(mended) == mended


def test_refusals_and_parts_by_other_names_are_text():
    for given, turn in [
        (assistant(None, refusal="No."), assistant("No.")),
        (assistant("Hi", refusal="No."), assistant("Hi")),
        (assistant([{"type": "refusal", "refusal": "No."}]), assistant([{"type": "text", "text": "No."}])),
        (user([{"type": "input_text", "text": "a", "cache_control": {}}]), user([{"type": "text", "text": "a"}])),
    ]:
        assert Message.model_validate(given).as_turn() == turn


def test_the_beginning_of_an_answer_is_continued(server):
    whole = text_of("Hello")
    tokenizer = server.engine.tokenizer
    ids = tokenizer.encode(whole)
    texts = [tokenizer.decode(ids[:n]) for n in range(len(ids) + 1)]
    for begun in [text for text in texts if whole.startswith(text)]:
        assert server.say("Hello", begun) == whole.removeprefix(begun)
    long = ["x" * 3000, begun]  # the question loses its beginning, the answer does not
    assert server.say(*long, max_tokens=3) == ""
    begun = [{"type": "text", "text": "37*48 is "}, {"type": "python", "text": "37*48"}]
    begun.append({"type": "python_output", "text": "1776"})
    assert server.say("What is 37*48?", begun) == "1776."
    status, reply = server.chat("Hello", whole[:8], session_id="prefill")
    assert status == 400 and reply["error"]["param"] == "messages"


class Thinking(ChatFormat):
    """A format with an argument, as Qwen3's template has: without thinking, every question is "Hello"."""

    argument_names = frozenset({"enable_thinking", "reasoning_effort"})

    def encode(self, messages):
        thinks = self.arguments.get("enable_thinking", True) and self.arguments.get("reasoning_effort") != "low"
        return super().encode(messages if thinks else HELLO)


def test_arguments_reach_the_chat_format():
    """And kept answers of others are not given."""
    tokenizer = tiny_chat()[1]
    more = {"thinking": (Engine(*tiny_chat(), max_batch=1), Thinking(tokenizer))}
    question = "Show me code"
    with running_server(more=more) as server:
        for arguments, answer in [
            ({}, question),
            ({"chat_template_kwargs": {"enable_thinking": False}}, "Hello"),
            ({"chat_template_kwargs": {"enable_thinking": True}}, question),
            ({"reasoning_effort": "low"}, "Hello"),
            ({"reasoning_effort": "high"}, question),
        ]:
            assert server.say(question, model="thinking", **arguments) == text_of(answer)
        status, reply = server.chat(question, model="thinking", chat_template_kwargs={"effort": 1})
        assert status == 400 and reply["error"]["param"] == "chat_template_kwargs" and "effort" in str(reply)
        both = {"reasoning_effort": "low", "chat_template_kwargs": {"enable_thinking": True}}
        assert server.say(question, model="thinking", **both) == text_of("Hello")
        assert server.chat(question, **arguments)[0] == 400  # the other model's format has no such thing


def test_settings_of_other_servers_mean_the_same_here(server):
    hot = {"temperature": 2, "max_tokens": 12}
    likeliest = server.say("Hello", max_tokens=12)
    assert {server.say("Hello", top_p=0, seed=seed, **hot) for seed in range(3)} == {likeliest}
    assert server.say("Hello", top_k=-1, seed=3, **hot) == server.say("Hello", seed=3, **hot) != likeliest
    assert len({server.say("Hello", seed=-1, **hot) for _ in range(4)}) > 1
    assert server.say("Hello", max_tokens=-1) == text_of("Hello")
    mark = server.engine.tokenizer.encode("!")[0]
    (choice,) = server.chat("Hello", stop_token_ids=[mark])[1]["choices"]
    assert (choice["message"]["content"], choice["finish_reason"]) == ("Hello", "stop")


def test_every_parameter_of_the_api_reaches_the_request():
    """Whoever adds a parameter gives it a value here; one that is accepted and dropped is found."""
    given = {
        "temperature": 0.7,
        "top_p": 0.6,
        "top_k": 5,
        "min_p": 0.1,
        "repetition_penalty": 1.5,
        "presence_penalty": 0.2,
        "frequency_penalty": 0.3,
        "logit_bias": {7: 1.5},
        "seed": 9,
        "stop": ["a", "b"],
        "stop_token_ids": [5, 6],
    }
    for_the_server = {
        "model",
        "stream",
        "stream_options",
        "n",
        "max_tokens",
        "user",
        "safety_identifier",
        "prompt_cache_key",
    }
    assert set(Parameters.model_fields) == given.keys() | for_the_server
    for kind, text in (
        (ChatRequest, {"messages": [{"role": "user", "content": "Hi"}]}),
        (CompletionRequest, {"prompt": "x"}),
    ):
        body = read_body(json.dumps({**text, **given}).encode(), kind)
        request = Request([0], **body.sampling(vocab_size=64, default_temperature=0.0))
        assert {name: getattr(request, name) for name in given} == given
    assert read_body(b'{"prompt": "x"}', CompletionRequest).sampling(64, 0.25)["temperature"] == 0.25
    for value, asked in (("false", None), ("0", 0), ("0.0", 0)):
        logprobs = read_body(f'{{"prompt": "x", "logprobs": {value}}}'.encode(), CompletionRequest).logprobs
        assert logprobs == asked and not isinstance(logprobs, bool)


# ---- What is refused

BAD_BODIES = [
    ({"messages": HELLO, "tools": [{}]}, "tools"),
    ({"messages": HELLO, "priority": 1}, "priority"),
    ({"messages": HELLO, "colour": "red"}, "colour"),
    ({"messages": HELLO, "response_format": {"type": "json_object"}}, "response_format"),
    ({"messages": HELLO, "temperature": -1}, "temperature"),
    ({"messages": HELLO, "temperature": "hot"}, "temperature"),
    ({"messages": HELLO, "temperature": True}, "temperature"),
    ({"messages": HELLO, "temperature": float("nan")}, "temperature"),
    ({"messages": HELLO, "top_k": -2}, "top_k"),
    ({"messages": HELLO, "top_k": 1.5}, "top_k"),
    ({"messages": HELLO, "top_p": -0.1}, "top_p"),
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
    ({"messages": HELLO, "stream": True, "stream_options": {"include_obfuscation": True}}, "stream_options"),
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
    ({"messages": [user(name=5)]}, "messages"),
    ({"messages": [user(), assistant(tool_calls=[{"id": "1"}]), user()]}, "messages"),
    ({"messages": [user(), {"role": "tool", "content": "5"}]}, "messages"),
    ({"messages": [user(), assistant(), user("")]}, "messages"),
    ({"messages": [assistant("")]}, "messages"),
    ({"messages": HELLO, "continue_final_message": True}, "continue_final_message"),
    ({"messages": [user(), assistant()], "add_generation_prompt": True}, "add_generation_prompt"),
    ({"messages": HELLO, "chat_template_kwargs": {"enable_thinking": False}}, "chat_template_kwargs"),
    ({"messages": HELLO, "reasoning_effort": "low"}, "reasoning_effort"),
    ({"messages": HELLO, "stop_token_ids": [10**6]}, "stop_token_ids"),
    ({"messages": HELLO, "stop_token_ids": [-1]}, "stop_token_ids"),
    ({"messages": HELLO, "seed": -(2**64)}, "seed"),
    ({"messages": HELLO, "store": True}, "store"),
    ({"messages": HELLO, "metadata": {"a": "b"}}, "metadata"),
    ({"messages": HELLO, "service_tier": "flex"}, "service_tier"),
    ({"messages": HELLO, "tool_choice": "required"}, "tool_choice"),
    ({"messages": HELLO, "best_of": 2}, "best_of"),
    ({"messages": HELLO, "best_of": True}, "best_of"),
    ({"messages": HELLO, "min_tokens": False}, "min_tokens"),
    ({"messages": HELLO, "echo": True}, "echo"),
    ({"messages": HELLO, "modalities": ["text", "audio"]}, "modalities"),
    ({"messages": HELLO, "temprature": 0}, "temprature"),
    ({"messages": HELLO, "tools": [{}], "tool_choice": "auto"}, "tools"),
    ({"messages": HELLO, "tools": [{}], "function_call": "none"}, "tools"),
    ({"messages": HELLO, "stream": True, "stream_options": {"continuous_usage_stats": True}}, "stream_options"),
    ({"messages": HELLO, "seed": 1e999}, "seed"),
    ({"messages": [user([{"type": "refusal", "refusal": 5}])]}, "messages"),
    ({"messages": HELLO, "max_tokens": -2}, "max_tokens"),
    ({"messages": [{"role": "wizard", "content": "Hello"}]}, "messages"),
    ({"messages": [{"role": "system", "content": "Hello"}]}, "messages"),
    ([1], None),
]
BAD_PROMPTS = [5, [], [[]], ["a", 5], [1, "a"], [-1], [10**6], [True], [1.5], {"a": 1}, [[0, 1], "a"], [0] * 800]


def test_bad_bodies_are_named(server):
    cases = [(CHAT, body, param) for body, param in BAD_BODIES]
    cases += [("/v1/completions", {"prompt": prompt}, "prompt") for prompt in BAD_PROMPTS]
    for path, body, param in cases:
        status, _, text = server.ask("POST", path, body)
        error = json.loads(text)["error"]
        assert (status, error["param"]) == (400, param), body
        assert set(error) == {"message", "type", "param", "code"} and error["type"] == "invalid_request_error"
        assert path != CHAT or (param or "").rstrip("s") in error["message"], body
