"""The recipe: from `--depth` to width, horizon, batch size, learning rates, weight decay and schedules.

Pure functions of numbers. What a function returns can be overridden by the flag of the same name.
"""

import math
from typing import Any

import torch

from nanochat.gpt import GPT, GPTConfig

REFERENCE_DEPTH = 12  # where the constants below were tuned
REFERENCE_BATCH = 2**19  # tokens a step at that depth
LEARNING_RATES = {"matrix": 0.02, "embedding": 0.3, "unembedding": 0.008, "scalar": 0.5}
WEIGHT_DECAY = 0.28
HORIZON = 12.0  # training tokens for each parameter of the matrices and the head


def model_config(
    depth: int, vocab_size: int, sequence_len: int, aspect_ratio: int = 64, head_dim: int = 128, **fields: Any
) -> GPTConfig:
    """The model of a depth: width aspect_ratio·depth, rounded up to whole heads. `fields` go to the config as they are.

    Raises ValueError for a depth, width or head dim that makes no model.
    """
    if min(depth, aspect_ratio, head_dim) < 1:
        raise ValueError(f"--depth {depth}, --aspect-ratio {aspect_ratio} and --head-dim {head_dim} must be positive")
    heads = -(-depth * aspect_ratio // head_dim)
    shape: dict[str, Any] = {"n_layer": depth, "n_head": heads, "n_kv_head": heads, "n_embd": heads * head_dim}
    return GPTConfig(sequence_len=sequence_len, vocab_size=vocab_size, **shape, **fields)


def scaling_parameters(config: GPTConfig) -> int:
    """Parameters that count for the horizon: the blocks' matrices and the head, without embeddings."""
    with torch.device("meta"):
        model = GPT(config)
    return sum(p.numel() for p in model.blocks.parameters()) + model.head.weight.numel()


def horizon_tokens(config: GPTConfig, ratio: float = HORIZON) -> int:
    """Training tokens: `ratio` for each scaling parameter (after Chinchilla, arXiv 2203.15556)."""
    return round(ratio * scaling_parameters(config))


def reference_tokens(config: GPTConfig) -> int:
    """The horizon of the reference depth with the same vocabulary."""
    return horizon_tokens(model_config(REFERENCE_DEPTH, config.vocab_size, config.sequence_len))


def batch_tokens(tokens: int, reference: int) -> int:
    """Tokens a step: the reference batch scaled by tokens^0.383 (arXiv 2505.13738), to the nearest power of two."""
    return 2 ** round(math.log2(REFERENCE_BATCH * (tokens / reference) ** 0.383))


def learning_rate_scales(batch: int, factor: float | None = None) -> dict[str, float]:
    """The factor on each of LEARNING_RATES at `batch` tokens a step.

    From scratch (`factor` unset) none, but for scalars the batch's fourth root; where a trained model learns on,
    `factor` times the fourth root. Any root is too low for the small batches of small runs (dev/LOG.md).
    """
    ratio = batch / REFERENCE_BATCH
    if factor is not None:
        return dict.fromkeys(LEARNING_RATES, factor * ratio**0.25)
    return dict.fromkeys(LEARNING_RATES, 1.0) | {"scalar": ratio**0.25}


def weight_decay(batch: int, tokens: int, reference: int) -> float:
    """Muon's weight decay: 0.28·√(B/B12)·(D12/D), which keeps the decay's horizon a fixed share of the run.

    Not above the reference's own: on runs much shorter than it the rule would decay matrices to nothing.
    """
    return WEIGHT_DECAY * min(1.0, (batch / REFERENCE_BATCH) ** 0.5 * reference / tokens)


def learning_rate_multiplier(
    step: int, steps: int, warmup: int = 40, warmdown: float = 0.65, final: float = 0.05, schedule: str = "linear"
) -> float:
    """The factor on every learning rate at `step` of `steps`, in [0, 1].

    Linear warmup over `warmup` steps (at most a tenth of the run); then "linear": flat, falling over the last
    `warmdown` of the run to `final`; "cosine": half a cosine from 1 to `final`; else ValueError.
    """
    warmup = min(warmup, steps // 10)
    if step < warmup:
        return (step + 1) / warmup
    if schedule == "cosine":
        progress = (step - warmup) / max(1, steps - warmup)
        return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * progress))
    if schedule != "linear":
        raise ValueError(f"--schedule {schedule}: choose linear or cosine")
    left = (steps - step) / max(1.0, steps * warmdown)
    return 1.0 if left >= 1 else final + (1 - final) * left


def muon_momentum(step: int, steps: int, warmdown_ratio: float = 0.65) -> float:
    """Muon's momentum: 0.85 to 0.97 over the first 400 steps, then to 0.90 while the learning rate falls."""
    momentum = 0.85 + 0.12 * min(1.0, step / 400)
    left = (steps - step) / max(1.0, steps * warmdown_ratio)
    return momentum if left >= 1 else 0.90 + (momentum - 0.90) * left


def weight_decay_multiplier(step: int, steps: int) -> float:
    """The factor on Muon's weight decay: half a cosine from 1 to 0."""
    return 0.5 * (1 + math.cos(math.pi * min(1.0, step / max(1, steps))))
