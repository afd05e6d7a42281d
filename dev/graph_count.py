"""What torch.compile makes for a GPU that is not here: its graphs, the bytes that their kernels move, and the kernels.

    graphs = GraphCount()
    with FakeGpu("H100"), graphs.instead_of_running():
        model(idx_BT, idx_BT).backward()
    for graph in graphs.compiled:
        graph.kind, graph.runs, graph.kernel_bytes

Dynamo and Inductor do all that they do on a machine with that GPU: they trace, split into forward and backward, decide
what is kept for the backward pass, and fuse operations into kernels. Their last step alone, loading the code, is
replaced: the graph is run operation by operation, on tensors without values. The code itself needs Triton and is
written if it is asked for; everything else is found without it.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from types import SimpleNamespace
from unittest import mock

import torch
from torch._inductor.graph import GraphLowering
from torch._inductor.scheduler import ExternKernelSchedulerNode, NopKernelSchedulerNode, Scheduler
from torch._inductor.utils import Placeholder


@dataclass
class Graph:
    """A graph that was compiled, and how often it ran. A graph break makes two of one."""

    kind: str  # forward, backward, or inference: without gradients
    operators: list[str]
    kernel_bytes: int  # read and written by the kernels that Inductor makes; products and attention are not among them
    sources: dict[str, str] = field(default_factory=dict)  # Python modules in Triton's language, by a name that tells
    runs: int = 0


class GraphCount:
    """Notes the graphs that torch.compile makes, and how often each runs."""

    def __init__(self, with_sources: bool = False) -> None:
        """with_sources: have the kernels written, too."""
        self.with_sources = with_sources
        self.compiled: list[Graph] = []

    def runs(self, kind: str) -> int:
        """Return how often graphs of a kind ran."""
        return sum(graph.runs for graph in self.compiled if graph.kind == kind)

    def kernel_bytes(self, *kinds: str) -> int:
        """Return the bytes that the kernels of graphs of these kinds moved in all of their runs."""
        return sum(graph.kernel_bytes * graph.runs for graph in self.compiled if graph.kind in kinds)

    def forget_runs(self) -> None:
        """Count runs anew."""
        for graph in self.compiled:
            graph.runs = 0

    @contextlib.contextmanager
    def instead_of_running(self) -> Iterator[None]:
        """Let torch.compile count, within a FakeGpu."""

        def load(lowering: GraphLowering) -> SimpleNamespace:
            """Stands in for GraphLowering.compile_to_module, whose `call` runs the code that was made."""
            counted = self._count(lowering)

            def call(arguments: list[torch.Tensor]) -> object:
                counted.runs += 1
                values = list(arguments)
                arguments.clear()  # so that the caller keeps nothing alive, as in the code
                return lowering.module(*values)

            return SimpleNamespace(call=call)

        with (
            mock.patch.object(GraphLowering, "compile_to_module", load),
            mock.patch("torch._inductor.scheduler.has_triton", lambda: True),
            # Both would compute on the GPU: they trace patterns of attention, which our graphs do not have, and
            # find constants by running what makes them.
            mock.patch("torch._inductor.fx_passes.joint_graph.lazy_init", lambda *device: None),
            torch._inductor.config.patch(joint_graph_constant_folding=False),
            # What was compiled for another GPU, or read from a file, would not be counted.
            torch._inductor.config.patch(fx_graph_cache=False),
            torch._inductor.config.patch(profile_bandwidth=self.with_sources),  # kernels then say what they move
            torch._functorch.config.patch(enable_autograd_cache=False),
        ):
            yield

    def _count(self, lowering: GraphLowering) -> Graph:
        sources: dict[str, str] = {}
        if self.with_sources:
            lowering.codegen()
            for source, name in lowering.wrapper_code.src_to_kernel.items():
                source = source.replace(str(Placeholder.KERNEL_NAME), "triton_")
                sources[name] = source.replace(str(Placeholder.DESCRIPTIVE_NAME), name)
        else:
            lowering.init_wrapper_code()
            lowering.scheduler = Scheduler(lowering.operations)
        kind = "inference" if lowering.is_inference else "backward" if lowering.is_backward else "forward"
        graph = Graph(
            kind=kind,
            operators=[str(node.target) for node in lowering.module.graph.nodes],
            kernel_bytes=kernel_bytes(lowering.scheduler),
            sources=sources,
        )
        self.compiled.append(graph)
        return graph


def kernel_bytes(scheduler: Scheduler) -> int:
    """Return the bytes that generated kernels read and write, each buffer of a kernel once, as if caches held it."""
    total = 0
    for node in scheduler.nodes:
        if not isinstance(node, (ExternKernelSchedulerNode, NopKernelSchedulerNode)):
            total += node.get_read_write_buffers_sizes()
    return total
