"""One forward of a model over rows of its cache; on a GPU decoding is replayed as a CUDA graph, one for each shape."""

from collections.abc import Sequence
from typing import Any

import torch

from nanochat.kv_cache import KVCache


class Forward:
    """The model over new tokens of neighbouring cache rows.

    On a GPU a step of decoding is bound by the launches of its kernels. A graph holds them all for a fixed shape: so
    many rows (a power of two, the others idle) of so many slots. It is captured at its first use, and again when the
    cache has moved.
    """

    def __init__(self, model: Any, cache: KVCache) -> None:
        self.model, self.cache = model, cache
        self._graphs: dict[tuple[int, int], tuple[torch.cuda.CUDAGraph, torch.Tensor, torch.Tensor]] = {}
        self._captured = -1  # the cache's version in the graphs

    def __call__(
        self, first_row: int, tokens: Sequence[Sequence[int]], starts: Sequence[int], previous: Sequence[int]
    ) -> torch.Tensor:
        """Logits (B, V) after the last of each row's tokens (equally many a row), which stand at start, start + 1, ...;
        previous: the token before each row's first, or -1."""
        B, T = len(tokens), len(tokens[0])
        length, graphed = max(starts) + T, self.cache.last_token.device.type == "cuda" and T == 1 and first_row == 0
        if graphed:
            rows = 1 << (B - 1).bit_length()
            self.cache.reserve(rows, length)
            pad = [0] * (rows - B)
            tokens, starts, previous = [*tokens, *([0] for _ in pad)], [*starts, *pad], [*previous, *pad]
        inputs = torch.tensor([[*row, start, last] for row, start, last in zip(tokens, starts, previous, strict=True)])
        inputs = inputs.to(self.cache.last_token.device, non_blocking=True)
        return self._replay(inputs, length)[:B] if graphed else self._run(inputs, first_row, length)

    def _run(self, inputs: torch.Tensor, first_row: int, length: int) -> torch.Tensor:
        """inputs: tokens, start and previous token of each row, (B, T + 2)."""
        B, T = inputs.size(0), inputs.size(1) - 2
        rows = self.cache.rows(first_row, first_row + B, length)
        rows.last_token_B.copy_(inputs[:, -1])
        positions_BT = inputs[:, -2:-1] + torch.arange(T, device=inputs.device)
        return self.model(inputs[:, :T], cache=rows, positions_BT=positions_BT, last_only=True)[:, -1]

    def _replay(self, inputs: torch.Tensor, length: int) -> torch.Tensor:
        if self._captured != self.cache.version:
            self._graphs.clear()
            self._captured = self.cache.version
        shape = len(inputs), 1 << (length - 1).bit_length()
        if shape not in self._graphs:
            static = inputs.clone()
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):  # libraries set themselves up outside of the graph
                self._run(static, 0, min(shape[1], self.cache.n_slots - 1))
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                logits = self._run(static, 0, min(shape[1], self.cache.n_slots - 1))
            self._graphs[shape] = graph, static, logits
        graph, static, logits = self._graphs[shape]
        static.copy_(inputs)
        graph.replay()
        return logits
