"""What the API takes: the parameters of a request as types, which are also its description, and how they are refused.

Every parameter is honoured or refused by its name; null is the same as not given. Names and shapes are OpenAI's
(platform.openai.com/docs/api-reference/chat/create); top_k, min_p, repetition_penalty vLLM's; `session_id` is our own.
"""

import json
import random
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError


class ApiError(Exception):
    """An answer in OpenAI's error shape: `{"error": {"message", "type", "param", "code"}}`."""

    def __init__(
        self, status: int, message: str, param: str | None = None, code: str | None = None, headers: dict | None = None
    ) -> None:
        super().__init__(message)
        kind = "invalid_request_error" if status < 500 else "server_error"
        self.status, self.headers = status, headers or {}
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}


class Strict(BaseModel):
    """No unknown fields, no conversions, no NaN."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)


class StreamOptions(Strict):
    """`include_usage`: a last chunk says how many tokens there were."""

    include_usage: bool | None = None


class Part(Strict):
    """A piece of a message. `python` and `python_output` are an assistant's: what it calculated, and the result."""

    type: Literal["text", "python", "python_output"]
    text: str


class ToolTrace(Strict):
    """A use of the calculator as answers tell of it; result null: the expression was not valid."""

    expression: str
    result: str | None


class Message(Strict):
    """One turn. An answer may be sent back as it came; with its parts as content the model sees its calculations."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[Part] | None = None
    tool_trace: list[ToolTrace] | None = Field(None, description="Accepted, not read: parts in `content` are.")
    reasoning_content: str | None = Field(None, description="Accepted, not read: models do not see old reasoning.")

    def as_turn(self) -> dict[str, Any]:
        """The message as conversation.py has it."""
        content = [part.model_dump() for part in self.content] if isinstance(self.content, list) else self.content
        return {"role": "system" if self.role == "developer" else self.role, "content": content or ""}


class ResponseFormat(Strict):
    """Only plain text: this server does not constrain what the model writes."""

    type: Literal["text"]


Bias = Annotated[float, Field(ge=-100, le=100)]
Stop = Annotated[str, Field(min_length=1, max_length=256)]
SOME = Field(min_length=1, fail_fast=True)  # the first mistake in a list is enough: it may have half a million
Tokens = Annotated[list[Annotated[int, Field(ge=0)]], SOME]


class Parameters(Strict):
    """What both kinds of completion take."""

    # of these the engine has its own defaults
    SAMPLING: ClassVar = ("top_k", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty")

    model: str | None = Field(None, description="One of /v1/models; left out: the first of them.")
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: int | None = Field(None, ge=1, le=16, description="How many answers; they share one reading of the prompt.")
    max_tokens: int | None = Field(None, ge=1, le=2**31)
    temperature: float | None = Field(None, ge=0, le=2, description="0: always the likeliest token.")
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=0, le=2**31, description="0: off.")
    min_p: float | None = Field(None, ge=0, le=1)
    repetition_penalty: float | None = Field(None, ge=0.01, le=10)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    logit_bias: dict[Annotated[str, Field(pattern="^[0-9]{1,9}$")], Bias] | None = None
    seed: int | None = Field(None, ge=-(2**63), le=2**63 - 1, description="The same seed gives the same answer.")
    stop: Stop | Annotated[list[Stop], Field(max_length=4)] | None = None
    user: Annotated[str, Field(max_length=256)] | None = Field(None, description="Noted in the access log.")

    def check(self) -> None:
        """What types cannot say: raises ApiError 400, which names the parameter."""
        if self.stream_options is not None and not self.stream:
            raise ApiError(400, "'stream_options' needs 'stream': true", "stream_options")

    def tokens_wanted(self) -> int | None:
        """The longest answer asked for; None: to the end of the context."""
        return self.max_tokens

    def top_logprobs_wanted(self) -> int | None:
        """How many likeliest tokens to tell of each token; None: no log-probabilities at all."""
        raise NotImplementedError

    def settings(self, vocab_size: int, temperature: float) -> dict[str, Any]:
        """Arguments of an engine's Request. temperature: where it gives none. ApiError 400 for unknown tokens."""
        bias = {int(token): value for token, value in (self.logit_bias or {}).items()}
        if wrong := [token for token in bias if token >= vocab_size]:
            raise ApiError(400, f"'logit_bias': there is no token {wrong[0]}, only {vocab_size}", "logit_bias")
        return {
            "temperature": temperature if self.temperature is None else self.temperature,
            "seed": random.getrandbits(32) if self.seed is None else self.seed,
            "stop": [self.stop] if isinstance(self.stop, str) else self.stop or (),
            "logit_bias": bias,
            "logprobs": self.top_logprobs_wanted(),
            **{name: value for name in self.SAMPLING if (value := getattr(self, name)) is not None},
        }


class ChatRequest(Parameters):
    """The body of /v1/chat/completions."""

    messages: Annotated[list[Message], SOME]
    max_completion_tokens: int | None = Field(None, ge=1, le=2**31, description="The newer name of max_tokens.")
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)
    response_format: ResponseFormat | None = None
    session_id: Annotated[str, Field(pattern="^[A-Za-z0-9_-]{1,64}$")] | None = Field(
        None, description="The server keeps the conversation under this name; `messages` are only what is new in it."
    )

    def check(self) -> None:
        super().check()
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            raise ApiError(400, "'max_tokens' and 'max_completion_tokens' differ: give one", "max_tokens")
        if self.top_logprobs is not None and not self.logprobs:
            raise ApiError(400, "'top_logprobs' needs 'logprobs': true", "top_logprobs")
        if self.session_id is not None and self.n not in (None, 1):
            raise ApiError(400, "'n' must be 1 in a session: it continues with one answer", "n")
        if self.messages[-1].role != "user":
            raise ApiError(400, "the last message must be the user's", "messages")

    def tokens_wanted(self) -> int | None:
        return self.max_tokens or self.max_completion_tokens

    def top_logprobs_wanted(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None


class CompletionRequest(Parameters):
    """The body of /v1/completions. Text is never read as special tokens; ids are taken as they are."""

    prompt: str | Annotated[list[str], SOME] | Tokens | Annotated[list[Tokens], SOME]
    logprobs: int | None = Field(None, ge=0, le=20)

    def top_logprobs_wanted(self) -> int | None:
        return self.logprobs

    def prompts(self) -> list[Any]:
        """Text or token ids of each prompt."""
        several = isinstance(self.prompt, list) and not isinstance(self.prompt[0], int)
        return list(self.prompt) if several else [self.prompt]


def read_body(data: bytes, kind: type[Parameters]) -> Any:
    """A request's JSON body as `kind`; raises ApiError for all that is not right in it."""
    try:
        body = json.loads(data.decode("utf-8-sig"))
        if b"\\u" in data:  # half a surrogate pair is valid JSON, but no text
            body = json.loads(json.dumps(body, ensure_ascii=False).encode(errors="replace"))
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"the body is not valid JSON: {error}") from error
    if not isinstance(body, dict):
        raise ApiError(400, "the body must be a JSON object")
    body = {name: value for name, value in body.items() if value is not None}
    messages = body.get("messages")
    if isinstance(messages, list):  # clients echo an answer with its empty fields
        body["messages"] = [
            {key: value for key, value in each.items() if value is not None} if isinstance(each, dict) else each
            for each in messages
        ]
    try:
        parameters = kind.model_validate(body)
    except ValidationError as error:
        raise _refusal(error, kind) from error
    parameters.check()
    return parameters


def _refusal(error: ValidationError, kind: type[Parameters]) -> ApiError:
    """The first of the problems, in words; the alternatives of a union together."""
    problems = error.errors(include_url=False, include_input=False)
    name = str(problems[0]["loc"][0])
    if problems[0]["type"] == "extra_forbidden" and len(problems[0]["loc"]) == 1:
        return ApiError(400, f"'{name}' is not supported: this server knows {', '.join(kind.model_fields)}", name)
    same = [problem for problem in problems if problem["loc"][0] == name][:4]
    said = dict.fromkeys(f"{'.'.join(map(str, problem['loc']))}: {problem['msg']}" for problem in same)
    return ApiError(400, f"'{name}' is not right: {'; or '.join(said)}", name)
