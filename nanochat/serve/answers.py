"""What the API gives: deliveries of the engine as OpenAI's objects, whole or as server-sent events.

Beyond the OpenAI format: when the model uses its calculator, the answer carries `tool_trace`, beside its text and never
inside it: in a stream {"expression": "37*48", "result": "1776"} at the place of the call (result null when the
expression was not valid), otherwise a list of the same. What a model says to itself before it answers is
`reasoning_content`, beside `content`, as DeepSeek's API has it. In a session the end of the answer carries `session`.
"""

import itertools
import json
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from nanochat.detokenizer import Event, Reasoning, ToolCall
from nanochat.engine import Request
from nanochat.serve.loop import Delivery
from nanochat.serve.schema import ApiError
from nanochat.tokenizer import Tokenizer


class ChatForm:
    """Objects of /v1/chat/completions."""

    whole_object, chunk_object, prefix = "chat.completion", "chat.completion.chunk", "chatcmpl-"

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer

    def _token(self, token: int, logprob: float) -> dict[str, Any]:
        data = self.tokenizer.decode_bytes([token])
        return {"token": data.decode("utf-8", "replace"), "logprob": logprob, "bytes": list(data)}

    def logprobs(self, scores: Sequence[Any], offset: int = 0) -> dict[str, Any]:
        """OpenAI's form of TokenScores. offset: length of the text of the tokens before."""
        content = [
            {**self._token(s.token, s.logprob), "top_logprobs": [self._token(*each) for each in s.top.items()]}
            for s in scores
        ]
        return {"content": content, "refusal": None}

    def begin(self) -> dict[str, Any] | None:
        """What a stream says of a choice before its first text."""
        return {"delta": {"role": "assistant", "content": ""}}

    def piece(self, event: Event | None) -> dict[str, Any]:
        """A choice's part of a chunk; None: the end, which brings no text."""
        if event is None:
            return {"delta": {}}
        if isinstance(event, ToolCall):
            return {"delta": {"tool_trace": event._asdict()}}
        return {"delta": {"reasoning_content" if isinstance(event, Reasoning) else "content": event}}

    def whole(self, events: Sequence[Event]) -> dict[str, Any]:
        """A choice with its whole answer."""
        text, trace = _text_and_trace(events)
        return {"message": {"role": "assistant", "content": text, **trace}}


class TextForm(ChatForm):
    """Objects of /v1/completions."""

    whole_object = chunk_object = "text_completion"
    prefix = "cmpl-"

    def logprobs(self, scores: Sequence[Any], offset: int = 0) -> dict[str, Any]:
        names = [self._token(s.token, s.logprob)["token"] for s in scores]
        return {
            "tokens": names,
            "token_logprobs": [s.logprob for s in scores],
            "top_logprobs": [{self._token(t, p)["token"]: p for t, p in s.top.items()} for s in scores],
            "text_offset": list(itertools.accumulate(map(len, names[:-1]), initial=offset)) if names else [],
        }

    def begin(self) -> None:
        return None

    def piece(self, event: Event | None) -> dict[str, Any]:
        return {"text": "", "tool_trace": event._asdict()} if isinstance(event, ToolCall) else {"text": event or ""}

    def whole(self, events: Sequence[Event]) -> dict[str, Any]:
        text, trace = _text_and_trace(events)
        return {"text": text, **trace}


def _text_and_trace(events: Sequence[Event]) -> tuple[str, dict[str, Any]]:
    trace = [event._asdict() for event in events if isinstance(event, ToolCall)]
    reasoning = "".join(event for event in events if isinstance(event, Reasoning))
    text = "".join(event for event in events if not isinstance(event, Reasoning | ToolCall))
    beside = {"reasoning_content": reasoning, "tool_trace": trace}
    return text, {name: value for name, value in beside.items() if value}


def usage_of(requests: Sequence[Request]) -> dict[str, Any]:
    """Token counts; samples of one prompt count it once. `cached_tokens` were not read anew."""
    firsts = [request for request in requests if request.sample == 0]
    n_prompt, n_new = sum(len(r.tokens) for r in firsts), sum(len(r.output) for r in requests)
    counts = {"prompt_tokens": n_prompt, "completion_tokens": n_new, "total_tokens": n_prompt + n_new}
    cached = sum(min(r.n_reused, len(r.tokens)) for r in firsts)
    return {**counts, "prompt_tokens_details": {"cached_tokens": cached}}


class Answer:
    """The answer to one HTTP request while it is made: `deliveries` and, when they have ended, `usage` and `session`.

    head: id, created and model of the OpenAI objects.
    """

    def __init__(self, form: ChatForm, head: dict[str, Any], n_choices: int, with_logprobs: bool) -> None:
        self.form, self.head, self.with_logprobs = form, head, with_logprobs
        self.deliveries: list[list[Delivery]] = [[] for _ in range(n_choices)]
        self.usage: Any = None  # as `usage_of` has it, when all have ended
        self.extra: dict[str, Any] = {}  # what the end of it also says

    def events(self, index: int) -> list[Event]:
        """All that choice `index` has said so far."""
        return [event for delivery in self.deliveries[index] for event in delivery.events]

    @property
    def ended(self) -> bool:
        """Whether all choices have."""
        return all(deliveries and deliveries[-1].finish_reason for deliveries in self.deliveries)

    def keep(self, incoming: Iterable[Delivery]) -> Iterator[Delivery]:
        """Pass deliveries on, remembering them."""
        for delivery in incoming:
            self.deliveries[delivery.index].append(delivery)
            yield delivery

    def whole(self) -> dict[str, Any]:
        """The completion object, when the last delivery has come."""
        choices = []
        for index, deliveries in enumerate(self.deliveries):
            scores = [score for delivery in deliveries for score in delivery.scores]
            logprobs = self.form.logprobs(scores) if self.with_logprobs else None
            choice = {"index": index, **self.form.whole(self.events(index)), "logprobs": logprobs}
            choices.append({**choice, "finish_reason": deliveries[-1].finish_reason})
        return {**self.head, "object": self.form.whole_object, "choices": choices, "usage": self.usage, **self.extra}

    def stream(self, incoming: Iterable[Delivery], include_usage: bool) -> Iterator[str]:
        """Server-sent events: roles, pieces of the answers, the reasons of their ends, [DONE]; or an error in words.

        The log-probabilities of tokens whose text is held back come with the next text, or at the end.
        """
        scores: list[list[Any]] = [[] for _ in self.deliveries]
        offsets = [0 for _ in self.deliveries]

        def chunk(index: int, choice: dict[str, Any], reason: str | None = None, **extra: Any) -> str:
            logprobs = None
            if scores[index]:
                logprobs = self.form.logprobs(scores[index], offsets[index])
                offsets[index] += sum(map(len, logprobs.get("tokens", ())))
                scores[index] = []
            choice = {"index": index, **choice, "logprobs": logprobs, "finish_reason": reason}
            return self._event(choices=[choice], **({"usage": None} if include_usage else {}), **extra)

        try:
            if first := self.form.begin():
                yield "".join(chunk(index, first) for index in range(len(scores)))
            for index, events, new, reason in incoming:
                scores[index] += new
                for event in events:
                    yield chunk(index, self.form.piece(event))
                if reason is not None:
                    if scores[index]:
                        yield chunk(index, self.form.piece(""))
                    yield chunk(index, self.form.piece(None), reason, **self.extra)
            if include_usage and self.usage is not None:
                yield self._event(choices=[], usage=self.usage)
            yield "data: [DONE]\n\n"
        except ApiError as error:
            yield f"data: {json.dumps(error.body)}\n\n"

    def _event(self, **fields: Any) -> str:
        return f"data: {json.dumps({**self.head, 'object': self.form.chunk_object, **fields})}\n\n"
