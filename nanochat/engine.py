"""Generation: many requests at once, each at its own position, with the calculator inside the batch.

    step() = schedule, run the model, postprocess: a token for each request that was read to its end

The scheduler (scheduler.py) says which requests run and how much of each is read. The model, of any family
(language_model.py), reads all tokens of the step in one forward; kv_cache.py holds what it read before. sampling.py
draws the tokens; detokenizer.py makes text of them.

The same request with the same seed gives the same tokens in any company: on CPU to the bit, on a GPU except for
rounding, because products there sum in an order that depends on their shape. "Any company" is any batch and any row,
chunks of any size, a prefix hit, and a preemption.
"""

import contextlib
import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch

from nanochat.cache_batch import CacheBatch, Part
from nanochat.cpu_trace import Trace, traceable
from nanochat.cuda_graph import CudaGraphs
from nanochat.detokenizer import AnswerDecoder, Event
from nanochat.kv_cache import BLOCK, KVCache
from nanochat.language_model import LanguageModel
from nanochat.packed import decode_threads, prepack
from nanochat.sampling import BROKEN, sample, score, score_prompt
from nanochat.scheduler import Request, Scheduler
from nanochat.tokenizer import Tokenizer
from nanochat.tools import Calculator

__all__ = ["Engine", "Request", "Update"]

SAVE_EVERY = 64  # tokens of an answer between copies to the prefix cache; rings have room for as many


class Update(NamedTuple):
    """The result of one step for one request."""

    request: Request
    tokens: list[int]  # the sampled one and what a tool answered, or none if the sampled one ended the answer
    events: list[Event]  # text and tool calls, if the request has a decoder
    finish_reason: str | None


class Engine:
    """Runs requests in batches of at most `max_batch`; the others wait, first come, first served. Not thread-safe.

    The model's weights are used as they are now: after further training, make another engine.
    step_tokens: tokens that a step reads at most, decoding included. cache_tokens: room for running requests (None =
    for `max_batch` full contexts). prefix_tokens: room for prefixes. A token takes `bytes_per_token`.
    int8: 8-bit weights; raises ValueError unless the model is in bf16 on CPU.
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
        int8: bool = False,
    ) -> None:
        if max_batch < 1:
            raise ValueError(f"--max-batch {max_batch} must be at least 1")
        self.model = prepack(model, int8=int8)
        self.threads = decode_threads(model)  # for the script: torch.set_num_threads(engine.threads)
        self.tokenizer = tokenizer
        self.max_batch = max_batch
        self.context = model.config.sequence_len
        self.vocab_size = model.config.vocab_size
        step_tokens = max(step_tokens, 2 * max_batch)  # prefill gets half of a full batch's step at least
        self.cache = KVCache(
            model.cache_needs,
            self.context,
            chunk=max(step_tokens, SAVE_EVERY),
            max_tokens=cache_tokens,
            prefix_tokens=prefix_tokens,
        )
        self.bytes_per_token = model.dtype.itemsize * sum(
            2 * need.kv_heads * need.head_dim for need in model.cache_needs
        )
        # Kernels and graphs go to the current device, and a process may have an engine per GPU.
        on_gpu = model.device.type == "cuda"
        self._on_device = torch.cuda.device(model.device) if on_gpu else contextlib.nullcontext()
        self.graphs = CudaGraphs(self.model, self.cache) if on_gpu and model.graphs else None
        self.trace = Trace(self.model, self.cache) if traceable(self.model) else None
        self.scheduler = Scheduler(self.cache, max_batch, step_tokens)
        self.n_prompt_tokens = 0
        self.n_output_tokens = 0
        self._calculator = Calculator(tokenizer)
        # A new document ends every answer. Tokenizers of other projects may lack the token.
        self._stop_tokens = {tokenizer.special_tokens.get("<|bos|>"), *tokenizer.stop_tokens}

    @property
    def waiting(self) -> list[Request]:
        """Requests that wait, in the order of arrival."""
        return self.scheduler.waiting

    @property
    def running(self) -> list[Request]:
        """Requests that run, in the order of their rows of the cache."""
        return self.scheduler.running

    @property
    def busy(self) -> bool:
        """Return whether any request waits or runs."""
        return bool(self.waiting or self.running)

    def stats(self) -> dict[str, int]:
        """Gauges and counters since the start, as servers show them."""
        return {
            "running": len(self.running),
            "waiting": len(self.waiting),
            "cache_tokens": sum(request.n_read for request in self.running),
            "prompt_tokens": self.n_prompt_tokens,
            "output_tokens": self.n_output_tokens,
            "prefix_queried_tokens": self.scheduler.n_queried,
            "prefix_reused_tokens": self.scheduler.n_reused,
            "preemptions": self.scheduler.n_preempted,
        }

    def check(self, request: Request) -> None:
        """Raise ValueError when `request` can never run.

        Its prompt leaves no room in the context or the cache, or has tokens that the model does not know.
        """
        n = len(request.tokens)
        if n + (request.max_tokens != 0) > self.context:
            raise ValueError(f"a prompt of {n} tokens leaves no room in the context of {self.context}")
        longest = self.context if request.max_tokens is None else min(self.context, n + request.max_tokens)
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
        # Schedule.
        work = self.scheduler.schedule()
        if not work:
            return []
        # Requests that read a single token come first, because a CUDA graph or a trace may do that part (`_forward`).
        # Neighbouring rows stand together, because they attend together (`_read`).
        work.sort(key=lambda item: (item[1] > 1 or item[0].scores_prompt, item[0].row))
        # Run.
        self.cache.reserve(len(self.running), max(request.size for request in self.running))
        with self._on_device:
            logits_BV = self._forward(work)
        for request, n in work:
            request.n_read += n
        # Postprocess.
        complete = [index for index, (request, _) in enumerate(work) if request.n_pending == 0]
        if len(complete) < len(work):
            logits_BV = logits_BV[complete]
        updates = self._extend([work[index][0] for index in complete], logits_BV) if complete else []
        for request, _ in work:
            self._save_prefix(request)
            if request.finish_reason is not None:
                self.scheduler.remove(request)
        return updates

    def _forward(self, work: Sequence[tuple[Request, int]]) -> torch.Tensor:
        """Read the next n tokens of each request; return logits (B, V) after the last of each.

        On a GPU a CUDA graph reads the single tokens, and on CPU a trace, if nothing else is to be read.
        """
        n_single = sum(n == 1 and not request.scores_prompt for request, n in work)
        if self.graphs is not None and n_single > 0:
            # All running requests take part, because the rows of a graph have no gaps. What it writes for one that is
            # still in prefill is overwritten later.
            single_rows = [request.row for request, _ in work[:n_single]]
            decoded = self.graphs(self._next_tokens())[single_rows]
            if n_single == len(work):
                return decoded
            return torch.cat((decoded, self._read(work[n_single:])))
        # The cache's memory is an input of the trace. The first write makes it, in all layers, so the very first step
        # of an engine is always read without the trace.
        has_memory = bool(self.cache.layers[0].memory)
        if self.trace is not None and n_single == len(self.running) and has_memory:
            return self.trace(self._next_tokens())
        return self._read(work)

    def _next_tokens(self) -> list[tuple[int, int, int, int]]:
        """Return the next token of each running request, the token before it, its position and its row."""
        return [(request.pending(1)[0], request.previous, request.n_read, request.row) for request in self.running]

    def _read(self, work: Sequence[tuple[Request, int]]) -> torch.Tensor:
        """As `_forward`, but always by the model itself, without a CUDA graph or a trace."""
        tokens: list[int] = []
        previous: list[int] = []
        positions: list[int] = []
        rows: list[int] = []
        wanted: list[int] = []  # indices in `tokens` of the tokens whose logits are wanted
        ends: list[int] = []  # index in `wanted` of the last token of each request
        parts: list[Part] = []
        for request, n in work:
            start = request.n_read
            new = request.pending(n)
            tokens += new
            previous += [request.previous, *new[:-1]]
            positions += range(start, start + n)
            rows += [request.row] * n
            n_wanted = n if request.scores_prompt else 1
            wanted += range(len(tokens) - n_wanted, len(tokens))
            ends.append(len(wanted) - 1)
            last = parts[-1] if parts else None
            if last is not None and last.n_tokens == n and last.first_row + last.n_rows == request.row:
                # Neighbouring rows that read equally many tokens attend together.
                parts[-1] = Part(last.first_row, last.n_rows + 1, n, max(last.length, start + n))
            else:
                parts.append(Part(request.row, 1, n, start + n))
        device = self.model.device
        inputs_4N = torch.tensor([tokens, previous, positions, rows]).to(device, non_blocking=True)
        idx_N, previous_N, positions_N, rows_N = inputs_4N.unbind()
        context = CacheBatch(self.cache.layers, parts, rows_N, positions_N, previous_N)
        wanted_R = None if len(wanted) == len(tokens) else torch.tensor(wanted, device=device)
        logits_RV = self.model(idx_N, context=context, wanted_R=wanted_R)
        for (request, n), end in zip(work, ends, strict=True):
            if request.scores_prompt:
                score_prompt(request, logits_RV[end + 1 - n : end + 1])
        return logits_RV if len(wanted) == len(work) else logits_RV[ends]

    def run(self, requests: Iterable[Request]) -> None:
        """Finish all of `requests`, in batches; results are in their `output`, `mask` and `finish_reason`.

        Raises ValueError if the model's logits are not finite.
        """
        requests = list(requests)
        for request in requests:
            self.check(request)
        try:
            for request in requests:
                self.add(request)
            while any(request.finish_reason is None for request in requests):
                self.step()
            for request in requests:
                request.raise_if_broken()
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
            request.raise_if_broken()
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
            Request(
                tokens,
                max_tokens=max_tokens,
                temperature=temperature,
                top_k=top_k,
                seed=seed,
                sample=sample,
                **settings,
            )
            for sample in range(num_samples)
        ]
        padding = (self.tokenizer.special_tokens.get("<|assistant_end|>", 0), 0)
        try:
            for request in requests:
                self.add(request)
            samples = [self._follow(request) for request in requests]
            for cells in itertools.zip_longest(*samples, fillvalue=padding):
                yield [token for token, _ in cells], [sampled for _, sampled in cells]
        finally:
            for request in requests:
                self.abort(request)

    def _follow(self, request: Request) -> Iterator[tuple[int, int]]:
        """Yield a request's tokens as they come, each with 1 if it was sampled, and then the token that ended it."""
        for index in itertools.count():
            while len(request.output) <= index and request.finish_reason is None:
                self.step()
            if index == len(request.output):
                break
            yield request.output[index], request.mask[index]
        request.raise_if_broken()
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
        """Return the likeliest tokens after each prompt."""
        requests = [Request(tokens, max_tokens=max_tokens, temperature=0.0) for tokens in prompts]
        self.run(requests)
        return [request.output for request in requests]

    def _extend(self, requests: Sequence[Request], logits_BV: torch.Tensor) -> list[Update]:
        """Draw the next token of each request, and append it and what a tool answers to it."""
        uniform = [request.rng.random() if request.temperature > 0 else 0.0 for request in requests]
        tokens = sample(logits_BV, requests, uniform).tolist()
        scores = score(logits_BV, requests, tokens)
        updates = []
        for request, token, token_score in zip(requests, tokens, scores, strict=True):
            new = self._accept(request, token)
            # Where the prompt is scored, so is the token that ended the answer: clients that score a text ask for one
            # token after it, and count on its entry (lm-evaluation-harness, `local-completions`).
            is_end = request.stop_token is not None and request.prompt_logprobs
            if token_score is not None and (new or is_end):
                request.scores.append(token_score)
            events = self._decode(request, new) if request.decoder is not None else []
            self.n_output_tokens += len(new)
            updates.append(Update(request, new, events, request.finish_reason))
        return updates

    def _accept(self, request: Request, token: int) -> list[int]:
        """Append a sampled token and what a tool answers to it; return what was appended."""
        if token == BROKEN:
            # Only this request ends. Blocks that it saved may hold NaN, so the prefix cache is emptied.
            request.finish_reason = "error"
            self.forget()
            return []
        limit = self.context if request.max_tokens is None else request.max_tokens
        room = min(limit, self.context - len(request.tokens)) - len(request.output)
        if room > 0 and (token in self._stop_tokens or token in request.stop_token_ids):
            request.finish_reason = "stop"
            request.stop_token = token
            return []
        new = [token, *self._calculator.feed(request, token)][:room]
        request.output += new
        request.mask += [1] + [0] * (len(new) - 1)
        if len(new) == room:
            request.finish_reason = "length"
        return new

    def _decode(self, request: Request, new: Sequence[int]) -> list[Event]:
        """Return the text and tool calls that new tokens make; ends the request after one of its `stop` texts."""
        events = [event for token in new for event in request.decoder.feed(token)]
        if request.decoder.stopped and request.finish_reason is None:
            request.finish_reason = "stop"
        if request.finish_reason is not None:
            events += request.decoder.finish()
        return events

    def _save_prefix(self, request: Request) -> None:
        """Copy what was read of a request to the prefix cache: all of its prompt, and its answer now and then."""
        if request.finish_reason == "error":
            return
        n_unsaved = request.n_read - BLOCK * len(request.chain)
        if request.state == "prefill" or n_unsaved >= SAVE_EVERY or request.finish_reason is not None:
            read = [*request.tokens, *request.output][: request.n_read]
            self.cache.prefixes.save(request.row, read, request.chain)
