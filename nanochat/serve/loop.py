"""The engine's thread, the replicas of a model, and the models of a server by name.

An engine is not thread-safe: a step reads and writes its queue, its cache and its requests, and two at once would mix
them up. Locking it would make every handler wait for a step to end. So each engine has a thread of its own, the only
one that touches it, and handlers leave calls for that thread:

    handler thread                           engine thread (EngineLoop)
    model.submit(requests, outbox)   calls ->    add the requests; step; step; ...
    outbox.get()                     <- queue    a Delivery for each request and step

Requests of all handlers meet in the same engine, which is what makes batches: 32 answers in one step cost little more
than one (continuous batching, Orca, OSDI 2022).

A `Model` has one EngineLoop per replica (`--replicas`), each on its own GPU or with its share of the cores. torch
releases the interpreter's lock while it computes, so threads are enough and the replicas need no processes. Sessions
and the response cache belong to the model, so all replicas share them. A replica whose engine raises answers its open
requests with 503 and gets no more; the others go on. `Models` knows which models there are and which are loaded.
"""

import logging
import math
import queue
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

from nanochat.cli import option, require_positive
from nanochat.conversation import ChatFormat
from nanochat.detokenizer import Event
from nanochat.engine import Engine, Request, Update
from nanochat.scheduler import TokenScore
from nanochat.serve.metrics import Metrics
from nanochat.serve.schema import ApiError, unavailable
from nanochat.serve.sessions import ResponseCache, Sessions

log = logging.getLogger(__name__)


# ---- One engine and its thread


class Delivery(NamedTuple):
    """The result of one engine step for one of the requests that were submitted together."""

    choice: int  # which of these requests
    events: list[Event]  # text, reasoning and tool calls, fit to be shown
    scores: list[TokenScore]  # of the step's tokens, if the request asked for them
    finish_reason: str | None


@dataclass
class Progress:
    """The loop's record of an open request, for routing and for the metrics."""

    choice: int
    outbox: "queue.SimpleQueue[Delivery]"  # to the handler that submitted it
    arrived: float = field(default_factory=time.monotonic)
    started: bool = False  # has it left the engine's queue?
    last_token: float | None = None  # when it came
    n_scores: int = 0  # delivered so far


class EngineLoop:
    """One engine and its thread. At most `limit` requests are open at a time, running and waiting together."""

    def __init__(self, engine: Engine, metrics: Metrics, model_name: str, replica: int, limit: int) -> None:
        self.engine = engine
        self.metrics = metrics
        self.model_name = model_name
        self.replica = replica
        self.limit = limit
        self.seconds_per_request = 1.0  # a running mean, from which Retry-After is estimated
        self.alive = True  # False once the engine has raised
        self._closed = False
        self._calls: list[Callable[[], None]] = []  # handlers put them in, the thread runs them between two steps
        self._open: dict[Request, Progress] = {}
        self._wake = threading.Condition()  # guards the three above
        self._thread = threading.Thread(target=self._run, name=f"engine {model_name} {replica}", daemon=True)
        self._thread.start()

    @property
    def n_open(self) -> int:
        """Return how many requests run or wait."""
        return len(self._open)

    def submit(self, requests: Sequence[Request], outbox: "queue.SimpleQueue[Delivery]") -> None:
        """Queue requests that the engine has checked; their deliveries go to `outbox`.

        Raises ApiError 503 when the engine has stopped.
        """
        with self._wake:
            if self._closed:
                raise unavailable("the engine has stopped: see the log")
            for choice, request in enumerate(requests):
                self._open[request] = Progress(choice, outbox)
                self._calls.append(partial(self.engine.add, request))
            self._wake.notify()

    def cancel(self, requests: Sequence[Request]) -> None:
        """Drop requests that nobody reads any more; those that have finished stay as they are."""
        with self._wake:
            for request in requests:
                # The request leaves `_open` now and the engine before its next step: its place is free for others at
                # once, and what the step in progress still makes of it is dropped by `_deliver`.
                if self._open.pop(request, None) is not None:
                    self._calls.append(partial(self.engine.abort, request))
                    self.metrics.requests.labels(self.model_name, "abort").inc()
            self._wake.notify()

    def forget_prefixes(self) -> None:
        """Empty the engine's prefix cache before its next step."""
        with self._wake:
            self._calls.append(self.engine.forget)
            self._wake.notify()

    def close(self) -> None:
        """End the thread after the current step. Requests that are still open end with the reason "abort"."""
        with self._wake:
            self._closed = True
            self._wake.notify()
        self._thread.join()

    def _run(self) -> None:
        """Do what handlers asked for, then a step, again and again; sleep while there is nothing to do."""
        try:
            while True:
                with self._wake:
                    self._wake.wait_for(lambda: self._closed or self._calls or self.engine.busy)
                    if self._closed:
                        return
                    calls = self._calls
                    self._calls = []
                # The lock is not held from here on: handlers can submit and cancel while a step computes. Their
                # calls run before the next step, so a new request joins the batch in the middle of others' answers.
                for call in calls:
                    call()
                self._deliver(self.engine.step())
        except Exception:
            # Whatever a step raises (out of memory, a bug), the cache may be half written by now. The engine is not
            # tried again: a wrong answer would be worse than none.
            log.exception("the engine of %s (replica %d) died", self.model_name, self.replica)
            self.alive = False
            self.metrics.replica_up.labels(self.model_name, self.replica).set(0)
        finally:
            # Closing and answering happen under one lock: a request is either in `_open` and hears of the end here, or
            # `submit` refuses it. None is left waiting for a thread that is gone.
            with self._wake:
                self._closed = True
                for progress in self._open.values():
                    progress.outbox.put(Delivery(progress.choice, [], [], finish_reason="abort"))
                    self.metrics.requests.labels(self.model_name, "error").inc()
                self._open.clear()

    def _deliver(self, updates: Sequence[Update]) -> None:
        """Hand the results of a step to the handlers that wait for them, and measure them."""
        name = self.model_name
        now = time.monotonic()
        with self._wake:
            for request, progress in self._open.items():
                if not progress.started and request.state != "waiting":
                    progress.started = True
                    self.metrics.queue_time.labels(name).observe(now - progress.arrived)
            for update in updates:
                if update.request not in self._open:
                    continue  # cancelled during the step
                progress = self._open[update.request]
                # The request is the engine's and goes on changing in the next step: handlers get copies of what is new.
                scores = update.request.scores[progress.n_scores :]
                progress.n_scores += len(scores)
                progress.outbox.put(Delivery(progress.choice, update.events, scores, update.finish_reason))
                if update.tokens:
                    if progress.last_token is None:
                        self.metrics.first_token.labels(name).observe(now - progress.arrived)
                    else:
                        # A tool's result comes as several tokens at once; the reader waited once for all of them.
                        seconds_per_token = (now - progress.last_token) / len(update.tokens)
                        self.metrics.between_tokens.labels(name).observe(seconds_per_token)
                    progress.last_token = now
                if update.finish_reason is not None:
                    del self._open[update.request]
                    seconds = now - progress.arrived
                    # Running mean over about the last ten requests, so that it follows the load.
                    self.seconds_per_request += 0.1 * (seconds - self.seconds_per_request)
                    # Aborted and broken answers are left out of the latencies: they end early, and would make a bad
                    # hour look fast.
                    self.metrics.end_to_end.labels(name).observe(seconds)
                    self.metrics.requests.labels(name, update.finish_reason).inc()


# ---- Models


@dataclass(frozen=True)
class ServerConfig:
    """The limits and defaults of a server."""

    host: str = option("127.0.0.1", "address to listen on; 0.0.0.0 lets other machines in: see --api-keys")
    allowed_host: tuple[str, ...] | None = option(None, "without keys, a further name to answer to; * = any")
    temperature: float = option(0.0, "for requests that give none; 0 is the likeliest answer")
    max_batch: int = option(32, "answers that a model makes at the same time; further ones wait")
    max_waiting: int = option(64, "answers that may wait while others are made; more are refused with 429")
    max_tokens: int | None = option(None, "longest answer in tokens; unset: as far as the context goes")
    max_body: int = option(1 << 20, "longest body of a request, in bytes")
    api_keys: str | None = option(None, "file of API keys, one a line; $NANOCHAT_API_KEYS (by commas) adds to them")
    cors_origin: str | None = option(None, "web pages of this origin may use the API, * = of any; unset: none but ours")
    max_sessions: int = option(1000, "conversations kept by session_id; the least recently used goes first")
    session_seconds: float = option(3600.0, "how long a session is kept after its last turn")
    cache_mb: float = option(16.0, "memory per model for answers that would come out the same again; 0: none kept")
    cache_seconds: float = option(600.0, "how long such an answer is kept")
    keep_alive_seconds: float = option(
        5.0, "a stream without news for so long sends a comment, so that it is kept open"
    )

    def __post_init__(self) -> None:
        """Raise ValueError for a flag with which no request could be answered."""
        require_positive(self, "max_batch", "max_tokens", "max_body", "max_sessions")
        require_positive(self, "session_seconds", "cache_seconds", "keep_alive_seconds")
        require_positive(self, "temperature", "max_waiting", "cache_mb", zero=True)


class Model:
    """A model that the server offers: its replicas, chat format, sessions and response cache."""

    def __init__(
        self, name: str, engines: Sequence[Engine], chat_format: ChatFormat, config: ServerConfig, metrics: Metrics
    ) -> None:
        self.name = name
        self.config = config
        self.engine = engines[0]  # for what all replicas have in common: context, limits, vocabulary
        self.tokenizer = self.engine.tokenizer
        self.chat_format = chat_format
        self.created = int(time.time())
        # ChatFormat.prompt leaves the same share of the context to the conversation, so that what a session keeps still
        # fits its next prompt.
        budget = self.engine.context - self.engine.context // 4
        self.sessions = Sessions(chat_format, budget, config.max_sessions, config.session_seconds)
        self.responses = ResponseCache(int(config.cache_mb * 2**20), config.cache_seconds)
        self.metrics = metrics
        metrics.add_model(name, engines)
        limit = self.engine.max_batch + config.max_waiting
        self.replicas = [EngineLoop(engine, metrics, name, i, limit) for i, engine in enumerate(engines)]
        self._dispatch = threading.Lock()

    @property
    def living_replicas(self) -> list[EngineLoop]:
        """Return the replicas whose engine still works."""
        return [loop for loop in self.replicas if loop.alive]

    @property
    def n_open(self) -> int:
        """Return how many requests run or wait, over all replicas."""
        return sum(loop.n_open for loop in self.replicas)

    def submit(self, requests: Sequence[Request], outbox: "queue.SimpleQueue[Delivery]") -> EngineLoop:
        """Send requests that belong together to the least busy replica, and return it.

        Raises ApiError 429 when it has no room for them now, 503 when every engine is dead.
        """
        with self._dispatch:  # two handlers must not both find the same replica idle
            # All of them go to one replica: samples of one prompt read it once and share its keys and values.
            loop = min(self.living_replicas or self.replicas, key=lambda loop: loop.n_open)
            # A refusal at the door costs the client one round trip. A place at the end of a long queue would cost it
            # minutes and then a timeout, and the engine would still make an answer that nobody reads.
            if loop.n_open + len(requests) > loop.limit:
                limit = sum(each.limit for each in self.living_replicas)
                # After the time of one answer, all that run now have made room.
                seconds = max(1, min(60, math.ceil(loop.seconds_per_request)))
                message = f"{self.n_open} answers are being made or waited for, of at most {limit}"
                raise ApiError(429, message, code="queue_full", headers={"Retry-After": str(seconds)})
            loop.submit(requests, outbox)
            return loop


class Models:
    """The models of a server by name. A name is known before its model is loaded; until `add` it answers 503."""

    def __init__(self, config: ServerConfig, names: Sequence[str], n_replicas: int = 1) -> None:
        self.config = config
        self.names = list(dict.fromkeys(names))
        self.n_replicas = n_replicas
        self.loaded: list[Model] = []  # grows while handlers already read it: append is atomic
        self.metrics = Metrics()
        self.started = time.time()
        # Set at SIGTERM: new answers are refused, those that were begun go on. The port stays open meanwhile: clients
        # hear 503 with Retry-After, which tells them and the load balancer more than a refused connection.
        self.draining = threading.Event()

    def add(self, name: str, engines: Sequence[Engine], chat_format: ChatFormat) -> None:
        """Start the threads of a model's replicas and let it answer."""
        self.loaded.append(Model(name, engines, chat_format, self.config, self.metrics))

    def get(self, name: str | None) -> Model:
        """Return a model by name; None means the first. Raises ApiError 404 if there is none, 503 while it loads."""
        if name is None:
            name = self.names[0]
        for model in self.loaded:
            if model.name == name:
                return model
        if name in self.names:
            raise unavailable("the model is being loaded")
        message = f"there is no model {name!r}: this server has {', '.join(self.names)}"
        raise ApiError(404, message, "model", "model_not_found")

    def get_for_answer(self, name: str | None) -> Model:
        """As `get`, and raise ApiError 503 if the model makes no answers: after SIGTERM, or when its engines are dead.

        Answers from the response cache are refused, too: a load balancer should hear the same from every request.
        """
        model = self.get(name)
        if self.draining.is_set():
            raise unavailable("the server is shutting down")
        if not model.living_replicas:
            raise unavailable("the engine has stopped: see the log")
        return model

    @property
    def n_open(self) -> int:
        """Return how many requests run or wait, over all models."""
        return sum(model.n_open for model in self.loaded)

    @property
    def most_open(self) -> int:
        """Return how many requests can be open at most, once all models are loaded."""
        limits = [loop.limit for model in self.loaded for loop in model.replicas]
        # The server's threads are counted before any model is loaded, so those still to come are counted by the flags.
        n_to_come = self.n_replicas * (len(self.names) - len(self.loaded))
        return sum(limits) + n_to_come * (self.config.max_batch + self.config.max_waiting)

    def close(self) -> None:
        """End the threads of all engines."""
        for model in self.loaded:
            for loop in model.replicas:
                loop.close()
