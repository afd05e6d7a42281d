"""A chat in the terminal, of several turns, with any model: what is typed, what is shown, commands."""

import contextlib
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from nanochat.chat_format import ChatFormat
from nanochat.cli import option
from nanochat.common import atomic_write_json, get_base_dir, print0, read_json
from nanochat.compute import Compute
from nanochat.conversation import Message, plain_text, validate
from nanochat.detokenizer import Event, Reasoning, ToolCall, content_of
from nanochat.engine import Engine, Request
from nanochat.hf import named_model
from nanochat.hf import parallel as hf_parallel

HELP = (
    "Type a message; Ctrl-C stops an answer. /reset forgets the conversation, /system TEXT instructs the model, "
    "/temp NUMBER sets the temperature, /save FILE and /load FILE keep a conversation, /quit or Ctrl-D ends, "
    "/help says this."
)
STEERING = dict.fromkeys([*range(9), *range(11, 32), *range(127, 160)])  # what a terminal takes for commands


@dataclass(frozen=True)
class Config:
    """How the model answers."""

    system: str | None = option(None, "instructions for the model, put before the first message")
    temperature: float = option(0.0, "0 is the likeliest answer, best for facts and sums; 0.6 to 1 is livelier")
    top_k: int | None = option(None, "draw from the k likeliest tokens only")
    top_p: float = option(1.0, "draw from the likeliest tokens that make up this share of the probability")
    max_tokens: int | None = option(None, "longest answer in tokens; unset: as far as the context goes")
    seed: int = option(42, "the same seed gives the same answer")
    int8: bool = option(False, "weights of a model of this project in 8 bits, on CPU")
    device_type: str | None = option(None, "cuda, mps or cpu; unset: the best there is")
    devices: str | None = option(None, named_model.DEVICES)
    tensor_parallel: bool = option(False, "cut a Llama-like model over the processes that torchrun has started")

    def request(self, form: ChatFormat, messages: list[Message], context: int) -> Request:
        """For the answer to a conversation, in a model's context of so many tokens."""
        system = [{"role": "system", "content": self.system}] if self.system else []
        tokens = form.prompt(system + messages, context, self.max_tokens)
        drawing = {name: getattr(self, name) for name in ("temperature", "top_k", "top_p", "seed")}
        return Request(tokens, self.max_tokens, decoder=form.decoder(tokens), **drawing)


class Chat:
    """A conversation with an engine, remembered from answer to answer. write: shows text; its second argument says that
    it is an aside: reasoning, tool calls, the speed. live: a person sees how far a long prompt is read, too."""

    def __init__(
        self, engine: Engine, form: ChatFormat, config: Config, write: Callable[[str, bool], None], live: bool = False
    ) -> None:
        self.engine, self.form, self.config, self.write, self.live = engine, form, config, write, live
        self.stops: Callable[[bool], bool] = bool  # asked before each step, with whether Ctrl-C was heard
        self.messages: list[Message] = []

    def ask(self, text: str) -> None:
        """Stream the answer to `text`; Ctrl-C ends the answer, and what was said of it is kept."""
        messages = [*self.messages, {"role": "user", "content": text}]
        request = self.config.request(self.form, messages, self.engine.context)
        events: list[Event] = []
        first = None
        for new in self._steps(request):
            first = first or (time.monotonic() if request.output else None)
            for event in new:
                self._show(event, events[-1] if events else "")
                events.append(event)
        if request.finish_reason == "abort":
            self.write(" [stopped]", True)
        self.write("\n", False)
        seconds = time.monotonic() - first if first else 0.0
        speed = f", {(len(request.output) - 1) / seconds:.1f} tokens/s" if seconds and len(request.output) > 1 else ""
        self.write(f"[{len(request.output)} tokens{speed}]\n", True)
        self.messages = [*messages, {"role": "assistant", "content": content_of(events)}]

    def _steps(self, request: Request) -> Iterator[list[Event]]:
        """The answer as each step brings it; a long prompt that is read in several shows how far that is.

        Ctrl-C is heard between two steps: one that is torn in the middle would spoil the engine for the next answer.
        """
        stops: list[int] = []
        before = signal.signal(signal.SIGINT, lambda signum, frame: stops.append(signum))
        self.engine.add(request)
        reading = False
        try:
            while request.finish_reason is None and not self.stops(bool(stops)):
                updates = self.engine.step()
                if self.live and not request.output:
                    reading = True
                    self.write(f"\rreading: {request.n_read:,} of {len(request.tokens):,} tokens", True)
                elif reading:
                    reading = False
                    self.write("\r\x1b[K", False)
                yield [event for update in updates for event in update.events]
            if request.finish_reason is None:
                yield request.decoder.finish()
        finally:
            self.engine.abort(request)
            signal.signal(signal.SIGINT, before)

    def _show(self, event: Event, previous: Event) -> None:
        if isinstance(previous, Reasoning) and not isinstance(event, Reasoning):
            self.write("\n", True)
        called = f"[{event.expression} = {event.result or 'not valid'}] " if isinstance(event, ToolCall) else None
        text = called or str(event)
        self.write(text.translate(STEERING) if self.live else text, type(event) is not str)

    def command(self, name: str, argument: str) -> None:
        """Do what `/name argument` says. Raises ValueError or OSError when that cannot be."""
        path = Path(os.path.expanduser(argument))  # where there is no such user it stays as it is
        if name in ("reset", "clear"):
            self.messages = []
        elif name == "system":
            self.config = replace(self.config, system=argument or None)
            self._say(f"The model is told: {argument}" if argument else "The model is told nothing beforehand.")
        elif name == "temp":
            temperature = float(argument) if argument else self.config.temperature
            Request([0], temperature=temperature)  # refuses what no answer could be drawn with
            self.config = replace(self.config, temperature=temperature)
            self._say(f"temperature {temperature:g}")
        elif name == "save" and argument:
            system = [{"role": "system", "content": self.config.system}] if self.config.system else []
            if not self.messages:
                raise ValueError("nothing has been said yet")
            atomic_write_json(path, {"messages": system + self.messages})
            self._say(f"{len(self.messages)} messages saved to {argument}")
        elif name == "load" and argument:
            conversation = read_json(path)
            validate(conversation, allow_empty_reply=True)
            messages = conversation["messages"]
            told = plain_text(messages[0]) if messages[0]["role"] == "system" else None
            self.config = replace(self.config, system=told)
            self.messages = messages[told is not None :]
            if self.messages[-1]["role"] == "user":
                self.messages.pop()
            self._say(f"{len(self.messages)} messages loaded from {argument}")
        elif name == "help":
            self._say(HELP)
        else:
            what = f"/{name} needs a file" if name in ("save", "load") else f"unknown command /{name}. {HELP}"
            raise ValueError(what)

    def _say(self, line: str) -> None:
        self.write(f"{line}\n", False)

    def talk(self, read: Callable[[], str]) -> None:
        """Read messages and commands until the end of input or /quit; Ctrl-C at the prompt raises KeyboardInterrupt."""
        while True:
            try:
                text = read().strip()
            except EOFError:
                return
            name, _, argument = text.removeprefix("/").partition(" ")
            if text.startswith("/") and name in ("quit", "exit"):
                return
            try:
                if text.startswith("/"):
                    self.command(name, argument.strip())
                elif text:
                    self.ask(text)
            except (ValueError, OSError) as error:
                self._say(str(error))


@contextlib.contextmanager
def line_editing() -> Iterator[None]:
    """Arrow keys and history for input(), the history kept from session to session."""
    import readline

    path = get_base_dir() / "chat_history"
    with contextlib.suppress(OSError):
        readline.read_history_file(path)
    try:
        yield
    finally:
        readline.set_history_length(1000)
        with contextlib.suppress(OSError):
            readline.write_history_file(path)


def hold(name: str, config: Config, step: int | None = None, prompt: str | None = None) -> None:
    """Load a model by name (or ValueError); answer `prompt`, or hold a session on stdin. What is no answer is dim on a
    terminal, and on stderr where answers go elsewhere. With --tensor-parallel rank 0 talks, and the others follow."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # also where a shell started us with SIGINT ignored
    for stream in (sys.stdin, sys.stdout):  # a character that cannot be read or shown does not end the conversation
        stream.reconfigure(errors="replace")  # type: ignore[union-attr]
    compute = Compute.create(config.device_type)
    ranks, live = compute.world_size, compute.rank == 0 and sys.stdout.isatty()
    if config.tensor_parallel != (ranks > 1) or (config.devices and ranks > 1):
        raise ValueError("--tensor-parallel needs `torchrun --nproc-per-node N -m ...`, N above 1, and no --devices")

    def write(text: str, aside: bool) -> None:
        line = text.rstrip("\n")
        text = f"\x1b[2m{line}\x1b[0m{text[len(line) :]}" if live and aside else text
        print0(text, end="", file=sys.stderr if aside and not live else sys.stdout)

    say = partial(print0, file=sys.stderr)
    (found,) = named_model.find_all([name], compute.device, step, say, config.devices, ranks)
    chat = Chat(*found.load(compute.device, 1, config.int8, ranks), config, write, live)
    chat.stops = compute.any_rank
    if prompt is not None:
        chat.ask(prompt)
    elif not (live and sys.stdin.isatty()):
        chat.talk(hf_parallel.on_all_ranks(input))
    else:
        print(HELP)
        try:
            with line_editing():
                chat.talk(hf_parallel.on_all_ranks(lambda: input("> ")))
        finally:
            print()
    compute.close()
