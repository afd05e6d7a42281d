"""From the tokens of an answer, as they come, to text and tool calls that can be shown.

`AnswerDecoder` reads token after token and returns events: text, reasoning and calls of the calculator. Inside it,
`StopFilter` ends the answer at the texts that a request named in `stop`. `content_of` turns events back into a message.
"""

import codecs
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple


class ToolCall(NamedTuple):
    """A use of the calculator; `result` is None when the expression was not valid."""

    expression: str
    result: str | None


class Reasoning(str):
    """A piece of what the model says to itself before it answers."""


Event = str | Reasoning | ToolCall


def content_of(events: Iterable[Event]) -> list[dict[str, str]]:
    """Return the content of an assistant's message that said `events`, for the conversation to go on with.

    Reasoning is left out, because models are trained on conversations without that of earlier turns.
    """
    parts: list[dict[str, str]] = []
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
    """Passes text on until one of `stops` is complete, and holds back what may be the beginning of one.

    The text that passes does not depend on the pieces in which it comes.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""
        self.stopped = False

    def feed(self, text: str) -> str:
        """Return the text that can be shown now that `text` has come."""
        if self.stopped:
            return ""
        text = self._held + text
        # The stop that is complete first wins, which need not be the one that begins first; of two that are complete
        # at once, the longer one.
        found = []
        for stop in self._stops:
            start = text.find(stop)
            if start >= 0:
                found.append((start + len(stop), start))
        if found:
            self.stopped = True
            self._held = ""
            _, start = min(found)
            return text[:start]
        n_held = self._longest_beginning(text)
        shown = text[: len(text) - n_held]
        self._held = text[len(text) - n_held :]
        return shown

    def _longest_beginning(self, text: str) -> int:
        """Return the length of the longest end of `text` with which a stop begins, 0 if there is none."""
        longest_stop = max((len(stop) for stop in self._stops), default=1)
        for n in range(min(longest_stop - 1, len(text)), 0, -1):
            if any(stop.startswith(text[-n:]) for stop in self._stops):
                return n
        return 0

    def flush(self) -> str:
        """Return the text held back, when nothing more comes that could make it a stop."""
        held = self._held
        self._held = ""
        return held


class AnswerDecoder:
    """Turns the tokens of an answer into text and tool calls.

    A character whose bytes are split over tokens is held back until it is whole, and so is what may become one of the
    texts `stop`; after one, `stopped` is true and nothing follows.

    Formats with other special tokens subclass it (hf/chat.py): they name further special tokens in `more_marks`, and
    override `show`, which gets the text, and `enter`, which gets the name of each special token.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str] = (), more_marks: Mapping[int, str] | None = None) -> None:
        self._tokenizer = tokenizer
        self._filter = StopFilter(stop)
        self._marks = {token: name for name, token in tokenizer.special_tokens.items()}
        self._marks.update(more_marks or {})
        # An incremental decoder keeps the first bytes of a character until the last one comes.
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._inside: str | None = None  # the special token that opened the tool's part: python_start or output_start
        self._collected: list[int] = []  # tokens since then
        self._expression: str | None = None  # of a call whose result has not come yet

    @property
    def stopped(self) -> bool:
        """True after a stop text has ended the answer."""
        return self._filter.stopped

    def feed(self, token: int) -> list[Event]:
        """Return what this token completes, in order: pieces of text and tool calls; often one, sometimes nothing."""
        if self.stopped:
            return []
        name = self._marks.get(token)
        if name is not None:
            return self.enter(name)
        if self._inside:
            self._collected.append(token)
            return []
        # Plain text after a call means that the call's result will not come.
        events = self._flush_call()
        text = self._utf8.decode(self._tokenizer.decode_bytes([token]))
        return events + self.show(text)

    def finish(self) -> list[Event]:
        """Return what is left at the end: half a character shows as U+FFFD, an open call has no result."""
        if self.stopped:
            return []
        events: list[Event] = []
        if self._inside == "<|python_start|>":
            events += self.enter("<|python_end|>")
        events += self.flush_text()
        events += self._flush_call()
        return events

    def show(self, text: str) -> list[Event]:
        """Return the events that a piece of text makes, which may be empty."""
        shown = self._filter.feed(text)
        return [shown] if shown else []

    def enter(self, name: str) -> list[Event]:
        """Return the events that the special token `name` completes."""
        before = self._inside
        content = self._tokenizer.decode(self._collected)
        self._inside = name if name in ("<|python_start|>", "<|output_start|>") else None
        self._collected = []
        events = self.flush_text()
        if self.stopped:
            return events
        if name == "<|python_end|>" and before == "<|python_start|>":
            # The event waits for the result, so that a call is shown in one piece.
            self._expression = content
        elif name == "<|output_end|>" and before == "<|output_start|>" and self._expression is not None:
            events.append(ToolCall(self._expression, content))
            self._expression = None
        elif name != "<|output_start|>":
            events += self._flush_call()
        return events

    def flush_text(self) -> list[Event]:
        """Return the text held back so far, because no more text follows here."""
        events = self.show(self._utf8.decode(b"", final=True))
        held = self._filter.flush()
        if held:
            events.append(held)
        return events

    def _flush_call(self) -> list[Event]:
        """Return the call whose result has not come, without one."""
        expression = self._expression
        self._expression = None
        return [] if expression is None else [ToolCall(expression, None)]
