"""A model on this machine by its name: one from the hub, a folder, or a checkpoint of one's own as STAGE/TAG."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from nanochat import checkpoint, hf_load, model_store
from nanochat.chat_format import Format, chat_format
from nanochat.common import get_base_dir
from nanochat.compute import pick_dtype
from nanochat.engine import Engine

STAGES = ("base", "mid", "sft", "rl")


@dataclass(frozen=True)
class NamedModel:
    """A model that is here, and not loaded yet."""

    name: str
    folder: Path
    own: bool  # a checkpoint of this project
    step: int | None = None  # of it; None = the newest that is whole

    def n_bytes(self, dtype: torch.dtype) -> int:
        """Memory of its weights, from the headers of its files."""
        tensors = hf_load.stored_tensors(self.folder).values()
        return sum(torch.Size(t.shape).numel() * (1 if t.dtype == "U8" else dtype.itemsize) for t in tensors)

    def load(self, device: torch.device, max_batch: int, int8: bool = False) -> tuple[Engine, Format]:
        """An engine that runs it, and the format in which it chats."""
        if not self.own:
            model, tokenizer = hf_load.load(self.folder, device)
            form: Format = chat_format(self.folder, tokenizer)
        else:
            stage, tag = self.name.split("/")
            model, tokenizer, _ = checkpoint.load_model(stage, device, tag, self.step)
            form = Format(tokenizer)
        return Engine(model, tokenizer, max_batch, int8=int8), form


def own_checkpoints() -> list[str]:
    """The names, STAGE/TAG, of the checkpoints that this project has made here."""
    folders = sorted((get_base_dir() / "checkpoints").glob("*/*"))
    return ["/".join(f.parts[-2:]) for f in folders if checkpoint.list_steps(*f.parts[-2:])]


def find(name: str, step: int | None = None) -> NamedModel:
    """The model of that name, with `step` at that step of its training; ValueError says what there is instead.

    A stage alone means the newest model of that stage.
    """
    stage, _, tag = name.partition("/")
    if stage not in STAGES or (tag and name in model_store.list_models()):
        if step is not None:
            raise ValueError(f"--step {step}: {name} is no checkpoint of your own, only those have steps")
        folder = model_store.find(name)
        known = folder.parent == model_store.models_dir()
        return NamedModel(folder.name.replace("--", "/", 1) if known else folder.resolve().name, folder, False)
    tag = tag or checkpoint.find_tag(stage)
    folder, steps = checkpoint.checkpoint_dir(stage, tag), checkpoint.list_steps(stage, tag)
    if not steps or step not in (None, *steps):
        there = f"steps there are {', '.join(map(str, steps))}" if steps else f"here are {', '.join(own_checkpoints())}"
        raise ValueError(f"no such checkpoint in {folder}: {there}; see python -m scripts.models list")
    return NamedModel(f"{stage}/{tag}", folder / f"step_{steps[-1] if step is None else step:06d}", True, step)


def find_all(
    names: Sequence[str], device: torch.device, step: int | None = None, say: Callable[[str], None] = print
) -> list[NamedModel]:
    """The models of these names, and a line about the memory of each. ValueError when one is not here, two have one
    name, or they do not all fit in what is free."""
    models = [find(name, step) for name in dict.fromkeys(names)]
    if len({model.name for model in models}) < len(models):
        raise ValueError(f"two of {', '.join(names)} have the same name: rename a folder")
    dtype, free, total = pick_dtype(device), free_memory(device), 0
    there = "what is free is not known" if free is None else f"{free / 1e9:.2f} GB are free"
    for model in models:
        size = model.n_bytes(dtype)
        total += size
        place = f"{model.name}, {model.folder.name.replace('_', ' ')}" if model.own else model.name
        say(f"{place}: {size / 1e9:.2f} GB of weights in {str(dtype).removeprefix('torch.')} for {device}, {there}")
    if free is not None and total > free:
        what = f"{models[0].name} needs" if len(models) == 1 else f"these {len(models)} models need"
        remedy = "take a smaller one" if len(models) == 1 else "serve fewer"
        raise ValueError(f"{what} {total / 1e9:.2f} GB and {there}: {remedy}, or another --device-type")
    return models


def free_memory(device: torch.device) -> int | None:
    """Bytes that are free on a device; None where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")), None)
