"""The tokens of an answer, as they come, as text and tool calls fit to be shown."""

import codecs
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from nanochat.conversation import Part
from nanochat.tokenizer import Tokenizer


class ToolCall(NamedTuple):
    """A use of the calculator; `result` is None when the expression was not valid."""

    expression: str
    result: str | None


class Reasoning(str):
    """A piece of what the model says to itself before it answers."""


Event = str | Reasoning | ToolCall


def content_of(events: Iterable[Event]) -> list[Part]:
    """The content of an assistant's message that said `events`, for the conversation to go on with: reasoning is left
    out, as models are trained to find it."""
    parts: list[Part] = []
    for event in events:
        if isinstance(event, ToolCall):
            parts.append({"type": "python", "text": event.expression})
            if event.result is not None:
                parts.append({"type": "python_output", "text": event.result})
        elif isinstance(event, Reasoning):
            continue
        elif parts and parts[-1]["type"] == "text":
            parts[-1]["text"] += event
        else:
            parts.append({"type": "text", "text": event})
    return [part for part in parts if part["text"] or part["type"] == "python_output"]


class StopFilter:
    """Passes text on until one of `stops` is complete, and holds back what may be the beginning of one. What is shown
    does not depend on the pieces in which the text comes.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops, self._held = tuple(stops), ""
        self.stopped = False

    def feed(self, text: str) -> str:
        """What can be shown after `text` has come."""
        if self.stopped:
            return ""
        text = self._held + text
        found = [(at + len(stop), at) for stop in self._stops if (at := text.find(stop)) >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)[1]]
        longest = max((len(stop) for stop in self._stops), default=1) - 1
        ends = (n for n in range(min(longest, len(text)), 0, -1) if any(s.startswith(text[-n:]) for s in self._stops))
        held = next(ends, 0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]

    def flush(self) -> str:
        """What was held back, when nothing more comes that could make it a stop."""
        held, self._held = self._held, ""
        return held


class AnswerDecoder:
    """Text and tool calls out of tokens. A character whose bytes are split over tokens is held back until it is whole,
    and so is what may become one of the texts `stop`; after one, `stopped` is true and nothing follows.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()) -> None:
        self._tokenizer, self._filter = tokenizer, StopFilter(stop)
        self._names = {token: name for name, token in tokenizer.special_tokens.items()}
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._inside: str | None = None  # the mark we are behind: <|python_start|> or <|output_start|>
        self._collected: list[int] = []
        self._expression: str | None = None  # of a call whose result has not come yet

    @property
    def stopped(self) -> bool:
        """Whether a stop text has ended the answer."""
        return self._filter.stopped

    def feed(self, token: int) -> list[Event]:
        """What this token completes, in order: pieces of text and tool calls; often one, sometimes nothing."""
        if self.stopped:
            return []
        name = self._names.get(token)
        if name is None and self._inside:
            self._collected.append(token)
            return []
        if name is None:
            call = self._flush_call()
            return call + self._text(self._utf8.decode(self._tokenizer.decode_bytes([token])))
        return self._mark(name)

    def finish(self) -> list[Event]:
        """What is left at the end of the answer: half a character shows as U+FFFD, an open call without result."""
        if self.stopped:
            return []
        events = self._mark("<|python_end|>") if self._inside == "<|python_start|>" else []
        return events + self._flush_text() + self._flush_call()

    def _text(self, text: str) -> list[Event]:
        shown = self._filter.feed(text)
        return [shown] if shown else []

    def _mark(self, name: str) -> list[Event]:
        inside, content = self._inside, self._tokenizer.decode(self._collected)
        self._inside, self._collected = name if name in ("<|python_start|>", "<|output_start|>") else None, []
        events = self._flush_text()
        if self.stopped:
            return events
        if name == "<|python_end|>" and inside == "<|python_start|>":
            self._expression = content
        elif name == "<|output_end|>" and inside == "<|output_start|>" and self._expression is not None:
            events.append(ToolCall(self._expression, content))
            self._expression = None
        elif name != "<|output_start|>":
            events += self._flush_call()
        return events

    def _flush_text(self) -> list[Event]:
        events = self._text(self._utf8.decode(b"", final=True))
        held = self._filter.flush()
        return [*events, held] if held else events

    def _flush_call(self) -> list[Event]:
        expression, self._expression = self._expression, None
        return [] if expression is None else [ToolCall(expression, None)]
