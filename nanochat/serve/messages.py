"""The messages of a chat as clients send them, and how they become a conversation that a model can answer.

The rules of conversation.py are those of training data. Clients keep histories of their own, so a server mends what it
can and refuses only what cannot be answered:

    system, system, user, user            the texts of one role are joined: system, user
    system ""                             blank messages are dropped
    user, system                          system texts stand first, wherever they came
    assistant, user                       a greeting answers an empty question: user "", assistant, user
    user, assistant                       the answer is continued (prefill), if the format allows it
"""

from collections.abc import Sequence
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator
from typing_extensions import TypedDict  # pydantic does not take typing's own before Python 3.12

from nanochat.conversation import Message as Turn

EMPTY: tuple[Any, ...] = (None, "", [], {})  # values with which a field says nothing


class Strict(BaseModel):
    """A model that refuses unknown fields, conversions ("1" for 1) and NaN."""

    # A parameter that is dropped without a word, or misspelled, gives answers that nobody can explain.
    model_config = ConfigDict(
        strict=True,
        extra="forbid",
        allow_inf_nan=False,
        json_schema_extra={"additionalProperties": {"enum": list(EMPTY)}},
    )

    @model_validator(mode="before")
    @classmethod
    def _drop_empty(cls, fields: Any) -> Any:
        # Clients send all fields that they know, and an answer back with fields that it came without
        # ("refusal": null, "tool_calls": []). Null counts as absent; of unknown fields, so do empty values.
        if not isinstance(fields, dict):
            return fields
        return {
            name: value
            for name, value in fields.items()
            if value is not None and (name in cls.model_fields or value not in EMPTY)
        }


SHARED = "Accepted: what prompts share is read once in any case."


class ToolTrace(TypedDict):
    """One use of the calculator. `result` is null when the expression was not valid."""

    expression: str
    result: str | None


class Part(Strict):
    """A piece of a message. `python` and `python_output` belong to the assistant: a calculation and its result."""

    # The Responses API, and LangChain after it, name texts by who wrote them. A refusal is what the assistant wrote.
    type: Literal["text", "input_text", "output_text", "refusal", "python", "python_output"]
    text: str
    cache_control: dict[str, Any] | None = Field(None, description=SHARED)

    @model_validator(mode="before")
    @classmethod
    def _take_text_of_refusal(cls, fields: Any) -> Any:
        if not isinstance(fields, dict) or fields.get("type") != "refusal" or "refusal" not in fields:
            return fields
        return {"text": fields["refusal"], **{name: value for name, value in fields.items() if name != "refusal"}}

    def as_part(self) -> dict[str, str]:
        """Return the part in the form of conversation.py."""
        is_text = self.type not in ("python", "python_output")
        return {"type": "text" if is_text else self.type, "text": self.text}


class Message(Strict):
    """One turn. An answer may be sent back as it came; with its parts as `content` the model sees its calculations."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[Part] | None = None
    name: str | None = Field(None, description="Accepted and ignored: models are trained on roles alone.")
    tool_trace: list[ToolTrace] | None = Field(None, description="Accepted and ignored: parts in `content` are read.")
    reasoning_content: str | None = Field(
        None, description="Accepted and ignored: models are not shown their old reasoning."
    )
    refusal: str | None = Field(None, description="What the assistant said, if `content` is empty.")
    cache_control: dict[str, Any] | None = Field(None, description=SHARED)
    prefix: bool | None = Field(None, description="Accepted: a last message of the assistant is always continued.")
    # What client libraries add to an answer, and send back with it: accepted and ignored.
    reasoning: str | None = None
    reasoning_details: list[Any] | None = None
    thinking_blocks: list[Any] | None = None
    annotations: list[Any] | None = None
    provider_specific_fields: dict[str, Any] | None = None

    def as_turn(self) -> Turn:
        """Return the message in the form of conversation.py, without empty parts."""
        role = "system" if self.role == "developer" else self.role
        if not isinstance(self.content, list):
            return {"role": role, "content": self.content or self.refusal or ""}
        # An empty output is kept: it says that the program printed nothing.
        parts = [part.as_part() for part in self.content if part.text or part.type == "python_output"]
        return {"role": role, "content": parts or self.refusal or ""}


def mend(turns: Sequence[Turn]) -> list[Turn]:
    """Return the messages as a conversation: at most one system message, then user and assistant in turns.

    Raises ValueError if there is nothing to answer.
    """
    spoken = [turn for turn in turns if turn["role"] != "system"]
    if spoken and spoken[-1]["role"] == "assistant" and turns[-1]["role"] == "system":
        # An instruction after an answer is to be followed now, as a user's would be.
        return mend([*turns[:-1], {**turns[-1], "role": "user"}])
    system = [turn for turn in turns if turn["role"] == "system" and not _is_blank(turn)]
    if spoken and spoken[-1]["role"] == "user" and not spoken[-1]["content"]:
        raise ValueError("the last message is empty: send some text")
    # A last message of spaces alone may be answered; earlier ones say nothing.
    spoken = [turn for turn in spoken if not _is_blank(turn) or (turn is spoken[-1] and turn["role"] == "user")]
    if not spoken:
        raise ValueError("there is no message to answer: send a user message with some text")
    mended: list[Turn] = []
    for turn in [*system, *spoken]:
        if mended and mended[-1]["role"] == turn["role"]:
            mended[-1] = {"role": turn["role"], "content": _join(mended[-1]["content"], turn["content"])}
            continue
        if turn["role"] == "assistant" and (not mended or mended[-1]["role"] == "system"):
            mended.append({"role": "user", "content": ""})
        mended.append(turn)
    return mended


def _is_blank(turn: Turn) -> bool:
    content = turn["content"]
    return isinstance(content, str) and not content.strip()


def _join(first: Any, second: Any) -> Any:
    """Return two contents of one role as one, with an empty line between them."""
    if isinstance(first, str) and isinstance(second, str):
        return f"{first}\n\n{second}"
    first_parts = [{"type": "text", "text": first}] if isinstance(first, str) else first
    second_parts = [{"type": "text", "text": second}] if isinstance(second, str) else second
    return [*first_parts, {"type": "text", "text": "\n\n"}, *second_parts]
