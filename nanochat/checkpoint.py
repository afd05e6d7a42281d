"""Checkpoints: one folder per step, written whole or not at all, checked by hash, readable on any number of ranks.

    checkpoints/<stage>/<tag>/step_000100/{model.safetensors, optim.000.safetensors, ..., meta.json}

`save` fills a folder under a temporary name, syncs it to disk, and renames it last, so a kill at any moment leaves
either a whole checkpoint or none. meta.json lists the SHA-256 of every file, and `read_meta` checks them. Each rank
writes its own share of the optimizer's state; `load_optimizer_shares` reads the shares of all ranks, however many
there were.
"""

import contextlib
import os
import re
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from nanochat.common import atomic_write_json, fsync_dir, get_base_dir, print0, read_json, sha256_file
from nanochat.compute import Compute
from nanochat.gpt import GPT, GPTConfig, build_model
from nanochat.kernels import Kernels
from nanochat.language_model import warn_if_not_finite
from nanochat.tokenizer import FILE_NAME, Tokenizer, kept_name, load_tokenizer

SCRIPTS = {"base": "base_train", "mid": "mid_train", "sft": "chat_sft", "rl": "chat_rl"}  # which makes which stage


def checkpoint_dir(stage: str, tag: str) -> Path:
    """Return the folder of a run's checkpoints."""
    return get_base_dir() / "checkpoints" / stage / tag


def step_dir(stage: str, tag: str, step: int) -> Path:
    """Return the folder of one checkpoint."""
    return checkpoint_dir(stage, tag) / f"step_{step:06d}"


def list_steps(stage: str, tag: str) -> list[int]:
    """Return the steps that have a finished checkpoint, ascending."""
    steps = []
    for path in checkpoint_dir(stage, tag).glob("step_*/meta.json"):
        number = re.fullmatch(r"step_(\d{6,})", path.parent.name)
        if number:
            steps.append(int(number[1]))
    return sorted(steps)


# --- writing


def save(
    stage: str,
    tag: str,
    step: int,
    model: GPT,
    optimizer_state: dict[str, torch.Tensor] | None,
    meta: dict[str, Any],
    compute: Compute,
) -> None:
    """Write one checkpoint; every rank calls this with its share of the optimizer's state, if it has any.

    Raises OSError on all ranks if one of them fails, as on a full disk; nothing is left of the attempt then, and
    earlier checkpoints stand.
    """
    final = step_dir(stage, tag, step)
    temporary = final.with_name(f".writing_{final.name}")

    with _all_ranks_or_none(final, temporary, compute):
        if compute.rank == 0:
            shutil.rmtree(temporary, ignore_errors=True)  # left by a kill
            temporary.mkdir(parents=True)

    # Now the folder exists, and every rank can add its share. Each hashes what it has written: rank 0 alone would need
    # longer for all of it than torchrun waits after SIGTERM.
    files: dict[str, str] = {}
    with _all_ranks_or_none(final, temporary, compute):
        if compute.rank == 0:
            files["model.safetensors"] = _write_tensors(model.state_dict(), temporary / "model.safetensors")
        if optimizer_state is not None:
            name = f"optim.{compute.rank:03d}.safetensors"
            files[name] = _write_tensors(optimizer_state, temporary / name)
    files_of_ranks = compute.gather(files)

    # Now all files are on disk. The rename below turns them into a checkpoint.
    with _all_ranks_or_none(final, temporary, compute):
        if compute.rank == 0:
            hashes = {name: digest for files in files_of_ranks for name, digest in files.items()}
            whole_meta = {**meta, "stage": stage, "tag": tag, "step": step, "files": hashes}
            atomic_write_json(temporary / "meta.json", whole_meta)
            fsync_dir(temporary)
            _rename_over(temporary, final)


@contextlib.contextmanager
def _all_ranks_or_none(final: Path, temporary: Path, compute: Compute) -> Iterator[None]:
    """Let all ranks agree, at the end of the block, whether it went well on each; raise OSError on all if not.

    Without this a rank that fails would leave the others waiting for it in the next collective operation.
    """
    failure = None
    try:
        yield
    except (OSError, SafetensorError) as error:
        failure = error
    if compute.any_rank(failure is not None):
        if compute.rank == 0:
            shutil.rmtree(temporary, ignore_errors=True)
        reason = failure or "another process failed to write its share"
        raise OSError(f"checkpoint {final} could not be written ({reason}): free space, then --resume") from failure


def _write_tensors(tensors: dict[str, torch.Tensor], path: Path) -> str:
    """Write a file of tensors, also to disk, and return its SHA-256."""
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    # A stop by SIGTERM has seconds, and rank 0 of a d22 has 5 GB: hash them while they go to disk.
    with ThreadPoolExecutor(max_workers=1) as pool:
        on_disk = pool.submit(_fsync_file, path)
        digest = sha256_file(path)
        on_disk.result()
    return digest


def _fsync_file(path: Path) -> None:
    """Wait until a file's bytes are on disk."""
    with open(path, "rb+") as f:
        os.fsync(f.fileno())


def _rename_over(temporary: Path, final: Path) -> None:
    """Rename a finished folder to its final name, replacing what an earlier attempt at the same step has left."""
    replaced = final.with_name(f".replaced_{final.name}")
    shutil.rmtree(replaced, ignore_errors=True)
    if final.exists():  # the run was resumed from an earlier step and has come here again
        final.rename(replaced)
    temporary.rename(final)
    fsync_dir(final.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def update_meta(stage: str, tag: str, step: int, values: dict[str, Any]) -> None:
    """Add values that became known after saving, such as the validation loss, to a checkpoint's meta.json."""
    path = step_dir(stage, tag, step) / "meta.json"
    atomic_write_json(path, {**read_json(path), **values})


def prune(stage: str, tag: str, keep: int) -> None:
    """Delete all checkpoints but the newest `keep` and the one with the best validation loss."""
    steps = list_steps(stage, tag)
    losses: dict[int, float] = {}
    for step in steps:
        with contextlib.suppress(ValueError):  # a damaged checkpoint is not the best
            loss = _read_meta_file(step_dir(stage, tag, step)).get("val_bpb")
            if loss is not None:
                losses[step] = loss
    best = min(losses, key=losses.__getitem__, default=None)
    for step in steps[:-keep]:
        if step != best:
            # A folder loses its name before its files, so that a kill in between leaves none that only looks whole.
            path = step_dir(stage, tag, step)
            doomed = path.with_name(f".deleted_{path.name}")
            shutil.rmtree(doomed, ignore_errors=True)  # left by a kill
            path.rename(doomed)
    for doomed in checkpoint_dir(stage, tag).glob(".deleted_*"):
        shutil.rmtree(doomed)


def set_aside(stage: str, tag: str) -> None:
    """Rename what an earlier run of this name has left to tag~1, tag~2, ..., before a run begins anew."""
    for folder in (checkpoint_dir(stage, tag), get_base_dir() / "runs" / stage / tag):
        if folder.exists():
            number = 1
            while folder.with_name(f"{tag}~{number}").exists():
                number += 1
            kept = folder.rename(folder.with_name(f"{tag}~{number}"))
            print0(f"an earlier run is kept as {kept}")


# --- reading


def _read_meta_file(folder: Path) -> dict[str, Any]:
    """Read the meta.json of a checkpoint's folder. Raises ValueError when it is damaged."""
    meta = read_json(folder / "meta.json")
    if not isinstance(meta, dict) or not isinstance(meta.get("files"), dict):
        raise ValueError(f"{folder / 'meta.json'} is damaged: delete {folder} and use an earlier step")
    return meta


def read_meta(stage: str, tag: str, step: int) -> dict[str, Any]:
    """Read a checkpoint's meta.json and check all its files. Raises ValueError for one that is missing or damaged."""
    folder = step_dir(stage, tag, step)
    if not (folder / "meta.json").exists():
        there = ", ".join(map(str, list_steps(stage, tag))) or "none"
        raise ValueError(f"no checkpoint {folder}: steps there are {there}")
    meta = _read_meta_file(folder)
    for name, digest in meta["files"].items():
        if not (folder / name).exists() or sha256_file(folder / name) != digest:
            raise ValueError(f"{folder / name} is missing or damaged: delete {folder} and use an earlier step")
    return meta


def newest(stage: str, tag: str) -> dict[str, Any]:
    """Return the meta of the newest checkpoint whose files are all undamaged. Raises ValueError when there is none."""
    for step in reversed(list_steps(stage, tag)):
        try:
            return read_meta(stage, tag, step)
        except ValueError as error:
            print0(f"skipping step {step}: {error}")
    raise ValueError(f"no whole checkpoint in {checkpoint_dir(stage, tag)}: start without --resume")


def peek_meta(stage: str, tag: str, step: int | None = None) -> dict[str, Any]:
    """Return the meta of a checkpoint, the newest where `step` is None, without checking its files; {} for none."""
    steps = list_steps(stage, tag) if step is None else [step]
    for candidate in reversed(steps):
        with contextlib.suppress(ValueError, OSError):
            return _read_meta_file(step_dir(stage, tag, candidate))
    return {}


def find_tag(stage: str) -> str:
    """Return the tag of the newest run of a stage. Raises ValueError that names the script to run first."""
    folder = get_base_dir() / "checkpoints" / stage
    metas = [path for path in folder.glob("*/step_*/meta.json") if "~" not in path.parts[-3]]  # none set aside
    if not metas:
        raise ValueError(f"no '{stage}' checkpoint in {folder}: run python -m scripts.{SCRIPTS[stage]} first")
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
    kernels: Kernels | None = None,
) -> tuple[GPT, Tokenizer, dict[str, Any]]:
    """Load a trained model, its tokenizer and its meta; tag None = the newest run, step None = its newest whole one.

    train: keep matrices in the training precision; otherwise the model is in eval mode. kernels: to train it
    with, see `gpt.build_model`. Raises ValueError, with the remedy, when something is missing, damaged, or belongs to
    another tokenizer.
    """
    if tag is None:
        tag = find_tag(stage)
    if not list_steps(stage, tag):
        raise ValueError(f"no checkpoint in {checkpoint_dir(stage, tag)}: check --model-tag, or train it first")
    meta = newest(stage, tag) if step is None else read_meta(stage, tag, step)
    tokenizer = load_tokenizer(meta["tokenizer_hash"])
    check_tokenizer(meta, tokenizer)
    config = GPTConfig.from_dict(meta["model_config"])
    model = build_model(config, device, train=train, kernels=kernels)
    load_weights(stage, tag, meta["step"], model)
    return model.train(train), tokenizer, meta


def load_weights(stage: str, tag: str, step: int, model: GPT) -> None:
    """Fill `model` from a checkpoint. Raises ValueError when a tensor is missing, too many, or of another shape."""
    path = step_dir(stage, tag, step) / "model.safetensors"
    try:
        # Tensors on the CPU are views of the mapped file, so a GPU never holds the weights twice.
        model.load_state_dict(load_file(path))
    except RuntimeError as error:
        raise ValueError(f"{path} does not fit the model: {str(error)[:300]}") from error
    warn_if_not_finite(model, path.parent)


def load_optimizer_shares(stage: str, tag: str, step: int, device: torch.device) -> list[dict[str, torch.Tensor]]:
    """Load the share of the optimizer's state that each rank has saved, in the order of the ranks."""
    paths = sorted(step_dir(stage, tag, step).glob("optim.*.safetensors"))
    return [load_file(path, device=str(device)) for path in paths]
