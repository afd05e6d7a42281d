"""A model on this machine by its name: one from the hub, a folder, or a checkpoint of one's own as STAGE/TAG."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.distributed as dist

from nanochat import checkpoint
from nanochat.chat_format import ChatFormat
from nanochat.common import STAGES, get_base_dir
from nanochat.compute import free_memory, pick_dtype
from nanochat.engine import Engine
from nanochat.hf import load as hf_load
from nanochat.hf import parallel as hf_parallel
from nanochat.hf import store as model_store
from nanochat.hf.chat import chat_format

DEVICES = "lay an open-weights model over these, such as cuda:0,cuda:1; unset: over all GPUs if one is too small"


@dataclass(frozen=True)
class NamedModel:
    """A model that is here, and not loaded yet."""

    name: str
    folder: Path
    own: bool  # a checkpoint of this project
    step: int | None = None  # of it; None = the newest that is whole
    places: tuple[torch.device, ...] = ()  # of each layer, or of all; none = where it is asked for

    def n_bytes(self, dtype: torch.dtype, ranks: int = 1) -> int:
        """Memory of its weights on each of the ranks that share its layers, from the headers of its files."""
        tensors = hf_load.stored_tensors(self.folder).values()
        sizes = {t.name: torch.Size(t.shape).numel() * (1 if t.dtype == "U8" else dtype.itemsize) for t in tensors}
        return sum(size // (ranks if ".layers." in name else 1) for name, size in sizes.items())

    def load(
        self, device: torch.device, max_batch: int, int8: bool = False, ranks: int = 1
    ) -> tuple[Engine, ChatFormat]:
        """An engine that runs it, and its chat format. ranks: how many share its matrices; ValueError if none can."""
        places, device = self.places, self.places[0] if self.places else device
        if not self.own:
            place = "cpu" if ranks > 1 else places if len(places) > 1 else device
            model, tokenizer = hf_load.load(self.folder, place, pick_dtype(device))
            if ranks > 1:
                model = hf_parallel.tensor_parallel(model, dist.init_device_mesh(device.type, (ranks,)))
            form: ChatFormat = chat_format(self.folder, tokenizer)
        elif ranks > 1:
            raise ValueError(f"--tensor-parallel: {self.name} is a model of this project, which runs on one device")
        else:
            stage, tag = self.name.split("/")
            model, tokenizer, _ = checkpoint.load_model(stage, device, tag, self.step)
            form = ChatFormat(tokenizer)
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


def pick_devices(names: str) -> list[torch.device]:
    """The devices of `--devices`; ValueError for one that is not here."""
    try:
        here = [torch.zeros(1, device=name.strip()) for name in names.split(",")]
        return list(dict.fromkeys(each.device for each in here if each.tolist()))  # "meta" would give nothing back
    except (RuntimeError, AssertionError) as error:  # the second where PyTorch was built without the kind
        raise ValueError(f"--devices {names}: not all are here ({str(error).splitlines()[0]})") from error


def find_all(
    names: Sequence[str],
    device: torch.device,
    step: int | None = None,
    say: Callable[[str], None] = print,
    devices: str | None = None,
    ranks: int = 1,
) -> list[NamedModel]:
    """The models of these names, and a line about the memory of each. ValueError when one is not here, two have one
    name, or they do not all fit in what is free.

    Open-weights models are laid over `devices` (see `pick_devices`), layer after layer; where none are named, over all
    GPUs if they do not fit on `device`, a GPU. ranks: how many share each model's layers (hf_parallel.py).
    """
    models = [find(name, step) for name in dict.fromkeys(names)]
    if len({model.name for model in models}) < len(models):
        raise ValueError(f"two of {', '.join(names)} have the same name: rename a folder")
    here = pick_devices(devices) if devices else [device]
    dtype, placed = pick_dtype(here[0]), []
    sizes = [model.n_bytes(dtype, ranks) for model in models]
    if not devices and ranks == 1 and device.type == "cuda" and sum(sizes) > free_memory(device):
        here = [torch.device("cuda", i) for i in range(torch.cuda.device_count())]
    room = [free_memory(each) for each in here]
    there = f"{sum(room) / 1e9:.2f} GB are free"
    if sum(sizes) > sum(room):
        need = f"{', '.join(model.name for model in models)}: {sum(sizes) / 1e9:.2f} GB are needed"
        raise ValueError(f"{need} and {there}: take smaller or fewer ones, or other --devices")
    for model, size in zip(models, sizes, strict=True):
        whole = model.own or len(here) == 1 or (not devices and size <= max(room))
        pieces = [size] if whole else hf_parallel.layer_bytes(hf_load.skeleton(model.folder), dtype)
        places = hf_parallel.split_layers(pieces, room)
        for place, n in zip(places, pieces, strict=True):
            room[place] -= n
        spread = ", ".join(f"{here[i]}" + f" ({n} layers)" * (not whole) for i, n in Counter(places).items())
        name = f"{model.name}, {model.folder.name.replace('_', ' ')}" if model.own else model.name
        weights = f"{size / 1e9:.2f} GB of weights in {str(dtype).removeprefix('torch.')}"
        say(f"{name}: {weights} for {spread}, {there}")
        placed.append(replace(model, places=tuple(here[i] for i in places)))
    return placed
