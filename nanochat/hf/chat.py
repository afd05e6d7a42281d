"""Chat formats of open-weights models: a Jinja template from the model's folder, or harmony for gpt-oss.

A format turns messages into the ids of a prompt, and gives each answer a decoder that tells text, reasoning and tool
calls apart. `chat_format` picks the one that a folder's model was trained in; conversation.py has the protocol.
"""

import datetime
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nanochat.common import read_json
from nanochat.conversation import ChatFormat, Message, plain_text, validate
from nanochat.detokenizer import AnswerDecoder, Event, Reasoning
from nanochat.hf.tokenizer import HFTokenizer

if TYPE_CHECKING:
    import jinja2

# For models without a template, which continue text: only the last message counts.
CONTINUE_TEMPLATE = "{{ bos_token }}{{ messages[-1].content }}"
# A noncharacter, which no text holds. It marks what looks like a special token in somebody's message.
BREAK = "\ufdd0"
HARMONY_CHANNELS = "# Valid channels: analysis, commentary, final. Channel must be included for every message."
HARMONY_IDENTITY = "You are ChatGPT, a large language model trained by OpenAI.\nKnowledge cutoff: 2024-06\n"


def chat_format(folder: Path | str, tokenizer: HFTokenizer) -> "TemplateFormat | HarmonyFormat":
    """Return the format in which the model in `folder` was trained to chat.

    A model without a template continues the last message. Raises ValueError for a template with a syntax error."""
    folder = Path(folder)
    config_path = folder / "config.json"
    if config_path.is_file() and read_json(config_path).get("model_type") == "gpt_oss":
        return HarmonyFormat(tokenizer)
    template_path = folder / "chat_template.jinja"
    if template_path.is_file():
        return TemplateFormat(template_path.read_text(encoding="utf-8"), tokenizer)
    source = tokenizer.settings.get("chat_template")
    if isinstance(source, list):  # several templates by name, such as default and tool_use
        by_name = {entry.get("name"): entry.get("template") for entry in source if isinstance(entry, dict)}
        source = by_name.get("default")
    return TemplateFormat(source if isinstance(source, str) else CONTINUE_TEMPLATE, tokenizer)


def compile_template(source: str) -> "jinja2.Template":
    """Compile a chat template with the settings, extensions and helper functions that transformers gives it.

    Jinja's sandbox keeps a template, which is code of whoever published the model, from Python's internals and from
    changing the messages. Raises ValueError for a syntax error."""
    import jinja2
    from jinja2.ext import loopcontrols
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

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = strftime_now
    try:
        return environment.from_string(source)
    except (jinja2.TemplateError, RecursionError) as error:
        raise ValueError(f"the model's chat template is broken: {error}") from error


class TemplateFormat(ChatFormat):
    """Renders conversations by a Jinja template."""

    def __init__(self, source: str, tokenizer: HFTokenizer) -> None:
        super().__init__(tokenizer)
        names = sorted(filter(None, tokenizer.special_tokens), key=len, reverse=True)
        never = "(?!)"
        self._special = re.compile("|".join(re.escape(name) for name in names) or never)
        self._template = compile_template(source)

    def render(self, messages: Sequence[Message], **variables: Any) -> list[int]:
        """Return the ids of the conversation, ending where the assistant's next turn begins.

        `variables` are further ones that the template knows, such as enable_thinking. What looks like a special token
        in a message is encoded as text. Raises ValueError if the template refuses the messages or fails."""
        validate({"messages": messages}, allow_empty_reply=True)
        plain = [{**message, "content": self._break_special(plain_text(message))} for message in messages]
        try:
            text = self._template.render(
                messages=plain, add_generation_prompt=True, **self._special_variables(), **variables
            )
        except Exception as error:  # a template can fail in any way that Python code can
            reason = str(error) or type(error).__name__
            raise ValueError(f"the model's chat template refuses this conversation: {reason}") from error
        ids: list[int] = []
        # Broken special tokens are the pieces that a pair of marks encloses: see _break_special.
        for piece in re.split(f"([^{BREAK}]{BREAK}[^{BREAK}]*{BREAK})", text):
            if BREAK in piece:
                ids += self.tokenizer.encode(piece.replace(BREAK, ""))
            elif piece:
                ids += self.tokenizer.encode_marked(piece)
        return ids

    def _break_special(self, text: str) -> str:
        """Put marks into what looks like a special token: "<|end|>" becomes "<", mark, "|end|>", mark.

        The template may move the text about or cut it; the marks go with it, and tell `render` what came from a
        message. Otherwise a message could open a turn of its own and speak for the assistant."""
        text = text.replace(BREAK, "")
        return self._special.sub(lambda match: f"{match[0][0]}{BREAK}{match[0][1:]}{BREAK}", text)

    def _special_variables(self) -> dict[str, Any]:
        """Return bos_token, eos_token and so on, which templates may use, from tokenizer_config.json."""
        variables = {}
        for name, value in self.tokenizer.settings.items():
            if name.endswith("_token"):
                variables[name] = value.get("content") if isinstance(value, dict) else value
        if not variables.get("bos_token"):
            bos = self.tokenizer.get_bos_token_id()
            variables["bos_token"] = "" if bos is None else self.tokenizer.decode([bos])
        return variables

    def decoder(self, prompt: Sequence[int] = (), stop: Sequence[str] = ()) -> "ThinkDecoder":
        """Return a decoder for the answer to `prompt`, which some templates end with an open <think>."""
        begins_thinking = self.tokenizer.decode(prompt[-4:]).rstrip().endswith("<think>")
        return ThinkDecoder(self.tokenizer, stop, "reasoning" if begins_thinking else "text")


class ThinkDecoder(AnswerDecoder):
    """Decodes an answer in which reasoning stands between <think> and </think>.

    `channel` is what the tokens at hand belong to: "text", "reasoning", or "hidden" for what is not shown."""

    def __init__(self, tokenizer: Any, stop: Sequence[str] = (), channel: str = "text") -> None:
        marks = {}
        for name in ("<think>", "</think>"):  # added tokens in most models, but seldom special ones
            token = tokenizer.backend.token_to_id(name)
            if token is not None:
                marks[token] = name
        super().__init__(tokenizer, stop, more_marks=marks)
        self.channel = channel

    def show(self, text: str) -> list[Event]:
        if self.channel == "hidden":
            return []
        if self.channel == "reasoning":
            return [Reasoning(text)] if text else []
        return super().show(text)  # stop texts end the answer, not the reasoning

    def enter(self, name: str) -> list[Event]:
        events = self.flush_text()  # of the channel that ends here
        self._switch(name)
        return events

    def _switch(self, name: str) -> None:
        """Change the channel as the special token `name` says."""
        if name == "<think>":
            self.channel = "reasoning"
        elif name == "</think>":
            self.channel = "text"


class HarmonyFormat(ChatFormat):
    """gpt-oss's format (OpenAI, "harmony response format"): messages in channels, of which `final` is the answer."""

    def render(self, messages: Sequence[Message], reasoning: str = "medium", date: str | None = None) -> list[int]:
        """Return the ids of the conversation, ending where the assistant's next turn begins.

        What an API calls the system message becomes the developer's; old reasoning is left out. `date` is YYYY-MM-DD,
        by default today. Raises ValueError if `reasoning` is not low, medium or high."""
        validate({"messages": messages}, allow_empty_reply=True)
        if reasoning not in ("low", "medium", "high"):
            raise ValueError(f"reasoning {reasoning!r}: choose low, medium or high")
        date = date or datetime.date.today().isoformat()
        system = f"{HARMONY_IDENTITY}Current date: {date}\n\nReasoning: {reasoning}\n\n{HARMONY_CHANNELS}"
        ids = self._encode_message("system", system)
        for message in messages:
            role = message["role"]
            text = plain_text(message)
            if role == "system":
                ids += self._encode_message("developer", f"# Instructions\n\n{text}")
            elif role == "assistant":
                ids += self._encode_message(role, text, channel="final")
            else:
                ids += self._encode_message(role, text)
        return [*ids, self.tokenizer.encode_special("<|start|>"), *self.tokenizer.encode("assistant")]

    def _encode_message(self, role: str, text: str, channel: str | None = None) -> list[int]:
        """Return the ids of <|start|>role<|channel|>channel<|message|>text<|end|>."""
        encode = self.tokenizer.encode
        special = self.tokenizer.encode_special
        header = [special("<|start|>"), *encode(role)]
        if channel is not None:
            header += [special("<|channel|>"), *encode(channel)]
        return [*header, special("<|message|>"), *encode(text), special("<|end|>")]

    def decoder(self, prompt: Sequence[int] = (), stop: Sequence[str] = ()) -> "HarmonyDecoder":
        """Return a decoder for the answer to `prompt`."""
        return HarmonyDecoder(self.tokenizer, stop)


class HarmonyDecoder(ThinkDecoder):
    """Decodes harmony: `final` and preambles are text, `analysis` and calls of functions are reasoning.

    The prompt ends in "<|start|>assistant", so an answer begins inside a header, which is hidden and collected."""

    def __init__(self, tokenizer: HFTokenizer, stop: Sequence[str] = ()) -> None:
        super().__init__(tokenizer, stop, "hidden")
        self._header = ""

    def show(self, text: str) -> list[Event]:
        if self.channel == "hidden":
            self._header += text
        return super().show(text)

    def _switch(self, name: str) -> None:
        if name == "<|message|>":
            channel = self._header.partition("<|channel|>")[2]
            is_call = "to=" in self._header  # of a function, in the commentary channel
            is_text = channel.startswith(("final", "commentary")) and not is_call
            has_channel = "<|channel|>" in self._header
            self.channel = "text" if is_text or not has_channel else "reasoning"
            self._header = ""
        elif name == "<|channel|>":
            self._header += name
        elif name in ("<|start|>", "<|end|>", "<|return|>", "<|call|>"):
            self.channel = "hidden"
            self._header = ""
