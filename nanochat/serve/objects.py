"""The objects that the API answers with, in OpenAI's shapes.

They are typed dicts, because this server makes them itself and need not validate them. pydantic turns them, and the
requests of schema.py, into the JSON schemas of /openapi.json (information.py).
"""

from typing import Any, Literal

from typing_extensions import NotRequired, TypedDict  # pydantic does not take typing's own before Python 3.12

from nanochat.serve.logprobs import ChatLogprobs, TextLogprobs
from nanochat.serve.messages import ToolTrace


class ChatAnswer(TypedDict):
    """The assistant's message. `reasoning_content` is the model's reasoning before its answer."""

    role: Literal["assistant"]
    content: str
    reasoning_content: NotRequired[str]
    tool_trace: NotRequired[list[ToolTrace]]


class ChatChoice(TypedDict):
    """One of the `n` answers of a chat."""

    index: int
    message: ChatAnswer
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length"]


class TextChoice(TypedDict):
    """One continuation of one prompt."""

    index: int
    text: str
    tool_trace: NotRequired[list[ToolTrace]]
    logprobs: TextLogprobs | None
    finish_reason: Literal["stop", "length"]


class CachedTokens(TypedDict):
    """Prompt tokens that were found in the prefix cache and not computed again."""

    cached_tokens: int


class Usage(TypedDict):
    """Token counts. The prompt is counted once, however many answers are made to it."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: CachedTokens


class SessionInfo(TypedDict):
    """The state of a session after its last answer. `dropped_turns`: turns that no longer fit in the context."""

    id: str
    model: str
    turns: int
    dropped_turns: int
    tokens: int
    context: int
    expires_in: float
    cached_tokens: int


class SessionContent(SessionInfo):
    """A session with its conversation."""

    messages: list[dict[str, Any]]


class ChatCompletion(TypedDict):
    """The answer of /v1/chat/completions."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    session: NotRequired[SessionInfo]


class TextCompletion(TypedDict):
    """The answer of /v1/completions."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[TextChoice]
    usage: Usage


class ModelInfo(TypedDict):
    """A model that this server offers."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    context_length: int
