"""The model of dev/microgpt.py on tensors: the same weights and windows give the same losses, to rounding.

Shapes: B windows, T positions, C channels, H heads, D channels of a head, V characters.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from dev.microgpt import EPS, Shape


def _norm(x: torch.Tensor) -> torch.Tensor:
    return F.rms_norm(x, (x.size(-1),), eps=EPS)


class TensorGPT:
    """The transformer, all positions of all windows at once; a mask hides what lies ahead."""

    def __init__(self, shape: Shape, weights: dict[str, list[list[float]]]) -> None:
        self.shape = shape
        self.weights = {name: torch.tensor(w, dtype=torch.float64, requires_grad=True) for name, w in weights.items()}

    def parameters(self) -> list[torch.Tensor]:
        """Every matrix that is trained."""
        return list(self.weights.values())

    def plain_weights(self) -> dict[str, list[list[float]]]:
        """The weights as plain numbers."""
        return {name: weight.tolist() for name, weight in self.weights.items()}

    def __call__(self, idx_BT: torch.Tensor) -> torch.Tensor:
        """Logits of the next token at every position, (B, T, V)."""
        x_BTC = _norm(F.embedding(idx_BT, self.weights["embed"]))
        for layer in range(self.shape.layers):
            x_BTC = x_BTC + self._attention(_norm(x_BTC), layer)
            hidden = F.linear(_norm(x_BTC), self.weights[f"{layer}.up"]).relu().square()
            x_BTC = x_BTC + F.linear(hidden, self.weights[f"{layer}.down"])
        return F.linear(_norm(x_BTC), self.weights["head"])

    def _attention(self, x_BTC: torch.Tensor, layer: int) -> torch.Tensor:
        B, T, C = x_BTC.shape
        half = C // self.shape.heads // 2

        def split(name: str) -> torch.Tensor:
            return F.linear(x_BTC, self.weights[f"{layer}.{name}"]).view(B, T, self.shape.heads, -1).transpose(1, 2)

        turns = 100_000.0 ** (-torch.arange(half, dtype=torch.float64) / half)
        angles_TD = torch.arange(T, dtype=torch.float64)[:, None] * turns
        cos_TD = angles_TD.cos()
        sin_TD = angles_TD.sin()

        def rotate(x_BHTD: torch.Tensor) -> torch.Tensor:
            a, b = x_BHTD.chunk(2, dim=-1)
            return torch.cat((a * cos_TD - b * sin_TD, b * cos_TD + a * sin_TD), dim=-1)

        q = _norm(rotate(split("query")))
        k = _norm(rotate(split("key")))
        v = split("value")
        y_BHTD = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return F.linear(y_BHTD.transpose(1, 2).reshape(B, T, C), self.weights[f"{layer}.out"])

    def loss(self, windows: Sequence[Sequence[int]]) -> torch.Tensor:
        """Mean negative log-likelihood in nats of each token after the first of its window."""
        ids_BT = torch.tensor(windows)
        return F.cross_entropy(self(ids_BT[:, :-1]).flatten(0, 1), ids_BT[:, 1:].flatten())


class TensorSGD:
    """torch's SGD, with the learning rate given at each step."""

    def __init__(self, parameters: list[torch.Tensor]) -> None:
        self._optimizer = self._make(parameters)

    def _make(self, parameters: list[torch.Tensor]) -> torch.optim.Optimizer:
        return torch.optim.SGD(parameters, lr=1.0)

    def step(self, lr: float) -> None:
        """Update every parameter and forget its gradient."""
        self._optimizer.param_groups[0]["lr"] = lr
        self._optimizer.step()
        self._optimizer.zero_grad()


class TensorAdamW(TensorSGD):
    """torch's AdamW, with the learning rate given at each step."""

    def _make(self, parameters: list[torch.Tensor]) -> torch.optim.Optimizer:
        return torch.optim.AdamW(parameters, lr=1.0, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.01)
