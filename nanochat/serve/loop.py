"""The one thread that touches the engine, and what it measures."""

import logging
import math
import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from nanochat.detokenizer import Event
from nanochat.engine import Engine, Request, Update
from nanochat.serve.metrics import ModelMetrics
from nanochat.serve.schema import ApiError

log = logging.getLogger(__name__)


class Delivery(NamedTuple):
    """What a step brought for one of the requests that were submitted together."""

    index: int  # type: ignore[assignment]  # which of them; it hides tuple.index
    events: list[Event]  # fit to be shown
    scores: list[Any]  # TokenScores of the step's tokens, where the request asked for them
    finish_reason: str | None = None


@dataclass
class _Ticket:
    """A request on its way."""

    index: int
    deliveries: "queue.SimpleQueue[Delivery]"
    n_scores: int = 0  # that have been delivered
    arrived: float = field(default_factory=time.monotonic)
    started: bool = False
    last: float | None = None  # when its newest token came


class EngineLoop:
    """Handlers submit requests, each with its decoder, and read what comes of them from a queue; at most `most_open`
    are open at a time."""

    def __init__(self, engine: Engine, metrics: ModelMetrics, most_open: int) -> None:
        self.engine, self.metrics, self.most_open = engine, metrics, most_open
        self.error: BaseException | None = None  # what killed the engine, if it is dead
        self.draining = self._closed = False
        self._wake = threading.Condition()
        self._commands: list[tuple[Callable[..., None], tuple]] = []
        self._tickets: dict[Request, _Ticket] = {}
        self._seconds_each = 1.0  # running mean of how long a request takes
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    @property
    def closed(self) -> bool:
        """Whether the engine is dead, or the server ends."""
        return self._closed or self.draining

    @property
    def n_open(self) -> int:
        """Requests that wait or run."""
        return len(self._tickets)

    def submit(self, requests: Sequence[Request]) -> "queue.SimpleQueue[Delivery]":
        """Queue at most `most_open` requests; the result brings their deliveries. Raises ApiError 429 when too many are
        open now, 503 when the engine is dead or the server ends."""
        with self._wake:
            if self.closed:
                why = "the server is shutting down" if self.error is None else "the engine has stopped: see the log"
                raise ApiError(503, f"{why}; try again later", headers={"Retry-After": "5"})
            if self.n_open + len(requests) > self.most_open:
                seconds = max(1, min(60, math.ceil(self._seconds_each)))
                message = f"{self.n_open} answers are being made or waited for, of at most {self.most_open}"
                raise ApiError(429, message, code="queue_full", headers={"Retry-After": str(seconds)})
            deliveries: queue.SimpleQueue[Delivery] = queue.SimpleQueue()
            for index, request in enumerate(requests):
                self._tickets[request] = _Ticket(index, deliveries)
                self._commands.append((self.engine.add, (request,)))
            self._wake.notify()
        return deliveries

    def cancel(self, requests: Sequence[Request]) -> None:
        """Drop requests whose reader went away; nothing happens to those that have finished."""
        with self._wake:
            for request in requests:
                if self._tickets.pop(request, None) is not None:
                    self._commands.append((self.engine.abort, (request,)))
                    self.metrics.finished("abort")
            self._wake.notify()

    def call(self, action: Callable[[], None]) -> None:
        """Do something to the engine between two of its steps."""
        with self._wake:
            self._commands.append((action, ()))
            self._wake.notify()

    def close(self) -> None:
        """Stop after the current step; readers that still wait get the reason "error"."""
        with self._wake:
            self._closed = True
            self._wake.notify()
        self._thread.join()

    def _run(self) -> None:
        try:
            while True:
                with self._wake:
                    self._wake.wait_for(lambda: self._closed or self._commands or self.engine.busy)
                    if self._closed:
                        return
                    commands, self._commands = self._commands, []
                for command, arguments in commands:
                    command(*arguments)
                self._deliver(self.engine.step())
        except Exception as error:
            log.exception("the engine died")
            self.error = error
        finally:
            with self._wake:
                self._closed = True
                for ticket in self._tickets.values():
                    ticket.deliveries.put(Delivery(ticket.index, [], [], "error"))
                    self.metrics.finished("error")
                self._tickets.clear()

    def _deliver(self, updates: Sequence[Update]) -> None:
        now = time.monotonic()
        with self._wake:
            for request, open_ticket in self._tickets.items():
                if not open_ticket.started and request.state != "waiting":
                    open_ticket.started = True
                    self.metrics.queue_time.observe(now - open_ticket.arrived)
            for request, tokens, events, reason in updates:
                if (ticket := self._tickets.get(request)) is None:
                    continue  # cancelled during the step
                scores = request.scores[ticket.n_scores :]
                ticket.n_scores += len(scores)
                ticket.deliveries.put(Delivery(ticket.index, events, scores, reason))
                if tokens:
                    self.metrics.new_tokens(len(tokens), now - ticket.arrived, ticket.last and now - ticket.last)
                    ticket.last = now
                if reason is not None:
                    del self._tickets[request]
                    self._seconds_each += 0.1 * (now - ticket.arrived - self._seconds_each)
                    self.metrics.finished(reason, now - ticket.arrived)


def read_deliveries(
    deliveries: "queue.SimpleQueue[Delivery]", n_requests: int, gone: Callable[[], bool]
) -> Iterator[Delivery]:
    """All that comes of `n_requests` until the last has finished; ends early when the client has gone.

    Raises ApiError 503 when the engine dies meanwhile.
    """
    while n_requests:
        try:
            delivery = deliveries.get(timeout=0.25)
        except queue.Empty:
            delivery = None
        if gone():
            return
        if delivery is None:
            continue
        if delivery.finish_reason in ("error", "abort"):
            raise ApiError(503, "the engine stopped in the middle of the answer")
        n_requests -= delivery.finish_reason is not None
        yield delivery
