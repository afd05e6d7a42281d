"""Speed of training: `python -m dev.bench train`.

Each depth is trained by scripts.base_train in a process of its own, as users do, and its metrics are read. The speed is
set against the products of this machine, measured right after the run. With --profile a few more steps are trained in
this process under the profiler.
"""

import json
import os
import re
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from dev.measure import ROOT, Record, numbers, product_rate
from dev.profile_step import profile_table, profiled
from nanochat import cli
from nanochat.common import get_base_dir, read_json, write_record
from nanochat.compute import Compute
from nanochat.gpt import GPT, GPTConfig
from nanochat.table import to_table
from scripts import base_train


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


def train_once(config: TrainBench, depth: int, more: list[str], base: Path, compute: Compute) -> Record:
    """Train one model to its end in a process of its own, and measure the machine's product rate right after it."""
    launcher = [sys.executable, "-m"]
    if config.processes > 1:
        launcher += ["torch.distributed.run", "--standalone", f"--nproc-per-node={config.processes}", "-m"]
    command = [*launcher, "scripts.base_train", *base_train_flags(config, depth, config.steps), *more]
    began = time.monotonic()
    first_step = None
    lines = []
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        for line in process.stdout:
            lines.append(line)
            if first_step is None and re.match(r"step +1/", line):
                first_step = time.monotonic() - began  # from the start of the process: imports and compiling count
    if process.returncode:
        raise ValueError(f"scripts.base_train ended with status {process.returncode}:\n{''.join(lines[-20:])}")

    folder = base / "runs" / "base" / f"bench-d{depth}"
    with torch.device("meta"):
        model = GPT(GPTConfig.from_dict(read_json(folder / "run.json")["model_config"]))
    metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in metrics if "loss" in line][-config.steps :]
    speeds = sorted(line["tok_per_sec"] for line in steps[config.warmup :])
    median = statistics.median(speeds)
    rows = min(config.batch_tokens // config.processes, 32 * config.seq_len)
    rate = product_rate(model.config, rows, compute) * config.processes
    return {
        "depth": depth,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "MFLOPs a token": model.flops_per_token() / 1e6,
        "tokens/s": median,
        "p10": speeds[len(speeds) // 10],
        "p90": speeds[len(speeds) * 9 // 10],
        "MFU": median * model.flops_per_token() / rate,
        "measured GFLOP/s": rate / 1e9,
        "first step s": first_step,
        "peak MiB": max(line["peak_mem_bytes"] for line in steps) / 2**20,
        "loss": statistics.fmean(line["loss"] for line in steps[-5:]),
        "bits per byte": [line["val_bpb"] for line in metrics if "val_bpb" in line][-1],
    }


def prepare_text(data: str, vocab_size: int) -> None:
    """Make dataset and tokenizer in the current base directory, unless they are there. data: as `--dataset`."""
    python = [sys.executable, "-m"]
    subprocess.run([*python, "nanochat.dataset", "--name", data], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    if not (get_base_dir() / "tokenizer" / "tokenizer.json").exists():
        command = [*python, "scripts.tok_train", "--dataset", data, "--vocab-size", str(vocab_size)]
        subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)


def train(config: TrainBench, more: list[str]) -> None:
    """Measure training speed, in a base directory of its own below bench/, with its dataset and tokenizer."""
    data = str(Path(config.data).resolve()) if Path(config.data).is_dir() else config.data
    out = Path(config.out) if config.out else get_base_dir() / "bench" / "train.json"
    base = get_base_dir().absolute() / "bench" / f"{Path(data).name}-v{config.vocab_size}"
    os.environ["NANOCHAT_BASE_DIR"] = str(base)
    prepare_text(data, config.vocab_size)
    device_types = [flag.removeprefix("--device-type=") for flag in more if flag.startswith("--device-type=")]
    compute = Compute.create(device_types[0] if device_types else None)
    depths = numbers("--depths", config.depths)
    rows = []
    for _ in range(config.repeats):
        for depth in depths:
            row = train_once(config, depth, more, base, compute)
            rows.append(row)
            print(f"d{depth}: {row['tokens/s']:,.0f} tokens/s", flush=True)
    print(f"\n{config.processes} x {compute.name}, {compute.dtype}\n\n{to_table(rows)}")
    record: Record = {"config": asdict(config), "flags": more, "runs": rows}
    if config.profile:
        for depth in depths:
            record[f"profile_d{depth}"] = profile_training(config, depth, more)
    write_record(out, record)
    print(f"{out} written")


def profile_training(config: TrainBench, depth: int, more: list[str]) -> list[Record]:
    """Train a few steps in this process under the profiler; return and print where their time goes."""
    warmup = 5
    steps = 5
    sys.argv = ["scripts.base_train", *base_train_flags(config, depth, warmup + steps), *more]
    with profiled(warmup, steps) as result:
        base_train.main()
    rows = profile_table(result, steps)
    print(f"\nd{depth}, {result['seconds'] / steps * 1e3:.1f} ms a step under the profiler\n\n{to_table(rows)}")
    return rows
