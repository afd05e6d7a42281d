"""Pretraining: python -m scripts.base_train --depth 4, or on several GPUs torchrun --nproc_per_node=8 -m ...

It builds a model of the given depth, lets the recipe derive everything else from it, and trains on a dataset's text.
"""

from dataclasses import dataclass

import torch

from nanochat import cli, recipe
from nanochat.compute import Compute
from nanochat.documents import dataset_name
from nanochat.gpt import build_model
from nanochat.optim import MuonAdamW
from nanochat.recipe import TrainConfig
from nanochat.run import Run, agreed_kernels
from nanochat.token_shards import TextRows, data_hash
from nanochat.tokenizer import load_tokenizer
from nanochat.trainer import train

# Continued every --sample-every steps. The last is one that only reasoning could continue.
PROMPTS = ("The capital of France is", "The chemical symbol of gold is", "The opposite of hot is", "If yesterday was")


@dataclass(frozen=True)
class BaseTrain(TrainConfig):
    """Flags of pretraining: the one dial, and what may be set beside it."""

    depth: int = cli.option(12, "layers; width, heads, horizon, batch and learning rates follow from it")
    dataset: str = cli.option("builtin", "dataset to learn from: its name, or the folder it was made from")
    aspect_ratio: int = cli.option(64, "width for each layer of depth")
    head_dim: int = cli.option(128, "channels of an attention head")
    n_kv_head: int | None = cli.option(
        None, "kv heads, which query heads share (GQA): fewer need a smaller cache; unset = one for each query head"
    )
    max_seq_len: int = cli.option(2048, "context in tokens")
    window_pattern: str = cli.option("SSSL", "attention windows tiled over layers: S a quarter of the context, L all")
    norm_scales: bool = cli.option(False, "learn scales of the channels that the MLPs and the head read")
    dropout: float = cli.option(0.0, "dropout, for many epochs over little data")
    target_flops: float | None = cli.option(None, "train for this many FLOPs")
    target_param_data_ratio: float = cli.option(recipe.HORIZON, "training tokens for each parameter (matrices, head)")

    def __post_init__(self) -> None:
        super().__post_init__()
        cli.require_positive(self, "depth", "aspect_ratio", "head_dim", "n_kv_head", "max_seq_len")
        cli.require_positive(self, "target_flops", "target_param_data_ratio")


def main() -> None:
    config = cli.parse(BaseTrain, description=__doc__)
    compute = Compute.create(config.device_type)
    tokenizer = load_tokenizer()

    # The model: its depth gives width and heads; weights start at values drawn from the seed.
    model_config = recipe.model_config(
        depth=config.depth,
        vocab_size=tokenizer.get_vocab_size(),
        sequence_len=config.max_seq_len,
        aspect_ratio=config.aspect_ratio,
        head_dim=config.head_dim,
        n_kv_head=config.n_kv_head,
        window_pattern=config.window_pattern,
        norm_scales=config.norm_scales,
        dropout=config.dropout,
    )
    tag = config.model_tag or f"d{config.depth}"
    kernels = agreed_kernels("base", tag, config, model_config, compute)
    model = build_model(model_config, compute.device, train=True, kernels=kernels)
    model.init_weights(torch.Generator(compute.device).manual_seed(config.seed))

    # The recipe: how many tokens, and how many of them per step. A flag overrides each.
    tokens = None
    if config.target_flops is not None:
        tokens = round(config.target_flops / model.flops_per_token())
    plan = recipe.make_plan(
        model_config,
        ratio=config.target_param_data_ratio,
        tokens=tokens,
        batch=config.total_batch_size,
        steps=config.num_iterations,
    )

    # The optimizer: learning rates and weight decay that suit this batch and this many tokens.
    weight_decay = plan.weight_decay if config.weight_decay is None else config.weight_decay
    learning_rates = config.learning_rates(recipe.learning_rate_scales(plan.batch))
    fused = config.compile and compute.device.type == "cuda"
    optimizer = MuonAdamW(model, learning_rates, weight_decay, compute, compiled=fused)

    # The rows: the dataset's text as token ids, made by the first run that needs them.
    train_rows = TextRows(config.dataset, "train", tokenizer, config.max_seq_len)
    val_rows = TextRows(config.dataset, "val", tokenizer, config.max_seq_len)

    run = Run(
        stage="base",
        tag=tag,
        config=config,
        model=model,
        optimizer=optimizer,
        tokenizer=tokenizer,
        compute=compute,
        total_batch_size=plan.batch,
        num_iterations=plan.steps,
        facts={
            "dataset": dataset_name(config.dataset),
            "data_hash": data_hash(train_rows, val_rows),
            "depth": config.depth,
        },
    )
    train(run, train_rows, val_rows, prompts=PROMPTS)
    compute.close()


if __name__ == "__main__":
    cli.run(main)
