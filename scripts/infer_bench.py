"""Measure how fast the engine answers: python -m scripts.infer_bench

It prints two tables and writes them as a JSON record: decoding, alone and in batches; and prefill, a known prefix,
clients that come at once, and the share of the machine's own speed. Weights are random unless --stage or --hf names a
model, because speed does not depend on their values. Every number is the median of several rounds. To compare with
other programs: python -m dev.bench infer.
"""

import dataclasses
import statistics
import time
import types
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from nanochat import checkpoint, cli, recipe
from nanochat.common import get_base_dir, write_record
from nanochat.compute import Compute
from nanochat.engine import Engine, Request
from nanochat.gpt import build_model
from nanochat.table import to_table

NO_TOKENIZER = types.SimpleNamespace(special_tokens={}, stop_tokens=frozenset())  # only its length ends an answer


@dataclass(frozen=True)
class Config:
    """Flags of the benchmark."""

    depth: int = cli.option(4, "depth of a model with random weights")
    vocab_size: int = cli.option(4096, "its vocabulary")
    sequence_len: int = cli.option(1024, "its context")
    head_dim: int = cli.option(128, "channels of an attention head")
    window_pattern: str = cli.option("L", "its attention windows")
    stage: str | None = cli.option(None, "measure a checkpoint of this stage", choices=("base", "mid", "sft", "rl"))
    model_tag: str | None = cli.option(None, "which model of that stage; unset: the newest")
    hf: str | None = cli.option(None, "measure the open-weights model in this folder")
    batches: str = cli.option("1,4,16", "requests at a time, as 1,16")
    prompt_tokens: int = cli.option(32, "tokens of a prompt")
    new_tokens: int = cli.option(64, "tokens of an answer")
    prefix_tokens: int = cli.option(400, "tokens of the prefix that two requests share")
    clients: int = cli.option(10, "requests that arrive at the same moment, for the time to first token")
    rounds: int = cli.option(5, "times that each measurement is taken")
    int8: bool = cli.option(False, "8-bit weights, on CPU")
    device_type: str | None = cli.option(None, "cuda, mps or cpu; unset: the best there is")
    out: str | None = cli.option(None, "JSON record to write; unset: bench/infer_<model>.json in the base directory")

    def __post_init__(self) -> None:
        if not self.batches.replace(",", "").isdigit() or not all(self.batch_sizes):
            raise ValueError(f"--batches {self.batches}: give numbers, as 1,16")
        for name in ("prompt_tokens", "new_tokens", "prefix_tokens", "clients", "rounds"):
            if getattr(self, name) < 2:
                raise ValueError(f"--{name.replace('_', '-')} {getattr(self, name)}: must be at least 2")
        longest = max(self.prompt_tokens, self.prefix_tokens + 16) + self.new_tokens
        if longest > self.sequence_len and self.stage is None and self.hf is None:
            raise ValueError(f"prompt (or prefix) and answer exceed --sequence-len {self.sequence_len}: raise it")

    @property
    def batch_sizes(self) -> list[int]:
        return [int(size) for size in self.batches.split(",")]


def open_model(config: Config, compute: Compute) -> nn.Module:
    """Load the model asked for, or build one with random weights, nowhere zero: zeros make products faster."""
    if config.hf is not None:
        # Here, so that random weights are measured on a machine without the packages of other models' formats, too.
        from nanochat.hf.load import load_model

        return load_model(Path(config.hf), compute.device)
    if config.stage is not None:
        model, _, _ = checkpoint.load_model(config.stage, compute.device, config.model_tag)
        return model
    shape = recipe.model_config(
        config.depth,
        config.vocab_size,
        config.sequence_len,
        head_dim=config.head_dim,
        window_pattern=config.window_pattern,
    )
    model = build_model(shape, compute.device, train=False).eval()
    generator = torch.Generator(compute.device).manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            std = 0.02 if parameter.dim() == 2 else 0.2
            parameter.normal_(0, std, generator=generator)
    return model


def time_calls(call: Callable[[], Any], device: torch.device, times: int = 10) -> list[float]:
    """Return the seconds of each of `times` calls, after two calls that do not count."""
    seconds = []
    for _ in range(times + 2):
        start = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - start)
    return seconds[2:]


def read_bandwidth(device: torch.device) -> float:
    """Measure how fast memory is read, in bytes/s: the best of ten passes over half a gigabyte."""
    memory = torch.ones(1 << 27, dtype=torch.int32, device=device)
    return memory.nbytes / min(time_calls(memory.amax, device))


def product_rate(model: nn.Module, rows: int, compute: Compute) -> float:
    """Measure matrix products of the MLP's shape, in FLOP/s: the best of ten."""
    C = model.config.n_embd
    x_NC = torch.randn(rows, C, device=compute.device).to(compute.dtype)
    w_HC = torch.randn(4 * C, C, device=compute.device).to(compute.dtype)
    seconds = time_calls(lambda: F.linear(x_NC, w_HC), compute.device)
    return 2 * rows * w_HC.numel() / min(seconds)


class EngineSide:
    """The engine under measurement. Other programs that are measured have `name` and `batch` too (dev/reference.py)."""

    name = "ours"

    def __init__(self, model: nn.Module, config: Config) -> None:
        self.config = config
        self.vocab_size = model.config.vocab_size
        # A decode step reads every matrix, but only one row per token of the embeddings.
        self.n_weights = sum(module.weight.numel() for module in model.modules() if isinstance(module, nn.Linear))
        self.weight_bytes = self.n_weights * (1 if config.int8 else model.dtype.itemsize)
        largest_batch = max(config.clients, *config.batch_sizes)
        self.engine = Engine(model, NO_TOKENIZER, largest_batch, int8=config.int8)
        torch.set_num_threads(self.engine.threads)
        self.n_prompts = 0

    def prompt(self, n: int) -> list[int]:
        """Return a new prompt of n tokens, which the prefix cache cannot know."""
        self.n_prompts += 1
        generator = torch.Generator().manual_seed(self.n_prompts)
        return torch.randint(self.vocab_size, (n,), generator=generator).tolist()

    def run(self, prompts: list[list[int]], new_tokens: int) -> tuple[list[float], float]:
        """Answer all prompts at once; return each one's seconds to its first token, and the seconds of decoding.

        Decoding begins when the last request has its first token. The others may be some tokens ahead by then, so the
        time is scaled to new_tokens - 1 steps of all.
        """
        requests = [Request(prompt, max_tokens=new_tokens, temperature=0.0) for prompt in prompts]
        start = time.perf_counter()
        for request in requests:
            self.engine.add(request)
        first_token: dict[Request, float] = {}
        while len(first_token) < len(requests):
            for update in self.engine.step():
                first_token.setdefault(update.request, time.perf_counter() - start)
        tokens_before = sum(len(request.output) for request in requests)
        middle = time.perf_counter()
        while self.engine.busy:
            self.engine.step()
        seconds = time.perf_counter() - middle
        tokens_after = sum(len(request.output) for request in requests)
        all_tokens = (new_tokens - 1) * len(prompts)
        return list(first_token.values()), seconds * all_tokens / max(tokens_after - tokens_before, 1)

    def batch(self, size: int) -> tuple[float, float]:
        """Answer one prompt `size` times; return the seconds to the last first token, and those of decoding."""
        prompt = self.prompt(self.config.prompt_tokens)
        first_tokens, decoding = self.run([prompt] * size, self.config.new_tokens)
        return max(first_tokens), decoding


def measure_batches(sides: list[Any], config: Config) -> list[dict[str, Any]]:
    """Time every batch size on all sides in turn, A B A B, so that a machine that drifts favours none.

    The first side is ours. `ours x` says how many times as fast it is: the median of the ratios of each round.
    """
    steps = config.new_tokens - 1
    lines = []
    for size in config.batch_sizes:
        for side in sides:
            side.batch(size)  # warms up
        rounds = [[side.batch(size) for side in sides] for _ in range(config.rounds)]
        for index, side in enumerate(sides):
            first_token = statistics.median(results[index][0] for results in rounds)
            decoding = statistics.median(results[index][1] for results in rounds)
            lines.append(
                {
                    "side": side.name,
                    "batch": size,
                    "tokens/s": steps * size / decoding,
                    "ms a step": 1e3 * decoding / steps,
                    "first token ms": 1e3 * first_token,
                    "ours x": statistics.median(results[index][1] / results[0][1] for results in rounds),
                }
            )
    return lines


def measure_requests(side: EngineSide, config: Config) -> dict[str, float]:
    """Measure a long prompt, one whose prefix is known, and clients that come at once."""
    n = config.prefix_tokens + 16
    unknown: list[float] = []
    known: list[float] = []
    first_tokens: list[float] = []
    rates: list[float] = []
    for _ in range(config.rounds):
        prefix = side.prompt(config.prefix_tokens)
        for seconds in (unknown, known):  # the second request finds the prefix of the first
            (first_token,), _ = side.run([prefix + side.prompt(16)], new_tokens=2)
            seconds.append(first_token)
        prompts = [side.prompt(config.prompt_tokens) for _ in range(config.clients)]
        together, decoding = side.run(prompts, config.new_tokens)
        first_tokens += together
        rates.append((config.new_tokens - 1) / decoding)
    return {
        "prefill tokens/s": n / statistics.median(unknown),
        f"first token of {n}, ms": 1e3 * statistics.median(unknown),
        f"first token of {n}, {config.prefix_tokens} known, ms": 1e3 * statistics.median(known),
        f"{config.clients} at once: median first token, ms": 1e3 * statistics.median(first_tokens),
        f"{config.clients} at once: last first token, ms": 1e3 * max(first_tokens),
        f"{config.clients} at once: tokens/s of each": statistics.median(rates),
    }


def measure_machine(
    side: EngineSide, decoding: dict[str, Any], prefill_rate: float, compute: Compute
) -> dict[str, float]:
    """Compare decoding with the speed of memory, and prefill with that of matrix products."""
    step_seconds = decoding["ms a step"] / 1e3
    bandwidth = read_bandwidth(compute.device)
    flop_rate = product_rate(side.engine.model, 256, compute)
    return {
        "bytes of weights read a step": side.weight_bytes,
        "bytes of cache a token": side.engine.bytes_per_token,
        "memory, bytes/s": bandwidth,
        "matrix products, FLOP/s": flop_rate,
        f"batch {decoding['batch']}: share of memory bandwidth": side.weight_bytes / step_seconds / bandwidth,
        "prefill share of product rate": 2 * side.n_weights * prefill_rate / flop_rate,
        "peak memory, bytes": compute.peak_memory(),
    }


def run(config: Config, more_sides: list[Any], model: nn.Module, compute: Compute) -> None:
    """Measure, print the tables and write the record."""
    side = EngineSide(model, config)
    batches = measure_batches([side, *more_sides], config)
    alone = measure_requests(side, config)
    alone.update(measure_machine(side, batches[0], alone["prefill tokens/s"], compute))
    print(f"{compute.name}, {compute.dtype}, {torch.get_num_threads()} threads\n\n{to_table(batches)}\n")
    print(to_table([{"measured": key, "value": value} for key, value in alone.items()]))
    shape = dataclasses.asdict(model.config)
    record = {
        "config": dataclasses.asdict(config),
        "model": shape,
        "device": compute.name,
        "dtype": str(compute.dtype),
        "threads": torch.get_num_threads(),
        "batches": batches,
        "alone": alone,
    }
    default = get_base_dir() / "bench" / f"infer_d{shape['n_layer']}.json"
    path = Path(config.out) if config.out else default
    write_record(path, record)
    print(f"{path} written")


def main() -> None:
    config = cli.parse(Config, description=__doc__)
    compute = Compute.create(config.device_type)
    run(config, [], open_model(config, compute), compute)


if __name__ == "__main__":
    cli.run(main)
