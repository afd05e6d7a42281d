"""Bits per byte, CORE and samples of a checkpoint: python -m scripts.base_eval"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from nanochat import cli
from nanochat.checkpoint import load_model
from nanochat.common import get_base_dir, print0, write_record
from nanochat.compute import Compute
from nanochat.core_eval import evaluate_core
from nanochat.dataloader import RowLoader
from nanochat.engine import Engine
from nanochat.loss_eval import evaluate_bpb
from nanochat.token_shards import build_token_shards
from nanochat.world import core_bundle

PROMPTS = (
    "The capital of France is",
    "The chemical symbol of gold is",
    "The opposite of hot is",
    "The day after Friday is",
    "The planets of the solar system are:",
    "If 5 + 3 = 8, then 6 + 3 =",
)


@dataclass(frozen=True)
class Config:
    """Which checkpoint is measured, and on what."""

    stage: str = cli.option("base", "stage of the checkpoint", choices=("base", "mid", "sft", "rl"))
    model_tag: str | None = cli.option(None, "model; unset: the newest")
    step: int | None = cli.option(None, "step of the checkpoint; unset: the last")
    dataset: str | None = cli.option(None, "dataset for bits per byte; unset: the one the model was trained on")
    eval_tokens: int = cli.option(262_144, "tokens of each split for bits per byte")
    device_batch_size: int = cli.option(16, "rows at a time on each device")
    bundle: str | None = cli.option(None, "folder of a CORE bundle; unset: the built-in world's")
    max_per_task: int | None = cli.option(None, "rows of each CORE task; unset: all")
    device_type: str | None = cli.option(None, "cuda, mps or cpu; unset: the best there is")

    def __post_init__(self) -> None:
        for name in ("eval_tokens", "device_batch_size", "max_per_task"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"--{name.replace('_', '-')} {value}: must be at least 1")


def text_batches(
    config: Config, dataset: str, split: str, model: Any, tokenizer: Any, compute: Compute
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """This rank's share of the first rows of a dataset: `eval_tokens` tokens in all, on any number of ranks."""
    shards = build_token_shards(dataset, split, tokenizer)
    step_rows = config.device_batch_size * compute.world_size
    place = {"rank": compute.rank, "world_size": compute.world_size, "device": compute.device}
    loader = RowLoader(shards, model.config.sequence_len, step_rows, config.device_batch_size, seed=0, **place)
    rows = math.ceil(config.eval_tokens / model.config.sequence_len)
    if split == "val":
        rows = min(rows, loader.rows_in_epoch)
    return loader.first_rows(rows)


def main() -> None:
    """Measure, print, and write evals/base_eval_<stage>_<tag>.json."""
    config = cli.parse(Config, description=__doc__)
    compute = Compute.create(config.device_type)
    model, tokenizer, meta = load_model(config.stage, compute.device, config.model_tag, config.step)
    dataset = config.dataset or meta["dataset"]
    print0(f"{config.stage} {meta['tag']} step {meta['step']}")

    bits = {}
    for split in ("train", "val"):
        batches = text_batches(config, dataset, split, model, tokenizer, compute)
        bits[split] = evaluate_bpb(model, batches, tokenizer.token_bytes, compute)
        print0(f"bits per byte of {dataset}, {split}: {bits[split]:.4f}")

    bundle = Path(config.bundle) if config.bundle else get_base_dir() / "eval_bundle_world"
    if config.bundle is None and compute.rank == 0:
        core_bundle(bundle)
    compute.barrier()
    core = evaluate_core(model, tokenizer, bundle, config.max_per_task, compute, log=print0)
    if core["core_metric"] is not None:
        print0(f"CORE: {core['core_metric']:.4f} ± {core['core_stderr']:.4f} ({len(core['results'])} tasks)")

    if compute.rank == 0:
        prompts = [tokenizer.encode(prompt, prepend="<|bos|>") for prompt in PROMPTS]
        completions = Engine(model, tokenizer).complete(prompts, max_tokens=32)
        samples = [{"prompt": p, "text": tokenizer.decode(ids)} for p, ids in zip(PROMPTS, completions)]
        for sample in samples:
            print0(f"{sample['prompt']}»{sample['text']}")
        identity = {"stage": config.stage, "tag": meta["tag"], "step": meta["step"]}
        measured = {"dataset": dataset, "train_bpb": bits["train"], "val_bpb": bits["val"], "core": core}
        path = get_base_dir() / "evals" / f"base_eval_{config.stage}_{meta['tag']}.json"
        write_record(path, {**identity, **measured, "samples": samples})
        print0(f"written: {path}")
    compute.close()


if __name__ == "__main__":
    cli.run(main)
