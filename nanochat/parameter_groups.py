"""Parameter groups: how the optimizer updates each parameter, and how a group is divided over the ranks.

Every group is sharded along dim 0 of one tensor: all matrices of one shape stacked (Muon), or the rows of a single
parameter (AdamW). Muon needs whole matrices, so a rank owns whole matrices: matrix i belongs to rank i mod world size.
Parameters too small to be worth sharding are all-reduced, and every rank updates them. On one rank, nothing is sent.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nanochat.gpt import GPT

SMALL = 4096  # elements; a smaller parameter is updated on every rank, because a message would cost more than it saves


@dataclass(frozen=True)
class Group:
    """Parameters that are updated together, with everything about their update that does not change over a run."""

    name: str  # the key of its state in checkpoints
    parameters: tuple[Tensor, ...]  # equal shapes for Muon; exactly one for AdamW
    lr: float
    weight_decay: float
    n_shares: int  # the number of ranks that share it; 1: each rank holds the state and makes the same update
    betas: tuple[float, float] | None = None  # None means Muon
    eps: float = 1e-10

    # The methods below take or return a list with one tensor for each of the parameters: weights, gradients or state.

    def share(self, tensors: Sequence[Tensor], rank: int) -> Tensor:
        """Return a rank's share: its matrices stacked (Muon), or its rows, which may be a view (AdamW)."""
        if self.betas is None:
            return torch.stack(self._matrices_of(rank, tensors))
        if self.n_shares == 1:
            return tensors[0]
        return self._padded(tensors[0]).chunk(self.n_shares)[rank]

    def all_shares(self, tensors: Sequence[Tensor]) -> Tensor:
        """Return the shares of all ranks, end to end."""
        if self.betas is not None:
            return self._padded(tensors[0])
        matrices = []
        for rank in range(self.n_shares):
            matrices += self._matrices_of(rank, tensors)
        return torch.stack(matrices)

    def _matrices_of(self, rank: int, matrices: Sequence[Tensor]) -> list[Tensor]:
        """Deal matrices out in turn, and zeros where they run out: 3 matrices on 2 ranks are 0, 2 | 1, zeros."""
        first = rank % self.n_shares  # with one share, every rank has all matrices
        own = list(matrices[first :: self.n_shares])
        missing = math.ceil(len(matrices) / self.n_shares) - len(own)
        return own + [torch.zeros_like(matrices[0])] * missing

    def _padded(self, rows: Tensor) -> Tensor:
        """Append zeros where the rows do not divide evenly."""
        missing = -rows.size(0) % self.n_shares if self.n_shares > 1 else 0
        return torch.cat((rows, rows.new_zeros((missing, *rows.shape[1:])))) if missing else rows

    def from_shares(self, shares: Tensor, n_shares: int) -> list[Tensor]:
        """Undo `all_shares` of so many ranks: restore the order and drop the padding."""
        if self.betas is not None:
            return [shares[: self.parameters[0].size(0)] if n_shares > 1 else shares]
        matrices = shares.unflatten(0, (n_shares, -1)).transpose(0, 1).flatten(0, 1)
        return list(matrices[: len(self.parameters)])


def parameter_groups(model: GPT, lrs: dict[str, float], weight_decay: float, world_size: int) -> list[Group]:
    """List the groups of a model. `lrs` has the keys of `recipe.LEARNING_RATES`; `weight_decay` is Muon's."""
    groups = []

    # Muon: matrices of equal shape are stacked, so that one batched product orthogonalizes all of them.
    by_shape: dict[tuple[int, ...], list[Tensor]] = {}
    for parameter in model.blocks.parameters():
        by_shape.setdefault(tuple(parameter.shape), []).append(parameter)
    for shape, matrices in by_shape.items():
        # Whole matrices are dealt to the ranks. With many more ranks than matrices, shares would be mostly padding:
        # then every rank updates all of them.
        n_shares = world_size if world_size <= 2 * len(matrices) else 1
        name = "muon_" + "x".join(str(size) for size in shape)
        groups.append(Group(name, tuple(matrices), lrs["matrix"], weight_decay, n_shares))

    # AdamW. Its learning rates were tuned at width 768, and the best one falls with the root of the width.
    width_scale = (model.config.n_embd / 768) ** -0.5
    head_lr = lrs["unembedding"] * width_scale
    embedding_lr = lrs["embedding"] * width_scale
    scalar_lr = lrs["scalar"]
    table = [  # group, parameter, learning rate, betas, weight decay
        ("head", "head.weight", head_lr, (0.8, 0.96), 0.01),
        ("embed", "embed.weight", embedding_lr, (0.8, 0.995), 0.001),
    ]
    for layer in model.value_embeds:
        name = f"value_embed_{layer}"
        table.append((name, f"value_embeds.{layer}.weight", embedding_lr * 0.5, (0.8, 0.995), 0.01))
    table += [
        # Residual scales multiply the whole stream in every layer: 1 % of the scalars' learning rate is enough.
        ("resid_scale", "resid_scale", scalar_lr * 0.01, (0.8, 0.95), 0.05),
        ("norm_scale", "norm_scale", scalar_lr * 0.01, (0.8, 0.95), 0.05),
        ("embed_skip", "embed_skip", scalar_lr, (0.96, 0.95), 0.0),
        ("smear_gate.weight", "smear_gate.weight", scalar_lr * 0.4, (0.8, 0.95), 0.0),
        ("smear_scale", "smear_scale", scalar_lr * 0.4, (0.8, 0.95), 0.0),
        ("backout", "backout", scalar_lr * 0.4, (0.8, 0.95), 0.0),
    ]
    named = dict(model.named_parameters())
    for name, parameter_name, lr, betas, decay in table:
        if parameter_name not in named:  # smear, backout and norm scales can be off in the model's config
            continue
        parameter = named[parameter_name]
        small = parameter.numel() < SMALL
        n_shares = 1 if small else world_size
        # The first gradients of the scalars are rounding noise (1e-10 to 1e-8): projections into the residual start at
        # zero, and the final norm undoes any scale. Adam must not turn noise into full-size steps.
        eps = 1e-6 if small else 1e-10
        groups.append(Group(name, (parameter,), lr, decay, n_shares, betas, eps))

    covered = sum(len(group.parameters) for group in groups)
    assert covered == len(named), "a parameter has no optimizer"
    return groups
