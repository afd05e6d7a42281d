"""Chat formats of open-weights models: a Jinja template from the model's folder, or harmony for gpt-oss.

A format turns messages into the ids of a prompt, and gives each answer a decoder that tells text from reasoning.
`chat_format` picks the format that a folder's model was trained in; `ChatFormat` in conversation.py is their protocol,
`AnswerDecoder` in detokenizer.py that of the decoders.

    TemplateFormat   chat_template.jinja or tokenizer_config.json    ThinkDecoder    <think>reasoning</think>text
    HarmonyFormat    written out here                                HarmonyDecoder  messages in channels
"""

import datetime
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from typing_extensions import Self

from nanochat.common import read_json
from nanochat.conversation import ChatFormat, Message, TextFormat, plain_text, validate
from nanochat.detokenizer import AnswerDecoder, Event, Reasoning
from nanochat.hf.tokenizer import HFTokenizer

if TYPE_CHECKING:
    import jinja2

# Noncharacters, which no text holds. The first marks what looks like a special token in somebody's message, the second
# the end of a message that the model goes on with; after it a space shows whether the template trims messages.
BREAK = "\ufdd0"
HERE = "\ufdd1 "
HARMONY_SYSTEM = """You are ChatGPT, a large language model trained by OpenAI.
Knowledge cutoff: 2024-06
Current date: {date}

Reasoning: {effort}

# Valid channels: analysis, commentary, final. Channel must be included for every message."""
HARMONY_EFFORTS = ("low", "medium", "high")
# What transformers takes from tokenizer_config.json and gives to a template, where it is set.
TOKEN_VARIABLES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
# What a template is given by the code that renders it, and never by a request.
RESERVED = frozenset({"messages", "tools", "add_generation_prompt", *TOKEN_VARIABLES})


def chat_format(folder: Path | str, tokenizer: HFTokenizer) -> ChatFormat:
    """Return the format in which the model in `folder` was trained to chat.

    A model without a template only continues text. Raises ValueError for a template with a syntax error.
    """
    folder = Path(folder)
    config_path = folder / "config.json"
    if config_path.is_file() and read_json(config_path).get("model_type") == "gpt_oss":
        return HarmonyFormat(tokenizer)
    return TemplateFormat(tokenizer.chat_template, tokenizer) if tokenizer.chat_template else TextFormat(tokenizer)


# --- templates


class TemplateFormat(ChatFormat):
    """Renders conversations by a Jinja template."""

    def __init__(self, source: str, tokenizer: HFTokenizer) -> None:
        super().__init__(tokenizer)
        self._template, self.argument_names = compile_template(source)
        # The longest first: where one name begins with another, a regex takes the alternative that stands first.
        normalized = [tokenizer.normalize(mark) for mark in tokenizer.marks]
        names = sorted({*tokenizer.marks, *normalized}, key=len, reverse=True)
        never = "(?!)"  # a pattern that matches nothing, for a tokenizer without special tokens
        self._special = re.compile("|".join(re.escape(name) for name in names) or never)
        self._tokens: dict[str, str] = {}
        for name in TOKEN_VARIABLES:
            token = tokenizer.settings.get(name)
            if isinstance(token, dict):
                token = token.get("content")
            if isinstance(token, str):
                self._tokens[name] = token
        self._end_mark = self._find_end_mark()

    def encode(self, messages: Sequence[Message]) -> list[int]:
        """Return the ids of the conversation, ending where the assistant's next turn begins.

        A last message of the assistant is the beginning of that turn (prefill), and the ids end after its text. What
        looks like a special token in a message is encoded as text. Raises ValueError if the template refuses the
        messages, fails, or does not write that beginning as it is.
        """
        validate({"messages": messages}, allow_empty=True)
        plain = [{"role": each["role"], "content": plain_text(each)} for each in messages]
        last = plain[-1]
        if last["role"] == "assistant":
            plain[-1] = {"role": "assistant", "content": last["content"] + HERE}
            text, found, rest = self._render(plain, add_generation_prompt=False).rpartition(HERE.strip())
            if not rest.startswith(HERE[1:]):  # the template trims messages, and so the beginning of the answer
                text = text.rstrip()
            if not found or self._break_special(last["content"]).strip() not in text:
                raise ValueError(
                    "the model's chat template cannot continue an assistant's message: end with the user's"
                )
        else:
            text = self._render(plain)
        ids: list[int] = []
        # Broken special tokens are the pieces that a pair of marks encloses: see _break_special.
        for piece in re.split(f"([^{BREAK}]{BREAK}[^{BREAK}]*{BREAK})", text):
            if BREAK in piece:
                ids += self.tokenizer.encode(piece.replace(BREAK, ""))
            elif piece:
                ids += self.tokenizer.encode_marked(piece)
        return ids

    def _render(self, messages: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Return the text of the template, with what looks like a special token in the messages broken."""
        # transformers gives None for what the caller leaves out, and some templates test for None.
        variables = {"tools": None, "documents": None, "add_generation_prompt": add_generation_prompt, **self._tokens}
        try:
            # Inside, because arguments may be nested deeper than Python can follow.
            variables |= self._break_special({**self.arguments, "messages": messages})
            return self._template.render(variables)
        except Exception as error:  # a template can fail in any way that Python code can
            reason = str(error) or type(error).__name__
            raise ValueError(f"the model's chat template refuses this conversation: {reason}") from error

    def _find_end_mark(self) -> str | None:
        """Return the special token that the template writes after what the assistant said, if there is one.

        Each of the files that name the tokens at which a model stops may be wrong or silent, but the model was trained
        on conversations that this template wrote.
        """
        probe = "what the assistant said"
        roles = ("user", "assistant", "user")
        try:
            text = self._render([{"role": role, "content": probe} for role in roles])
        except ValueError:
            return None
        after = text.split(probe)
        # A template may write a message twice, or not at all.
        mark = self._special.match(after[2].lstrip()) if len(after) == len(roles) + 1 else None
        return mark[0] if mark else None

    def _break_special(self, value: Any) -> Any:
        """Put marks into what looks like a special token: "<|end|>" becomes "<", mark, "|end|>", mark.

        The template may move the text about or cut it; the marks go with it, and tell `encode` what came from a
        message. Otherwise a message could open a turn of its own and speak for the assistant. `value` is a text, or a
        JSON value with texts in it.
        """
        if isinstance(value, dict):
            return {self._break_special(name): self._break_special(each) for name, each in value.items()}
        if isinstance(value, list):
            return [self._break_special(each) for each in value]
        if not isinstance(value, str):
            return value
        value = value.replace(BREAK, "")
        # Some tokenizers find special tokens only after normalization, such as NFKC of full-width letters.
        normal = self.tokenizer.normalize(value)
        if len(self._special.findall(normal)) > len(self._special.findall(value)):
            value = normal
        return self._special.sub(lambda match: f"{match[0][0]}{BREAK}{match[0][1:]}{BREAK}", value)

    def decoder(self, prompt: Sequence[int] = (), stop: Sequence[str] = ()) -> AnswerDecoder:
        """Return a decoder for the answer to `prompt`, which some templates end with an open <think>."""
        # "<think>\n" is two tokens in most vocabularies; four leave room for another spelling of the line's end.
        begins_thinking = self.tokenizer.decode(prompt[-4:]).rstrip().endswith("<think>")
        return ThinkDecoder(self.tokenizer, stop, "reasoning" if begins_thinking else "text", self._end_mark)


def compile_template(source: str) -> tuple["jinja2.Template", frozenset[str]]:
    """Compile a chat template; return it with the names of the arguments that a request may give it.

    Settings, extensions and helper functions are those that transformers gives to templates.

    Jinja's sandbox keeps a template, which is code of whoever published the model, from Python's internals and from
    changing the messages. Raises ValueError for a syntax error.
    """
    import jinja2
    from jinja2.ext import loopcontrols
    from jinja2.meta import find_undeclared_variables
    from jinja2.nodes import Scope
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(jinja2.ext.Extension):
        """{% generation %} ... {% endgeneration %} marks what the assistant said, for training; here it is output."""

        tags = {"generation"}  # noqa: RUF012 (as its base class has it)

        def parse(self, parser: Any) -> Scope:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return Scope(body, lineno=line)

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None, **layout: Any) -> str:
        # Jinja's own filter escapes <, > and & for HTML, which would change what the model reads.
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **layout)

    def strftime_now(pattern: str) -> str:
        return datetime.datetime.now().strftime(pattern)

    # Templates are laid out over many lines for people. Trimming keeps that layout out of the prompt.
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = strftime_now
    try:
        template = environment.from_string(source)
        names = find_undeclared_variables(environment.parse(source))
        return template, frozenset(names - RESERVED - environment.globals.keys())
    except (jinja2.TemplateError, RecursionError) as error:  # the second for thousands of open brackets
        raise ValueError(f"the model's chat template is broken: {error}") from error


class ChannelDecoder(AnswerDecoder):
    """Decodes an answer whose special tokens switch between channels: "text", "reasoning", or "hidden"."""

    channel: str

    def show(self, text: str) -> list[Event]:
        if self.channel == "hidden":
            return []
        if self.channel == "reasoning":
            return [Reasoning(text)] if text else []
        return super().show(text)  # stop texts end the answer, not the reasoning

    def enter(self, name: str) -> list[Event]:
        # Text held back, such as half a character, belongs to the channel that ends here.
        events = self.flush_text()
        self.switch(name)
        return events

    def switch(self, name: str) -> None:
        """Set the channel that begins after the special token `name`."""
        raise NotImplementedError


class ThinkDecoder(ChannelDecoder):
    """Decodes an answer in which reasoning stands between <think> and </think>, up to the mark that ends a turn."""

    def __init__(self, tokenizer: HFTokenizer, stop: Sequence[str], channel: str, end_mark: str | None) -> None:
        marks = {}
        for name in ("<think>", "</think>", end_mark or ""):  # added tokens in most models, but not always special ones
            token = tokenizer.backend.token_to_id(name)
            if token is not None:
                marks[token] = name
        super().__init__(tokenizer, stop, more_marks=marks)
        self.channel = channel
        self._end_mark = end_mark
        self._ended = False

    @property
    def stopped(self) -> bool:
        """True after a stop text or the end of the turn has ended the answer."""
        return self._ended or super().stopped

    def switch(self, name: str) -> None:
        if name == "<think>":
            self.channel = "reasoning"
        elif name == "</think>":
            self.channel = "text"
        elif name == self._end_mark:
            self._ended = True


# --- harmony


class HarmonyFormat(ChatFormat):
    """gpt-oss's format (OpenAI, "harmony response format"): messages in channels, of which `final` is the answer.

    <|start|>role<|channel|>channel<|message|>text<|end|>
    """

    argument_names = frozenset({"reasoning_effort"})

    def with_arguments(self, arguments: dict[str, Any]) -> Self:
        """As in `ChatFormat`. Raises ValueError for an effort that the model does not know, too."""
        effort = arguments.get("reasoning_effort") or "medium"
        if effort not in HARMONY_EFFORTS:
            raise ValueError(f"reasoning_effort must be one of {', '.join(HARMONY_EFFORTS)}, not {effort!r:.40}")
        return super().with_arguments(arguments)

    def encode(self, messages: Sequence[Message]) -> list[int]:
        """Return the ids of the conversation, ending where the assistant's next turn begins.

        A last message of the assistant is the beginning of that turn (prefill), and the ids end after its text. What an
        API calls the system message becomes the developer's; old reasoning is left out.
        """
        validate({"messages": messages}, allow_empty=True)
        today = datetime.date.today().isoformat()
        effort = self.arguments.get("reasoning_effort") or "medium"
        ids = self._encode_message("system", HARMONY_SYSTEM.format(date=today, effort=effort))
        for message in messages:
            role = message["role"]
            text = plain_text(message)
            if role == "system":
                ids += self._encode_message("developer", f"# Instructions\n\n{text}")
            elif role == "assistant":
                ids += self._encode_message(role, text, channel="final")
            else:
                ids += self._encode_message(role, text)
        if messages[-1]["role"] == "assistant":
            return ids[:-1]  # without <|end|>
        return ids + self.tokenizer.encode("assistant", prepend="<|start|>")

    def _encode_message(self, role: str, text: str, channel: str | None = None) -> list[int]:
        ids = self.tokenizer.encode(role, prepend="<|start|>")
        if channel is not None:
            ids += self.tokenizer.encode(channel, prepend="<|channel|>")
        return ids + self.tokenizer.encode(text, prepend="<|message|>", append="<|end|>")

    def decoder(self, prompt: Sequence[int] = (), stop: Sequence[str] = ()) -> AnswerDecoder:
        """Return a decoder for the answer to `prompt`, which ends inside a header, or inside a message to continue."""
        start = self.tokenizer.encode_special("<|start|>")
        message = self.tokenizer.encode_special("<|message|>")
        last = next((token for token in reversed(prompt) if token in (start, message)), start)
        return HarmonyDecoder(self.tokenizer, stop, "text" if last == message else "hidden")


class HarmonyDecoder(ChannelDecoder):
    """Decodes harmony: `final` and preambles are text, `analysis` and calls of functions are reasoning.

    The prompt ends in "<|start|>assistant", so an answer begins inside a header, which is hidden and collected:

        <|channel|>analysis<|message|>2 and 2<|end|><|start|>assistant<|channel|>final<|message|>Four<|return|>
    """

    def __init__(self, tokenizer: HFTokenizer, stop: Sequence[str], channel: str) -> None:
        super().__init__(tokenizer, stop)
        self.channel = channel
        self.header = ""

    def show(self, text: str) -> list[Event]:
        if self.channel == "hidden":
            self.header += text
        return super().show(text)

    def switch(self, name: str) -> None:
        if name == "<|message|>":
            _, has_channel, channel = self.header.partition("<|channel|>")
            # Text in the commentary channel is a preamble for the user, unless the header names a function to call,
            # as in "commentary to=functions.weather". We offer no functions, so such a call is shown as reasoning.
            is_call = "to=" in self.header
            is_text = channel.startswith(("final", "commentary")) and not is_call
            self.channel = "text" if is_text or not has_channel else "reasoning"
            self.header = ""
        elif name == "<|channel|>":
            self.header += name
        elif name in ("<|start|>", "<|end|>", "<|return|>", "<|call|>"):
            self.channel = "hidden"
            self.header = ""
