"""Parts 3 and 5 of dev/gpu_check.py: steps of training, ours and the reference's in turns, and what must not matter.

Both sides begin with equal weights, and train on equal ids at equal rates, so that their losses can be compared, too.
The reference runs in a process of its own (dev/reference.py), and both stay on the GPU: A B A B, so that a GPU that
grows warm favours none.
"""

import collections
import contextlib
import functools
import itertools
import statistics
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dev.compare import SCALAR_EPS, reference_weights
from dev.gpu_bench import Bench, Check, Row, Stopped
from dev.gpu_kernels import relative_error
from dev.reference import PeerSide
from dev.train_clock import Batch, Trainable, busy_milliseconds, facts, measure
from nanochat import fp8
from nanochat.dataloader import RowLoader
from nanochat.gpt import GPT, GPTConfig, build_model
from nanochat.kernels import Kernels
from nanochat.optim import MuonAdamW
from nanochat.recipe import LEARNING_RATES
from nanochat.token_shards import PackedRows, write_rows

WEIGHT_DECAY = 0.1
MOMENTUM = 0.9


def training(bench: Bench) -> list[Check]:
    """List the checks of part 3."""
    return [
        Check("training in bf16", functools.partial(in_turns, in_fp8=False)),
        Check("training in fp8", functools.partial(in_turns, in_fp8=True)),
    ]


def equalities(bench: Bench) -> list[Check]:
    """List the checks of part 5."""
    return [
        Check("loader under compute", loader_under_compute),
        Check("accumulation and recomputation", equal_gradients),
    ]


# --- our side


def make_model(bench: Bench, config: GPTConfig, in_fp8: bool) -> GPT:
    """Build a model as base_train does, with weights nowhere zero: else the first gradients are rounding noise."""
    if in_fp8 and not bench.on_gpu:
        # build_model takes fp8 for GPUs alone; on a CPU it works, too slowly for anything but a rehearsal.
        kernels = Kernels(loss="fp8", fp8=True, loss_sum=fp8.fp8_loss_sum)
        model = GPT(config, bench.compute.dtype, kernels=kernels)
    else:
        model = build_model(config, bench.device, train=True, compiled=bench.on_gpu, fp8=in_fp8)
    generator = torch.Generator(bench.device).manual_seed(0)
    model.init_weights(generator)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if name.endswith(("attn.out.weight", "mlp.down.weight", "head.weight")):
                value.uniform_(-0.02, 0.02, generator=generator)
    return model.train()


def make_side(bench: Bench, model: GPT) -> Trainable:
    """Return a model with its optimizer, as base_train makes it."""
    optimizer = MuonAdamW(model, LEARNING_RATES, WEIGHT_DECAY, bench.compute, compiled=bench.on_gpu)
    counted = itertools.count()
    return Trainable(
        device=bench.device,
        kernels=", ".join(model.kernels.names),
        forward=model,
        update=lambda: optimizer.step(next(counted), momentum=MOMENTUM),
        around=functools.partial(fp8.weights_quantised, model),
    )


def make_batch(bench: Bench, config: GPTConfig, rows: int) -> list[Batch]:
    """Return the micro-batches of a step, of ids that can be learned: each is 0 to 15 above the one before it."""
    generator = torch.Generator().manual_seed(0)
    shape = (bench.sizes.micro_batches, rows, config.sequence_len + 1)
    ids = torch.randint(16, shape, generator=generator).cumsum(-1) % config.vocab_size
    ids = ids.to(bench.device)
    return [(part[:, :-1].contiguous(), part[:, 1:].contiguous()) for part in ids]


# --- 3. ours and the reference


class OurSide:
    """Our model, to be asked as a PeerSide is: numbers of steps, or 0 for the time that the GPU is busy in a step."""

    def __init__(self, side: Trainable, batch: list[Batch]) -> None:
        self.side = side
        self.batches = itertools.repeat(batch)
        self.asked: collections.deque[int] = collections.deque()

    def send(self, steps: int) -> None:
        self.asked.append(steps)

    def receive(self) -> dict[str, Any]:
        steps = self.asked.popleft()
        if not steps:
            return {"busy ms": busy_milliseconds(self.side, self.batches)}
        return {**measure(self.side, self.batches, steps), **facts(self.side)}


def start_reference(bench: Bench, model: GPT, batch: list[Batch], in_fp8: bool) -> PeerSide:
    """Start the reference with the weights, ids, rates and momentum of our side."""
    config = model.config
    start = bench.folder / "start.pt"
    ids = bench.folder / "batch.pt"
    weights = {name: value.detach().cpu() for name, value in model.named_parameters()}
    torch.save(reference_weights(weights, config.head_dim), start)
    torch.save([(idx_BT.cpu(), targets_BT.cpu()) for idx_BT, targets_BT in batch], ids)
    names = ("sequence_len", "vocab_size", "n_layer", "n_head", "n_kv_head", "n_embd", "window_pattern")
    rates = {f"{name}_lr": rate for name, rate in LEARNING_RATES.items()}
    given = {
        "shape": {name: getattr(config, name) for name in names},
        "start": str(start),
        "batch": str(ids),
        "rates": {**rates, "weight_decay": WEIGHT_DECAY},
        "momentum": MOMENTUM,
        "scalars": [0.4 * LEARNING_RATES["scalar"], SCALAR_EPS],
        "device": str(bench.device),
        "fp8": in_fp8 and bench.on_gpu,  # on a CPU its fp8 would be all that the rehearsal waits for
        "compile": bench.on_gpu,
    }
    dtype = str(bench.compute.dtype).removeprefix("torch.")
    return PeerSide("steps", dtype, str(bench.reference), given)


def in_turns(bench: Bench, in_fp8: bool) -> Iterator[Row]:
    """Measure steps of training, in turns with the reference where it was given; yield a row for each side."""
    sizes = bench.sizes
    config = sizes.model(sizes.fp8_depth if in_fp8 else sizes.depth)
    rows = sizes.fp8_rows if in_fp8 else sizes.rows
    model = make_model(bench, config, in_fp8)
    batch = make_batch(bench, config, rows)
    tokens = sizes.micro_batches * rows * config.sequence_len
    what = f"d{config.n_layer} {'fp8' if in_fp8 else 'bf16'}"
    sides: dict[str, OurSide | PeerSide] = {"ours": OurSide(make_side(bench, model), batch)}
    answers: dict[str, list[dict[str, Any]]] = {"ours": [], "reference": []}

    def summaries() -> Iterator[Row]:
        for name, found in answers.items():
            if found:
                yield {"row": f"{what}, {name}", **training_row(bench, tokens, model.flops_per_token(), found)}

    with contextlib.ExitStack() as at_end:
        if bench.reference is not None:
            peer = start_reference(bench, model, batch, in_fp8)
            at_end.callback(peer.close)
            sides["reference"] = peer
        try:
            for side in sides.values():
                side.send(sizes.warmup)  # both compile at the same time
            for name, side in sides.items():
                answers[name].append(answer(side))
            for steps in [sizes.steps] * sizes.rounds + [0]:
                for name, side in sides.items():
                    side.send(steps)
                    answers[name].append(answer(side))
        except Stopped:
            yield from summaries()  # of what there was time for
            raise
        yield from summaries()


def answer(side: OurSide | PeerSide) -> dict[str, Any]:
    """Return a side's answer. If the reference fails, its error is the answer, and our side goes on."""
    try:
        return side.receive()
    except ValueError as error:
        return {"failed": str(error)}


def training_row(bench: Bench, tokens: int, flops: int, answers: list[dict[str, Any]]) -> Row:
    """Sum up the answers of one side: the warmup, some turns, and at last the time that the GPU is busy.

    tokens: of a step. flops: of a token, by our count for both sides.
    """
    failed = [found["failed"] for found in answers if "failed" in found]
    turns = [found for found in answers[1:] if "ms" in found]
    if failed or not turns:
        return {"failed": failed[0] if failed else "no time for more than the warmup"}
    warmup = answers[0]
    busy = answers[-1].get("busy ms")

    def median(name: str) -> float:
        return statistics.median(turn[name] for turn in turns)

    ms = median("ms")
    rate = tokens * flops / ms * 1e3
    peak = bench.compute.peak_flops
    n_bytes = turns[-1]["peak bytes"]
    return {
        "ms": ms,
        "tokens/s": tokens / ms * 1e3,
        "share": bench.share("bf16", rate),
        "MFU": None if peak is None else rate / peak,
        "forward ms": median("forward ms"),
        "backward ms": median("backward ms"),
        "optimizer ms": median("optimizer ms"),
        "idle share": None if busy is None else max(0.0, 1 - busy / ms),
        "graphs": warmup["graphs"],
        "recompiled": turns[-1]["graphs"] - warmup["graphs"],
        "peak GB": None if n_bytes is None else n_bytes / 1e9,
        "first loss": warmup["losses"][0],
        "last loss": turns[-1]["losses"][-1],
        "kernels": turns[-1]["kernels"],
    }


# --- 5. what must not matter


def loader_under_compute(bench: Bench) -> list[Row]:
    """Train on rows that are read from disk meanwhile, and on one batch that stays on the GPU: does the GPU wait?"""
    sizes = bench.sizes
    config = sizes.model(sizes.depth)
    T = config.sequence_len
    step_rows = sizes.micro_batches * sizes.rows
    ids = np.random.default_rng(0).integers(1, sizes.vocab_size, 4 * step_rows * T, dtype=np.uint16)
    documents = [(part, None) for part in np.array_split(ids, len(ids) // 64)]
    write_rows(bench.folder, documents, T + 1, np.dtype("uint16"), bos=0)
    rows = PackedRows([bench.folder / "rows"], T, 1)
    loader = RowLoader(rows, step_rows, sizes.rows, seed=0, device=bench.device)

    side = make_side(bench, make_model(bench, config, in_fp8=False))
    still = itertools.repeat(make_batch(bench, config, sizes.rows))
    measure(side, still, sizes.warmup)
    turns = []
    with contextlib.closing(loader.iterate()) as steps:
        moving = (micro_batches for _, micro_batches in steps)
        measure(side, moving, 1)
        for _ in range(sizes.rounds):
            turns.append((measure(side, still, sizes.steps), measure(side, moving, sizes.steps)))
    without = statistics.median(turn["ms"] for turn, _ in turns)
    loading = statistics.median(turn["ms"] for _, turn in turns)
    return [
        {
            "ms": loading,
            "without loader ms": without,
            "longer by": loading / without - 1,
            "rows ms": statistics.median(turn["rows ms"] for _, turn in turns),
        }
    ]


def equal_gradients(bench: Bench) -> list[Row]:
    """Compare loss and gradients of rows at once with those of two halves, and of activations that are recomputed."""
    sizes = bench.sizes
    config = sizes.model(sizes.depth)
    model = make_model(bench, config, in_fp8=False)
    idx_BT, targets_BT = make_batch(bench, config, sizes.rows)[0]

    def loss_and_gradients(at_once: int, recompute: bool) -> tuple[float, Tensor]:
        total = 0.0
        for idx, targets in zip(idx_BT.split(at_once), targets_BT.split(at_once)):
            loss = model(idx, targets, loss_reduction="sum", recompute=recompute) / targets_BT.numel()
            loss.backward()
            total += loss.item()
        gradients = [parameter.grad.float().flatten() for parameter in model.parameters()]
        model.zero_grad(set_to_none=True)
        return total, torch.cat(gradients)

    loss, gradient = loss_and_gradients(sizes.rows, recompute=False)
    rows = []
    for name, at_once, recompute in (("accumulation", sizes.rows // 2, False), ("recomputation", sizes.rows, True)):
        other_loss, other_gradient = loss_and_gradients(at_once, recompute)
        row = {
            "row": f"{name} against rows at once",
            "error": abs(other_loss - loss) / loss,
            "gradient error": relative_error(other_gradient, gradient),
        }
        rows.append(row)
    return rows
