"""Generation: many requests at once, each at its own position, with the calculator inside the batch.

    step() = schedule, run the model, take a token for each request that was read to its end

A model is anything with `.config.sequence_len`, `.config.vocab_size`, `.device` and
`model(idx_BT, cache=..., positions_BT=..., last_only=True) -> logits_B1V`, called for rows that read equally many
tokens. Its layers give their new keys and values to `cache.update` (kv_cache.CacheRows). One with `.cache_needs`, a
`LayerNeed` a layer, is `model(idx_N, previous_N, positions_N, cache, wanted_R) -> logits_RV` instead, called once a
step for all that it reads, and its layers call `cache.attend` (kv_cache.CacheBatch), whose windows cost no more memory
than they show. A GPT is made such a one first (packed.py).

The same request with the same seed gives the same tokens alone and in any company, in any slot, whatever of it was
known before, in whatever chunks it is read, and after it had to give up its slot. On CPU that holds bit by bit for a
GPT (`deterministic`); for other models, on other devices or without the mode, but for rounding, as far as their own
products depend on the shape of what they multiply.
"""

import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch

from nanochat.cuda_graph import Forward
from nanochat.detokenizer import AnswerDecoder, ToolCall
from nanochat.gpt import GPT
from nanochat.kv_cache import KVCache
from nanochat.packed import PackedGPT
from nanochat.prefix_cache import BLOCK, PrefixCache
from nanochat.request import Request
from nanochat.sampling import sample, score
from nanochat.scheduler import Scheduler
from nanochat.tokenizer import SPECIAL_TOKENS, Tokenizer
from nanochat.tools import calculate

__all__ = ["AnswerDecoder", "Engine", "Request", "ToolCall", "Update"]

SAVE_EVERY = 64  # tokens of an answer between copies to the prefix cache; rings hold as many besides their window


class Update(NamedTuple):
    """What a step brought a request: new tokens, what they complete for its decoder, and why it ended, if it did."""

    request: Request
    tokens: list[int]
    events: list[Any]
    finish_reason: str | None


class CacheSlots:
    """The scheduler's view of a cache: rows, of which some begin with what is known already."""

    def __init__(self, cache: KVCache, prefixes: PrefixCache) -> None:
        self.cache, self.prefixes = cache, prefixes
        self.n_queried = self.n_reused = 0  # tokens of requests that began, and how many of them were known

    def fits(self, sizes: Sequence[int]) -> bool:
        """Whether sequences of so many tokens have room at the same time."""
        return self.cache.fits(sizes)

    def attach(self, request: Request, running: Sequence[Request], twin: Request | None) -> int:
        """Begin `request` in its row; returns how many of its first tokens are there already. The last is always read,
        for its logits."""
        limit = request.size - 1
        self.cache.reserve(request.slot + 1, max(r.size for r in (*running, request)))
        shared = min(twin.n_read, len(request.tokens), limit) if twin else 0
        if twin and shared and self.cache.rewinds(twin.n_read, shared):
            self.cache.copy_row(twin.slot, request.slot, shared)
            request.chain = twin.chain[: shared // BLOCK]
        else:
            request.chain = self.prefixes.load(request.slot, request.pending(limit), limit)
            shared = BLOCK * len(request.chain)
        self.n_queried, self.n_reused = self.n_queried + request.size, self.n_reused + shared
        return shared

    def move(self, source: int, target: int, size: int) -> None:
        """Give the first `size` positions of row `source` to row `target`."""
        self.cache.copy_row(source, target, size)


class Engine:
    """Runs requests in batches of at most `max_batch`; the others wait, first come first served. Not thread-safe.

    step_tokens: at most so many tokens are read in a step, those that are continued included; see scheduler.py.
    cache_tokens, prefix_tokens: memory for running requests (None = for `max_batch` contexts) and for known beginnings,
    in tokens of `bytes_per_token`. deterministic: see above. int8: 8-bit weights of a GPT, on CPU, else ValueError.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Tokenizer,
        max_batch: int = 32,
        *,
        step_tokens: int = 256,
        cache_tokens: int | None = None,
        prefix_tokens: int = 8192,
        deterministic: bool = True,
        int8: bool = False,
    ) -> None:
        if max_batch < 1:
            raise ValueError(f"--max-batch {max_batch} must be at least 1")
        packed = type(model) is GPT  # one whose parameters are cut over ranks (FSDP) is a subclass
        self.model = PackedGPT(model, deterministic, int8) if packed else model
        if int8 and not packed:
            raise ValueError("int8 weights are for this project's own models")
        self.tokenizer, self.max_batch, self.context = tokenizer, max_batch, model.config.sequence_len
        self.vocab_size = getattr(model.config, "vocab_size", None) or tokenizer.get_vocab_size()
        self.needs = getattr(self.model, "cache_needs", ())
        step_tokens = max(step_tokens, 2 * max_batch)
        chunk = max(step_tokens, SAVE_EVERY)
        self.cache = KVCache(model.device, self.needs, self.context, chunk, cache_tokens, deterministic)
        self.slots = CacheSlots(self.cache, PrefixCache(self.cache, prefix_tokens))
        self.scheduler = Scheduler(self.slots, max_batch, step_tokens)
        self.waiting, self.running = self.scheduler.waiting, self.scheduler.running
        self.forward = Forward(self.model, self.cache)
        self.n_prompt_tokens = self.n_output_tokens = 0
        # a foreign tokenizer lacks some of them
        self._special = {name: tokenizer.special_tokens.get(name) for name in SPECIAL_TOKENS}
        self._stop_tokens = {self._special["<|assistant_end|>"], self._special["<|bos|>"]}
        self._stop_tokens |= getattr(tokenizer, "stop_tokens", frozenset())

    @property
    def busy(self) -> bool:
        """Whether any request waits or runs."""
        return bool(self.waiting or self.running)

    @property
    def bytes_per_token(self) -> int | None:
        """Cache memory of one token; None for a model that does not say what it needs. Windows cap it."""
        size = sum(2 * need.kv_heads * need.head_dim for need in self.needs)
        return size * self.model.dtype.itemsize if size else None

    def stats(self) -> dict[str, int]:
        """Gauges and counters since the start, as servers show them."""
        return {
            "running": len(self.running),
            "waiting": len(self.waiting),
            "cache_tokens": sum(request.n_read for request in self.running),
            "prompt_tokens": self.n_prompt_tokens,
            "output_tokens": self.n_output_tokens,
            "prefix_queried_tokens": self.slots.n_queried,
            "prefix_reused_tokens": self.slots.n_reused,
            "preemptions": self.scheduler.n_preempted,
        }

    def check(self, request: Request) -> None:
        """Raise ValueError when `request` can never run: its prompt leaves no room in the context or cache, or has
        tokens that the model does not know."""
        n = len(request.tokens)
        if n >= self.context:
            raise ValueError(f"a prompt of {n} tokens leaves no room in the context of {self.context}")
        longest = min(self.context, n + (request.max_tokens or self.context))
        if not self.cache.fits([longest]):
            raise ValueError(f"{longest} tokens do not fit in a cache of {self.cache.max_tokens}: lower max_tokens")
        for token in (min(request.tokens), max(request.tokens), *request.logit_bias):
            if not 0 <= token < self.vocab_size:
                raise ValueError(f"token {token} is not in the vocabulary of {self.vocab_size}")

    def add(self, request: Request) -> None:
        """Queue a request; raises ValueError when it can never run."""
        self.check(request)
        if request.stop and request.decoder is None:
            request.decoder = AnswerDecoder(self.tokenizer, request.stop)
        self.scheduler.add(request)
        self.n_prompt_tokens += len(request.tokens)

    def forget(self) -> None:
        """Forget what is known of beginnings of prompts."""
        self.slots.prefixes.clear()

    @torch.inference_mode()
    def abort(self, request: Request) -> None:
        """Forget a request, wherever it is; one that has finished stays as it is."""
        if request.finish_reason is None:
            request.finish_reason = "abort"
            self.scheduler.remove(request)

    @torch.inference_mode()
    def step(self) -> list[Update]:
        """Continue every request that was read to its end by a token, and read on in the others."""
        decode, prefill = self.scheduler.schedule()
        work = sorted([*((r, 1) for r in decode), *prefill], key=lambda each: (each[1] > 1, each[0].slot))
        if not work:
            return []
        self.cache.reserve(len(self.running), max(request.size for request in self.running))
        with torch.cuda.device_of(self.cache.last_token):  # kernels and graphs go to the current device
            logits_BV = self.forward(self.running, work)
        for request, n in work:
            request.n_read += n
        places = [place for place, (request, _) in enumerate(work) if not request.n_pending]
        logits_BV = logits_BV if len(places) == len(work) else logits_BV[places]
        updates = self._extend([work[place][0] for place in places], logits_BV) if places else []
        for request, _ in work:
            self._remember(request)
            if request.finish_reason is not None:
                self.scheduler.remove(request)
        return updates

    def run(self, requests: Iterable[Request]) -> None:
        """Finish all of `requests`, in batches; results are in their `output`, `mask` and `finish_reason`."""
        requests = list(requests)
        for request in requests:
            self.check(request)
        try:
            for request in requests:
                self.add(request)
            while any(request.finish_reason is None for request in requests):
                self.step()
        finally:
            for request in requests:
                self.abort(request)

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
        **settings: Any,
    ) -> Iterator[tuple[list[int], list[int]]]:
        """Continue one prompt `num_samples` times; yields (token_column, mask_column), one entry a sample.

        mask: 1 = sampled, 0 = forced by a tool. A sample's column of its end holds the end token, sampled; columns
        after that are filled with <|assistant_end|> and mask 0. settings: further ones of a Request.
        """
        first = tokens, max_tokens, temperature, top_k, seed
        requests = [Request(*first, sample, **settings) for sample in range(num_samples)]
        padding = self._special["<|assistant_end|>"] or 0, 0
        try:
            for request in requests:
                self.add(request)
            for cells in itertools.zip_longest(*map(self._follow, requests), fillvalue=padding):
                yield [token for token, _ in cells], [mask for _, mask in cells]
        finally:
            for request in requests:
                self.abort(request)

    def _follow(self, request: Request) -> Iterator[tuple[int, int]]:
        """Tokens of a request as they come, each with its mask, and the one that ends it."""
        for column in itertools.count():
            while len(request.output) <= column and request.finish_reason is None:
                self.step()
            if column == len(request.output):
                break
            yield request.output[column], request.mask[column]
        if request.stop_token is not None:
            yield request.stop_token, 1

    def generate_batch(
        self, tokens: Sequence[int], num_samples: int = 1, **settings: Any
    ) -> tuple[list[list[int]], list[list[int]]]:
        """As `generate`, at once: (sequences, masks), the prompt (mask 0) included and the end token left out."""
        requests = [Request(tokens, sample=i, **settings) for i in range(num_samples)]
        self.run(requests)
        return [[*tokens, *r.output] for r in requests], [[0] * len(tokens) + r.mask for r in requests]

    def complete(self, prompts: Iterable[Sequence[int]], max_tokens: int | None = None) -> list[list[int]]:
        """The likeliest tokens after each prompt, `max_batch` at a time, each place refilled as it falls free."""
        requests = [Request(tokens, max_tokens, 0.0) for tokens in prompts]
        self.run(requests)
        return [request.output for request in requests]

    def _extend(self, requests: Sequence[Request], logits_BV: torch.Tensor) -> list[Update]:
        """Give each request its next token, and what a tool answers to it."""
        numbers = [request.random.random() if request.temperature else 0.0 for request in requests]
        tokens = sample(logits_BV, requests, numbers).tolist()
        scores = score(logits_BV, requests, tokens)
        updates = []
        for request, token, its_score in zip(requests, tokens, scores, strict=True):
            new = self._accept(request, token)
            if its_score is not None and new:
                request.scores.append(its_score)
            events = [event for each in new for event in request.decoder.feed(each)] if request.decoder else []
            if request.finish_reason is None and getattr(request.decoder, "stopped", False):
                request.finish_reason = "stop"
            if request.finish_reason is not None and request.decoder:
                events += request.decoder.finish()
            self.n_output_tokens += len(new)
            updates.append(Update(request, new, events, request.finish_reason))
        return updates

    def _accept(self, request: Request, token: int) -> list[int]:
        """Take a sampled token; returns what it adds to the output: itself, and a tool's answer, which is forced."""
        if token in self._stop_tokens:
            request.finish_reason, request.stop_token = "stop", token
            return []
        room = min(request.max_tokens or self.context, self.context - len(request.tokens)) - len(request.output)
        new = [token, *self._use_tool(request, token)][:room]
        request.output += new
        request.mask += [1] + [0] * (len(new) - 1)
        if len(new) == room:
            request.finish_reason = "length"
        return new

    def _use_tool(self, request: Request, token: int) -> list[int]:
        """Follow the calculator's marks; after a valid expression its result is forced upon the model."""
        if token == self._special["<|python_start|>"]:
            request.expression = []
        elif request.expression is not None and token == self._special["<|python_end|>"]:
            value = calculate(self.tokenizer.decode(request.expression))
            request.expression = None
            if value is not None:
                begin, end = self._special["<|output_start|>"], self._special["<|output_end|>"]
                return [begin, *self.tokenizer.encode(value), end]
        elif request.expression is not None:
            request.expression.append(token)
        return []

    def _remember(self, request: Request) -> None:
        """Have the prefix cache keep what was read of a request, now and then."""
        known = BLOCK * len(request.chain)
        if request.n_read - known >= SAVE_EVERY or request.state == "prefill" or request.finish_reason is not None:
            read = [*request.tokens, *request.output][: request.n_read]
            self.slots.prefixes.save(request.slot, read, request.chain)
