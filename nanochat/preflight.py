"""Before a run: how many rows fit into memory at once, and the lines that say what the run will need and take.

The memory of a step is counted tensor by tensor. On CPU the count is checked against what autograd keeps and against
the allocator's own account (tests/test_preflight.py); for a GPU it is the same count, not measured.
"""

import contextlib
import os
import re
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.distributed as dist

from nanochat import attention, loss, sharding
from nanochat.common import print0, read_if_there
from nanochat.compute import Compute
from nanochat.gpt import GPT

_USABLE = {"cuda": 0.92, "cpu": 0.7}  # of free memory; glibc's heap held 1.34 bytes a byte of tensors, CUDA: a guess
_ASSUMED_MFU = 0.4  # until steps are timed


def block_bytes(model: GPT, layer: int, rows: int, kernel: str) -> int:
    """Bytes that autograd keeps of one block from its forward to its backward pass. kernel: name of the attention."""
    config, block, e = model.config, model.blocks[layer], model.dtype.itemsize
    T, C, H, window = config.sequence_len, config.n_embd, config.n_head, config.windows[layer]
    kv, cpu, fp8 = config.n_kv_head * config.head_dim, kernel == "blocks", block.mlp.up.fp8
    kept = 2 * C  # the residual before and between the sublayers
    kept += 0 if model.compiled and cpu else C  # and rescaled, which a block that is one graph makes again
    kept += (C + kv) + (C + 2 * (C if cpu else kv)) + C  # q, k before norms; q, k, v (CPU: one for each head); output
    kept += (kv if config.has_value_embed(layer) else 0) + (0 if block.mlp.fused else 4 * C)  # the MLP's ReLU
    inputs = C + C + 4 * C  # of q, k and v together, and of the MLP's two matrices
    per_token = kept * e + (inputs + 3 * C if fp8 else inputs * e) + 4 * (2 + H + config.n_kv_head)  # norms in fp32
    if cpu and not model.compiled:
        per_token += (3 * C + kv) * (4 - e)  # eager norms keep an fp32 input
    weights = (8 + e) * T * T if kernel == "masked" else 0
    if cpu:
        weights = e * sum(min(128, T - a) * min(a + 128, window + 128, T) for a in range(0, T, 128))
    casts = 0 if e == 4 else (1 if fp8 else e) * sum(p.numel() for p in block.parameters())
    return rows * (T * per_token + H * weights) + casts


def peak_bytes(model: GPT, rows: int, kernels: tuple[str, str], checkpointing: bool, times: int, w: int = 1) -> int:
    """Most bytes of tensors alive at once in a training step of `times` x `rows` rows on each of `w` ranks.

    model: may be on `meta`. kernels: names of attention and loss. What an allocator loses between tensors is not in it.
    """
    config, e = model.config, model.dtype.itemsize
    cpu, vocabulary, tokens = kernels[0] == "blocks", config.vocab_size, rows * config.sequence_len
    blocks = sum(p.nbytes for p in model.blocks.parameters())
    tables = [p for name, p in model.named_parameters() if not name.startswith("blocks.")]
    whole, state = blocks + sum(p.nbytes for p in tables), (blocks + 8 * sum(p.numel() for p in tables)) // w
    parameters = gradients = sum(sharding.local(p).nbytes for p in model.parameters())
    gathered = 0 if parameters == whole else whole - blocks + blocks * e // (2 * config.n_layer)  # two blocks at once
    unit = tokens * config.n_embd * e

    kept = [block_bytes(model, layer, rows, kernels[0]) for layer in range(config.n_layer)]
    again = max(kept) if checkpointing else 0
    if checkpointing:
        ve = tokens * e * config.n_kv_head * config.head_dim
        kept = [unit + ve * config.has_value_embed(layer) for layer in range(config.n_layer)]
    base = gathered + sum(kept) + 3 * unit + 2 * unit * (4 if cpu else e) // e  # smear, the loss; inputs of two norms
    head = 4 * vocabulary * config.n_embd  # the head's gradient is made in fp32 in the forward pass
    chunks = -(-tokens // (256 if cpu else 4096))
    per_logit = {"triton": e, "compiled": 4 + 2 * e, "eager": 25}[kernels[1]] + (e if chunks > 1 else 0)
    cast = 0 if e == 4 else vocabulary * config.n_embd * e
    moments = (
        base + unit + head + cast + -(-tokens // chunks) * vocabulary * per_logit,  # the last chunk of the loss
        base + 2 * head,  # the head's gradient and it scaled
        base + again + head + (9 if model.compiled else 12) * unit,  # backward in the last block's MLP
    )
    stacks: Counter[tuple[int, ...]] = Counter()
    for p in model.blocks.parameters():
        stacks[tuple(p.shape)] += p.nbytes
    muon = max(n * (6 + 2 * min(shape) / max(shape) if e == 4 else 5.5) for shape, n in stacks.items())
    # AdamW begins, with the head; gradients of the blocks and of the embedding are left when Muon's turn comes
    left = gradients * (blocks + model.embed.weight.nbytes) / whole
    copies = 1 if w == 1 else 2 if cpu else 1 + 1 / w  # of gradients on their way; gloo makes one of its own
    update = max(copies * gradients + 12 * max(p.numel() for p in tables) / w, copies * left + muon / w)
    return parameters + state + int(max(max(moments) + (gradients if times > 1 else 0), update))


def free_memory(device: torch.device) -> int:
    """Bytes that this process may still take: of a GPU, or a rank's part of what machine and control groups have."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    room = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), *_group_memory()]
    if available := re.search(r"MemAvailable:\s+(\d+) kB", read_if_there("/proc/meminfo")):
        room.append(int(available[1]) * 1024)
    return min(room) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def _group_memory() -> Iterator[int]:
    """Bytes left in this process's control groups with a limit, where pages of files make room when it is needed."""
    for line in read_if_there("/proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        group = Path("/sys/fs/cgroup", controllers, path.strip("/"))
        for folder in (group, *group.parents) if controllers in ("", "memory") else ():
            limit = read_if_there(folder / ("memory.limit_in_bytes" if controllers else "memory.max")).strip()
            used = re.search(r"^(?:anon|total_rss) (\d+)", read_if_there(folder / "memory.stat"), re.MULTILINE)
            if limit.isdigit() and used:
                yield max(0, int(limit) - int(used[1]))


@dataclass(frozen=True)
class Plan:
    """How a device takes its share of a step: rows at once, how many times, kernels, bytes needed and to be had."""

    rows: int
    accumulation: int
    checkpointing: bool
    kernels: tuple[str, str]  # attention, loss
    peak: int
    free: int


def plan(model: GPT, share: int, wanted: int | str | None, checkpointing: bool | None, compute: Compute) -> Plan:
    """How each rank takes its `share` of a step's rows.

    wanted: rows at once; "auto": the most that divide the share and fit into memory; None: auto on CUDA, elsewhere the
    most up to 32. checkpointing: None = where nothing fits without. ValueError says what would fit where no row does.
    """
    config, device, T = model.config, compute.device, model.config.sequence_len
    attend = attention.choose(device, model.dtype, config.head_dim, min(config.windows) < T)
    kernels = (attend[0], loss.choose(device, model.dtype, model.compiled)[0])
    free = torch.tensor(free_memory(device) + sum(sharding.local(p).nbytes for p in model.parameters()), device=device)
    if compute.world_size > 1:
        dist.all_reduce(free, dist.ReduceOp.MIN)  # all ranks must choose the same

    def candidate(rows: int, again: bool, of: GPT = model) -> Plan:
        times = max(1, share // rows)
        peak = peak_bytes(of, rows, kernels, again, times, compute.world_size)
        return Plan(rows, times, again, kernels, peak, int(_USABLE.get(device.type, 0.7) * free))

    numbers = [n for n in range(share, 0, -1) if share % n == 0]
    auto = wanted == "auto" or (wanted is None and device.type == "cuda")
    if not auto:
        numbers = [int(wanted or next(n for n in numbers if n <= 32))]
    options = (False, True) if checkpointing is None else (checkpointing,)
    plans = [candidate(rows, again) for again in options for rows in numbers]
    best = next((p for p in plans if p.peak <= p.free), plans[-1])
    if best.peak <= best.free or not auto:
        return best

    def fits(**fields) -> bool:
        with torch.device("meta"), contextlib.suppress(ValueError):  # not every depth makes a model
            smaller = GPT(replace(config, **fields), model.dtype, model.embed.weight.dtype)
            smaller.compiled = model.compiled
            return candidate(1, options[-1], smaller).peak <= best.free
        return False

    L, H, D = config.n_layer, config.n_head, config.head_dim
    heads = {n: -(-H * n // L) for n in range(L - 1, 0, -1)}  # as the recipe has it
    depths = (n for n, h in heads.items() if fits(n_layer=n, n_head=h, n_kv_head=h, n_embd=h * D))
    lengths = (T >> n for n in range(1, 12) if fits(sequence_len=T >> n))
    found = {"--depth": next(depths, None), "--max-seq-len": next(lengths, None)}
    remedies = [f"{flag} {value}" for flag, value in found.items() if value] or ["a smaller vocabulary"]
    raise ValueError(
        f"one row of {T} tokens needs {best.peak / 1e9:.2f} GB with{'' if best.checkpointing else 'out'} activation "
        f"checkpointing, {best.free / 1e9:.2f} GB are to be had: {' or '.join(remedies)} would fit"
    )


def _gemm_rate(compute: Compute) -> float:
    """FLOP/s of a product of large random matrices in the compute dtype."""
    n = 4096 if compute.device.type == "cuda" else 1024
    a, b = torch.randn(2, n, n, device=compute.device).to(compute.dtype)
    seconds = []
    for _ in range(4):
        began = time.perf_counter()
        a @ b
        compute.synchronize()
        seconds.append(time.perf_counter() - began)
    return 2 * n**3 / min(seconds)


def announce(title: str, model: GPT, plan: Plan, compute: Compute, steps: int, batch: int, price: float | None) -> None:
    """Say what a run of `steps` steps of `batch` tokens is, how it runs, and what it is expected to take.

    Time follows from the GPU's data sheet, or where it is unknown from a matrix product measured here, and from an
    assumed share of that. price: dollars an hour of all machines together.
    """
    if compute.rank:
        return
    flops, fp8 = model.flops_per_token(), any(block.mlp.up.fp8 for block in model.blocks)
    rate, source = (compute.peak_flops, "its peak") if compute.peak_flops else (_gemm_rate(compute), "measured now")
    hours = steps * batch * flops / (rate * _ASSUMED_MFU * compute.world_size) / 3600
    how = ("compiled" if model.compiled else "eager") + ", fp8" * fp8 + ", activations made again" * plan.checkpointing
    print0(
        f"{title}: {sum(p.numel() for p in model.parameters()):,} parameters, {flops / 1e6:,.1f} MFLOPs a token, "
        f"{compute.world_size} x {compute.name}, {compute.dtype}; {steps} steps of {batch:,} tokens = {steps * batch:,}"
        f"\n  {plan.accumulation} x {plan.rows} rows a step and device, attention {plan.kernels[0]}, "
        f"loss {plan.kernels[1]}, {how}; memory: {plan.peak / 1e9:.2f} GB expected, {plan.free / 1e9:.2f} GB to be had"
        f"\n  about {f'{hours:.1f} h' if hours >= 1 else f'{hours * 60:.1f} min'}"
        f"{'' if price is None else f' and ${hours * price:,.2f}'}, "
        f"if it reaches {_ASSUMED_MFU:.0%} of {rate / 1e12:.3g} TFLOP/s ({source})"
    )
