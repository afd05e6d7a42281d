"""Chat in the terminal: `python -m scripts.chat_cli`, or `-p "..."` for one answer."""

import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass

from nanochat import cli
from nanochat.checkpoint import load_model
from nanochat.cli import option
from nanochat.compute import Compute
from nanochat.conversation import parse_completion
from nanochat.engine import AnswerDecoder, Engine, ToolCall

HELP = "Type a message. Ctrl-C stops an answer. /clear forgets the conversation, /exit or Ctrl-D ends, /help says this."


@dataclass(frozen=True)
class Config:
    """What to chat with, and how it answers."""

    prompt: str | None = option(None, "answer this and exit", flag="-p")
    stage: str = option("sft", "training stage of the model", choices=("base", "mid", "sft", "rl"))
    model_tag: str | None = option(None, "which model of that stage; unset: the newest")
    step: int | None = option(None, "which step; unset: the last")
    temperature: float = option(0.0, "0 is the likeliest answer, best for facts and sums; 0.6 to 1 is livelier")
    top_k: int | None = option(None, "draw from the k likeliest tokens only")
    max_tokens: int | None = option(None, "longest answer in tokens; unset: as far as the context goes")
    seed: int = option(42, "the same seed gives the same answer")
    device_type: str | None = option(None, "cuda, mps or cpu; unset: the best there is")


class Chat:
    """A conversation with an engine, remembered from answer to answer."""

    def __init__(self, engine: Engine, config: Config, write: Callable[[str], None], dim: bool) -> None:
        self.engine, self.config, self.write, self.dim = engine, config, write, dim
        self.messages: list[dict] = []

    def ask(self, text: str) -> None:
        """Stream the answer to `text`; Ctrl-C ends the answer, and what was said of it is kept."""
        config, messages = self.config, [*self.messages, {"role": "user", "content": text}]
        request = self.engine.chat_request(
            {"messages": messages},
            config.max_tokens,
            temperature=config.temperature,
            top_k=config.top_k,
            seed=config.seed,
        )
        decoder = AnswerDecoder(self.engine.tokenizer)
        try:
            for token in self.engine.stream(request):
                self._show(decoder.feed(token))
            self._show(decoder.finish())
        except KeyboardInterrupt:
            self.write(" [stopped]")
        self.write("\n")
        self.messages = [
            *messages,
            {"role": "assistant", "content": parse_completion(request.output, self.engine.tokenizer)},
        ]

    def _show(self, events: list[str | ToolCall]) -> None:
        for event in events:
            if isinstance(event, str):
                self.write(event)
            elif self.dim:
                self.write(f"\x1b[2m[{event.expression} = {event.result or 'not valid'}]\x1b[0m ")


def talk(chat: Chat, read: Callable[[], str]) -> None:
    """Read messages and commands until the end of input or /exit; Ctrl-C at the prompt raises KeyboardInterrupt."""
    while True:
        try:
            text = read().strip()
        except EOFError:
            return
        if text in ("/exit", "/quit"):
            return
        elif text == "/clear":
            chat.messages = []
        elif text == "/help":
            chat.write(HELP + "\n")
        elif text.startswith("/"):
            chat.write(f"unknown command {text.split()[0]}. {HELP}\n")
        elif text:
            chat.ask(text)


def main() -> None:
    """Load a model; answer `--prompt`, or hold a session on standard input."""
    config = cli.parse(Config, description=__doc__)
    compute = Compute.create(config.device_type)
    model, tokenizer, meta = load_model(config.stage, compute.device, config.model_tag, config.step)
    on_terminal = sys.stdin.isatty() and sys.stdout.isatty()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # also where a shell started us with SIGINT ignored
    chat = Chat(
        Engine(model, tokenizer, max_batch=1),
        config,
        write=lambda text: print(text, end="", flush=True),
        dim=sys.stdout.isatty(),
    )
    if config.prompt is not None:
        chat.ask(config.prompt)
        return
    if on_terminal:
        import readline  # noqa: F401  (gives input() line editing and history)

        print(f"{meta['stage']} model {meta['tag']}, step {meta['step']}. {HELP}")
    try:
        talk(chat, read=lambda: input("> " if on_terminal else ""))
    finally:
        if on_terminal:
            print()


if __name__ == "__main__":
    cli.run(main)
