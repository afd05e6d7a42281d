"""Benchmarks of this project, one subcommand each; every one prints tables and writes a JSON record (--out).

    python -m dev.bench train --depths 4,6 -- --head-dim 64 --window-pattern L
    python -m dev.bench infer --baseline-dir CHECKOUT --transformers -- --depth 4 --batches 1,16

`train` runs scripts.base_train as users do and reads its metrics. `infer` runs scripts.infer_bench, with the engines of
karpathy/nanochat and transformers beside it, in turns.
"""

import contextlib
import json
import os
import re
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from nanochat import cli
from nanochat.common import get_base_dir, read_json, write_record
from nanochat.compute import Compute
from nanochat.gpt import GPT, GPTConfig
from nanochat.optim import MuonAdamW
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


# The group of an operator is that of the first pattern found in its own name or in that of an operator around it.
GROUPS = {
    "optimizer": r"^part: optimizer$",
    "loss": r"ChunkedLoss|cross_entropy|log_softmax|nll_loss",
    "attention": r"attention|flash|sdpa|flex",
}
PRODUCT = r"(^|::)(add|badd)?b?mm$|linear|matmul|scaled_mm|gemm"  # by the operator's own name alone


@contextlib.contextmanager
def profiled(warmup: int, steps: int) -> Iterator[dict[str, Any]]:
    """Profile optimizer steps warmup+1 to warmup+steps of whatever trains within; the dict gets seconds and events."""
    result: dict[str, Any] = {}
    cuda = torch.cuda.is_available()
    profiler = profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])])
    original_step = MuonAdamW.step
    done = 0

    def step(*args: Any, **kwargs: Any) -> Any:
        nonlocal done
        with record_function("part: optimizer"):
            value = original_step(*args, **kwargs)
        done += 1
        if done == warmup:
            profiler.start()
            result["began"] = time.perf_counter()
        elif done == warmup + steps:
            if cuda:
                torch.cuda.synchronize()
            result["seconds"] = time.perf_counter() - result["began"]
            profiler.stop()
            result["events"] = list(profiler.events())
        return value

    with patch.object(MuonAdamW, "step", step):
        yield result


def profile_table(result: dict[str, Any], steps: int) -> list[dict[str, Any]]:
    """Sum the operators' own time (of the kernels on CUDA, else of the calling thread) by group, largest first."""
    cuda = torch.cuda.is_available()
    groups: Counter[str] = Counter()
    for event in result["events"]:
        names = [event.name]
        parent = event.cpu_parent
        while parent is not None:
            names.append(parent.name)
            parent = parent.cpu_parent
        found = (group for group, pattern in GROUPS.items() if any(re.search(pattern, name) for name in names))
        other = "matrix products" if re.search(PRODUCT, event.name) else "norms, activations, embeddings, copies"
        groups[next(found, other)] += event.self_device_time_total if cuda else event.self_cpu_time_total
    groups["outside operators (Python, waiting)"] = max(0.0, result["seconds"] * 1e6 - groups.total())
    return [
        {"part of a step": group, "ms": spent / 1e3 / steps, "share": spent / groups.total()}
        for group, spent in groups.most_common()
    ]


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


class PeerSide:
    """Another program with a model of equal shape, in a process that answers a batch size with two durations."""

    def __init__(self, kind: str, dtype: str, root: str, shape: dict[str, Any], config: infer_bench.Config) -> None:
        self.name = f"{kind} {dtype}"
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        environment["NANOCHAT_DTYPE"] = dtype
        environment["OMP_NUM_THREADS"] = str(torch.get_num_threads())
        settings = {
            **shape,
            "dtype": dtype,
            "prompt_tokens": config.prompt_tokens,
            "new_tokens": config.new_tokens,
        }
        self.process = subprocess.Popen(
            [sys.executable, str(ROOT / "dev" / "reference.py"), kind, root, json.dumps(settings)],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def batch(self, size: int) -> tuple[float, float]:
        """Return the seconds to the first token and those after it, as EngineSide.batch."""
        with contextlib.suppress(BrokenPipeError):
            print(size, file=self.process.stdin, flush=True)
        line = self.process.stdout.readline()
        if not line:
            raise ValueError(f"{self.name} ended with status {self.process.wait()}: see what it wrote above")
        first_token, rest = json.loads(line)
        return first_token, rest

    def close(self) -> None:
        self.process.kill()
        self.process.wait()


def infer(config: InferBench, more: list[str]) -> None:
    """Measure decoding; with peers in float32 and bfloat16, all sides in turn."""
    ours = cli.parse(infer_bench.Config, more, infer_bench.__doc__)
    compute = Compute.create(ours.device_type)
    model = infer_bench.open_model(ours, compute)
    kinds = [("transformers", "")] if config.transformers else []
    if config.baseline_dir is not None:
        kinds.append(("nanochat", config.baseline_dir))
    peers = []
    try:
        for kind, root in kinds:
            for dtype in ("float32", "bfloat16"):
                peers.append(PeerSide(kind, dtype, root, asdict(model.config), ours))
        infer_bench.run(ours, peers, model, compute)
    finally:
        for peer in peers:
            peer.close()


COMMANDS: dict[str, tuple[type, Callable[[Any, list[str]], None]]] = {
    "train": (TrainBench, train),
    "infer": (InferBench, infer),
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
