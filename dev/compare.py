"""Compare training with karpathy/nanochat, a checkout of which is at --baseline-dir:

    python -m dev.compare --baseline-dir PATH --data FOLDER --depths 4,6 --vocab-size 4096,8192 --minutes 10
    python -m dev.compare --baseline-dir PATH --parity

Equal for all sides: the training text, the tokenizer (ours, given to both), the model's shapes, tokens a step, the
validation rows with their bytes, this interpreter and machine. Each side's own: data order and packing, recipe,
kernels. Sides run in turn, A B A B, so that a machine that drifts favours none.
"""

import dataclasses
import re
import shlex
import shutil
import signal
import statistics
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dev import bench_old as bench
from dev.compare_parity import MATCHED, parity_page, run_parity
from dev.compare_sides import Ours, Outcome, Reference, Side, prepare_ours, prepare_reference, save_validation_rows
from nanochat import cli, recipe
from nanochat.compute import Compute, cpu_has_bf16
from nanochat.dataset import dataset_name
from nanochat.gpt import GPT, GPTConfig

EQUAL = (
    "training text; tokenizer; depth, width, heads, context, windows; tokens a step; validation rows and bytes; "
    "interpreter and machine. Each side's own: order and packing of training rows, learning rates and schedule, kernels"
)


@dataclass(frozen=True)
class Compare:
    """Flags of the comparison."""

    baseline_dir: str | None = cli.option(None, "checkout of karpathy/nanochat, outside this repository")
    work_dir: str | None = cli.option(None, "folder for data, runs and logs; unset = a new temporary one")
    out: str | None = cli.option(None, "record to write, without suffix; unset = compare or parity in --work-dir")
    data: str = cli.option("builtin", "training text: builtin, or a folder of .parquet, .jsonl or .txt")
    depths: str = cli.option("4", "depths to compare at, as 4,6")
    vocab_size: str = cli.option("4096", "tokenizer size, for all depths or as 4096,8192 for each")
    seq_len: int = cli.option(512, "context in tokens")
    head_dim: int | None = cli.option(None, "channels of a head; unset = 64 on CPU, else 128")
    window_pattern: str | None = cli.option(None, "attention windows; unset = L on CPU, else SSSL")
    batch_tokens: int = cli.option(16384, "tokens a step")
    device_batch_size: int = cli.option(16, "rows a device takes at once")
    steps: int = cli.option(200, "steps of each run at equal tokens; the reference warms up for 40 of them")
    repeats: int = cli.option(2, "rounds; every side runs once in each")
    evals: int = cli.option(4, "evaluations in a run, the last at its end")
    eval_tokens: int = cli.option(131072, "validation tokens")
    minutes: float | None = cli.option(None, "also train the reference for so long, and us for --shares of that time")
    # a little less than 1 and 1/3: what ends after the reference, or its third, would count by an earlier evaluation
    shares: str = cli.option(".97,.32", "parts of the reference's time; one run of ours for each")
    baseline_dtypes: str | None = cli.option(
        None, "the reference's NANOCHAT_DTYPE: default,bfloat16 on CPU, else default"
    )
    our_flags: str = cli.option("", "more flags for our base_train, in one string")
    baseline_flags: str = cli.option("", "more flags for the reference's base_train")
    device_type: str | None = cli.option(None, "cuda | cpu; unset = cuda where there is one", ("cuda", "cpu"))
    parity: bool = cli.option(False, "instead: equal losses from equal rows and hyperparameters, at the first depth")

    def __post_init__(self) -> None:
        if self.baseline_dir is None:
            raise ValueError("--baseline-dir is missing: git clone karpathy/nanochat somewhere and name that folder")
        if not (Path(self.baseline_dir) / "scripts" / "base_train.py").is_file():
            raise ValueError(f"--baseline-dir {self.baseline_dir} has no scripts/base_train.py: not such a checkout")
        if not re.fullmatch(r"(0?\.\d+|1)(,(0?\.\d+|1))*", self.shares) or not all(self.parts):
            raise ValueError(f"--shares {self.shares}: give numbers above 0 and at most 1, as .97,.32")
        for name in ("depths", "vocab_size"):
            if not re.fullmatch(r"[1-9]\d*(,[1-9]\d*)*", getattr(self, name)):
                raise ValueError(f"--{name.replace('_', '-')} {getattr(self, name)}: give numbers, as 4,6")
        if len(self.vocab_sizes) != len(self.depths.split(",")):
            raise ValueError(f"--vocab-size {self.vocab_size}: give one for all --depths {self.depths} or one for each")
        counts = ("seq_len", "batch_tokens", "device_batch_size", "steps", "repeats", "evals", "eval_tokens", "minutes")
        for name in counts:
            if (value := getattr(self, name)) is not None and not value > 0:
                raise ValueError(f"--{name.replace('_', '-')} {value}: must be above 0")
        if self.batch_tokens % (rows := self.seq_len * self.device_batch_size):
            raise ValueError(f"--batch-tokens {self.batch_tokens}: make it a multiple of {rows} (rows x --seq-len)")

    @property
    def parts(self) -> list[float]:
        return [float(share) for share in self.shares.split(",")]

    @property
    def vocab_sizes(self) -> list[int]:
        sizes, count = [int(size) for size in self.vocab_size.split(",")], len(self.depths.split(","))
        return sizes * count if len(sizes) == 1 else sizes

    def on(self, device: str) -> "Compare":
        """The same with what is unset chosen for a device."""
        cpu = device == "cpu"
        unset = {
            "device_type": device,
            "head_dim": 64 if cpu else 128,
            "window_pattern": "L" if cpu else "SSSL",
            "baseline_dtypes": "default,bfloat16" if cpu else "default",
            "work_dir": self.work_dir or tempfile.mkdtemp(prefix="nanochat-compare-"),
        }
        return dataclasses.replace(self, **{k: v for k, v in unset.items() if getattr(self, k) is None})


# --- measuring -------------------------------------------------------------------------------------------------------


def ceiling(config: Compare, model: GPTConfig) -> dict[str, float]:
    """GEMM rates in FLOP/s at the model's shapes; the greatest is what MFU counts against."""
    device, rows = config.device_type, config.device_batch_size * config.seq_len
    dtypes = [torch.float32, torch.bfloat16] if device == "cuda" or cpu_has_bf16() else [torch.float32]
    shapes = {(rows, model.n_embd, 4 * model.n_embd), (rows, model.n_embd, model.padded_vocab_size), (2048,) * 3}
    return {
        f"{str(dtype).removeprefix('torch.')} {m}x{k}x{n}": bench.gemm_rate(m, k, n, dtype, device)
        for dtype in dtypes
        for m, k, n in sorted(shapes)
    }


def shared_flags(config: Compare, depth: int, steps: int, eval_tokens: int) -> list[str]:
    """The flags that both sides know by the same names."""
    shape = {"depth": depth, "head-dim": config.head_dim, "window-pattern": config.window_pattern}
    rows = {"max-seq-len": config.seq_len, "device-batch-size": config.device_batch_size}
    horizon = {"total-batch-size": config.batch_tokens, "num-iterations": steps, "device-type": config.device_type}
    evals = {"eval-every": -(-steps // config.evals), "eval-tokens": eval_tokens}
    return [f"--{name}={value}" for name, value in {**shape, **rows, **horizon, **evals}.items()]


def make_sides(config: Compare, folder: Path, vocab_size: int) -> tuple[list[Side], int, int]:
    """Prepare data for all sides in `folder`; returns them with the tokenizer's size and the validation tokens."""
    tokenizer = prepare_ours(folder / "ours", config.data, vocab_size, folder / "logs")
    prepare_reference(folder / "reference", config.data, tokenizer)
    rows = folder / f"val-{config.seq_len}.pt"
    eval_tokens = save_validation_rows(rows, config.data, config.seq_len, config.eval_tokens, config.device_batch_size)
    for cache in folder.glob("*/compiled-*"):
        shutil.rmtree(cache)  # the first run of every side compiles everything
    sides: list[Side] = [
        Ours("ours", folder / "ours", None, ["--dataset", config.data, *shlex.split(config.our_flags)])
    ]
    for dtype in config.baseline_dtypes.split(","):
        setting = None if dtype == "default" else dtype
        flags, hooks = shlex.split(config.baseline_flags), {"val": str(rows)}
        checkout = Path(config.baseline_dir).resolve()
        sides.append(Reference(f"reference {dtype}", folder / "reference", setting, flags, hooks, checkout))
    return sides, tokenizer.get_vocab_size(), eval_tokens


@dataclass(frozen=True)
class Run:
    """One training run: which side, in which round, for how much of --minutes (None: at equal tokens)."""

    side: str
    repeat: int
    share: float | None
    steps: int
    outcome: Outcome


def tokens_per_second(config: Compare, outcome: Outcome) -> float:
    """The median over steps after the warm-up: ten, or a quarter of a shorter run."""
    return config.batch_tokens / statistics.median(outcome.seconds[min(10, len(outcome.seconds) // 4) :])


def steps_in(config: Compare, minutes: float, outcome: Outcome) -> int:
    """Steps that a side finishes in so many minutes, by the clock of an earlier run."""
    dt = config.batch_tokens / tokens_per_second(config, outcome)
    return max(1, 1 + int((60 * minutes - outcome.first_step) / dt))


def measure(config: Compare, depth: int, sides: list[Side], eval_tokens: int, logs: Path) -> Iterator[Run]:
    """All runs of a depth, sides in turn: at equal tokens, then at equal wall time (references first)."""

    def run(side: Side, repeat: int, share: float | None, steps: int) -> Run:
        name = f"d{depth}-{'tokens' if share is None else f'time{share:.2f}'}-{repeat}-{side.name.replace(' ', '-')}"
        print(f"{name}: {steps} steps of {config.batch_tokens:,} tokens", flush=True)
        outcome = side.run(shared_flags(config, depth, steps, eval_tokens), logs / f"{name}.log")
        speed = tokens_per_second(config, outcome)
        print(f"  {speed:,.0f} tokens/s, {last_eval(outcome):.4f} bits per byte at the end", flush=True)
        last[side.name] = outcome
        return Run(side.name, repeat, share, steps, outcome)

    last: dict[str, Outcome] = {}
    for repeat in range(config.repeats):
        for side in sides:
            yield run(side, repeat, None, config.steps)
    ours, *references = sides
    for repeat in range(config.repeats if config.minutes else 0):
        minutes = config.minutes
        for side in references:  # first: with its kernels compiled before, a run ends earlier than by last's clock
            timed = run(side, repeat, 1.0, steps_in(config, config.minutes, last[side.name]))
            minutes = min(minutes, timed.outcome.clock(timed.steps) / 60)
            yield timed
        for share in config.parts:
            yield run(ours, repeat, share, steps_in(config, minutes * share, last[ours.name]))


# --- summing up ------------------------------------------------------------------------------------------------------


def last_eval(outcome: Outcome) -> float:
    """Bits per byte at the end of a run."""
    return outcome.evals[max(outcome.evals)]


def clock_to(outcome: Outcome, bpb: float) -> float | None:
    """Seconds until the first evaluation at or below `bpb`; None when there is none."""
    return next((outcome.clock(step) for step, value in sorted(outcome.evals.items()) if value <= bpb), None)


def at_equal_tokens(config: Compare, runs: list[Run], flops: int, peak: float) -> list[dict[str, Any]]:
    """A row for each side; `x` is our speed over that side's, the median of the ratios of each round."""
    sides = dict.fromkeys(run.side for run in runs)
    speed = {(run.side, run.repeat): tokens_per_second(config, run.outcome) for run in runs}
    rows = []
    for side in sides:
        own = [run for run in runs if run.side == side]
        outcomes = [run.outcome for run in own]
        speeds = bench.spread([speed[side, run.repeat] for run in own])
        tail = max(1, config.steps // 10)
        rows.append(
            {
                "side": side,
                "tokens/s": speeds["median"],
                "least to greatest": f"{speeds['min']:,.0f} to {speeds['max']:,.0f}",
                "ours x": statistics.median(speed["ours", run.repeat] / speed[side, run.repeat] for run in own),
                "MFU": speeds["median"] * flops / peak,
                "first step s, cold": outcomes[0].first_step,
                "cached": statistics.median(o.first_step for o in outcomes[1:]) if outcomes[1:] else None,
                "peak MiB": statistics.median(o.peak_bytes for o in outcomes) / 2**20,
                "training loss": statistics.median(statistics.mean(o.losses[-tail:]) for o in outcomes),
                "bits per byte": statistics.median(map(last_eval, outcomes)),
            }
        )
    return rows


def at_equal_time(runs: list[Run]) -> list[dict[str, Any]]:
    """For each timed run of the reference: what we have reached by its end, and when we had its bits per byte."""
    rows = []
    for run in runs:
        if run.side != "ours":
            ours = [other for other in runs if other.side == "ours" and other.repeat == run.repeat]
            target, end = last_eval(run.outcome), run.outcome.clock(run.steps)
            within = [v for o in ours for step, v in o.outcome.evals.items() if o.outcome.clock(step) <= end]
            times = [t for o in ours if (t := clock_to(o.outcome, target)) is not None]
            rows.append(
                {
                    "against": run.side,
                    "its seconds": end,
                    "its bits per byte": target,
                    "ours by then": min(within, default=None),
                    "our seconds to its": min(times, default=None),
                    "share of its time": min(times) / end if times else None,
                }
            )
    return rows


def compare_depth(config: Compare, depth: int, vocab_size: int) -> tuple[dict[str, Any], str]:
    """All of one depth: its part of the record, and of the page."""
    folder = Path(config.work_dir).resolve() / f"{dataset_name(config.data)}-v{vocab_size}"
    sides, vocab, eval_tokens = make_sides(config, folder, vocab_size)
    model = recipe.model_config(
        depth, vocab, config.seq_len, head_dim=config.head_dim, window_pattern=config.window_pattern
    )
    with torch.device("meta"):
        flops = GPT(model).flops_per_token()
    gemm = ceiling(config, model)
    runs = list(measure(config, depth, sides, eval_tokens, folder / "logs"))
    gemm = {name: max(rate, gemm[name]) for name, rate in ceiling(config, model).items()}
    tokens = at_equal_tokens(config, [run for run in runs if run.share is None], flops, max(gemm.values()))
    timed = at_equal_time([run for run in runs if run.share is not None])
    fastest = max(gemm, key=gemm.get)
    page = (
        f"## d{depth}, T={config.seq_len}, V={vocab}, {config.batch_tokens:,} tokens a step\n\n"
        f"After {config.steps} steps; {eval_tokens:,} validation tokens; {flops / 1e6:,.1f} MFLOPs a token; MFU "
        f"against {gemm[fastest] / 1e9:,.0f} GFLOP/s ({fastest}), the greater of before and after. The first step "
        f"counts from the start of the process.\n\n{bench.markdown_table(tokens)}\n"
    )
    if timed:
        page += f"Trained for {config.minutes:g} minutes, evaluations not counted:\n\n{bench.markdown_table(timed)}\n"
    record = {
        "depth": depth,
        "vocab_size": vocab,
        "flops_per_token": flops,
        "eval_tokens": eval_tokens,
        "gemm_flops": gemm,
        "equal_tokens": tokens,
        "equal_time": timed,
        "runs": [dataclasses.asdict(run) for run in runs],
    }
    return record, page


def main() -> None:
    config = cli.parse(Compare, description=__doc__)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: no child is left
    config = config.on(Compute.create(config.device_type).device.type)
    work, checkout = Path(config.work_dir), Path(config.baseline_dir).resolve()
    if Path(config.data).is_dir():
        config = dataclasses.replace(config, data=str(Path(config.data).resolve()))
    git = ["git", "-C", str(checkout), "rev-parse", "HEAD"]
    commit = subprocess.run(git, capture_output=True, text=True).stdout.strip() or "unknown"
    flags = {k: v for k, v in dataclasses.asdict(config).items() if k not in ("baseline_dir", "work_dir", "out")}
    flags["data"] = dataset_name(config.data)
    record: dict[str, Any] = {"config": flags, "reference_commit": commit}
    if config.parity:
        depth, data = int(config.depths.split(",")[0]), work / "parity-data"
        prepare_ours(data, config.data, 512, data / "logs")
        record["matched"] = MATCHED
        record["parity"] = run_parity(work, config.data, checkout, depth, config.head_dim, config.device_type)
        bench.write_report(config.out or work / "parity", record, parity_page(record["parity"]))
        return
    page = f"# Training compared with karpathy/nanochat at {commit[:12]}\n\nEqual: {EQUAL}.\n\n"
    record |= {"equal": EQUAL, "depths": []}
    for depth, vocab_size in zip(map(int, config.depths.split(",")), config.vocab_sizes):
        part, text = compare_depth(config, depth, vocab_size)
        record["depths"].append(part)
        page += text
        bench.write_report(config.out or work / "compare", record, page)


if __name__ == "__main__":
    cli.run(main)
