"""One forward of a model over what an engine step reads, and on a GPU the replay of decoding as a CUDA graph.

On CPU decoding is replayed, too, as a trace (cpu_trace.py).

Decoding one token per row is hundreds of tiny kernels, and launching them takes longer than running them. A CUDA graph
holds all launches of a step and replays them at once, but for fixed shapes: so many rows of so many slots. One graph is
captured for each shape in powers of two; the rows that fill up a batch are idle and their results are dropped. Idle
rows write to the cache too, so all running requests come along, those that are still being read included: what is
written of those is overwritten when they are read.
"""

import itertools
from collections.abc import Sequence

import torch

from nanochat.cpu_trace import Trace, traceable
from nanochat.kv_cache import CacheBatch, KVCache, Part
from nanochat.language_model import LanguageModel
from nanochat.scheduler import Request


def _next(running: Sequence[Request]) -> list[tuple[int, int, int, int]]:
    """Return of each request the token to be read next, the one before it, its position and its row."""
    return [(request.pending(1)[0], request.previous, request.n_read, request.slot) for request in running]


class Forward:
    """The model over the next tokens of requests; request i of those that run has row i of the cache."""

    def __init__(self, model: LanguageModel, cache: KVCache) -> None:
        self.model = model
        self.cache = cache
        self._here = torch.empty(0, device=cache.device)
        self.trace = Trace(model, cache) if traceable(model) else None
        self.graphs = cache.device.type == "cuda" and model.graphs
        self._graphs: dict[tuple[int, int], tuple[torch.cuda.CUDAGraph, torch.Tensor, torch.Tensor]] = {}
        self._version = -1  # of the cache's memory, whose addresses are in the graphs

    def __call__(self, running: Sequence[Request], work: Sequence[tuple[Request, int]]) -> torch.Tensor:
        """Return logits (B, V) after so many more tokens of each request; those that read one token come first."""
        n_decode = sum(n == 1 for _, n in work)
        with torch.cuda.device_of(self._here):  # kernels and graphs go to the current device
            if self.trace and n_decode == len(work) == len(running) and self.cache.layers:
                return self.trace(torch.tensor(_next(running)).T, 1 + max(request.n_read for request in running))
            if not self.graphs or not n_decode:
                return self._read(work)
            decoded = self._replay(running)[[request.slot for request, _ in work[:n_decode]]]
            if n_decode == len(work):
                return decoded
            return torch.cat((decoded, self._read(work[n_decode:])))

    def _read(self, work: Sequence[tuple[Request, int]]) -> torch.Tensor:
        tokens: list[int] = []
        previous: list[int] = []
        positions: list[int] = []
        rows: list[int] = []
        parts: list[Part] = []
        for request, n in work:
            start = request.n_read
            row = request.slot
            new = request.pending(n)
            tokens += new
            previous += (request.previous, *new[:-1])
            positions += range(start, start + n)
            rows += [row] * n
            if parts and n == parts[-1].n_tokens and row == parts[-1].first_row + parts[-1].n_rows:
                last = parts.pop()
                parts.append(Part(last.first_row, last.n_rows + 1, n, max(last.length, start + n)))
            else:
                parts.append(Part(row, 1, n, start + n))
        inputs_4N = torch.tensor((tokens, previous, positions, rows)).to(self.cache.device, non_blocking=True)
        return self._run(inputs_4N, parts)

    def _run(self, inputs_4N: torch.Tensor, parts: Sequence[Part]) -> torch.Tensor:
        """Return logits after the last token of each row; inputs: token, token before it, position and row."""
        idx_N, previous_N, positions_N, rows_N = inputs_4N.unbind()
        context = CacheBatch(self.cache, parts, rows_N, positions_N, previous_N)
        ends = list(itertools.accumulate(part.n_tokens for part in parts for _ in range(part.n_rows)))
        wanted_R = None if len(ends) == len(idx_N) else torch.tensor(ends, device=self.cache.device) - 1
        return self.model(idx_N, context=context, wanted_R=wanted_R)

    def _replay(self, running: Sequence[Request]) -> torch.Tensor:
        """Return logits after one more token of each row, (rows, V), idle rows included."""
        columns = _next(running)
        columns += [(0, 0, 0, row) for row in range(len(columns), 1 << (len(columns) - 1).bit_length())]
        inputs_4N = torch.tensor(columns).T.contiguous().to(self.cache.device, non_blocking=True)
        length = 1 + max(request.n_read for request in running)
        self.cache.reserve(len(columns), length)
        if self._version != self.cache.version:
            self._graphs.clear()
            self._version = self.cache.version
        shape = len(columns), 1 << (length - 1).bit_length()
        if shape not in self._graphs:
            self._graphs[shape] = self._capture(inputs_4N, shape)
        graph, static_4N, logits = self._graphs[shape]
        static_4N.copy_(inputs_4N)
        graph.replay()
        return logits

    def _capture(
        self, inputs_4N: torch.Tensor, shape: tuple[int, int]
    ) -> tuple[torch.cuda.CUDAGraph, torch.Tensor, torch.Tensor]:
        """Return a graph of one decoding step, the tensor that it reads and the logits that it writes."""
        rows, length = shape
        static_4N = inputs_4N.clone()
        parts = [Part(0, rows, 1, min(length, self.cache.n_slots - 1))]
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # once without capture: libraries set themselves up outside of the graph
            self._run(static_4N, parts)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        # One server process runs several engines, each on its own thread (serve/loop.py). With the default mode,
        # "global", whatever another thread does meanwhile that a capture forbids, such as allocating memory, would
        # break this one.
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            logits = self._run(static_4N, parts)
        return graph, static_4N, logits
