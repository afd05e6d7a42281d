"""A request: what is asked for, and how far it has come. Pure Python."""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

State = Literal["waiting", "prefill", "decode", "done"]


def _number(name: str, value: float | None, low: float, high: float = float("inf")) -> None:
    if (value is not None and not low <= value <= high) or value in (float("inf"), float("-inf")):
        raise ValueError(f"{name} {value} must be a number from {low:g} to {high:g}")


@dataclass(eq=False)
class Request:
    """One sequence to be continued: what is asked for, and how far it has come."""

    tokens: Sequence[int]
    max_tokens: int | None = None  # None = to the end of the context
    temperature: float = 1.0  # 0 = always the likeliest token
    top_k: int | None = None  # of the k likeliest tokens; None or 0 = of all
    seed: int = 42
    sample: int = 0  # tells apart requests that share a seed
    top_p: float = 1.0  # of the likeliest tokens that make up this share of the probability (arXiv 1904.09751)
    min_p: float = 0.0  # of tokens with this share of the likeliest one's probability (arXiv 2407.01082)
    repetition_penalty: float = 1.0  # divides the logits of all tokens so far, prompt included (arXiv 1909.05858)
    presence_penalty: float = 0.0  # subtracted once from the logits of tokens in the answer so far, as OpenAI's
    frequency_penalty: float = 0.0  # subtracted as often as they occur in it
    logit_bias: Mapping[int, float] = field(default_factory=dict)  # added to these tokens' logits
    logprobs: int | None = None  # say each token's log-probability, and those of so many likeliest
    stop: Sequence[str] = ()  # texts that end the answer, and are no part of it
    priority: int = 0  # higher goes first (see scheduler.py)
    decoder: Any = None  # of its tokens into what is shown (detokenizer.py); the engine's own where `stop` needs one

    output: list[int] = field(default_factory=list)  # without the token that ended it
    mask: list[int] = field(default_factory=list)  # 1 = sampled by the model, 0 = forced by a tool
    scores: list["TokenScore"] = field(default_factory=list)  # of each token of the output, where asked for
    finish_reason: str | None = None  # "stop" | "length" | "abort" | "error"; None while it waits or runs
    stop_token: int | None = None  # the token that ended it, when the reason is "stop" and it was not a text

    state: State = "waiting"
    slot: int = 0  # its place in the cache, while it has one
    n_read: int = 0  # tokens of prompt and output whose keys and values are in the cache
    n_reused: int = 0  # of these, how many were found there when its reading began
    order: tuple[int, int] = (0, 0)  # its place in the queue, given on arrival

    def __post_init__(self) -> None:
        if not self.tokens:
            raise ValueError("the prompt is empty: begin it with <|bos|>")
        _number("max_tokens", self.max_tokens, 1)
        _number("temperature", self.temperature, 0)
        _number("top_k", self.top_k, 0)
        _number("top_p", self.top_p, 0, 1)
        _number("min_p", self.min_p, 0, 1)
        _number("logprobs", self.logprobs, 0)
        _number("priority", self.priority, -1000, 1000)
        for name in ("presence_penalty", "frequency_penalty"):
            _number(name, getattr(self, name), -100, 100)
        _number("repetition_penalty", self.repetition_penalty, 1e-3, 1e3)
        for token, bias in self.logit_bias.items():
            _number(f"logit_bias of token {token}", bias, -100, 100)
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
        """The next `n` tokens to be read."""
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


@dataclass(frozen=True)
class TokenScore:
    """Log-probabilities (nats) by the model's own distribution, before temperature and the rest."""

    token: int
    logprob: float
    top: dict[int, float]  # of the likeliest tokens, likeliest first
