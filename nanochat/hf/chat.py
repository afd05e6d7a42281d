"""How a model chats: in the project's own format, by the template in an open-weights model's folder, or in harmony.

A format turns messages into a prompt's ids, and gives each answer a decoder of text, reasoning and tool calls.
"""

import datetime
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nanochat.chat_format import ChatFormat
from nanochat.common import read_json
from nanochat.conversation import Message, plain_text, validate
from nanochat.detokenizer import AnswerDecoder, Event, Reasoning
from nanochat.hf import template
from nanochat.hf.tokenizer import HFTokenizer

_CONTINUE = "{{ bos_token }}{{ messages[-1].content }}"
_BROKEN = "\ufdd0"  # a noncharacter: stands inside what looks like a special token in somebody's message
HARMONY_CHANNELS = "# Valid channels: analysis, commentary, final. Channel must be included for every message."


def chat_format(folder: Path | str, tokenizer: HFTokenizer) -> "Template | Harmony":
    """The format that the model in `folder` was trained to chat in; without one it goes on with the last message."""
    folder = Path(folder)
    if (folder / "config.json").is_file() and read_json(folder / "config.json").get("model_type") == "gpt_oss":
        return Harmony(tokenizer)
    if (folder / "chat_template.jinja").is_file():
        return Template((folder / "chat_template.jinja").read_text(encoding="utf-8"), tokenizer)
    source = tokenizer.settings.get("chat_template")
    if isinstance(source, list):  # several, by name
        named = {entry.get("name"): entry.get("template") for entry in source if isinstance(entry, dict)}
        source = named.get("default")
    return Template(source if isinstance(source, str) else _CONTINUE, tokenizer)


class Template(ChatFormat):
    """A Jinja template, run where it can reach nothing but the messages and a few filters, as transformers runs it."""

    def __init__(self, source: str, tokenizer: HFTokenizer) -> None:
        super().__init__(tokenizer)
        names = sorted(filter(None, tokenizer.special_tokens), key=len, reverse=True)
        self._special = re.compile("|".join(map(re.escape, names)) or "(?!)")
        self._template = template.Template(source)

    def render(self, messages: Sequence[Message], **variables: Any) -> list[int]:
        """Ids of the conversation, to be continued by the assistant. What looks like a special token in a message is
        text. variables: further ones that the template knows, such as enable_thinking. Raises ValueError for
        messages that the template refuses, and for a template that is broken or reaches for more than it may."""
        validate({"messages": messages}, allow_empty_reply=True)
        messages = [{**m, "content": self._break_marks(plain_text(m))} for m in messages]
        settings = self.tokenizer.settings
        marks = {k: v.get("content") if isinstance(v, dict) else v for k, v in settings.items() if k.endswith("_token")}
        if not marks.get("bos_token"):
            first = self.tokenizer.get_bos_token_id()
            marks["bos_token"] = "" if first is None else self.tokenizer.decode([first])
        text = self._template.render(messages=messages, add_generation_prompt=True, **marks, **variables)
        ids: list[int] = []
        for piece in re.split(f"([^{_BROKEN}]{_BROKEN}[^{_BROKEN}]*{_BROKEN})", text):
            broken = _BROKEN in piece
            encode = self.tokenizer.encode if broken else self.tokenizer.encode_marked
            ids += encode(piece.replace(_BROKEN, "")) if piece else []
        return ids

    def _break_marks(self, text: str) -> str:
        """Break what looks like special tokens, so that it is known again after the template has moved it about."""
        return self._special.sub(lambda m: m[0][0] + _BROKEN + m[0][1:] + _BROKEN, text.replace(_BROKEN, ""))

    def decoder(self, prompt: Sequence[int] = (), stop: Sequence[str] = ()) -> "ThinkDecoder":
        """For the answer to `prompt`; some templates begin the model's thoughts for it."""
        return ThinkDecoder(self.tokenizer, stop, self.tokenizer.decode(prompt[-4:]).rstrip().endswith("<think>"))


class ThinkDecoder(AnswerDecoder):
    """An answer in which what stands between <think> and </think> is reasoning. thinking: it begins with that."""

    def __init__(self, tokenizer: Any, stop: Sequence[str] = (), thinking: bool = False) -> None:
        super().__init__(tokenizer, stop)
        self._names |= {i: name for name in ("<think>", "</think>") if (i := tokenizer.backend.token_to_id(name))}
        self._kind: type[str] | None = Reasoning if thinking else str  # of what comes now; None = nothing to show

    def _text(self, text: str) -> list[Event]:
        if self._kind is Reasoning:
            return [Reasoning(text)] if text else []
        return super()._text(text) if self._kind else []

    def _mark(self, name: str) -> list[Event]:
        events = self._flush_text()
        self._turn(name)
        return events

    def _turn(self, name: str) -> None:
        self._kind = Reasoning if name == "<think>" else str if name == "</think>" else self._kind


class Harmony(ChatFormat):
    """gpt-oss's format (OpenAI, "harmony response format"): messages in channels, of which `final` is the answer."""

    def render(self, messages: Sequence[Message], reasoning: str = "medium", date: str | None = None) -> list[int]:
        """Ids of the conversation, up to the assistant's next turn. What an API calls the system message goes to the
        developer; old reasoning is left out. reasoning: low, medium, high, or ValueError. date: YYYY-MM-DD or today."""
        validate({"messages": messages}, allow_empty_reply=True)
        if reasoning not in ("low", "medium", "high"):
            raise ValueError(f"reasoning {reasoning!r}: choose low, medium or high")
        date = date or datetime.date.today().isoformat()
        special, encode = self.tokenizer.encode_special, self.tokenizer.encode
        ids: list[int] = []

        def add(role: str, text: str, channel: str | None = None) -> None:
            ids.extend([special("<|start|>"), *encode(role)])
            if channel:
                ids.extend([special("<|channel|>"), *encode(channel)])
            ids.extend([special("<|message|>"), *encode(text), special("<|end|>")])

        identity = "You are ChatGPT, a large language model trained by OpenAI.\nKnowledge cutoff: 2024-06\n"
        add("system", f"{identity}Current date: {date}\n\nReasoning: {reasoning}\n\n{HARMONY_CHANNELS}")
        for message in messages:
            role, text = message["role"], plain_text(message)
            if role == "system":
                add("developer", f"# Instructions\n\n{text}")
            else:
                add(role, text, "final" if role == "assistant" else None)
        return [*ids, special("<|start|>"), *encode("assistant")]

    def decoder(self, prompt: Sequence[int] = (), stop: Sequence[str] = ()) -> "HarmonyDecoder":
        """For the answer to `prompt`."""
        return HarmonyDecoder(self.tokenizer, stop)


class HarmonyDecoder(ThinkDecoder):
    """An answer in harmony: `final` and preambles are its text, `analysis` and calls of functions are reasoning."""

    def __init__(self, tokenizer: HFTokenizer, stop: Sequence[str] = ()) -> None:
        super().__init__(tokenizer, stop)
        self._kind, self._header = None, ""

    def _text(self, text: str) -> list[Event]:
        if self._kind is None:
            self._header += text
        return super()._text(text)

    def _turn(self, name: str) -> None:
        if name == "<|message|>":
            said = self._header.partition("<|channel|>")[2].startswith(("final", "commentary"))
            said = said and "to=" not in self._header
            self._kind, self._header = str if said or "<|channel|>" not in self._header else Reasoning, ""
        elif name == "<|channel|>":
            self._header += name
        elif name in ("<|start|>", "<|end|>", "<|return|>", "<|call|>"):
            self._kind, self._header = None, ""
