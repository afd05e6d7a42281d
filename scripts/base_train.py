"""Pretrain a model on text: python -m scripts.base_train --depth 4 (or under torchrun)."""

from dataclasses import dataclass

import torch

from nanochat import cli, recipe
from nanochat.common import print0
from nanochat.compute import Compute
from nanochat.dataset import dataset_name
from nanochat.engine import Engine
from nanochat.gpt import build_model
from nanochat.token_shards import build_token_shards
from nanochat.tokenizer import load_tokenizer
from nanochat.trainer import TrainConfig, Trainer

PROMPTS = ("The capital of France is", "The chemical symbol of gold is", "The opposite of hot is", "If yesterday was")


@dataclass(frozen=True)
class BaseTrain(TrainConfig):
    """Flags of pretraining: the one dial, and what may be set beside it."""

    depth: int = cli.option(12, "layers; width, heads, horizon, batch and learning rates follow from it")
    dataset: str = cli.option("builtin", "dataset to learn from: its name, or the folder it was made from")
    aspect_ratio: int = cli.option(64, "width for each layer of depth")
    head_dim: int = cli.option(128, "channels of an attention head")
    max_seq_len: int = cli.option(2048, "context in tokens")
    window_pattern: str = cli.option("SSSL", "attention windows tiled over layers: S a quarter of the context, L all")
    dropout: float = cli.option(0.0, "dropout, for many epochs over little data")
    target_flops: float | None = cli.option(None, "train for this many FLOPs")
    target_param_data_ratio: float = cli.option(recipe.HORIZON, "training tokens for each parameter (matrices, head)")

    def __post_init__(self) -> None:
        super().__post_init__()
        cli.require_positive(self, "depth", "aspect_ratio", "head_dim", "max_seq_len")
        cli.require_positive(self, "target_flops", "target_param_data_ratio")


def main() -> None:
    config = cli.parse(BaseTrain, description=__doc__)
    compute = Compute.create(config.device_type)
    tokenizer = load_tokenizer()
    shape = (config.depth, tokenizer.get_vocab_size(), config.max_seq_len, config.aspect_ratio, config.head_dim)
    model_config = recipe.model_config(*shape, window_pattern=config.window_pattern, dropout=config.dropout)
    model = build_model(model_config, compute.device, train=True)
    model.init_weights(torch.Generator(compute.device).manual_seed(config.seed))

    tokens = recipe.horizon_tokens(model_config, config.target_param_data_ratio)
    if config.target_flops is not None:
        tokens = round(config.target_flops / model.flops_per_token())
    reference = recipe.reference_tokens(model_config)
    if config.total_batch_size and config.num_iterations:
        tokens = config.num_iterations * config.total_batch_size
    batch = config.total_batch_size or recipe.batch_tokens(tokens, reference)
    steps = config.num_iterations or max(1, round(tokens / batch))
    rule = recipe.weight_decay(batch, steps * batch, reference)

    def sample() -> None:
        if compute.rank == 0:
            model.eval()
            prompts = [tokenizer.encode(prompt, prepend="<|bos|>") for prompt in PROMPTS]
            with torch.compiler.set_stance("force_eager"):
                for prompt, ids in zip(prompts, Engine(model, tokenizer).complete(prompts, 16), strict=True):
                    print0("  " + repr(tokenizer.decode(prompt[1:] + ids)))
            model.train()

    trainer = Trainer(
        stage="base",
        tag=config.model_tag or f"d{config.depth}",
        config=config,
        model=model,
        tokenizer=tokenizer,
        train_shards=build_token_shards(config.dataset, "train", tokenizer),
        val_shards=build_token_shards(config.dataset, "val", tokenizer),
        compute=compute,
        total_batch_size=batch,
        num_iterations=steps,
        weight_decay=rule if config.weight_decay is None else config.weight_decay,
        lr_scales=recipe.learning_rate_scales(batch),
        meta={"dataset": dataset_name(config.dataset), "depth": config.depth},
        sample=sample,
    )
    trainer.run()
    compute.close()


if __name__ == "__main__":
    cli.run(main)
