"""One forward of a model over what a step reads. Decoding is many small operations, each of which Python asks for: on a
GPU it is replayed as a CUDA graph, one for each shape, and on CPU as a trace, one for all shapes."""

import copy
import functools
import itertools
import warnings
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from nanochat.kv_cache import CacheBatch, KVCache, Part
from nanochat.packed import PackedGPT
from nanochat.request import Request


@functools.cache
def _traces_of(*shape: Any) -> list[Any]:
    """The trace that all models of a shape share, once there is one: TorchScript never frees it, weights are inputs."""
    return []


class Forward:
    """The model over the next tokens of requests; request i of those that run has row i of the cache.

    On a GPU a step of decoding is bound by the launches of its kernels. A graph holds them all for a fixed shape: so
    many rows (a power of two, those at the end idle) of so many slots. It is captured at its first use, and again when
    the cache has moved. Idle rows write to their slots too, so all rows that hold something come along: what is written
    of those that are still being read is written again.
    """

    def __init__(self, model: Any, cache: KVCache) -> None:
        self.model, self.cache = model, cache
        self.graphs = cache.device.type == "cuda" and getattr(model, "graphs", True)
        self.flat = bool(cache.windows)  # whether it reads unequally many tokens of rows at once (see engine.py)
        self._graphs: dict[tuple[int, int], tuple[torch.cuda.CUDAGraph, torch.Tensor, torch.Tensor]] = {}
        self._captured = -1  # the cache's version in the graphs
        on_cpu = cache.device.type == "cpu" and isinstance(model, PackedGPT)
        self.traces = on_cpu and all(each.rows == 1 for each in model.products)
        if self.traces:
            shape = model.config, model.dtype, model.products[0].form, cache.invariant, cache.context, *cache.rings
            self._traces, self._weights = _traces_of(*shape), dict(model.named_buffers())

    def __call__(self, running: Sequence[Request], work: Sequence[tuple[Request, int]]) -> torch.Tensor:
        """Logits (B, V) of each request in `work` after so many more of its tokens; those of one token come first."""
        ones = [request.slot for request, n in work if n == 1]
        if not ones or not (self.graphs or (self.traces and len(ones) == len(running) and self.cache.layers)):
            return self._read(work)
        columns = [(request.pending(1)[0], request.previous, request.n_read, request.slot) for request in running]
        length = 1 + max(request.n_read for request in running)
        if self.traces:
            return self._run_trace(torch.tensor(columns).T, self.cache.views(len(columns), length))
        columns += [(0, 0, 0, row) for row in range(len(columns), 1 << (len(columns) - 1).bit_length())]
        inputs_4N = torch.tensor(columns).T.contiguous().to(self.cache.device, non_blocking=True)
        self.cache.reserve(len(columns), length)
        logits = [self._replay(inputs_4N, length)[ones]]
        if len(ones) < len(work):
            logits.append(self._read(work[len(ones) :]))
        return torch.cat(logits)

    def _read(self, work: Sequence[tuple[Request, int]]) -> torch.Tensor:
        inputs: tuple[list[int], ...] = [], [], [], []
        parts: list[Part] = []
        for request, n in work:
            tokens, start, row = request.pending(n), request.n_read, request.slot
            columns = tokens, (request.previous, *tokens[:-1]), range(start, start + n), [row] * n
            for line, new in zip(inputs, columns, strict=True):
                line.extend(new)
            part = Part(row, 1, n, start + n)
            if parts and n == parts[-1].n_tokens and row == parts[-1].first_row + parts[-1].n_rows:
                last = parts.pop()
                part = Part(last.first_row, last.n_rows + 1, n, max(last.length, start + n))
            parts.append(part)
        return self._run(torch.tensor(inputs).to(self.cache.device, non_blocking=True), parts)

    def _run(self, inputs_4N: torch.Tensor, parts: Sequence[Part]) -> torch.Tensor:
        """Logits after the last token of each row. inputs: of each token itself, the one before it (-1 = none), its
        position and its row."""
        if self.flat:
            idx_N, previous_N, positions_N, rows_N = inputs_4N.unbind()
            batch = CacheBatch(self.cache, parts, rows_N, positions_N)
            ends = list(itertools.accumulate(part.n_tokens for part in parts for _ in range(part.n_rows)))
            wanted_R = None if len(ends) == len(idx_N) else torch.tensor(ends, device=self.cache.device) - 1
            return self.model(idx_N, previous_N, positions_N, batch, wanted_R)
        logits = []
        for part, part_4N in zip(parts, inputs_4N.split([part.n_rows * part.n_tokens for part in parts], 1)):
            idx_BT, previous_BT, positions_BT, _ = part_4N.reshape(4, part.n_rows, part.n_tokens)
            rows = self.cache.rows(part.first_row, part.first_row + part.n_rows, part.length)
            rows.last_token_B.copy_(previous_BT[:, 0])
            logits.append(self.model(idx_BT, cache=rows, positions_BT=positions_BT, last_only=True)[:, -1])
        return torch.cat(logits)

    def _run_trace(self, inputs_4N: torch.Tensor, memory: list[torch.Tensor]) -> torch.Tensor:
        """One token of each row, (rows, V), by the operations that it takes in Python, so with the same bits."""
        inputs = inputs_4N, tuple(memory), tuple(self._weights.values())
        if not self._traces:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                self._traces.append(torch.jit.trace(self._decode, inputs, check_trace=False, _store_inputs=False))
            self._have_model_read(self._weights.values())
        with torch.jit.optimized_execution(False):
            return self._traces[0](*inputs)

    def _decode(self, inputs_4N: torch.Tensor, memory: Sequence[torch.Tensor], weights: Iterable[torch.Tensor]) -> Any:
        """What is traced: a function of tensors alone."""
        self._have_model_read(weights)
        idx_N, previous_N, positions_N, rows_N = inputs_4N.unbind()
        cache = copy.copy(self.cache)
        cache.layers = list(zip(memory[::2], memory[1::2], strict=True))
        batch = CacheBatch(cache, [Part(0, -1, 1, cache.context or 1 << 30)], rows_N, positions_N)
        return self.model(idx_N, previous_N, positions_N, batch)

    def _have_model_read(self, weights: Iterable[torch.Tensor]) -> None:
        for name, weight in zip(self._weights, weights, strict=True):
            owner, _, attribute = name.rpartition(".")
            setattr(self.model.get_submodule(owner), attribute, weight)

    def _replay(self, inputs_4N: torch.Tensor, length: int) -> torch.Tensor:
        """One token of each row, (rows, V), idle ones included."""
        if self._captured != self.cache.version:
            self._graphs.clear()
            self._captured = self.cache.version
        shape = inputs_4N.size(1), 1 << (length - 1).bit_length()
        if shape not in self._graphs:
            static, parts = inputs_4N.clone(), [Part(0, shape[0], 1, min(shape[1], self.cache.n_slots - 1))]
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):  # libraries set themselves up outside of the graph
                self._run(static, parts)
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                logits = self._run(static, parts)
            self._graphs[shape] = graph, static, logits
        graph, static, logits = self._graphs[shape]
        static.copy_(inputs_4N)
        graph.replay()
        return logits
