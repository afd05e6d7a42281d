"""Benchmarks of this project, one subcommand each; every one prints tables and writes a JSON record (--out).

    python -m dev.bench train --depths 4,6 -- --head-dim 64 --window-pattern L
    python -m dev.bench infer --baseline-dir CHECKOUT --transformers -- --depth 4 --batches 1,16
    python -m dev.bench model|data|tokenizer|core

`train` runs scripts.base_train as users do and reads its metrics. `infer` runs scripts.infer_bench, with the engines of
karpathy/nanochat and transformers beside it, in turns. The others measure one part alone.
"""

import contextlib
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dev.profile_step import profile_table, profiled
from dev.reference import PeerSide
from nanochat import checkpoint, cli, recipe, world
from nanochat.common import STAGES, get_base_dir, read_json, write_record
from nanochat.compute import Compute
from nanochat.core_eval import evaluate_core
from nanochat.dataloader import RowLoader
from nanochat.gpt import GPT, GPTConfig, build_model
from nanochat.token_shards import PackedRows, write_rows
from nanochat.tokenizer import Tokenizer
from nanochat.world_core import core_bundle
from scripts import base_train, infer_bench
from scripts.infer_bench import table, time_calls

ROOT = Path(__file__).resolve().parent.parent


def split_argv(argv: list[str]) -> tuple[list[str], list[str]]:
    """Return the flags before and after `--`: our own, and those of the script that is run."""
    at = argv.index("--") if "--" in argv else len(argv)
    return argv[:at], argv[at + 1 :]


def numbers(flag: str, text: str) -> list[int]:
    """Parse `4,6`. Raises ValueError naming the flag for anything else."""
    if not re.fullmatch(r"[1-9]\d*(,[1-9]\d*)*", text):
        raise ValueError(f"{flag} {text}: give numbers, as 4,6")
    return [int(part) for part in text.split(",")]


def product_rate(model: GPTConfig, rows: int, compute: Compute) -> float:
    """Measure the fastest of the products that dominate a model (MLP, head, a large square), in FLOP/s.

    On random data: zeros and constants flatter the rate.
    """
    C = model.n_embd
    rates = []
    for m, k, n in ((rows, C, 4 * C), (rows, 4 * C, C), (rows, C, model.padded_vocab_size), (2048, 2048, 2048)):
        a_MK = torch.randn(m, k, device=compute.device).to(compute.dtype)
        b_KN = torch.randn(k, n, device=compute.device).to(compute.dtype)
        out_MN = torch.empty(m, n, dtype=compute.dtype, device=compute.device)
        seconds = time_calls(lambda a=a_MK, b=b_KN, out=out_MN: torch.mm(a, b, out=out), compute.device)
        rates.append(2 * m * k * n / statistics.median(seconds))
    return max(rates)


def write(out: str | None, name: str, record: dict[str, Any]) -> None:
    """Write the record with its provenance and say where."""
    path = Path(out) if out else get_base_dir() / "bench" / f"{name}.json"
    write_record(path, record)
    print(f"{path} written")


# --- train: tokens per second of scripts.base_train -------------------------------------------------------------------


@dataclass(frozen=True)
class TrainBench:
    """Flags of `train`; those after -- go to scripts.base_train."""

    depths: str = cli.option("4", "depths to train, as 4,6")
    data: str = cli.option("builtin", "training text: builtin, or a folder of .parquet, .jsonl or .txt")
    vocab_size: int = cli.option(4096, "tokenizer size")
    seq_len: int = cli.option(512, "context in tokens")
    batch_tokens: int = cli.option(8192, "tokens a step")
    steps: int = cli.option(40, "steps of each run")
    warmup: int = cli.option(10, "first steps that do not count for the speed")
    repeats: int = cli.option(1, "runs of each depth, in turn")
    processes: int = cli.option(1, "processes, one a GPU, by torchrun")
    profile: bool = cli.option(False, "also show where the time of a step goes, over five steps")
    out: str | None = cli.option(None, "JSON record to write; unset: bench/train.json in the base directory")

    def __post_init__(self) -> None:
        numbers("--depths", self.depths)
        cli.require_positive(self, "vocab_size", "seq_len", "batch_tokens", "steps", "repeats", "processes")
        if not 0 <= self.warmup < self.steps:
            raise ValueError(f"--warmup {self.warmup}: must be below --steps {self.steps}")


def base_train_flags(config: TrainBench, depth: int, steps: int) -> list[str]:
    return [
        f"--depth={depth}",
        f"--dataset={config.data}",
        f"--max-seq-len={config.seq_len}",
        f"--total-batch-size={config.batch_tokens}",
        f"--num-iterations={steps}",
        f"--eval-tokens={8 * config.seq_len * config.processes}",
        "--eval-every=0",
        "--sample-every=0",
        f"--model-tag=bench-d{depth}",
    ]


def train_once(config: TrainBench, depth: int, more: list[str], base: Path, compute: Compute) -> dict[str, Any]:
    """Train one model to its end in a process of its own, and measure the machine's product rate right after it."""
    launcher = [sys.executable, "-m"]
    if config.processes > 1:
        launcher += ["torch.distributed.run", "--standalone", f"--nproc-per-node={config.processes}", "-m"]
    command = [*launcher, "scripts.base_train", *base_train_flags(config, depth, config.steps), *more]
    began = time.monotonic()
    first_step = None
    last_lines = []
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        for line in process.stdout:
            last_lines = [*last_lines[-20:], line]
            if first_step is None and re.match(r"step +1/", line):
                first_step = time.monotonic() - began  # from the start of the process: imports and compiling count
    if process.returncode:
        raise ValueError(f"scripts.base_train ended with status {process.returncode}:\n{''.join(last_lines)}")
    folder = base / "runs" / "base" / f"bench-d{depth}"
    with torch.device("meta"):
        model = GPT(GPTConfig.from_dict(read_json(folder / "run.json")["model_config"]))
    metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in metrics if "loss" in line][-config.steps :]
    speeds = sorted(line["tok_per_sec"] for line in steps[config.warmup :])
    rows = min(config.batch_tokens // config.processes, 32 * config.seq_len)
    rate = product_rate(model.config, rows, compute) * config.processes
    return {
        "depth": depth,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "MFLOPs a token": model.flops_per_token() / 1e6,
        "tokens/s": statistics.median(speeds),
        "p10": speeds[len(speeds) // 10],
        "p90": speeds[len(speeds) * 9 // 10],
        "MFU": statistics.median(speeds) * model.flops_per_token() / rate,
        "measured GFLOP/s": rate / 1e9,
        "first step s": first_step,
        "peak MiB": max(line["peak_mem_bytes"] for line in steps) / 2**20,
        "loss": statistics.fmean(line["loss"] for line in steps[-5:]),
        "bits per byte": next(line["val_bpb"] for line in reversed(metrics) if "val_bpb" in line),
    }


def train(config: TrainBench, more: list[str]) -> None:
    """Measure training speed. The base directory is one of its own below bench/, with its dataset and tokenizer."""
    out_default = get_base_dir() / "bench" / "train.json"
    data = str(Path(config.data).resolve()) if Path(config.data).is_dir() else config.data
    base = get_base_dir().absolute() / "bench" / f"{Path(data).name}-v{config.vocab_size}"
    os.environ["NANOCHAT_BASE_DIR"] = str(base)
    python = [sys.executable, "-m"]
    subprocess.run([*python, "nanochat.dataset", "--name", data], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    if not (base / "tokenizer" / "tokenizer.json").exists():
        command = [*python, "scripts.tok_train", "--dataset", data, "--vocab-size", str(config.vocab_size)]
        subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    device = next((flag.split("=")[1] for flag in more if flag.startswith("--device-type=")), None)
    compute = Compute.create(device)
    rows = []
    for _ in range(config.repeats):
        for depth in numbers("--depths", config.depths):
            rows.append(train_once(config, depth, more, base, compute))
            print(f"d{depth}: {rows[-1]['tokens/s']:,.0f} tokens/s", flush=True)
    print(f"\n{config.processes} x {compute.name}, {compute.dtype}\n\n{table(rows)}")
    record: dict[str, Any] = {"config": asdict(config), "flags": more, "runs": rows}
    for depth in numbers("--depths", config.depths) if config.profile else []:
        warmup, steps = 5, 5
        sys.argv = ["scripts.base_train", *base_train_flags(config, depth, warmup + steps), *more]
        with profiled(warmup, steps) as result:
            base_train.main()
        record[f"profile_d{depth}"] = profile_table(result, steps)
        print(f"\nd{depth}, {result['seconds'] / steps * 1e3:.1f} ms a step under the profiler\n")
        print(table(record[f"profile_d{depth}"]))
    write(config.out or str(out_default), "train", record)


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
    kinds = [("transformers", "")] if config.transformers else []
    if config.baseline_dir is not None:
        kinds.append(("nanochat", config.baseline_dir))
    lengths = {"prompt_tokens": ours.prompt_tokens, "new_tokens": ours.new_tokens}
    peers = []
    try:
        for kind, root in kinds:
            for dtype in ("float32", "bfloat16"):
                peers.append(PeerSide(kind, dtype, root, {**asdict(model.config), **lengths}))
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
    lines = []
    for depth in numbers("--depths", config.depths):
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

        def backward(net: GPT = net, idx_BT: torch.Tensor = idx_BT) -> None:
            net(idx_BT, idx_BT).backward()
            net.zero_grad(set_to_none=True)

        # the loss makes its gradient in the forward pass, so the two are not timed apart
        seconds = statistics.median(time_calls(backward, compute.device))
        rate = product_rate(shape, config.rows * config.seq_len, compute)
        flops = net.flops_per_token() * idx_BT.numel()
        line = {
            "depth": depth,
            "ms": 1e3 * seconds,
            "tokens/s": idx_BT.numel() / seconds,
            "GFLOP/s": flops / seconds / 1e9,
            "measured product GFLOP/s": rate / 1e9,
            "share": flops / seconds / rate,
        }
        lines.append(line)
    print(table(lines))
    write(config.out, "model", {"config": asdict(config), "rows": lines})


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
    bos = 32759
    rng = np.random.default_rng(0)
    documents = max(1, round(config.shard_tokens / config.document))
    lengths = np.maximum(1, rng.lognormal(np.log(config.document) - 0.5, 1.0, documents)).astype(np.int64)
    ids = np.split(rng.integers(0, bos, lengths.sum(), dtype=np.uint16), np.cumsum(lengths)[:-1])
    step_rows = max(8, 2**18 // config.seq_len // 8 * 8)
    result: dict[str, float] = {}
    with tempfile.TemporaryDirectory(prefix="nanochat-bench-") as temporary:
        began = time.process_time()
        pairs = [(each, None) for each in ids]
        meta = write_rows(Path(temporary), pairs, config.seq_len + 1, np.dtype("uint16"), bos)
        result["packing, tokens/s of a core"] = meta["tokens"] / (time.process_time() - began)
        folder = Path(temporary, "rows")
        loader = RowLoader(PackedRows([folder], config.seq_len, 1), step_rows, step_rows, seed=0)
        loader.step(0)  # maps and checks the files
        began = time.process_time()
        for step in range(config.steps):
            loader.step(step)
        tokens = config.steps * step_rows * config.seq_len
        result["loading, tokens/s of a core"] = tokens / (time.process_time() - began)
        # one folder under many names: each is opened as if it were a shard of its own
        many = PackedRows([folder] * config.shards, config.seq_len, 1)
        last_step = max(0, many.total() // step_rows - 1)
        began = time.perf_counter()
        next(RowLoader(many, step_rows, step_rows, seed=0).iterate(last_step))
        result["resuming at the last step, s"] = time.perf_counter() - began
    print(table([{"measured": name, "value": value} for name, value in result.items()]))
    write(config.out, "data", {"config": asdict(config), **result})


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
    lines = []
    for name, each in known.items():
        ids = each.encode(sample)
        cpu = torch.device("cpu")
        encode = statistics.median(time_calls(lambda each=each: each.encode(sample), cpu, 3))
        decode = statistics.median(time_calls(lambda each=each, ids=ids: [each.decode(row) for row in ids], cpu, 3))
        bytes_per_token = size / sum(map(len, ids))
        speeds = {"encode MB/s": size / 1e6 / encode, "decode MB/s": size / 1e6 / decode}
        lines.append({"tokenizer": name, **speeds, "bytes a token": bytes_per_token})
    print(table(lines))
    write(config.out, "tokenizer", {"config": asdict(config), "training s": spent, "rows": lines})


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
    print(table([line]))
    write(config.out, "core", {"config": asdict(config), **line})


COMMANDS: dict[str, tuple[type, Callable[[Any, list[str]], None]]] = {
    "train": (TrainBench, train),
    "infer": (InferBench, infer),
    "model": (ModelBench, model),
    "data": (DataBench, data),
    "tokenizer": (TokenizerBench, tokenizer),
    "core": (CoreBench, core),
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
