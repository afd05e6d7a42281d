"""Decoding on CPU, replayed as a trace: what cuda_graph.py does on a GPU.

A step of a small model is two hundred operations of a few microseconds each, and asking for them from Python takes as
long as doing them. A trace is the list of these operations, recorded once and then run without Python: the same
operations in the same order, so the same bits. It saves a d4 a third of its time (dev/LOG.md).

It is TorchScript, which PyTorch keeps but no longer develops. The successors, torch.compile and AOTInductor, need a C++
compiler and half a minute at their first use, and fuse operations, which changes bits; a trace takes some milliseconds.
`torch.jit.trace` would keep every trace, and the weights in it, until the process ends; the functions that it is made
of give a trace that is freed with its engine.

The trace must fit any number of rows and slots, so all that changes from step to step is a tensor among its inputs:
tokens, the cache's memory, and the views of it that attention reads. Sizes that are taken from these tensors while
recording are recorded as well.

Shapes: as in kv_cache.py.
"""

import warnings
from collections.abc import Sequence
from typing import Any

import torch

from nanochat.cache_batch import CacheBatch, Part
from nanochat.kv_cache import KVCache, LayerCache
from nanochat.language_model import LanguageModel
from nanochat.packed import Int8Product, OnednnProduct, PlainProduct


def traceable(model: LanguageModel) -> bool:
    """Return whether each decoding step of this model is the same list of operations, whatever is read.

    It is not where experts are chosen in Python, nor with PyTorch's own products, which pad their rows.
    """
    packed = any(isinstance(module, OnednnProduct | Int8Product) for module in model.modules())
    plain = any(isinstance(module, PlainProduct) for module in model.modules())
    return model.device.type == "cpu" and model.graphs and packed and not plain


class TracedLayer(LayerCache):
    """A layer of the cache whose memory and views are inputs of the trace."""

    def __init__(self, layer: LayerCache, tensors: Sequence[torch.Tensor]) -> None:
        super().__init__(layer.ring)
        keys_RSKD, values_RSKD, self.keys_GDS, self.values_GSD = tensors
        self.memory = (keys_RSKD, values_RSKD)

    def n_visible(self, length: int) -> int:
        """Return how many slots the views show: an operation of the trace."""
        return self.keys_GDS.size(2)

    def views(self, first_row: int, n_rows: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return keys (G, D, S) and values (G, S, D) of the rows that decode."""
        return self.keys_GDS, self.values_GSD


class Trace:
    """Continues the first rows of a cache by one token each."""

    def __init__(self, model: LanguageModel, cache: KVCache) -> None:
        self.model = model
        self.cache = cache
        self._weights = [module.weight for module in model.modules() if isinstance(module, OnednnProduct)]
        self._recorded: Any = None

    def __call__(self, next_tokens: Sequence[tuple[int, int, int, int]]) -> torch.Tensor:
        """Return logits (N, V).

        next_tokens: for each row the next token, the token before it, its position and its row.
        """
        length = 1 + max(position for _, _, position, _ in next_tokens)
        tensors = [torch.tensor(next_tokens).T]
        for layer in self.cache.layers:
            tensors += layer.memory
            tensors += layer.views(0, len(next_tokens), length)
        tensors += self._weights  # oneDNN's layout cannot be a constant of a trace
        if self._recorded is None:
            self._recorded = self._record(tensors)
        with torch.jit.optimized_execution(False):  # the optimiser would fuse, after some slow steps of profiling
            return self._recorded(*tensors)

    def _record(self, tensors: Sequence[torch.Tensor]) -> Any:
        # The tracer warns of every size that Python compares. The filter is set for good: `warnings.catch_warnings`
        # puts the process's filters aside and back, which two engines (`--replicas 2`) would do across each other.
        warnings.filterwarnings("ignore", category=torch.jit.TracerWarning)
        graph, *_ = torch._C._create_graph_by_tracing(self._decode, tuple(tensors), lambda variable: "", True, False)
        return torch._C._create_function_from_graph("decode", graph)

    def _decode(self, inputs_4N: torch.Tensor, *tensors: torch.Tensor) -> torch.Tensor:
        """Run the step that is recorded.

        The tracer knows an input wherever it is read, so weights need not be handed on.
        """
        idx_N, previous_N, positions_N, rows_N = inputs_4N.unbind()
        layers = [TracedLayer(layer, tensors[4 * i : 4 * i + 4]) for i, layer in enumerate(self.cache.layers)]
        # All rows and slots: a part of -1 rows has as many as there are tokens.
        part = Part(first_row=0, n_rows=-1, n_tokens=1, length=self.cache.context + 1)
        context = CacheBatch(layers, [part], rows_N, positions_N, previous_N)
        return self.model(idx_N, context=context)
