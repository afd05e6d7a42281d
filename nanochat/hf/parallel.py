"""One model on several devices: its layers one after another on them, or each layer's matrices cut over ranks.

Layers placed one after another (`--devices`) make room, not speed: only one device works at a time. Tensor parallelism
(`torchrun --nproc-per-node N -m scripts.models play NAME --tensor-parallel`; Megatron-LM, arXiv 1909.08053) cuts heads
and the MLP's inner channels of a Llama-like model over N ranks, with two all-reduces a layer; every rank holds the rest
whole and runs the same requests, as rank 0 reads them. Both are tested on CPU; neither has run on GPUs yet.
"""

import contextlib
from collections.abc import Callable, Sequence
from datetime import timedelta

import torch
import torch.distributed as dist

from nanochat.hf.layers import OpenModel
from nanochat.hf.llama import Llama


def layer_bytes(model: OpenModel, dtype: torch.dtype) -> list[int]:
    """Bytes of each of `model.parts`, with floating-point values in `dtype`; no values are needed."""
    states = [part.state_dict().values() for part in model.parts]
    return [sum(t.numel() * (dtype if t.is_floating_point() else t.dtype).itemsize for t in ts) for ts in states]


def split_layers(sizes: Sequence[int], room: Sequence[int]) -> list[int]:
    """The device of each layer, by the bytes of the layers and the bytes that are free on the devices: each is filled
    before the next, all to the same share of their room, so that caches find theirs. ValueError when they do not fit.
    """
    least = min(1.0, sum(sizes) / max(1, sum(room)))
    for step in range(101):
        places, left, device = [], [int(free * least ** (1 - step / 100)) for free in room], 0
        for size in sizes:
            while device < len(left) and left[device] < size:
                device += 1
            if device < len(left):
                left[device] -= size
                places.append(device)
        if len(places) == len(sizes):
            return places
    raise ValueError(f"{sum(sizes) / 1e9:.2f} GB of layers do not fit in {sum(room) / 1e9:.2f} GB on all devices")


def tensor_parallel(model: OpenModel, mesh: "dist.DeviceMesh") -> OpenModel:
    """Cut the matrices of every layer over the ranks of a mesh, and move the model there; all ranks call this with the
    same model. ValueError where heads cannot be shared evenly, or the model is not Llama-like, or has experts or sinks,
    which are not cut here."""
    from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, RowwiseParallel, parallelize_module

    config, ranks = model.config, mesh.size()
    if not isinstance(model, Llama) or config.sinks:
        raise ValueError("--tensor-parallel is for Llama-like models without sinks and experts: use --devices")
    if config.n_head % ranks or config.n_kv_head % ranks or config.n_inner % ranks:
        heads = f"{config.n_head} heads, {config.n_kv_head} key-value heads and {config.n_inner} inner channels"
        raise ValueError(f"{ranks} ranks cannot share {heads} evenly: choose a number that divides them")
    columns = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj")
    plan: dict[str, ParallelStyle] = {name: ColwiseParallel() for name in columns}
    plan |= {name: RowwiseParallel() for name in ("self_attn.o_proj", "mlp.down_proj")}
    for block in model.model.layers:
        parallelize_module(block, mesh, plan)
    return model.to(mesh.device_type).requires_grad_(False)


def on_all_ranks(read: Callable[[], str]) -> Callable[[], str]:
    """`read` as rank 0 does it: every rank is given the same lines and the same end of input, however long they take.
    All ranks call this, and then the function that it returns."""
    if not dist.is_initialized():
        return read
    group = dist.new_group(backend="gloo", timeout=timedelta(days=365))

    def shared() -> str:
        line: list[str | None] = [None]
        if dist.get_rank() == 0:
            with contextlib.suppress(EOFError):
                line = [read()]
        dist.broadcast_object_list(line, group=group)
        if line[0] is None:
            raise EOFError
        return line[0]

    return shared
