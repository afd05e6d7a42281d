"""Loss on text, CORE and samples of a checkpoint, or of open weights: python -m scripts.base_eval

Prints a line per measure and writes evals/base_eval_<stage>_<tag>.json, which the report reads.
"""

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from nanochat import cli
from nanochat.checkpoint import load_model
from nanochat.common import STAGES, get_base_dir, print0, write_record
from nanochat.compute import Compute
from nanochat.core_eval import BUNDLE_URL, download_bundle, evaluate_core
from nanochat.dataloader import RowLoader
from nanochat.engine import Engine
from nanochat.loss_eval import TextLoss, evaluate_loss
from nanochat.token_shards import TextRows
from nanochat.world_core import core_bundle

# Openings whose continuations show at a glance what a base model knows. They end without a space: in training text
# a space is the first character of the next token.
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

    stage: str = cli.option("base", "stage of the checkpoint", choices=STAGES)
    model_tag: str | None = cli.option(None, "model; unset: the newest")
    step: int | None = cli.option(None, "step of the checkpoint; unset: the last")
    hf: str | None = cli.option(None, "folder of an open-weights model, measured in place of a checkpoint")
    dataset: str | None = cli.option(None, "dataset for bits per byte; unset: the one the checkpoint was trained on")
    eval_tokens: int = cli.option(262_144, "tokens of each split for bits per byte")
    device_batch_size: int = cli.option(16, "rows at a time on each device")
    bundle: str = cli.option("world", "CORE tasks: world (built in), core (public, downloaded once), a folder or a URL")
    max_per_task: int | None = cli.option(None, "rows of each CORE task; unset: all")
    device_type: str | None = cli.option(None, "cuda, mps or cpu; unset: the best there is")

    def __post_init__(self) -> None:
        cli.require_positive(self, "eval_tokens", "device_batch_size", "max_per_task")


def load(config: Config, compute: Compute) -> tuple[Any, Any, dict[str, Any]]:
    """Return model, tokenizer, and what the record says of them: stage, tag, step and training dataset."""
    if config.hf:
        from nanochat import hf

        model, tokenizer = hf.load(config.hf, compute.device, compute.dtype)
        identity = {"stage": "hf", "tag": Path(config.hf).resolve().name, "step": None, "dataset": None}
        return model, tokenizer, identity
    own_model, own_tokenizer, meta = load_model(config.stage, compute.device, config.model_tag, config.step)
    identity = {"stage": config.stage, "tag": meta["tag"], "step": meta["step"], "dataset": meta["dataset"]}
    return own_model, own_tokenizer, identity


def text_batches(
    config: Config, dataset: str, split: str, model: Any, tokenizer: Any, compute: Compute
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Return this rank's share of the first rows of a dataset: `eval_tokens` tokens in all, on any number of ranks."""
    loader = RowLoader(
        TextRows(dataset, split, tokenizer, model.config.sequence_len),
        config.device_batch_size * compute.world_size,
        config.device_batch_size,
        seed=0,
        rank=compute.rank,
        world_size=compute.world_size,
        device=compute.device,
    )
    rows = math.ceil(config.eval_tokens / model.config.sequence_len)
    if split == "val":
        rows = min(rows, loader.rows_in_epoch)
    return loader.first_rows(rows)


def find_bundle(name: str, compute: Compute) -> Path:
    """Return the folder of the CORE bundle that `--bundle` names; rank 0 makes or downloads it where need be."""
    if name == "world":
        folder = get_base_dir() / "eval_bundle_world"
    elif name == "core":
        folder = get_base_dir() / "eval_bundle"
    elif "://" in name:
        folder = get_base_dir() / f"eval_bundle_{hashlib.sha256(name.encode()).hexdigest()[:8]}"
    else:
        return Path(name)
    if compute.rank == 0:
        if name == "world":
            core_bundle(folder)
        else:
            download_bundle(folder, BUNDLE_URL if name == "core" else name)
    compute.barrier()
    return folder


def complete(model: Any, tokenizer: Any) -> list[dict[str, str]]:
    """Return how the model continues a few openings."""
    prompts = [tokenizer.encode(prompt, prepend="<|bos|>") for prompt in PROMPTS]
    completions = Engine(model, tokenizer).complete(prompts, max_tokens=32)
    return [{"prompt": prompt, "text": tokenizer.decode(ids)} for prompt, ids in zip(PROMPTS, completions, strict=True)]


def main() -> None:
    config = cli.parse(Config, description=__doc__)
    compute = Compute.create(config.device_type)
    model, tokenizer, identity = load(config, compute)
    stage = identity["stage"]
    tag = identity["tag"]
    print0(f"{stage} {tag}" + ("" if config.hf else f" step {identity['step']}"))

    dataset = config.dataset or identity["dataset"]
    losses: dict[str, TextLoss] = {}
    for split in ("train", "val") if dataset else ():
        batches = text_batches(config, dataset, split, model, tokenizer, compute)
        loss = evaluate_loss(model, batches, tokenizer.token_bytes, compute)
        losses[split] = loss
        print0(
            f"{dataset}, {split}: {loss.bits_per_byte:.4f} bits per byte, {loss.nats_per_token:.4f} nats per token, "
            f"perplexity {loss.perplexity:.2f}"
        )

    core = evaluate_core(model, tokenizer, find_bundle(config.bundle, compute), config.max_per_task, compute)
    if core["core_metric"] is not None:
        what = "built-in world" if config.bundle == "world" else "CORE"
        print0(f"{what}: {core['core_metric']:.4f} ± {core['core_stderr']:.4f} ({len(core['results'])} tasks)")

    if compute.rank == 0:
        samples = [] if config.hf else complete(model, tokenizer)
        for sample in samples:
            print0(f"{sample['prompt']}»{sample['text']}")
        record = {
            "stage": stage,
            "tag": tag,
            "step": identity["step"],
            "dataset": dataset,
            "train_bpb": None,
            "val_bpb": None,
            "bundle": config.bundle,
            "core": core,
            "samples": samples,
        }
        for split, loss in losses.items():
            record[f"{split}_bpb"] = loss.bits_per_byte
            record[f"{split}_loss"] = loss.nats_per_token
            record[f"{split}_perplexity"] = loss.perplexity
        path = get_base_dir() / "evals" / f"base_eval_{stage}_{tag}.json"
        write_record(path, record)
        print0(f"written: {path}")
    compute.close()


if __name__ == "__main__":
    cli.run(main)
