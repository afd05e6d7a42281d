"""Models for your own programs, from text to text:

    from nanochat import models

    model = models.load("sft")
    print(model.chat("What is 37*48?"))

    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Who are you?"}]
    for piece in model.chat(messages, stream=True):
        print(piece, end="", flush=True)

    print(model.complete("Once upon a time", max_tokens=30))

`load` finds a model by its name, as chat_cli and chat_web do, and a `TextModel` makes requests to its engine. This file
is an entry point like a script: nothing in nanochat/ imports it.
"""

from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from nanochat.compute import Compute
from nanochat.conversation import ChatFormat, Message, text_prompt
from nanochat.detokenizer import AnswerDecoder, Event, Reasoning, ToolCall
from nanochat.engine import Engine, Request
from nanochat.hf import store


def load(
    name: str | Path,
    *,
    step: int | None = None,
    device_type: str | None = None,
    devices: str | None = None,
    int8: bool = False,
) -> "TextModel":
    """Load a model of this machine: "sft" (your newest of that stage), "sft/d12", a folder, or a download's ORG/NAME.

    The other arguments are those of `python -m scripts.chat_cli`. Sets the number of threads that torch computes with.
    Raises ValueError, which lists the models of this machine, for an unknown name.
    """
    device = Compute.create(device_type).device
    (model,) = store.find_all([str(name)], device, step, devices)
    engine, form = model.load(device, max_batch=1, int8=int8)
    torch.set_num_threads(engine.threads)
    return TextModel(model.name, engine, form)


class TextModel:
    """A loaded model that chats and continues text, greedily (temperature 0) by default. Not thread-safe.

    settings: further fields of `Request` (scheduler.py), such as top_p=0.9 or stop=["Q:"].
    """

    def __init__(self, name: str, engine: Engine, form: ChatFormat) -> None:
        self.name = name
        self.engine = engine
        self.form = form
        self._unread: dict[Request, deque[Event]] = {}  # of each unfinished answer: events that were not yielded yet

    def chat(
        self,
        messages: str | list[Message],
        stream: bool = False,
        *,
        max_tokens: int | None = None,
        temperature: float = 0.0,
        seed: int = 42,
        **settings: Any,
    ) -> str | Iterator[str]:
        """Return the answer to a conversation, or to one user message given as text.

        With `stream`, return an iterator over its pieces. Reasoning and calculator calls are left out. If the last
        message is the assistant's, the model continues it. The oldest turns are dropped if they leave no room for an
        answer. Raises ValueError for malformed messages, and for a model that was not trained to chat.
        """
        if not self.form.can_chat:
            raise ValueError(f"{self.name} has no chat format, it only continues text: use complete()")
        if isinstance(messages, str):
            messages = [{"role": "user", "content": messages}]
        prompt = self.form.prompt(messages, self.engine.context, max_tokens)
        request = Request(prompt, max_tokens=max_tokens, temperature=temperature, seed=seed, **settings)
        request.decoder = self.form.decoder(prompt, request.stop)
        return self._answer(request, stream)

    def complete(
        self,
        text: str,
        stream: bool = False,
        *,
        max_tokens: int | None = None,
        temperature: float = 0.0,
        seed: int = 42,
        **settings: Any,
    ) -> str | Iterator[str]:
        """Return the continuation of a text; with `stream`, return an iterator over its pieces.

        Raises ValueError for a text that leaves no room in the context.
        """
        if not isinstance(text, str):
            raise ValueError(f"complete() continues a text, not {text!r:.80}")
        prompt = text_prompt(text, self.engine.tokenizer)
        request = Request(prompt, max_tokens=max_tokens, temperature=temperature, seed=seed, **settings)
        request.decoder = AnswerDecoder(self.engine.tokenizer, request.stop)
        return self._answer(request, stream)

    def _answer(self, request: Request, stream: bool) -> str | Iterator[str]:
        self.engine.check(request)  # raises now, and not when the first piece of a stream is read
        pieces = self._pieces(request)
        return pieces if stream else "".join(pieces)

    def _pieces(self, request: Request) -> Iterator[str]:
        """Yield the text of an answer as it is made; closing the iterator aborts it."""
        self.engine.add(request)
        unread: deque[Event] = deque()
        self._unread[request] = unread
        try:
            while request.finish_reason is None or unread:
                if not unread:
                    # A step advances all unfinished answers, so several streams can be read in turns.
                    for update in self.engine.step():
                        self._unread[update.request].extend(update.events)
                    continue
                event = unread.popleft()
                if not isinstance(event, (Reasoning, ToolCall)):
                    yield event
            request.raise_if_broken()
        finally:
            self.engine.abort(request)
            del self._unread[request]
