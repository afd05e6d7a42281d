"""Muon for the matrices of the blocks, AdamW for everything else, with gradients and state sharded over the ranks.

`muon_update` and `adamw_update` are the two algorithms: pure functions of tensors, in place. Which parameter gets which
of them, at which learning rate, is in parameter_groups.py. `MuonAdamW.step` applies them on any number of ranks as
ZeRO-2 (arXiv 1910.02054), in three phases:

1. reduce-scatter: start one transfer per group, by which each rank receives its share of the summed gradient;
2. update: as each group's gradient arrives, update this rank's share of the parameters with its share of the state;
3. all-gather: start sending each updated share to all ranks, and at the end copy the results into the parameters.

Shapes: K matrices of M outputs and N inputs.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from nanochat.compute import Compute
from nanochat.gpt import GPT
from nanochat.parameter_groups import Group, parameter_groups

# Coefficients (a, b, c) of five polynomials a·x + b·x³ + c·x⁵, applied in turn to the singular values. Each is the one
# that brings all values left over by the previous ones closest to 1 (Polar Express, arXiv 2505.16932).
POLAR_EXPRESS = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)

# torch 2.13 renamed these two collectives and warns about the old names.
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


# --- Muon


def orthogonalize(g_KMN: Tensor, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Approximate U·Vᵀ of the SVD of each of K matrices, the nearest semi-orthogonal matrix, by five polynomials.

    Returns (K, M, N) in `dtype`. Only matrix products are used, because a GPU multiplies far faster than it
    decomposes, and bf16 is enough: the singular values only have to come near 1.
    """
    x = g_KMN.to(dtype)

    # Work with the short side first, so that the Gram matrix x·xᵀ is the smaller of the two.
    tall = x.size(-2) > x.size(-1)
    if tall:
        x = x.mT

    # The polynomials converge for singular values in [0, 1], and the Frobenius norm bounds the largest one.
    # 1 % is the margin for bf16 rounding.
    x = x / (x.norm(dim=(-2, -1), keepdim=True) * 1.01 + 1e-6)
    for a, b, c in POLAR_EXPRESS:
        # a·x + b·x³ + c·x⁵, where for a matrix x³ = (x·xᵀ)·x: the polynomial acts on the singular values alone.
        gram = x @ x.mT
        x = a * x + (b * gram + c * (gram @ gram)) @ x

    # Singular values below 1/1000 of the largest do not reach 1 in five steps. Restore the norm that the result would
    # have if they did, √(rank), so that the step size does not depend on how many of them there are.
    exact_norm = x.size(-2) ** 0.5
    x = x * (exact_norm / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-6))
    return x.mT if tall else x


def muon_update(
    w_KMN: Tensor,
    g_KMN: Tensor,
    momentum_KMN: Tensor,
    variance: Tensor,
    lr: float | Tensor,
    momentum: float | Tensor,
    weight_decay: float | Tensor,
    beta2: float = 0.9,
    dtype: torch.dtype = torch.bfloat16,
) -> None:
    """Take one Muon step on K stacked matrices, in place (Jordan et al. 2024; theory.md says why orthogonal steps).

    The steps: momentum, row equilibration, orthogonalization, variance normalisation, renormalisation, weight decay.
    `momentum_KMN` and `variance` are the state. `variance` has one entry per neuron, where a neuron is a slice across
    the short side: (K, M, 1) when M >= N, else (K, 1, N). `dtype` is that of the orthogonalization.
    """
    # 1. Nesterov momentum: average the gradients over steps, then look one step ahead along the average.
    momentum_KMN.lerp_(g_KMN, 1 - momentum)
    g = torch.lerp(g_KMN, momentum_KMN, momentum)

    # 2. Row equilibration (MuonEq, arXiv 2603.28254): bring rows to equal norm. The input of Polar Express is then
    # better conditioned, so more singular values reach 1 in the same five steps.
    g = g / g.norm(dim=-1, keepdim=True).clamp(min=1e-10)

    # 3. Polar Express: replace the update by the nearest orthogonal one, so that all directions move equally far.
    g = orthogonalize(g, dtype).float()

    # 4. Variance normalisation (NorMuon, arXiv 2510.05491): an orthogonal update still moves some neurons more than
    # others. Divide each by its own running root mean square, as Adam would, but with one number per neuron.
    neuron_dim = -1 if g.size(-2) >= g.size(-1) else -2
    square = g.square().mean(dim=neuron_dim, keepdim=True)
    variance.lerp_(square, 1 - beta2)
    scale = variance.clamp(min=1e-10).rsqrt()

    # 5. Frobenius renormalisation (also NorMuon): put the whole matrix back to the norm it had before the division, so
    # that normalising neurons redistributes the step and does not change its size. Both norms follow from `square`.
    norm_before = square.sum(dim=(-2, -1), keepdim=True)
    norm_after = (square * scale.square()).sum(dim=(-2, -1), keepdim=True)
    g = g * (scale * (norm_before / norm_after.clamp(min=1e-20)).sqrt())

    # 6. Tall matrices (more outputs than inputs) step further: an orthogonal step changes each of their outputs less.
    lr = lr * max(1.0, g.size(-2) / g.size(-1)) ** 0.5

    # 7. Cautious weight decay (arXiv 2510.12402): decay only the entries that this step moves towards zero anyway.
    # Elsewhere decay would undo what the gradient asks for.
    w_KMN.sub_(lr * weight_decay * w_KMN * (g * w_KMN > 0))
    w_KMN.addcmul_(g, torch.as_tensor(lr), value=-1)


# --- AdamW


def adamw_update(
    w: Tensor,
    g: Tensor,
    mean: Tensor,
    square: Tensor,
    step: float | Tensor,
    lr: float | Tensor,
    betas: tuple[float, float],
    weight_decay: float,
    eps: float = 1e-10,
) -> None:
    """Take one AdamW step (arXiv 1711.05101) in place. `step` counts from 0.

    The state `mean` and `square` is fp32 whatever the dtype of w: in bf16 an average over 1/(1 - 0.995) = 200 steps
    would lose every small contribution to rounding.
    """
    beta1, beta2 = betas
    g = g.float()
    # Running averages of the gradient and of its square: the step is their ratio, about one per entry at most.
    mean.lerp_(g, 1 - beta1)
    square.lerp_(g.square(), 1 - beta2)
    # Both averages start at zero; dividing by 1 - βᵗ removes that bias.
    mean_correction = 1 - beta1 ** (step + 1)
    square_correction = 1 - beta2 ** (step + 1)
    denominator = (square / square_correction).sqrt_().add_(eps)
    # The new weights are computed in fp32 and rounded once. Multiplying a bf16 weight by 1 - lr·decay would change
    # nothing while lr·decay is below 2⁻⁹.
    w_fp32 = w.float()  # w itself if it is fp32
    w_fp32.mul_(1 - lr * weight_decay)
    w_fp32.sub_(mean / denominator * (lr / mean_correction))
    w.copy_(w_fp32)


# --- the optimizer


@dataclass(frozen=True)
class Transfer:
    """A collective on its way. Call `wait()` once: gloo writes the result then, over whatever was done to it since."""

    tensor: Tensor
    work: dist.Work | None = None  # None when there is nothing to wait for

    def wait(self) -> Tensor:
        """Wait until the tensor is complete (on CUDA: make the current stream wait) and return it."""
        if self.work is not None:
            self.work.wait()
        return self.tensor


class MuonAdamW:
    """The optimizer of a `GPT`. Gradients are summed over ranks, so each rank's loss is its part of the global mean."""

    def __init__(
        self, model: GPT, lrs: dict[str, float], weight_decay: float, compute: Compute, compiled: bool = False
    ) -> None:
        """compiled: fuse the updates with torch.compile, for a GPU; on a CPU compiling takes longer than it gains."""
        self.compute = compute
        self.compiled = compiled
        self.muon_update = muon_update
        self.adamw_update = adamw_update
        if compiled:
            # As PyTorch runs them, the updates are some thirty passes over memory. Fused, at d24 on 8 GPUs, they should
            # take 10 ms and not 20 (modelled, not measured).
            self.muon_update = torch.compile(muon_update, dynamic=False, fullgraph=True)
            self.adamw_update = torch.compile(adamw_update, dynamic=False, fullgraph=True)
        self.groups = parameter_groups(model, lrs, weight_decay, compute.world_size)
        # An fp32 run is there to be exact. In bf16 the orthogonalization would turn the order of a sum, which depends
        # on the number of ranks, into a difference of 1e-2 in the loss within 20 steps.
        self.muon_dtype = torch.float32 if compute.dtype == torch.float32 else torch.bfloat16
        self.state = {group.name: self._empty_state(group) for group in self.groups}

    def _empty_state(self, group: Group) -> dict[str, Tensor]:
        share = self._own_share(group)
        square = share
        if group.betas is None:  # one second moment per neuron: see muon_update
            square = share[..., :1] if share.size(-2) >= share.size(-1) else share[..., :1, :]
        return {
            "mean": torch.zeros_like(share, dtype=torch.float32),
            "square": torch.zeros_like(square, dtype=torch.float32),
        }

    def _own_share(self, group: Group) -> Tensor:
        """Return this rank's share of a group's parameters. It may be a view of them."""
        return group.share([parameter.detach() for parameter in group.parameters], self.compute.rank)

    @torch.no_grad()
    def step(
        self, step: int, lr_mult: float = 1.0, momentum: float = 0.95, wd_mult: float = 1.0, clip: float | None = None
    ) -> float | None:
        """Reduce gradients, update parameters, and clear the gradients. `step` counts from 0.

        momentum and wd_mult (a factor on weight decay) are Muon's. clip: the largest L2 norm of the whole gradient,
        applied after reduction so that all ranks agree. Returns the norm before clipping when `clip` is given.
        """
        # Phase 1, reduce-scatter. All transfers start at once, and run while the first groups are updated below.
        gradients = [self._start_reduce(group) for group in self.groups]
        norm = None
        if clip is not None:
            # The norm needs all gradients, so clipping has to wait for all of them.
            arrived = [gradient.wait() for gradient in gradients]
            norm = self._clip(arrived, clip)
            gradients = [Transfer(gradient) for gradient in arrived]

        # Phase 2, update: each group when its gradient is there. Its new values are sent off at once.
        gathers = []
        for group, gradient in zip(self.groups, gradients, strict=True):
            share = self._own_share(group)
            g = gradient.wait()
            mean = self.state[group.name]["mean"]
            square = self.state[group.name]["square"]
            lr = self._scalar(group.lr * lr_mult)
            if group.betas is None:
                decay = self._scalar(group.weight_decay * wd_mult)
                self.muon_update(share, g, mean, square, lr, self._scalar(momentum), decay, dtype=self.muon_dtype)
            else:
                t = self._scalar(step)
                self.adamw_update(share, g, mean, square, t, lr, group.betas, group.weight_decay, group.eps)
            gathers.append(self._start_gather(group, share))

        # Phase 3, all-gather: copy the new values of all ranks into the parameters, as they arrive.
        for group, gathered in zip(self.groups, gathers, strict=True):
            values = group.from_shares(gathered.wait(), group.n_shares)
            for parameter, value in zip(group.parameters, values, strict=True):
                parameter.copy_(value)
        return norm

    def _scalar(self, value: float) -> float | Tensor:
        """Wrap a number that changes from step to step: a plain one would be a constant of the compiled update."""
        return torch.tensor(float(value)) if self.compiled else value

    def _start_reduce(self, group: Group) -> Transfer:
        """Start summing a group's gradient over the ranks into this rank's share of it, and free the gradients."""
        # A parameter that took no part in this rank's loss has no gradient, but the other ranks expect a message.
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in group.parameters]
        for parameter in group.parameters:
            parameter.grad = None
        shares = group.all_shares(gradients)
        if self.compute.world_size == 1:
            return Transfer(shares)
        if group.n_shares == 1:
            return Transfer(shares, dist.all_reduce(shares, async_op=True))
        own = torch.empty_like(shares[: shares.size(0) // group.n_shares])
        return Transfer(own, _reduce_scatter(own, shares.contiguous(), async_op=True))

    def _clip(self, gradients: list[Tensor], clip: float) -> float:
        """Scale the reduced gradients to an overall norm of at most `clip`; return the norm before."""
        total = torch.zeros((), device=self.compute.device)
        for group, gradient in zip(self.groups, gradients, strict=True):
            if group.n_shares > 1 or self.compute.rank == 0:  # count once what every rank holds
                total += gradient.float().square().sum()
        norm = self.compute.all_reduce_sum(total).sqrt().item()
        for gradient in gradients:
            gradient.mul_(min(1.0, clip / (norm + 1e-6)))
        return norm

    def _start_gather(self, group: Group, share: Tensor) -> Transfer:
        """Start giving every rank the updated shares of all ranks, end to end."""
        if group.n_shares == 1:
            return Transfer(share)
        shares = share.new_empty((share.size(0) * group.n_shares, *share.shape[1:]))
        return Transfer(shares, _all_gather(shares, share, async_op=True))

    def state_dict(self) -> dict[str, Tensor]:
        """Return this rank's share of the state, by `group/part`. Rank 0 alone brings what every rank holds."""
        result = {}
        for group in self.groups:
            if group.n_shares > 1 or self.compute.rank == 0:
                for part, value in self.state[group.name].items():
                    result[f"{group.name}/{part}"] = value
        return result

    @torch.no_grad()
    def load_state_dicts(self, shares: list[dict[str, Tensor]]) -> None:
        """Load the state that any number of ranks saved, given in the order of their ranks.

        Raises ValueError when a part is missing or has another shape: the checkpoint is of another model.
        """
        for group in self.groups:
            for part, mine in self.state[group.name].items():
                key = f"{group.name}/{part}"
                pieces = [share[key] for share in shares if key in share]
                if not pieces:
                    raise ValueError(f"the optimizer state lacks {key}: resume the run with the flags it began with")
                saved = torch.cat(pieces) if len(pieces) > 1 else pieces[0]  # scalars cannot be concatenated
                values = group.from_shares(saved, n_shares=len(pieces))
                loaded = group.share(values, self.compute.rank)
                if loaded.shape != mine.shape:
                    raise ValueError(f"the optimizer state {key} is of another model: resume with the same flags")
                mine.copy_(loaded)
