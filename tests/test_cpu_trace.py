"""Decoding by a trace gives the bits of the forward run from Python, for other rows and lengths than it recorded."""

import random
import types

import pytest
import torch
from random_model import random_model

from nanochat.engine import Engine, Request

TOKENIZER = types.SimpleNamespace(special_tokens={}, stop_tokens=frozenset())
SHAPE = {"sequence_len": 768, "n_embd": 128, "n_head": 4, "n_kv_head": 2}  # with windows, so some layers keep rings


def answers(engine):
    """Return tokens and their log-probabilities of one request, and then of five that last unequally long."""
    requests = []
    for lengths in ([3], [100, 350, 20, 5, 600]):
        batch = [
            Request(random.Random(n).choices(range(211), k=n), max_tokens=20 + n // 10, logprobs=2) for n in lengths
        ]
        engine.run(batch)
        requests += batch
    return [(request.output, request.scores) for request in requests]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_bits_are_those_of_the_forward_without_a_trace(monkeypatch, dtype):
    model = random_model(211, dtype=dtype, **SHAPE)
    engine = Engine(model, TOKENIZER)
    if engine.trace is None:
        pytest.skip("oneDNN does not multiply in this dtype on this machine")
    plain = Engine(model, TOKENIZER)
    monkeypatch.setattr(plain, "trace", None)
    assert answers(engine) == answers(plain)
    assert engine.trace._recorded is not None
