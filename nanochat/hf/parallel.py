"""One model on several devices: its layers one after another on them, or each layer's matrices cut over ranks.

Layer placement (`--devices cuda:0,cuda:1`) puts the first layers on the first device, the next on the second:

    cuda:0   embedding, layers 0..11   ->   cuda:1   layers 12..23, norm, head

It makes room, not speed: only one device works at a time, and the residual crosses once per step.

Tensor parallelism (`torchrun --nproc-per-node N -m scripts.models play NAME --tensor-parallel`; Megatron-LM, arXiv
1909.08053) cuts each layer of a Llama-like model instead. Rank r of 2 holds half of the heads and half of the MLP's
inner channels: the rows of q, k, v, gate and up that make them, and the columns of o and down that read them. What a
rank computes of a sublayer needs nothing from the others; only its output is a sum over ranks, hence two all-reduces a
layer. Every rank holds embedding, norms and head whole and runs the same requests, as rank 0 reads them.

Both are tested on CPU; neither has run on GPUs yet.
"""

from collections.abc import Sequence

import torch
import torch.distributed as dist

from nanochat.hf.llama import Llama
from nanochat.hf.open_model import OpenModel


def layer_bytes(model: OpenModel, dtype: torch.dtype) -> list[int]:
    """Return the bytes of each layer and of what lies beside it, with floating-point values in `dtype`.

    No values are needed: `model` may be on PyTorch's device "meta".
    """
    # `named_parameters` has a tied head once, as the embedding; integers, such as MXFP4's, keep their size.
    sizes = [0] * model.config.n_layer
    for name, value in model.named_parameters():
        itemsize = dtype.itemsize if value.is_floating_point() else value.itemsize
        sizes[model.layer_of(name)] += value.numel() * itemsize
    return sizes


def split_layers(sizes: Sequence[int], room: Sequence[int]) -> list[int]:
    """Return the device of each layer, from the bytes of the layers and the bytes that are free on the devices.

    Each device is filled before the next, and all to the same share of their room, so that caches find theirs: four
    layers of 4 on devices of 80 and 80 go to [0, 0, 1, 1]. Raises ValueError when they do not fit.
    """
    # The smallest share that could do is tried first. As layers are not cut, some more may be needed.
    least = min(1.0, sum(sizes) / max(1, sum(room)))
    for step in range(101):
        share = least ** (1 - step / 100)  # from `least` to 1
        places = fill_in_order(sizes, [int(free * share) for free in room])
        if places is not None:
            return places
    raise ValueError(f"{sum(sizes) / 1e9:.2f} GB of layers do not fit in {sum(room) / 1e9:.2f} GB on all devices")


def fill_in_order(sizes: Sequence[int], room: Sequence[int]) -> list[int] | None:
    """Return the device of each layer when each device is filled before the next; None when the last one is full."""
    places = []
    device = 0
    used = 0
    for size in sizes:
        while used + size > room[device]:
            device += 1
            used = 0
            if device == len(room):
                return None
        used += size
        places.append(device)
    return places


def tensor_parallel(model: OpenModel, mesh: "dist.DeviceMesh") -> OpenModel:
    """Cut the matrices of every layer over the ranks of a mesh, and move the model there.

    All ranks call this with the same model. Raises ValueError when heads cannot be shared evenly, or when the model is
    not Llama-like or has experts or sinks, which are not cut here.
    """
    from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, RowwiseParallel, parallelize_module

    config = model.config
    ranks = mesh.size()
    if not isinstance(model, Llama) or config.sinks:
        raise ValueError("--tensor-parallel is for Llama-like models without sinks and experts: use --devices")
    if config.n_head % ranks or config.n_kv_head % ranks or config.n_inner % ranks:
        heads = f"{config.n_head} heads, {config.n_kv_head} key-value heads and {config.n_inner} inner channels"
        raise ValueError(f"{ranks} ranks cannot share {heads} evenly: choose a number that divides them")
    # Colwise: a rank has some of the outputs and needs all inputs. Rowwise: it has some of the inputs, and the outputs
    # are summed over ranks. So a pair of one and the other needs one all-reduce, at its end.
    plan: dict[str, ParallelStyle] = {
        "self_attn.q_proj": ColwiseParallel(),
        "self_attn.k_proj": ColwiseParallel(),
        "self_attn.v_proj": ColwiseParallel(),
        "self_attn.o_proj": RowwiseParallel(),
        "mlp.gate_proj": ColwiseParallel(),
        "mlp.up_proj": ColwiseParallel(),
        "mlp.down_proj": RowwiseParallel(),
    }
    for block in model.layers:
        parallelize_module(block, mesh, plan)
    return model.to(mesh.device_type).requires_grad_(False)
