"""The same request with the same seed gives the same tokens, and their log-probabilities the same bits, whatever else
the engine does. Held against a run of the request alone in an engine of its own."""

import random
import types

import pytest
import torch
from random_model import random_model

from nanochat.engine import Engine, Request

TOKENIZER = types.SimpleNamespace(special_tokens={}, stop_tokens=frozenset())
V = 211
SHAPES = {
    "windows": {"sequence_len": 768, "n_embd": 128, "n_head": 4, "n_kv_head": 2},  # windows of 256
    "wide": {"sequence_len": 512, "n_embd": 256, "n_head": 2, "n_kv_head": 2, "window_pattern": "L", "n_layer": 2},
}


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def dtype(request):
    return getattr(torch, request.param)


@pytest.fixture(scope="module", params=list(SHAPES))
def model(request, dtype):
    return random_model(V, dtype=dtype, **SHAPES[request.param])


def prompt(n, seed=0):
    return random.Random(f"{seed} {n}").choices(range(V), k=n)


def ask(tokens, max_tokens=24, **fields):
    return Request(tokens, max_tokens=max_tokens, seed=7, logprobs=3, **fields)


def answer(request):
    assert request.finish_reason == "length"
    return request.output, request.scores


def alone(model, tokens, **fields):
    request = ask(tokens, **fields)
    Engine(model, TOKENIZER, 1, prefix_tokens=0).run([request])
    return answer(request)


def others(n, seed=0):
    """Requests of all lengths and settings."""
    draw = random.Random(seed)
    return [
        Request(
            prompt(draw.randrange(1, 330), i),
            max_tokens=draw.randrange(1, 60),
            temperature=draw.choice([0.0, 1.0]),
            seed=i,
        )
        for i in range(n)
    ]


def finish(engine, request):
    while not request.finish_reason:
        engine.step()
    return answer(request)


PROMPT = prompt(300)


def test_in_a_batch_of_32_in_any_slot(model):
    expected = alone(model, PROMPT)
    for place in (0, 13, 31):
        engine, request = Engine(model, TOKENIZER, 32), ask(PROMPT)
        company = others(31, place)
        for each in [*company[:place], request, *company[place:]]:
            engine.add(each)
        assert finish(engine, request) == expected


@pytest.mark.parametrize("step_tokens", [3, 8, 17, 64, 301, 1000])
def test_read_in_any_chunks(model, step_tokens):
    request = ask(PROMPT)
    Engine(model, TOKENIZER, 1, step_tokens=step_tokens, prefix_tokens=0).run([request])
    assert answer(request) == alone(model, PROMPT)


@pytest.mark.parametrize("known", [15, 16, 100, 257, 299, 300])
def test_with_a_known_beginning(model, known):
    """Known from an earlier request that went another way, long ago enough for its rings to have been overwritten."""
    engine, request = Engine(model, TOKENIZER, 2), ask(PROMPT)
    engine.run([Request([*PROMPT[:known], *prompt(200, 1)], max_tokens=100, seed=1)])
    engine.run(others(5))
    engine.run([request])
    assert answer(request) == alone(model, PROMPT)
    assert request.n_reused == min(known, 299) // 16 * 16


def test_among_samples_of_the_same_prompt(model):
    samples = [ask(PROMPT, sample=i) for i in range(5)]
    Engine(model, TOKENIZER, 3, prefix_tokens=0).run(samples)
    assert [answer(request) for request in samples] == [alone(model, PROMPT, sample=i) for i in range(5)]
    assert [request.n_reused for request in samples[:3]] == [0, 299, 299]


@pytest.mark.parametrize("prefix_tokens", [0, 8192])
def test_after_a_preemption(model, prefix_tokens):
    """The last to come gives way to those that grow, in the middle of its answer."""
    engine = Engine(model, TOKENIZER, 4, cache_tokens=1100, prefix_tokens=prefix_tokens)
    company, request = [Request(prompt(240, i), max_tokens=200, seed=i) for i in range(2)], ask(PROMPT[:200], 40)
    for each in (*company, request):
        engine.add(each)
    while not engine.scheduler.n_preempted:
        engine.step()
    assert request.state == "waiting" and 0 < len(request.output) < 40
    assert finish(engine, request) == alone(model, PROMPT[:200], max_tokens=40)


def test_of_the_next_turn_of_a_chat(model):
    """A conversation goes on where its cache ends, answer included."""
    engine, first = Engine(model, TOKENIZER, 2), ask(PROMPT, 100)
    engine.run([first])
    longer = [*PROMPT, *first.output, *prompt(20, 3)]
    engine.run(others(4))
    request = ask(longer)
    engine.run([request])
    assert request.n_reused == (300 + 99) // 16 * 16
    assert answer(request) == alone(model, longer)


def test_with_every_setting_beside_every_other(model):
    """Penalties, biases, limits, log-probabilities and greedy rows in one batch; each is as it is alone."""
    settings = [
        {"temperature": 0.0},
        {"temperature": 0.0, "repetition_penalty": 1.5},
        {"presence_penalty": 1.0, "frequency_penalty": 0.5},
        {"top_k": 5, "logit_bias": {3: 4.0, 7: -100.0}},
        {"top_p": 0.7, "min_p": 0.05},
        {"temperature": 0.3, "top_p": 0.5, "repetition_penalty": 0.8, "frequency_penalty": -0.5},
    ]
    engine = Engine(model, TOKENIZER, 8, prefix_tokens=0)
    requests = [ask(prompt(20 + 7 * i, i), 16, **each) for i, each in enumerate(settings)]
    engine.run([*requests, *others(4)])
    for i, (each, request) in enumerate(zip(settings, requests, strict=True)):
        assert answer(request) == alone(model, prompt(20 + 7 * i, i), max_tokens=16, **each)
    assert len({tuple(request.output) for request in requests}) == len(settings)
