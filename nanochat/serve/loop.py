"""The engine's thread, and a model as the replicas that answer for it.

An engine is not thread-safe: a step reads and writes its queue, its cache and its requests, and two at once would mix
them up. Locking it would make every handler wait for a step to end. So each engine has a thread of its own, the only
one that touches it, and handlers leave notes for that thread:

    handler thread                                   engine thread (EngineLoop)
    ticket = model.submit(requests)  -- calls -->    add the requests; step; step; ...
    for delivery in ticket.read():   <-- queue --    a Delivery for each request and step

Requests of all handlers meet in the same engine, which is what makes batches: 32 answers in one step cost little more
than one (continuous batching, Orca, OSDI 2022).

A `Model` has one EngineLoop per replica (`--replicas`), each on its own GPU or with its share of the cores. torch
releases the interpreter's lock while it computes, so threads are enough and the replicas need no processes. Sessions
and the response cache belong to the model, so all replicas share them. A replica whose engine raises answers its open
requests with 503 and gets no more; the others go on.
"""

import logging
import math
import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

from nanochat.conversation import ChatFormat
from nanochat.detokenizer import Event
from nanochat.engine import Engine, Request, Update
from nanochat.serve.metrics import Metrics
from nanochat.serve.schema import ApiError, ModelInfo
from nanochat.serve.sessions import ResponseCache, Sessions

log = logging.getLogger(__name__)

POLL_SECONDS = 0.25  # how often a handler that waits for tokens looks whether its client is still there
ENGINE_DEAD = "the engine has stopped: see the log; try again later"


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
            # Nothing wakes this thread when the client hangs up, and a long queue may keep it without tokens for
            # minutes. So it looks up from the queue now and then: otherwise the engine would write for nobody.
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
        self.seconds_per_request = 1.0  # running mean; Retry-After is made of it
        self.error: Exception | None = None  # what killed the engine
        self._closed = False
        self._calls: list[Callable[[], None]] = []  # what handlers want done to the engine between two steps
        self._open: dict[Request, Progress] = {}
        self._wake = threading.Condition()  # guards the three above
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
                raise ApiError(503, ENGINE_DEAD, headers={"Retry-After": "5"})
            for index, request in enumerate(requests):
                self._open[request] = Progress(index, ticket.queue)
                self._calls.append(partial(self.engine.add, request))
            self._wake.notify()
        return ticket

    def cancel(self, requests: Sequence[Request]) -> None:
        """Drop requests that nobody reads any more; those that have finished stay as they are."""
        with self._wake:
            for request in requests:
                # The request leaves `_open` now and the engine before its next step: its place is free for others at
                # once, and what the step in progress still makes of it is dropped by `_deliver`.
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
        except Exception as error:
            # Whatever a step raises (out of memory, a bug), the cache may be half written by now. The engine is not
            # tried again: a wrong answer would be worse than none.
            log.exception("the engine of %s (replica %d) died", self.model_name, self.replica)
            self.error = error
            self.metrics.replica_died(self.model_name, self.replica)
        finally:
            # Closing and answering happen under one lock: a request is either in `_open` and hears of the end here, or
            # `submit` refuses it. None is left waiting for a thread that is gone.
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
                # The request is the engine's and goes on changing in the next step: handlers get copies of what is new.
                scores = update.request.scores[progress.n_scores :]
                progress.n_scores += len(scores)
                progress.queue.put(Delivery(progress.index, update.events, scores, update.finish_reason))
                since_arrival = now - progress.arrived
                if update.tokens:
                    # A step may give several tokens: a tool's result comes with the token that called it.
                    since_last = None if progress.last_token is None else now - progress.last_token
                    self.metrics.new_tokens(self.model_name, len(update.tokens), since_arrival, since_last)
                    progress.last_token = now
                if update.finish_reason is not None:
                    del self._open[update.request]
                    # Running mean over about the last ten requests, so that it follows the load.
                    self.seconds_per_request += 0.1 * (since_arrival - self.seconds_per_request)
                    self.metrics.finished(self.model_name, update.finish_reason, since_arrival)


class Model:
    """A model that the server offers: its replicas, chat format, sessions and response cache."""

    def __init__(
        self,
        *,
        name: str,
        engines: Sequence[Engine],
        chat_format: ChatFormat,
        sessions: Sessions,
        responses: ResponseCache,
        max_waiting: int,
        metrics: Metrics,
    ) -> None:
        self.name = name
        self.engine = engines[0]  # for what all replicas have in common: context, limits, vocabulary
        self.tokenizer = self.engine.tokenizer
        self.chat_format = chat_format
        self.sessions = sessions
        self.responses = responses
        self.metrics = metrics
        self.created = int(time.time())
        metrics.add_model(name, engines)
        limit = self.engine.max_batch + max_waiting
        self.replicas = [
            EngineLoop(engine, metrics, model_name=name, replica=replica, limit=limit)
            for replica, engine in enumerate(engines)
        ]
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
                raise ApiError(503, ENGINE_DEAD, headers={"Retry-After": "5"})
            # All of them go to one replica: samples of one prompt read it once and share its keys and values.
            loop = min(self.alive, key=lambda loop: loop.n_open)
            # A refusal at the door costs the client one round trip. A place at the end of a long queue would cost it
            # minutes and then a timeout, and the engine would still make an answer that nobody reads.
            if loop.n_open + len(requests) > loop.limit:
                limit = sum(each.limit for each in self.alive)
                # After the time of one answer, all that run now have made room.
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
