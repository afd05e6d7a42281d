"""A GPU on paper, in a process that has loaded null_cuda.py's library: what it says of itself, and empty tensors.

    with FakeGpu("H100") as gpu, gpu.watch:
        model = build_model(config, gpu.device, train=True)     # its parameters: FakeTensors on cuda:0
        model(idx_BT, idx_BT).backward()                        # shapes, dtypes and devices, in milliseconds
    gpu.watch.on_cpu, gpu.watch.reads                           # what the CPU computed, and what waited for the GPU

PyTorch's FakeTensorMode follows shapes, dtypes and devices through every operation and computes nothing. Around it
stand three things. `torch.cuda` answers as the named GPU would. A dispatch mode looks at every operation and, where
Python asks a tensor for a number, answers one. Kernels and packages that only a GPU's machine has get stand-ins that
know shapes alone.
"""

import contextlib
import sys
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch._dynamo.device_interface import CudaInterface
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from nanochat import attention

DEVICE = torch.device("cuda", 0)


def properties(
    name: str, capability: tuple[int, int], gigabytes: int, multiprocessors: int, threads: int, shared: int, cache: int
) -> SimpleNamespace:
    """Return what a GPU says of itself. Name, capability and memory are for us; the rest is what Inductor asks for.

    threads and shared: of one multiprocessor, KB of shared memory. cache: MB in L2.
    """
    return SimpleNamespace(
        name=name,
        major=capability[0],
        minor=capability[1],
        total_memory=gigabytes << 30,
        multi_processor_count=multiprocessors,
        max_threads_per_multi_processor=threads,
        max_threads_per_block=1024,
        regs_per_multiprocessor=65536,
        warp_size=32,
        shared_memory_per_multiprocessor=shared << 10,
        shared_memory_per_block_optin=(shared - 1) << 10,
        shared_memory_per_block=48 << 10,
        L2_cache_size=cache << 20,
        gcnArchName="",  # AMD's
    )


GPUS = {
    "H100": properties("NVIDIA H100 80GB HBM3", (9, 0), 80, 132, threads=2048, shared=228, cache=50),
    "RTX 4090": properties("NVIDIA GeForce RTX 4090", (8, 9), 24, 128, threads=1536, shared=100, cache=72),
}

aten = torch.ops.aten
PRODUCTS = (aten.mm, aten.bmm, aten.addmm, aten.baddbmm, aten._scaled_mm, aten.linear, torch.ops.nanochat.flash3)

# --- stand-ins

torch.library.define("fake_gpu::attention", "(Tensor q, Tensor k, Tensor v) -> (Tensor, Tensor)")
torch.library.define(
    "fake_gpu::attention_backward", "(Tensor dy, Tensor q, Tensor k, Tensor v) -> (Tensor, Tensor, Tensor)"
)


@torch.library.register_fake("fake_gpu::attention")
def _(q_BTHD, k_BTKD, v_BTKD):
    B, T, H, _ = q_BTHD.shape
    return torch.empty_like(q_BTHD), q_BTHD.new_empty((B, H, T), dtype=torch.float32)


@torch.library.register_fake("fake_gpu::attention_backward")
def _(dy_BTHD, q_BTHD, k_BTKD, v_BTKD):
    return torch.empty_like(q_BTHD), torch.empty_like(k_BTKD), torch.empty_like(v_BTKD)


def _keep(ctx, inputs, output):
    ctx.save_for_backward(*inputs, *output)  # as fused kernels do: q, k, v, their output and the log-sum-exps


def _attention_backward(ctx, dy_BTHD, _):
    q_BTHD, k_BTKD, v_BTKD, _, _ = ctx.saved_tensors
    return torch.ops.fake_gpu.attention_backward(dy_BTHD, q_BTHD, k_BTKD, v_BTKD)


torch.library.register_autograd("fake_gpu::attention", _attention_backward, setup_context=_keep)


def flex_attention(q_BHTD, k_BKTD, v_BKTD, block_mask, enable_gqa):
    """The interface of FlexAttention as attention.py calls it; the real one would be compiled by Inductor."""
    assert enable_gqa and block_mask.kv_indices.device.type == "cuda"
    assert block_mask.shape[-2:] == (q_BHTD.size(2), k_BKTD.size(2)), "a mask of another length"
    return torch.ops.fake_gpu.attention(q_BHTD.transpose(1, 2), k_BKTD, v_BKTD)[0].transpose(1, 2)


def scaled_dot_product_attention(q_BHTD, k_BKSD, v_BKSD, attn_mask=None, is_causal=False):
    """PyTorch's own kernels, as attention.py and cached_attention.py call them."""
    assert q_BHTD.shape[:2] == k_BKSD.shape[:2] == v_BKSD.shape[:2], "heads are repeated before the call"
    assert attn_mask is None or (attn_mask.device.type == "cuda" and not is_causal)
    return torch.ops.fake_gpu.attention(q_BHTD.transpose(1, 2), k_BKSD, v_BKSD)[0].transpose(1, 2)


class NullEvent:
    """A torch.cuda.Event: between any two of them, one millisecond passes."""

    def __init__(self, enable_timing: bool) -> None:
        pass

    def record(self) -> None:
        pass

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, later: "NullEvent") -> float:
        return 1.0


def apply_by_replacing(self: torch.nn.Module, convert: Any, recurse: bool = True) -> torch.nn.Module:
    """Module._apply, behind `to` and `to_empty`: PyTorch's own swaps contents, which FakeTensors refuse."""
    for module in self.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                converted = convert(parameter.detach())
                module._parameters[name] = torch.nn.Parameter(converted, requires_grad=parameter.requires_grad)
    return self


# --- the GPU


class Watch(TorchDispatchMode):
    """Sees every operation: notes what the CPU computes, where Python waits for the GPU, and what is sent to others.

    Where Python asks a tensor for a number, it gets 1.0, 0 or True: losses are then finite, counts are those
    of nobody (no rank is out of memory), and comparisons hold.
    """

    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()
        self.forget()

    def forget(self) -> None:
        """Begin anew."""
        self.on_cpu: list[str] = []  # operations that gave a CPU tensor of more than one number
        self.reads: list[str] = []  # operations that copied from the GPU
        self.sent: list[tuple[Any, ...]] = []  # collectives: name, and dtype and shape of each tensor
        self.products: set[torch.dtype] = set()  # dtypes that matrix products read

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = str(function)
        inputs = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        if name.startswith("c10d."):
            self.sent.append((name, *((str(x.dtype), tuple(x.shape)) for x in inputs)))
        if function.overloadpacket in PRODUCTS:
            self.products.update(x.dtype for x in inputs if x.dim() > 1 and x.numel() > 1)
        on_gpu = [x for x in inputs if x.device.type == "cuda"]
        if function.overloadpacket in (aten._local_scalar_dense, aten.item):
            if on_gpu:
                self.reads.append(name)
            (asked,) = inputs
            if asked.dtype == torch.bool:
                return True
            return 1.0 if asked.dtype.is_floating_point else 0
        if function.overloadpacket is aten.to:
            # Under inference_mode `to` arrives whole. FakeTensorMode knows its parts: it would copy constants for real.
            outputs = function.decompose(*args, **kwargs)
        else:
            outputs = function(*args, **kwargs)
        for x in tree_leaves(outputs):
            if isinstance(x, torch.Tensor) and x.device.type == "cpu":
                if on_gpu:
                    self.reads.append(name)
                elif x.numel() > 1:
                    self.on_cpu.append(name)
        return outputs


class NeverInitialize(FakeTensorMode):
    """FakeTensorMode that does not make tensors on a real GPU first, although `torch.cuda` says that there is one."""

    avoid_device_init = True


class FakeGpu(contextlib.ExitStack):
    """A context in which cuda:0 is the named GPU, and all tensors are without values.

    Python may ask tensors for numbers inside of `with gpu.watch:` only.
    """

    def __init__(self, name: str = "H100") -> None:
        super().__init__()
        self.device = DEVICE
        self.properties = GPUS[name]
        self.watch = Watch()

    def __enter__(self) -> "FakeGpu":
        super().__enter__()
        gpu = self.properties
        for attribute, value in {
            "is_available": lambda: True,
            "device_count": lambda: 1,
            "current_device": lambda: 0,
            "_lazy_init": lambda: None,
            "get_rng_state": lambda device=None: torch.zeros(16, dtype=torch.uint8),
            "set_rng_state": lambda state, device=None: None,
            "_exchange_device": lambda index: 0,
            "_maybe_exchange_device": lambda index: 0,
            "set_device": lambda device: None,
            "synchronize": lambda device=None: None,
            "empty_cache": lambda: None,
            "reset_peak_memory_stats": lambda device=None: None,
            "max_memory_allocated": lambda device=None: 0,
            "memory_allocated": lambda device=None: 0,
            "memory_reserved": lambda device=None: 0,
            "mem_get_info": lambda device=None: (gpu.total_memory, gpu.total_memory),
            "get_device_name": lambda device=None: gpu.name,
            "get_device_capability": lambda device=None: (gpu.major, gpu.minor),
            "get_device_properties": lambda device=None: gpu,
            "Event": NullEvent,
        }.items():
            self.enter_context(mock.patch.object(torch.cuda, attribute, value))
        # torch.compile has copies of some of them.
        for interface in (CudaInterface, CudaInterface.Worker):
            for attribute, value in {
                "is_available": lambda: True,
                "current_device": lambda: 0,
                "get_device_properties": lambda device=None: gpu,
            }.items():
                self.enter_context(mock.patch.object(interface, attribute, staticmethod(value), create=True))
        self.enter_context(mock.patch.object(torch.nn.Module, "_apply", apply_by_replacing))
        # FlashAttention-3 is installed on Hopper. Our operator around it knows the shapes, so nobody looks inside.
        interface = ModuleType("flash_attn_interface") if gpu.major == 9 else None
        attention.flash3_interface.cache_clear()
        for name, module in {"flash_attn_interface": interface, "kernels": None}.items():
            sys.modules[name] = module  # type: ignore[assignment]  # None: importing it raises ImportError
            self.callback(sys.modules.pop, name)
        flex = "torch.nn.attention.flex_attention.flex_attention"
        self.enter_context(mock.patch(flex, torch.compiler.disable(flex_attention)))
        sdpa = scaled_dot_product_attention
        self.enter_context(mock.patch("torch.nn.functional.scaled_dot_product_attention", sdpa))
        self.enter_context(NeverInitialize(allow_non_fake_inputs=True))
        return self
