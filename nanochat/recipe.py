"""The recipe: the flags of training, what follows from `--depth`, the one dial, and how it changes during a run.

    depth -> width and heads (`model_config`)
          -> training tokens (`horizon_tokens`): a fixed ratio to the parameters that do the work
          -> batch size (`batch_tokens`) -> number of steps
          -> learning rates (`learning_rate_scales`) and weight decay (`weight_decay`) for that batch and horizon

One rule stands beside the parameters that it is about, in parameter_groups.py: the learning rates of embeddings and
head fall with the width, as (n_embd / 768)^-0.5, and each small parameter has its share of the scalars'.

The constants were tuned at depth 12, and scaling rules carry them to other depths. Where no other source is named, a
figure is that of karpathy/nanochat (92d63d4), which tuned it on 8 H100s. The schedules of learning rate, momentum and
decay stand at the end. All are pure functions, and a flag of `TrainConfig` or of scripts/base_train.py overrides each.
"""

import math
import re
from dataclasses import dataclass
from typing import Any

import torch

from nanochat.cli import option, require_positive
from nanochat.gpt import GPT, GPTConfig

REFERENCE_DEPTH = 12  # where the constants below were tuned
REFERENCE_BATCH = 2**19  # tokens per step at that depth
LEARNING_RATES = {"matrix": 0.02, "embedding": 0.3, "unembedding": 0.008, "scalar": 0.5}  # Muon, AdamW, AdamW, AdamW
WEIGHT_DECAY = 0.28  # Muon's, at the reference depth and batch
HORIZON = 12.0  # training tokens per parameter of the matrices and the head


@dataclass(frozen=True)
class TrainConfig:
    """The flags that every training stage has."""

    run: str | None = option(None, "name of a wandb run (WANDB_MODE=offline works); unset = no wandb")
    device_type: str | None = option(None, "cuda | mps | cpu; unset = the fastest there is", ("cuda", "mps", "cpu"))
    seed: int = option(1337, "seed of weights and data order")
    model_tag: str | None = option(None, "name of the run's checkpoints")
    # the batch
    device_batch_size: int | None = option(
        None, "rows a device takes at once; unset or auto: on CUDA the most of 65,536 tokens that fit, else up to 32"
    )
    activation_checkpointing: bool | None = option(
        None, "recompute activations in the backward pass; unset = only if they do not fit"
    )
    total_batch_size: int | None = option(None, "tokens per step over all devices and micro-batches")
    num_iterations: int | None = option(None, "steps")
    # the optimizer
    embedding_lr: float = option(LEARNING_RATES["embedding"], "AdamW learning rate of the embeddings")
    unembedding_lr: float = option(LEARNING_RATES["unembedding"], "AdamW learning rate of the head")
    matrix_lr: float = option(LEARNING_RATES["matrix"], "Muon learning rate of the matrices")
    scalar_lr: float = option(LEARNING_RATES["scalar"], "AdamW learning rate of the scalars")
    weight_decay: float | None = option(None, "Muon weight decay; unset = from the recipe")
    # The learning-rate schedule, see learning_rate_multiplier. On two cores (d2, 160 steps, three seeds; dev/LOG.md,
    # 2026-11-22) a warmdown over .4 or all of the run gave 1.994 and 2.021 bits per byte against 2.002, and falling to
    # 0 instead of 5 % gave 2.007.
    schedule: str = option("linear", "how the learning rate falls", ("linear", "cosine"))
    warmup_steps: int = option(40, "steps of linear warmup, at most a tenth of the run")
    warmdown_ratio: float = option(
        0.65, "last share of the run, over which Muon's momentum falls, and with --schedule linear the learning rate"
    )
    final_lr_frac: float = option(0.05, "learning rate at the end, as a fraction")
    grad_clip: float | None = option(None, "largest gradient norm; unset = no clipping")
    # evaluating and saving
    eval_every: int = option(250, "steps between evaluations (0 = only at the end)")
    eval_tokens: int = option(20 * 2**19, "validation tokens, at most one pass over the validation set")
    sample_every: int = option(2000, "steps between samples (0 = only at the end)")
    save_every: int | None = option(
        None, "steps between checkpoints; unset = before every evaluation, on CUDA 1,000 steps or more apart"
    )
    keep: int = option(2, "newest checkpoints kept, beside the one with the best validation")
    resume: str | None = option(
        None, "continue from a step; alone: from the newest; auto: from the newest if there is one", bare="newest"
    )
    # speed
    compile: bool = option(True, "fuse with torch.compile where a compiler is there")
    fp8: bool = option(False, "matrix products of the blocks in fp8 (Ada, Hopper or later)")
    price: float | None = option(None, "dollars per hour of all machines together, to say what the run will cost")

    def __post_init__(self) -> None:
        require_positive(self, "device_batch_size", "total_batch_size", "num_iterations", "grad_clip", "eval_tokens")
        require_positive(self, "save_every", "keep")
        require_positive(self, "eval_every", "sample_every", "warmup_steps", "seed", "weight_decay", "price", zero=True)
        require_positive(self, "embedding_lr", "unembedding_lr", "matrix_lr", "scalar_lr", zero=True)
        if self.seed >= 2**63:
            raise ValueError(f"--seed {self.seed}: must be below 2**63")
        if self.model_tag is not None and not re.fullmatch(r"\w[\w.-]*", self.model_tag):
            raise ValueError(f"--model-tag {self.model_tag!r}: use letters, digits, '_', '-' and '.' only")
        if not 0 <= self.warmdown_ratio <= 1 or not 0 <= self.final_lr_frac <= 1:
            raise ValueError("--warmdown-ratio and --final-lr-frac must be between 0 and 1")
        if self.resume is not None and self.resume not in ("newest", "auto") and not self.resume.isdigit():
            raise ValueError(f"--resume {self.resume}: give a step, or nothing for the newest checkpoint, or auto")

    def learning_rates(self, scales: dict[str, float]) -> dict[str, float]:
        """Return the optimizer's learning rates: those of the flags, each times its factor (see recipe.py)."""
        return {
            "matrix": self.matrix_lr * scales["matrix"],
            "embedding": self.embedding_lr * scales["embedding"],
            "unembedding": self.unembedding_lr * scales["unembedding"],
            "scalar": self.scalar_lr * scales["scalar"],
        }


# --- the model


def model_config(
    depth: int,
    vocab_size: int,
    sequence_len: int,
    aspect_ratio: int = 64,
    head_dim: int = 128,
    n_kv_head: int | None = None,
    **fields: Any,
) -> GPTConfig:
    """Return the config of a depth: width = aspect_ratio · depth, rounded up to whole heads.

    model_config(5, ...) has 384 channels: 64 · 5 = 320 is two and a half heads of 128. n_kv_head: None = one for each
    query head. `fields` are further fields of `GPTConfig`. Raises ValueError when depth, aspect ratio, head dim or kv
    heads make no model.
    """
    if min(depth, aspect_ratio, head_dim) < 1:
        raise ValueError(f"--depth {depth}, --aspect-ratio {aspect_ratio} and --head-dim {head_dim} must be positive")
    heads = math.ceil(depth * aspect_ratio / head_dim)
    if n_kv_head is None:
        n_kv_head = heads
    if n_kv_head < 1 or heads % n_kv_head:
        possible = ", ".join(str(n) for n in range(1, heads + 1) if heads % n == 0)
        raise ValueError(f"--n-kv-head {n_kv_head} does not divide the model's {heads} heads: choose from {possible}")
    return GPTConfig(
        sequence_len=sequence_len,
        vocab_size=vocab_size,
        n_layer=depth,
        n_head=heads,
        n_kv_head=n_kv_head,
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

    From scratch (`factor` unset), at the reference batch and above: the square root of the relative batch size. A mean
    over twice the rows has half the variance, so its noise allows a step √2 times as large; the reference takes that
    for Muon too. Below it: 1, except for scalars, which get the fourth root. The square root was too low for the small
    batches of small runs: 1.53 bits per byte against 1.15 at 8,192 tokens a step (d4; dev/LOG.md, 2026-11-21 and 22).
    Going on from a trained model: `factor` times the fourth root for all, as large steps would undo what it knows.
    """
    root = (batch / REFERENCE_BATCH) ** 0.25
    if factor is not None:
        return dict.fromkeys(LEARNING_RATES, factor * root)
    if batch >= REFERENCE_BATCH:
        return dict.fromkeys(LEARNING_RATES, (batch / REFERENCE_BATCH) ** 0.5)
    return {"matrix": 1.0, "embedding": 1.0, "unembedding": 1.0, "scalar": root}


def weight_decay(batch: int, tokens: int, reference: int) -> float:
    """Return Muon's weight decay: 0.28·√(B/B12)·(D12/D) for batch B and D tokens.

    Decay averages the weights over a window of steps. The rule keeps that window a fixed share of the run, whatever
    its length. It is capped at the reference: on much shorter runs it would decay the matrices to nothing.
    """
    rule = (batch / REFERENCE_BATCH) ** 0.5 * (reference / tokens)
    return WEIGHT_DECAY * min(1.0, rule)


@dataclass(frozen=True)
class Plan:
    """How long a run is, in what steps, and how strongly its matrices decay."""

    batch: int  # tokens per step
    steps: int
    weight_decay: float


def make_plan(
    config: GPTConfig,
    ratio: float = HORIZON,
    tokens: int | None = None,
    batch: int | None = None,
    steps: int | None = None,
) -> Plan:
    """Derive the plan of a run from its model. What is given (tokens in all, tokens per step, steps) is kept."""
    # What a d12 would do at the same ratio: batch and decay were tuned there.
    reference = reference_tokens(config, ratio)
    if batch and steps:
        tokens = steps * batch
    elif tokens is None:
        tokens = horizon_tokens(config, ratio)
    batch = batch or batch_tokens(tokens, reference)
    steps = steps or max(1, round(tokens / batch))
    return Plan(batch, steps, weight_decay(batch, steps * batch, reference))


# --- schedules: how they change from step 0 to `steps`


def warmdown_left(step: int, steps: int, config: TrainConfig) -> float:
    """Return how much of the warmdown, the last --warmdown-ratio of the run, is left: 1 before it, then down to 0."""
    return min(1.0, (steps - step) / max(1.0, steps * config.warmdown_ratio))


def learning_rate_multiplier(step: int, steps: int, config: TrainConfig) -> float:
    r"""Return the factor on every learning rate at `step` of `steps`, in [0, 1].

    First a linear warmup. Then --schedule linear: flat, and falling over the last --warmdown-ratio of the run. Or
    cosine: half a cosine. Both end at --final-lr-frac.

        linear   ________            cosine   __
                /        \                   /   \
               /          \__               /     \___
    """
    final = config.final_lr_frac
    # While Adam's averages are young its steps are noisy: begin small. A short run cannot afford 40 steps of that.
    warmup = min(config.warmup_steps, steps // 10)
    if step < warmup:
        return (step + 1) / warmup
    if config.schedule == "cosine":
        progress = (step - warmup) / max(1, steps - warmup)
        return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * progress))
    # Noise in the steps sets a floor under the loss that is proportional to the learning rate, so lower it last.
    left = warmdown_left(step, steps, config)
    if left == 1:  # the warmdown has not begun
        return 1.0
    return final + (1 - final) * left


def muon_momentum(step: int, steps: int, config: TrainConfig) -> float:
    """Return Muon's momentum: 0.85 to 0.97 over the first 400 steps, then to 0.90 over the last --warmdown-ratio.

    Early gradients change direction quickly, so a long average would be stale. Large steps later are worth averaging
    over more of them, and at the end small ones need it less. The momentum does not depend on --schedule.
    """
    momentum = 0.85 + 0.12 * min(1.0, step / 400)
    left = warmdown_left(step, steps, config)
    if left == 1:  # the warmdown has not begun
        return momentum
    return 0.90 + (momentum - 0.90) * left


def weight_decay_multiplier(step: int, steps: int) -> float:
    """Return the factor on Muon's weight decay: half a cosine from 1 to 0, so that nothing shrinks at the end."""
    return 0.5 * (1 + math.cos(math.pi * min(1.0, step / max(1, steps))))
