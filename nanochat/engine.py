"""Generation: many requests at once, each at its own position, with the calculator inside the batch.

The loop is add / step / stream. A model is anything with `.config.sequence_len`, `.device` and
`model(idx_BT, cache=..., positions_BT=..., last_only=True) -> logits_B1V`, as in gpt.py.
"""

import codecs
import itertools
import random
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from nanochat.conversation import drop_oldest_turns, render_for_completion, validate
from nanochat.kv_cache import KVCache
from nanochat.sampling import sample
from nanochat.tokenizer import SPECIAL_TOKENS, Tokenizer
from nanochat.tools import calculate


@dataclass(eq=False)
class Request:
    """One sequence to be continued: what is asked for, and how far it has come."""

    tokens: Sequence[int]
    max_tokens: int | None = None  # None = to the end of the context
    temperature: float = 1.0  # 0 = always the likeliest token
    top_k: int | None = None  # None or 0 = any token
    seed: int = 42
    sample: int = 0  # tells apart requests that share a seed

    output: list[int] = field(default_factory=list)  # without the token that ended it
    mask: list[int] = field(default_factory=list)  # 1 = sampled by the model, 0 = forced by a tool
    finish_reason: str | None = None  # "stop" | "length" | "abort"; None while it waits or runs
    stop_token: int | None = None  # the token that ended it, when the reason is "stop"

    def __post_init__(self) -> None:
        if not self.tokens:
            raise ValueError("the prompt is empty: begin it with <|bos|>")
        if self.max_tokens is not None and self.max_tokens < 1:
            raise ValueError(f"max_tokens {self.max_tokens} must be at least 1")
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature {self.temperature} must be 0 or more")
        if self.top_k is not None and self.top_k < 0:
            raise ValueError(f"top_k {self.top_k} must be 0 (off) or more")
        self._random = random.Random(f"{self.seed}:{self.sample}")  # a string: integer seeds lose their sign
        self._forced: deque[int] = deque()  # a tool's result, still to be read by the model
        self._expression: list[int] | None = None  # tokens since <|python_start|>


class Engine:
    """Runs requests in batches of at most `max_batch`; the others wait, first come first served. Not thread-safe.

    Request i of `running` owns row i of the cache; when one finishes, the last row moves into its place.
    """

    def __init__(self, model: Any, tokenizer: Tokenizer, max_batch: int = 32) -> None:
        if max_batch < 1:
            raise ValueError(f"--max-batch {max_batch} must be at least 1")
        self.model, self.tokenizer, self.max_batch = model, tokenizer, max_batch
        self.cache = KVCache(model.device)
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []
        # a foreign tokenizer lacks some of them
        self._special = {name: tokenizer.special_tokens.get(name) for name in SPECIAL_TOKENS}
        self._stop_tokens = {self._special["<|assistant_end|>"], self._special["<|bos|>"]}

    @property
    def busy(self) -> bool:
        """Whether any request waits or runs."""
        return bool(self.waiting or self.running)

    def check(self, request: Request) -> None:
        """Raise ValueError when `request` can never run: its prompt leaves no room in the context."""
        context = self.model.config.sequence_len
        if len(request.tokens) >= context:
            raise ValueError(f"a prompt of {len(request.tokens)} tokens leaves no room in the context of {context}")

    def chat_request(self, conversation: dict[str, Any], max_tokens: int | None = None, **settings: Any) -> Request:
        """The request for a chat's next answer. The oldest turns are left out where the context is too short for
        them and the answer, for which up to a quarter of it is kept free.
        """
        validate(conversation, allow_empty_reply=True)
        context = self.model.config.sequence_len
        room = context - min(max_tokens or context, context // 4)
        messages = drop_oldest_turns(conversation["messages"], self.tokenizer, room)
        return Request(render_for_completion({"messages": messages}, self.tokenizer), max_tokens, **settings)

    def add(self, request: Request) -> None:
        """Queue a request; raises ValueError when its prompt does not fit the context."""
        self.check(request)
        self.waiting.append(request)

    def abort(self, request: Request) -> None:
        """Forget a request, wherever it is; one that has finished stays as it is."""
        if request.finish_reason is not None:
            return
        request.finish_reason = "abort"
        if request in self.waiting:
            self.waiting.remove(request)
        self._retire()

    @torch.inference_mode()
    def step(self) -> list[tuple[Request, int | None]]:
        """Advance every running request by one token, after that admit waiting ones and give them their first.

        Returns (request, token) pairs; the token is None when the request ended without adding one to its output.
        """
        advanced = self._decode() if self.running else []
        self._retire()
        admitted = [self.waiting.popleft() for _ in range(min(len(self.waiting), self.max_batch - len(self.running)))]
        for _, group in itertools.groupby(admitted, key=lambda request: request.tokens):
            advanced += self._prefill(list(group))
        self._retire()
        return advanced

    def run(self, requests: Iterable[Request]) -> None:
        """Finish all of `requests`, in batches; results are in their `output`, `mask` and `finish_reason`."""
        requests = list(requests)
        for request in requests:
            self.check(request)
        self.waiting.extend(requests)
        try:
            while any(request.finish_reason is None for request in requests):
                self.step()
        finally:
            self._abort_all(requests)

    def stream(self, request: Request) -> Iterator[int]:
        """Add a request and yield its tokens as they come; closing the iterator aborts it."""
        self.add(request)
        n_seen = 0
        try:
            while request.finish_reason is None:
                self.step()
                yield from request.output[n_seen:]
                n_seen = len(request.output)
        finally:
            self.abort(request)

    def generate(
        self,
        tokens: Sequence[int],
        num_samples: int = 1,
        max_tokens: int | None = None,
        temperature: float = 1.0,
        top_k: int | None = None,
        seed: int = 42,
    ) -> Iterator[tuple[list[int], list[int]]]:
        """Continue one prompt `num_samples` times; yields (token_column, mask_column), one entry a sample.

        mask: 1 = sampled, 0 = forced by a tool. A sample's column of its end holds the end token, sampled; columns
        after that are filled with <|assistant_end|> and mask 0.
        """
        requests = [Request(tokens, max_tokens, temperature, top_k, seed, i) for i in range(num_samples)]
        padding = self._special["<|assistant_end|>"]
        try:
            for request in requests:
                self.add(request)
            for column in itertools.count():
                while any(len(r.output) <= column and r.finish_reason is None for r in requests):
                    self.step()
                ends = [len(r.output) + (r.stop_token is not None) for r in requests]
                if column >= max(ends):
                    return
                cells = []
                for request in requests:
                    if column < len(request.output):
                        cells.append((request.output[column], request.mask[column]))
                    elif column == len(request.output) and request.stop_token is not None:
                        cells.append((request.stop_token, 1))
                    else:
                        cells.append((padding, 0))
                yield [token for token, _ in cells], [mask for _, mask in cells]
        finally:
            self._abort_all(requests)

    def generate_batch(
        self, tokens: Sequence[int], num_samples: int = 1, **settings: Any
    ) -> tuple[list[list[int]], list[list[int]]]:
        """As `generate`, at once: (sequences, masks), the prompt (mask 0) included and the end token left out."""
        requests = [Request(tokens, sample=i, **settings) for i in range(num_samples)]
        self.run(requests)
        return [[*tokens, *r.output] for r in requests], [[0] * len(tokens) + r.mask for r in requests]

    def complete(
        self,
        prompts: Iterable[Sequence[int]],
        max_tokens: int | None = None,
        temperature: float = 0.0,
        top_k: int | None = None,
        seed: int = 42,
    ) -> list[list[int]]:
        """Continue many prompts, `max_batch` at a time, each place refilled as it falls free; returns new tokens."""
        requests = [Request(tokens, max_tokens, temperature, top_k, seed, i) for i, tokens in enumerate(prompts)]
        self.run(requests)
        return [request.output for request in requests]

    def _prefill(self, group: list[Request]) -> list[tuple[Request, int | None]]:
        """Read one prompt once for all requests of `group`, which share it; each draws its own first token."""
        tokens, first = group[0].tokens, len(self.running)
        self.cache.clear_row(first)
        logits_1V = self._forward([list(tokens)], [list(range(len(tokens)))], first)
        for i in range(1, len(group)):
            self.cache.copy_row(first, first + i, len(tokens))
        self.running += group
        return self._extend(group, logits_1V.expand(len(group), -1))

    def _decode(self) -> list[tuple[Request, int | None]]:
        positions = [[len(r.tokens) + len(r.output) - 1] for r in self.running]
        logits_BV = self._forward([[r.output[-1]] for r in self.running], positions, 0)
        return self._extend(self.running, logits_BV)

    def _forward(self, idx: list[list[int]], positions: list[list[int]], first_row: int) -> torch.Tensor:
        """The model over rows of new tokens, cache rows first_row and after; logits of the last column, (B, V)."""
        device = self.model.device
        idx_BT, positions_BT = torch.tensor(idx, device=device), torch.tensor(positions, device=device)
        length = max(row[-1] for row in positions) + 1
        rows = self.cache.rows(first_row, first_row + len(idx), length)
        logits_B1V = self.model(idx_BT, cache=rows, positions_BT=positions_BT, last_only=True)
        rows.advance(idx_BT, positions_BT)
        return logits_B1V[:, -1]

    def _extend(self, requests: list[Request], logits_BV: torch.Tensor) -> list[tuple[Request, int | None]]:
        """Give each request its next token: the next of a tool's result where one is pending, else a sampled one."""
        numbers = [0.0 if r._forced or not r.temperature else r._random.random() for r in requests]
        settings = [r.temperature for r in requests], [r.top_k for r in requests]
        sampled = sample(logits_BV, *settings, numbers).tolist()
        result = []
        for request, token in zip(requests, sampled, strict=True):
            forced = bool(request._forced)
            result.append((request, self._accept(request, request._forced.popleft() if forced else token, forced)))
        return result

    def _accept(self, request: Request, token: int, forced: bool) -> int | None:
        if token in self._stop_tokens:
            request.finish_reason, request.stop_token = "stop", token
            return None
        request.output.append(token)
        request.mask.append(int(not forced))
        if not forced:
            self._use_tool(request, token)
        n_total = len(request.tokens) + len(request.output)
        if len(request.output) == request.max_tokens or n_total == self.model.config.sequence_len:
            request.finish_reason = "length"
        return token

    def _use_tool(self, request: Request, token: int) -> None:
        """Follow the calculator's marks; after a valid expression its result is forced upon the model."""
        if token == self._special["<|python_start|>"]:
            request._expression = []
        elif request._expression is not None and token == self._special["<|python_end|>"]:
            value = calculate(self.tokenizer.decode(request._expression))
            request._expression = None
            if value is not None:
                begin, end = self._special["<|output_start|>"], self._special["<|output_end|>"]
                request._forced.extend([begin, *self.tokenizer.encode(value), end])
        elif request._expression is not None:
            request._expression.append(token)

    @torch.inference_mode()
    def _retire(self) -> None:
        for row in reversed(range(len(self.running))):
            if self.running[row].finish_reason is not None:
                last = self.running.pop()
                if row < len(self.running):
                    self.cache.copy_row(len(self.running), row, len(last.tokens) + len(last.output))
                    self.running[row] = last

    def _abort_all(self, requests: Iterable[Request]) -> None:
        for request in requests:
            self.abort(request)


class ToolCall(NamedTuple):
    """A use of the calculator; `result` is None when the expression was not valid."""

    expression: str
    result: str | None


class AnswerDecoder:
    """Turns the tokens of an answer, as they come, into text and tool calls fit to be shown.

    A character whose bytes are split over tokens is held back until it is whole.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._names = {token: name for name, token in tokenizer.special_tokens.items()}
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._inside: str | None = None  # the mark we are behind: <|python_start|> or <|output_start|>
        self._collected: list[int] = []
        self._expression: str | None = None  # of a call whose result has not come yet

    def feed(self, token: int) -> list[str | ToolCall]:
        """What this token completes, in order: pieces of text and tool calls; often one, sometimes nothing."""
        name = self._names.get(token)
        if name is None and self._inside:
            self._collected.append(token)
            return []
        if name is None:
            text = self._utf8.decode(self._tokenizer.decode_bytes([token]))
            return self._flush_call() + ([text] if text else [])
        return self._mark(name)

    def finish(self) -> list[str | ToolCall]:
        """What is left at the end of the answer: half a character shows as U+FFFD, an open call without result."""
        if self._inside == "<|python_start|>":
            self._mark("<|python_end|>")
        return self._flush_text() + self._flush_call()

    def _mark(self, name: str) -> list[str | ToolCall]:
        inside, content = self._inside, self._tokenizer.decode(self._collected)
        self._inside, self._collected = name if name in ("<|python_start|>", "<|output_start|>") else None, []
        events = self._flush_text()
        if name == "<|python_end|>" and inside == "<|python_start|>":
            self._expression = content
        elif name == "<|output_end|>" and inside == "<|output_start|>" and self._expression is not None:
            events.append(ToolCall(self._expression, content))
            self._expression = None
        elif name != "<|output_start|>":
            events += self._flush_call()
        return events

    def _flush_text(self) -> list[str | ToolCall]:
        text = self._utf8.decode(b"", final=True)
        return [text] if text else []

    def _flush_call(self) -> list[str | ToolCall]:
        expression, self._expression = self._expression, None
        return [] if expression is None else [ToolCall(expression, None)]
