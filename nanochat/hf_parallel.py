"""A Llama-like model on several devices: its layers one after another on them, or each layer's matrices cut over ranks.

Layers placed one after another make room, not speed: only one device works at a time. Tensor parallelism (Megatron-LM,
arXiv 1909.08053) cuts heads and the MLP's inner channels over the ranks of a mesh, with two all-reduces a layer; every
rank holds the rest whole and runs the same requests.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from nanochat.hf_llama import Llama

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


def split_layers(sizes: Sequence[int], room: Sequence[int]) -> list[int]:
    """The device of each layer, by the bytes of the layers and the bytes that are free on the devices: each is filled
    before the next. ValueError when they do not fit."""
    places, device, left = [], 0, list(room)
    for size in sizes:
        while device < len(left) and left[device] < size:
            device += 1
        if device == len(left):
            raise ValueError(
                f"{sum(sizes) / 1e9:.2f} GB of layers do not fit in {sum(room) / 1e9:.2f} GB on all devices"
            )
        left[device] -= size
        places.append(device)
    return places


def place_layers(model: Llama, devices: Sequence[torch.device], places: Sequence[int]) -> Llama:
    """Move layer i to devices[places[i]]; embedding to the first layer's, norm and head to the last's (a tied head is
    the embedding, and stays with it). What comes to a part is brought to where it is."""

    def put(module: nn.Module, device: torch.device) -> None:
        def bring(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            return tuple(a.to(device) if isinstance(a, torch.Tensor) else a for a in args)

        module.to(device).register_forward_pre_hook(bring)

    decoder, first, last = model.model, devices[places[0]], devices[places[-1]]
    for block, place in zip(decoder.layers, places, strict=True):
        put(block, devices[place])
    put(decoder.embed_tokens, first)
    put(decoder.norm, last if model.lm_head is not None else first)
    if model.lm_head is not None:
        model.lm_head.to(last)
    return model


def tensor_parallel(model: Llama, mesh: "DeviceMesh") -> Llama:
    """Cut the matrices of every layer over the ranks of a mesh; all ranks call this with the same model. ValueError
    where heads cannot be shared evenly, or the model has experts or sinks, which are not cut here."""
    from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, RowwiseParallel, parallelize_module

    config, ranks = model.config, mesh.size()
    if config.sinks:
        raise ValueError(
            "tensor parallelism is for Llama-like models without sinks and experts: place the layers instead"
        )
    if config.n_head % ranks or config.n_kv_head % ranks or config.n_inner % ranks:
        heads = f"{config.n_head} heads, {config.n_kv_head} key-value heads and {config.n_inner} inner channels"
        raise ValueError(f"{ranks} ranks cannot share {heads} evenly: choose a number that divides them")
    columns = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj")
    plan: dict[str, ParallelStyle] = {name: ColwiseParallel() for name in columns}
    plan |= {name: RowwiseParallel() for name in ("self_attn.o_proj", "mlp.down_proj")}
    for block in model.model.layers:
        parallelize_module(block, mesh, plan)
    return model.to(mesh.device_type).requires_grad_(False)
