"""The recipe against the reference's own numbers, closed forms, and properties of schedules."""

import dataclasses
import itertools
import math

import pytest
import torch

from nanochat import recipe
from nanochat.gpt import GPT
from nanochat.parameter_groups import parameter_groups
from nanochat.recipe import TrainConfig

[SCHEDULES] = [field.metadata["choices"] for field in dataclasses.fields(TrainConfig) if field.name == "schedule"]
# (steps, warmup, warmdown, final); the defaults first
SETTINGS = [(1000, 40, 0.65, 0.05), (5000, 40, 0.5, 0.0), (300, 0, 1.0, 0.1), (100, 40, 0.2, 0.05)]


def multipliers(steps, warmup=40, warmdown=0.65, final=0.05, schedule="linear"):
    config = TrainConfig(warmup_steps=warmup, warmdown_ratio=warmdown, final_lr_frac=final, schedule=schedule)
    return [recipe.learning_rate_multiplier(step, steps, config) for step in range(steps + 1)]


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("steps, warmup, warmdown, final", SETTINGS)
def test_the_learning_rate_rises_then_falls(schedule, steps, warmup, warmdown, final):
    """A multiplier that grows where it should fall still trains, only worse: nobody would see it."""
    values = multipliers(steps, warmup, warmdown, final, schedule)
    rise = min(warmup, steps // 10)
    assert all(0 < value <= 1 for value in values[:-1])
    assert values[:rise] == pytest.approx([(i + 1) / rise for i in range(rise)])
    assert max(values[: rise + 1]) == pytest.approx(1, abs=0.11 if warmdown == 1 else 1e-9)
    falling = values[rise:]
    assert all(a >= b for a, b in itertools.pairwise(falling))
    assert values[-1] == pytest.approx(final)


def test_the_linear_schedule_in_closed_form():
    values = multipliers(1000, 40, 0.65, 0.05)
    assert values[0] == pytest.approx(1 / 40)  # starts small, not at zero: no step is wasted
    assert values[39:351] == [1.0] * 312  # flat until 65 % are left
    assert values[351] < 1
    assert values[675] == pytest.approx((1 + 0.05) / 2)  # halfway down
    assert values[1000] == pytest.approx(0.05)


def test_without_warmdown_the_learning_rate_stays():
    assert multipliers(50, 5, 0.0, 0.05)[5:50] == [1.0] * 45


def test_the_cosine_schedule_in_closed_form():
    values = multipliers(1000, 40, 0.65, 0.05, schedule="cosine")
    assert values[40] == pytest.approx(1) and values[1000] == pytest.approx(0.05)
    assert values[520] == pytest.approx((1 + 0.05) / 2)
    assert values[280] == pytest.approx(0.05 + 0.95 * (1 + math.sqrt(0.5)) / 2)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("steps", [1, 2, 5, 11])
def test_tiny_runs_learn_at_every_step(schedule, steps):
    values = multipliers(steps, schedule=schedule)[:-1]
    assert values[0] == 1.0 and all(0.05 < value <= 1 for value in values)
    assert values == sorted(values, reverse=True)
    for step in range(steps + 1):
        assert 0.85 <= recipe.muon_momentum(step, steps, TrainConfig()) <= 0.97
        assert 0 <= recipe.weight_decay_multiplier(step, steps) <= 1


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_momentum_rises_over_400_steps_and_falls_in_warmdown(schedule):
    """Under every schedule of the learning rate, as the help of --warmdown-ratio says."""
    config = TrainConfig(schedule=schedule)
    values = [recipe.muon_momentum(step, 4000, config) for step in range(4001)]
    assert values[0] == pytest.approx(0.85) and values[200] == pytest.approx(0.91)
    assert values[400:1401] == pytest.approx([0.97] * 1001)
    assert values[2700] == pytest.approx((0.97 + 0.90) / 2) and values[4000] == pytest.approx(0.90)
    assert all(a >= b for a, b in itertools.pairwise(values[400:]))


def test_weight_decay_falls_to_nothing_by_a_cosine():
    values = [recipe.weight_decay_multiplier(step, 100) for step in range(101)]
    assert [values[0], values[50], values[100]] == pytest.approx([1, 0.5, 0])
    assert values[25] == pytest.approx((1 + math.sqrt(0.5)) / 2)
    assert all(a > b for a, b in itertools.pairwise(values))


@pytest.mark.parametrize(
    "depth, aspect_ratio, head_dim, width, heads",
    [
        (12, 64, 128, 768, 6),
        (20, 64, 128, 1280, 10),
        (24, 64, 128, 1536, 12),
        (4, 64, 128, 256, 2),
        (5, 64, 128, 384, 3),  # 320, rounded up to whole heads
        (1, 64, 128, 128, 1),
        (6, 48, 64, 320, 5),  # 288, likewise
    ],
)
def test_depth_gives_width_and_heads(depth, aspect_ratio, head_dim, width, heads):
    config = recipe.model_config(depth, 32768, 2048, aspect_ratio, head_dim, window_pattern="L")
    assert (config.n_layer, config.n_embd, config.n_head, config.n_kv_head) == (depth, width, heads, heads)
    assert (config.head_dim, config.vocab_size, config.sequence_len) == (head_dim, 32768, 2048)
    assert config.window_pattern == "L"
    assert {recipe.model_config(12, 100, 64, n_kv_head=n).n_kv_head for n in (1, 2, 3, 6)} == {1, 2, 3, 6}


WRONG = [{"depth": 0}, {"aspect_ratio": 0}, {"head_dim": -2}, {"head_dim": 127}, {"n_kv_head": 0}, {"n_kv_head": 3}]


@pytest.mark.parametrize("wrong", WRONG)
def test_a_depth_that_makes_no_model_is_refused(wrong):
    with pytest.raises(ValueError, match="--"):
        recipe.model_config(**{"depth": 4, "vocab_size": 1000, "sequence_len": 128, **wrong})


def test_the_horizon_counts_matrices_and_head():
    config = recipe.model_config(4, 1000, 256)
    model = GPT(config)
    count = sum(p.numel() for name, p in model.named_parameters() if name.startswith(("blocks.", "head.")))
    assert count == 4 * 12 * 256**2 + 2 * 12 * 2 + 1024 * 256  # two gates of 12 x 2 heads
    assert recipe.scaling_parameters(config) == count
    assert recipe.horizon_tokens(config) == 12 * count and recipe.horizon_tokens(config, 8) == 8 * count


def test_reference_horizon_is_that_of_depth_twelve():
    for depth in (2, 12, 24):
        config = recipe.model_config(depth, 32768, 2048)
        reference = recipe.model_config(12, 32768, 2048)
        assert recipe.reference_tokens(config) == recipe.horizon_tokens(reference)
        assert recipe.reference_tokens(config, 8) == recipe.horizon_tokens(reference, 8)


def test_batch_is_half_a_million_at_depth_twelve_and_follows_the_power_law():
    tokens = recipe.reference_tokens(recipe.model_config(12, 32768, 2048))
    assert recipe.batch_tokens(tokens, tokens) == 2**19
    batches = [recipe.batch_tokens(round(tokens * factor), tokens) for factor in (0.001, 0.01, 0.1, 0.5, 2, 10, 100)]
    assert batches == sorted(batches)
    for factor, batch in zip((0.001, 0.01, 0.1, 0.5, 2, 10, 100), batches):
        assert batch & (batch - 1) == 0  # a power of two
        assert 2**-0.51 <= batch / (2**19 * factor**0.383) <= 2**0.51  # and the nearest one


def test_below_the_reference_batch_the_scalars_learning_rate_alone_changes():
    assert set(recipe.learning_rate_scales(2**19).values()) == {1.0}
    assert recipe.learning_rate_scales(2**15, 0.5) == pytest.approx(dict.fromkeys(recipe.LEARNING_RATES, 0.25))
    scratch = recipe.learning_rate_scales(2**13)
    assert scratch.pop("scalar") == pytest.approx(2**-1.5)
    assert scratch == pytest.approx(dict.fromkeys(("matrix", "embedding", "unembedding"), 1))


def test_weight_decay_follows_batch_and_horizon_and_never_exceeds_the_reference():
    reference = 10**9
    assert recipe.weight_decay(2**19, reference, reference) == pytest.approx(0.28)
    assert recipe.weight_decay(2**21, 8 * reference, reference) == pytest.approx(0.28 * 2 / 8)
    assert recipe.weight_decay(2**15, reference // 100, reference) == pytest.approx(0.28)


# What scripts/base_train.py of karpathy/nanochat at 92d63d4 plans: its lines from the flags to the optimizer, run on
# the meta device outside of this tree (2026-11-29). Sequence 2048; `matrix` to `smear` are the learning rates of its
# groups (v_embed: value embeddings), `decay` is Muon's at step 0. The last two rows are its official run 6, and the
# shape of our node's profile.
REFERENCE_PLANS = """
depth vocab ratio   scaling   batch steps    decay    matrix       head    embed v_embed resid_scale embed_skip smear
   12 32768  12.0 110100912  524288  2520     0.28      0.02      0.008      0.3    0.15       0.005        0.5   0.2
   20 32768  12.0 435160240 1048576  4980 0.100188 0.0282843 0.00876356 0.328634 0.16432  0.00707107   0.707107   0.2
   24 32768  12.0 729810624 1048576  8352 0.059738 0.0282843      0.008      0.3    0.15  0.00707107   0.707107   0.2
   26 32768  12.0 918423532 1048576 10510 0.047470 0.0282843 0.00768615 0.288231 0.14412  0.00707107   0.707107   0.2
   24 32768   8.0 729810624 1048576  5568 0.059738 0.0282843      0.008      0.3    0.15  0.00707107   0.707107   0.2
   22 49152   9.4 592577964 1048576  5312 0.081981 0.0282843 0.00835573 0.313340 0.15667  0.00707107   0.707107   0.2
"""
PLAN_COLUMNS, *PLANS = [line.split() for line in REFERENCE_PLANS.strip().splitlines()]


@pytest.mark.parametrize("row", PLANS, ids=lambda row: f"d{row[0]}-ratio{row[2]}")
def test_the_plan_is_the_references(row):
    """Differences that are meant, none of them measured at this size:

    - steps are rounded to the nearest, there down: at most one step more, and decay by as little;
    - smear and backout learn at 0.4 of the scalars' rate, which grows with the batch; there always at 0.2;
    - decay is never above 0.28, rates do not fall with a batch below 2^19, and warmup takes at most a tenth of the
      run: all of it concerns runs smaller than these (the other tests of this file).
    """
    wanted = dict(zip(PLAN_COLUMNS, map(float, row), strict=True))
    config = recipe.model_config(int(wanted["depth"]), int(wanted["vocab"]), 2048)
    assert recipe.scaling_parameters(config) == wanted["scaling"]
    plan = recipe.make_plan(config, ratio=wanted["ratio"])
    assert plan.batch == wanted["batch"]
    assert wanted["steps"] <= plan.steps <= wanted["steps"] + 1
    assert plan.weight_decay == pytest.approx(wanted["decay"], rel=3e-4)

    rates = TrainConfig().learning_rates(recipe.learning_rate_scales(plan.batch))
    with torch.device("meta"):
        groups = parameter_groups(GPT(config), rates, plan.weight_decay, world_size=8)
    found = {group.name: group.lr for group in groups}
    for name in ("head", "embed", "resid_scale", "embed_skip"):
        assert found[name] == pytest.approx(wanted[name], rel=1e-4), name
    for name, rate in found.items():
        if name.startswith("value_embed"):
            assert rate == pytest.approx(wanted["v_embed"], rel=1e-4)
        if name.startswith("muon"):
            assert rate == pytest.approx(wanted["matrix"], rel=1e-4)
        if name.startswith(("smear", "backout")):
            assert rate == pytest.approx(wanted["smear"] * (plan.batch / 2**19) ** 0.5, rel=1e-4)
    assert {group.weight_decay for group in groups if group.betas is None} == {plan.weight_decay}


def test_the_stated_learning_rates():
    stated = {"embedding": 0.3, "unembedding": 0.008, "scalar": 0.5}
    assert {name: recipe.LEARNING_RATES[name] for name in stated} == stated


def test_no_parameter_of_a_large_model_is_allocated():
    """A d40 has billions of parameters: counting them must cost no memory."""
    config = recipe.model_config(40, 65536, 2048)
    assert recipe.scaling_parameters(config) > 3e9
    assert torch.empty(0).device.type == "cpu"  # the default device is as it was
