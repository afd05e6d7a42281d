"""Generation: many requests at once, each at its own position, with the calculator inside the batch.

    step() = schedule, run the model, postprocess: a token for each request that was read to its end

The scheduler (scheduler.py) says which requests run and how much of each is read; the KV cache (kv_cache.py) holds what
was read; `Forward` (cuda_graph.py) runs the model, of any family (language_model.py), over all tokens of the step at
once; sampling.py draws the tokens; detokenizer.py makes text of them.

The same request with the same seed gives the same tokens alone and in any company, in any row, whatever of it was
in the prefix cache, in whatever chunks it is read, and after a preemption. On CPU that holds bit by bit
(`deterministic`); on a GPU, or without the mode, but for rounding, as products there sum in an order that depends on
their shape.
"""

import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch

from nanochat.cuda_graph import Forward
from nanochat.detokenizer import AnswerDecoder, ToolCall
from nanochat.kv_cache import BLOCK, KVCache
from nanochat.language_model import LanguageModel
from nanochat.packed import decode_threads, prepack
from nanochat.sampling import sample, score
from nanochat.scheduler import Request, Scheduler
from nanochat.tokenizer import SPECIAL_TOKENS, Tokenizer
from nanochat.tools import calculate

__all__ = ["AnswerDecoder", "Engine", "Request", "ToolCall", "Update"]

SAVE_EVERY = 64  # tokens of an answer between copies to the prefix cache; rings have room for as many


class Update(NamedTuple):
    """News of one request after a step: its new tokens, the events its decoder made of them, and why it ended."""

    request: Request
    tokens: list[int]
    events: list[Any]
    finish_reason: str | None


class Engine:
    """Runs requests in batches of at most `max_batch`; the others wait, first come, first served. Not thread-safe.

    The model's weights are used as they are now: after further training, make another engine.
    step_tokens: at most so many tokens are read in a step, those that are continued included (see scheduler.py).
    cache_tokens, prefix_tokens: room for running requests (None = for `max_batch` contexts) and for prefixes, in tokens
    of `bytes_per_token`. deterministic: see above. int8: 8-bit weights on CPU. Raises ValueError where int8 cannot be.
    """

    def __init__(
        self,
        model: LanguageModel,
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
        self.model = prepack(model, int8=int8, deterministic=deterministic)
        self.threads = decode_threads(model)  # for the script: torch.set_num_threads(engine.threads)
        self.tokenizer = tokenizer
        self.max_batch = max_batch
        self.context = model.config.sequence_len
        self.vocab_size = model.config.vocab_size
        self.needs = model.cache_needs
        step_tokens = max(step_tokens, 2 * max_batch)
        self.cache = KVCache(
            model.device,
            self.needs,
            self.context,
            chunk=max(step_tokens, SAVE_EVERY),
            max_tokens=cache_tokens,
            prefix_tokens=prefix_tokens,
            deterministic=deterministic,
        )
        self.scheduler = Scheduler(self.cache, max_batch, step_tokens)
        self.waiting = self.scheduler.waiting
        self.running = self.scheduler.running
        self.forward = Forward(self.model, self.cache)
        self.n_prompt_tokens = 0
        self.n_output_tokens = 0
        # tokenizers of other projects lack some of these
        self._special = {name: tokenizer.special_tokens.get(name) for name in SPECIAL_TOKENS}
        self._stop_tokens = {self._special["<|bos|>"], *tokenizer.stop_tokens}  # a new document ends every answer

    @property
    def busy(self) -> bool:
        """Return whether any request waits or runs."""
        return bool(self.waiting or self.running)

    @property
    def bytes_per_token(self) -> int:
        """Cache memory of one token. Windowed layers stop growing at their window."""
        return sum(2 * need.kv_heads * need.head_dim for need in self.needs) * self.model.dtype.itemsize

    def stats(self) -> dict[str, int]:
        """Gauges and counters since the start, as servers show them."""
        return {
            "running": len(self.running),
            "waiting": len(self.waiting),
            "cache_tokens": sum(request.n_read for request in self.running),
            "prompt_tokens": self.n_prompt_tokens,
            "output_tokens": self.n_output_tokens,
            "prefix_queried_tokens": self.cache.n_queried,
            "prefix_reused_tokens": self.cache.n_reused,
            "preemptions": self.scheduler.n_preempted,
        }

    def check(self, request: Request) -> None:
        """Raise ValueError when `request` can never run.

        Its prompt leaves no room in the context or the cache, or has tokens that the model does not know.
        """
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
        """Empty the prefix cache."""
        self.cache.prefixes.clear()

    @torch.inference_mode()
    def abort(self, request: Request) -> None:
        """Forget a request, wherever it is; one that has finished stays as it is."""
        if request.finish_reason is None:
            request.finish_reason = "abort"
            self.scheduler.remove(request)

    @torch.inference_mode()
    def step(self) -> list[Update]:
        """Continue by one token every request that was read to its end, and read on in the others."""
        # schedule
        decode, prefill = self.scheduler.schedule()
        work = [(request, 1) for request in decode] + prefill
        work.sort(key=lambda each: (each[1] > 1, each[0].slot))  # single tokens first, neighbouring rows together
        if not work:
            return []
        # run
        self.cache.reserve(len(self.running), max(request.size for request in self.running))
        logits_BV = self.forward(self.running, work)
        for request, n in work:
            request.n_read += n
        # postprocess
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
        """Continue one prompt `num_samples` times; yield (token_column, mask_column), one entry per sample.

        mask: 1 = sampled, 0 = forced by a tool. The last column of a sample holds the token that ended it, sampled;
        columns after that are filled with <|assistant_end|> and mask 0. settings: further fields of `Request`.
        """
        requests = [
            Request(tokens, max_tokens, temperature, top_k, seed=seed, sample=sample, **settings)
            for sample in range(num_samples)
        ]
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
        """Yield tokens of a request as they come, each with its mask, and the one that ended it."""
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
        """As `generate`, all at once: return (sequences, masks), with the prompt (mask 0), without the end token."""
        requests = [Request(tokens, sample=sample, **settings) for sample in range(num_samples)]
        self.run(requests)
        sequences = [[*tokens, *request.output] for request in requests]
        masks = [[0] * len(tokens) + request.mask for request in requests]
        return sequences, masks

    def complete(self, prompts: Iterable[Sequence[int]], max_tokens: int | None = None) -> list[list[int]]:
        """Return the likeliest tokens after each prompt; a row of the batch that falls free is given to the next."""
        requests = [Request(tokens, max_tokens, temperature=0.0) for tokens in prompts]
        self.run(requests)
        return [request.output for request in requests]

    def _extend(self, requests: Sequence[Request], logits_BV: torch.Tensor) -> list[Update]:
        """Draw the next token of each request, and append it, with what a tool answers to it."""
        numbers = [request.random.random() if request.temperature else 0.0 for request in requests]
        tokens = sample(logits_BV, requests, numbers).tolist()
        scores = score(logits_BV, requests, tokens)
        updates = []
        for request, token, its_score in zip(requests, tokens, scores, strict=True):
            new = self._accept(request, token)
            if its_score is not None and new:
                request.scores.append(its_score)
            events = [event for each in new for event in request.decoder.feed(each)] if request.decoder else []
            if request.decoder and request.decoder.stopped and request.finish_reason is None:
                request.finish_reason = "stop"
            if request.finish_reason is not None and request.decoder:
                events += request.decoder.finish()
            self.n_output_tokens += len(new)
            updates.append(Update(request, new, events, request.finish_reason))
        return updates

    def _accept(self, request: Request, token: int) -> list[int]:
        """Take a sampled token; return what it adds to the output: itself, and a tool's answer, which is forced."""
        if token in self._stop_tokens:
            request.finish_reason = "stop"
            request.stop_token = token
            return []
        room = min(request.max_tokens or self.context, self.context - len(request.tokens)) - len(request.output)
        new = [token, *self._use_tool(request, token)][:room]
        request.output += new
        request.mask += [1] + [0] * (len(new) - 1)
        if len(new) == room:
            request.finish_reason = "length"
        return new

    def _use_tool(self, request: Request, token: int) -> list[int]:
        """Collect an expression between the calculator's marks; return its result, marks included, if it is valid."""
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
        """Let the prefix cache keep what was read of a request: while it is prompt, every 64 tokens, and at its end."""
        known = BLOCK * len(request.chain)
        if request.n_read - known >= SAVE_EVERY or request.state == "prefill" or request.finish_reason is not None:
            read = [*request.tokens, *request.output][: request.n_read]
            self.cache.prefixes.save(request.slot, read, request.chain)
