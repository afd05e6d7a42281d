"""Answers: from an engine's deliveries to OpenAI's objects, whole or as a stream of server-sent events.

An `Answer` belongs to one HTTP request. It takes its deliveries from the engine or from the response cache, and when
the last has come it counts tokens, fills the cache and writes the session. Its two subclasses word the same events for
the two endpoints. "37*48 is 1776." with a use of the calculator comes as

    events of the engine      "37*48 is"               ToolCall("37*48", "1776")           " 1776."
    chunks of a stream        {"content": "37*48 is"}  {"tool_trace": {"expression": …}}   {"content": " 1776."}
    message of a whole one    {"content": "37*48 is 1776.", "tool_trace": [{"expression": "37*48", "result": "1776"}]}
"""

import itertools
import json
import queue
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import flask

from nanochat.detokenizer import Event, Reasoning, ToolCall, content_of
from nanochat.engine import Request
from nanochat.scheduler import NOT_FINITE, TokenScore
from nanochat.serve.logprobs import ChatLogprobs, TextLogprobs, TextScorer, chat_logprobs
from nanochat.serve.loop import Delivery, EngineLoop, Model
from nanochat.serve.objects import SessionInfo, Usage
from nanochat.serve.schema import ApiError, Parameters
from nanochat.serve.sessions import SessionTurn

POLL_SECONDS = 0.25  # how often a handler that waits for tokens looks whether its client is still there


class Answer:
    """The answer to one HTTP request while it is made: `submit` it, then `respond`.

    key: its key in the response cache; None: it is not kept there. turn: the session's turn, if the request names a
    session. echoes: the texts with which the choices begin.
    """

    object: str
    chunk_object: str
    id_prefix: str

    def __init__(
        self,
        model: Model,
        requests: Sequence[Request],
        key: str | None,
        turn: SessionTurn | None = None,
        echoes: Sequence[str] = (),
    ) -> None:
        self.model = model
        self.requests = requests
        self.key = key
        self.turn = turn
        self.echoes = echoes
        self.session_info: SessionInfo | None = None  # of the session after this answer
        self.outbox: queue.SimpleQueue[Delivery] = queue.SimpleQueue()
        self.kept: Any | None = None  # the answer in the response cache, if it is there
        self.loop: EngineLoop | None = None  # the engine that makes it
        self.said: list[list[Delivery]] = [[] for _ in requests]  # by choice
        self.usage: Usage | None = None
        self.scorers = [TextScorer(model.tokenizer) for _ in requests]  # by choice
        # For the access log.
        self.facts: dict[str, Any] = {}
        # Every chunk of a stream repeats these.
        self.head = {
            "id": self.id_prefix + uuid.uuid4().hex,
            "created": int(time.time()),
            "model": model.name,
        }

    # ---- The wording of an endpoint: its subclass fills these in

    def first_piece(self) -> dict[str, Any] | None:
        """Return the fields of a choice in the chunk before its first text; None: there is no such chunk."""
        return None

    def piece(self, event: Event | None) -> dict[str, Any]:
        """Return the fields of a choice in the chunk for an event; None: the chunk with the finish reason."""
        raise NotImplementedError

    def choice(self, events: Sequence[Event]) -> dict[str, Any]:
        """Return the fields of a choice with its whole answer."""
        raise NotImplementedError

    def logprobs(self, index: int, scores: Sequence[TokenScore]) -> ChatLogprobs | TextLogprobs:
        """Return the log-probabilities of the next tokens of a choice in OpenAI's shape."""
        raise NotImplementedError

    # ---- From the engine, or the cache

    def submit(self) -> None:
        """Take the answer from the response cache, or submit its requests. Raises ApiError as Model.submit does."""
        if self.key is not None:
            self.kept = self.model.responses.get(self.key)
        self.facts["cached"] = self.kept is not None
        if self.kept is None:
            for choice, text in enumerate(self.echoes):
                self.outbox.put(Delivery(choice, [text], [], finish_reason=None))
            self.loop = self.model.submit(self.requests, self.outbox)
            self.facts["replica"] = self.loop.replica

    @property
    def finished(self) -> bool:
        """Return True once every choice has come to its end."""
        return all(said and said[-1].finish_reason for said in self.said)

    def deliveries(self, client_left: Callable[[], bool]) -> Iterator[Delivery | None]:
        """Iterate over the deliveries of all choices as they come; end early when the client has left.

        It yields None after `--keep-alive-seconds` without a delivery.

        Raises ApiError 503 when the engine dies, or the server is closed, in the middle, and 500 when this answer alone
        cannot be made.
        """
        if self.kept is not None:
            # The cache keeps deliveries and not text, so that a kept answer streams in the same pieces as a new one.
            said, self.usage = self.kept
            self.model.metrics.cache_hits.labels(self.model.name).inc()
            for delivery in itertools.chain.from_iterable(said):
                self.outbox.put(delivery)
        n_open = len(self.requests)
        keep_alive = self.model.config.keep_alive_seconds
        last_news = time.monotonic()
        while n_open:
            # Nothing wakes this thread when the client hangs up, and in a long queue no token may come for minutes. So
            # it checks for its client now and then: otherwise the engine would make an answer that nobody reads.
            try:
                delivery = self.outbox.get(timeout=min(POLL_SECONDS, keep_alive))
            except queue.Empty:
                delivery = None
            if client_left():
                return
            if delivery is None:
                if time.monotonic() - last_news >= keep_alive:
                    last_news = time.monotonic()
                    yield None
                continue
            last_news = time.monotonic()
            if delivery.finish_reason == "abort":
                raise ApiError(503, "the engine stopped in the middle of the answer")
            if delivery.finish_reason == "error":
                raise ApiError(500, NOT_FINITE)
            self.said[delivery.choice].append(delivery)
            if delivery.finish_reason is not None:
                n_open -= 1
            # Before the last delivery is passed on: its chunk holds the state of the session. And a client that has
            # seen the end may send its next turn at once, which must find this one written.
            if not n_open:
                self._finish()
            yield delivery

    def events(self, index: int) -> list[Event]:
        """Return the events of a choice that have come."""
        return [event for delivery in self.said[index] for event in delivery.events]

    def _finish(self) -> None:
        """Count the tokens, fill the cache, write the session, and tell the access log."""
        usage = self.usage  # a kept answer has brought it along
        if usage is None:
            self.usage = usage = usage_of(self.requests)
            if self.key is not None:
                self.model.responses.put(self.key, (self.said, usage))
        if self.turn is not None:
            # The answer goes in with its calculations: then the next prompt begins with the very tokens of this turn,
            # and the prefix cache has them.
            messages = [*self.turn.messages, {"role": "assistant", "content": content_of(self.events(0))}]
            self.session_info = {
                "id": self.turn.key[1],
                "model": self.model.name,
                "turns": sum(message["role"] == "user" for message in messages),
                "dropped_turns": self.turn.dropped_turns,
                "tokens": usage["total_tokens"],
                "context": self.model.engine.context,
                "expires_in": self.model.sessions.seconds,
                "cached_tokens": usage["prompt_tokens_details"]["cached_tokens"],
            }
            self.model.sessions.end(self.turn, {**self.session_info, "messages": messages})
        self.facts["prompt_tokens"] = usage["prompt_tokens"]
        self.facts["completion_tokens"] = usage["completion_tokens"]
        self.facts["finish_reason"] = ",".join(str(said[-1].finish_reason) for said in self.said)

    def close(self) -> None:
        """Free what an answer that was not read to its end still holds: places in the engine, and its session."""
        # Called for every answer, also after its regular end: both of these then do nothing.
        if self.loop is not None:
            self.loop.cancel(self.requests)
        if self.turn is not None:
            self.model.sessions.end(self.turn)

    # ---- To the client

    def respond(self, body: Parameters) -> flask.Response:
        """Return the HTTP response, whole or streamed. Whatever becomes of it, the answer is closed.

        Raises ApiError as `deliveries` does before a whole answer is made, and 499 when its client has left.
        """
        flask.g.facts = self.facts
        self.facts["stream"] = bool(body.stream)
        if body.user:
            self.facts["user"] = body.user
        # waitress alone tells when the client has hung up; under another WSGI server answers are made to their end.
        client_left = flask.request.environ.get("waitress.client_disconnected", lambda: False)
        try:
            if body.stream:
                include_usage = bool(body.stream_options and body.stream_options.include_usage)
                response = flask.Response(self.stream(client_left, include_usage), mimetype="text/event-stream")
                response.headers["Cache-Control"] = "no-cache"
                response.headers["X-Accel-Buffering"] = "no"  # nginx would hold events back until it has a page full
            else:
                for _ in self.deliveries(client_left):
                    pass
                if not self.finished:
                    raise ApiError(499, "the client has left")  # for the access log alone
                response = flask.jsonify(self.whole())
        except BaseException:
            self.close()
            raise
        response.headers["X-Cache"] = "miss" if self.kept is None else "hit"
        # A stream is read after this function has returned. Flask calls `close` when it has been sent, or cut off.
        response.call_on_close(self.close)
        return response

    def whole(self) -> dict[str, Any]:
        """Return the completion object, once all has come."""
        choices = []
        for index, said in enumerate(self.said):
            logprobs = None
            if self.requests[index].logprobs is not None:
                scores = [score for delivery in said for score in delivery.scores]
                logprobs = self.logprobs(index, scores)
            choices.append(
                {
                    "index": index,
                    **self.choice(self.events(index)),
                    "logprobs": logprobs,
                    "finish_reason": said[-1].finish_reason,
                }
            )
        completion = {**self.head, "object": self.object, "choices": choices, "usage": self.usage}
        if self.session_info is not None:
            completion["session"] = self.session_info
        return completion

    def stream(self, client_left: Callable[[], bool], include_usage: bool) -> Iterator[str]:
        """Yield server-sent events: roles, pieces of text, finish reasons, [DONE]; or an error event at the end.

        Log-probabilities come with the step that sampled their tokens, even if the text is still held back.
        """
        more: dict[str, Any] = {"usage": None} if include_usage else {}  # it comes in a chunk of its own, the last
        try:
            first = self.first_piece()
            if first is not None:
                # In one piece: the client learns at once that its answer has begun.
                yield "".join(self._chunk(index, first, more) for index in range(len(self.said)))
            for delivery in self.deliveries(client_left):
                if delivery is None:
                    # A comment, which clients skip: proxies close a connection that is silent for too long, as it is
                    # while a request waits in the queue and while its prompt is read.
                    yield ": still at work\n\n"
                    continue
                index = delivery.choice
                scores = delivery.scores
                events: list[Event] = delivery.events
                if scores and not events:
                    events = [""]  # tokens whose text is held back, or which have none: the end of a stop text
                for event in events:
                    yield self._chunk(index, self.piece(event), more, scores=scores)
                    scores = []
                if delivery.finish_reason is not None:
                    if self.session_info is not None:
                        more["session"] = self.session_info
                    yield self._chunk(index, self.piece(None), more, finish_reason=delivery.finish_reason)
            if include_usage and self.usage is not None:
                yield _event({**self.head, "object": self.chunk_object, "choices": [], "usage": self.usage})
            yield "data: [DONE]\n\n"  # OpenAI's own end mark; clients read until it
        except ApiError as error:
            # The status line has been sent long ago; clients of OpenAI's protocol look for this event.
            yield _event(error.body)

    def _chunk(
        self,
        index: int,
        piece: dict[str, Any],
        more: dict[str, Any],
        scores: Sequence[TokenScore] = (),
        finish_reason: str | None = None,
    ) -> str:
        """Return the event with a piece of a choice."""
        choice = {
            "index": index,
            **piece,
            "logprobs": self.logprobs(index, scores) if scores else None,
            "finish_reason": finish_reason,
        }
        return _event({**self.head, "object": self.chunk_object, "choices": [choice], **more})


class ChatAnswer(Answer):
    """An answer of /v1/chat/completions."""

    object = "chat.completion"
    chunk_object = "chat.completion.chunk"
    id_prefix = "chatcmpl-"

    def first_piece(self) -> dict[str, Any]:
        return {"delta": {"role": "assistant", "content": ""}}

    def piece(self, event: Event | None) -> dict[str, Any]:
        if event is None:
            return {"delta": {}}
        if isinstance(event, ToolCall):
            return {"delta": {"tool_trace": event._asdict()}}
        if isinstance(event, Reasoning):
            return {"delta": {"reasoning_content": event}}
        return {"delta": {"content": event}}

    def choice(self, events: Sequence[Event]) -> dict[str, Any]:
        return {"message": _collect({"role": "assistant"}, "content", events)}

    def logprobs(self, index: int, scores: Sequence[TokenScore]) -> ChatLogprobs:
        return chat_logprobs(self.model.tokenizer, scores)


class TextAnswer(Answer):
    """An answer of /v1/completions."""

    object = "text_completion"
    chunk_object = "text_completion"
    id_prefix = "cmpl-"

    def piece(self, event: Event | None) -> dict[str, Any]:
        # Reasoning is text here like any other: a continued text is shown as the model wrote it.
        if isinstance(event, ToolCall):
            return {"text": "", "tool_trace": event._asdict()}
        return {"text": event or ""}

    def choice(self, events: Sequence[Event]) -> dict[str, Any]:
        return _collect({}, "text", events)

    def logprobs(self, index: int, scores: Sequence[TokenScore]) -> TextLogprobs:
        return self.scorers[index].write(scores)


def _collect(fields: dict[str, Any], text: str, events: Sequence[Event]) -> dict[str, Any]:
    """Return `fields` with the events of a whole answer: its text under the key `text`, reasoning, calculations."""
    fields[text] = ""
    for event in events:
        if isinstance(event, ToolCall):
            fields.setdefault("tool_trace", []).append(event._asdict())
        elif isinstance(event, Reasoning):
            fields["reasoning_content"] = fields.get("reasoning_content", "") + event
        else:
            fields[text] += event
    return fields


def usage_of(requests: Sequence[Request]) -> Usage:
    """Count tokens. Samples of one prompt count it once."""
    first_samples = [request for request in requests if request.sample == 0]
    n_prompt = sum(len(request.tokens) for request in first_samples)
    n_new = sum(len(request.output) for request in requests)
    # After a preemption the reused tokens may reach into the answer.
    n_cached = sum(min(request.n_reused, len(request.tokens)) for request in first_samples)
    return {
        "prompt_tokens": n_prompt,
        "completion_tokens": n_new,
        "total_tokens": n_prompt + n_new,
        "prompt_tokens_details": {"cached_tokens": n_cached},
    }


def _event(data: dict[str, Any]) -> str:
    return f"data: {json.dumps(data)}\n\n"
