"""Requests, and which of them run next. Pure Python: no tensors.

A request waits, is read (prefill, in chunks), is continued token by token (decode), and is done. Running requests own
rows of the KV cache: request i of `running` has row i. When the cache is full, the request that came last is preempted:
it gives up its row and waits again, and what it had read is recomputed later.
"""

import bisect
import itertools
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

HEAD_START = 64  # one level of priority overtakes at most so many requests that came before

State = Literal["waiting", "prefill", "decode", "done"]


def _check_range(name: str, value: float | None, low: float, high: float = float("inf")) -> None:
    if (value is not None and not low <= value <= high) or value in (float("inf"), float("-inf")):
        raise ValueError(f"{name} {value} must be a number from {low:g} to {high:g}")


@dataclass(frozen=True)
class TokenScore:
    """Log-probabilities (nats) by the model's own distribution, before temperature and the rest."""

    token: int
    logprob: float
    top: dict[int, float]  # of the likeliest tokens, likeliest first


@dataclass(eq=False)
class Request:
    """One sequence to be continued: what is asked for, and how far it has come.

    Raises ValueError when a setting is out of range.
    """

    tokens: Sequence[int]
    max_tokens: int | None = None  # None = to the end of the context
    temperature: float = 1.0  # 0 = always the likeliest token
    top_k: int | None = None  # sample among the k likeliest tokens; None or 0 = among all
    seed: int = 42
    sample: int = 0  # tells apart requests that share a seed
    top_p: float = 1.0  # among the likeliest tokens that make up this share of the probability (arXiv 1904.09751)
    min_p: float = 0.0  # among tokens with this share of the likeliest one's probability (arXiv 2407.01082)
    repetition_penalty: float = 1.0  # divides the logits of all tokens so far, prompt included (arXiv 1909.05858)
    presence_penalty: float = 0.0  # subtracted once from the logits of tokens in the answer so far, as OpenAI does
    frequency_penalty: float = 0.0  # subtracted once for each time that a token occurs in the answer so far
    logit_bias: Mapping[int, float] = field(default_factory=dict)  # added to these tokens' logits
    logprobs: int | None = None  # report each token's log-probability, and those of so many likeliest
    stop: Sequence[str] = ()  # texts that end the answer, and are no part of it
    priority: int = 0  # higher goes first
    decoder: Any = None  # turns its tokens into text and tool calls (detokenizer.py); made where `stop` needs one

    output: list[int] = field(default_factory=list)  # without the token that ended it
    mask: list[int] = field(default_factory=list)  # 1 = sampled by the model, 0 = forced by a tool
    scores: list[TokenScore] = field(default_factory=list)  # of each token of the output, where asked for
    finish_reason: str | None = None  # "stop" | "length" | "abort" | "error"; None while it waits or runs
    stop_token: int | None = None  # the token that ended it, when the reason is "stop" and it was not a text

    state: State = "waiting"
    slot: int = 0  # its row in the cache, while it has one
    n_read: int = 0  # tokens of prompt and output whose keys and values are in the cache
    n_reused: int = 0  # of these, how many were in the cache before it began
    order: tuple[int, int] = (0, 0)  # its place in the queue, given on arrival

    def __post_init__(self) -> None:
        if not self.tokens:
            raise ValueError("the prompt is empty: begin it with <|bos|>")
        _check_range("max_tokens", self.max_tokens, 1)
        _check_range("temperature", self.temperature, 0)
        _check_range("top_k", self.top_k, 0)
        _check_range("top_p", self.top_p, 0, 1)
        _check_range("min_p", self.min_p, 0, 1)
        _check_range("logprobs", self.logprobs, 0)
        _check_range("priority", self.priority, -1000, 1000)
        _check_range("presence_penalty", self.presence_penalty, -100, 100)
        _check_range("frequency_penalty", self.frequency_penalty, -100, 100)
        _check_range("repetition_penalty", self.repetition_penalty, 1e-3, 1e3)
        for token, bias in self.logit_bias.items():
            _check_range(f"logit_bias of token {token}", bias, -100, 100)
        if isinstance(self.stop, str) or not all(isinstance(text, str) and text for text in self.stop):
            raise ValueError(f"stop {self.stop!r} must be a list of texts, none empty")
        self.random = random.Random(f"{self.seed}:{self.sample}")  # a string: integer seeds lose their sign
        self.expression: list[int] | None = None  # what the model has told the calculator so far
        self.chain: list[Any] = []  # blocks of its tokens that the prefix cache knows

    @property
    def size(self) -> int:
        """Tokens of prompt and output."""
        return len(self.tokens) + len(self.output)

    @property
    def n_pending(self) -> int:
        """Tokens still to be read before the next can be sampled."""
        return self.size - self.n_read

    def pending(self, n: int) -> list[int]:
        """Return the next `n` tokens to be read."""
        first = self.n_read - len(self.tokens)
        if first >= 0:
            return self.output[first : first + n]
        return [*self.tokens[self.n_read : self.n_read + n], *self.output[: max(0, first + n)]]

    @property
    def previous(self) -> int:
        """The token before the next to be read, -1 where there is none: all the state that smear needs."""
        if self.n_read <= len(self.tokens):
            return self.tokens[self.n_read - 1] if self.n_read else -1
        return self.output[self.n_read - 1 - len(self.tokens)]


class Slots(Protocol):
    """What the scheduler asks of the KV cache (kv_cache.KVCache). Request i of those that run has row i."""

    def fits(self, sizes: Sequence[int]) -> bool:
        """Return whether sequences of so many tokens have room at the same time."""

    def attach(self, request: Request, running: Sequence[Request], twin: Request | None) -> int:
        """Begin `request` in its row, after those of `running`; return how many of its first tokens need not be read.

        They are known from before, or from the running `twin`, which has read the same prompt.
        """

    def move(self, source: int, target: int, length: int) -> None:
        """Make row `target` equal to row `source` in its first `length` positions."""


class Scheduler:
    """First come, first served, but for priorities.

    Every step continues all requests that decode, and gives the rest of its token budget to those that are still being
    read, the first first. When nothing decodes, and so nothing waits for the step, it may take twice the budget, though
    no single request more than the budget. Nothing starves: a later request overtakes an earlier one by HEAD_START
    places at most, and the first of all is never preempted.
    """

    def __init__(self, slots: Slots, max_running: int, step_tokens: int) -> None:
        assert step_tokens > max_running >= 1, "prefill must get a share of every step"
        self.slots = slots
        self.max_running = max_running
        self.step_tokens = step_tokens
        self.waiting: list[Request] = []  # in the order of service
        self.running: list[Request] = []
        self.n_preempted = 0
        self._arrivals = itertools.count()

    def add(self, request: Request) -> None:
        """Queue a request."""
        arrival = next(self._arrivals)
        request.order = arrival - HEAD_START * request.priority, arrival
        self._wait(request)

    def schedule(self) -> tuple[list[Request], list[tuple[Request, int]]]:
        """Return the requests to continue by one token, and those to read, each with how many tokens to read of it."""
        full = False
        while not self.slots.fits([request.size for request in self.running]):
            self._preempt(max(self.running, key=lambda request: request.order))
            full = True
        decode = [request for request in self.running if request.n_pending == 1]
        budget = self.step_tokens - len(decode) if decode else 2 * self.step_tokens
        prefill: list[tuple[Request, int]] = []
        for request in sorted(self.running, key=lambda request: request.order):
            if request.n_pending > 1 and budget:
                n = min(request.n_pending, self.step_tokens, budget)
                prefill.append((request, n))
                budget -= n
        for request, twin in () if full else self._admissible():
            if not budget or not self.slots.fits([each.size for each in (*self.running, request)]):
                break  # those behind it wait with it: small ones that slip past would starve a large one
            self._admit(request, twin)
            n = min(request.n_pending, self.step_tokens, budget)
            budget -= n
            if request.n_pending == 1:
                decode.append(request)
            else:
                prefill.append((request, n))
        for request, _ in prefill:
            request.state = "prefill"
        for request in decode:
            request.state = "decode"
        return decode, prefill

    def remove(self, request: Request) -> None:
        """Forget a request, wherever it is; the last running one moves into its row."""
        if request.state == "waiting":
            self.waiting.remove(request)
        elif request.state != "done":
            self._vacate(request)
        request.state = "done"

    def _wait(self, request: Request) -> None:
        request.state = "waiting"
        bisect.insort(self.waiting, request, key=lambda request: request.order)

    def _admissible(self) -> Iterator[tuple[Request, Request | None]]:
        """Yield waiting requests in order, while rows are free, each with a running twin that has read the same prompt.

        Samples of one prompt share what the first of them has read. While that one is still reading, the others wait.
        """
        for request in list(self.waiting):
            if len(self.running) == self.max_running:
                return
            same = (each for each in self.running if each.tokens is request.tokens or each.tokens == request.tokens)
            twin = max(same, key=lambda twin: twin.n_read, default=None)
            if twin is None or twin.n_read >= len(request.tokens) - 1:
                yield request, twin

    def _admit(self, request: Request, twin: Request | None) -> None:
        self.waiting.remove(request)
        request.slot = len(self.running)
        request.state = "prefill"
        request.n_read = request.n_reused = self.slots.attach(request, self.running, twin)
        assert 0 <= request.n_read < request.size
        self.running.append(request)

    def _preempt(self, request: Request) -> None:
        assert len(self.running) > 1, "a request alone fits, or it would not have been added"
        self.n_preempted += 1
        self._vacate(request)
        self._wait(request)

    def _vacate(self, request: Request) -> None:
        """Take a request's row away; the last running one moves into it."""
        last = self.running.pop()
        if last is not request:
            self.slots.move(last.slot, request.slot, last.n_read)
            self.running[request.slot] = last
            last.slot = request.slot
        request.n_read = 0
