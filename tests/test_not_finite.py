"""Weights that are NaN or infinite in one place: what meets them ends with an error, and nothing else changes."""

import json

import pytest
import torch
from random_model import random_model
from tiny_chat import running_server, text_of

from nanochat.engine import Engine, Request
from nanochat.sampling import BROKEN, sample
from nanochat.tokenizer import Tokenizer

POISON = 77  # the token whose embedding is not finite


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train_from_iterator(["What is 12*12? The result is 144."] * 20, 280)


def poisoned_model(tokenizer, value=float("nan")):
    model = random_model(tokenizer.get_vocab_size())
    with torch.no_grad():
        model.embed.weight[POISON] = value
    return model


def clean(n, seed):
    """A prompt without the token."""
    ids = torch.randint(0, 250, (n,), generator=torch.Generator().manual_seed(seed)).tolist()
    return [token + (token == POISON) for token in ids]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_row_that_is_not_finite_is_told_apart(value):
    logits = torch.randn(4, 50, generator=torch.Generator().manual_seed(0))
    logits[1, 30] = value if value > 0 or value != value else 0.0
    logits[2] = value
    logits[3, :49] = float("-inf")  # what a model rules out is no fault
    requests = [Request([0], temperature=t) for t in (0.0, 1.0, 1.0, 1.0)]
    tokens = sample(logits, requests, [0.5] * 4).tolist()
    alone = sample(logits[:1], requests[:1], [0.5]).tolist()
    assert tokens[0] == alone[0] and tokens[3] == 49 and tokens[2] == BROKEN
    assert (tokens[1] == BROKEN) == (value != float("-inf"))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_companions_and_later_requests_are_not_touched(tokenizer, temperature):
    """Rows are moved, freed and used again; NaN that stayed in one would spoil the next request in it (0 · NaN)."""
    model = poisoned_model(tokenizer)
    settings = {"temperature": temperature, "max_tokens": 12, "seed": 5, "logit_bias": {POISON: -100}}
    lengths = [3, 40, 90, 5, 60, 20, 33, 8, 70, 11]
    expected = [Request(clean(n, seed=i), **settings) for i, n in enumerate(lengths)]
    Engine(random_model(tokenizer.get_vocab_size()), tokenizer).run(expected)
    engine = Engine(model, tokenizer, max_batch=4, step_tokens=16)
    requests = [Request(clean(n, seed=i), **settings) for i, n in enumerate(lengths)]
    broken = []
    for i, request in enumerate(requests):
        engine.add(request)
        if i % 2:
            # The token is the first of a long prompt, which several steps read, or its last.
            prompt = [POISON, *clean(100, seed=i)] if i % 4 == 1 else [*clean(50, seed=i), POISON]
            broken.append(Request(prompt, logprobs=2, prompt_logprobs=i == 3, **settings))
            engine.add(broken[-1])
    while engine.busy:
        engine.step()
        if broken[2].state == "prefill" and broken[2].n_read > 30:
            engine.abort(broken[2])  # its client has left
    assert [request.output for request in requests] == [request.output for request in expected]
    assert [request.finish_reason for request in broken] == ["error", "error", "abort", "error", "error"]
    assert not any(request.output for request in broken)
    for ask in (
        lambda: engine.run([Request([POISON])]),
        lambda: list(engine.stream(Request([POISON]))),
        lambda: list(engine.generate([POISON])),
    ):
        with pytest.raises(ValueError, match="NaN or infinite"):
            ask()
    assert not engine.busy


def test_a_server_tells_it_and_goes_on():
    with running_server() as server:
        token = server.engine.tokenizer.encode("z")[0]
        embed = server.engine.model.embed.weight
        kept = embed[token].clone()
        with torch.no_grad():
            embed[token] = float("nan")
        try:
            status, reply = server.chat("zebra")
            assert status == 500 and reply["error"]["type"] == "server_error" and "NaN" in reply["error"]["message"]
            events = server.stream("zebra", temperature=1)
            assert "NaN" in events[-1]["error"]["message"]
            body = json.dumps({"prompt": ["zebra", "Hello"], "max_tokens": 2}).encode()
            assert server.ask("POST", "/v1/completions", body)[0] == 500
            assert server.say("Hello") == text_of("Hello")
            assert server.get("/health") == {"status": "ok"}
            assert server.metrics()['nanochat_request_success_total{finished_reason="error",model_name="tiny"}'] == 3
        finally:
            with torch.no_grad():
                embed[token] = kept
