"""The recipe: what follows from `--depth`, the one dial, and how it changes during a run.

    depth -> width and heads (`model_config`)
          -> training tokens (`horizon_tokens`): a fixed ratio to the parameters that do the work
          -> batch size (`batch_tokens`) -> number of steps
          -> learning rates (`learning_rate_scales`) and weight decay (`weight_decay`) for that batch and horizon

The constants were tuned at depth 12, and scaling rules carry them to other depths. Where no other source is named, a
figure is that of karpathy/nanochat (92d63d4), which tuned it on 8 H100s. The schedules of learning rate, momentum and
decay stand at the end. All are pure functions of numbers, and the flag of the same name overrides each.
"""

import math
from typing import Any

import torch

from nanochat.gpt import GPT, GPTConfig

REFERENCE_DEPTH = 12  # where the constants below were tuned
REFERENCE_BATCH = 2**19  # tokens per step at that depth
LEARNING_RATES = {"matrix": 0.02, "embedding": 0.3, "unembedding": 0.008, "scalar": 0.5}  # Muon, AdamW, AdamW, AdamW
WEIGHT_DECAY = 0.28  # Muon's, at the reference depth and batch
HORIZON = 12.0  # training tokens per parameter of the matrices and the head

# The learning-rate schedule. On two cores (d2, 160 steps, three seeds; dev/LOG.md, 2026-11-22) a warmdown over .4 or
# all of the run gave 1.994 and 2.021 bits per byte against 2.002, and falling to 0 instead of 5 % 2.007.
WARMUP_STEPS = 40
WARMDOWN_RATIO = 0.65
FINAL_LR_FRAC = 0.05


# --- the model


def model_config(
    depth: int, vocab_size: int, sequence_len: int, aspect_ratio: int = 64, head_dim: int = 128, **fields: Any
) -> GPTConfig:
    """Return the config of a depth: width = aspect_ratio · depth, rounded up to whole heads.

    model_config(5, ...) has 384 channels: 64 · 5 = 320 is two and a half heads of 128. `fields` are further fields of
    `GPTConfig`. Raises ValueError when depth, aspect ratio or head dim make no model.
    """
    if min(depth, aspect_ratio, head_dim) < 1:
        raise ValueError(f"--depth {depth}, --aspect-ratio {aspect_ratio} and --head-dim {head_dim} must be positive")
    heads = math.ceil(depth * aspect_ratio / head_dim)
    return GPTConfig(
        sequence_len=sequence_len,
        vocab_size=vocab_size,
        n_layer=depth,
        n_head=heads,
        n_kv_head=heads,
        n_embd=heads * head_dim,
        **fields,
    )


# --- how long, and how many tokens at a time


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


def reference_tokens(config: GPTConfig, ratio: float = HORIZON) -> int:
    """Return the horizon of the reference depth with the same vocabulary and ratio."""
    return horizon_tokens(model_config(REFERENCE_DEPTH, config.vocab_size, config.sequence_len), ratio)


def batch_tokens(tokens: int, reference: int) -> int:
    """Return tokens per step: the reference batch times (tokens / reference)^0.383, to the nearest power of two.

    The critical batch size, beyond which more rows per step no longer save steps, grows with the tokens seen and not
    with the model's size (Power Lines, arXiv 2505.13738, which measured the exponent).
    """
    return 2 ** round(math.log2(REFERENCE_BATCH * (tokens / reference) ** 0.383))


# --- how large the steps


def learning_rate_scales(batch: int, factor: float | None = None) -> dict[str, float]:
    """Return the factor on each of LEARNING_RATES at `batch` tokens per step.

    From scratch (`factor` unset): 1, except for scalars, which get the fourth root of the relative batch size. The
    usual square root for all was too low for the small batches of small runs: 1.53 bits per byte against 1.15 at 8,192
    tokens a step (d4; dev/LOG.md, 2026-11-21 and 22). Going on from a trained model: `factor` times the fourth root for
    all, as large steps would undo what it knows.
    """
    root = (batch / REFERENCE_BATCH) ** 0.25
    if factor is not None:
        return dict.fromkeys(LEARNING_RATES, factor * root)
    return {"matrix": 1.0, "embedding": 1.0, "unembedding": 1.0, "scalar": root}


def weight_decay(batch: int, tokens: int, reference: int) -> float:
    """Return Muon's weight decay: 0.28·√(B/B12)·(D12/D) for batch B and D tokens.

    Decay averages the weights over a window of steps. The rule keeps that window a fixed share of the run, whatever
    its length. It is capped at the reference: on much shorter runs it would decay the matrices to nothing.
    """
    rule = (batch / REFERENCE_BATCH) ** 0.5 * (reference / tokens)
    return WEIGHT_DECAY * min(1.0, rule)


# --- schedules: how they change from step 0 to `steps`


def learning_rate_multiplier(
    step: int, steps: int, *, warmup: int, warmdown: float, final: float, schedule: str
) -> float:
    """Return the factor on every learning rate at `step` of `steps`, in [0, 1].

    First a linear warmup over `warmup` steps. Then "linear": flat, and falling over the last `warmdown` share of the
    run to `final`. Or "cosine": half a cosine from 1 to `final`. Raises ValueError for another schedule.

        linear      ______            cosine   __
                   /      \\                   /  \\
                  /        \\__ final         /    \\__ final
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


def muon_momentum(step: int, steps: int, warmdown: float) -> float:
    """Return Muon's momentum: 0.85 to 0.97 over the first 400 steps, then to 0.90 while the learning rate falls.

    Early gradients change direction quickly, so a long average would be stale. Large steps later are worth averaging
    over more of them, and at the end small ones need it less.
    """
    momentum = 0.85 + 0.12 * min(1.0, step / 400)
    left = (steps - step) / max(1.0, steps * warmdown)
    return momentum if left >= 1 else 0.90 + (momentum - 0.90) * left


def weight_decay_multiplier(step: int, steps: int) -> float:
    """Return the factor on Muon's weight decay: half a cosine from 1 to 0, so that nothing shrinks at the end."""
    return 0.5 * (1 + math.cos(math.pi * min(1.0, step / max(1, steps))))
