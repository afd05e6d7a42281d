"""How open-weights models chat: by the template in their folder, or in harmony; and what of an answer is reasoning.

A format gives `render(messages) -> ids`, which end where the assistant begins, and `decoder()`, whose
`feed(token)` and `finish()` return what a token completes, in order: text of the answer, or `Reasoning`.
"""

import codecs
import datetime
import json
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from nanochat.common import read_json
from nanochat.conversation import validate
from nanochat.hf_tokenizer import HFTokenizer

_SECONDS, _LONGEST = 2.0, 1 << 22  # of processor time and of characters, that a template may take
_CONTINUE = "{{ bos_token }}{{ messages[-1].content }}"
_BROKEN = "\ufdd0"  # a noncharacter: stands inside what looks like a special token in somebody's message
HARMONY_CHANNELS = "# Valid channels: analysis, commentary, final. Channel must be included for every message."


class Reasoning(str):
    """A piece of what the model says to itself before it answers."""


def chat_format(folder: Path | str, tokenizer: HFTokenizer) -> "Template | Harmony":
    """The format that the model in `folder` was trained to chat in; without one it goes on with the last message."""
    folder = Path(folder)
    if (folder / "config.json").is_file() and read_json(folder / "config.json").get("model_type") == "gpt_oss":
        return Harmony(tokenizer)
    if (folder / "chat_template.jinja").is_file():
        return Template((folder / "chat_template.jinja").read_text(encoding="utf-8"), tokenizer)
    template = tokenizer.settings.get("chat_template")
    if isinstance(template, list):  # several, by name
        named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
        template = named.get("default")
    return Template(template if isinstance(template, str) else _CONTINUE, tokenizer)


def _plain(content: Any) -> str:
    """A message's content as text."""
    return content if isinstance(content, str) else "".join(part["text"] for part in content)


class Template:
    """A Jinja template, run where it can reach nothing but the messages and a few filters, as transformers runs it."""

    def __init__(self, source: str, tokenizer: HFTokenizer) -> None:
        self.tokenizer = tokenizer
        names = sorted(filter(None, tokenizer.special_tokens), key=len, reverse=True)
        self._special = re.compile("|".join(map(re.escape, names)) or "(?!)")
        self._template = _compile(source)

    def render(self, messages: Sequence[dict[str, Any]], **variables: Any) -> list[int]:
        """Ids of the conversation, to be continued by the assistant. What looks like a special token in a message is
        text. variables: further ones that the template knows, such as enable_thinking. Raises ValueError for
        messages that the template refuses, and for a template that is broken or reaches for more than it may."""
        validate({"messages": messages}, allow_empty_reply=True)
        messages = [{**m, "content": self._break_marks(_plain(m["content"]))} for m in messages]
        settings = self.tokenizer.settings
        marks = {k: v.get("content") if isinstance(v, dict) else v for k, v in settings.items() if k.endswith("_token")}
        if not marks.get("bos_token"):
            first = self.tokenizer.get_bos_token_id()
            marks["bos_token"] = "" if first is None else self.tokenizer.decode([first])
        text = _run(self._template, {"messages": messages, "add_generation_prompt": True, **marks, **variables})
        ids = []
        for piece in re.split(f"([^{_BROKEN}]{_BROKEN}[^{_BROKEN}]*{_BROKEN})", text):
            broken = _BROKEN in piece
            encode = self.tokenizer.encode if broken else self.tokenizer.encode_marked
            ids += encode(piece.replace(_BROKEN, "")) if piece else []
        return ids

    def _break_marks(self, text: str) -> str:
        """The text with what looks like special tokens in it broken, so that it is known again after the template has
        moved it about."""
        return self._special.sub(lambda m: m[0][0] + _BROKEN + m[0][1:] + _BROKEN, text.replace(_BROKEN, ""))

    def decoder(self) -> "Decoder":
        """For one answer."""
        return Decoder(self.tokenizer)


def _compile(source: str) -> Any:
    from jinja2 import TemplateError
    from jinja2.exceptions import SecurityError
    from jinja2.ext import loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Environment(ImmutableSandboxedEnvironment):
        """The sandbox, in which a short expression cannot make a long string or number either."""

        intercepted_binops = frozenset(("*", "**", "%"))

        def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
            repeats = [x for x in (left, right) if not isinstance(x, (str, list, tuple))]
            grows = operator == "**" or (operator == "*" and len(repeats) == 1)
            if (grows and max(map(abs, repeats), default=0) > 10_000) or (operator == "%" and isinstance(left, str)):
                raise SecurityError(f"operator {operator} is limited here")
            return super().call_binop(context, operator, left, right)

        def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
            pads = isinstance(obj, str) and attr in ("center", "ljust", "rjust", "zfill", "expandtabs", "format")
            return not pads and super().is_safe_attribute(obj, attr, value)

    def refuse(message: str) -> None:
        raise TemplateError(message)

    def to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None, **layout: Any) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=min(indent, 16) if indent else indent, **layout)

    environment = Environment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
    for name in ("center", "format", "wordwrap", "xmlattr"):
        del environment.filters[name]
    environment.filters["tojson"] = to_json
    environment.globals = {"range": environment.globals["range"], "namespace": environment.globals["namespace"]}
    environment.globals |= {"dict": dict, "raise_exception": refuse}
    environment.globals["strftime_now"] = lambda pattern: datetime.datetime.now().strftime(pattern[:100])
    try:
        return environment.from_string(source)
    except (TemplateError, RecursionError) as error:
        raise ValueError(f"the model's chat template is broken: {error}") from error


def _run(template: Any, variables: dict[str, Any]) -> str:
    """The rendered template; ValueError when it fails, refuses, or takes more than its share of time or space."""
    from jinja2 import TemplateError

    until, pieces, length = time.thread_time() + _SECONDS, [], 0

    def watch(frame: FrameType, event: str, argument: Any) -> Any:
        if time.thread_time() > until:
            raise TimeoutError(f"it ran for more than {_SECONDS:.0f} s")
        return watch

    before = sys.gettrace()
    sys.settrace(watch)
    try:
        for piece in template.generate(variables):
            pieces.append(piece)
            length += len(piece)
            if length > _LONGEST:
                raise OverflowError(f"it made more than {_LONGEST} characters")
    except (
        TemplateError,
        ArithmeticError,
        AttributeError,
        LookupError,
        RecursionError,
        TimeoutError,
        TypeError,
    ) as error:
        raise ValueError(f"the model's chat template refuses this conversation: {error}") from error
    finally:
        sys.settrace(before)
    return "".join(pieces)


class Decoder:
    """Tokens of one answer, as they come, into pieces of text; what stands between <think> and </think> is reasoning.

    A character whose bytes are split over tokens is held back until it is whole.
    """

    def __init__(self, tokenizer: HFTokenizer) -> None:
        self.tokenizer = tokenizer
        self._names = {i: name for name, i in tokenizer.special_tokens.items()}
        self._names |= {i: name for name in ("<think>", "</think>") if (i := tokenizer.backend.token_to_id(name))}
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._kind: type[str] | None = str  # what the text is that comes now; None = nothing to show

    def feed(self, token: int) -> list[str]:
        """What this token completes."""
        if token not in self._names:
            return self._text(self.tokenizer.decode_bytes([token]))
        rest = self._text(b"", final=True)
        self._mark(self._names[token])
        return rest

    def finish(self) -> list[str]:
        """What is left at the end of the answer: half a character shows as U+FFFD."""
        return self._text(b"", final=True)

    def _text(self, data: bytes, final: bool = False) -> list[str]:
        text = self._utf8.decode(data, final)
        if final:
            self._utf8.reset()
        return [self._kind(text)] if text and self._kind else []

    def _mark(self, name: str) -> None:
        self._kind = {"<think>": Reasoning, "</think>": str}.get(name, self._kind)


class Harmony:
    """gpt-oss's format (OpenAI, "harmony response format"): messages in channels, of which `final` is the answer."""

    def __init__(self, tokenizer: HFTokenizer) -> None:
        self.tokenizer = tokenizer

    def render(
        self, messages: Sequence[dict[str, Any]], reasoning: str = "medium", date: str | None = None
    ) -> list[int]:
        """Ids of the conversation, up to the assistant's next turn. What an API calls the system message goes to the
        developer; earlier reasoning is left out. reasoning: low | medium | high. date: YYYY-MM-DD, unset: today."""
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
            role, text = message["role"], _plain(message["content"])
            if role == "system":
                add("developer", f"# Instructions\n\n{text}")
            else:
                add(role, text, "final" if role == "assistant" else None)
        return [*ids, special("<|start|>"), *encode("assistant")]

    def decoder(self) -> "HarmonyDecoder":
        """For one answer."""
        return HarmonyDecoder(self.tokenizer)


class HarmonyDecoder(Decoder):
    """An answer in harmony: `final` and preambles are its text, `analysis` and calls of functions are reasoning."""

    def __init__(self, tokenizer: HFTokenizer) -> None:
        super().__init__(tokenizer)
        self._kind, self._header = None, b""

    def _text(self, data: bytes, final: bool = False) -> list[str]:
        if self._kind is None:
            self._header += data
        return super()._text(data, final)

    def _mark(self, name: str) -> None:
        if name == "<|message|>":
            header = self._header.decode(errors="replace")
            said = header.partition("<|channel|>")[2].startswith(("final", "commentary")) and "to=" not in header
            self._kind, self._header = str if said or "<|channel|>" not in header else Reasoning, b""
        elif name == "<|channel|>":
            self._header += name.encode()
        elif name in ("<|start|>", "<|end|>", "<|return|>", "<|call|>"):
            self._kind, self._header = None, b""
