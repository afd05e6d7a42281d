"""A real model, trained here in seconds to know a handful of conversations by heart: the chat tests talk to it."""

import contextlib
import dataclasses
import functools
import http.client
import json
import random
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import tiny_run
import torch

from nanochat import checkpoint
from nanochat.compute import Compute
from nanochat.conversation import ChatFormat, render
from nanochat.engine import Engine
from nanochat.gpt import GPT, GPTConfig
from nanochat.serve.app import create_app_for, make_server
from nanochat.serve.loop import Models, ServerConfig
from nanochat.tokenizer import Tokenizer

CODE = "Like this:\n```python\nfor i in range(3):\n    print(i < 2)\n```\nIt prints `True` twice."
INJECTION = 'Sure: <img src=x onerror="window.hacked=1"><script>window.hacked=1</script> <b>bold</b>'
STORY = "Once there was a model. " + " ".join(f"On day {i} it read a page and learnt a word." for i in range(1, 9))
ANSWERS: dict[str, list[dict[str, str]]] = {
    "What is 37*48?": [
        {"type": "text", "text": "37*48 is "},
        {"type": "python", "text": "37*48"},
        {"type": "python_output", "text": "1776"},
        {"type": "text", "text": "1776."},
    ],
    "Hello": [{"type": "text", "text": "Hello! Grüße 🎉 from a tiny model."}],
    "Show me code": [{"type": "text", "text": CODE}],
    "Inject something": [{"type": "text", "text": INJECTION}],
    "Tell me a story": [{"type": "text", "text": STORY}],
}


def text_of(question: str) -> str:
    """What the answer to `question` reads, without its tool calls."""
    return "".join(part["text"] for part in ANSWERS[question] if part["type"] == "text")


@functools.cache
def tiny_chat() -> tuple[GPT, Tokenizer]:
    """The model and its tokenizer, trained once a test run on conversations of random turns."""
    rng = random.Random(0)
    texts = [*ANSWERS, *map(text_of, ANSWERS)]
    tokenizer = Tokenizer.train_from_iterator(texts * 20, 420)
    torch.manual_seed(0)
    shape = {"sequence_len": 768, "n_layer": 2, "n_head": 2, "n_kv_head": 1, "n_embd": 96}
    model = GPT(GPTConfig(vocab_size=tokenizer.get_vocab_size(), **shape))
    model.init_weights()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, betas=(0.9, 0.95), weight_decay=0)
    loss, step = float("inf"), 0
    while loss > 0.004 and step < 600:
        step += 1
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 * min(1, step / 10) * (0.3 if loss < 0.03 else 1)
        rows = []
        for _ in range(4):
            questions = [rng.choice(list(ANSWERS)) for _ in range(4)]
            messages = []
            for question in questions:
                messages += [{"role": "user", "content": question}, {"role": "assistant", "content": ANSWERS[question]}]
            ids, mask = render({"messages": messages}, tokenizer, 193)
            targets = [token if kept else -1 for token, kept in zip(ids[1:], mask[1:], strict=True)]
            rows.append((ids[:-1] + [0] * (193 - len(ids)), targets + [-1] * (193 - len(ids))))
        loss_ = model(torch.tensor([ids for ids, _ in rows]), torch.tensor([targets for _, targets in rows]))
        optimizer.zero_grad()
        loss_.backward()
        optimizer.step()
        loss = loss_.item()
    return model.eval(), tokenizer


def save_tiny_chat(base_dir: Path, *stages: str) -> Path:
    """Save the model as the checkpoint "tiny" of these stages, and its tokenizer, in a base directory."""
    model, tokenizer = tiny_chat()
    meta = {"model_config": dataclasses.asdict(model.config), "tokenizer_hash": tokenizer.hash}
    with tiny_run.base_dir(base_dir):
        tokenizer.save(base_dir / "tokenizer")
        for stage in stages:
            checkpoint.save(stage, "tiny", 7, model, None, meta, Compute.create("cpu"))
    return base_dir


@contextlib.contextmanager
def running_server(
    max_batch: int = 8,
    model_name: str = "tiny",
    replicas: int = 1,
    more: dict[str, Any] | None = None,
    port: int = 0,
    **options: Any,
) -> Iterator["Server"]:
    """A real server of the tiny model, on a free port unless one is given, stopped at the end.

    more: (engine, chat format) of other models, by name. options: those of ServerConfig.
    """
    models = Models(ServerConfig(**options), [model_name, *(more or {})], replicas)
    engines = [Engine(*tiny_chat(), max_batch=max_batch) for _ in range(replicas)]
    models.add(model_name, engines, ChatFormat(engines[0].tokenizer))
    for name, (engine, chat_format) in (more or {}).items():
        models.add(name, [engine], chat_format)
    server = make_server(create_app_for(models), "127.0.0.1", port)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    try:
        yield Server(engines[0], server.effective_port, models)
    finally:
        with contextlib.suppress(OSError):  # its thread woke by itself and closed the trigger before it was pulled
            server.trigger.pull_trigger(lambda: [each.close() for each in list(server._map.values())])
        thread.join(10)
        server.task_dispatcher.shutdown()
        models.close()


class Server(NamedTuple):
    """A server that runs in this process, and the parts that tests look into."""

    engine: Engine
    port: int
    models: Models

    def ask(self, method: str, path: str, body: Any = None, headers: Any = None) -> tuple[int, dict[str, str], str]:
        """(status, headers, text) of one request; a body that is not bytes is sent as JSON."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        data = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
        try:
            connection.request(method, path, data, {"Content-Type": "application/json", **(headers or {})})
            response = connection.getresponse()
            return response.status, dict(response.getheaders()), response.read().decode()
        finally:
            connection.close()

    def get(self, path: str) -> Any:
        """The JSON of a page that must be there."""
        status, _, text = self.ask("GET", path)
        assert status == 200, text
        return json.loads(text)

    def chat(self, *contents: Any, **options: Any) -> tuple[int, dict[str, Any]]:
        """(status, completion) after messages alternating from the user's."""
        messages = [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]
        status, _, text = self.ask("POST", "/v1/chat/completions", {"messages": messages, **options})
        return status, json.loads(text)

    def say(self, *contents: Any, **options: Any) -> str:
        """The text of an answer that must come."""
        status, reply = self.chat(*contents, **options)
        assert status == 200, reply
        return reply["choices"][0]["message"]["content"]

    def stream(self, question: str, **options: Any) -> list[Any]:
        """The events of a streamed answer, without the [DONE] that must end them (an error need not)."""
        body = {"messages": [{"role": "user", "content": question}], "stream": True, **options}
        status, headers, text = self.ask("POST", "/v1/chat/completions", body)
        assert status == 200 and headers["Content-Type"].startswith("text/event-stream")
        events = text.split("\n\n")
        assert events.pop() == "" and all(event.startswith("data: ") for event in events)
        if '"error"' not in events[-1]:
            assert events.pop() == "data: [DONE]"
        return [json.loads(event.removeprefix("data: ")) for event in events]

    def begin(self, question: str = "Tell me a story", **options: Any) -> tuple[Any, Any]:
        """(connection, response) of a streamed answer of which the first event has come."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        body = {"messages": [{"role": "user", "content": question}], "stream": True, **options}
        connection.request("POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"})
        response = connection.getresponse()
        assert response.status == 200 and response.readline().startswith(b"data: ")
        return connection, response

    def metrics(self) -> dict[str, float]:
        """Sample -> value of /metrics."""
        lines = [line for line in self.ask("GET", "/metrics")[2].splitlines() if not line.startswith("#")]
        return {line.rsplit(" ", 1)[0]: float(line.rsplit(" ", 1)[1]) for line in lines}


def leave(begun: tuple[Any, Any]) -> None:
    """Close the socket of an answer, wherever it is: connection and response both hold it."""
    for each in begun:
        each.close()


def wait_for(condition: Callable[[], Any], seconds: float = 30) -> Any:
    """What `condition` gives, once it is true; false if it never is."""
    deadline = time.monotonic() + seconds
    while not (value := condition()) and time.monotonic() < deadline:
        time.sleep(0.02)
    return value


@contextlib.contextmanager
def held(*engines: Engine) -> Iterator[threading.Event]:
    """Engines that stand still until the event is set, or to the end of the block."""
    release = threading.Event()
    steps = [engine.step for engine in engines]

    def hold(engine: Any, step: Any) -> None:
        def wait() -> Any:
            release.wait(30)
            return step()

        engine.step = wait

    for engine, step in zip(engines, steps, strict=True):
        hold(engine, step)
    try:
        yield release
    finally:
        release.set()
        for engine, step in zip(engines, steps, strict=True):
            engine.step = step  # type: ignore[method-assign]
