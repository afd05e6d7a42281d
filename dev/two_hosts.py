"""Two hosts on one machine, network namespaces joined by a cable, train one model; one is lost: python -m dev.two_hosts

Started by dev/hosts.sh, as on real hosts. Counts the bytes that a host sends a step and compares them with the formula
of dev/theory.md; then pulls the cable (or kills the second host), and waits for the first to go on by itself from the
last checkpoint and reach the end with the losses of a run on one process. Needs root and iproute2.
"""

import contextlib
import dataclasses
import json
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from dev import bench_old as bench
from dev.crash_test import RUN, SHAPE, make_world
from nanochat import checkpoint, cli
from nanochat.common import get_base_dir, print0
from nanochat.compute import Compute
from nanochat.gpt import GPT, GPTConfig
from nanochat.optim import MuonAdamW
from nanochat.recipe import LEARNING_RATES

ROOT = Path(__file__).resolve().parent.parent
ADDRESSES = ("10.77.0.1", "10.77.0.2")
CARD = "cable0"


@dataclass(frozen=True)
class Config:
    """Flags of the proof."""

    steps: int = cli.option(160, "steps of the run")
    count_from: int = cli.option(10, "step at which bytes begin to be counted")
    count_to: int = cli.option(130, "step at which the counting ends; the second host is lost after it")
    save_every: int = cli.option(10, "steps between checkpoints")
    loss: str = cli.option("cable", "cable: the link goes down; host: every process there is killed", ("cable", "host"))
    timeout: int = cli.option(5, "seconds that a process waits for another before it takes it for dead")
    limit: int = cli.option(600, "seconds after which the whole is given up")
    out: str | None = cli.option(None, "record to write, without suffix; unset = bench/two_hosts in the base directory")

    def __post_init__(self) -> None:
        if not 0 < self.count_from < self.count_to < self.steps:
            raise ValueError("--count-from, --count-to and --steps must rise in this order, from 1 on")


def ip(*words: str) -> None:
    """Run iproute2's `ip`; what it refuses raises ValueError."""
    result = subprocess.run(["ip", *words], capture_output=True, text=True)
    if result.returncode:
        raise ValueError(f"ip {' '.join(words)}: {result.stderr.strip()}")


def obstacle() -> str | None:
    """Why two hosts cannot be made here; None when they can."""
    if sys.platform != "linux" or shutil.which("ip") is None:
        return "needs Linux and iproute2"
    name = f"nanochat-try-{os.getpid()}"
    try:
        ip("netns", "add", name)
        ip("netns", "del", name)
    except ValueError as error:
        return str(error)
    return None


def processes(host: str) -> list[int]:
    """The processes on a host."""
    out = subprocess.run(["ip", "netns", "pids", host], capture_output=True, text=True).stdout
    return [int(pid) for pid in out.split()]


@contextlib.contextmanager
def two_hosts() -> Iterator[tuple[str, str]]:
    """Names of two network namespaces with the addresses above, joined by a pair of veth cards; gone afterwards."""
    hosts = (f"nanochat-a-{os.getpid()}", f"nanochat-b-{os.getpid()}")
    try:
        for host in hosts:
            ip("netns", "add", host)
            ip("-n", host, "link", "set", "lo", "up")
        ip("-n", hosts[0], "link", "add", CARD, "type", "veth", "peer", "name", CARD, "netns", hosts[1])
        for host, address in zip(hosts, ADDRESSES, strict=True):
            ip("-n", host, "address", "add", f"{address}/24", "dev", CARD)
            ip("-n", host, "link", "set", CARD, "up")
        yield hosts
    finally:
        for host in hosts:
            for pid in processes(host):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            subprocess.run(["ip", "netns", "del", host], capture_output=True)


def bytes_sent(host: str) -> int:
    """Bytes that a host's card has sent so far."""
    table = Path(f"/proc/{processes(host)[0]}/net/dev").read_text()
    return int(table.split(f"{CARD}:")[1].split()[8])


def losses(tag: str) -> dict[int, float]:
    """Loss by step of what is in the run's metrics so far."""
    path = get_base_dir() / "runs" / "base" / tag / "metrics.jsonl"
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return {line["step"]: line["loss"] for line in map(json.loads, lines) if "loss" in line}


def start(hosts: tuple[str, str], folder: Path, log: Path, argv: list[str], config: Config) -> subprocess.Popen:
    """The job on both hosts; its output goes to `log`."""
    run_on = folder / "run_on"
    run_on.write_text('#!/bin/sh\nexec ip netns exec "$1" bash -c "$2"\n')
    run_on.chmod(0o755)
    named = " ".join(f"{host}={address}" for host, address in zip(hosts, ADDRESSES, strict=True))
    settings = {
        "RUN_ON": str(run_on),
        "PROCS": "1",
        "GLOO_SOCKET_IFNAME": CARD,
        "NANOCHAT_TIMEOUT": str(config.timeout),
    }
    settings["RDZV_CONF"] = "last_call_timeout=8,keep_alive_interval=1,keep_alive_max_attempt=3,read_timeout=5"
    with open(log, "wb") as file:
        command = ["bash", str(ROOT / "dev" / "hosts.sh"), named, *argv]
        return subprocess.Popen(command, cwd=ROOT, env={**os.environ, **settings}, stdout=file, stderr=file)


def count(hosts: tuple[str, str], config: Config, wait: Callable[[Callable[[], bool]], None]) -> list[float]:
    """Bytes that each host sends a step: the slope of the line through what was sent at every step seen.

    A reading is taken anywhere between two steps' edges, so the steps must be many. What the agents send a second to
    know each other alive is in it: some 3 KB, under 1 % of a step that takes less than a second.
    """
    wait(lambda: max(losses("two"), default=0) >= config.count_from)
    steps, sent = [], []
    while not steps or steps[-1] < config.count_to:
        wait(lambda after=steps[-1] if steps else 0: max(losses("two")) > after)
        steps.append(max(losses("two")))
        sent.append([bytes_sent(host) for host in hosts])
    if len(list(checkpoint.checkpoint_dir("base", "two").glob("*/optim.001.safetensors"))) == 0:
        raise ValueError("the second host came too late to take part: try again on a machine less busy")
    return [statistics.linear_regression(steps, host).slope for host in zip(*sent, strict=True)]


def formula(ranks: int) -> float:
    """Bytes that a rank sends a step by the optimizer's own account."""
    step = checkpoint.list_steps("base", "two")[-1]
    config = GPTConfig.from_dict(checkpoint.read_meta("base", "two", step)["model_config"])
    with torch.device("meta"):
        model = GPT(config, torch.float32)
    compute = Compute(torch.device("cpu"), torch.float32, 0, ranks)
    return MuonAdamW(model, LEARNING_RATES, 0.0, compute).traffic()[1]


def lose(host: str, how: str) -> None:
    """Cut a host off."""
    if how == "cable":
        ip("-n", host, "link", "set", CARD, "down")
    else:
        for pid in processes(host):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def main() -> None:
    config = cli.parse(Config, description=__doc__)
    if reason := obstacle():
        raise ValueError(f"two hosts cannot be made here: {reason}")
    out = Path(config.out or get_base_dir() / "bench" / "two_hosts")
    log = out.with_name(out.name + ".log")
    log.parent.mkdir(parents=True, exist_ok=True)
    os.environ |= {"NANOCHAT_DTYPE": "float32", "OMP_NUM_THREADS": "1"}
    argv = ["-m", "scripts.base_train", "--dataset=corpus", *SHAPE, *RUN, f"--num-iterations={config.steps}"]
    argv += [f"--save-every={config.save_every}", "--eval-every=0", "--model-tag"]
    with tempfile.TemporaryDirectory(prefix="nanochat-hosts-") as temporary, two_hosts() as hosts:
        folder, deadline = Path(temporary), time.monotonic() + config.limit
        make_world(folder)
        job = start(hosts, folder, log, [*argv, "two"], config)

        def wait(condition: Callable[[], bool]) -> None:
            while not condition():
                if job.poll() is not None or time.monotonic() > deadline:
                    raise ValueError(f"the job ended too soon, or hangs: see {log}")
                time.sleep(0.02)

        try:
            print0("two hosts train")
            per_step = count(hosts, config, wait)
            at, lost = max(losses("two")), time.monotonic()
            print0(f"step {at}: {hosts[1]} is lost ({config.loss})")
            said = log.stat().st_size
            lose(hosts[1], config.loss)
            wait(lambda: b"resumed base/two at step" in log.read_bytes()[said:])
            resumed = int(re.findall(rb"resumed base/two at step (\d+)", log.read_bytes()[said:])[0])
            print0(f"{hosts[0]} goes on alone from step {resumed}, {time.monotonic() - lost:.0f} s later")
            wait(lambda: max(losses("two"), default=0) > at)
            downtime = time.monotonic() - lost
            job.wait(max(1.0, deadline - time.monotonic()))
        finally:
            job.terminate()
        if job.returncode:
            raise ValueError(f"the job failed: see {log}")
        expected = formula(2)
        subprocess.run([sys.executable, *argv, "one"], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
        one, two = losses("one"), losses("two")
    apart = max(abs(one[step] - two[step]) for step in one)
    row = {
        "lost": config.loss,
        "bytes a step, first host": per_step[0],
        "second host": per_step[1],
        "formula": expected,
        "lost at step": at,
        "resumed at": resumed,
        "seconds between": downtime,
        "largest difference of a loss": apart,
    }
    page = f"# Two hosts, one of them lost\n\nTwo network namespaces on one machine.\n\n{bench.markdown_table([row])}"
    bench.write_report(out, {"config": dataclasses.asdict(config), **row}, page)
    if one.keys() != two.keys() or not apart < 1e-4:
        raise ValueError(f"the losses differ from one process's by {apart}")


if __name__ == "__main__":
    cli.run(main)
