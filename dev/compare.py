"""Train side by side with karpathy/nanochat, a checkout of which is at --baseline-dir.

    python -m dev.compare --baseline-dir PATH --depth 4 --steps 200 --minutes 10
    python -m dev.compare --baseline-dir PATH --parity

Equal for both sides: training text, tokenizer (ours, given to both), the model's shape, tokens a step, the validation
rows with their bytes, interpreter and machine. Each side's own: order and packing of rows, recipe, kernels. Both run
scripts.base_train as users do, in base directories of their own, in turns A B A B, so that a machine that drifts
favours none. --parity holds the rows, the starting weights and the hyperparameters equal, too: then the losses of 20
steps in fp32 must agree within 1e-3 for each of three seeds, or the exit status is 2.
"""

import dataclasses
import itertools
import os
import pickle
import shlex
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from dev.compare_runs import Compare, Curve, Outcome, Side, train
from dev.measure import ROOT, product_rate
from nanochat import cli, recipe
from nanochat.common import write_record
from nanochat.compute import Compute
from nanochat.dataloader import RowLoader
from nanochat.documents import list_shards
from nanochat.gpt import GPT, GPTConfig
from nanochat.table import to_table
from nanochat.token_shards import TextRows
from nanochat.tokenizer import load_tokenizer

PARITY_STEPS = 20
PARITY_WITHIN = 1e-3
PARITY_SEEDS = (1337, 1338, 1339)  # of rows and starting weights
# At 0.5, the rate of large batches, a step of 512 tokens throws the scalars about, and every rounding error with them.
SCALAR_LR = 0.05
SCALAR_EPS = 1e-6  # our optimizer's own; the reference has 1e-10
WEIGHT_DECAY = 0.1


# --- equal data -------------------------------------------------------------------------------------------------------


def save_rows(path: Path, batches: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> int:
    """Write rows of inputs and targets for the reference's loaders; return their number."""
    inputs, targets = zip(*batches)
    torch.save({"inputs": torch.cat(inputs), "targets": torch.cat(targets)}, path)
    return sum(len(each) for each in inputs)


def prepare(config: Compare, work: Path) -> tuple[int, int]:
    """Give both base directories the same text and tokenizer; return the vocabulary and the validation tokens."""
    ours = work / "ours"
    reference = work / "reference"
    os.environ["NANOCHAT_BASE_DIR"] = str(ours)
    python = [sys.executable, "-m"]
    subprocess.run([*python, "nanochat.dataset", "--name", config.data], cwd=ROOT, check=True)
    if not (ours / "tokenizer" / "tokenizer.json").exists():
        command = [*python, "scripts.tok_train", "--dataset", config.data, "--vocab-size", str(config.vocab_size)]
        subprocess.run(command, cwd=ROOT, check=True)
    tokenizer = load_tokenizer()
    for folder in (reference / "base_data_climbmix", reference / "tokenizer"):
        folder.mkdir(parents=True, exist_ok=True)
    shards = [*list_shards(config.data, "train"), *list_shards(config.data, "val")]  # it takes the last for validation
    for index, shard in enumerate(shards):
        link = reference / "base_data_climbmix" / f"shard_{index:05d}.parquet"
        link.unlink(missing_ok=True)
        link.symlink_to(shard.resolve())
    (reference / "tokenizer" / "tokenizer.pkl").write_bytes(pickle.dumps(tokenizer.encoding))
    torch.save(torch.tensor(tokenizer.token_bytes, dtype=torch.int32), reference / "tokenizer" / "token_bytes.pt")
    rows = config.device_batch_size
    loader = RowLoader(TextRows(config.data, "val", tokenizer, config.seq_len), rows, rows, seed=0)
    count = min(config.eval_tokens // config.seq_len, loader.rows_in_epoch) // rows * rows
    if not count:
        raise ValueError(f"--data {config.data} has too little validation text for a batch of {rows} rows")
    return tokenizer.get_vocab_size(), save_rows(work / "val.pt", loader.first_rows(count)) * config.seq_len


# --- parity -----------------------------------------------------------------------------------------------------------

NAMES = {
    "embed.weight": "transformer.wte.weight",
    "head.weight": "lm_head.weight",
    "resid_scale": "resid_lambdas",
    "embed_skip": "x0_lambdas",
    "smear_gate.weight": "smear_gate.weight",
    "smear_scale": "smear_lambda",
    "backout": "backout_lambda",
    "attn.q": "attn.c_q",
    "attn.k": "attn.c_k",
    "attn.v": "attn.c_v",
    "attn.out": "attn.c_proj",
    "attn.gate": "attn.ve_gate",
    "mlp.up": "mlp.c_fc",
    "mlp.down": "mlp.c_proj",
}


def reference_weights(weights: dict[str, torch.Tensor], head_dim: int) -> dict[str, torch.Tensor]:
    """Return our state dict under the reference's names, such that both models are the same function.

    Its rotary embedding turns the other way: negating the second half of each query and key head mirrors the planes.
    """
    result = {}
    for name, value in weights.items():
        if name.startswith("blocks."):
            _, layer, rest = name.split(".", 2)
            part = rest.removesuffix(".weight")
            if part in ("attn.q", "attn.k"):
                sign = torch.ones(head_dim)
                sign[head_dim // 2 :] = -1
                value = value * sign.repeat(len(value) // head_dim)[:, None]
            name = f"transformer.h.{layer}.{NAMES[part]}.weight"
        elif not name.startswith("value_embeds."):
            name = NAMES[name]
        result[name] = value.reshape(1) if value.dim() == 0 else value.clone()
    return result


def parity_sides(config: Compare, work: Path, model: GPTConfig, seed: int) -> list[Side]:
    """Return both sides with equal rows, weights, learning rates and weight decay, each scaling its flags its way."""
    save_parity_rows(config, work / "train.pt", seed)
    save_parity_weights(model, ours=work / "ours.pt", theirs=work / "theirs.pt", seed=seed)

    # Ours multiplies the flags of learning rates by `scales`; the reference by the root of the batch's growth.
    scales = recipe.learning_rate_scales(config.batch_tokens)
    root = (config.batch_tokens / recipe.REFERENCE_BATCH) ** 0.5
    rates = {name: lr * scales[name] for name, lr in recipe.LEARNING_RATES.items()}
    rates["scalar"] = SCALAR_LR
    # The reference scales weight decay by the same root, and by the horizon of a d12 over that of the model.
    twelve = recipe.model_config(12, model.vocab_size, config.seq_len, head_dim=model.head_dim)
    decay_scale = root * recipe.scaling_parameters(twelve) / recipe.scaling_parameters(model)

    ours = [
        "--warmdown-ratio=0",
        "--warmup-steps=2",
        f"--weight-decay={WEIGHT_DECAY!r}",
        f"--dataset={config.data}",
        f"--seed={seed}",
        *(f"--{name}-lr={lr / scales[name]!r}" for name, lr in rates.items()),
        "--no-compile",
        "--model-tag=compare",
        "--sample-every=0",
    ]
    theirs = [
        "--warmdown-ratio=0",
        "--warmup-steps=2",
        f"--weight-decay={WEIGHT_DECAY / decay_scale!r}",
        *(f"--{name}-lr={lr / root!r}" for name, lr in rates.items()),
        "--core-metric-every=-1",
        "--sample-every=-1",
        "--save-every=-1",
    ]
    given = {
        "train": str(work / "train.pt"),
        "val": str(work / "val.pt"),
        "start": str(work / "theirs.pt"),
        "eager": True,
        "scalars": [0.4 * SCALAR_LR, SCALAR_EPS],  # its smear and backout learn at 0.4 of the scalars' rate
    }
    checkout = Path(config.baseline_dir).resolve()
    return [
        Side("ours", ROOT, work / "ours", ours, given={"start": str(work / "ours.pt")}, dtype="float32"),
        Side("reference", checkout, work / "reference", theirs, given=given, dtype="float32"),
    ]


def save_parity_rows(config: Compare, path: Path, seed: int) -> None:
    """Write the rows that our run will train on, for the reference's loader."""
    rows = config.device_batch_size
    loader = RowLoader(TextRows(config.data, "train", load_tokenizer(), config.seq_len), rows, rows, seed)
    batches = itertools.chain.from_iterable(loader.step(step) for step in range(PARITY_STEPS + 1))
    save_rows(path, batches)


def save_parity_weights(model: GPTConfig, ours: Path, theirs: Path, seed: int) -> None:
    """Write the same starting weights under our names and under the reference's."""
    generator = torch.Generator().manual_seed(seed)
    net = GPT(model)
    net.init_weights(generator)
    for name, value in net.state_dict().items():
        # Where projections begin at zero, the first gradients are rounding noise, which optimizers blow up.
        if name.endswith(("attn.out.weight", "mlp.down.weight", "head.weight")):
            value.uniform_(-0.02, 0.02, generator=generator)
    torch.save(net.state_dict(), ours)
    torch.save(reference_weights(net.state_dict(), model.head_dim), theirs)


# --- the comparison ---------------------------------------------------------------------------------------------------


def measured_sides(config: Compare, work: Path) -> list[Side]:
    ours = [f"--dataset={config.data}", "--model-tag=compare", "--sample-every=0", *shlex.split(config.our_flags)]
    theirs = ["--core-metric-every=-1", "--sample-every=-1", "--save-every=-1", *shlex.split(config.baseline_flags)]
    sides = [Side("ours", ROOT, work / "ours", ours, {})]
    for dtype in config.baseline_dtypes.split(","):
        given = {"val": str(work / "val.pt")}
        checkout = Path(config.baseline_dir).resolve()
        sides.append(Side(f"reference {dtype}", checkout, work / "reference", theirs, given, dtype))
    return sides


def equal_tokens(config: Compare, runs: list[Outcome], flops: int, rate: float) -> list[dict[str, Any]]:
    """Return a row a side, medians over its runs; `ours x` is our speed over that side's."""
    rows = []
    speed = {}
    for side in dict.fromkeys(run.side for run in runs):
        own = [run for run in runs if run.side == side]
        speed[side] = statistics.median(run.tokens_per_second for run in own)
        row = {
            "side": side,
            "tokens/s": speed[side],
            "ours x": speed["ours"] / speed[side],
            "MFU": speed[side] * flops / rate,
            "first step s": own[0].curve.first_step,
            "training loss": statistics.median(statistics.fmean(run.curve.losses[-10:]) for run in own),
            "bits per byte": statistics.median(run.curve.evals[max(run.curve.evals)] for run in own),
        }
        rows.append(row)
    return rows


def equal_time(ours: Curve, runs: list[Outcome]) -> list[dict[str, Any]]:
    """Return, for each run of the reference, what we had by its end, and when we had its bits per byte."""
    rows = []
    for run in runs:
        end = run.curve.clock(len(run.curve.seconds))
        target = run.curve.evals[max(run.curve.evals)]
        within = [value for step, value in ours.evals.items() if ours.clock(step) <= end]
        reached = [ours.clock(step) for step, value in sorted(ours.evals.items()) if value <= target]
        row = {
            "against": run.side,
            "its seconds": end,
            "its bits per byte": target,
            "ours by then": min(within, default=None),
            "our seconds to its": reached[0] if reached else None,
            "share of its time": reached[0] / end if reached else None,
        }
        rows.append(row)
    return rows


def compare_parity(config: Compare, work: Path, model: GPTConfig, eval_tokens: int) -> dict[str, Any]:
    """Train both sides from equal rows and weights for a few steps, for each seed; return how far losses are apart."""
    seeds = []
    for seed in PARITY_SEEDS:
        runs = []
        for side in parity_sides(config, work, model, seed):
            log = work / f"parity-{seed}-{side.name}.log"
            runs.append(train(side, config, PARITY_STEPS, eval_tokens, eval_every=5, log=log))
        ours, theirs = runs
        losses = list(zip(ours.curve.losses, theirs.curve.losses, strict=True))
        apart = torch.tensor(losses, dtype=torch.float64).diff(dim=1).abs().max().item()  # Python's max overlooks NaN
        print(f"seed {seed}: losses of {PARITY_STEPS} steps are {apart:.2g} apart, {PARITY_WITHIN:g} is allowed")
        seeds.append({"seed": seed, "losses": losses, "apart": apart})
    return {"seeds": seeds}


def compare_speed(config: Compare, work: Path, model: GPTConfig, eval_tokens: int, compute: Compute) -> dict[str, Any]:
    """Train all sides in turns for equal tokens, then with --minutes for equal time; return and print the tables."""
    sides = measured_sides(config, work)
    eval_every = -(-config.steps // config.evals)
    runs = []
    for repeat, side in itertools.product(range(config.repeats), sides):
        log = work / f"tokens-{repeat}-{side.name.replace(' ', '-')}.log"
        runs.append(train(side, config, config.steps, eval_tokens, eval_every, log))
    with torch.device("meta"):
        flops = GPT(model).flops_per_token()
    rate = product_rate(model, config.device_batch_size * config.seq_len, compute)
    result: dict[str, Any] = {
        "equal_tokens": equal_tokens(config, runs, flops, rate),
        "runs": [asdict(run) for run in runs],
    }
    print(f"\n{to_table(result['equal_tokens'])}")
    if config.minutes:
        timed = []
        for side in sides:
            last = [run for run in runs if run.side == side.name][-1]
            seconds = 60 * config.minutes - last.curve.first_step
            steps = max(1, round(seconds * last.tokens_per_second / config.batch_tokens))
            log = work / f"time-{side.name.replace(' ', '-')}.log"
            timed.append(train(side, config, steps, eval_tokens, max(1, steps // 20), log))
        result["equal_time"] = equal_time(timed[0].curve, timed[1:])
        print(f"\n{to_table(result['equal_time'])}")
    return result


def main() -> None:
    config = cli.parse(Compare, description=__doc__)
    compute = Compute.create(config.device_type)
    work = Path(config.work_dir or tempfile.mkdtemp(prefix="nanochat-compare-")).resolve()
    work.mkdir(parents=True, exist_ok=True)
    if Path(config.data).is_dir():
        config = dataclasses.replace(config, data=str(Path(config.data).resolve()))
    git = ["git", "-C", config.baseline_dir, "rev-parse", "HEAD"]
    commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
    vocab_size, eval_tokens = prepare(config, work)
    model = recipe.model_config(
        config.depth,
        vocab_size,
        config.seq_len,
        head_dim=config.head_dim,
        window_pattern=config.window_pattern,
    )
    if config.parity:
        result = compare_parity(config, work, model, eval_tokens)
    else:
        result = compare_speed(config, work, model, eval_tokens, compute)
    record = {"config": asdict(config), "reference_commit": commit, "eval_tokens": eval_tokens, **result}
    path = Path(config.out) if config.out else work / "compare.json"
    write_record(path, record)
    print(f"{path} written")
    for parity in record.get("seeds", []):
        if not parity["apart"] <= PARITY_WITHIN:  # NaN neither
            raise ValueError(f"losses differ by {parity['apart']:.2g}: the two models or recipes are not the same")


if __name__ == "__main__":
    cli.run(main)
