"""Parameters in shares as well (ZeRO-3): PyTorch's `fully_shard` (FSDP2) under the same optimizer, `--shard-params`.

Each rank holds a block of rows of every parameter. A layer's other rows are gathered when it runs and dropped after,
and its gradients reduce-scattered at every micro-batch, so that no rank ever holds a whole model or its gradients.
Muon needs whole matrices: their rows go to the owner that optim.py names, gradients and weights, new weights back.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from nanochat.compute import Compute
from nanochat.gpt import GPT
from nanochat.optim import SMALL, Bucket, Message, MuonAdamW, pad_rows


def shard(model: GPT, compute: Compute) -> None:
    """Cut the parameters of a model on `meta` into shares, in place; nothing on one process."""
    if compute.world_size == 1:
        return
    # 1.5 s to import, which only a run that needs them should pay
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

    mesh, blocks = init_device_mesh(compute.device.type, (compute.world_size,)), set(model.blocks.parameters())
    # fully_shard refuses scalars; what the optimizer holds on every rank stays whole
    small = {p for p in model.parameters() if p not in blocks and p.numel() < SMALL}
    # matrices travel in the dtype they are used in; the sums of their gradients stay fp32
    half = MixedPrecisionPolicy(compute.dtype, torch.float32, cast_forward_inputs=False)
    for block in model.blocks:
        fully_shard(block, mesh=mesh, mp_policy=half, ignored_params=small)
    for part in (model.embed, *model.value_embeds.values(), model):
        fully_shard(part, mesh=mesh, ignored_params=small)
    for part in model.modules():
        if isinstance(part, FSDPModule):
            part.set_gradient_divide_factor(1.0)  # a sum: each rank's loss is its part of the whole
            part.set_force_sum_reduction_for_comms(True)  # gloo knows no other


def local(x: torch.Tensor) -> torch.Tensor:
    """The part of a parameter that this rank holds."""
    return x.to_local() if hasattr(x, "to_local") else x  # a DTensor


def local_rows(x: Any) -> slice:
    """Which rows of the whole these are."""
    if local(x) is x:
        return slice(None)
    first = min(x.device_mesh.get_local_rank() * -(-x.size(0) // x.device_mesh.size()), x.size(0))
    return slice(first, first + x.to_local().size(0))


class _DrawWhole(TorchDispatchMode):
    """Random values as a whole parameter would get them, one parameter at a time, of which each rank keeps its rows."""

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        draws = func in (torch.ops.aten.normal_.default, torch.ops.aten.uniform_.default)
        if not draws or local(args[0]) is args[0]:
            return func(*args, **(kwargs or {}))
        whole = torch.empty(args[0].shape, dtype=args[0].dtype, device=args[0].device)
        whole = func(whole, *args[1:], **(kwargs or {}))
        local(args[0]).copy_(whole[local_rows(args[0])])
        return args[0]


def init_weights(model: GPT, generator: torch.Generator) -> None:
    """`model.init_weights`: the same values however the parameters are shared."""
    with _DrawWhole():
        model.init_weights(generator)


def whole_state(model: GPT, rank: int) -> dict[str, torch.Tensor]:
    """The state dict with whole tensors, on rank 0 alone where they are in shares. Every rank calls this."""
    whole = {}
    for name, value in model.state_dict().items():
        tensor = value if local(value) is value else value.full_tensor().cpu()
        if rank == 0:
            whole[name] = tensor
    return whole


def make_optimizer(model: GPT, *args: Any, **kwargs: Any) -> MuonAdamW:
    """The optimizer of a model, in shares or not; arguments as of `MuonAdamW`."""
    cut = local(model.head.weight) is not model.head.weight
    return (_ShardedMuonAdamW if cut else MuonAdamW)(model, *args, **kwargs)


class _ShardedMuonAdamW(MuonAdamW):
    """AdamW works on the rows that are here, Muon on whole matrices sent to their owners and back."""

    ranks_a_matrix = 1 << 30  # rows are sent, not padding

    def overlap_next_backward(self) -> None:
        """Nothing: fully_shard reduces during every backward pass."""

    def _to_owners(self, message: Message, tensors: list[torch.Tensor]) -> torch.Tensor:
        """Matrix i of the message, (1, M, N), on rank i, from everyone's rows; zeros where there is none."""
        w, (M, N) = self.compute.world_size, tensors[0].shape
        send = local(tensors[0]).new_zeros((w, -(-M // w), N))
        for rows, x in zip(send, map(local, tensors)):
            rows[: x.size(0)] = x
        whole = torch.empty_like(send)
        dist.all_to_all_single(whole, send)
        return whole.view(1, -1, N)[:, :M]

    def _reduce(self, bucket: Bucket, message: Message, gradients: list[torch.Tensor]) -> None:
        if not bucket.sharded:
            return super()._reduce(bucket, message, gradients)
        message.share = local(gradients[0]) if bucket.betas else self._to_owners(message, gradients)

    def _own(self, bucket: Bucket) -> torch.Tensor:
        if bucket.betas:
            return local(bucket.parameters[0].detach())
        return torch.cat([self._to_owners(message, message.parameters) for message in bucket.messages])

    def _cut(self, bucket: Bucket, whole: torch.Tensor) -> torch.Tensor:
        cut = bucket.betas and bucket.sharded
        return whole[local_rows(bucket.parameters[0])] if cut else super()._cut(bucket, whole)

    def _spread(self, bucket: Bucket, share: torch.Tensor) -> Callable[[], None]:
        for message, own_MN in zip(bucket.messages, share) if bucket.betas is None else ():
            send = pad_rows(own_MN, self.compute.world_size).contiguous()
            received = torch.empty_like(send)
            dist.all_to_all_single(received, send)
            for parameter, rows in zip(message.parameters, received.chunk(self.compute.world_size)):
                local(parameter).copy_(rows[: local(parameter).size(0)])
        return lambda: None
