"""The other side of a comparison: karpathy/nanochat or transformers, in a process of its own.

    python dev/reference.py nanochat CHECKOUT '{"n_layer": ..., "dtype": ..., ...}'      decode: see PeerSide
    python dev/reference.py transformers '' '{...}'
    python dev/reference.py steps CHECKOUT '{"start": FILE, ...}'      training steps on demand: see nanochat_trainer
    python dev/reference.py train CHECKOUT '{"val": FILE, ...}' [flags of scripts.base_train]      see compare.py

It runs as a file, not as a module, so that `nanochat` means the checkout's package. No file of the checkout is changed:
where a comparison must hold something equal, functions are replaced in this process.
"""

import contextlib
import importlib
import itertools
import json
import os
import random
import runpy
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

Run = Callable[[list[int], int, int], None]  # (prompt, samples, new tokens)


ROOT = Path(__file__).resolve().parent.parent


class PeerSide:
    """This file in a process of its own: a line of JSON in, a line of JSON out.

    As a side of scripts.infer_bench it is sent batch sizes, and answers two durations; for `steps` see serve_steps.
    """

    def __init__(self, kind: str, dtype: str, root: str, settings: dict[str, Any]) -> None:
        self.name = f"{kind} {dtype}"
        environment = dict(os.environ)
        # For dev.train_clock; use_checkout takes it away.
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        environment["NANOCHAT_DTYPE"] = dtype
        environment["OMP_NUM_THREADS"] = str(torch.get_num_threads())
        self.process = subprocess.Popen(
            [sys.executable, __file__, kind, root, json.dumps({**settings, "dtype": dtype})],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def send(self, message: Any) -> None:
        """Send a message, which it begins to work on while we do other things."""
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            print(json.dumps(message), file=self.process.stdin, flush=True)

    def receive(self) -> Any:
        """Wait for the answer to the oldest message. Raises ValueError when the process has ended."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise ValueError(f"{self.name} ended with status {self.process.wait()}: see what it wrote above")
        return json.loads(line)

    def batch(self, size: int) -> tuple[float, float]:
        """Return the seconds to the first token and those after it."""
        self.send(size)
        first_token, rest = self.receive()
        return first_token, rest

    def close(self) -> None:
        self.process.kill()
        self.process.wait()


def use_checkout(root: str) -> None:
    """Make `import nanochat` find the checkout; our own packages must not hide those without __init__.py."""
    sys.dont_write_bytecode = True
    sys.path = [root, *(path for path in sys.path[1:] if Path(path or ".").resolve() != ROOT)]


# --- decoding ---------------------------------------------------------------------------------------------------------


def randomise(model: torch.nn.Module) -> None:
    """Give every weight a random value: some begin at zero, and zeros make products faster."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.02 * torch.randn(parameter.shape, generator=generator))


def nanochat_decoder(root: str, shape: dict[str, Any]) -> Run:
    """Greedy samples of one prompt by the checkout's engine."""
    use_checkout(root)
    from nanochat.engine import Engine
    from nanochat.gpt import GPT, GPTConfig

    names = ("sequence_len", "vocab_size", "n_layer", "n_head", "n_kv_head", "n_embd", "window_pattern")
    model = GPT(GPTConfig(**{name: shape[name] for name in names}))
    model.init_weights()
    randomise(model)

    class Tokenizer:
        """Special tokens that no model can sample, so that an answer ends by its length."""

        def encode_special(self, name: str) -> int:
            return -1

        def get_bos_token_id(self) -> int:
            return -1

    engine = Engine(model.eval(), Tokenizer())

    def run(prompt: list[int], size: int, new_tokens: int) -> None:
        steps = sum(1 for _ in engine.generate(prompt, num_samples=size, max_tokens=new_tokens, temperature=0.0))
        assert steps == new_tokens

    return run


def transformers_decoder(root: str, shape: dict[str, Any]) -> Run:
    """Greedy `generate` of transformers' NanoChat, its architecture nearest to ours."""
    from transformers import NanoChatConfig, NanoChatForCausalLM
    from transformers.utils import logging

    logging.set_verbosity_error()
    config = NanoChatConfig(
        vocab_size=shape["vocab_size"],
        hidden_size=shape["n_embd"],
        intermediate_size=4 * shape["n_embd"],
        num_hidden_layers=shape["n_layer"],
        num_attention_heads=shape["n_head"],
        num_key_value_heads=shape["n_kv_head"],
        max_position_embeddings=shape["sequence_len"],
    )
    model = NanoChatForCausalLM(config).to(getattr(torch, shape["dtype"])).eval()
    randomise(model)

    def run(prompt: list[int], size: int, new_tokens: int) -> None:
        ids = torch.tensor([prompt] * size)
        with torch.inference_mode():
            out = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                pad_token_id=0,
                min_new_tokens=new_tokens,
                max_new_tokens=new_tokens,
            )
        assert out.shape == (size, len(prompt) + new_tokens)

    return run


def serve_decoding(run: Run, shape: dict[str, Any]) -> None:
    """For each batch size read from stdin, print [seconds of one token, seconds of the others]."""
    for line in sys.stdin:
        size = int(line)
        prompt = random.choices(range(shape["vocab_size"]), k=shape["prompt_tokens"])
        seconds = []
        for new_tokens in (1, shape["new_tokens"]):
            began = time.perf_counter()
            run(prompt, size, new_tokens)
            seconds.append(time.perf_counter() - began)
        print(json.dumps([seconds[0], seconds[1] - seconds[0]]), file=sys.__stdout__, flush=True)


# --- training ---------------------------------------------------------------------------------------------------------


def serve_rows(path: str, state: tuple = ()) -> Callable[..., Iterator[tuple]]:
    """Build a stand-in for the checkout's data loaders: batches of the rows in `path`, in order, without end."""
    rows = torch.load(path)

    def loader(tokenizer: Any, batch_rows: int, sequence_len: int, *, device: str = "cpu", **unused: Any) -> Iterator:
        assert rows["inputs"].size(1) == sequence_len, "the rows were made for another sequence length"
        for first in itertools.cycle(range(0, len(rows["inputs"]), batch_rows)):
            part = slice(first, first + batch_rows)
            yield rows["inputs"][part].to(device), rows["targets"][part].to(device), *state

    return loader


def begin_with(path: str) -> None:
    """Make models begin with the weights in `path`, which must be all of them."""
    GPT = importlib.import_module("nanochat.gpt").GPT
    original = GPT.init_weights

    def init_weights(self: Any, *arguments: Any) -> None:
        original(self, *arguments)  # sets what no state dict holds
        self.load_state_dict(torch.load(path), strict=True)

    GPT.init_weights = init_weights


def match_scalars(lr: float, eps: float) -> None:
    """Set what no flag of the checkout does: the learning rate of smear and backout, and the scalars' epsilon."""
    GPT = importlib.import_module("nanochat.gpt").GPT
    original = GPT.setup_optimizer

    def setup_optimizer(self: Any, **rates: Any) -> Any:
        optimizer = original(self, **rates)
        for group in optimizer.param_groups:
            if all(parameter.numel() < 4096 for parameter in group["params"]) and "eps" in group:
                group["eps"] = eps
            if any(parameter is self.smear_lambda for parameter in group["params"]):
                group["lr"] = group["initial_lr"] = lr
        return optimizer

    GPT.setup_optimizer = setup_optimizer


def compile_nothing() -> None:
    """Make torch.compile return what it is given."""
    torch.compile = lambda function=None, **options: function or (lambda later: later)


def train(root: str, given: dict[str, Any], flags: list[str]) -> None:
    """Run scripts.base_train of `root` (ours, too) with what is given held equal.

    given: `val` and `train`, files of rows; `start`, a file of weights; `scalars`, see match_scalars; `eager`, without
    torch.compile.
    """
    use_checkout(root)
    sys.argv = ["scripts.base_train", *flags]
    if "eager" in given:
        compile_nothing()
    if "val" in given or "train" in given:
        data = importlib.import_module("nanochat.dataloader")
        if "val" in given:
            data.tokenizing_distributed_data_loader_bos_bestfit = serve_rows(given["val"])
        if "train" in given:
            position = {"pq_idx": 0, "rg_idx": 0, "epoch": 1}
            data.tokenizing_distributed_data_loader_with_state_bos_bestfit = serve_rows(given["train"], (position,))
    if "start" in given:
        begin_with(given["start"])
    if "scalars" in given:
        match_scalars(*given["scalars"])
    runpy.run_module("scripts.base_train", run_name="__main__", alter_sys=True)


# --- single steps of training -----------------------------------------------------------------------------------------


def nanochat_trainer(root: str, given: dict[str, Any]) -> Any:
    """Build the checkout's model and optimizer as its base_train does, as a `train_clock.Trainable`.

    given: `shape` of the model, `start`, a file of weights, `rates` and decay for its setup_optimizer, `momentum` of
    Muon, `scalars`, see match_scalars, `device`, `fp8` and `compile`.
    """
    from dev.train_clock import Trainable

    if not given["compile"]:
        compile_nothing()
    use_checkout(root)
    from nanochat.gpt import GPT, GPTConfig

    device = torch.device(given["device"])
    torch.set_float32_matmul_precision("high")
    match_scalars(*given["scalars"])
    with torch.device("meta"):
        model = GPT(GPTConfig(**given["shape"]))
    model.to_empty(device=device)
    model.init_weights()  # sets what no state dict holds
    model.load_state_dict(torch.load(given["start"]), strict=True)
    if given["fp8"]:
        from nanochat.fp8 import convert_to_float8_training

        convert_to_float8_training(model, module_filter_fn=large_enough_for_fp8)
    compiled = torch.compile(model, dynamic=False)
    optimizer = model.setup_optimizer(**given["rates"])
    for group in optimizer.param_groups:
        if group["kind"] == "muon":
            group["momentum"] = given["momentum"]

    def update() -> None:
        optimizer.step()
        model.zero_grad(set_to_none=True)

    flash = importlib.import_module("nanochat.flash_attention")
    kernels = "attention flash-attention-3" if flash.USE_FA3 else "attention sdpa, with masks for windows"
    return Trainable(device, kernels, compiled, update)


def large_enough_for_fp8(module: torch.nn.Module, name: str) -> bool:
    """Return whether its base_train gives a matrix to fp8: sides are multiples of 16, and 128 or more."""
    if not isinstance(module, torch.nn.Linear):
        return False
    sides = (module.in_features, module.out_features)
    return min(sides) >= 128 and not any(side % 16 for side in sides)


def serve_steps(side: Any, batch: str) -> None:
    """For each number of steps read from stdin, train so many on the micro-batches in a file, and print their times.

    For 0 print how long the GPU is busy in a step.
    """
    from dev.train_clock import busy_milliseconds, facts, measure

    batches = itertools.repeat(torch.load(batch, map_location=side.device))
    for line in sys.stdin:
        steps = int(line)
        if steps:
            found = {**measure(side, batches, steps), **facts(side)}
        else:
            found = {"busy ms": busy_milliseconds(side, batches)}
        print(json.dumps(found), file=sys.__stdout__, flush=True)


def main() -> None:
    kind, root, settings, *flags = sys.argv[1:]
    given = json.loads(settings)
    if kind == "train":
        train(root, given, flags)
        return
    with contextlib.redirect_stdout(sys.stderr):  # answers alone go to stdout
        if kind == "nanochat":
            serve_decoding(nanochat_decoder(root, given), given)
        elif kind == "steps":
            try:
                serve_steps(nanochat_trainer(root, given), given["batch"])
            except Exception as error:  # out of memory, say
                print(json.dumps({"failed": f"{type(error).__name__}: {error}"}), file=sys.__stdout__, flush=True)
                raise
        else:
            serve_decoding(transformers_decoder(root, given), given)


if __name__ == "__main__":
    main()
