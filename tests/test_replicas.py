"""Several engines of one model in one process: who gets which request, what they share, and what happens when one, or
the whole server, ends."""

import json

import pytest
import torch
from tiny_chat import STORY, held, leave, running_server, text_of, wait_for

from scripts import chat_web


@pytest.fixture
def two():
    with running_server(replicas=2, max_batch=4, max_waiting=2) as server:
        yield server


def loops(server):
    return server.models.get("tiny").replicas


def n_open(server):
    return [loop.n_open for loop in loops(server)]


def engines(server):
    return [loop.engine for loop in loops(server)]


def die(*arguments):
    raise RuntimeError("out of memory")


def test_each_request_goes_to_the_least_busy(two):
    first, second = engines(two)
    with held(first, second) as release:
        begun = [two.begin(seed=i) for i in range(6)]
        assert n_open(two) == [3, 3]
        leave(begun[0])  # the first replica's: its place is free again, and the next request takes it
        assert wait_for(lambda: n_open(two) == [2, 3])
        begun.append(two.begin(seed=7))
        assert n_open(two) == [3, 3]
        release.set()
        assert all(response.read().endswith(b"data: [DONE]\n\n") for _, response in begun[1:])
    assert wait_for(lambda: n_open(two) == [0, 0])


def test_the_queue_is_full_when_all_replicas_are(two):
    with held(*engines(two)):
        begun = [two.begin(seed=i) for i in range(12)]
        status, headers, text = two.ask(
            "POST", "/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}]}
        )
        assert status == 429 and int(headers["Retry-After"]) >= 1 and "of at most 12" in text
        for each in begun:
            leave(each)
    assert wait_for(lambda: n_open(two) == [0, 0])
    assert wait_for(lambda: not any(engine.busy for engine in engines(two)))


def test_a_seed_gives_the_same_on_every_replica(two):
    asked = {"seed": 5, "temperature": 1.5, "max_tokens": 12, "logprobs": True}
    with running_server() as alone:
        wanted = alone.chat("Hello", **asked)[1]["choices"]
    for busy in (engines(two)[1], engines(two)[0]):
        two.ask("POST", "/cache/invalidate")
        with held(busy):
            begun = two.begin(seed=1) if busy is engines(two)[0] else None  # the second answers if the first is busy
            assert two.chat("Hello", **asked)[1]["choices"] == wanted
            if begun:
                leave(begun)


def test_sessions_and_kept_answers_are_shared(two):
    """A conversation goes on, and an answer is found again, on a replica that has not seen them."""
    first, second = engines(two)
    assert two.chat("What is 37*48?", session_id="s")[1]["session"]["turns"] == 1
    two.say("Hello", temperature=0)
    with held(first):
        waiting = two.begin(seed=1)
        reply = two.chat("Hello", session_id="s")[1]
        assert reply["session"]["turns"] == 2 and reply["session"]["cached_tokens"] == 0
        body = {"messages": [{"role": "user", "content": "Hello"}], "temperature": 0}
        assert two.ask("POST", "/v1/chat/completions", body)[1]["X-Cache"] == "hit"
        leave(waiting)
    assert second.stats()["output_tokens"] and len(two.get("/v1/sessions/s")["messages"]) == 4
    assert two.get("/stats")["models"]["tiny"]["sessions"] == 1


def test_figures_are_summed_and_caches_emptied_everywhere(two):
    for engine in engines(two):
        others = [other for other in engines(two) if other is not engine]
        with held(*others):
            begun = [two.begin(seed=1) for _ in others if others[0] is engines(two)[0]]
            for _ in range(2):
                two.say("What is 37*48?", seed=2, max_tokens=3)
                assert two.ask("POST", "/cache/invalidate")[0] == 200
            assert engine.stats()["prefix_reused_tokens"] == 0  # known from the first time, had it not been forgotten
            for each in begun:
                leave(each)
    assert wait_for(lambda: n_open(two) == [0, 0])
    total = sum(engine.stats()["output_tokens"] for engine in engines(two))
    assert two.get("/stats")["models"]["tiny"]["output_tokens"] == total > 0
    assert two.metrics()['nanochat_generation_tokens_total{model_name="tiny"}'] == total


def test_a_replica_that_dies_leaves_the_others(two):
    """Its requests are told so, it gets no more, and the server is healthy as long as one lives."""
    first, second = engines(two)
    with held(first, second) as release:
        dying = two.begin(seed=1)
        living = two.begin(seed=2)
        assert n_open(two) == [1, 1]
        step = first.step
        first.step = die
        release.set()
        last = dying[1].read().decode().split("\n\n")[-2]
        assert json.loads(last.removeprefix("data: "))["error"]["type"] == "server_error"
        assert living[1].read().endswith(b"data: [DONE]\n\n")
        first.step = step
    assert two.say("Hello", temperature=0) == text_of("Hello") and n_open(two) == [0, 0]
    assert [two.say("Tell me a story", seed=i, temperature=0) for i in range(3)] == [STORY] * 3
    assert two.get("/health") == {"status": "ok"}
    up = [two.metrics()[f'nanochat_replica_up{{model_name="tiny",replica="{i}"}}'] for i in range(2)]
    assert up == [0.0, 1.0]
    second.step = die
    assert two.chat("Hello", seed=9)[0] == 503
    status, _, text = two.ask("GET", "/health")
    assert (status, json.loads(text)) == (503, {"status": "the engine died: tiny"})
    assert two.chat("Hello", temperature=0)[0] == 503  # not even from the cache


def test_the_devices_of_replicas(monkeypatch):
    cpu = torch.device("cpu")
    gpu = torch.device("cuda", 0)
    threads: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    monkeypatch.setattr(chat_web, "usable_cores", lambda: 8)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert chat_web.replica_devices(1, cpu) == [cpu] and threads == []
    assert chat_web.replica_devices(3, cpu) == [cpu] * 3 and threads == [2]
    assert chat_web.replica_devices(9, cpu) == [cpu] * 9 and threads == [2, 1]
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    assert chat_web.replica_devices(2, cpu) == [cpu] * 2 and len(threads) == 2
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    assert chat_web.replica_devices(2, gpu) == [torch.device("cuda", 0), torch.device("cuda", 1)]
    with pytest.raises(ValueError, match=r"--replicas 3: .* are 2"):
        chat_web.replica_devices(3, gpu)
