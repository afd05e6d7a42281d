"""A backend for torch.compile that counts: traced and split into forward and backward as for Inductor, run as it is."""

import contextlib
from collections.abc import Callable, Iterator
from unittest import mock

import torch
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch._inductor.decomposition import select_decomp_table


class GraphCount:
    """How many graphs were compiled, and how often graphs ran. A graph break makes two graphs of one."""

    def __init__(self) -> None:
        self.compiled = 0
        self.forget_runs()
        self.nodes: list[list[str]] = []  # of each graph that was compiled
        self.backend = aot_autograd(
            fw_compiler=self._compiler("forward"),
            bw_compiler=self._compiler("backward"),
            inference_compiler=self._compiler("inference"),
            # What to keep for the backward pass and what to compute again is decided here, as it is for Inductor.
            partition_fn=min_cut_rematerialization_partition,
            decompositions=select_decomp_table,
        )

    def forget_runs(self) -> None:
        """Count the runs of each kind of graph anew."""
        self.runs = {"forward": 0, "backward": 0, "inference": 0}

    def _compiler(self, kind: str) -> Callable[..., Callable[..., object]]:
        def compiler(graph: torch.fx.GraphModule, example_inputs: object) -> Callable[..., object]:
            self.compiled += 1
            self.nodes.append([str(node.target) for node in graph.graph.nodes])

            def run(arguments: list[torch.Tensor]) -> object:
                self.runs[kind] += 1
                values = list(arguments)
                arguments.clear()
                return graph(*values)

            run._boxed_call = True  # type: ignore[attr-defined]  # it takes a list, which it may empty
            return run

        return compiler

    @contextlib.contextmanager
    def instead_of_inductor(self) -> Iterator[None]:
        """Let torch.compile use this backend."""
        real = torch.compile

        def compile_with_this(*args: object, **kwargs: object) -> object:
            return real(*args, **{**kwargs, "backend": self.backend})

        with mock.patch.object(torch, "compile", compile_with_this):
            yield
