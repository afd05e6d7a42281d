"""How long a pretraining run takes on H100s, from counted FLOPs and bytes: python -m dev.bench plan --hardware 8xH100.

A model of a step, no measurement. Each term is a count divided by a rate, and nothing overlaps:

    products         6 FLOPs a token and weight, in fp8 or bf16
    attention        7 products of queries and keys a step (2 forward, 5 backward), over the positions that are seen
    elementwise      bytes that the compiled blocks move between their products, counted in Inductor's sm_90 code, and
                     those of casting the weights to fp8
    loss             bytes of the logits, and of the head's gradient summed over chunks
    accumulation     bytes of gradients that are cleared and, after the first micro-step, added up
    optimizer        products of Muon and bytes of all states, a share of them on each GPU
    communication    gradients out and weights back, through NVLink

The rates stand in `Rates`. They are of the literature and of others' measurements, but for that of fp8 products, which
an earlier and coarser form of this model fitted to run 6 of the reference (99.0 minutes). Pull request 830 of the
reference was not used for anything: its measured 81.8 minutes are the check. Evaluations, checkpoints, compilation,
waiting for data, garbage collection and the slowest of the GPUs are not in the sum; the clock of the reference's
leaderboard leaves out most of them too.
"""

import re
from dataclasses import asdict, dataclass

import torch

from dev.measure import Record, write
from nanochat import cli, recipe
from nanochat.gpt import GPT, GPTConfig
from nanochat.loss import CUDA_CHUNK_COMPILED
from nanochat.table import to_table

SEQUENCE = 2048

# Bytes per token, layer and channel that the kernels between the products of a block move in a forward and a backward
# pass. The reference: 291 GB for d24 and 16 rows at 92d63d4, less 6 bytes a logit. Ours: 403 GB for d22, 32 rows and
# --norm-scales. Both are counted in what Inductor of torch 2.13 makes for sm_90: `python -m dev.gpu_code` for ours.
REFERENCE_FP8 = 235.6
OURS_FP8 = 198.5
# Each logit is read in bf16 for the sum of exponentials, read again for the gradient, and its gradient is written. In
# fp8 that is read again and written in 8 bits, in two layouts; the first two reads of a logit are one there, which the
# cache holds.
LOGIT_BYTES = 6
LOGIT_BYTES_FP8 = 9
# A weight is read twice in fp32, for the largest and for the cast, and written, read and written again for two layouts.
CAST_BYTES = 11


@dataclass(frozen=True)
class Rates:
    """What one GPU is assumed to reach, per second."""

    bf16: float = 650e12  # FLOPs of products; the data sheet says 989
    fp8: float = 1140e12  # the same in fp8; the data sheet says 1,979
    attention: float = 400e12  # FLOPs of FlashAttention-3, forward and backward, windows included
    memory: float = 2.7e12  # bytes; the data sheet says 3.35
    link: float = 340e9  # bytes of a collective over NVLink


@dataclass(frozen=True)
class Work:
    """A run to be modelled."""

    name: str
    depth: int
    vocab_size: int
    ratio: float
    batch: int  # tokens per step
    rows: int  # of a micro-step on one GPU
    block_bytes: float  # per token, layer and channel
    fp8: bool = True  # products of the blocks
    fp8_head: bool = True
    logit_bytes: int = LOGIT_BYTES
    cast_bytes: int = 0  # per weight and step; 0: the casts are in block_bytes
    chunk: int | None = None  # tokens whose part of the head's gradient is added at once; None: all of them
    measured: float | None = None  # minutes


REFERENCES = (
    Work("reference, run 6", 24, 32768, 8.0, 2**20, 16, REFERENCE_FP8, measured=99.0),
    # 32 rows on 8 GPUs without accumulation are 2^19 tokens.
    Work("reference, pull request 830", 22, 49152, 9.4, 2**19, 32, REFERENCE_FP8, measured=81.8),
)


@dataclass(frozen=True)
class PlanBench:
    """Flags of `plan`; the defaults are the node profile of speedrun.sh."""

    hardware: str = cli.option("8xH100", "GPUs, as 8xH100")
    depth: int = cli.option(22, "layers")
    vocab_size: int = cli.option(49152, "ids of the tokenizer")
    target_param_data_ratio: float = cli.option(9.4, "training tokens for each parameter")
    total_batch_size: int = cli.option(2**20, "tokens a step")
    device_batch_size: int = cli.option(32, "rows of a micro-step on one GPU")
    fp8_head: bool = cli.option(True, "the head's products in fp8, as those of the blocks")
    block_bytes: float = cli.option(OURS_FP8, "bytes between products per token, layer and channel, as counted")
    out: str | None = cli.option(None, "JSON record to write; unset: bench/plan.json in the base directory")

    def __post_init__(self) -> None:
        cli.require_positive(self, "depth", "vocab_size", "target_param_data_ratio", "total_batch_size")
        cli.require_positive(self, "device_batch_size", "block_bytes")
        gpus(self.hardware)


def gpus(hardware: str) -> int:
    """Return the number of GPUs of `8xH100`; raises ValueError for other hardware, whose rates are not known here."""
    match = re.fullmatch(r"([1-9]\d?)xH100", hardware)
    if match is None:
        raise ValueError(f"--hardware {hardware}: give a number of H100s, as 8xH100")
    return int(match[1])


def plan(config: PlanBench, more: list[str]) -> None:
    """Print the modelled minutes of the node's profile beside two runs of the reference that were measured."""
    ours = Work(
        name="ours",
        depth=config.depth,
        vocab_size=config.vocab_size,
        ratio=config.target_param_data_ratio,
        batch=config.total_batch_size,
        rows=config.device_batch_size,
        block_bytes=config.block_bytes,
        fp8_head=config.fp8_head,
        logit_bytes=LOGIT_BYTES_FP8 if config.fp8_head else LOGIT_BYTES,
        cast_bytes=CAST_BYTES,
        chunk=CUDA_CHUNK_COMPILED,
    )
    rates = Rates()
    world_size = gpus(config.hardware)
    rows = [minutes(work, world_size, rates) for work in (*REFERENCES, ours)]
    print(to_table(rows))
    print("milliseconds a step, then minutes of training; a model, not a measurement")
    print(f"assumed per GPU: {', '.join(f'{name} {value:.3g}/s' for name, value in asdict(rates).items())}")
    print(f"bytes per token, layer and channel: reference {REFERENCE_FP8}, ours {config.block_bytes:g}")
    print("nothing overlaps; without evaluations, checkpoints, compilation and waiting for data")
    write(config.out, "plan", {"config": asdict(config), "rates": asdict(rates), "rows": rows})


def minutes(work: Work, world_size: int, rates: Rates) -> Record:
    """Return the row of a run: the terms of a step in milliseconds, its steps, and the minutes of all of them."""
    config = recipe.model_config(work.depth, work.vocab_size, SEQUENCE)
    steps = recipe.make_plan(config, work.ratio, batch=work.batch).steps
    terms = step_seconds(work, config, world_size, rates)
    seconds = sum(terms.values())
    row: Record = {"run": work.name}
    for name, value in terms.items():
        row[name] = round(1e3 * value, 1)
    row["step"] = round(1e3 * seconds)
    row["steps"] = steps
    row["minutes"] = round(seconds * steps / 60, 1)
    row["measured"] = work.measured if world_size == 8 else None
    return row


def step_seconds(work: Work, config: GPTConfig, world_size: int, rates: Rates) -> dict[str, float]:
    """Return what a step costs, term by term, on each of the GPUs."""
    with torch.device("meta"):
        model = GPT(config)
    C = config.n_embd
    head = config.padded_vocab_size * C
    blocks = sum(matrix.numel() for matrix in model.blocks.parameters())
    tables = sum(table.numel() for table in model.value_embeds.parameters()) + model.embed.weight.numel()
    tokens = work.batch / world_size
    micro_steps = tokens / (work.rows * SEQUENCE)

    products = 6 * tokens * blocks / (rates.fp8 if work.fp8 else rates.bf16)
    products += 6 * tokens * head / (rates.fp8 if work.fp8_head else rates.bf16)
    # A window of w in T positions sees w at most, and less near the beginning of a row: w - w²/2T on average.
    seen = sum(window - window**2 / (2 * SEQUENCE) for window in config.windows)
    attention = 14 * tokens * C * seen / rates.attention

    elementwise = tokens * work.block_bytes * config.n_layer * C / rates.memory
    elementwise += work.cast_bytes * blocks / rates.memory
    loss_bytes = tokens * work.logit_bytes * config.padded_vocab_size
    if work.chunk is not None:
        # A chunk's part is written and read in bf16, and the sum in fp32 is read and written.
        loss_bytes += tokens / work.chunk * head * (2 + 2 + 4 + 4)
    # Tables get a dense gradient in bf16, cleared in each micro-step. After the first one it is added to the sum, and
    # so is that of the matrices, in fp32: two reads and a write.
    accumulated = micro_steps * 2 * tables + (micro_steps - 1) * (6 * tables + 12 * (blocks + head))

    # Five Polar Express steps of three products.
    muon = sum(5 * polar_flops(*matrix.shape) for matrix in model.blocks.parameters()) / rates.bf16
    states = optimizer_bytes(blocks, head, tables) / rates.memory
    # Reduce-scatter of the gradients, then all-gather of the weights: each rank sends all but its own share.
    sent = (4 * (blocks + head) + 2 * tables) * (world_size - 1) / world_size
    return {
        "products": products,
        "attention": attention,
        "elementwise": elementwise,
        "loss": loss_bytes / rates.memory,
        "accumulation": accumulated / rates.memory,
        "optimizer": (muon + states) / world_size,
        "communication": 2 * sent / rates.link,
    }


def optimizer_bytes(blocks: int, head: int, tables: int) -> int:
    """Return the bytes that the updates of so many weights move, counted by `python -m dev.gpu_code`.

    Muon: gradient, momentum and weight, and what stands between the products of its five steps. AdamW: gradient, two
    averages and weight, in fp32 for the head and with gradient and weight in bf16 for the embedding tables.
    """
    return 115 * blocks + 28 * head + 22 * tables


def polar_flops(n_out: int, n_in: int) -> int:
    """Return the FLOPs of a Polar Express step on a matrix: its Gram matrix, that squared, and their sum applied."""
    short = min(n_out, n_in)
    long = max(n_out, n_in)
    return 2 * short**2 * long + 2 * short**3 + 2 * short**2 * long
