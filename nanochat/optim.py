"""Muon for the matrices and AdamW for everything else, in one optimizer with its state sharded over the ranks.

Sharding is ZeRO-2 (arXiv 1910.02054): gradients are reduce-scattered, each rank keeps the state of its share and
updates it, and the updated parameters are all-gathered. Rank r of w owns the matrices r, r + w, ... of a shape (Muon)
and the r-th block of rows of any other parameter (AdamW). Parameters too small to be worth the messages are
all-reduced and updated everywhere. Saved shares join and split again on any number of ranks.

A message is one matrix for each owner, or one parameter. After `overlap_next_backward` it leaves when its gradients are
there, while the backward pass goes on. Messages have a fixed order, last layers first, on which all ranks agree.
"""

import functools
from collections.abc import Callable, Iterable
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
SMALL = 4096  # elements below which a parameter is updated on every rank


def orthogonalize(g_KMN: torch.Tensor, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """The nearest semi-orthogonal matrix to each of K matrices, roughly: U·Vᵀ of its SVD, in 5 iterations.

    Small singular values do not get all the way to 1; the Frobenius norm is put to what it would be if they did.
    """
    x = g_KMN.to(dtype)
    tall = x.size(-2) > x.size(-1)
    if tall:
        x = x.mT
    x = x / (x.norm(dim=(-2, -1), keepdim=True) * 1.01 + 1e-6)
    for a, b, c in _POLAR_EXPRESS:
        gram = x @ x.mT
        x = a * x + (b * gram + c * (gram @ gram)) @ x
    x = x * (x.size(-2) ** 0.5 / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-6))
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
    """AdamW (arXiv 1711.05101) in place; `step` counts from 0. Its moments `mean` and `square` are fp32 for any w."""
    g = g.float()
    mean.lerp_(g, 1 - betas[0])
    square.lerp_(g.square(), 1 - betas[1])
    denominator = (square / (1 - betas[1] ** (step + 1))).sqrt_().add_(eps)
    w.mul_(1 - lr * weight_decay)
    w.sub_((mean / denominator * (lr / (1 - betas[0] ** (step + 1)))).to(w.dtype))


@dataclass
class Message:
    """Gradients that are reduced together, on their way."""

    parameters: list[torch.Tensor]
    missing: set[torch.Tensor] = field(default_factory=set)  # those whose gradient is not there yet
    work: dist.Work | None = None
    sent: torch.Tensor | None = None  # kept until it is
    share: torch.Tensor | None = None  # this rank's part of the sum, once `work` is done


@dataclass
class Bucket:
    """Parameters that are updated together: stacked matrices (Muon), or one parameter (AdamW)."""

    name: str
    parameters: list[torch.Tensor]
    lr: float
    betas: tuple[float, float] | None = None  # None = Muon
    weight_decay: float = 0.0
    sharded: bool = True
    eps: float = 1e-10
    state: dict[str, torch.Tensor] = field(default_factory=dict)
    messages: list[Message] = field(default_factory=list)

    @property
    def rows(self) -> int:
        """Length of the axis that is cut into shares: matrices, or rows of a parameter (of a scalar: 0)."""
        return len(self.parameters) if self.betas is None else sum(self.parameters[0].shape[:1])

    def whole(self, tensors: list[torch.Tensor]) -> torch.Tensor:
        """What is cut into shares along its first axis: the matrices stacked, or the one parameter."""
        return torch.stack(tensors) if self.betas is None else tensors[0]


class MuonAdamW:
    """The optimizer of a `GPT`. Gradients are summed over ranks, so each rank's loss is its part of the whole.

    learning rates: keys matrix, embedding, unembedding, scalar (recipe.py); AdamW's follow width as (width/768)^-½.
    overlap: whether `overlap_next_backward` does anything. The results are the same to the bit.
    """

    ranks_a_matrix = 2  # beyond that every rank updates all matrices of a shape: shares would be padding mostly

    def __init__(
        self, model: GPT, lrs: dict[str, float], weight_decay: float, compute: Compute, overlap: bool = True
    ) -> None:
        self.compute = compute
        # An fp32 run is there to be exact: bf16 would turn the order of a sum into 1e-2 of loss within 20 steps.
        self.muon_dtype = torch.float32 if compute.dtype == torch.float32 else torch.bfloat16
        width = (model.config.n_embd / 768) ** -0.5
        shapes: dict[tuple[int, ...], list[torch.Tensor]] = {}
        for parameter in model.blocks.parameters():
            shapes.setdefault(tuple(parameter.shape), []).append(parameter)
        self.buckets: list[Bucket] = []
        for shape, stack in shapes.items():
            sharded = compute.world_size <= self.ranks_a_matrix * len(stack)
            name = f"muon_{'x'.join(map(str, shape))}"
            self.buckets.append(Bucket(name, stack, lrs["matrix"], None, weight_decay, sharded))

        def adamw(name: str, parameter: torch.Tensor, lr: float, betas: tuple[float, float], decay: float):
            small = parameter.numel() < SMALL
            # The first gradients of the scalars are rounding noise, 1e-10 to 1e-8: projections into the residual are
            # zero then, and the last norm undoes any scale. They must not become steps of full size.
            eps = 1e-6 if small else 1e-10
            self.buckets.append(Bucket(name, [parameter], lr, betas, decay, not small, eps))

        adamw("head", model.head.weight, lrs["unembedding"] * width, (0.8, 0.96), 0.01)
        adamw("embed", model.embed.weight, lrs["embedding"] * width, (0.8, 0.995), 0.001)
        for place, table in model.value_embeds.named_parameters():
            adamw(f"value_embed_{place.split('.')[0]}", table, lrs["embedding"] * width * 0.5, (0.8, 0.995), 0.01)
        adamw("resid_scale", model.resid_scale, lrs["scalar"] * 0.01, (0.8, 0.95), 0.05)
        adamw("embed_skip", model.embed_skip, lrs["scalar"], (0.96, 0.95), 0.0)
        for name in ("smear_gate.weight", "smear_scale", "backout"):
            extra = dict(model.named_parameters()).get(name)
            if extra is not None:
                adamw(name, extra, lrs["scalar"] * 0.4, (0.8, 0.95), 0.0)
        covered = sum(len(bucket.parameters) for bucket in self.buckets)
        assert covered == len(list(model.parameters())), "a parameter has no optimizer"
        self._plan(model)
        self._sent, self._overlapping = 0, False
        if overlap and compute.world_size > 1:
            for _, message in self._queue:
                for parameter in message.parameters:
                    parameter.register_post_accumulate_grad_hook(functools.partial(self._arrived, message))

    # The ways of a gradient to its owner and of a parameter back to all.

    def _plan(self, model: GPT) -> None:
        """Cut buckets into messages and put both in the order in which a backward pass completes them."""
        layers = dict.fromkeys(model.parameters(), -1) | {model.head.weight: model.config.n_layer}
        for part in (model.blocks, model.value_embeds):
            layers |= {p: int(name.split(".")[0]) for name, p in part.named_parameters()}
        w = self.compute.world_size
        for bucket in self.buckets:
            n = w if w > 1 and bucket.sharded else len(bucket.parameters)
            bucket.messages = [Message(bucket.parameters[i : i + n]) for i in range(0, len(bucket.parameters), n)]
        self.buckets.sort(key=lambda bucket: -min(layers[p] for p in bucket.parameters))
        self._queue = [(bucket, message) for bucket in self.buckets for message in bucket.messages]
        self._queue.sort(key=lambda item: -min(layers[p] for p in item[1].parameters))

    def overlap_next_backward(self) -> None:
        """Call before the last backward pass of a step, whose gradients complete those of the passes before it."""
        self._overlapping = True
        for _, message in self._queue:
            message.missing = set(message.parameters)

    def _arrived(self, message: Message, parameter: torch.Tensor) -> None:
        if self._overlapping:
            message.missing.discard(parameter)
            while self._sent < len(self._queue) and not self._queue[self._sent][1].missing:
                self._send_next()

    @torch.no_grad()
    def _send_next(self) -> None:
        """Begin to reduce the next message, and free its gradients; zero where one took no part in the loss."""
        bucket, message = self._queue[self._sent]
        self._sent += 1
        self._reduce(bucket, message, [torch.zeros_like(p) if p.grad is None else p.grad for p in message.parameters])
        for parameter in message.parameters:
            parameter.grad = None

    def _reduce(self, bucket: Bucket, message: Message, gradients: list[torch.Tensor]) -> None:
        w = self.compute.world_size
        message.share = whole = bucket.whole(gradients)
        if w > 1 and not bucket.sharded:
            message.work = dist.all_reduce(whole, async_op=True)
        elif w > 1:
            message.sent = whole = pad_rows(whole, w).contiguous()
            if self.compute.device.type == "cuda":
                message.share = torch.empty_like(whole[: whole.size(0) // w])
                message.work = _reduce_scatter(message.share, whole, async_op=True)
            else:  # gloo's reduce_scatter is an all-reduce, twice the bytes: send each part to where it is summed
                message.share = torch.empty_like(whole)
                message.work = dist.all_to_all_single(message.share, whole, async_op=True)

    def _reduced(self, bucket: Bucket) -> torch.Tensor:
        """This rank's share of the gradient, summed over ranks."""
        shares = []
        for message in bucket.messages:
            if message.work is not None:
                message.work.wait()
            share = message.share
            assert share is not None, "reduced before it was sent"
            if message.sent is not None and self.compute.device.type != "cuda":
                share = share.unflatten(0, (self.compute.world_size, -1)).sum(0)
            shares.append(share)
            message.work = message.sent = message.share = None
        gradient = torch.cat(shares) if len(shares) > 1 else shares[0]
        # Sums of the same bf16 gradients in another order differ in the last bit of fp32. Rounded to bf16 they are the
        # same again on any number of ranks; otherwise losses differ by 1e-4 within 20 steps.
        return gradient.bfloat16().to(gradient.dtype) if self.compute.dtype == torch.bfloat16 else gradient

    def _cut(self, bucket: Bucket, whole: torch.Tensor) -> torch.Tensor:
        """This rank's share of a whole, zeros where there is nothing left to own."""
        rank, world_size = self.compute.rank, self.compute.world_size
        if not bucket.sharded or world_size == 1:
            return whole
        whole = pad_rows(whole, world_size)
        return whole[rank::world_size] if bucket.betas is None else whole.chunk(world_size)[rank]

    def _own(self, bucket: Bucket) -> torch.Tensor:
        """This rank's share of the parameters; may be a view of them."""
        return self._cut(bucket, bucket.whole([p.detach() for p in bucket.parameters])).contiguous()

    def _spread(self, bucket: Bucket, share: torch.Tensor) -> Callable[[], None]:
        """Begin to give every rank the updated parameters; calling the result ends it."""
        w = self.compute.world_size
        if not bucket.sharded or w == 1:
            pieces = list(share) if bucket.betas is None else []  # AdamW has worked on the parameter itself
            work = None
        else:
            whole = share.new_empty((share.size(0) * w, *share.shape[1:]))
            work = _all_gather(whole, share, async_op=True)
            pieces = [whole[: bucket.rows]] if bucket.betas else [whole[at] for at in _dealt(bucket.rows, w)]

        def finish() -> None:
            if work is not None:
                work.wait()
            for parameter, value in zip(bucket.parameters, pieces):
                parameter.copy_(value)

        return finish

    def traffic(self) -> tuple[int, float]:
        """Messages in which gradients are reduced, and bytes of gradients and parameters that a rank sends, a step."""
        w, total = self.compute.world_size, 0.0
        for bucket, message in self._queue:
            rows = len(message.parameters) if bucket.betas is None else bucket.rows
            padded = -(-rows // w) * w / rows if bucket.sharded else 1
            total += 2 * (w - 1) / w * padded * sum(p.numel() * p.element_size() for p in message.parameters)
        return len(self._queue), total

    def _state(self, bucket: Bucket, share: torch.Tensor) -> dict[str, torch.Tensor]:
        if not bucket.state:
            bucket.state["mean"] = torch.zeros_like(share, dtype=torch.float32)
            like = share
            if bucket.betas is None:  # one a neuron
                like = share[..., :1] if share.size(-2) >= share.size(-1) else share[..., :1, :]
            bucket.state["square"] = torch.zeros_like(like, dtype=torch.float32)
        return bucket.state

    @torch.no_grad()
    def step(
        self, step: int, lr_mult: float = 1.0, momentum: float = 0.95, wd_mult: float = 1.0, clip: float | None = None
    ) -> float | None:
        """Reduce gradients, update, and clear them. `step` counts from 0.

        clip: the largest L2 norm of the whole gradient, applied after reduction so that all ranks agree; the norm
        before clipping is returned when it was asked for.
        """
        while self._sent < len(self._queue):
            self._send_next()
        self._sent, self._overlapping = 0, False
        gradients: Iterable[torch.Tensor] = map(self._reduced, self.buckets)
        norm, finish = None, lambda: None
        if clip is not None:
            gradients = list(gradients)
            norm = self._clip(gradients, clip)
        for bucket, gradient in zip(self.buckets, gradients, strict=True):
            share = self._own(bucket)
            state = self._state(bucket, share)
            moments, lr = (state["mean"], state["square"]), bucket.lr * lr_mult
            if bucket.betas is None:
                decay = bucket.weight_decay * wd_mult
                muon_update(share, gradient, *moments, lr, momentum, decay, dtype=self.muon_dtype)
            else:
                adamw_update(share, gradient, *moments, step, lr, bucket.betas, bucket.weight_decay, bucket.eps)
            before, finish = finish, self._spread(bucket, share)
            before()  # one bucket travels while the next is updated
        finish()
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
        """This rank's share of the state, by `bucket/part`; what every rank holds is in rank 0's."""
        mine = [bucket for bucket in self.buckets if bucket.sharded or self.compute.rank == 0]
        states = {bucket.name: bucket.state or self._state(bucket, self._own(bucket)) for bucket in mine}
        return {f"{name}/{part}": value for name, state in states.items() for part, value in state.items()}

    @torch.no_grad()
    def load_state_dicts(self, shares: list[dict[str, torch.Tensor]]) -> None:
        """Take up the state that any number of ranks saved, given in the order of their ranks.

        Raises ValueError when a part is missing or has another shape: a checkpoint of another model.
        """
        for bucket in self.buckets:
            bucket.state = {}
            for part, like in self._state(bucket, self._own(bucket)).items():
                key = f"{bucket.name}/{part}"
                pieces = [share[key] for share in shares if key in share]
                if not pieces:
                    raise ValueError(f"the optimizer state lacks {key}: resume the run with the flags it began with")
                rows, whole = bucket.rows, torch.cat(pieces) if bucket.rows else pieces[0]
                if rows <= sum(whole.shape[:1]) < rows + len(pieces):
                    if bucket.betas is None:
                        whole = whole[_dealt(rows, len(pieces))]
                    elif rows:
                        whole = whole[:rows]
                    whole = self._cut(bucket, whole)
                if whole.shape != like.shape:
                    raise ValueError(f"the optimizer state {key} is of another model: resume with the same flags")
                like.copy_(whole)


def pad_rows(x: torch.Tensor, multiple: int) -> torch.Tensor:
    """`x` with zeros added along the first axis up to a multiple."""
    missing = -x.size(0) % multiple
    return torch.cat((x, x.new_zeros((missing, *x.shape[1:])))) if missing else x


def _dealt(rows: int, world_size: int) -> list[int]:
    """Where each of `rows` matrices, dealt to the ranks in turn, stands in the ranks' shares laid end to end."""
    each = -(-rows // world_size)
    return [row % world_size * each + row // world_size for row in range(rows)]
