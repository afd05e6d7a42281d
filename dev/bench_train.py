"""Training speed of this project alone. Each depth trains through scripts.base_train as users run it, and its
metrics.jsonl is read: tokens/s, time to the first step, peak memory, and MFU against a matrix product rate measured
after each run. Flags after -- go to scripts.base_train. --profile adds where a step's time goes. For example:
python -m dev.bench_train --depths 4,6 --profile -- --head-dim 64 --window-pattern L
"""

import dataclasses
import re
import shlex
import shutil
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from dev.runner import read_metrics, split_argv

from dev import bench_old as bench
from dev.bench_model import gemm_rate
from dev.compare_sides import child_environment, prepare_ours, supervise
from nanochat import cli
from nanochat.common import get_base_dir, read_json
from nanochat.compute import Compute
from nanochat.dataset import dataset_name
from nanochat.gpt import GPT, GPTConfig


@dataclass(frozen=True)
class Config:
    """Flags of the benchmark."""

    depths: str = cli.option("4", "depths to train, as 4,6")
    data: str = cli.option("builtin", "training text: builtin, or a folder of .parquet, .jsonl or .txt")
    vocab_size: int = cli.option(4096, "tokenizer size")
    seq_len: int = cli.option(512, "context in tokens")
    batch_tokens: int = cli.option(8192, "tokens a step")
    steps: int = cli.option(40, "steps of each run")
    warmup: int = cli.option(10, "first steps that do not count for the speed")
    repeats: int = cli.option(1, "runs of each depth, in turn")
    processes: int = cli.option(1, "processes, one a GPU, by torchrun")
    cold: bool = cli.option(False, "empty the compiler's cache first, so that the first step counts all compiling")
    profile: bool = cli.option(False, "also profile five steps of each depth")
    out: str | None = cli.option(None, "record to write, without suffix; unset = bench/train in the base directory")

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[1-9]\d*(,[1-9]\d*)*", self.depths):
            raise ValueError(f"--depths {self.depths}: give numbers, as 4,6")
        for name in ("vocab_size", "seq_len", "batch_tokens", "steps", "repeats", "processes"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} {getattr(self, name)}: must be above 0")
        if not 0 <= self.warmup < self.steps:
            raise ValueError(f"--warmup {self.warmup}: must be below --steps {self.steps}")


def summarize(metrics: list[dict[str, Any]], warmup: int) -> dict[str, Any]:
    """Tokens/s (median and the tenth and ninetieth percentile, after `warmup` steps), peak memory, last losses."""
    steps = [line for line in metrics if "loss" in line]
    speeds = sorted(line["tok_per_sec"] for line in steps[warmup:])
    return {
        "tok_per_sec": statistics.median(speeds),
        "p10": speeds[len(speeds) // 10],
        "p90": speeds[len(speeds) * 9 // 10],
        "peak_mem_bytes": max(line["peak_mem_bytes"] for line in steps),
        "loss": statistics.fmean(line["loss"] for line in steps[-5:]),
        "val_bpb": next((line["val_bpb"] for line in reversed(metrics) if "val_bpb" in line), None),
    }


def flags_of(config: Config, depth: int, more: list[str]) -> list[str]:
    """Flags of scripts.base_train for a depth."""
    flags = {
        "depth": depth,
        "dataset": config.data,
        "max-seq-len": config.seq_len,
        "total-batch-size": config.batch_tokens,
        "num-iterations": config.steps,
        "eval-every": 0,
        "eval-tokens": 8 * config.seq_len * config.processes,
        "sample-every": 0,
        "model-tag": f"bench-d{depth}",
    }
    return [*(f"--{name}={value}" for name, value in flags.items()), *more]


def train(config: Config, depth: int, base: Path, more: list[str], compute: Compute, log: Path) -> dict[str, Any]:
    """One run to its end; what it showed, with the matrix product rate of the machine right after it."""
    ranks = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={config.processes}"]
    launcher = [sys.executable, *(ranks if config.processes > 1 else []), "-m", "scripts.base_train"]
    command, env = [*launcher, *flags_of(config, depth, more)], child_environment(base, None)
    if config.cold:
        shutil.rmtree(env["TORCHINDUCTOR_CACHE_DIR"], ignore_errors=True)
    transcript = supervise(command, env, log, f"d{depth}")
    folder = base / "runs" / "base" / f"bench-d{depth}"
    result = {"depth": depth, "first_step_seconds": transcript.when(r"step +1/"), "wall_seconds": transcript.wall}
    with torch.device("meta"):
        model = GPT(GPTConfig.from_dict(read_json(folder / "run.json")["model_config"]))
    shutil.rmtree(base / "checkpoints" / "base" / f"bench-d{depth}")
    rows = max(1, config.batch_tokens // config.seq_len // config.processes)
    return {
        **result,
        "gemm_flops": gemm_rate(compute, model.config, min(rows, 32)),
        **summarize(read_metrics(folder / "metrics.jsonl"), config.warmup),
        "flops_per_token": model.flops_per_token(),
        "parameters": sum(p.numel() for p in model.parameters()),
        "model_config": dataclasses.asdict(model.config),
    }


def to_row(runs: list[dict[str, Any]], processes: int) -> dict[str, Any]:
    """A line of the table: the medians of a depth's runs."""
    gemm = max(run["gemm_flops"] for run in runs)
    middle = {key: statistics.median(run[key] for run in runs) for key in ("tok_per_sec", "p10", "p90", "val_bpb")}
    flops = runs[0]["flops_per_token"]
    return {
        "depth": runs[0]["depth"],
        "parameters": runs[0]["parameters"],
        "MFLOPs a token": flops / 1e6,
        "tokens/s": middle["tok_per_sec"],
        "p10 to p90": f"{middle['p10']:,.0f} to {middle['p90']:,.0f}",
        "MFU": f"{middle['tok_per_sec'] * flops / (gemm * processes):.1%}",
        "measured GFLOP/s": gemm / 1e9,
        "first step, s": runs[0]["first_step_seconds"],
        "later runs": statistics.median(run["first_step_seconds"] for run in runs[1:]) if runs[1:] else None,
        "peak MiB": max(run["peak_mem_bytes"] for run in runs) / 2**20,
        "bits per byte": middle["val_bpb"],
    }


def main() -> None:
    own, more = split_argv(sys.argv[1:])
    config = cli.parse(Config, own, __doc__)
    if Path(config.data).is_dir():
        config = dataclasses.replace(config, data=str(Path(config.data).resolve()))
    out = Path(config.out or get_base_dir() / "bench" / "train").absolute()
    base = get_base_dir().absolute() / "bench" / f"{dataset_name(config.data)}-v{config.vocab_size}"
    logs = base / "logs"
    device = next((flag.split("=")[1] for flag in more if flag.startswith("--device-type=")), None)
    compute = Compute.create(device)
    prepare_ours(base, config.data, config.vocab_size, logs)
    depths = [int(depth) for depth in config.depths.split(",")]
    runs: dict[int, list[dict[str, Any]]] = {depth: [] for depth in depths}
    for repeat in range(config.repeats):
        for depth in depths:
            print(f"d{depth}, run {repeat + 1} of {config.repeats}: {config.steps} steps", flush=True)
            log = logs / f"train-d{depth}-{repeat}.log"
            runs[depth].append(train(config, depth, base, more, compute, log))
    rows = [to_row(runs[depth], config.processes) for depth in depths]
    command = shlex.join(["python", "-m", "dev.bench_train", *sys.argv[1:]])
    where = f"{config.processes} x {compute.name}, {str(compute.dtype).removeprefix('torch.')}"
    page = (
        f"# Training speed\n\n`{command}`\n\n{where}, context {config.seq_len}, {config.batch_tokens:,} tokens a step; "
        f"medians of steps {config.warmup + 1} to {config.steps}. The first step counts from the start of the "
        f"process; MFU is against the greatest matrix product rate measured after the runs.\n\n"
        f"{bench.markdown_table(rows)}"
    )
    record = {"config": dataclasses.asdict(config), "flags": more, "rows": rows, "runs": runs}
    if config.profile:
        for depth in depths:
            profile_out = out.with_name(f"{out.name}-profile-d{depth}")
            command = [sys.executable, "-m", "dev.profile_train", f"--out={profile_out}", "--"]
            kept = [f for f in flags_of(config, depth, more) if not f.startswith(("--num-it", "--model-tag", "--eval"))]
            supervise([*command, *kept], child_environment(base, None), logs / f"profile-d{depth}.log", "profile")
            page += "\n#" + Path(f"{profile_out}.md").read_text()
            record[f"profile_d{depth}"] = read_json(f"{profile_out}.json")
    bench.write_report(out, record, page)


if __name__ == "__main__":
    cli.run(main)
