"""One training run of a checkout in a process of its own, with what the comparison must hold equal put in its way.

    python dev/compare_child.py ROOT '{"val": FILE, ...}' [flags of scripts.base_train]

No file of the checkout is changed: functions are replaced in this process before its scripts.base_train runs.
What may be given: `val` and `train`, rows (see `compare_sides.save_rows`) for the reference's evaluation and training;
`start`, the weights to begin with, for either side; `scalars`, see `match_scalars`; `eager` (any value), which makes
torch.compile do nothing.
"""

import importlib
import itertools
import json
import runpy
import sys
from collections.abc import Iterator
from pathlib import Path

import torch


def serve(path: str, state: tuple = ()):
    """A stand-in for the reference's data loaders: batches of the rows in `path`, in order, without end."""
    rows = torch.load(path)

    def loader(tokenizer, batch_rows: int, sequence_len: int, *, device="cpu", **unused) -> Iterator[tuple]:
        assert rows["inputs"].size(1) == sequence_len, "the rows were made for another sequence length"
        for first in itertools.cycle(range(0, len(rows["inputs"]), batch_rows)):
            part = slice(first, first + batch_rows)
            yield rows["inputs"][part].to(device), rows["targets"][part].to(device), *state

    return loader


def begin_with(path: str) -> None:
    """Have models begin with the weights in `path`, which must be all of them."""
    GPT = importlib.import_module("nanochat.gpt").GPT
    original = GPT.init_weights

    def init_weights(self, *arguments) -> None:
        original(self, *arguments)  # sets what no state dict holds
        self.load_state_dict(torch.load(path), strict=True)

    GPT.init_weights = init_weights


def match_scalars(lr: float, eps: float) -> None:
    """Set what no flag of the reference does: the learning rate of smear and backout, and the scalars' epsilon."""
    GPT = importlib.import_module("nanochat.gpt").GPT
    original = GPT.setup_optimizer

    def setup_optimizer(self, **rates):
        optimizer = original(self, **rates)
        for group in optimizer.param_groups:
            if all(parameter.numel() < 4096 for parameter in group["params"]) and "eps" in group:
                group["eps"] = eps
            if any(parameter is self.smear_lambda for parameter in group["params"]):
                group["lr"] = group["initial_lr"] = lr
        return optimizer

    GPT.setup_optimizer = setup_optimizer


def main() -> None:
    root, hooks, *flags = sys.argv[1:]
    sys.dont_write_bytecode = True  # the checkout stays as it is
    own = Path(__file__).resolve().parent.parent  # on PYTHONPATH, our packages would hide those without __init__.py
    sys.path = [root, *(path for path in sys.path[1:] if Path(path).resolve() != own)]
    sys.argv = ["scripts.base_train", *flags]
    given = json.loads(hooks)
    if "eager" in given:
        torch.compile = lambda function=None, **options: function or (lambda later: later)
    if "val" in given or "train" in given:
        data = importlib.import_module("nanochat.dataloader")
    if "val" in given:
        data.tokenizing_distributed_data_loader_bos_bestfit = serve(given["val"])
    if "train" in given:
        position = {"pq_idx": 0, "rg_idx": 0, "epoch": 1}
        data.tokenizing_distributed_data_loader_with_state_bos_bestfit = serve(given["train"], (position,))
    if "start" in given:
        begin_with(given["start"])
    if "scalars" in given:
        match_scalars(*given["scalars"])
    runpy.run_module("scripts.base_train", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
