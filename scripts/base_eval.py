"""Bits per byte, CORE and samples of a checkpoint, or of open weights: python -m scripts.base_eval"""

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from nanochat import cli
from nanochat.checkpoint import load_model
from nanochat.common import get_base_dir, print0, write_record
from nanochat.compute import Compute
from nanochat.core_eval import evaluate_core
from nanochat.core_tasks import BUNDLE_URL, download_bundle
from nanochat.dataloader import RowLoader
from nanochat.engine import Engine
from nanochat.loss_eval import evaluate_bpb
from nanochat.token_shards import TextRows
from nanochat.world import core_bundle

PROMPTS = ("The capital of France is", "The chemical symbol of gold is", "The opposite of hot is")
PROMPTS += ("The day after Friday is", "The planets of the solar system are:", "If 5 + 3 = 8, then 6 + 3 =")


@dataclass(frozen=True)
class Config:
    """Which checkpoint is measured, and on what."""

    stage: str = cli.option("base", "stage of the checkpoint", choices=("base", "mid", "sft", "rl"))
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


def text_batches(
    config: Config, dataset: str, split: str, model: Any, tokenizer: Any, compute: Compute
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """This rank's share of the first rows of a dataset: `eval_tokens` tokens in all, on any number of ranks."""
    text_rows = TextRows(dataset, split, tokenizer, model.config.sequence_len)
    step_rows = config.device_batch_size * compute.world_size
    place = {"rank": compute.rank, "world_size": compute.world_size, "device": compute.device}
    loader = RowLoader(text_rows, step_rows, config.device_batch_size, seed=0, **place)
    rows = math.ceil(config.eval_tokens / model.config.sequence_len)
    if split == "val":
        rows = min(rows, loader.rows_in_epoch)
    return loader.first_rows(rows)


def find_bundle(name: str, compute: Compute) -> Path:
    """The folder of the CORE bundle that `--bundle` names, made or downloaded by one rank where need be."""
    folders = {"world": "eval_bundle_world", "core": "eval_bundle"}
    remote = BUNDLE_URL if name == "core" else name if "://" in name else None
    if name not in folders and not remote:
        return Path(name)
    folder = get_base_dir() / folders.get(name, f"eval_bundle_{hashlib.sha256(name.encode()).hexdigest()[:8]}")
    if compute.rank == 0:
        download_bundle(folder, remote) if remote else core_bundle(folder)
    compute.barrier()
    return folder


def load(config: Config, compute: Compute) -> tuple[Any, Any, dict[str, Any], str | None]:
    """Model, tokenizer, what the record calls them, and the dataset for bits per byte."""
    if config.hf:
        from nanochat import hf

        model, tokenizer = hf.load(config.hf, compute.device, compute.dtype)
        return model, tokenizer, {"stage": "hf", "tag": Path(config.hf).resolve().name, "step": None}, config.dataset
    model, tokenizer, meta = load_model(config.stage, compute.device, config.model_tag, config.step)
    identity = {"stage": config.stage, "tag": meta["tag"], "step": meta["step"]}
    return model, tokenizer, identity, config.dataset or meta["dataset"]


def complete(model: Any, tokenizer: Any) -> list[dict[str, str]]:
    """How the model continues a few openings."""
    prompts = [tokenizer.encode(prompt, prepend="<|bos|>") for prompt in PROMPTS]
    completions = Engine(model, tokenizer).complete(prompts, max_tokens=32)
    return [{"prompt": prompt, "text": tokenizer.decode(ids)} for prompt, ids in zip(PROMPTS, completions)]


def main() -> None:
    """Measure, print, and write evals/base_eval_<stage>_<tag>.json."""
    config = cli.parse(Config, description=__doc__)
    compute = Compute.create(config.device_type)
    model, tokenizer, identity, dataset = load(config, compute)
    print0(f"{identity['stage']} {identity['tag']}" + ("" if config.hf else f" step {identity['step']}"))

    bits: dict[str, float | None] = {"train": None, "val": None}
    for split in bits if dataset else ():
        batches = text_batches(config, dataset, split, model, tokenizer, compute)
        bits[split] = evaluate_bpb(model, batches, tokenizer.token_bytes, compute)
        print0(f"bits per byte of {dataset}, {split}: {bits[split]:.4f}")

    bar = partial(tqdm, leave=False, disable=None if compute.rank == 0 else True)
    bundle, what = find_bundle(config.bundle, compute), "built-in world" if config.bundle == "world" else "CORE"
    core = evaluate_core(model, tokenizer, bundle, config.max_per_task, compute, print0, bar)
    if core["core_metric"] is not None:
        print0(f"{what}: {core['core_metric']:.4f} ± {core['core_stderr']:.4f} ({len(core['results'])} tasks)")

    if compute.rank == 0:
        samples = [] if config.hf else complete(model, tokenizer)
        for sample in samples:
            print0(f"{sample['prompt']}»{sample['text']}")
        measured = {"dataset": dataset, "train_bpb": bits["train"], "val_bpb": bits["val"], "core": core}
        path = get_base_dir() / "evals" / f"base_eval_{identity['stage']}_{identity['tag']}.json"
        write_record(path, {**identity, "bundle": config.bundle, **measured, "samples": samples})
        print0(f"written: {path}")
    compute.close()


if __name__ == "__main__":
    cli.run(main)
