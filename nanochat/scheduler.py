"""Requests, and which of them run in the next step. Pure Python: no tensors.

A request goes through four states:

    waiting -> prefill -> decode -> done
               reads its prompt,    adds one token
               in chunks            per step

Running requests own rows of the KV cache: request i of `Scheduler.running` has row i. When the cache is full, the
request that came last is preempted: it loses its row and waits again, and what it had read is recomputed later.
"""

import bisect
import itertools
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from typing import Any, Literal

from nanochat.kv_cache import BLOCK, Block, KVCache

NOT_FINITE = "the model computed NaN or infinite logits: its weights are damaged, or overflow this dtype"


@dataclass(frozen=True)
class TokenScore:
    """Log-probabilities (nats) by the model's own distribution, before temperature and all other settings.

    Nothing comes before the first token of a prompt, so it has no `logprob`, and `top` is empty.
    """

    token: int
    logprob: float | None
    top: dict[int, float]  # the likeliest tokens and their log-probabilities, likeliest first


@dataclass(eq=False)
class Request:
    """One sequence to be continued: its prompt, its settings and its progress.

    To add a sampling option: a field here and its range in `__post_init__`, and its effect in sampling.py. To let
    clients of the API set it, a field of the same name in `Parameters` in serve/schema.py, which comes here by its
    name, and a row in dev/api.md. Raises ValueError when a setting is out of range.
    """

    tokens: Sequence[int]
    _: KW_ONLY
    max_tokens: int | None = None  # None = up to the end of the context; 0, with `prompt_logprobs` = only score

    # How to sample (sampling.py).
    temperature: float = 1.0  # 0 = always the likeliest token
    top_k: int | None = None  # sample among the k likeliest tokens; None or 0 = among all
    seed: int = 42
    sample: int = 0  # tells requests with the same seed apart
    top_p: float = 1.0  # sample among the likeliest tokens that make up this probability (arXiv 1904.09751)
    min_p: float = 0.0  # among tokens at least this share as likely as the likeliest (arXiv 2407.01082)
    repetition_penalty: float = 1.0  # divides the logits of all tokens so far, prompt included (arXiv 1909.05858)
    presence_penalty: float = 0.0  # subtracted once from the logits of tokens in the answer so far, as OpenAI does
    frequency_penalty: float = 0.0  # subtracted once for each time that a token occurs in the answer so far
    logit_bias: Mapping[int, float] = field(default_factory=dict)  # added to these tokens' logits

    # How to report and to stop.
    logprobs: int | None = None  # report log-probabilities: of each token, and of this many likeliest ones
    prompt_logprobs: bool = False  # with `logprobs`: those of the prompt's tokens, too
    stop: Sequence[str] = ()  # texts that end the answer; they are not part of it
    stop_token_ids: Sequence[int] = ()  # tokens that end the answer, beside the model's own
    decoder: Any = None  # turns its tokens into text and tool calls (detokenizer.py); made by the engine for `stop`

    # The result.
    output: list[int] = field(default_factory=list)  # without the token that ended it
    mask: list[int] = field(default_factory=list)  # per token of `output`: 1 = sampled, 0 = forced by a tool
    scores: list[TokenScore] = field(default_factory=list)  # of prompt and sampled tokens, as `logprobs` asks for them
    finish_reason: str | None = None  # "stop" | "length" | "abort" | "error"; None while it waits or runs
    stop_token: int | None = None  # the token that ended it, if a token did

    # Its progress, kept by the scheduler and the engine.
    state: Literal["waiting", "prefill", "decode", "done"] = "waiting"
    arrival: int = 0  # its place in the queue
    row: int = 0  # its row in the cache, while it runs
    n_read: int = 0  # tokens of prompt and output whose keys and values are in the cache
    n_reused: int = 0  # how many of these were in the cache before it ran
    chain: list[Block] = field(default_factory=list)  # its blocks in the prefix cache
    expression: list[int] | None = None  # tokens of an open call of the calculator
    rng: random.Random = field(init=False)  # its own random numbers: no neighbour can change its answer

    def __post_init__(self) -> None:
        if not self.tokens:
            raise ValueError("the prompt is empty: begin it with <|bos|>")
        if isinstance(self.stop, str) or not all(isinstance(text, str) and text for text in self.stop):
            raise ValueError(f"stop {self.stop!r} must be a list of texts, none empty")
        _check_range("max_tokens", self.max_tokens, 0 if self.prompt_logprobs else 1)
        _check_range("temperature", self.temperature, 0)
        _check_range("top_k", self.top_k, 0)
        _check_range("top_p", self.top_p, 0, 1)
        _check_range("min_p", self.min_p, 0, 1)
        _check_range("repetition_penalty", self.repetition_penalty, 1e-3, 1e3)
        _check_range("presence_penalty", self.presence_penalty, -100, 100)
        _check_range("frequency_penalty", self.frequency_penalty, -100, 100)
        for token, bias in self.logit_bias.items():
            _check_range(f"logit_bias of token {token}", bias, -100, 100)
        _check_range("logprobs", self.logprobs, 0)
        if self.prompt_logprobs and self.logprobs is None:
            raise ValueError("prompt_logprobs needs logprobs: say of how many likeliest tokens")
        self.rng = random.Random(f"{self.seed}:{self.sample}")  # a text, because integer seeds lose their sign

    @property
    def size(self) -> int:
        """Number of tokens of prompt and output."""
        return len(self.tokens) + len(self.output)

    @property
    def n_pending(self) -> int:
        """Number of tokens to read before the next one can be sampled: 1 while it decodes."""
        return self.size - self.n_read

    def pending(self, n: int) -> list[int]:
        """Return the next `n` tokens to read."""
        first = self.n_read - len(self.tokens)
        if first >= 0:
            return self.output[first : first + n]
        return [*self.tokens[self.n_read : self.n_read + n], *self.output[: max(0, first + n)]]

    def raise_if_broken(self) -> None:
        """Raise ValueError if it ended because the model's logits were not finite."""
        if self.finish_reason == "error":
            raise ValueError(NOT_FINITE)

    @property
    def scores_prompt(self) -> bool:
        """True while prompt tokens are still to be scored. All must then be read, even those in the prefix cache."""
        return self.prompt_logprobs and len(self.scores) < len(self.tokens)

    @property
    def previous(self) -> int:
        """The token before the next to read, -1 if there is none. Smear needs it (gpt.py)."""
        if self.n_read == 0:
            return -1
        if self.n_read <= len(self.tokens):
            return self.tokens[self.n_read - 1]
        return self.output[self.n_read - 1 - len(self.tokens)]


def _check_range(name: str, value: float | None, low: float, high: float = math.inf) -> None:
    if value is not None and not (low <= value <= high and math.isfinite(value)):
        raise ValueError(f"{name} {value} must be a number from {low:g} to {high:g}")


class Scheduler:
    """Continuous batching: first come, first served.

    Every step continues all requests that decode. The rest of its token budget goes to prefill, in the order of
    arrival, so a long prompt is read in chunks beside the answers of others (chunked prefill, arXiv 2308.16369).
    The request that came first is never preempted, so nothing starves.
    """

    def __init__(self, cache: KVCache, max_running: int, step_tokens: int) -> None:
        assert step_tokens > max_running >= 1, "prefill must get a share of every step"
        self.cache = cache
        self.max_running = max_running
        self.step_tokens = step_tokens
        self.waiting: list[Request] = []  # in the order of arrival
        self.running: list[Request] = []  # in the order of rows
        self.n_preempted = 0
        self.n_queried = 0  # tokens of requests that began to run
        self.n_reused = 0  # how many of these the cache had already
        self._arrivals = itertools.count()

    def add(self, request: Request) -> None:
        """Queue a request."""
        request.arrival = next(self._arrivals)
        self._wait(request)

    def remove(self, request: Request) -> None:
        """Forget a request, in any state."""
        if request.state == "waiting":
            self.waiting.remove(request)
        elif request.state != "done":
            self._free_row(request)
        request.state = "done"

    def schedule(self) -> list[tuple[Request, int]]:
        """Return the requests of the next step, each with the number of its tokens to read.

        Preempts running requests if their next tokens do not fit, otherwise admits waiting ones.
        """
        preempted = False
        while not self._fits(self.running):
            self._preempt(max(self.running, key=lambda request: request.arrival))
            preempted = True

        work = [(request, 1) for request in self.running if request.n_pending == 1]
        # While nothing decodes, nobody waits for the step to end: it may read twice as much.
        budget = self.step_tokens - len(work) if work else 2 * self.step_tokens

        # Prompts that have begun, then new ones. The first of the queue gets all that it can use.
        for request in sorted(self.running, key=lambda request: request.arrival):
            n = min(request.n_pending, self.step_tokens, budget)
            if request.n_pending > 1 and n > 0:
                work.append((request, n))
                budget -= n
        candidates = [] if preempted else list(self.waiting)
        for request in candidates:
            if len(self.running) == self.max_running or budget == 0:
                break
            twin = self._twin(request)
            if twin is not None and twin.n_read < len(request.tokens) - 1:
                continue  # `request` will copy what its twin is reading now
            if not self._fits([*self.running, request]):
                break  # those behind it wait as well: small requests that slip past would starve a large one
            self._admit(request, twin)
            n = min(request.n_pending, self.step_tokens, budget)
            work.append((request, n))
            budget -= n

        for request, _ in work:
            request.state = "decode" if request.n_pending == 1 else "prefill"
        return work

    def _fits(self, requests: Sequence[Request]) -> bool:
        return self.cache.fits([request.size for request in requests])

    def _twin(self, request: Request) -> Request | None:
        """Return the running request with the same prompt that has read most: samples of one prompt read it once."""
        if request.scores_prompt:
            return None
        twins = [other for other in self.running if other.tokens is request.tokens or other.tokens == request.tokens]
        return max(twins, key=lambda twin: twin.n_read, default=None)

    def _wait(self, request: Request) -> None:
        request.state = "waiting"
        bisect.insort(self.waiting, request, key=lambda request: request.arrival)

    def _admit(self, request: Request, twin: Request | None) -> None:
        """Give a waiting request the next row, and fill it with the longest prefix that the cache holds."""
        self.waiting.remove(request)
        request.row = len(self.running)
        self.running.append(request)
        self.cache.reserve(len(self.running), max(each.size for each in self.running))
        # The last token is always read, because the next one is sampled from its logits.
        limit = request.size - 1
        shared = 0 if twin is None else min(twin.n_read, len(request.tokens), limit)
        if twin is not None and self.cache.can_truncate(twin.n_read, shared):
            self.cache.copy_row(twin.row, request.row, shared)
            request.chain = twin.chain[: shared // BLOCK]
        elif request.scores_prompt:
            request.chain = []
            shared = 0
        else:
            request.chain = self.cache.prefixes.load(request.row, request.pending(limit))
            shared = BLOCK * len(request.chain)
        request.n_read = shared
        request.n_reused = shared
        self.n_queried += request.size
        self.n_reused += shared

    def _preempt(self, request: Request) -> None:
        assert len(self.running) > 1, "a single request fits, or the engine would have refused it"
        self.n_preempted += 1
        self._free_row(request)
        if request.scores_prompt:
            request.scores.clear()  # its prompt is read and scored from the beginning again
        self._wait(request)

    def _free_row(self, request: Request) -> None:
        """Take a request's row away; the last running request moves into it, so that rows have no gaps."""
        self._clean_row(request)
        last = self.running.pop()
        if last is not request:
            self.cache.copy_row(last.row, request.row, last.n_read)
            self._clean_row(last)
            self.running[request.row] = last
            last.row = request.row
        request.n_read = 0

    def _clean_row(self, request: Request) -> None:
        """Clear a row that its request leaves, if it may hold NaN.

        Attention reads the slots that a later request has not written yet, too, with a weight of 0, and 0 · NaN is NaN.
        A request that decodes has given finite logits; one whose prompt is being read, or that ended by an error, may
        have not.
        """
        if request.n_pending > 1 or request.finish_reason == "error":
            # One more, because a CUDA graph also computes for rows whose prompts are being read (engine.py).
            self.cache.clear_row(request.row, request.n_read + 1)
