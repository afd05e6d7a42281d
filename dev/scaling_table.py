"""Speed on 64 and 1,024 GPUs, extrapolated from one device's speed and counted bytes: python -m dev.scaling_table

A model of two lines, printed with the table: a step computes for as long as one device takes for its tokens, and sends
what dev/theory.md says over its link. Reducing hides behind the backward pass (two thirds of the computing), gathering
does not. Nothing here is measured on more than one device.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch

from dev import bench_old as bench
from nanochat import cli, recipe
from nanochat.common import get_base_dir
from nanochat.compute import Compute, peak_flops
from nanochat.gpt import GPT
from nanochat.optim import MuonAdamW

BACKWARD = 2 / 3  # of a step's FLOPs: two products a matrix there, one in the forward pass


@dataclass(frozen=True)
class Config:
    """Flags of the table."""

    depth: int = cli.option(24, "depth of the model")
    vocab_size: int = cli.option(32768, "its vocabulary")
    batch: int = cli.option(2**20, "tokens a step over all devices")
    devices: str = cli.option("1,8,64,1024", "numbers of devices, by commas")
    tokens_per_second: float | None = cli.option(None, "measured on one device; unset = assumed from --gpu and --mfu")
    gpu: str = cli.option("H100", "device whose peak is assumed when no speed was measured")
    mfu: float = cli.option(0.5, "share of that peak assumed")
    node: int = cli.option(8, "devices that the fast links join")
    fast: float = cli.option(300.0, "GB/s that a device sends inside a node")
    slow: float = cli.option(50.0, "GB/s that a device sends between nodes")
    latency: float = cli.option(10.0, "microseconds a message takes at each doubling of the devices")
    out: str | None = cli.option(None, "record to write, without suffix; unset = bench/scaling in the base directory")

    def __post_init__(self) -> None:
        if not all(n.isdigit() and int(n) for n in self.devices.split(",")):
            raise ValueError(f"--devices {self.devices}: give whole numbers above 0, by commas")
        if min(self.fast, self.slow, self.mfu, self.batch, self.node, self.tokens_per_second or 1) <= 0:
            raise ValueError("--fast, --slow, --mfu, --batch, --node and --tokens-per-second must be above 0")
        if self.tokens_per_second is None and peak_flops(self.gpu) is None:
            raise ValueError(f"--gpu {self.gpu}: unknown; give its speed as --tokens-per-second")


def optimizer(model: GPT, devices: int) -> MuonAdamW:
    """The optimizer of one among so many ranks, to ask what it would send."""
    return MuonAdamW(model, recipe.LEARNING_RATES, 0.0, Compute(torch.device("cpu"), torch.float32, 0, devices))


def row(config: Config, speed: float, devices: int, sent: float, messages: int) -> dict[str, Any]:
    """A line of the table: seconds of a step's parts, tokens/s and efficiency, for `sent` bytes in `messages`."""
    link = (config.fast if devices <= config.node else config.slow) * 1e9
    wait = messages * (devices - 1).bit_length() * config.latency * 1e-6
    computing = config.batch / devices / speed
    each_way = sent / 2 / link + wait
    step = max(computing, computing * (1 - BACKWARD) + each_way) + each_way
    plain = computing + 2 * each_way
    return {
        "devices": devices,
        "tokens a device": config.batch // devices,
        "GB sent a step": sent / 1e9,
        "computing, ms": computing * 1e3,
        "sending, ms": 2e3 * each_way,
        "tokens/s": config.batch / step,
        "efficiency": computing / step,
        "without overlap": computing / plain,
    }


def main() -> None:
    config = cli.parse(Config, description=__doc__)
    with torch.device("meta"):
        shape = recipe.model_config(config.depth, config.vocab_size, 2048, 64, 128)
        model = GPT(shape, torch.bfloat16)
    speed, source = config.tokens_per_second, "measured on one device"
    if speed is None:
        speed = peak_flops(config.gpu) * config.mfu / model.flops_per_token()
        source = f"NOT MEASURED: assumed, {config.mfu:.0%} of the peak of {config.gpu}"
    rows = []
    for devices in map(int, config.devices.split(",")):
        messages, sent = optimizer(model, devices).traffic()
        rows.append(row(config, speed, devices, sent, messages))
    page = (
        f"# d{config.depth} on more devices, extrapolated\n\n{sum(map(torch.numel, model.parameters())):,} parameters; "
        f"{config.batch:,} tokens a step; ZeRO-2.\n\n"
        f"* Speed of a device: {speed:,.0f} tokens/s ({source}).\n"
        f"* Bytes: `MuonAdamW.traffic()`, counted in tests/test_scale_out.py.\n"
        f"* Links (assumed, not measured): {config.fast:g} GB/s a device up to {config.node} devices, "
        f"{config.slow:g} GB/s beyond, {config.latency:g} us a message and doubling.\n"
        "* Reducing hides behind the backward pass, gathering does not; the optimizer's own time is left out.\n\n"
    )
    record = {"config": dataclasses.asdict(config), "tokens_per_second": speed, "source": source, "rows": rows}
    out = config.out or get_base_dir() / "bench" / "scaling"
    bench.write_report(out, record, page + bench.markdown_table(rows))


if __name__ == "__main__":
    cli.run(main)
