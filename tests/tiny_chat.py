"""A real model, trained here in seconds to know a handful of conversations by heart: the chat tests talk to it."""

import contextlib
import functools
import random
import threading
from collections.abc import Iterator
from typing import Any

import torch

from nanochat.conversation import render
from nanochat.engine import Engine
from nanochat.gpt import GPT, GPTConfig
from nanochat.serve.app import create_app, make_server
from nanochat.serve.service import ServerConfig
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


@contextlib.contextmanager
def running_server(
    max_batch: int = 8, model_name: str = "tiny", more: dict[str, Any] | None = None, port: int = 0, **options: Any
) -> Iterator[tuple[Engine, int]]:
    """(engine, port) of a real server of the tiny model, on a free port unless one is given, stopped at the end;
    options of ServerConfig.

    more: engines and formats of other models, by name.
    """
    app = create_app(Engine(*tiny_chat(), max_batch=max_batch), model_name, ServerConfig(**options))
    for name, (engine, form) in (more or {}).items():
        app.extensions["models"].add(name, engine, form)
    server = make_server(app, "127.0.0.1", port)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    try:
        yield app.extensions["models"].get(None).engine, server.effective_port
    finally:
        with contextlib.suppress(OSError):  # its thread woke by itself and closed the trigger before it was pulled
            server.trigger.pull_trigger(lambda: [each.close() for each in list(server._map.values())])
        thread.join(10)
        server.task_dispatcher.shutdown()
        app.extensions["models"].close()
