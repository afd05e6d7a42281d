"""The recipe: what follows from `--depth`, the one dial.

    depth -> width and heads (`model_config`)
          -> training tokens (`horizon_tokens`): a fixed ratio to the parameters that do the work
          -> batch size (`batch_tokens`) -> number of steps
          -> learning rates (`learning_rate_scales`) and weight decay (`weight_decay`) for that batch and horizon

The constants hold at depth 12, and scaling rules carry them to other depths. The schedules at the end of the file say
how learning rate, momentum and decay change during a run. All are pure functions of numbers, and the flag of the same
name overrides each.
"""

import math
from typing import Any

import torch

from nanochat.gpt import GPT, GPTConfig

REFERENCE_DEPTH = 12  # where the constants below were tuned
REFERENCE_BATCH = 2**19  # tokens per step at that depth
LEARNING_RATES = {"matrix": 0.02, "embedding": 0.3, "unembedding": 0.008, "scalar": 0.5}
WEIGHT_DECAY = 0.28  # Muon's, at the reference depth and batch
HORIZON = 12.0  # training tokens per parameter of the matrices and the head


def model_config(
    depth: int, vocab_size: int, sequence_len: int, aspect_ratio: int = 64, head_dim: int = 128, **fields: Any
) -> GPTConfig:
    """Return the config of a depth: width = aspect_ratio · depth, rounded up to whole heads.

    `fields` are further fields of `GPTConfig`. Raises ValueError when depth, aspect ratio or head dim make no model.
    """
    if min(depth, aspect_ratio, head_dim) < 1:
        raise ValueError(f"--depth {depth}, --aspect-ratio {aspect_ratio} and --head-dim {head_dim} must be positive")
    heads = -(-depth * aspect_ratio // head_dim)
    return GPTConfig(
        sequence_len=sequence_len,
        vocab_size=vocab_size,
        n_layer=depth,
        n_head=heads,
        n_kv_head=heads,
        n_embd=heads * head_dim,
        **fields,
    )


def scaling_parameters(config: GPTConfig) -> int:
    """Count the parameters that set the horizon: the blocks' matrices and the head.

    Embeddings are looked up, not multiplied: they cost almost no compute and follow no scaling law.
    """
    with torch.device("meta"):  # shapes only: a large model costs no memory
        model = GPT(config)
    return sum(p.numel() for p in model.blocks.parameters()) + model.head.weight.numel()


def horizon_tokens(config: GPTConfig, ratio: float = HORIZON) -> int:
    """Return the training tokens, `ratio` per scaling parameter.

    Chinchilla (arXiv 2203.15556) found that a constant ratio makes the best of a compute budget: about 20, for AdamW
    and counting all parameters. With Muon, and counting these alone, the recipe takes 12.
    """
    return round(ratio * scaling_parameters(config))


def reference_tokens(config: GPTConfig) -> int:
    """Return the horizon of the reference depth with the same vocabulary."""
    return horizon_tokens(model_config(REFERENCE_DEPTH, config.vocab_size, config.sequence_len))


def batch_tokens(tokens: int, reference: int) -> int:
    """Return tokens per step: the reference batch times (tokens / reference)^0.383, to the nearest power of two.

    The critical batch size, beyond which more rows per step no longer save steps, grows with the tokens seen and not
    with the model's size (Power Lines, arXiv 2505.13738).
    """
    return 2 ** round(math.log2(REFERENCE_BATCH * (tokens / reference) ** 0.383))


def learning_rate_scales(batch: int, factor: float | None = None) -> dict[str, float]:
    """Return the factor on each of LEARNING_RATES at `batch` tokens per step.

    From scratch (`factor` unset): 1, except for scalars, which get the fourth root of the relative batch size. The
    usual square root for all was measured to be too low for the small batches of small runs (dev/LOG.md). Going on
    from a trained model: `factor` times the fourth root for all, as large steps would undo what it knows.
    """
    ratio = batch / REFERENCE_BATCH
    if factor is not None:
        return dict.fromkeys(LEARNING_RATES, factor * ratio**0.25)
    return dict.fromkeys(LEARNING_RATES, 1.0) | {"scalar": ratio**0.25}


def weight_decay(batch: int, tokens: int, reference: int) -> float:
    """Return Muon's weight decay: 0.28·√(B/B12)·(D12/D) for batch B and D tokens.

    Decay averages the weights over a window of steps. The rule keeps that window a fixed share of the run, whatever
    its length. It is capped at the reference: on much shorter runs it would decay the matrices to nothing.
    """
    rule = (batch / REFERENCE_BATCH) ** 0.5 * (reference / tokens)
    return WEIGHT_DECAY * min(1.0, rule)


def learning_rate_multiplier(
    step: int, steps: int, warmup: int = 40, warmdown: float = 0.65, final: float = 0.05, schedule: str = "linear"
) -> float:
    """Return the factor on every learning rate at `step` of `steps`, in [0, 1].

    First a linear warmup over `warmup` steps. Then "linear": flat, and falling over the last `warmdown` share of the
    run to `final`. Or "cosine": half a cosine from 1 to `final`. Raises ValueError for another schedule.
    """
    # While Adam's averages are young its steps are noisy: begin small. A short run cannot afford 40 steps of that.
    warmup = min(warmup, steps // 10)
    if step < warmup:
        return (step + 1) / warmup
    if schedule == "cosine":
        progress = (step - warmup) / max(1, steps - warmup)
        return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * progress))
    if schedule != "linear":
        raise ValueError(f"--schedule {schedule}: choose linear or cosine")
    # Noise in the steps sets a floor under the loss that is proportional to the learning rate, so lower it last.
    left = (steps - step) / max(1.0, steps * warmdown)
    return 1.0 if left >= 1 else final + (1 - final) * left


def muon_momentum(step: int, steps: int, warmdown_ratio: float = 0.65) -> float:
    """Return Muon's momentum: 0.85 to 0.97 over the first 400 steps, then to 0.90 while the learning rate falls.

    Early gradients change direction quickly, so a long average would be stale. Large steps later are worth averaging
    over more of them, and at the end small ones need it less.
    """
    momentum = 0.85 + 0.12 * min(1.0, step / 400)
    left = (steps - step) / max(1.0, steps * warmdown_ratio)
    return momentum if left >= 1 else 0.90 + (momentum - 0.90) * left


def weight_decay_multiplier(step: int, steps: int) -> float:
    """Return the factor on Muon's weight decay: half a cosine from 1 to 0, so that nothing shrinks at the end."""
    return 0.5 * (1 + math.cos(math.pi * min(1.0, step / max(1, steps))))
