"""A training step on one H100, without values: the bytes that the kernels of torch.compile move in each of its parts.

Products and attention are not among them: their cost is that of their FLOPs. What stands between them costs what it
moves, and is counted in units that do not depend on the size of a model, so that a limit can be set.
"""

from dataclasses import dataclass
from typing import Any

import torch

from dev.bench_plan import CAST_BYTES, LOGIT_BYTES, LOGIT_BYTES_FP8, OURS_FP8, optimizer_bytes
from dev.fake_gpu import FakeGpu
from dev.graph_count import GraphCount
from nanochat import gpt, recipe
from nanochat.compute import Compute
from nanochat.fp8 import weights_quantised
from nanochat.optim import MuonAdamW

SEQUENCE = 2048

# The most bytes per token, layer and channel that the kernels of the blocks may move forward and backward, by what
# their products are. fp8 pays for each operand with a pass that finds its largest entry and one that casts it.
BLOCK_BYTES = {"bf16": 135.0, "bf16, fused MLP": 95.0, "fp8": OURS_FP8}


@dataclass(frozen=True)
class Workload:
    """A model, and the rows of a micro-step on one GPU."""

    name: str
    depth: int
    rows: int
    vocab_size: int
    fp8: bool = False
    norm_scales: bool = False


WORKLOADS = (
    Workload("d12", depth=12, rows=32, vocab_size=32768),
    Workload("d24, fp8", depth=24, rows=16, vocab_size=32768, fp8=True),
    Workload("node: d22, fp8", depth=22, rows=32, vocab_size=49152, fp8=True, norm_scales=True),
)


@dataclass(frozen=True)
class Part:
    """A part of a step, and the bytes that its kernels move for each unit of work: counted, and allowed."""

    run: str
    part: str
    unit: str
    bytes: float
    limit: float
    gigabytes: float  # in all


def count_step(workload: Workload, graphs: GraphCount) -> list[Part]:
    """Run a micro-step and the optimizer on a model without values, and return what each part moves."""
    parts = []

    def note(part: str, unit: str, units: float, limit: float, moved: int) -> None:
        parts.append(Part(workload.name, part, unit, moved / units, limit, moved / 1e9))

    with FakeGpu("H100") as gpu, graphs.instead_of_running():
        config = recipe.model_config(workload.depth, workload.vocab_size, SEQUENCE, norm_scales=workload.norm_scales)
        with gpu.watch:
            model = gpt.build_model(config, gpu.device, train=True, compiled=True, fp8=workload.fp8)
        compute = Compute(gpu.device, model.dtype)
        optimizer = MuonAdamW(model, dict(recipe.LEARNING_RATES), 0.28, compute, compiled=True)
        idx_BT = torch.zeros(workload.rows, SEQUENCE, dtype=torch.int64, device=gpu.device)
        graphs.forget_runs()  # those of the probe that chose kernels
        with weights_quantised(model):
            to_fp8 = graphs.kernel_bytes("inference")
            model(idx_BT, idx_BT, loss_reduction="sum").backward()
        to_loss = graphs.kernel_bytes("inference")
        optimizer.step(0)

    blocks = sum(matrix.numel() for matrix in model.blocks.parameters())
    head = model.head.weight.numel()
    weights = sum(parameter.numel() for parameter in model.parameters())
    channels = idx_BT.numel() * config.n_layer * config.n_embd
    if workload.fp8:
        products = "fp8"
        note("weights to fp8", "weight of the blocks", blocks, CAST_BYTES, to_fp8)
    else:
        products = "bf16, fused MLP" if model.kernels.fused_mlp else "bf16"
    in_blocks = graphs.kernel_bytes("forward", "backward")
    note(f"blocks, {products}", "token, layer and channel", channels, BLOCK_BYTES[products], in_blocks)
    logit_bytes = LOGIT_BYTES_FP8 if workload.fp8 else LOGIT_BYTES
    note("loss", "token and logit", idx_BT.numel() * config.padded_vocab_size, logit_bytes, to_loss - to_fp8)
    update_bytes = optimizer_bytes(blocks, head, weights - blocks - head) / weights
    note("optimizer", "weight", weights, update_bytes, graphs.kernel_bytes("inference") - to_loss)
    return parts


def part_row(part: Part) -> dict[str, Any]:
    """Return the row of a table."""
    return {
        "run": part.run,
        "part": part.part,
        "GB": part.gigabytes,
        "bytes": part.bytes,
        "limit": part.limit,
        "per": part.unit,
        "": "TOO MANY" if part.bytes > part.limit else "",
    }
