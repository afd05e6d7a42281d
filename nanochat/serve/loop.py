"""The engines' threads, and the models that a server offers.

An engine is not thread-safe, so each has a thread of its own, the only one that touches it:

    handler thread                                   engine thread (EngineLoop)
    ticket = model.submit(requests)  -- calls -->    add the requests; step; step; ...
    for delivery in ticket.read():   <-- queue --    a Delivery for each request and step

A `Model` has one EngineLoop per replica (`--replicas`), each on its own GPU or with its share of the cores. Requests go
to the replica with the fewest open ones. Sessions and the response cache belong to the model, so all replicas share
them. A replica whose engine raises answers its open requests with 503 and gets no more; the others go on.
`Models` is all that the server offers, by name.
"""

import logging
import math
import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

from nanochat.chat_format import ChatFormat
from nanochat.cli import option, require_positive
from nanochat.detokenizer import Event
from nanochat.engine import Engine, Request, Update
from nanochat.serve.metrics import Metrics
from nanochat.serve.schema import ApiError, ModelInfo, SessionContent
from nanochat.serve.sessions import ResponseCache, Sessions

log = logging.getLogger(__name__)

KEYS_VARIABLE = "NANOCHAT_API_KEYS"
POLL_SECONDS = 0.25  # how often a handler that waits for tokens looks whether its client is still there


@dataclass(frozen=True)
class ServerConfig:
    """The limits and defaults of a server."""

    temperature: float = option(0.0, "for requests that give none; 0 is the likeliest answer")
    max_batch: int = option(32, "answers that a model makes at the same time; further ones wait")
    max_waiting: int = option(64, "answers that may wait while others are made; more are refused with 429")
    max_tokens: int | None = option(None, "longest answer in tokens; unset: as far as the context goes")
    max_body: int = option(1 << 20, "longest body of a request, in bytes")
    api_keys: str | None = option(None, f"file of API keys, one a line; ${KEYS_VARIABLE} (by commas) adds to them")
    cors_origin: str | None = option(None, "web pages of this origin may use the API, * = of any; unset: none but ours")
    max_sessions: int = option(1000, "conversations kept by session_id; the least recently used goes first")
    session_seconds: float = option(3600.0, "how long a session is kept after its last turn")
    cache_mb: float = option(16.0, "memory per model for answers that would come out the same again; 0: none kept")
    cache_seconds: float = option(600.0, "how long such an answer is kept")

    def __post_init__(self) -> None:
        """Raise ValueError for a flag with which no request could be answered."""
        require_positive(self, "max_batch", "max_tokens", "max_body", "max_sessions")
        require_positive(self, "session_seconds", "cache_seconds")
        require_positive(self, "temperature", "max_waiting", "cache_mb", zero=True)


class Delivery(NamedTuple):
    """The result of one engine step for one of the requests that were submitted together."""

    index: int  # type: ignore[assignment]  # of the request; the name hides tuple.index, which nobody needs here
    events: list[Event]  # text, reasoning and tool calls, fit to be shown
    scores: list[Any]  # TokenScores of the step's tokens, if the request asked for them
    finish_reason: str | None = None


@dataclass
class Progress:
    """What the loop knows of an open request."""

    index: int
    queue: "queue.SimpleQueue[Delivery]"
    arrived: float = field(default_factory=time.monotonic)
    started: bool = False
    last_token: float | None = None
    n_scores: int = 0  # delivered so far


class Ticket:
    """Requests that were submitted together to one replica."""

    def __init__(self, loop: "EngineLoop", requests: Sequence[Request]) -> None:
        self.loop = loop
        self.requests = requests
        self.queue: queue.SimpleQueue[Delivery] = queue.SimpleQueue()

    def read(self, client_left: Callable[[], bool]) -> Iterator[Delivery]:
        """Iterate over the deliveries until every request has finished; end early when the client has left.

        Raises ApiError 503 when the engine dies, or the server is closed, in the middle.
        """
        n_open = len(self.requests)
        while n_open:
            try:
                delivery = self.queue.get(timeout=POLL_SECONDS)
            except queue.Empty:
                delivery = None
            if client_left():
                return
            if delivery is None:
                continue
            if delivery.finish_reason in ("error", "abort"):
                raise ApiError(503, "the engine stopped in the middle of the answer")
            if delivery.finish_reason is not None:
                n_open -= 1
            yield delivery

    def cancel(self) -> None:
        """Drop the requests that have not finished."""
        self.loop.cancel(self.requests)


class EngineLoop:
    """One engine and its thread. At most `limit` requests are open at a time, running and waiting together."""

    def __init__(self, engine: Engine, metrics: Metrics, model_name: str, replica: int, limit: int) -> None:
        self.engine = engine
        self.metrics = metrics
        self.model_name = model_name
        self.replica = replica
        self.limit = limit
        self.seconds_per_request = 1.0  # running mean; the basis of Retry-After
        self.error: Exception | None = None  # what killed the engine
        self._closed = False
        self._calls: list[Callable[[], None]] = []  # what handlers want done to the engine between two steps
        self._open: dict[Request, Progress] = {}
        self._wake = threading.Condition()  # guards the four above
        self._thread = threading.Thread(target=self._run, name=f"engine {model_name} {replica}", daemon=True)
        self._thread.start()

    @property
    def n_open(self) -> int:
        """Number of requests that run or wait."""
        return len(self._open)

    def submit(self, requests: Sequence[Request]) -> Ticket:
        """Queue requests that the engine has checked. Raises ApiError 503 when the engine has stopped."""
        ticket = Ticket(self, requests)
        with self._wake:
            if self._closed:
                raise ApiError(
                    503, "the engine has stopped: see the log; try again later", headers={"Retry-After": "5"}
                )
            for index, request in enumerate(requests):
                self._open[request] = Progress(index, ticket.queue)
                self._calls.append(partial(self.engine.add, request))
            self._wake.notify()
        return ticket

    def cancel(self, requests: Sequence[Request]) -> None:
        """Drop requests that nobody reads any more; those that have finished stay as they are."""
        with self._wake:
            for request in requests:
                if self._open.pop(request, None) is not None:
                    self._calls.append(partial(self.engine.abort, request))
                    self.metrics.finished(self.model_name, "abort")
            self._wake.notify()

    def forget_prefixes(self) -> None:
        """Empty the engine's prefix cache before its next step."""
        with self._wake:
            self._calls.append(self.engine.forget)
            self._wake.notify()

    def close(self) -> None:
        """End the thread after the current step. Requests that are still open end with the reason "error"."""
        with self._wake:
            self._closed = True
            self._wake.notify()
        self._thread.join()

    def _run(self) -> None:
        try:
            while True:
                with self._wake:
                    self._wake.wait_for(lambda: self._closed or self._calls or self.engine.busy)
                    if self._closed:
                        return
                    calls = self._calls
                    self._calls = []
                for call in calls:
                    call()
                self._deliver(self.engine.step())
        except Exception as error:
            log.exception("the engine of %s (replica %d) died", self.model_name, self.replica)
            self.error = error
            self.metrics.replica_died(self.model_name, self.replica)
        finally:
            with self._wake:
                self._closed = True
                for progress in self._open.values():
                    progress.queue.put(Delivery(progress.index, [], [], "error"))
                    self.metrics.finished(self.model_name, "error")
                self._open.clear()

    def _deliver(self, updates: Sequence[Update]) -> None:
        """Hand the results of a step to the handlers that wait for them, and measure them."""
        now = time.monotonic()
        with self._wake:
            for request, progress in self._open.items():
                if not progress.started and request.state != "waiting":
                    progress.started = True
                    self.metrics.started(self.model_name, now - progress.arrived)
            for update in updates:
                if update.request not in self._open:
                    continue  # cancelled during the step
                progress = self._open[update.request]
                scores = update.request.scores[progress.n_scores :]
                progress.n_scores += len(scores)
                progress.queue.put(Delivery(progress.index, update.events, scores, update.finish_reason))
                since_arrival = now - progress.arrived
                if update.tokens:
                    since_last = None if progress.last_token is None else now - progress.last_token
                    self.metrics.new_tokens(self.model_name, len(update.tokens), since_arrival, since_last)
                    progress.last_token = now
                if update.finish_reason is not None:
                    del self._open[update.request]
                    self.seconds_per_request += 0.1 * (since_arrival - self.seconds_per_request)
                    self.metrics.finished(self.model_name, update.finish_reason, since_arrival)


class Model:
    """A model that the server offers: its replicas, chat format, sessions and response cache."""

    def __init__(
        self, name: str, engines: Sequence[Engine], chat_format: ChatFormat, metrics: Metrics, config: ServerConfig
    ) -> None:
        self.name = name
        self.engine = engines[0]  # for what all replicas have in common: context, limits, vocabulary
        self.tokenizer = self.engine.tokenizer
        self.chat_format = chat_format
        self.metrics = metrics
        self.created = int(time.time())
        metrics.add_model(name, engines)
        limit = self.engine.max_batch + config.max_waiting
        self.replicas = [EngineLoop(engine, metrics, name, i, limit) for i, engine in enumerate(engines)]
        # The same share of the context that ChatFormat.prompt leaves to the conversation, so that a kept conversation
        # still fits its next prompt.
        budget = self.engine.context - self.engine.context // 4
        self.sessions = Sessions(chat_format, budget, config.max_sessions, config.session_seconds)
        self.responses = ResponseCache(int(config.cache_mb * 2**20), config.cache_seconds)
        self._choice = threading.Lock()

    @property
    def alive(self) -> list[EngineLoop]:
        """The replicas whose engine still works."""
        return [loop for loop in self.replicas if loop.error is None]

    @property
    def n_open(self) -> int:
        """Number of requests that run or wait, over all replicas."""
        return sum(loop.n_open for loop in self.replicas)

    @property
    def limit(self) -> int:
        """The largest `n_open` that can be, while all replicas live."""
        return sum(loop.limit for loop in self.replicas)

    def submit(self, requests: Sequence[Request]) -> Ticket:
        """Send requests that belong together to the least busy replica.

        Raises ApiError 429 when it has no room for them now, 503 when every engine is dead.
        """
        with self._choice:  # two handlers must not both find the same replica idle
            if not self.alive:
                raise ApiError(
                    503, "the engine has stopped: see the log; try again later", headers={"Retry-After": "5"}
                )
            loop = min(self.alive, key=lambda loop: loop.n_open)
            if loop.n_open + len(requests) > loop.limit:
                limit = sum(each.limit for each in self.alive)
                seconds = max(1, min(60, math.ceil(loop.seconds_per_request)))
                message = f"{self.n_open} answers are being made or waited for, of at most {limit}"
                raise ApiError(429, message, code="queue_full", headers={"Retry-After": str(seconds)})
            return loop.submit(requests)

    def describe(self) -> ModelInfo:
        """Return the model's entry in /v1/models."""
        return {
            "id": self.name,
            "object": "model",
            "created": self.created,
            "owned_by": "nanochat",
            "context_length": self.engine.context,
        }

    def stats(self) -> dict[str, Any]:
        """Return gauges and counters, summed over the replicas."""
        return {
            "context": self.engine.context,
            "max_batch": self.engine.max_batch,
            "open_requests": self.n_open,
            "sessions": len(self.sessions),
            "cached_responses": len(self.responses),
            **self.metrics.engine_figures(self.name),
        }


class Models:
    """The models of a server by name. A name is known before its model is loaded; until `add` it answers 503."""

    def __init__(self, config: ServerConfig, names: Iterable[str], n_replicas: int = 1) -> None:
        self.config = config
        self.n_replicas = n_replicas
        self.metrics = Metrics()
        self.started = time.time()
        self.draining = False
        self._models: dict[str, Model | None] = dict.fromkeys(names)

    def add(self, name: str, engines: Sequence[Engine], chat_format: ChatFormat) -> None:
        """Start the threads of a model's replicas and let it answer."""
        self._models[name] = Model(name, engines, chat_format, self.metrics, self.config)

    @property
    def loaded(self) -> list[Model]:
        """The models that can be asked."""
        return [model for model in list(self._models.values()) if model is not None]

    def get(self, name: str | None) -> Model:
        """Return a model by name; None means the first. Raises ApiError 404 if there is none, 503 while it loads."""
        if name is None:
            name = next(iter(self._models))
        if name not in self._models:
            message = f"there is no model {name!r}: this server has {', '.join(self._models)}"
            raise ApiError(404, message, "model", "model_not_found")
        model = self._models[name]
        if model is None:
            raise ApiError(503, "the model is being loaded; try again later", headers={"Retry-After": "5"})
        return model

    def get_for_answer(self, name: str | None) -> Model:
        """As `get`, and raise ApiError 503 if the model makes no answers: after SIGTERM, or when its engines are dead.

        Answers from the response cache are refused, too: a load balancer should hear the same from every request.
        """
        model = self.get(name)
        if self.draining:
            raise ApiError(503, "the server is shutting down; try again later", headers={"Retry-After": "5"})
        if not model.alive:
            raise ApiError(503, "the engine has stopped: see the log; try again later", headers={"Retry-After": "5"})
        return model

    @property
    def trouble(self) -> str | None:
        """Why this server should get no requests now, for /health; None when all is well."""
        dead = [model.name for model in self.loaded if not model.alive]
        if dead:
            return f"the engine died: {', '.join(dead)}"
        if self.draining:
            return "shutting down"
        if len(self.loaded) < len(self._models):
            return "loading"
        return None

    @property
    def n_open(self) -> int:
        """Number of requests that run or wait, over all models."""
        return sum(model.n_open for model in self.loaded)

    @property
    def most_open(self) -> int:
        """The largest `n_open` that can be, with all models loaded."""
        each = self.n_replicas * (self.config.max_batch + self.config.max_waiting)
        return sum(model.limit if model else each for model in self._models.values())

    def find_session(self, owner: int, name: str) -> SessionContent:
        """Return the most recent session of that name over all models. Raises ApiError 404 if there is none."""
        found = [session for model in self.loaded if (session := model.sessions.get((owner, name)))]
        if not found:
            raise _no_session(name)
        return max(found, key=lambda session: session["expires_in"])

    def delete_session(self, owner: int, name: str) -> None:
        """Forget the sessions of that name, whichever their model. Raises ApiError 404 if there is none."""
        deleted = [model.sessions.forget((owner, name)) for model in self.loaded]
        if not any(deleted):
            raise _no_session(name)

    def invalidate_caches(self) -> int:
        """Empty the engines' prefix caches and the response caches; return how many responses were forgotten."""
        for model in self.loaded:
            for loop in model.alive:
                loop.forget_prefixes()
        return sum(model.responses.clear() for model in self.loaded)

    def drain(self) -> None:
        """Refuse new answers from now on; those that were begun go on."""
        self.draining = True

    def close(self) -> None:
        """End the threads of all engines."""
        for model in self.loaded:
            for loop in model.replicas:
                loop.close()


def _no_session(name: str) -> ApiError:
    return ApiError(404, f"there is no session {name!r} (any more)", "session_id", "session_not_found")
