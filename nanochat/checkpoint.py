"""Checkpoints: a folder a step, written whole or not at all, checked by hash, readable on any number of ranks.

    checkpoints/<stage>/<tag>/step_000100/{model.safetensors, optim.000.safetensors, ..., meta.json}

A folder is filled under a temporary name, synced to disk, and renamed last. meta.json lists every file's SHA-256.
"""

import contextlib
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from nanochat.common import atomic_write_json, fsync_dir, get_base_dir, print0, read_json, sha256_file
from nanochat.compute import Compute
from nanochat.gpt import GPT, GPTConfig, build_model
from nanochat.optim import MuonAdamW
from nanochat.tokenizer import FILE_NAME, Tokenizer, kept_name, load_tokenizer

_STEP = re.compile(r"step_(\d{6,})")


def checkpoint_dir(stage: str, tag: str) -> Path:
    """Where the checkpoints of a run are kept."""
    return get_base_dir() / "checkpoints" / stage / tag


def list_steps(stage: str, tag: str) -> list[int]:
    """The steps that have a finished checkpoint, ascending."""
    folder = checkpoint_dir(stage, tag)
    names = (_STEP.fullmatch(path.name) for path in folder.iterdir()) if folder.exists() else ()
    return sorted(int(name[1]) for name in names if name and (folder / name[0] / "meta.json").exists())


def _step_dir(stage: str, tag: str, step: int) -> Path:
    return checkpoint_dir(stage, tag) / f"step_{step:06d}"


def _write(tensors: dict[str, torch.Tensor], path: Path) -> None:
    save_file(tensors, path)
    with open(path, "rb+") as f:
        os.fsync(f.fileno())


def save(stage: str, tag: str, step: int, model: GPT, optimizer: Any, meta: dict[str, Any], compute: Compute) -> None:
    """Write one checkpoint; every rank calls this and brings its share of the optimizer.

    A failure on any rank, such as a full disk, leaves no trace and raises OSError on all; earlier ones stand.
    """
    final = _step_dir(stage, tag, step)
    temporary = final.with_name(f".writing_{final.name}")
    failure: Exception | None = None

    def attempt(write: Callable[[], None], ranks: bool) -> None:
        """Do one part of the work, then let all ranks agree whether it went well on each of them."""
        nonlocal failure
        if failure is None and ranks:
            try:
                write()
            except (OSError, SafetensorError) as error:
                failure = error
        if compute.any_rank(failure is not None):
            if compute.rank == 0:
                shutil.rmtree(temporary, ignore_errors=True)
            reason = failure or "another process failed to write its share"
            raise OSError(f"checkpoint {final} could not be written ({reason}): free space, then --resume") from failure

    def begin() -> None:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        _write(model.state_dict(), temporary / "model.safetensors")

    def share() -> None:
        own = {name: value.contiguous() for name, value in optimizer.state_dict().items()}
        _write(own, temporary / f"optim.{compute.rank:03d}.safetensors")

    def finish() -> None:
        files = {path.name: sha256_file(path) for path in sorted(temporary.iterdir())}
        atomic_write_json(temporary / "meta.json", {**meta, "stage": stage, "tag": tag, "step": step, "files": files})
        fsync_dir(temporary)
        replaced = final.with_name(f".replaced_{final.name}")
        shutil.rmtree(replaced, ignore_errors=True)
        if final.exists():  # the same step of the same run, made again after a resume from an earlier one
            final.rename(replaced)
        temporary.rename(final)
        fsync_dir(final.parent)
        shutil.rmtree(replaced, ignore_errors=True)

    attempt(begin, compute.rank == 0)
    attempt(share, True)
    attempt(finish, compute.rank == 0)


def update_meta(stage: str, tag: str, step: int, **values: Any) -> None:
    """Add what became known after saving, such as the validation loss, to a checkpoint's meta.json."""
    path = _step_dir(stage, tag, step) / "meta.json"
    atomic_write_json(path, {**read_json(path), **values})


def prune(stage: str, tag: str, keep: int) -> None:
    """Delete all but the newest `keep` checkpoints and the one with the best validation loss.

    A folder loses its name before its files, so that a kill in between leaves none that looks whole and is not.
    """
    steps = list_steps(stage, tag)
    losses: dict[int, Any] = {}
    for step in steps:
        with contextlib.suppress(ValueError):  # a damaged one is not the best
            losses[step] = _read(_step_dir(stage, tag, step)).get("val_bpb")
    scored = [step for step, loss in losses.items() if loss is not None]
    best = min(scored, key=losses.__getitem__, default=None)
    for step in steps[:-keep]:
        if step != best:
            path = _step_dir(stage, tag, step)
            doomed = path.with_name(f".deleted_{path.name}")
            shutil.rmtree(doomed, ignore_errors=True)  # of the same step, killed in the middle, made again
            path.rename(doomed)
    for doomed in checkpoint_dir(stage, tag).glob(".deleted_*"):
        shutil.rmtree(doomed)


def set_aside(stage: str, tag: str) -> None:
    """Before a run begins anew under a tag that has checkpoints: keep them under tag~1, tag~2, ..."""
    for folder in (checkpoint_dir(stage, tag), get_base_dir() / "runs" / stage / tag):
        if folder.exists():
            n = next(n for n in range(1, 10**6) if not folder.with_name(f"{tag}~{n}").exists())
            folder.rename(folder.with_name(f"{tag}~{n}"))
            print0(f"an earlier run is kept as {folder.with_name(f'{tag}~{n}')}")


def _read(path: Path) -> dict[str, Any]:
    """The meta.json in folder `path`; ValueError when it is not one."""
    meta = read_json(path / "meta.json")
    if not isinstance(meta, dict) or not isinstance(meta.get("files"), dict):
        raise ValueError(f"{path / 'meta.json'} is damaged: delete {path} and use an earlier step")
    return meta


def newest_whole(stage: str, tag: str) -> int:
    """The newest step whose files are all as they were written. Raises ValueError when there is none."""
    for step in reversed(list_steps(stage, tag)):
        try:
            read_meta(stage, tag, step)
            return step
        except ValueError as error:
            print0(f"skipping step {step}: {error}")
    raise ValueError(f"no whole checkpoint in {checkpoint_dir(stage, tag)}: start without --resume")


def read_meta(stage: str, tag: str, step: int) -> dict[str, Any]:
    """A checkpoint's meta.json, once its files are known to be whole. ValueError names what is missing or damaged."""
    path = _step_dir(stage, tag, step)
    if not (path / "meta.json").exists():
        there = ", ".join(map(str, list_steps(stage, tag))) or "none"
        raise ValueError(f"no checkpoint {path}: steps there are {there}")
    meta = _read(path)
    for name, digest in meta["files"].items():
        if not (path / name).exists() or sha256_file(path / name) != digest:
            raise ValueError(f"{path / name} is missing or damaged: delete {path} and use an earlier step")
    return meta


def load_state(stage: str, tag: str, step: int, model: GPT) -> None:
    """Fill `model` from a checkpoint; a missing, extra or mis-shaped tensor raises ValueError."""
    path, state = _step_dir(stage, tag, step) / "model.safetensors", model.state_dict()
    with safe_open(path, framework="pt", device=str(model.device)) as file:
        there = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
        wanted = {name: tuple(value.shape) for name, value in state.items()}
        if there != wanted:
            wrong = sorted(name for name in there.keys() | wanted.keys() if there.get(name) != wanted.get(name))
            raise ValueError(f"{path} does not fit the model: {', '.join(wrong[:3])} of {len(wrong)}")
        for name, value in state.items():
            value.copy_(file.get_tensor(name))


def load_optimizer(stage: str, tag: str, step: int, optimizer: MuonAdamW) -> None:
    """Fill the optimizer from all shares of a checkpoint, however many ranks wrote them."""
    paths = sorted(_step_dir(stage, tag, step).glob("optim.*.safetensors"))
    optimizer.load_state_dicts([load_file(path, device=str(optimizer.compute.device)) for path in paths])


def find_tag(stage: str) -> str:
    """The tag of the newest checkpoint of a stage. Raises ValueError that names the command to run first."""
    folder = get_base_dir() / "checkpoints" / stage
    metas = [path for path in folder.glob("*/step_*/meta.json") if "~" not in path.parts[-3]]
    if not metas:
        script = {"base": "base_train", "mid": "mid_train", "sft": "chat_sft", "rl": "chat_rl"}.get(stage, stage)
        raise ValueError(f"no '{stage}' checkpoint in {folder}: run python -m scripts.{script} first")
    return max(metas, key=lambda path: path.stat().st_mtime).parts[-3]


def check_tokenizer(meta: dict[str, Any], tokenizer: Tokenizer) -> None:
    """Raise ValueError unless the model was trained with this very tokenizer."""
    if meta["tokenizer_hash"] != tokenizer.hash:
        raise ValueError(
            f"checkpoint {meta['stage']}/{meta['tag']} was trained with tokenizer {meta['tokenizer_hash'][:12]}, not "
            f"{tokenizer.hash[:12]}: put {get_base_dir() / 'tokenizer' / kept_name(meta['tokenizer_hash'])} back as "
            f"{FILE_NAME}, or train again"
        )


def load_model(
    stage: str,
    device: torch.device | str,
    tag: str | None = None,
    step: int | None = None,
    train: bool = False,
) -> tuple[GPT, Tokenizer, dict[str, Any]]:
    """A trained model, its tokenizer and its meta; tag None = the newest run, step None = its newest whole one.

    train: keep matrices in the training precision; otherwise the model is in eval mode. Raises
    ValueError, with the remedy, when something is missing, damaged, or belongs to another tokenizer.
    """
    tag = tag or find_tag(stage)
    if step is None:
        if not list_steps(stage, tag):
            raise ValueError(f"no checkpoint in {checkpoint_dir(stage, tag)}: check --model-tag, or train it first")
        step = newest_whole(stage, tag)
    meta = read_meta(stage, tag, step)
    tokenizer = load_tokenizer(meta["tokenizer_hash"])
    check_tokenizer(meta, tokenizer)
    model = build_model(GPTConfig.from_dict(meta["model_config"]), device, train=train)
    load_state(stage, tag, step, model)
    return (model.train() if train else model.eval()), tokenizer, meta
