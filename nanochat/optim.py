"""Muon for the matrices and AdamW for everything else, in one optimizer with its state sharded over the ranks.

Sharding is ZeRO-2 (arXiv 1910.02054): gradients are reduce-scattered, each rank keeps the state of its share and
updates it, and the updated parameters are all-gathered. A share is a slice along the first axis of a bucket: of
stacked matrices of one shape for Muon, of a flattened parameter for AdamW. Parameters too small to be worth the
messages are all-reduced and updated everywhere. Saved shares join and split again on any number of ranks.
"""

from dataclasses import dataclass, field

import torch
import torch.distributed as dist

from nanochat.compute import Compute
from nanochat.gpt import GPT

# Odd polynomials a·x + b·x³ + c·x⁵ applied in turn, optimal for spectra in [0, 1] (Polar Express, arXiv 2505.16932).
_POLAR_EXPRESS = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)
# torch 2.13 renamed these two and warns of the old names
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_SMALL = 4096  # elements below which a parameter is updated on every rank


def orthogonalize(g_KMN: torch.Tensor, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """The nearest semi-orthogonal matrix to each of K matrices, roughly: U·Vᵀ of its SVD, in 5 iterations."""
    x = g_KMN.to(dtype)
    tall = x.size(-2) > x.size(-1)
    if tall:
        x = x.mT
    x = x / (x.norm(dim=(-2, -1), keepdim=True) * 1.02 + 1e-6)
    for a, b, c in _POLAR_EXPRESS:
        gram = x @ x.mT
        x = a * x + (b * gram + c * (gram @ gram)) @ x
    return x.mT if tall else x


def muon_update(
    w_KMN: torch.Tensor,
    g_KMN: torch.Tensor,
    momentum_KMN: torch.Tensor,
    variance: torch.Tensor,
    lr: float,
    momentum: float,
    weight_decay: float,
    beta2: float = 0.9,
    dtype: torch.dtype = torch.bfloat16,
) -> None:
    """One Muon step on K stacked matrices, in place.

    Nesterov momentum; rows scaled to equal norm (MuonEq, arXiv 2603.28254); orthogonalised; the entries of each
    neuron (the longer side) scaled by its running root mean square and the whole put back to its Frobenius norm
    (NorMuon, arXiv 2510.05491); weight decay only where it agrees with the step (arXiv 2510.12402).
    `dtype` is that of the orthogonalisation. `variance` has one entry a neuron: (K, M, 1) when M >= N, else (K, 1, N).
    """
    momentum_KMN.lerp_(g_KMN, 1 - momentum)
    g = torch.lerp(g_KMN, momentum_KMN, momentum)
    g = g / g.norm(dim=-1, keepdim=True).clamp(min=1e-10)
    g = orthogonalize(g, dtype).float()
    neuron_dim = -1 if g.size(-2) >= g.size(-1) else -2
    square = g.square().mean(dim=neuron_dim, keepdim=True)
    variance.lerp_(square, 1 - beta2)
    scale = variance.clamp(min=1e-10).rsqrt()
    before, after = square.sum((-2, -1), keepdim=True), (square * scale.square()).sum((-2, -1), keepdim=True)
    g = g * (scale * (before / after.clamp(min=1e-20)).sqrt())
    lr = lr * max(1.0, g.size(-2) / g.size(-1)) ** 0.5
    if weight_decay:
        w_KMN.sub_(lr * weight_decay * w_KMN * (g * w_KMN > 0))
    w_KMN.sub_(g, alpha=lr)


def adamw_update(
    w: torch.Tensor,
    g: torch.Tensor,
    mean: torch.Tensor,
    square: torch.Tensor,
    step: int,
    lr: float,
    betas: tuple[float, float],
    weight_decay: float,
    eps: float = 1e-10,
) -> None:
    """AdamW (arXiv 1711.05101) in place; `step` counts from 0. Moments are fp32 whatever the parameter's dtype."""
    g = g.float()
    mean.lerp_(g, 1 - betas[0])
    square.lerp_(g.square(), 1 - betas[1])
    denominator = (square / (1 - betas[1] ** (step + 1))).sqrt_().add_(eps)
    w.mul_(1 - lr * weight_decay)
    w.sub_((mean / denominator * (lr / (1 - betas[0] ** (step + 1)))).to(w.dtype))


@dataclass
class Bucket:
    """Parameters that are updated together: stacked matrices (Muon), or one parameter (AdamW)."""

    name: str
    parameters: list[torch.nn.Parameter]
    lr: float
    betas: tuple[float, float] | None = None  # None = Muon
    weight_decay: float = 0.0
    sharded: bool = True
    eps: float = 1e-10
    state: dict[str, torch.Tensor] = field(default_factory=dict)

    @property
    def rows(self) -> int:
        """Length of the axis that is cut into shares: matrices, or elements."""
        return len(self.parameters) if self.betas is None else self.parameters[0].numel()


class MuonAdamW:
    """The optimizer of a `GPT`. Gradients are summed over ranks, so each rank's loss is its part of the whole.

    learning rates: keys matrix, embedding, unembedding, scalar (recipe.py); AdamW's follow width as (width/768)^-½.
    """

    def __init__(self, model: GPT, lrs: dict[str, float], weight_decay: float, compute: Compute) -> None:
        self.compute = compute
        # An fp32 run is there to be exact: bf16 would turn the order of a sum into 1e-2 of loss within 20 steps.
        self.muon_dtype = torch.float32 if compute.dtype == torch.float32 else torch.bfloat16
        width = (model.config.n_embd / 768) ** -0.5
        shapes: dict[tuple[int, ...], list[torch.nn.Parameter]] = {}
        for parameter in model.blocks.parameters():
            shapes.setdefault(tuple(parameter.shape), []).append(parameter)
        self.buckets = [
            Bucket(f"muon_{'x'.join(map(str, shape))}", stack, lrs["matrix"], None, weight_decay)
            for shape, stack in shapes.items()
        ]

        def adamw(name: str, parameter: torch.nn.Parameter, lr: float, betas: tuple[float, float], decay: float):
            small = parameter.numel() < _SMALL
            # The first gradients of the scalars are rounding noise, 1e-10 to 1e-8: projections into the residual are
            # zero then, and the last norm undoes any scale. They must not become steps of full size.
            eps = 1e-6 if small else 1e-10
            self.buckets.append(Bucket(name, [parameter], lr, betas, decay, not small, eps))

        adamw("head", model.head.weight, lrs["unembedding"] * width, (0.8, 0.96), 0.01)
        adamw("embed", model.embed.weight, lrs["embedding"] * width, (0.8, 0.995), 0.001)
        for layer, embed in model.value_embeds.items():
            adamw(f"value_embed_{layer}", embed.weight, lrs["embedding"] * width * 0.5, (0.8, 0.995), 0.01)
        adamw("resid_scale", model.resid_scale, lrs["scalar"] * 0.01, (0.8, 0.95), 0.05)
        adamw("embed_skip", model.embed_skip, lrs["scalar"], (0.96, 0.95), 0.0)
        for name in ("smear_gate.weight", "smear_scale", "backout"):
            parameter = dict(model.named_parameters()).get(name)
            if parameter is not None:
                adamw(name, parameter, lrs["scalar"] * 0.4, (0.8, 0.95), 0.0)
        covered = sum(len(bucket.parameters) for bucket in self.buckets)
        assert covered == len(list(model.parameters())), "a parameter has no optimizer"

    def _stack(self, bucket: Bucket, tensors: list[torch.Tensor]) -> torch.Tensor:
        """One tensor with the bucket's rows first, padded with zeros to a multiple of the ranks."""
        whole = torch.stack(tensors) if bucket.betas is None else tensors[0].flatten()
        if not bucket.sharded or self.compute.world_size == 1:
            return whole
        return _pad(whole, self.compute.world_size)

    def _share(self, bucket: Bucket, whole: torch.Tensor) -> torch.Tensor:
        if not bucket.sharded or self.compute.world_size == 1:
            return whole
        return whole.chunk(self.compute.world_size)[self.compute.rank]

    def _reduce(self, bucket: Bucket) -> torch.Tensor:
        """This rank's share of the gradient, summed over ranks; zero where a parameter took no part in the loss."""
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in bucket.parameters]
        whole = self._stack(bucket, gradients)
        if self.compute.world_size == 1:
            return whole
        if not bucket.sharded:
            return self.compute.all_reduce_sum(whole)
        share = torch.empty_like(self._share(bucket, whole))
        _reduce_scatter(share, whole)
        return share

    def _spread(self, bucket: Bucket, share: torch.Tensor) -> None:
        """Give every rank the updated parameters."""
        if bucket.sharded and self.compute.world_size > 1:
            whole = share.new_empty((share.size(0) * self.compute.world_size, *share.shape[1:]))
            _all_gather(whole, share)
        else:
            whole = share
        pieces = whole if bucket.betas is None else [whole[: bucket.rows].view_as(bucket.parameters[0])]
        for parameter, value in zip(bucket.parameters, pieces):
            parameter.copy_(value)

    def _state(self, bucket: Bucket, share: torch.Tensor) -> dict[str, torch.Tensor]:
        if not bucket.state:
            bucket.state["mean"] = torch.zeros_like(share, dtype=torch.float32)
            if bucket.betas is None:
                neuron_dim = -1 if share.size(-2) >= share.size(-1) else -2
                bucket.state["square"] = torch.zeros_like(share.mean(neuron_dim, keepdim=True), dtype=torch.float32)
            else:
                bucket.state["square"] = torch.zeros_like(share, dtype=torch.float32)
        return bucket.state

    @torch.no_grad()
    def step(
        self,
        step: int,
        lr_mult: float = 1.0,
        momentum: float = 0.95,
        decay_mult: float = 1.0,
        clip: float | None = None,
    ) -> float | None:
        """Reduce gradients, update, and clear them. `step` counts from 0.

        clip: the largest L2 norm of the whole gradient, applied after reduction so that all ranks agree; the norm
        before clipping is returned when it was asked for.
        """
        gradients = [self._reduce(bucket) for bucket in self.buckets]
        norm = self._clip(gradients, clip) if clip is not None else None
        for bucket, gradient in zip(self.buckets, gradients, strict=True):
            share = self._share(bucket, self._stack(bucket, [p.detach() for p in bucket.parameters])).clone()
            state = self._state(bucket, share)
            lr = bucket.lr * lr_mult
            if bucket.betas is None:
                decay = bucket.weight_decay * decay_mult
                muon_update(share, gradient, state["mean"], state["square"], lr, momentum, decay, dtype=self.muon_dtype)
            else:
                decay = bucket.weight_decay
                mean, square = state["mean"], state["square"]
                adamw_update(share, gradient, mean, square, step, lr, bucket.betas, decay, bucket.eps)
            self._spread(bucket, share)
            for parameter in bucket.parameters:
                parameter.grad = None
        return norm

    def _clip(self, gradients: list[torch.Tensor], clip: float) -> float:
        total = torch.zeros((), device=self.compute.device)
        for bucket, gradient in zip(self.buckets, gradients, strict=True):
            counted = bucket.sharded or self.compute.rank == 0  # what every rank holds is counted once
            total += gradient.float().square().sum() * counted
        norm = self.compute.all_reduce_sum(total).sqrt().item()
        for gradient in gradients:
            gradient.mul_(min(1.0, clip / (norm + 1e-6)))
        return norm

    def state_dict(self) -> dict[str, torch.Tensor]:
        """This rank's share of the state, by `bucket/part`."""
        return {f"{b.name}/{part}": value for b in self.buckets for part, value in b.state.items()}

    def load_state_dicts(self, shares: list[dict[str, torch.Tensor]]) -> None:
        """Take up the state that any number of ranks saved, given in the order of their ranks.

        Raises ValueError when a part is missing or has another shape: a checkpoint of another model.
        """
        for bucket in self.buckets:
            own = self._share(bucket, self._stack(bucket, [p.detach() for p in bucket.parameters]))
            bucket.state = {}
            for part, like in self._state(bucket, own).items():
                key = f"{bucket.name}/{part}"
                if any(key not in share for share in shares):
                    raise ValueError(f"the optimizer state lacks {key}: resume the run with the flags it began with")
                pieces = [share[key] for share in shares] if bucket.sharded else [shares[0][key]]
                whole = torch.cat(pieces)[: bucket.rows] if pieces[0].dim() else pieces[0]
                if bucket.sharded and self.compute.world_size > 1:
                    whole = _pad(whole, self.compute.world_size)
                piece = self._share(bucket, whole)
                if piece.shape != like.shape:
                    raise ValueError(f"the optimizer state {key} is of another model: resume with the same flags")
                like.copy_(piece)


def _pad(x: torch.Tensor, world_size: int) -> torch.Tensor:
    missing = -x.size(0) % world_size
    return torch.cat((x, x.new_zeros((missing, *x.shape[1:])))) if missing else x
