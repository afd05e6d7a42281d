"""What a server does, without HTTP: models, and answers begun, streamed and ended, with sessions and a cache."""

import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from nanochat.chat_format import ChatFormat
from nanochat.cli import option, require_positive
from nanochat.conversation import Message
from nanochat.detokenizer import AnswerDecoder, content_of
from nanochat.engine import Engine, Request
from nanochat.serve.answers import Answer, ChatForm, TextForm, usage_of
from nanochat.serve.loop import Delivery, EngineLoop, read_deliveries
from nanochat.serve.metrics import Metrics, ModelMetrics
from nanochat.serve.schema import ApiError, ChatRequest, CompletionRequest
from nanochat.serve.sessions import Key, ResponseCache, Sessions

KEYS_VARIABLE = "NANOCHAT_API_KEYS"


@dataclass(frozen=True)
class ServerConfig:
    """How a server answers, and what it keeps to."""

    temperature: float = option(0.0, "for requests that give none; 0 is the likeliest answer")
    max_batch: int = option(32, "answers of a model made at the same time; further ones wait")
    max_waiting: int = option(64, "answers that may wait while others are made; more are told to come back (429)")
    max_tokens: int | None = option(None, "longest answer in tokens; unset: as far as the context goes")
    max_body: int = option(1 << 20, "longest body of a request, in bytes")
    api_keys: str | None = option(None, f"file of API keys, one a line; ${KEYS_VARIABLE} (by commas) adds to them")
    cors_origin: str | None = option(None, "web pages of this origin may use the API, * = of any; unset: none but ours")
    max_sessions: int = option(1000, "conversations kept by session_id; the one used longest ago goes first")
    session_seconds: float = option(3600.0, "how long a session is kept after its last turn")
    cache_mb: float = option(16.0, "memory of a model for answers that would come out the same again; 0: none kept")
    cache_seconds: float = option(600.0, "how long such an answer is kept")

    def __post_init__(self) -> None:
        """Raise ValueError for a flag with which no request could be answered."""
        require_positive(self, "max_batch", "max_tokens", "max_body", "max_sessions")
        require_positive(self, "session_seconds", "cache_seconds")
        require_positive(self, "temperature", "max_waiting", "cache_mb", zero=True)


class Completion:
    """One HTTP request's answer on its way, from the engine or from the cache, and what is to be done at its end."""

    def __init__(self, service: "Service", answer: Answer, requests: Sequence[Request], key: str | None) -> None:
        self.service, self.answer, self.requests, self.key = service, answer, requests, key
        self.cached = service.cache.get(key) if key and not service.loop.closed else None
        self.on_end: Callable[[], None] = lambda: None
        self.on_close: Callable[[], None] = lambda: None
        self.facts: dict[str, Any] = {"cached": self.cached is not None}  # for the access log
        self._deliveries: Any = None if self.cached else service.loop.submit(requests)

    def deliveries(self, gone: Callable[[], bool]) -> Iterator[Delivery]:
        """What comes; ends early when the client has gone."""
        if self.cached is not None:
            kept, self.answer.usage = self.cached
            self.service.metrics.cache_hits.inc()
            source: Iterator[Delivery] = (delivery for choice in kept for delivery in choice)
        else:
            source = read_deliveries(self._deliveries, len(self.requests), gone)
        for delivery in self.answer.keep(source):
            if self.answer.ended:
                self._end()
            yield delivery

    def _end(self) -> None:
        if self.cached is None:
            self.answer.usage = usage_of(self.requests)
            if self.key:
                self.service.cache.put(self.key, (self.answer.deliveries, self.answer.usage))
        reasons = [str(deliveries[-1].finish_reason) for deliveries in self.answer.deliveries]
        counts = {name: self.answer.usage[name] for name in ("prompt_tokens", "completion_tokens")}
        self.facts |= {**counts, "finish_reason": ",".join(reasons)}
        self.on_end()

    def close(self) -> None:
        """Free the places of an answer that nobody waits for any more."""
        self.service.loop.cancel(self.requests)
        self.on_close()


class Service:
    """One model's engine with all that is kept beside it; knows nothing of HTTP."""

    def __init__(self, name: str, engine: Engine, form: ChatFormat, metrics: Metrics, config: ServerConfig) -> None:
        self.name, self.engine, self.form, self.config = name, engine, form, config
        self.created = int(time.time())
        self.metrics = ModelMetrics(metrics, name, engine)
        self.loop = EngineLoop(engine, self.metrics, engine.max_batch + config.max_waiting)
        # as much as ChatFormat.prompt leaves to a conversation, however long the answer may get
        budget = engine.context - engine.context // 4
        self.sessions = Sessions(form, budget, config.max_sessions, config.session_seconds)
        self.cache = ResponseCache(int(config.cache_mb * 2**20), config.cache_seconds)

    def describe(self) -> dict[str, Any]:
        """The model as /v1/models lists it."""
        own = {"id": self.name, "object": "model", "created": self.created, "owned_by": "nanochat"}
        return {**own, "context_length": self.engine.context}

    def _start(self, form: ChatForm, body: Any, requests: Sequence[Request], *known: Any) -> Completion:
        """known: what decides the answer besides the body, and whose it is."""
        head = {"id": form.prefix + uuid.uuid4().hex, "created": int(time.time()), "model": self.name}
        key = None
        if self.config.cache_mb and (body.seed is not None or requests[0].temperature == 0):
            asked = body.model_dump(exclude={"stream", "stream_options", "user", "session_id", "model"})
            key = self.cache.key([form.prefix, asked, *known])
        with_logprobs = body.top_logprobs_wanted() is not None
        return Completion(self, Answer(form, head, len(requests), with_logprobs), requests, key)

    def _requests(self, body: Any, messages: list[Message] | None = None) -> list[Request]:
        """The engine's, for `n` answers to `messages`, or for `n` continuations of each prompt of the body."""
        given: list[Any] = body.prompts() if messages is None else [messages]
        if (count := len(given) * (body.n or 1)) > self.loop.most_open:  # said before much is made of them
            raise ApiError(400, f"{count} answers at once: this server makes at most {self.loop.most_open}", "n")
        engine, form, tokenizer = self.engine, self.form, self.engine.tokenizer
        settings = body.settings(engine.vocab_size, self.config.temperature)
        limits = body.tokens_wanted(), self.config.max_tokens
        most = min((limit for limit in limits if limit is not None), default=None)
        try:
            if messages is not None:
                prompts = [form.prompt(messages, engine.context, most)]
            else:
                first = [] if (bos := tokenizer.get_bos_token_id()) is None else [bos]
                prompts = [first + tokenizer.encode(each) if isinstance(each, str) else each for each in given]
            requests = [Request(each, most, sample=i, **settings) for each in prompts for i in range(body.n or 1)]
            for request in requests:
                engine.check(request)
                plain = AnswerDecoder(tokenizer, request.stop)  # what continues a text has no reasoning in it
                request.decoder = plain if messages is None else form.decoder(request.tokens, request.stop)
        except ValueError as error:
            raise ApiError(400, str(error), "prompt" if messages is None else "messages") from error
        return requests

    def complete(self, body: CompletionRequest, owner: int) -> Completion:
        """Begin the answer to /v1/completions; raises ApiError."""
        return self._start(TextForm(self.engine.tokenizer), body, self._requests(body), owner)

    def chat(self, body: ChatRequest, owner: int) -> Completion:
        """Begin the answer to /v1/chat/completions, in its session if it names one; raises ApiError."""
        form, messages = ChatForm(self.engine.tokenizer), [message.as_turn() for message in body.messages]
        if body.session_id is None:
            return self._start(form, body, self._requests(body, messages), owner, messages)
        key = owner, body.session_id
        messages, dropped = self.sessions.begin(key, messages)
        try:
            completion = self._start(form, body, self._requests(body, messages), owner, messages)
        except BaseException:
            self.sessions.end(key)
            raise
        self._in_session(completion, key, messages, dropped)
        return completion

    def _in_session(self, completion: Completion, key: Key, messages: list[Message], dropped: int) -> None:
        """Let the end of the answer write it into its session, and its failure leave the session as it was."""
        answer = completion.answer

        def end() -> None:
            completion.on_close = lambda: None  # the next answer may have begun by then
            whole = [*messages, {"role": "assistant", "content": content_of(answer.events(0))}]
            turns = sum(message["role"] == "user" for message in whole)
            account = {"id": key[1], "model": self.name, "turns": turns, "dropped_turns": dropped}
            account |= {"tokens": answer.usage["total_tokens"], "context": self.engine.context}
            account |= {"expires_in": self.config.session_seconds, **answer.usage["prompt_tokens_details"]}
            self.sessions.end(key, {**account, "messages": whole})
            answer.extra["session"] = account

        completion.on_end, completion.on_close = end, lambda: self.sessions.end(key)

    def stats(self) -> dict[str, Any]:
        """The state of the model."""
        now = {"open_requests": self.loop.n_open, "sessions": len(self.sessions), "cached_responses": len(self.cache)}
        return {"context": self.engine.context, "max_batch": self.engine.max_batch, **now, **self.engine.stats()}


class Models:
    """A server's models by name, each with an engine, a thread, sessions and caches of its own. Those of `names` are
    known before they are there: until `add` brings them, requests for them are told to come back."""

    def __init__(self, config: ServerConfig, names: Iterable[str] = ()) -> None:
        self.config, self.metrics, self.started, self.draining = config, Metrics(), time.time(), False
        self._services: dict[str, Service | None] = dict.fromkeys(names)

    def add(self, name: str, engine: Engine, form: ChatFormat | None = None) -> None:
        """Let a model answer; in the project's own chat format, unless another is given."""
        service = Service(name, engine, form or ChatFormat(engine.tokenizer), self.metrics, self.config)
        service.loop.draining, self._services[name] = self.draining, service

    @property
    def ready(self) -> list[Service]:
        """Those that are there."""
        return [service for service in list(self._services.values()) if service]

    def get(self, name: str | None) -> Service:
        """A model by name, None = the first. ApiError 404 when there is none of that name, 503 while it is loaded."""
        if name is not None and name not in self._services:
            message = f"there is no model {name!r}: this server has {', '.join(self._services)}"
            raise ApiError(404, message, "model", "model_not_found")
        service = self._services[next(iter(self._services)) if name is None else name]
        if service is None:
            raise ApiError(503, "the model is being loaded; try again later", headers={"Retry-After": "5"})
        return service

    @property
    def dead(self) -> list[str]:
        """Those whose engine has died."""
        return [service.name for service in self.ready if service.loop.error is not None]

    @property
    def trouble(self) -> str | None:
        """Why not all of the server is fit to answer, if it is not."""
        if self.dead:
            return f"the engine died: {', '.join(self.dead)}"
        if self.draining:
            return "shutting down"
        return "loading" if len(self.ready) < len(self._services) else None

    @property
    def n_open(self) -> int:
        """Answers that are made or waited for."""
        return sum(service.loop.n_open for service in self.ready)

    @property
    def most_open(self) -> int:
        """So many may be at the same time."""
        each = self.config.max_batch + self.config.max_waiting
        return sum(service.loop.most_open if service else each for service in self._services.values())

    def drain(self) -> None:
        """Refuse new work from now on."""
        self.draining = True
        for service in self.ready:
            service.loop.draining = True

    def close(self) -> None:
        """End the engines' threads."""
        for service in self.ready:
            service.loop.close()

    def session(self, owner: int, name: str, forget: bool = False) -> dict[str, Any]:
        """What a session holds, the newest where several models have one of that name, or the end of them all;
        ApiError 404 when there is none (any more)."""
        key = owner, name
        if forget:
            if sum(service.sessions.forget(key) for service in self.ready):
                return {"id": name, "deleted": True}
        elif turns := [turn for service in self.ready if (turn := service.sessions.get(key))]:
            return max(turns, key=lambda turn: turn["expires_in"])
        raise ApiError(404, f"there is no session {name!r} (any more)", "session_id", "session_not_found")

    def invalidate(self) -> dict[str, Any]:
        """Forget kept answers, and what the engines know of prompts."""
        for service in self.ready:
            service.loop.call(service.engine.forget)
        return {"responses": sum(service.cache.clear() for service in self.ready)}

    def stats(self) -> dict[str, Any]:
        """The state of all models, for people; /metrics is for machines."""
        models = {service.name: service.stats() for service in self.ready}
        return {"uptime_seconds": round(time.time() - self.started, 1), "models": models}
