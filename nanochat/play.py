"""Talking to any model on this machine by its name: one from the hub, or a checkpoint of one's own as STAGE/TAG."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from nanochat import checkpoint, hf_load, model_store
from nanochat.chat_format import Reasoning, chat_format
from nanochat.common import get_base_dir
from nanochat.compute import pick_dtype
from nanochat.conversation import parse_completion, render_for_completion
from nanochat.engine import AnswerDecoder, Engine, Request, ToolCall
from nanochat.tokenizer import Tokenizer


class OwnFormat:
    """The project's own chat format, as a format of chat_format.py."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer

    def render(self, messages: list[dict[str, Any]]) -> list[int]:
        """Ids up to where the assistant begins."""
        return render_for_completion({"messages": messages}, self.tokenizer)

    def decoder(self) -> AnswerDecoder:
        """For one answer."""
        return AnswerDecoder(self.tokenizer)


def own_checkpoints() -> list[str]:
    """The names, STAGE/TAG, of the checkpoints that this project has made here."""
    folders = sorted((get_base_dir() / "checkpoints").glob("*/*"))
    return ["/".join(f.parts[-2:]) for f in folders if checkpoint.list_steps(*f.parts[-2:])]


def free_memory(device: torch.device) -> int | None:
    """Bytes that are free on a device; None where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")), None)


def open_model(name: str, device: torch.device, say: Callable[[str], None] = print) -> tuple[Any, Any, Any]:
    """(model, tokenizer, format) of a model by name; says how much memory it takes. ValueError when it is not here,
    or does not fit in what is free."""
    if name in own_checkpoints():
        stage, tag = name.split("/")
        model, tokenizer, meta = checkpoint.load_model(stage, device, tag)
        size = sum(p.numel() * p.element_size() for p in model.parameters())
        say(f"{name}, step {meta['step']}: {size / 1e9:.2f} GB of weights on {device}")
        return model, tokenizer, OwnFormat(tokenizer)
    folder = model_store.find(name)
    dtype, free = pick_dtype(device), free_memory(device)
    tensors = hf_load.stored_tensors(folder).values()
    size = sum(torch.Size(t.shape).numel() * (1 if t.dtype == "U8" else dtype.itemsize) for t in tensors)
    there = f"{free / 1e9:.2f} GB are free" if free is not None else "what is free is not known"
    line = f"{name}: {size / 1e9:.2f} GB of weights in {str(dtype).removeprefix('torch.')} for {device}, {there}"
    if free is not None and size > free:
        raise ValueError(f"{line}: take a smaller model, or another --device-type")
    say(line)
    model, tokenizer = hf_load.load(folder, device, dtype)
    return model, tokenizer, chat_format(folder, tokenizer)


class Session:
    """A chat of several turns with one model. write: shows a piece of text; the second argument says it is an aside."""

    def __init__(
        self, model: Any, tokenizer: Any, format: Any, write: Callable[[str, bool], None], **settings: Any
    ) -> None:
        self.engine, self.format, self.write, self.settings = Engine(model, tokenizer, 1), format, write, settings
        self.stop_tokens = getattr(tokenizer, "stop_tokens", frozenset())
        self.messages: list[dict[str, Any]] = []

    def _prompt(self) -> list[int]:
        """Ids of the conversation; the oldest turns go while it leaves no quarter of the context for the answer."""
        context = self.engine.model.config.sequence_len
        room = context - min(self.settings.get("max_tokens") or context, context // 4)
        while len(ids := self.format.render(self.messages)) > room and len(self.messages) > 1:
            self.messages = self.messages[2:]
        if len(ids) > room:
            self.messages = []
            raise ValueError(f"a message of {len(ids)} tokens is too long for a context of {context}")
        return ids

    def ask(self, text: str) -> None:
        """Stream the answer to `text` and its speed; Ctrl-C ends the answer, and what was said of it is kept."""
        self.messages.append({"role": "user", "content": text})
        request = Request(self._prompt(), **self.settings)
        decoder, said, began = self.format.decoder(), [], time.perf_counter()
        try:
            for token in self.engine.stream(request):
                if token in self.stop_tokens:
                    break
                said += self._show(decoder.feed(token))
        except KeyboardInterrupt:
            self.write(" [stopped]", True)
        said += self._show(decoder.finish())
        count, seconds = len(request.output), time.perf_counter() - began
        self.write(f"\n[{count} tokens, {count / max(seconds, 1e-9):.1f} tokens/s]\n", True)
        own = isinstance(self.format, OwnFormat)
        content = parse_completion(request.output, self.engine.tokenizer) if own else "".join(said)
        self.messages.append({"role": "assistant", "content": content})

    def _show(self, events: list[Any]) -> list[str]:
        """Write what came; returns what of it is the answer itself."""
        for event in events:
            if isinstance(event, ToolCall):
                self.write(f"[{event.expression} = {event.result or 'not valid'}] ", True)
            else:
                self.write(event, isinstance(event, Reasoning))
        return [event for event in events if isinstance(event, str) and not isinstance(event, Reasoning)]
