"""Decoding on a GPU, replayed as a CUDA graph.

A decoding step is hundreds of tiny kernels, and launching them takes longer than running them. A CUDA graph holds all
launches of a step and replays them at once, but for fixed shapes and fixed addresses only. So there is one graph for
each batch shape in powers of two: so many rows of so many slots. Rows that fill up a batch are idle: they compute on
token 0, and their results are dropped.

On CPU, cpu_trace.py takes this part.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch

from nanochat.cache_batch import CacheBatch, Part
from nanochat.kv_cache import KVCache
from nanochat.language_model import LanguageModel


class Graph(NamedTuple):
    """A captured step: `replay` reads `inputs_4N` and writes `logits_NV`."""

    graph: torch.cuda.CUDAGraph
    inputs_4N: torch.Tensor
    logits_NV: torch.Tensor


class CudaGraphs:
    """Continues the first rows of a cache by one token each."""

    def __init__(self, model: LanguageModel, cache: KVCache) -> None:
        self.model = model
        self.cache = cache
        self._graphs: dict[tuple[int, int], Graph] = {}
        self._version = -1  # of the cache's memory, whose addresses are in the graphs

    def __call__(self, next_tokens: Sequence[tuple[int, int, int, int]]) -> torch.Tensor:
        """Return logits (N, V), those of idle rows at the end.

        next_tokens: for each row the next token, the token before it, its position and its row.
        """
        n_rows = 1 << (len(next_tokens) - 1).bit_length()
        idle = [(0, -1, 0, row) for row in range(len(next_tokens), n_rows)]
        inputs_4N = torch.tensor([*next_tokens, *idle]).T.contiguous().to(self.model.device, non_blocking=True)
        length = 1 + max(position for _, _, position, _ in next_tokens)
        self.cache.reserve(n_rows, length)
        if self._version != self.cache.version:
            self._graphs.clear()
            self._version = self.cache.version
        length = 1 << (length - 1).bit_length()
        shape = (n_rows, length)
        if shape not in self._graphs:
            self._graphs[shape] = self._capture(inputs_4N, length)
        graph = self._graphs[shape]
        graph.inputs_4N.copy_(inputs_4N)
        graph.graph.replay()
        return graph.logits_NV

    def _step(self, inputs_4N: torch.Tensor, length: int) -> torch.Tensor:
        idx_N, previous_N, positions_N, rows_N = inputs_4N.unbind()
        parts = [Part(first_row=0, n_rows=len(idx_N), n_tokens=1, length=min(length, self.cache.n_slots - 1))]
        context = CacheBatch(self.cache.layers, parts, rows_N, positions_N, previous_N)
        return self.model(idx_N, context=context)

    def _capture(self, inputs_4N: torch.Tensor, length: int) -> Graph:
        static_4N = inputs_4N.clone()
        # Libraries set themselves up at their first call, which must happen outside of a graph.
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self._step(static_4N, length)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        # A server process runs several engines, each on its own thread (serve/loop.py). In the default mode, "global",
        # this capture would break when another thread allocates memory.
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            logits_NV = self._step(static_4N, length)
        return Graph(graph, static_4N, logits_NV)
