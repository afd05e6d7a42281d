"""The wire format: what the API accepts and what it answers.

Requests are pydantic models. Each parameter is honoured or refused by its name, never ignored; null counts as absent.
Only `tool_trace` and `reasoning_content` of a message are accepted and not read, so that an answer can be sent back as
it came.

    >>> read_body(b'{"messages": [{"role": "user", "content": "Hi"}], "stop": ""}', ChatRequest)
    ApiError: 'stop' is not right: stop.str: String should have at least 1 character; or ...

Answers are typed dicts, because this server makes them itself and need not validate them. pydantic turns both into the
JSON schemas of /openapi.json (information.py).

Names and shapes are OpenAI's (platform.openai.com/docs/api-reference/chat/create); `top_k`, `min_p` and
`repetition_penalty` are vLLM's; `session_id` and `tool_trace` are our own.
"""

import dataclasses
import json
import random
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from typing_extensions import NotRequired, TypedDict  # pydantic does not take typing's own before Python 3.12

from nanochat.scheduler import Request
from nanochat.serve.logprobs import ChatLogprobs, TextLogprobs


class ApiError(Exception):
    """A refusal in OpenAI's shape: `{"error": {"message", "type", "param", "code"}}`."""

    # `message` is for people; programs look at the status and at `code`.
    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.headers = headers or {}
        kind = "invalid_request_error" if status < 500 else "server_error"
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}


def unavailable(message: str) -> ApiError:
    """Return the refusal of a server that cannot answer now, but may in a few seconds."""
    return ApiError(503, f"{message}; try again later", headers={"Retry-After": "5"})


# ---- Requests


class Strict(BaseModel):
    """A model that refuses unknown fields, conversions ("1" for 1) and NaN."""

    # A parameter that is dropped without a word, or misspelled, gives answers that nobody can explain.
    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _drop_nulls(cls, fields: Any) -> Any:
        # Clients send an answer back with its empty fields ("refusal": null and others that we do not know).
        if isinstance(fields, dict):
            return {name: value for name, value in fields.items() if value is not None}
        return fields


class ToolTrace(TypedDict):
    """One use of the calculator. `result` is null when the expression was not valid."""

    expression: str
    result: str | None


class StreamOptions(Strict):
    """`include_usage`: send one more chunk, with the token counts, before the end of the stream."""

    include_usage: bool | None = None


class Part(Strict):
    """A piece of a message. `python` and `python_output` belong to the assistant: a calculation and its result."""

    type: Literal["text", "python", "python_output"]
    text: str


class Message(Strict):
    """One turn. An answer may be sent back as it came; with its parts as `content` the model sees its calculations."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[Part] | None = None
    tool_trace: list[ToolTrace] | None = Field(None, description="Accepted and ignored: parts in `content` are read.")
    reasoning_content: str | None = Field(
        None, description="Accepted and ignored: models are not shown their old reasoning."
    )

    def as_turn(self) -> dict[str, Any]:
        """Return the message in the form of conversation.py."""
        role = "system" if self.role == "developer" else self.role
        content = self.model_dump(include={"content"})["content"]
        return {"role": role, "content": content or ""}


class ResponseFormat(Strict):
    """Plain text only: this server does not constrain what the model writes."""

    type: Literal["text"]


Bias = Annotated[float, Field(ge=-100, le=100)]
Stop = Annotated[str, Field(min_length=1, max_length=256)]
# Validation of a list stops at its first mistake: one body has room for half a million of them.
NONEMPTY = Field(min_length=1, fail_fast=True)
Tokens = Annotated[list[Annotated[int, Field(ge=0)]], NONEMPTY]

NEEDS_TEMPERATURE = "Only with a temperature above 0: at 0, the usual default, the likeliest token is taken anyway."


class Parameters(Strict):
    """The parameters that chat and text completions share."""

    # A parameter of the same name as a field of `Request` (nanochat/scheduler.py) is handed on to it by `sampling`.
    # None is the default of all; what it stands for is said by ServerConfig (loop.py) for temperature and max_tokens,
    # and by `Request` for the others. The ranges of temperature, top_p, the two penalties, biases and `stop` are
    # OpenAI's, so that a client's mistake is refused here as there. The others are our own: vLLM, for one, also takes
    # -1 as `top_k`.
    model: str | None = Field(None, description="One of /v1/models; if absent, the first of them.")
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: int | None = Field(None, ge=1, le=16, description="Number of answers; the prompt is read once for all of them.")
    max_tokens: int | None = Field(
        None, ge=-1, le=2**31, description="-1: no limit. 0, for texts alone: the prompt is read, and nothing is added."
    )
    temperature: float | None = Field(
        None, ge=0, le=2, description="0: always the likeliest token. If absent: the server's --temperature, usually 0."
    )
    top_p: float | None = Field(None, gt=0, le=1, description=NEEDS_TEMPERATURE)
    top_k: int | None = Field(None, ge=0, le=2**31, description=f"0: off. {NEEDS_TEMPERATURE}")
    min_p: float | None = Field(None, ge=0, le=1, description=NEEDS_TEMPERATURE)
    repetition_penalty: float | None = Field(None, ge=0.01, le=10)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    # Token ids are keys of a JSON object here, and those are always text.
    logit_bias: dict[Annotated[str, Field(pattern="^[0-9]{1,9}$")], Bias] | None = None
    seed: int | None = Field(
        None,
        ge=-(2**63),
        le=2**63 - 1,
        description="The same seed gives the same answer in any company; on a GPU except for rounding.",
    )
    stop: Stop | Annotated[list[Stop], Field(max_length=4)] | None = None
    user: Annotated[str, Field(max_length=256)] | None = Field(None, description="Noted in the access log.")

    # Validators that run after the fields' own raise ApiError, which pydantic lets through as it is: a ValueError would
    # be reported without the name of the parameter.
    @model_validator(mode="after")
    def _check_stream_options(self) -> "Parameters":
        if self.stream_options is not None and not self.stream:
            raise ApiError(400, "'stream_options' needs 'stream': true", "stream_options")
        return self

    def sampling(self, vocab_size: int, default_temperature: float) -> dict[str, Any]:
        """Return the sampling arguments of a Request. Raises ApiError 400 if a token of `logit_bias` does not exist."""
        bias = {int(token): value for token, value in (self.logit_bias or {}).items()}
        for token in bias:
            if token >= vocab_size:
                raise ApiError(400, f"'logit_bias': there is no token {token}, only {vocab_size}", "logit_bias")
        # By name, so that none can be forgotten. Only those that are given: the engine has defaults of its own.
        names = Parameters.model_fields.keys() & {field.name for field in dataclasses.fields(Request)}
        settings = self.model_dump(include=names - {"max_tokens"}, exclude_none=True)  # max_tokens: see app.py
        settings.setdefault("temperature", default_temperature)
        # Without a seed every answer gets one of its own, or all clients would draw the same.
        settings.setdefault("seed", random.getrandbits(32))
        settings["logit_bias"] = bias
        settings["stop"] = [self.stop] if isinstance(self.stop, str) else self.stop or ()
        return settings


class ChatRequest(Parameters):
    """The body of /v1/chat/completions."""

    messages: Annotated[list[Message], NONEMPTY]
    max_completion_tokens: int | None = Field(None, ge=-1, le=2**31, description="The newer name of max_tokens.")
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)
    response_format: ResponseFormat | None = None
    session_id: Annotated[str, Field(pattern="^[A-Za-z0-9_-]{1,64}$")] | None = Field(
        None, description="The server keeps the conversation under this name; `messages` holds only the new ones."
    )

    @model_validator(mode="after")
    def _check_chat(self) -> "ChatRequest":
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            raise ApiError(400, "'max_tokens' and 'max_completion_tokens' differ: give one", "max_tokens")
        # From here on there is one name for the limit.
        if self.max_tokens is None:
            self.max_tokens = self.max_completion_tokens
        if self.max_tokens == 0:
            raise ApiError(400, "'max_tokens' must be at least 1 in a chat: an answer has a token", "max_tokens")
        if self.top_logprobs is not None and not self.logprobs:
            raise ApiError(400, "'top_logprobs' needs 'logprobs': true", "top_logprobs")
        # A session goes on from one answer; which of several would it be?
        if self.session_id is not None and self.n not in (None, 1):
            raise ApiError(400, "'n' must be 1 in a session: it continues with one answer", "n")
        if self.messages[-1].role != "user":
            raise ApiError(400, "the last message must be the user's", "messages")
        return self


class CompletionRequest(Parameters):
    """The body of /v1/completions. Text is never read as special tokens; token ids are taken as they are."""

    prompt: str | Annotated[list[str], NONEMPTY] | Tokens | Annotated[list[Tokens], NONEMPTY]
    logprobs: int | None = Field(None, ge=0, le=20)
    echo: bool | None = Field(None, description="Begin the text with the prompt, and `logprobs` with those of it.")

    def prompts(self) -> list[Any]:
        """Return the prompts one by one, each as text or as token ids."""
        # A list of numbers is one prompt, and any other list holds several.
        if isinstance(self.prompt, str) or isinstance(self.prompt[0], int):
            return [self.prompt]
        return list(self.prompt)


Body = TypeVar("Body", bound=Parameters)


def read_body(data: bytes, kind: type[Body]) -> Body:
    """Parse and validate the JSON body of a request. Raises ApiError 400, which names the parameter at fault."""
    try:
        body = json.loads(data.decode("utf-8-sig"))  # a byte order mark is what some editors and shells put first
        if b"\\u" in data:
            # An escaped half of a surrogate pair is valid JSON but not text: no tokenizer takes it. It becomes "?".
            body = json.loads(json.dumps(body, ensure_ascii=False).encode(errors="replace"))
    except (ValueError, RecursionError) as error:
        # RecursionError: a body of brackets alone is nested deeper than Python's parser goes.
        raise ApiError(400, f"the body is not valid JSON: {error}") from error
    if not isinstance(body, dict):
        raise ApiError(400, "the body must be a JSON object")
    try:
        return kind.model_validate(body)
    except ValidationError as error:
        # pydantic's own text has many lines, with a link to its documentation; clients show one.
        raise _refusal(error, kind) from error


def _refusal(error: ValidationError, kind: type[Parameters]) -> ApiError:
    """Word the first problem that pydantic found. The alternatives of a union (`stop`, `prompt`) come together."""
    problems = error.errors(include_url=False, include_input=False)
    place = problems[0]["loc"]
    name = str(place[0])
    if problems[0]["type"] == "extra_forbidden" and len(place) == 1:
        known = ", ".join(kind.model_fields)
        return ApiError(400, f"'{name}' is not supported: this server knows {known}", name)
    of_name = [problem for problem in problems if problem["loc"][0] == name]
    reasons = [f"{'.'.join(map(str, problem['loc']))}: {problem['msg']}" for problem in of_name[:4]]
    distinct = dict.fromkeys(reasons)  # keeps the order
    return ApiError(400, f"'{name}' is not right: {'; or '.join(distinct)}", name)


# ---- Answers


class ChatAnswer(TypedDict):
    """The assistant's message. `reasoning_content` is what a model says to itself before it answers."""

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
    """The state of a session after its last answer. `dropped_turns` no longer fitted the context."""

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
