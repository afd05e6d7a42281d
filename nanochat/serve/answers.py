"""The way back: from an engine's deliveries to OpenAI's objects, whole or as a stream of server-sent events.

An `Answer` belongs to one HTTP request. It takes its deliveries from the engine or from the response cache. When the
last has come it counts tokens, fills the cache, and writes the session. `ChatForm` and `TextForm` are how the two
endpoints word the same deliveries.
"""

import itertools
import json
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from nanochat.detokenizer import Event, Reasoning, ToolCall, content_of
from nanochat.engine import Request
from nanochat.scheduler import TokenScore
from nanochat.serve.loop import Delivery, Model, Ticket
from nanochat.serve.schema import (
    ApiError,
    ChatLogprobs,
    ScoredToken,
    SessionInfo,
    TextLogprobs,
    TokenLogprob,
    ToolTrace,
    Usage,
)
from nanochat.serve.sessions import SessionTurn
from nanochat.tokenizer import Tokenizer


def _text(events: Sequence[Event]) -> str:
    return "".join(event for event in events if not isinstance(event, Reasoning | ToolCall))


def _trace(event: ToolCall) -> ToolTrace:
    return {"expression": event.expression, "result": event.result}


def _token_text(tokenizer: Tokenizer, token: int) -> str:
    # A token may be a part of a character, which alone is no valid UTF-8.
    return tokenizer.decode_bytes([token]).decode("utf-8", "replace")


def _token_logprob(tokenizer: Tokenizer, token: int, logprob: float) -> TokenLogprob:
    return {
        "token": _token_text(tokenizer, token),
        "logprob": logprob,
        "bytes": list(tokenizer.decode_bytes([token])),
    }


# ---- The two wordings. Both have the same methods, and an Answer calls them without knowing which it has.


class ChatForm:
    """Wording of /v1/chat/completions."""

    object = "chat.completion"
    chunk_object = "chat.completion.chunk"
    id_prefix = "chatcmpl-"

    def first_piece(self) -> dict[str, Any] | None:
        """Return what a stream says of a choice before its first text, if anything."""
        return {"delta": {"role": "assistant", "content": ""}}

    def piece(self, event: Event) -> dict[str, Any]:
        """Return what a chunk says of an event."""
        if isinstance(event, ToolCall):
            return {"delta": {"tool_trace": _trace(event)}}
        if isinstance(event, Reasoning):
            return {"delta": {"reasoning_content": event}}
        return {"delta": {"content": event}}

    def last_piece(self) -> dict[str, Any]:
        """Return what the chunk with the finish reason says; the text is over by then."""
        return {"delta": {}}

    def whole(self, events: Sequence[Event]) -> dict[str, Any]:
        """Return a choice with its whole answer."""
        message: dict[str, Any] = {"role": "assistant", "content": _text(events)}
        reasoning = "".join(event for event in events if isinstance(event, Reasoning))
        if reasoning:
            message["reasoning_content"] = reasoning
        trace = [_trace(event) for event in events if isinstance(event, ToolCall)]
        if trace:
            message["tool_trace"] = trace
        return {"message": message}

    def logprobs(self, tokenizer: Tokenizer, scores: Sequence[TokenScore], offset: int) -> ChatLogprobs:
        """Return log-probabilities as OpenAI words them. offset: length of the text of the tokens before."""
        content: list[ScoredToken] = []
        for score in scores:
            content.append(
                {
                    **_token_logprob(tokenizer, score.token, score.logprob),
                    "top_logprobs": [_token_logprob(tokenizer, token, logprob) for token, logprob in score.top.items()],
                }
            )
        return {"content": content, "refusal": None}


class TextForm:
    """Wording of /v1/completions."""

    object = "text_completion"
    chunk_object = "text_completion"
    id_prefix = "cmpl-"

    def first_piece(self) -> None:
        """Return None: a text begins with its first piece."""

    def piece(self, event: Event) -> dict[str, Any]:
        """Return what a chunk says of an event."""
        if isinstance(event, ToolCall):
            return {"text": "", "tool_trace": _trace(event)}
        return {"text": event}

    def last_piece(self) -> dict[str, Any]:
        """Return what the chunk with the finish reason says."""
        return {"text": ""}

    def whole(self, events: Sequence[Event]) -> dict[str, Any]:
        """Return a choice with its whole text."""
        choice: dict[str, Any] = {"text": _text(events)}
        trace = [_trace(event) for event in events if isinstance(event, ToolCall)]
        if trace:
            choice["tool_trace"] = trace
        return choice

    def logprobs(self, tokenizer: Tokenizer, scores: Sequence[TokenScore], offset: int) -> TextLogprobs:
        """Return log-probabilities as OpenAI words them. offset: length of the text of the tokens before."""
        logprobs: TextLogprobs = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        for score in scores:
            text = _token_text(tokenizer, score.token)
            logprobs["tokens"].append(text)
            logprobs["token_logprobs"].append(score.logprob)
            likeliest = {_token_text(tokenizer, token): logprob for token, logprob in score.top.items()}
            logprobs["top_logprobs"].append(likeliest)
            logprobs["text_offset"].append(offset)
            offset += len(text)
        return logprobs


# ---- The answer itself


class Answer:
    """The answer to one HTTP request while it is made. `facts` is what the access log says of it."""

    def __init__(
        self,
        form: ChatForm | TextForm,
        model: Model,
        requests: Sequence[Request],
        with_logprobs: bool,
        *,
        cache_key: str | None,
        kept: Any | None,
        ticket: Ticket | None,
        session: SessionTurn | None,
    ) -> None:
        self.form = form
        self.model = model
        self.requests = requests
        self.with_logprobs = with_logprobs
        self.cache_key = cache_key
        self.kept = kept  # what the response cache had
        self.ticket = ticket  # what was submitted, if it had nothing
        self.session = session
        self.session_info: SessionInfo | None = None
        self.said: list[list[Delivery]] = [[] for _ in requests]  # by choice
        self.usage: Usage | None = None
        self.facts: dict[str, Any] = {"cached": kept is not None}
        if ticket is not None:
            self.facts["replica"] = ticket.loop.replica
        self._head = {
            "id": form.id_prefix + uuid.uuid4().hex,
            "created": int(time.time()),
            "model": model.name,
        }

    @property
    def finished(self) -> bool:
        """True once every choice has come to its end."""
        return all(said and said[-1].finish_reason for said in self.said)

    def deliveries(self, client_left: Callable[[], bool]) -> Iterator[Delivery]:
        """Iterate over the deliveries of all choices as they come; end early when the client has left.

        Raises ApiError 503 when the engine dies in the middle.
        """
        if self.ticket is not None:
            incoming = self.ticket.read(client_left)
        else:
            # The cache keeps deliveries and not text, so that a kept answer streams in the same pieces as a new one.
            said, self.usage = self.kept or ([], None)
            self.model.metrics.cache_hits.labels(self.model.name).inc()
            incoming = itertools.chain.from_iterable(said)
        for delivery in incoming:
            self.said[delivery.index].append(delivery)
            # Before the last delivery is passed on: its chunk tells of the session. And a client that has seen the end
            # may send its next turn at once, which must find this one written.
            if self.finished:
                self._finish()
            yield delivery

    def close(self) -> None:
        """Free what an answer that was not read to its end still holds: places in the engine, and its session."""
        # Called for every answer, also after its regular end: both of these then do nothing.
        if self.ticket is not None:
            self.ticket.cancel()
        if self.session is not None:
            self.session.end()

    def whole(self) -> dict[str, Any]:
        """Return the completion object, once all has come."""
        choices = []
        for index, said in enumerate(self.said):
            logprobs = None
            if self.with_logprobs:
                scores = [score for delivery in said for score in delivery.scores]
                logprobs = self.form.logprobs(self.model.tokenizer, scores, offset=0)
            choices.append(
                {
                    "index": index,
                    **self.form.whole(self._events(index)),
                    "logprobs": logprobs,
                    "finish_reason": said[-1].finish_reason,
                }
            )
        completion = {
            **self._head,
            "object": self.form.object,
            "choices": choices,
            "usage": self.usage,
        }
        if self.session_info is not None:
            completion["session"] = self.session_info
        return completion

    def stream(self, client_left: Callable[[], bool], include_usage: bool) -> Iterator[str]:
        """Yield server-sent events: roles, pieces of text, finish reasons, [DONE]; or an error event at the end.

        Log-probabilities of tokens whose text is held back come with the next piece of text, or with the end.
        """
        scores: list[list[TokenScore]] = [[] for _ in self.said]  # that wait for a piece of text
        offsets = [0 for _ in self.said]

        def chunk(index: int, piece: dict[str, Any], finish_reason: str | None = None) -> str:
            tokenizer = self.model.tokenizer
            logprobs = None
            if scores[index]:
                logprobs = self.form.logprobs(tokenizer, scores[index], offsets[index])
                for score in scores[index]:
                    offsets[index] += len(_token_text(tokenizer, score.token))
                scores[index] = []
            choice = {
                "index": index,
                **piece,
                "logprobs": logprobs,
                "finish_reason": finish_reason,
            }
            data: dict[str, Any] = {
                **self._head,
                "object": self.form.chunk_object,
                "choices": [choice],
            }
            if include_usage:
                data["usage"] = None  # it comes in a chunk of its own, the last
            if finish_reason is not None and self.session_info is not None:
                data["session"] = self.session_info
            return _event(data)

        try:
            first = self.form.first_piece()
            if first is not None:
                # In one piece: the client learns at once that its answer has begun.
                yield "".join(chunk(index, first) for index in range(len(self.said)))
            for index, events, new_scores, finish_reason in self.deliveries(client_left):
                scores[index] += new_scores
                for event in events:
                    yield chunk(index, self.form.piece(event))
                if finish_reason is not None:
                    # Tokens without text of their own (half a character, the end of a stop text) may be left over.
                    if scores[index]:
                        yield chunk(index, self.form.piece(""))
                    yield chunk(index, self.form.last_piece(), finish_reason)
            if include_usage and self.usage is not None:
                yield _event(
                    {
                        **self._head,
                        "object": self.form.chunk_object,
                        "choices": [],
                        "usage": self.usage,
                    }
                )
            yield "data: [DONE]\n\n"
        except ApiError as error:
            # The status line has been sent long ago; clients of OpenAI's protocol look for this event.
            yield _event(error.body)

    def _events(self, index: int) -> list[Event]:
        return [event for delivery in self.said[index] for event in delivery.events]

    def _finish(self) -> None:
        """Count the tokens, fill the cache and write the session."""
        # A kept answer has brought its usage with it.
        if self.usage is None:
            self.usage = usage_of(self.requests)
            if self.cache_key is not None:
                self.model.responses.put(self.cache_key, (self.said, self.usage))
        self.facts["prompt_tokens"] = self.usage["prompt_tokens"]
        self.facts["completion_tokens"] = self.usage["completion_tokens"]
        self.facts["finish_reason"] = ",".join(str(said[-1].finish_reason) for said in self.said)
        if self.session is not None:
            self.session_info = self._write_session(self.session, self.usage)

    def _write_session(self, session: SessionTurn, usage: Usage) -> SessionInfo:
        # With its calculations: then the next prompt begins with the very tokens of this turn, and the prefix cache has
        # them.
        answer = {"role": "assistant", "content": content_of(self._events(0))}
        messages = [*session.messages, answer]
        info: SessionInfo = {
            "id": session.key[1],
            "model": self.model.name,
            "turns": sum(message["role"] == "user" for message in messages),
            "dropped_turns": session.dropped_turns,
            "tokens": usage["total_tokens"],
            "context": self.model.engine.context,
            "expires_in": session.sessions.seconds,
            "cached_tokens": usage["prompt_tokens_details"]["cached_tokens"],
        }
        session.end({**info, "messages": messages})
        return info


def _event(data: dict[str, Any]) -> str:
    return f"data: {json.dumps(data)}\n\n"


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
