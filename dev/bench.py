"""Benchmarks of this project, one subcommand each. Every one prints a table and writes a JSON record (--out).

    python -m dev.bench train --depths 4,6 -- --head-dim 64 --window-pattern L      tokens/s of scripts.base_train
    python -m dev.bench infer --baseline-dir CHECKOUT --transformers -- --depth 4   tokens/s of engines side by side
    python -m dev.bench model                                                       forward and backward alone
    python -m dev.bench data                                                        packing, loading, resuming
    python -m dev.bench tokenizer                                                   training, encoding, decoding
    python -m dev.bench core                                                        rows/s of the CORE evaluation
    python -m dev.bench plan --hardware 8xH100                                      modelled minutes of a training run

Flags after -- go to the script that is measured. `train` runs scripts.base_train as users do and reads its metrics;
`infer` runs scripts.infer_bench with the engines of karpathy/nanochat and transformers beside it, in turns.
"""

import contextlib
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dev.bench_plan import PlanBench, plan
from dev.bench_train import TrainBench, train
from dev.measure import Record, numbers, product_rate, split_argv, write
from dev.reference import PeerSide
from nanochat import checkpoint, cli, recipe, world
from nanochat.common import STAGES
from nanochat.compute import Compute
from nanochat.core_eval import evaluate_core
from nanochat.dataloader import RowLoader
from nanochat.gpt import build_model
from nanochat.table import to_table
from nanochat.token_shards import PackedRows, write_rows
from nanochat.tokenizer import Tokenizer
from nanochat.world_core import core_bundle
from scripts import infer_bench
from scripts.infer_bench import time_calls

BOS = 32759  # the first special token of a vocabulary of 32768


# --- infer: the engine beside other programs --------------------------------------------------------------------------


@dataclass(frozen=True)
class InferBench:
    """Flags of `infer`; those after -- go to scripts.infer_bench."""

    baseline_dir: str | None = cli.option(None, "a checkout of karpathy/nanochat to compare with")
    transformers: bool = cli.option(False, "compare with transformers' generate")


def infer(config: InferBench, more: list[str]) -> None:
    """Measure decoding; with peers in float32 and bfloat16, all sides in turn."""
    ours = cli.parse(infer_bench.Config, more, infer_bench.__doc__)
    compute = Compute.create(ours.device_type)
    model = infer_bench.open_model(ours, compute)
    settings = {**asdict(model.config), "prompt_tokens": ours.prompt_tokens, "new_tokens": ours.new_tokens}
    peers = []
    try:
        for dtype in ("float32", "bfloat16"):
            if config.transformers:
                peers.append(PeerSide("transformers", dtype, "", settings))
            if config.baseline_dir is not None:
                peers.append(PeerSide("nanochat", dtype, config.baseline_dir, settings))
        infer_bench.run(ours, peers, model, compute)
    finally:
        for peer in peers:
            peer.close()


# --- model: forward and backward alone --------------------------------------------------------------------------------


@dataclass(frozen=True)
class ModelBench:
    """Flags of `model`."""

    depths: str = cli.option("2,4,6", "depths to measure, as 4,6")
    rows: int = cli.option(16, "rows of a micro-batch")
    seq_len: int = cli.option(512, "context in tokens")
    vocab_size: int = cli.option(4096, "size of the vocabulary")
    head_dim: int = cli.option(128, "channels of an attention head")
    window_pattern: str = cli.option("L", "attention windows")
    compile: bool = cli.option(True, "fuse with torch.compile where a compiler is there")
    device_type: str | None = cli.option(None, "cuda, mps or cpu; unset: the best there is")
    out: str | None = cli.option(None, "JSON record to write; unset: bench/model.json in the base directory")

    def __post_init__(self) -> None:
        numbers("--depths", self.depths)
        cli.require_positive(self, "rows", "seq_len", "vocab_size", "head_dim")


def model(config: ModelBench, more: list[str]) -> None:
    """Time forward and backward with the loss, without optimizer and data, against the machine's product rate."""
    compute = Compute.create(config.device_type)
    rows = [time_model(config, depth, compute) for depth in numbers("--depths", config.depths)]
    print(to_table(rows))
    write(config.out, "model", {"config": asdict(config), "rows": rows})


def time_model(config: ModelBench, depth: int, compute: Compute) -> Record:
    shape = recipe.model_config(
        depth,
        config.vocab_size,
        config.seq_len,
        head_dim=config.head_dim,
        window_pattern=config.window_pattern,
    )
    net = build_model(shape, compute.device, train=True, compiled=config.compile)
    with torch.no_grad():
        for parameter in net.parameters():  # zeros, with which projections begin, make products faster
            parameter.normal_(std=0.02)
    idx_BT = torch.randint(config.vocab_size, (config.rows, config.seq_len), device=compute.device)

    def step() -> None:
        # The loss makes its gradient in the forward pass, so forward and backward are not timed apart.
        net(idx_BT, idx_BT).backward()
        net.zero_grad(set_to_none=True)

    seconds = statistics.median(time_calls(step, compute.device))
    peak = product_rate(shape, config.rows * config.seq_len, compute)
    rate = net.flops_per_token() * idx_BT.numel() / seconds
    return {
        "depth": depth,
        "ms": 1e3 * seconds,
        "tokens/s": idx_BT.numel() / seconds,
        "GFLOP/s": rate / 1e9,
        "measured product GFLOP/s": peak / 1e9,
        "share": rate / peak,
    }


# --- data: packing, loading, resuming, tokenizing ---------------------------------------------------------------------


@dataclass(frozen=True)
class DataBench:
    """Flags of `data`."""

    seq_len: int = cli.option(2048, "context in tokens")
    document: float = cli.option(1100.0, "mean length of a document in tokens; lengths are log-normal, sigma 1")
    shard_tokens: int = cli.option(16_000_000, "tokens of the shard that is packed and read")
    steps: int = cli.option(40, "steps of 2^18 tokens timed")
    shards: int = cli.option(400, "shards of the long run that is resumed near its end")
    out: str | None = cli.option(None, "JSON record to write; unset: bench/data.json in the base directory")

    def __post_init__(self) -> None:
        cli.require_positive(self, "seq_len", "document", "shard_tokens", "steps", "shards")


def data(config: DataBench, more: list[str]) -> None:
    """Measure packing and loading on one core in processor time, and resuming in wall time, on random ids."""
    torch.set_num_threads(1)
    documents = random_documents(config)
    step_rows = max(8, 2**18 // config.seq_len // 8 * 8)
    result: dict[str, float] = {}
    with tempfile.TemporaryDirectory(prefix="nanochat-bench-") as temporary:
        began = time.process_time()
        pairs = [(ids, None) for ids in documents]
        meta = write_rows(Path(temporary), pairs, config.seq_len + 1, np.dtype("uint16"), BOS)
        result["packing, tokens/s of a core"] = meta["tokens"] / (time.process_time() - began)

        folder = Path(temporary, "rows")
        loader = RowLoader(PackedRows([folder], config.seq_len, 1), step_rows, step_rows, seed=0)
        loader.step(0)  # maps and checks the files
        began = time.process_time()
        for step in range(config.steps):
            loader.step(step)
        tokens = config.steps * step_rows * config.seq_len
        result["loading, tokens/s of a core"] = tokens / (time.process_time() - began)

        # One folder under many names: each is opened as if it were a shard of its own.
        many = PackedRows([folder] * config.shards, config.seq_len, 1)
        last_step = max(0, many.total() // step_rows - 1)
        began = time.perf_counter()
        next(RowLoader(many, step_rows, step_rows, seed=0).iterate(last_step))
        result["resuming at the last step, s"] = time.perf_counter() - began
    print(to_table([{"measured": name, "value": value} for name, value in result.items()]))
    write(config.out, "data", {"config": asdict(config), **result})


def random_documents(config: DataBench) -> list[np.ndarray]:
    """Return documents of random ids below BOS, as many as fill the shard."""
    rng = np.random.default_rng(0)
    count = max(1, round(config.shard_tokens / config.document))
    mu = np.log(config.document) - 0.5  # a log-normal of sigma 1 has the mean e^(mu + 1/2)
    lengths = np.maximum(1, rng.lognormal(mu, 1.0, count)).astype(np.int64)
    ids = rng.integers(0, BOS, lengths.sum(), dtype=np.uint16)
    return np.split(ids, np.cumsum(lengths)[:-1])


# --- tokenizer --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TokenizerBench:
    """Flags of `tokenizer`."""

    vocab_size: int = cli.option(4096, "ids, special tokens included")
    megabytes: float = cli.option(8.0, "built-in text to train on; a quarter of it is encoded and decoded")
    out: str | None = cli.option(None, "JSON record to write; unset: bench/tokenizer.json in the base directory")


def tokenizer(config: TokenizerBench, more: list[str]) -> None:
    """Time training, encoding and decoding, beside GPT-4's tokenizer where tiktoken has it on this machine."""
    texts = list(world.documents(0, int(config.megabytes * 1e6)))
    sample = texts[: len(texts) // 4]
    size = sum(len(text.encode()) for text in sample)
    began = time.perf_counter()
    known = {"ours": Tokenizer.train_from_iterator(texts, config.vocab_size)}
    spent = time.perf_counter() - began
    print(f"trained on {config.megabytes:g} MB in {spent:.1f} s\n")
    with contextlib.suppress(ValueError):
        known["cl100k_base"] = Tokenizer.from_pretrained("cl100k_base")
    rows = []
    for name, each in known.items():
        encode_seconds, decode_seconds, tokens = time_tokenizer(each, sample)
        row = {
            "tokenizer": name,
            "encode MB/s": size / 1e6 / encode_seconds,
            "decode MB/s": size / 1e6 / decode_seconds,
            "bytes a token": size / tokens,
        }
        rows.append(row)
    print(to_table(rows))
    write(config.out, "tokenizer", {"config": asdict(config), "training s": spent, "rows": rows})


def time_tokenizer(tokenizer: Tokenizer, texts: list[str]) -> tuple[float, float, int]:
    """Return the median seconds of encoding and of decoding, and the number of tokens."""
    cpu = torch.device("cpu")
    ids = tokenizer.encode(texts)
    encode = statistics.median(time_calls(lambda: tokenizer.encode(texts), cpu, 3))
    decode = statistics.median(time_calls(lambda: [tokenizer.decode(row) for row in ids], cpu, 3))
    return encode, decode, sum(map(len, ids))


# --- core -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class CoreBench:
    """Flags of `core`."""

    stage: str = cli.option("base", "stage of the checkpoint", choices=STAGES)
    model_tag: str | None = cli.option(None, "its model; unset: the newest")
    bundle: str | None = cli.option(None, "folder of a CORE bundle; unset: the built-in world's")
    max_per_task: int = cli.option(100, "rows of each task")
    device_type: str | None = cli.option(None, "cuda, mps or cpu; unset: the best there is")
    out: str | None = cli.option(None, "JSON record to write; unset: bench/core.json in the base directory")


def core(config: CoreBench, more: list[str]) -> None:
    """Time the CORE evaluation of a checkpoint."""
    compute = Compute.create(config.device_type)
    net, vocabulary, _ = checkpoint.load_model(config.stage, compute.device, config.model_tag)
    with tempfile.TemporaryDirectory(prefix="nanochat-bench-") as temporary:
        if config.bundle is None:
            core_bundle(temporary)
        began = time.perf_counter()
        found = evaluate_core(net, vocabulary, config.bundle or temporary, config.max_per_task)
        seconds = time.perf_counter() - began
    rows = sum(task["n"] for task in found["details"].values())
    line = {"rows": rows, "seconds": seconds, "rows/s": rows / seconds, "CORE": found["core_metric"]}
    print(to_table([line]))
    write(config.out, "core", {"config": asdict(config), **line})


COMMANDS: dict[str, tuple[type, Callable[[Any, list[str]], None]]] = {
    "train": (TrainBench, train),
    "infer": (InferBench, infer),
    "model": (ModelBench, model),
    "data": (DataBench, data),
    "tokenizer": (TokenizerBench, tokenizer),
    "core": (CoreBench, core),
    "plan": (PlanBench, plan),
}


def main() -> None:
    name = sys.argv[1] if len(sys.argv) > 1 else ""
    if name not in COMMANDS:
        raise ValueError(f"usage: python -m dev.bench {'|'.join(COMMANDS)} [--help]")
    own, more = split_argv(sys.argv[2:])
    flags, command = COMMANDS[name]
    command(cli.parse(flags, own, __doc__), more)


if __name__ == "__main__":
    cli.run(main)
