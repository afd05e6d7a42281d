"""Chat in the terminal: `python -m scripts.chat_cli`, or `-p "..."` for one answer; `--raw` continues a text instead.

`main` loads a model by its name (nanochat/hf/store.py), then a `Chat` goes through the lines that the user types:
commands that begin with a slash, and messages, each of which becomes a request to the engine, whose answer is shown as
it grows. Answers go to stdout. Asides (reasoning, tool calls, speed) are dim on a terminal, and go to stderr where
stdout is a pipe or a file.

Under `torchrun ... --tensor-parallel` every rank runs this same loop on the same lines, and rank 0 alone prints.
"""

import contextlib
import os
import signal
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from nanochat import cli
from nanochat.cli import option
from nanochat.common import STAGES, atomic_write_json, get_base_dir, print0, read_json
from nanochat.compute import Compute
from nanochat.conversation import ChatFormat, Message, plain_text, text_prompt, validate
from nanochat.detokenizer import AnswerDecoder, Event, Reasoning, ToolCall, content_of
from nanochat.engine import Engine, Request
from nanochat.hf import store

HELP = (
    "Type a message, or with --raw the beginning of a text; Ctrl-C stops an answer. /reset forgets the conversation, "
    "/system TEXT instructs the model, /temp NUMBER sets the temperature, /save FILE and /load FILE keep a "
    "conversation, /quit or Ctrl-D ends, /help says this."
)
# Control characters, without tab and newline. A model that prints escape sequences could set the window's title, move
# the cursor or write to the clipboard, so they are removed from what a terminal is shown.
CONTROL_CHARACTERS = dict.fromkeys([*range(9), *range(11, 32), *range(127, 160)])
# The few escape sequences that we send ourselves.
DIM = "\x1b[2m"
NORMAL = "\x1b[0m"
ERASE_LINE = "\r\x1b[K"


@dataclass(frozen=True)
class Config:
    """The model to chat with, and how it answers."""

    prompt: str | None = option(None, "answer this and exit", flag="-p")
    raw: bool = option(False, "continue each prompt as a text, without a chat: for base models, and any other")
    model: str | None = option(None, "any model by its name or folder: see python -m scripts.models list")
    stage: str = option("sft", "training stage of a model of your own", choices=STAGES)
    model_tag: str | None = option(None, "which model of that stage; unset: the newest")
    step: int | None = option(None, "which step; unset: the last")
    system: str | None = option(None, "instructions for the model, put before the first message")
    temperature: float = option(0.0, "0 is the likeliest answer, best for facts and sums; 0.6 to 1 is livelier")
    top_k: int | None = option(None, "draw from the k likeliest tokens only (with --temperature above 0)")
    top_p: float = option(
        1.0, "draw from the likeliest tokens that make up this share of the probability (with --temperature above 0)"
    )
    max_tokens: int | None = option(None, "longest answer in tokens; unset: as far as the context goes")
    seed: int = option(42, "the same seed gives the same answer")
    int8: bool = option(False, "weights of a model of this project in 8 bits, on CPU")
    device_type: str | None = option(None, "cuda, mps or cpu; unset: the best there is")
    devices: str | None = option(None, store.DEVICES)
    tensor_parallel: bool = option(False, "cut a Llama-like model over the processes that torchrun has started")

    def __post_init__(self) -> None:
        """Raise ValueError for a setting that is out of range: here, and not after minutes of loading a model."""
        Request([0], **self.settings())
        if self.raw and self.system is not None:
            raise ValueError("--system is for a chat: with --raw, put that text before the prompt")

    def settings(self) -> dict[str, Any]:
        """Return the settings of each answer, as fields of a Request."""
        return {
            "max_tokens": self.max_tokens,
            "temperature": self.temperature,
            "top_k": self.top_k,
            "top_p": self.top_p,
            "seed": self.seed,
        }


class Chat:
    """A conversation with an engine. `live`: a person watches, who gets colours and progress through a long prompt."""

    def __init__(self, engine: Engine, form: ChatFormat, config: Config, compute: Compute, live: bool = False) -> None:
        self.engine = engine
        self.form = form
        self.config = config
        self.compute = compute
        self.live = live
        self.messages: list[Message] = []

    def talk(self, lines: Iterable[str]) -> None:
        """Answer lines until they end or one says /quit."""
        for line in lines:
            text = line.strip()
            name, _, argument = text.removeprefix("/").partition(" ")
            try:
                if not text:
                    continue
                if not text.startswith("/"):
                    self.ask(line if self.config.raw else text)
                elif name in ("quit", "exit"):
                    return
                else:
                    self.command(name, argument.strip())
            except (ValueError, OSError) as error:  # a wrong command does not end the session
                self._write(f"{error}\n")

    def ask(self, text: str) -> None:
        """Stream the answer to `text`. Ctrl-C ends the answer, and what was said of it stays in the conversation."""
        messages = [*self.messages, {"role": "user", "content": text}]
        request = self.request(messages)
        said: list[Event] = []
        first_token_time = None
        self.engine.add(request)
        with noted_interrupts() as interrupts:
            # Ranks of a tensor-parallel model must agree to stop, or they would wait for each other forever.
            while request.finish_reason is None and not self.compute.any_rank(bool(interrupts)):
                updates = self.engine.step()
                if request.output and first_token_time is None:
                    first_token_time = time.monotonic()
                    if self.live:
                        self._write(ERASE_LINE)
                elif self.live and not request.output:  # a step reads a few hundred tokens of the prompt
                    self._write(f"\rreading: {request.n_read:,} of {len(request.tokens):,} tokens", aside=True)
                for update in updates:
                    self._show(update.events, said)
        if request.finish_reason is None:
            self._show(request.decoder.finish(), said)
            self.engine.abort(request)
            self._write(" [stopped]", aside=True)
        request.raise_if_broken()
        self._write("\n")
        self.messages = [*messages, {"role": "assistant", "content": content_of(said)}]

        n_tokens = len(request.output)
        speed = ""
        # The first token ends the prefill, so decoding took its time for the tokens after it.
        if first_token_time is not None and n_tokens > 1 and (seconds := time.monotonic() - first_token_time):
            speed = f", {(n_tokens - 1) / seconds:.1f} tokens/s"
        self._write(f"[{n_tokens} tokens{speed}]\n", aside=True)

    def request(self, messages: list[Message]) -> Request:
        """Return the request for the next answer of a conversation, without its oldest turns if it is too long.

        With --raw, that is the continuation of the last message. Raises ValueError if it is too long by itself.
        """
        if self.config.raw:
            prompt = text_prompt(messages[-1]["content"], self.engine.tokenizer)
            return Request(prompt, decoder=AnswerDecoder(self.engine.tokenizer), **self.config.settings())
        prompt = self.form.prompt(self._system() + messages, self.engine.context, self.config.max_tokens)
        return Request(prompt, decoder=self.form.decoder(prompt), **self.config.settings())

    def _system(self) -> list[Message]:
        """Return the instructions as the messages, one or none, that begin the conversation."""
        return [{"role": "system", "content": self.config.system}] if self.config.system else []

    def _show(self, events: Sequence[Event], said: list[Event]) -> None:
        """Write the events of a step, and append them to what was said of this answer."""
        for event in events:
            if said and isinstance(said[-1], Reasoning) and not isinstance(event, Reasoning):
                self._write("\n", aside=True)
            said.append(event)
            text = str(event)
            if isinstance(event, ToolCall):
                text = f"[{event.expression} = {event.result or 'not valid'}] "
            if self.live:
                text = text.translate(CONTROL_CHARACTERS)
            self._write(text, aside=isinstance(event, (Reasoning, ToolCall)))

    def _write(self, text: str, aside: bool = False) -> None:
        if aside and self.live:
            print0(f"{DIM}{text}{NORMAL}", end="")
        else:
            print0(text, end="", file=sys.stderr if aside else sys.stdout)

    def command(self, name: str, argument: str) -> None:
        """Do what `/name argument` says. Raises ValueError or OSError if that cannot be done."""
        match name:
            case "reset" | "clear":
                self.messages = []
            case "system":
                self.config = replace(self.config, system=argument or None)
                told = f"The model is told: {argument}" if argument else "The model is told nothing beforehand."
                self._write(f"{told}\n")
            case "temp":
                temperature = float(argument) if argument else self.config.temperature
                self.config = replace(self.config, temperature=temperature)
                self._write(f"temperature {temperature:g}\n")
            case "save" if argument:
                self._save(argument)
            case "load" if argument:
                self._load(argument)
            case "save" | "load":
                raise ValueError(f"/{name} needs a file")
            case "help":
                self._write(f"{HELP}\n")
            case _:
                raise ValueError(f"unknown command /{name}. {HELP}")

    def _save(self, path: str) -> None:
        if not self.messages:
            raise ValueError("nothing has been said yet")
        atomic_write_json(Path(os.path.expanduser(path)), {"messages": self._system() + self.messages})
        self._write(f"{len(self.messages)} messages saved to {path}\n")

    def _load(self, path: str) -> None:
        # os.path.expanduser leaves "~nobody" as it is, where Path.expanduser raises RuntimeError.
        conversation = read_json(Path(os.path.expanduser(path)))
        validate(conversation, allow_empty=True)
        messages = conversation["messages"]
        system = None
        if messages[0]["role"] == "system":
            system = plain_text(messages[0])
            messages = messages[1:]
        if messages[-1]["role"] == "user":  # which was never answered; a new message must follow an answer
            messages = messages[:-1]
        self.config = replace(self.config, system=system)
        self.messages = messages
        self._write(f"{len(messages)} messages loaded from {path}\n")


@contextlib.contextmanager
def noted_interrupts() -> Iterator[list[int]]:
    """Give a list that grows at each Ctrl-C, instead of an exception: that could end an engine's step in the middle."""
    signals: list[int] = []
    handler = signal.signal(signal.SIGINT, lambda signum, frame: signals.append(signum))
    try:
        yield signals
    finally:
        signal.signal(signal.SIGINT, handler)


def typed_lines(compute: Compute, prompt: str = "") -> Iterator[str]:
    """Yield the lines of stdin until it ends, on all ranks those that rank 0 reads. Ctrl-C raises KeyboardInterrupt."""
    has_ranks = compute.world_size > 1
    # A group of its own, because in the usual one a rank that waits for ten minutes takes the others for dead.
    group = dist.new_group(backend="gloo", timeout=timedelta(days=365)) if has_ranks else None
    while True:
        line: list[str | None] = [None]
        if compute.rank == 0:
            with contextlib.suppress(EOFError):
                line = [input(prompt)]
        if has_ranks:
            dist.broadcast_object_list(line, group=group)
        if line[0] is None:
            return
        yield line[0]


@contextlib.contextmanager
def line_editing() -> Iterator[None]:
    """Give input() arrow keys and a history that is kept from session to session."""
    if sys.platform == "win32":
        yield  # its console has arrow keys and a history of its own, and Python no readline
        return
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
    """Load a model, then answer `--prompt`, or hold a session on stdin."""
    config = cli.parse(Config, description=__doc__.split("\n\n")[0])
    # A shell may have started us with SIGINT ignored, as it does for jobs in the background.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    compute = Compute.create(config.device_type)
    ranks = compute.world_size
    if config.tensor_parallel != (ranks > 1) or (config.devices and ranks > 1):
        raise ValueError("--tensor-parallel needs `torchrun --nproc-per-node N -m ...`, N above 1, and no --devices")
    live = compute.rank == 0 and sys.stdout.isatty()

    name = config.model or f"{config.stage}/{config.model_tag or ''}"
    (model,) = store.find_all([name], compute.device, config.step, config.devices, ranks)
    print0(model.placement, file=sys.stderr)
    engine, form = model.load(compute.device, max_batch=1, int8=config.int8, ranks=ranks)
    torch.set_num_threads(engine.threads)
    if not form.can_chat and not config.raw:
        raise ValueError(f"{model.name} has no chat format, it only continues text: add --raw")
    chat = Chat(engine, form, config, compute, live)

    if config.prompt is not None:
        chat.ask(config.prompt)
    elif live and sys.stdin.isatty():
        print(HELP)
        try:
            with line_editing():
                chat.talk(typed_lines(compute, "> "))
        finally:
            print()
    else:
        chat.talk(typed_lines(compute))
    compute.close()


if __name__ == "__main__":
    cli.run(main)
