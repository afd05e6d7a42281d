"""What the API accepts: the bodies of its requests, and the shape of its refusals.

Requests are pydantic models. Each parameter is honoured or refused by its name, never ignored. A parameter that this
server does not have is accepted if its value asks for nothing: null and empty values, and those of `NOTHING`.

    >>> read_body(b'{"messages": [{"role": "user", "content": "Hi"}], "stop": ""}', ChatRequest)
    ApiError: 'stop' is not right: stop.str: String should have at least 1 character; or ...

Names and shapes are OpenAI's (platform.openai.com/docs/api-reference/chat/create); `top_k`, `min_p` and
`repetition_penalty` are vLLM's; `session_id` and `tool_trace` are our own.
"""

import dataclasses
import json
import random
from typing import Annotated, Any, Literal, TypeVar

from pydantic import ConfigDict, Field, ValidationError, model_validator

from nanochat.scheduler import Request
from nanochat.serve.messages import EMPTY, SHARED, Message, Strict


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


# Parameters that this server does not have, at the values that ask for nothing: their defaults where they come from.
# Clients send them with all their other settings.
NOTHING: dict[str, tuple[Any, ...]] = {
    # OpenAI
    "best_of": (1,),
    "echo": (False,),
    "function_call": ("none", "auto"),
    "modalities": (["text"],),
    "parallel_tool_calls": (True, False),
    "prompt_cache_retention": ("in-memory", "in_memory"),
    "response_format": ({"type": "text"},),
    "service_tier": ("auto", "default"),
    "store": (False,),
    "tool_choice": ("none", "auto"),
    "verbosity": ("medium",),
    # vLLM and SGLang
    "detokenize": (True,),
    "ignore_eos": (False,),
    "include_reasoning": (True,),
    "include_stop_str_in_output": (False,),
    "length_penalty": (1,),
    "min_new_tokens": (0,),
    "min_tokens": (0,),
    "no_stop_trim": (False,),
    "priority": (0,),
    "return_token_ids": (False,),
    "return_tokens_as_token_ids": (False,),
    "separate_reasoning": (True,),
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True,),
    "stream_reasoning": (True,),
    "use_beam_search": (False,),
    # llama.cpp
    "cache_prompt": (True,),
    "dry_allowed_length": (2,),
    "dry_base": (1.75,),
    "dry_multiplier": (0,),
    "dry_penalty_last_n": (-1, 0),
    "dynatemp_exponent": (1,),
    "dynatemp_range": (0,),
    "id_slot": (-1,),
    "min_keep": (0,),
    "mirostat": (0,),
    "mirostat_eta": (0.1,),
    "mirostat_tau": (5,),
    "n_keep": (0,),
    "n_predict": (-1,),
    "n_probs": (0,),
    "post_sampling_probs": (False,),
    "repeat_last_n": (0, 64),
    "repeat_penalty": (1,),
    "tfs_z": (1,),
    "return_progress": (False,),
    "timings_per_token": (False,),
    "top_n_sigma": (-1, 0),
    "typ_p": (1,),
    "typical_p": (1,),
    "xtc_probability": (0,),
    "xtc_threshold": (0.1,),
    # text-generation-webui and KoboldCpp, as SillyTavern sends them; Mistral and OpenRouter
    "add_bos_token": (True,),
    "ban_eos_token": (False,),
    "dynamic_temperature": (False,),
    "dynatemp_high": (1,),
    "dynatemp_low": (1,),
    "early_stopping": (False,),
    "encoder_repetition_penalty": (1,),
    "epsilon_cutoff": (0,),
    "eta_cutoff": (0,),
    "guidance_scale": (1,),
    "min_length": (0,),
    "mirostat_mode": (0,),
    "no_repeat_ngram_size": (0,),
    "num_beams": (1,),
    "penalty_alpha": (0,),
    "rep_pen": (1,),
    "repetition_penalty_range": (0,),
    "safe_prompt": (False,),
    "smoothing_curve": (1,),
    "smoothing_factor": (0,),
    "temperature_last": (False,),
    "tfs": (1,),
    "top_a": (0,),
    "typical": (1,),
}


def asks_for_nothing(name: str, value: Any) -> bool:
    """Return whether an unknown parameter has a value of `NOTHING`."""
    # Python takes True for 1, JSON does not.
    return any(value == nothing and isinstance(value, bool) == isinstance(nothing, bool) for nothing in NOTHING[name])


def describe_nothing(schema: dict[str, Any]) -> None:
    """Add `NOTHING` to the JSON schema of a body."""
    schema["additionalProperties"] = {"enum": list(EMPTY)}
    known = schema["properties"]
    schema["patternProperties"] = {
        f"^{name}$": {"enum": [*EMPTY, *values]} for name, values in NOTHING.items() if name not in known
    }


class StreamOptions(Strict):
    """`include_usage`: send one more chunk, with the token counts, before the end of the stream."""

    include_usage: bool | None = None
    include_obfuscation: bool | None = Field(None, description="Only false: chunks are never padded.")
    continuous_usage_stats: bool | None = Field(None, description="vLLM's. Only false: counts come at the end.")


class ResponseFormat(Strict):
    """Plain text only: this server does not constrain what the model writes."""

    type: Literal["text"]


Bias = Annotated[float, Field(ge=-100, le=100)]
Name = Annotated[str, Field(max_length=256)]
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
    # OpenAI's, so that a client's mistake is refused here as there. `top_p` 0 and the values of -1 are those of vLLM,
    # TGI and llama.cpp.
    model_config = ConfigDict(json_schema_extra=describe_nothing)

    model: str | None = Field(None, description="One of /v1/models; if absent, the first of them.")
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: int | None = Field(None, ge=1, le=16, description="Number of answers; the prompt is read once for all of them.")
    max_tokens: int | None = Field(
        None, ge=-1, le=2**31, description="-1: no limit. 0: with `echo` and `logprobs`, to score a text alone."
    )
    temperature: float | None = Field(
        None, ge=0, le=2, description="0: always the likeliest token. If absent: the server's --temperature, usually 0."
    )
    top_p: float | None = Field(
        None, ge=0, le=1, description=f"0: always the likeliest token, at any temperature. {NEEDS_TEMPERATURE}"
    )
    top_k: int | None = Field(None, ge=-1, le=2**31, description=f"0 or -1: off. {NEEDS_TEMPERATURE}")
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
        description="The same seed gives the same answer in any company; on a GPU except for rounding. -1: none.",
    )
    stop: Stop | Annotated[list[Stop], Field(max_length=4)] | None = None
    stop_token_ids: Annotated[list[Annotated[int, Field(ge=0)]], Field(max_length=64)] | None = Field(
        None, description="Tokens that end the answer and are not part of it."
    )
    user: Name | None = Field(None, description="Noted in the access log.")
    safety_identifier: Name | None = Field(None, description="The newer name of user.")
    prompt_cache_key: Name | None = Field(None, description=SHARED)

    @model_validator(mode="before")
    @classmethod
    def _drop_what_asks_for_nothing(cls, fields: Any) -> Any:
        if not isinstance(fields, dict):
            return fields
        # Tools that the model must not call: clients send them on with the last turn of a conversation.
        unused = {"tools": "tool_choice", "functions": "function_call"}
        return {
            name: value
            for name, value in fields.items()
            if name in cls.model_fields or name not in NOTHING or not asks_for_nothing(name, value)
            if name not in unused or fields.get(unused[name]) != "none"
        }

    # Validators that run after the fields' own raise ApiError, which pydantic lets through as it is: a ValueError would
    # be reported without the name of the parameter.
    @model_validator(mode="after")
    def _check(self) -> "Parameters":
        if self.stream_options is not None and self.stream_options.include_usage and not self.stream:
            raise ApiError(400, "'stream_options' needs 'stream': true", "stream_options")
        if self.stream_options is not None and self.stream_options.include_obfuscation:
            raise ApiError(
                400, "'stream_options': chunks are not padded here, leave include_obfuscation out", "stream_options"
            )
        if self.stream_options is not None and self.stream_options.continuous_usage_stats:
            raise ApiError(400, "'stream_options': counts come at the end alone", "stream_options")
        # From here on there is one way to say that something is not set.
        self.max_tokens = _unless_minus_one(self.max_tokens)
        self.top_k = _unless_minus_one(self.top_k)
        self.seed = _unless_minus_one(self.seed)
        self.user = self.user or self.safety_identifier
        return self

    def sampling(self, vocab_size: int, default_temperature: float) -> dict[str, Any]:
        """Return the sampling arguments of a Request. Raises ApiError 400 if a token that is named does not exist."""
        bias = {int(token): value for token, value in (self.logit_bias or {}).items()}
        for name, tokens in (("logit_bias", list(bias)), ("stop_token_ids", self.stop_token_ids or [])):
            largest = max(tokens, default=0)
            if largest >= vocab_size:
                raise ApiError(400, f"'{name}': there is no token {largest}, only {vocab_size}", name)
        # By name, so that none can be forgotten. Only those that are given: the engine has defaults of its own.
        names = Parameters.model_fields.keys() & {field.name for field in dataclasses.fields(Request)}
        settings = self.model_dump(include=names - {"max_tokens"}, exclude_none=True)  # max_tokens: see app.py
        settings.setdefault("temperature", default_temperature)
        if self.top_p == 0:
            # A share of 0 holds the likeliest token alone.
            settings["temperature"] = 0.0
        # Without a seed every answer gets one of its own, or all clients would draw the same.
        settings.setdefault("seed", random.getrandbits(32))
        settings["logit_bias"] = bias
        stop = self.stop or ()
        settings["stop"] = [stop] if isinstance(stop, str) else stop
        return settings


class ChatRequest(Parameters):
    """The body of /v1/chat/completions."""

    messages: Annotated[list[Message], NONEMPTY]
    max_completion_tokens: int | None = Field(None, ge=-1, le=2**31, description="The newer name of max_tokens.")
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)
    response_format: ResponseFormat | None = None
    reasoning_effort: str | None = Field(None, description="For models whose chat format has it, such as gpt-oss.")
    chat_template_kwargs: dict[str, Any] | None = Field(
        None, description="Arguments of the model's chat template, such as enable_thinking; others are refused."
    )
    continue_final_message: bool | None = Field(None, description="Always so if the last message is the assistant's.")
    add_generation_prompt: bool | None = Field(None, description="Always so if the last message is the user's.")
    session_id: Annotated[str, Field(pattern="^[A-Za-z0-9_-]{1,64}$")] | None = Field(
        None, description="The server keeps the conversation under this name; `messages` holds only the new ones."
    )

    @model_validator(mode="after")
    def _check_chat(self) -> "ChatRequest":
        newer = _unless_minus_one(self.max_completion_tokens)
        if None not in (self.max_tokens, newer) and self.max_tokens != newer:
            raise ApiError(400, "'max_tokens' and 'max_completion_tokens' differ: give one", "max_tokens")
        # From here on there is one name for the limit.
        if self.max_tokens is None:
            self.max_tokens = newer
        if self.top_logprobs and not self.logprobs:
            raise ApiError(400, "'top_logprobs' needs 'logprobs': true", "top_logprobs")
        # A session goes on from one answer; which of several would it be?
        if self.session_id is not None and self.n not in (None, 1):
            raise ApiError(400, "'n' must be 1 in a session: it continues with one answer", "n")
        if self.max_tokens == 0:
            raise ApiError(400, "'max_tokens' must be at least 1 in a chat", "max_tokens")
        # vLLM's clients say that the last message is to be continued, others let it speak for itself.
        prefill = self.messages[-1].role == "assistant"
        if prefill and self.session_id is not None:
            raise ApiError(400, "'messages' must end with the user's in a session", "messages")
        if self.continue_final_message not in (None, prefill):
            raise ApiError(
                400, "'continue_final_message' goes with a last message of the assistant", "continue_final_message"
            )
        if self.add_generation_prompt not in (None, not prefill):
            raise ApiError(400, "'add_generation_prompt' goes with a last message of the user", "add_generation_prompt")
        return self


def _unless_minus_one(value: int | None) -> int | None:
    return None if value == -1 else value


class CompletionRequest(Parameters):
    """The body of /v1/completions. Text is never read as special tokens; token ids are taken as they are."""

    prompt: str | Annotated[list[str], NONEMPTY] | Tokens | Annotated[list[Tokens], NONEMPTY]
    logprobs: Annotated[int, Field(ge=0, le=20)] | Literal[False] | None = Field(None, description="false: none.")
    echo: bool | None = Field(None, description="Begin the text with the prompt, and `logprobs` with those of it.")

    @model_validator(mode="after")
    def _check_text(self) -> "CompletionRequest":
        if self.logprobs is False:  # what a chat's client says, where 0 would ask for those of the answer alone
            self.logprobs = None
        if self.max_tokens == 0 and not self.scores_prompt:
            raise ApiError(400, "'max_tokens' 0 scores a text: give 'echo' and 'logprobs' with it", "max_tokens")
        return self

    @property
    def scores_prompt(self) -> bool:
        """True if the log-probabilities of the prompt are asked for."""
        return bool(self.echo) and self.logprobs is not None

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
        # A byte order mark is what some editors and shells put first.
        body = json.loads(data.decode("utf-8-sig"), parse_float=_number)
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


def _number(text: str) -> int | float:
    """Return the number of a JSON text. JSON has one kind: clients in Lua, R or PHP write 8.0 for 8 tokens."""
    value = float(text)
    return int(value) if value.is_integer() else value


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
