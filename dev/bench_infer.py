"""How fast the engine answers, alone and in batches, against what the machine can do: python -m scripts.infer_bench

Weights are random unless --stage names a checkpoint; speed does not depend on them. With --baseline-dir (a checkout of
karpathy/nanochat) and --transformers, models of equal shape run in processes of their own, taking turns with ours.
"""

import contextlib
import dataclasses
import json
import os
import resource
import statistics
import subprocess
import sys
import time
import types
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from dev import bench_old as bench
from nanochat import checkpoint, cli, recipe
from nanochat.common import get_base_dir
from nanochat.compute import Compute
from nanochat.dataloader import RowLoader
from nanochat.engine import Engine, Request
from nanochat.gpt import GPT, build_model
from nanochat.kv_cache import CacheBatch, KVCache, Part
from nanochat.loss_eval import evaluate_bpb
from nanochat.packed import PackedGPT
from nanochat.token_shards import TextRows

CHILD = Path(__file__).resolve().parent / "infer_child.py"
NO_TOKENIZER = types.SimpleNamespace(special_tokens={})  # nothing ends an answer but its length


@dataclass(frozen=True)
class Config:
    """What is measured, and against what."""

    depth: int = cli.option(4, "depth of a model with random weights")
    vocab_size: int = cli.option(4096, "its vocabulary")
    sequence_len: int = cli.option(1024, "its context")
    head_dim: int = cli.option(128, "channels of an attention head")
    window_pattern: str = cli.option("L", "its windows")
    stage: str | None = cli.option(
        None, "measure a checkpoint of this stage instead", choices=("base", "mid", "sft", "rl")
    )
    model_tag: str | None = cli.option(None, "which model of that stage; unset: the newest")
    batches: str = cli.option("1,4,16", "requests at a time, as 1,16")
    prompt_tokens: int = cli.option(32, "tokens of a prompt")
    new_tokens: int = cli.option(64, "tokens of an answer")
    prefix_tokens: int = cli.option(400, "tokens of a beginning that requests share")
    clients: int = cli.option(10, "requests that come at the same moment, for the time to first token")
    rounds: int = cli.option(5, "times that each measurement is taken, the sides in turn")
    int8: bool = cli.option(False, "measure int8 weights as well, on a CPU")
    deterministic: bool = cli.option(True, "the engine's mode")
    quality_tokens: int = cli.option(0, "with --stage and --int8: bits per byte over so many validation tokens")
    baseline_dir: str | None = cli.option(None, "a checkout of karpathy/nanochat to compare with")
    transformers: bool = cli.option(False, "compare with transformers' generate")
    device_type: str | None = cli.option(None, "cuda, mps or cpu; unset: the best there is")
    out: str | None = cli.option(
        None, "record to write, with tables beside it; unset: bench/infer_d<depth>.json in the base"
    )

    def __post_init__(self) -> None:
        if not self.batches.replace(",", "").isdigit() or not all(map(int, self.batches.split(","))):
            raise ValueError(f"--batches {self.batches}: give numbers, as 1,16")
        for name in ("prompt_tokens", "new_tokens", "prefix_tokens", "clients", "rounds"):
            if getattr(self, name) < 2:
                raise ValueError(f"--{name.replace('_', '-')} {getattr(self, name)}: must be at least 2")
        if max(self.prompt_tokens, self.prefix_tokens + 16) + self.new_tokens > self.sequence_len and not self.stage:
            raise ValueError(f"prompt or prefix, and answer, exceed --sequence-len {self.sequence_len}: raise it")


class Ours:
    """This project's engine over a model."""

    def __init__(self, model: GPT, config: Config, int8: bool) -> None:
        self.config, self.vocab_size = config, model.config.vocab_size
        settings = {"deterministic": config.deterministic, "int8": int8}
        largest = max(config.clients, *map(int, config.batches.split(",")), 1)
        self.engine = Engine(model, NO_TOKENIZER, largest, **settings)
        self.n_prompts = 0

    def prompt(self, n: int) -> list[int]:
        """A prompt that was not seen before, so that nothing of it is known."""
        self.n_prompts += 1
        generator = torch.Generator().manual_seed(self.n_prompts)
        return torch.randint(self.vocab_size, (n,), generator=generator).tolist()

    def run(self, prompts: list[list[int]], new_tokens: int) -> tuple[list[float], float]:
        """Seconds until each request's first token, and from when all have theirs until the end."""
        requests, began = [Request(prompt, new_tokens, 0.0) for prompt in prompts], time.perf_counter()
        for request in requests:
            self.engine.add(request)
        firsts: dict[Request, float] = {}
        while len(firsts) < len(requests):
            for update in self.engine.step():
                firsts.setdefault(update.request, time.perf_counter() - began)
        middle, before = time.perf_counter(), sum(len(request.output) for request in requests)
        while self.engine.busy:
            self.engine.step()
        seconds, after = time.perf_counter() - middle, sum(len(request.output) for request in requests)
        share = (new_tokens - 1) * len(prompts) / max(after - before, 1)  # a first may come after others' second
        return list(firsts.values()), seconds * share

    def batch(self, size: int) -> tuple[float, float]:
        """Seconds to the first tokens, and seconds that `size` answers took after it."""
        firsts, rest = self.run([self.prompt(self.config.prompt_tokens)] * size, self.config.new_tokens)
        return max(firsts), rest

    def prefix(self) -> tuple[float, float]:
        """Seconds to the first token of a long prompt that is new, and of one whose beginning is known."""
        shared = self.prompt(self.config.prefix_tokens)
        cold, _ = self.run([[*shared, *self.prompt(16)]], 2)
        known, _ = self.run([[*shared, *self.prompt(16)]], 2)
        return cold[0], known[0]

    def crowd(self) -> tuple[list[float], float]:
        """Seconds to each first token of prompts that differ and come at the same moment; tokens/s of each after."""
        prompts = [self.prompt(self.config.prompt_tokens) for _ in range(self.config.clients)]
        firsts, rest = self.run(prompts, self.config.new_tokens)
        return firsts, (self.config.new_tokens - 1) / rest


class Peer:
    """Another program with a model of equal shape, in a process that answers one line of JSON with another."""

    def __init__(self, kind: str, dtype: str, shape: dict[str, Any], config: Config) -> None:
        env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        env |= {"NANOCHAT_DTYPE": dtype, "OMP_NUM_THREADS": str(torch.get_num_threads())}
        settings = {**shape, "dtype": dtype, "prompt_tokens": config.prompt_tokens, "new_tokens": config.new_tokens}
        command = [sys.executable, str(CHILD), kind, config.baseline_dir or "", json.dumps(settings)]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self.process = subprocess.Popen(command, env=env, **pipes)
        self.name = f"{kind} {dtype}"

    def batch(self, size: int) -> tuple[float, float]:
        """As `Ours.batch`."""
        with contextlib.suppress(BrokenPipeError):
            print(size, file=self.process.stdin, flush=True)
        line = self.process.stdout.readline()
        if not line:
            raise ValueError(f"{self.name} ended with status {self.process.wait()}: see what it wrote above")
        first, rest = json.loads(line)
        return first, rest

    def close(self) -> None:
        """End the process."""
        self.process.kill()
        self.process.wait()


@contextlib.contextmanager
def peers(shape: dict[str, Any], config: Config) -> Iterator[list[Peer]]:
    """The programs asked for, each in both dtypes."""
    kinds = ["nanochat"] * bool(config.baseline_dir) + ["transformers"] * config.transformers
    started: list[Peer] = []
    try:
        for kind in kinds:
            started += [Peer(kind, dtype, shape, config) for dtype in ("float32", "bfloat16")]
        yield started
    finally:
        for peer in started:
            peer.close()


def open_model(config: Config, compute: Compute) -> tuple[GPT, dict[str, Any] | None]:
    """The checkpoint asked for with its meta, or a model with random weights."""
    if config.stage:
        model, _, meta = checkpoint.load_model(config.stage, compute.device, config.model_tag)
        return model, meta
    windows = {"head_dim": config.head_dim, "window_pattern": config.window_pattern}
    shape = recipe.model_config(config.depth, config.vocab_size, config.sequence_len, **windows)
    model = build_model(shape, compute.device, train=False).eval()
    generator = torch.Generator(compute.device).manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():  # none zero, as some are at first: zeros flatter products
            parameter.normal_(0, 0.02 if parameter.dim() == 2 else 0.2, generator=generator)
    return model, None


def ceilings(compute: Compute, model: GPT, batch: int) -> tuple[float, float]:
    """Byte/s of reading memory, and FLOP/s of a product of the MLP's shape, each the best of some tries."""
    N, C, device = max(batch, 256), model.config.n_embd, compute.device
    memory = torch.ones(1 << 27, dtype=torch.int32, device=device)
    x_NC, w_HC = (torch.randn(rows, C, device=device).to(compute.dtype) for rows in (N, 4 * C))
    seconds = [min(bench.time_calls(call, device, 0, 10)) for call in (memory.amax, lambda: F.linear(x_NC, w_HC))]
    return memory.nbytes / seconds[0], 2 * N * w_HC.numel() / seconds[1]


def bits_per_byte(model: GPT, meta: dict[str, Any], config: Config, compute: Compute, int8: bool) -> float:
    """Of the packed model on the validation text that it was trained against."""
    tokenizer = checkpoint.load_tokenizer(meta["tokenizer_hash"])
    packed, T = PackedGPT(model, int8=int8), model.config.sequence_len
    loader = RowLoader(TextRows(meta["dataset"], "val", tokenizer, T), 1, 1, 0, device=compute.device)

    @torch.inference_mode()
    def losses(idx_BT: torch.Tensor, targets_BT: torch.Tensor, loss_reduction: str) -> torch.Tensor:
        idx_T, positions_T = idx_BT[0], torch.arange(T, device=compute.device)
        cache = KVCache(compute.device, packed.cache_needs, T, T)
        cache.reserve(1, T)
        batch = CacheBatch(cache, [Part(0, 1, T, T)], torch.zeros_like(idx_T), positions_T)
        logits_TV = packed(idx_T, F.pad(idx_T[:-1], (1, 0), value=-1), positions_T, batch)
        return F.cross_entropy(logits_TV, targets_BT[0], ignore_index=-1, reduction=loss_reduction)

    rows = loader.first_rows(min(max(1, config.quality_tokens // T), loader.rows_in_epoch))
    return evaluate_bpb(losses, rows, tokenizer.token_bytes, compute)


def measure_alone(side: Ours, config: Config, rates: tuple[float, float]) -> dict[str, Any]:
    """What needs no comparison: prefill, a known beginning, a crowd, memory."""
    products, n = side.engine.model.products, config.prefix_tokens + 16
    prefix = [side.prefix() for _ in range(config.rounds)]
    crowd, clients = [side.crowd() for _ in range(config.rounds)], f"{config.clients} at once"
    cold = statistics.median(new for new, _ in prefix)
    return {
        "prefill tokens/s": n / cold,
        "prefill share of GEMM rate": 2 * sum(each.weights for each in products) * n / cold / rates[1],
        f"first token of {n}, s": cold,
        f"the same, {config.prefix_tokens} known, s": statistics.median(known for _, known in prefix),
        "times as fast": statistics.median(new / known for new, known in prefix),
        f"median first token of {clients}, s": statistics.median(seconds for firsts, _ in crowd for seconds in firsts),
        f"last first token of {clients}, s": statistics.median(max(firsts) for firsts, _ in crowd),
        "tokens/s of each of them": statistics.median(rate for _, rate in crowd),
        "bytes of weights": sum(each.bytes for each in products),
        "bytes of cache a token": side.engine.bytes_per_token,
        "peak resident bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


def compare(sides: dict[str, Any], size: int, config: Config, rates: tuple[float, float]) -> list[dict[str, Any]]:
    """A batch of `size` by every side in turn; the first side is ours, whose speed the others' are divided by."""
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in sides}
    for turn in range(-1, config.rounds):  # the first is to warm up
        for name, side in sides.items():
            measured = side.batch(size)
            times[name] += [measured] if turn >= 0 else []
    lines, tokens = [], (config.new_tokens - 1) * size
    for name, side in sides.items():
        rest = [seconds for _, seconds in times[name]]
        step = statistics.median(rest) / (config.new_tokens - 1)
        line = {
            "side": name,
            "batch": size,
            "tokens/s": tokens / statistics.median(rest),
            "ms a step": 1e3 * step,
            "first token ms": 1e3 * statistics.median(first for first, _ in times[name]),
            "ours is faster by": statistics.median(b / a[1] for a, b in zip(times["ours"], rest, strict=True)),
            "share of bandwidth": None,
            "share of GEMM rate": None,
        }
        if isinstance(side, Ours):
            products, read = side.engine.model.products, config.prompt_tokens + config.new_tokens / 2
            moved = sum(each.bytes for each in products) + size * read * side.engine.bytes_per_token
            line["share of bandwidth"] = moved / step / rates[0]
            line["share of GEMM rate"] = 2 * size * sum(each.weights for each in products) / step / rates[1]
        lines.append(line)
    return lines


def main() -> None:
    """Measure, print, and write a record."""
    config = cli.parse(Config, description=__doc__)
    compute = Compute.create(config.device_type)
    model, meta = open_model(config, compute)
    shape = dataclasses.asdict(model.config)
    batches = [int(size) for size in config.batches.split(",")]
    rates = ceilings(compute, model, max(batches))
    with peers(shape, config) as others:
        sides: dict[str, Any] = {"ours": Ours(model, config, int8=False)}
        sides |= {"ours int8": Ours(model, config, int8=True)} if config.int8 else {}
        sides |= {peer.name: peer for peer in others}
        lines = [line for size in batches for line in compare(sides, size, config, rates)]
    alone = {name: measure_alone(side, config, rates) for name, side in sides.items() if isinstance(side, Ours)}
    if config.quality_tokens and meta:
        for name in alone:
            alone[name]["bits per byte"] = bits_per_byte(model, meta, config, compute, int8=name != "ours")
    facts = [{"": key, **{name: alone[name][key] for name in alone}} for key in alone["ours"]]
    where = {"device": compute.name, "dtype": str(compute.dtype), "threads": torch.get_num_threads()}
    measured = {"read bytes/s": rates[0], "GEMM FLOP/s": rates[1], "batches": lines, "alone": alone}
    path = Path(config.out) if config.out else get_base_dir() / "bench" / f"infer_d{model.config.n_layer}.json"
    tables = "\n".join(bench.markdown_table(rows) for rows in ([where], lines, facts))
    record = {"config": dataclasses.asdict(config), "model": shape, **where, **measured}
    bench.write_report(path.with_suffix(""), record, tables)
