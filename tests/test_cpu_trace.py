"""Decoding by a trace gives the bits of the forward run from Python, for other rows and lengths than it recorded."""

import random
import threading
import types
import warnings

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


def test_two_engines_that_record_at_once_warn_of_nothing(monkeypatch):
    """The second begins to record while the first does, and goes on after it: what two replicas may do."""
    engines = [Engine(random_model(211, dtype=torch.bfloat16, **SHAPE), TOKENIZER) for _ in range(2)]
    if engines[0].trace is None:
        pytest.skip("oneDNN does not multiply in bfloat16 on this machine")
    record = torch._C._create_graph_by_tracing
    recording = [threading.Event(), threading.Event()]
    threads = [threading.Thread(target=answers, args=(engine,), name=str(i)) for i, engine in enumerate(engines)]

    def record_slowly(*arguments):
        number = int(threading.current_thread().name)
        recording[number].set()
        if number == 0:
            assert recording[1].wait(60)
        else:
            threads[0].join(60)
        return record(*arguments)

    monkeypatch.setattr(torch._C, "_create_graph_by_tracing", record_slowly)
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("always")
        threads[0].start()
        assert recording[0].wait(60)
        threads[1].start()
        for thread in threads:
            thread.join()
    assert [warning for warning in shown if warning.category is torch.jit.TracerWarning] == []
