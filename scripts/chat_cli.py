"""Chat in the terminal: `python -m scripts.chat_cli`, or `-p "..."` for one answer."""

import contextlib
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from nanochat import cli
from nanochat.checkpoint import load_model
from nanochat.cli import option
from nanochat.common import atomic_write_json, get_base_dir, read_json
from nanochat.compute import Compute
from nanochat.conversation import parse_completion, validate
from nanochat.engine import AnswerDecoder, Engine, Request, ToolCall

HELP = (
    "Type a message; Ctrl-C stops an answer. /reset forgets the conversation, /system TEXT instructs the model, "
    "/temp NUMBER sets the temperature, /save FILE and /load FILE keep a conversation, /quit or Ctrl-D ends, "
    "/help says this."
)


@dataclass(frozen=True)
class Config:
    """What to chat with, and how it answers."""

    prompt: str | None = option(None, "answer this and exit", flag="-p")
    stage: str = option("sft", "training stage of the model", choices=("base", "mid", "sft", "rl"))
    model_tag: str | None = option(None, "which model of that stage; unset: the newest")
    step: int | None = option(None, "which step; unset: the last")
    system: str | None = option(None, "instructions for the model, put before the first message")
    temperature: float = option(0.0, "0 is the likeliest answer, best for facts and sums; 0.6 to 1 is livelier")
    top_k: int | None = option(None, "draw from the k likeliest tokens only")
    top_p: float = option(1.0, "draw from the likeliest tokens that make up this share of the probability")
    max_tokens: int | None = option(None, "longest answer in tokens; unset: as far as the context goes")
    seed: int = option(42, "the same seed gives the same answer")
    int8: bool = option(False, "weights of a model of this project in 8 bits, on CPU")
    device_type: str | None = option(None, "cuda, mps or cpu; unset: the best there is")


class Chat:
    """A conversation with an engine, remembered from answer to answer. live: said to a person at a terminal, who also
    sees tool calls, how far a long prompt is read, and the speed."""

    def __init__(self, engine: Engine, config: Config, write: Callable[[str], None], live: bool) -> None:
        self.engine, self.config, self.write, self.live = engine, config, write, live
        self.messages: list[dict] = []

    def ask(self, text: str) -> None:
        """Stream the answer to `text`; Ctrl-C ends the answer, and what was said of it is kept."""
        config, messages = self.config, [*self.messages, {"role": "user", "content": text}]
        system = [{"role": "system", "content": config.system}] if config.system else []
        request = self.engine.chat_request(
            {"messages": system + messages},
            config.max_tokens,
            temperature=config.temperature,
            top_k=config.top_k,
            top_p=config.top_p,
            seed=config.seed,
        )
        decoder, first = AnswerDecoder(self.engine.tokenizer), None
        for token in self._tokens(request):
            first = first or time.monotonic()
            self._show(decoder.feed(token))
        self._show(decoder.finish())
        if request.finish_reason == "abort":
            self.write(" [stopped]")
        if self.live and first and (seconds := time.monotonic() - first) and len(request.output) > 1:
            speed = (len(request.output) - 1) / seconds
            self.write(f"\n\x1b[2m{len(request.output)} tokens, {speed:.1f} tokens/s\x1b[0m")
        self.write("\n")
        content = parse_completion(request.output, self.engine.tokenizer)
        self.messages = [*messages, {"role": "assistant", "content": content}]

    def _tokens(self, request: Request) -> Iterator[int]:
        """The answer's tokens as they come; a long prompt that is read in several steps shows how far that is.

        Ctrl-C is heard between two steps: one that is torn in the middle would spoil the engine for the next answer.
        """
        stops: list[int] = []
        before = signal.signal(signal.SIGINT, lambda signum, frame: stops.append(signum))
        self.engine.add(request)
        n_seen = 0
        try:
            while request.finish_reason is None and not stops:
                self.engine.step()
                if self.live and not request.output:
                    self.write(f"\r\x1b[2mreading: {request.n_read:,} of {len(request.tokens):,} tokens\x1b[0m")
                elif self.live and not n_seen:
                    self.write("\r\x1b[K")
                yield from request.output[n_seen:]
                n_seen = len(request.output)
        finally:
            self.engine.abort(request)
            signal.signal(signal.SIGINT, before)

    def _show(self, events: list[str | ToolCall]) -> None:
        for event in events:
            if isinstance(event, str):
                self.write(event)
            elif self.live:
                self.write(f"\x1b[2m[{event.expression} = {event.result or 'not valid'}]\x1b[0m ")

    def command(self, name: str, argument: str) -> None:
        """Do what `/name argument` says. Raises ValueError or OSError when that cannot be."""
        if name in ("reset", "clear"):
            self.messages = []
        elif name == "system":
            self.config = replace(self.config, system=argument or None)
            self.write(f"The model is told: {argument}\n" if argument else "The model is told nothing beforehand.\n")
        elif name == "temp":
            temperature = float(argument) if argument else self.config.temperature
            Request([0], temperature=temperature)  # refuses what no answer could be drawn with
            self.config = replace(self.config, temperature=temperature)
            self.write(f"temperature {temperature:g}\n")
        elif name == "save" and argument:
            system = [{"role": "system", "content": self.config.system}] if self.config.system else []
            if not self.messages:
                raise ValueError("nothing has been said yet")
            atomic_write_json(Path(argument).expanduser(), {"messages": system + self.messages})
            self.write(f"{len(self.messages)} messages saved to {argument}\n")
        elif name == "load" and argument:
            conversation = read_json(Path(argument).expanduser())
            validate(conversation, allow_empty_reply=True)
            first, *rest = conversation["messages"]
            has_system = first["role"] == "system" and isinstance(first["content"], str)
            self.config = replace(self.config, system=first["content"] if has_system else None)
            self.messages = rest if has_system else [first, *rest]
            if self.messages[-1]["role"] == "user":
                self.messages.pop()
            self.write(f"{len(self.messages)} messages loaded from {argument}\n")
        elif name == "help":
            self.write(HELP + "\n")
        else:
            raise ValueError(
                f"/{name} needs a file" if name in ("save", "load") else f"unknown command /{name}. {HELP}"
            )


def talk(chat: Chat, read: Callable[[], str]) -> None:
    """Read messages and commands until the end of input or /quit; Ctrl-C at the prompt raises KeyboardInterrupt."""
    while True:
        try:
            text = read().strip()
        except EOFError:
            return
        name, _, argument = text.removeprefix("/").partition(" ")
        if not text.startswith("/"):
            if text:
                chat.ask(text)
        elif name in ("quit", "exit"):
            return
        else:
            try:
                chat.command(name, argument.strip())
            except (ValueError, OSError) as error:
                chat.write(f"{error}\n")


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


def main() -> None:
    """Load a model; answer `--prompt`, or hold a session on standard input."""
    config = cli.parse(Config, description=__doc__)
    compute = Compute.create(config.device_type)
    model, tokenizer, meta = load_model(config.stage, compute.device, config.model_tag, config.step)
    on_terminal = sys.stdin.isatty() and sys.stdout.isatty()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # also where a shell started us with SIGINT ignored
    chat = Chat(
        Engine(model, tokenizer, max_batch=1, int8=config.int8),
        config,
        write=lambda text: print(text, end="", flush=True),
        live=sys.stdout.isatty(),
    )
    if config.prompt is not None:
        chat.ask(config.prompt)
        return
    if not on_terminal:
        talk(chat, read=input)
        return
    print(f"{meta['stage']} model {meta['tag']}, step {meta['step']}. {HELP}")
    try:
        with line_editing():
            talk(chat, read=lambda: input("> "))
    finally:
        print()


if __name__ == "__main__":
    cli.run(main)
