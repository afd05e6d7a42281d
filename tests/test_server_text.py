"""/v1/completions as programs use it that score texts: echo, log-probabilities of the prompt, places in the text."""

import json
import types

import pytest
import torch
from tiny_chat import running_server, text_of, tiny_chat

from nanochat.conversation import render_for_completion
from nanochat.engine import Engine, Request
from nanochat.scheduler import TokenScore
from nanochat.serve.logprobs import TextScorer, chat_logprobs


@pytest.fixture(scope="module")
def server():
    with running_server() as server:
        yield server


def complete(server, prompt, **options):
    """The choices of a completion that must come."""
    status, _, text = server.ask("POST", "/v1/completions", {"prompt": prompt, **options})
    assert status == 200, text
    return json.loads(text)["choices"]


def full_forward(ids):
    """Log-probabilities (V) after each token of a row: the oracle."""
    with torch.inference_mode():
        return tiny_chat()[0](torch.tensor([ids]))[0].log_softmax(-1)


@pytest.fixture(scope="module")
def ids(server):
    """A question and a part of its answer: the model is sure of some of these tokens and not of others."""
    tokenizer = server.engine.tokenizer
    prompt = render_for_completion({"messages": [{"role": "user", "content": "Hello"}]}, tokenizer)
    return [*prompt, *tokenizer.encode(text_of("Hello")[:20] + " zebra")]


@pytest.mark.parametrize("max_tokens", [0, 1, 3])
def test_echo_scores_the_prompt_as_the_full_forward_does(server, ids, max_tokens):
    options = {"echo": True, "logprobs": 1, "max_tokens": max_tokens, "temperature": 0}
    (choice,) = complete(server, ids, **options)
    logprobs = choice["logprobs"]
    assert {len(values) for values in logprobs.values()} == {len(ids) + max_tokens}
    assert logprobs["token_logprobs"][0] is logprobs["top_logprobs"][0] is None
    expected = full_forward(ids)
    for n in range(1, len(ids)):
        own, top = logprobs["token_logprobs"][n], logprobs["top_logprobs"][n]
        assert own == pytest.approx(expected[n - 1, ids[n]].item(), abs=1e-3)
        # This is how lm-evaluation-harness sees whether greedy decoding would have said the same.
        assert (own == max(top.values())) == (expected[n - 1].argmax().item() == ids[n])
        assert top[logprobs["tokens"][n]] == own
    assert complete(server, ids, **options) == [choice]  # the prefix cache knows the prompt by now
    # The same in a stream, in chunks.
    _, _, text = server.ask("POST", "/v1/completions", {"prompt": ids, "stream": True, **options})
    chunks = [json.loads(line.removeprefix("data: "))["choices"][0] for line in text.split("\n\n")[:-2]]
    assert "".join(chunk["text"] for chunk in chunks) == choice["text"]
    scored = [value for chunk in chunks if chunk["logprobs"] for value in chunk["logprobs"]["token_logprobs"]]
    assert scored == logprobs["token_logprobs"]


def test_echo_of_texts_and_lists(server):
    """The text begins with the prompt, n times for each; every token lies where its offset says."""
    prompts = ["Grüße 🎉 to all", "Hello"]
    options = {"echo": True, "logprobs": 2, "max_tokens": 4, "n": 2}
    choices = complete(server, prompts, **options)
    assert [choice["index"] for choice in choices] == [0, 1, 2, 3]
    for choice, prompt in zip(choices, [prompts[0], prompts[0], *[prompts[1]] * 2], strict=True):
        logprobs = choice["logprobs"]
        assert choice["text"].startswith(prompt) and len(choice["text"]) > len(prompt)
        assert logprobs["tokens"][0] == "<|bos|>"
        offsets = logprobs["text_offset"]
        assert offsets[:2] == [0, 0] and offsets == sorted(offsets)
        for token, start in zip(logprobs["tokens"][1:], offsets[1:], strict=True):
            assert token.startswith("bytes:") or choice["text"][start:].startswith(token)
    (plain,) = complete(server, "Hello", echo=True, max_tokens=4)
    assert plain == {**choices[2], "index": 0, "logprobs": None}
    for options_of_nothing in ({"max_tokens": 0}, {"max_tokens": 0, "echo": True}, {"max_tokens": 0, "logprobs": 1}):
        status, _, text = server.ask("POST", "/v1/completions", {"prompt": "Hello", **options_of_nothing})
        assert status == 400 and json.loads(text)["error"]["param"] == "max_tokens"
    assert complete(server, "Hello", **options)[0] == {**choices[2], "index": 0}
    whole = complete(server, "Hello", max_tokens=4)[0]["text"]
    assert choices[2]["text"] == "Hello" + whole


def test_the_token_that_ends_a_scored_text_has_its_entry(server):
    """A scorer asks for one token and counts on its entry; where a model would end, that token is its end mark."""
    tokenizer = server.engine.tokenizer
    question = render_for_completion({"messages": [{"role": "user", "content": "Hello"}]}, tokenizer)
    ids = [*question, *tokenizer.encode(text_of("Hello"))]
    (choice,) = complete(server, ids, echo=True, logprobs=1, max_tokens=1, temperature=0)
    assert choice["finish_reason"] == "stop" and len(choice["logprobs"]["tokens"]) == len(ids) + 1
    assert choice["logprobs"]["tokens"][-1] == "<|assistant_end|>"


def test_a_prompt_as_long_as_the_context_can_be_scored(server):
    ids = (list(range(256)) * 3)[:768]
    (choice,) = complete(server, ids, echo=True, logprobs=0, max_tokens=0)
    assert len(choice["logprobs"]["token_logprobs"]) == 768
    status, _, text = server.ask("POST", "/v1/completions", {"prompt": ids, "max_tokens": 1})
    assert status == 400 and "no room" in text


def test_scored_prompts_in_any_company(server, ids):
    """Chunks, companions, a full cache that preempts: the scores are the same."""
    alone = Request(ids, max_tokens=2, temperature=0.0, logprobs=3, prompt_logprobs=True)
    Engine(*tiny_chat()).run([alone])
    engine = Engine(*tiny_chat(), max_batch=4, step_tokens=9, cache_tokens=512)
    scored = [Request(ids, max_tokens=2, temperature=0.0, logprobs=3, prompt_logprobs=True) for _ in range(3)]
    others = [Request(ids[:n], max_tokens=140, temperature=0.0, logit_bias={33: 100}) for n in (3, 20)]
    for request in others:
        engine.add(request)
    n_scored = []  # tokens that each preempted request had scored
    preempt = engine.scheduler._preempt
    engine.scheduler._preempt = lambda request: (n_scored.append(len(request.scores)), preempt(request))
    while others[1].size < 124:  # soon they need longer rows, and the requests that came last have to go
        engine.step()
    engine.run(scored)
    assert any(0 < n < len(ids) for n in n_scored)
    for request in scored:
        assert request.scores == alone.scores and request.output == alone.output


def test_twenty_likeliest_of_a_tokenizer_of_bytes(server):
    """Most of its tokens decode to the same U+FFFD: each keeps an entry, and a token's entry is its own value."""
    tokenizer = server.engine.tokenizer
    broken = tokenizer.encode("🎉")[0]
    ids = [tokenizer.get_bos_token_id(), broken, 200, 201, 202]
    (choice,) = complete(server, ids, echo=True, logprobs=20, max_tokens=3, logit_bias={"203": 100})
    expected = full_forward([*ids, 203, 203, 203])
    for n, (name, own, top) in enumerate(
        zip(*(choice["logprobs"][key][1:] for key in ("tokens", "token_logprobs", "top_logprobs")), strict=True)
    ):
        token = [*ids, 203, 203, 203][n + 1]
        assert top[name] == own == pytest.approx(expected[n, token].item(), abs=1e-3)
        is_likely = token in expected[n].topk(20).indices
        assert len(top) == (20 if is_likely else 21)
    (choice,) = complete(server, ids, logprobs=20, max_tokens=5, temperature=0)
    assert [len(top) for top in choice["logprobs"]["top_logprobs"]] == [20] * len(choice["logprobs"]["tokens"])


def test_a_name_for_each_of_several_tokens_of_one_text():
    texts = [b"a", b"a", b"\xf0"]
    tokenizer = types.SimpleNamespace(special_tokens={}, decode_bytes=lambda ids: b"".join(texts[i] for i in ids))
    score = TokenScore(token=1, logprob=-2.0, top={0: -1.0, 1: -2.0, 2: -3.0})
    (top,) = TextScorer(tokenizer).write([score])["top_logprobs"]
    assert top == {"token_id:0": -1.0, "a": -2.0, "bytes:\\xf0": -3.0}


def test_what_a_model_rules_out_is_still_json():
    """Its log-probability is -inf, and JSON has no word for that."""
    tokenizer = tiny_chat()[1]
    scores = [TokenScore(5, float("-inf"), {6: 0.0, 7: float("-inf")})]
    text = json.dumps(TextScorer(tokenizer).write(scores), allow_nan=False)
    chat = json.dumps(chat_logprobs(tokenizer, scores), allow_nan=False)
    assert (text.count("-9999.0"), chat.count("-9999.0")) == (3, 2)
