"""Chat in the browser, and the OpenAI API: `python -m scripts.chat_web`, then open the address it prints.

`--model NAME` serves any model on this machine, and several of them when it is given several times. `--replicas N` runs
N engines of each model, one per GPU. The port is open while the models load; until then it answers 503.
"""

import contextlib
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from nanochat import cli
from nanochat.cli import option
from nanochat.common import STAGES
from nanochat.compute import Compute, usable_cores
from nanochat.engine import Engine
from nanochat.hf import store
from nanochat.serve.app import create_app_for, make_server
from nanochat.serve.loop import Models, ServerConfig


@dataclass(frozen=True)
class Config(ServerConfig):
    """What to serve, and where."""

    port: int = option(8000, "port to listen on; 0 takes any free one")
    model: tuple[str, ...] | None = option(None, "a model by its name or folder; repeat the flag for more of them")
    stage: str = option("sft", "without --model: training stage of a model of your own", choices=STAGES)
    model_tag: str | None = option(None, "which model of that stage; unset: the newest")
    step: int | None = option(None, "which step; unset: the last")
    replicas: int = option(1, "engines of each model: one per GPU, or each with its share of the cores")
    int8: bool = option(False, "weights of a model of this project in 8 bits, on CPU")
    drain_seconds: float = option(30.0, "at SIGTERM, how long answers that were begun may take to end")
    access_log: bool = option(True, "a line of JSON on stderr for each request, without what was said")
    device_type: str | None = option(None, "cuda, mps or cpu; unset: the best there is")
    devices: str | None = option(None, store.DEVICES)

    def __post_init__(self) -> None:
        """Raise ValueError for flags with which nothing could be served."""
        super().__post_init__()
        cli.require_positive(self, "replicas")
        cli.require_positive(self, "port", "drain_seconds", zero=True)
        if self.port > 65535:  # the system would take it modulo 65,536
            raise ValueError(f"--port {self.port}: must be 65535 at most")
        if self.replicas > 1 and self.devices:
            raise ValueError("--replicas gives each engine a device of its own: leave --devices out")


def replica_devices(n: int, device: torch.device) -> list[torch.device]:
    """Return the devices of n replicas: a GPU each, or the CPU, whose cores they share.

    Raises ValueError when there are fewer GPUs. On CPU this sets the number of threads that each engine computes with,
    unless $OMP_NUM_THREADS says it.
    """
    if n == 1:
        return [device]
    if device.type == "cpu":
        if "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(max(1, usable_cores() // n))
        return [device] * n
    n_gpus = torch.cuda.device_count()
    if n > n_gpus:
        raise ValueError(f"--replicas {n}: each takes a GPU of its own, and here are {n_gpus}: ask for fewer")
    return [torch.device("cuda", i) for i in range(n)]


def load_models(
    config: Config, found: Sequence[store.NamedModel], devices: Sequence[torch.device], models: Models
) -> None:
    """Load each model once per device and let it answer as soon as it is there."""
    for each in found:
        engines: list[Engine] = []
        for device in devices:
            # A replica has all of the model on its own device, whatever `find_all` planned for a single engine.
            one = replace(each, places=(device,)) if len(devices) > 1 else each
            engine, chat_format = one.load(device, config.max_batch, config.int8)
            engines.append(engine)
            if len(devices) > 1:
                print(f"{each.name}: replica {len(engines) - 1} is ready on {device}", file=sys.stderr)
        print(f"{each.name}: {kernels_of(engines[0])}", file=sys.stderr)
        models.add(each.name, engines, chat_format)
    if len(found) == 1:
        torch.set_num_threads(engines[0].threads)  # a small model gains nothing from a second thread


def kernels_of(engine: Engine) -> str:
    """Name what attends and what decodes, for the line at the start."""
    prefill = "PyTorch's fused kernel" if engine.model.device.type == "cuda" else "batched products"
    decoding = "operation by operation"
    if engine.graphs is not None:
        decoding = "replayed as CUDA graphs"
    elif engine.trace is not None:
        decoding = "replayed as a CPU trace"
    return f"attention by {prefill} in prefill and batched products in decoding, {decoding}"


def drain(server: Any, models: Models, seconds: float) -> bool:
    """Refuse new answers and wait until all that were begun are sent. Returns False if `seconds` were too short."""
    # The order matters. First no new answers, or there would be no end. Then the engines finish what they have begun.
    # Last the sockets: an answer that the engine has made may still lie in waitress' buffers, and a process that ended
    # now would cut it off.
    models.draining.set()
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        channels = list(server.active_channels.values())
        is_sending = any(channel.requests or channel.total_outbufs_len for channel in channels)
        if models.n_open == 0 and not is_sending:
            return True
        time.sleep(0.02)
    return False


class Terminated(BaseException):
    """SIGTERM has come. Not an Exception, so that nothing on the way takes it for an error of its own."""


def on_sigterm(signum: int, frame: object) -> None:
    """Raise Terminated in the main thread, once: a second SIGTERM ends the process as Ctrl-C does."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    raise Terminated


def main() -> None:
    """Serve models until Ctrl-C, or until SIGTERM and the end of the answers that were begun."""
    config = cli.parse(Config, description=__doc__)
    logging.basicConfig(format="%(message)s")
    logging.getLogger("nanochat.access").setLevel(logging.INFO if config.access_log else logging.WARNING)
    device = Compute.create(config.device_type).device
    devices = replica_devices(config.replicas, device)
    names = config.model or ("/".join(filter(None, (config.stage, config.model_tag))),)
    found = store.find_all(names, device, config.step, config.devices)
    for each in found:
        print(each.placement, file=sys.stderr)
    models = Models(config, [each.name for each in found], config.replicas)
    server = make_server(create_app_for(models), config.host, config.port)
    # On CPU, oneDNN compiles a product anew for each number of rows, half a megabyte of code a time, and keeps 1,024 of
    # them. The batches and prompts of a server have every number of rows, so it would grow by half a gigabyte. With 256
    # it is as fast (measured: dev/LOG.md). The second setting is that of PyTorch's own cache before oneDNN's.
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "256")
    os.environ.setdefault("LRU_CACHE_CAPACITY", "256")
    serving = threading.Thread(target=server.run, daemon=True)
    with contextlib.suppress(KeyboardInterrupt):
        try:
            signal.signal(signal.SIGTERM, on_sigterm)
            signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in a shell's background job
            serving.start()
            load_models(config, found, devices, models)
            print(f"chat at http://{config.host}:{server.effective_port}  (Ctrl-C stops)", flush=True)
            while serving.is_alive():
                serving.join(timeout=1)  # a signal is handled between two of these
        except Terminated:
            if not drain(server, models, config.drain_seconds):
                logging.warning("answers were cut off after %g seconds", config.drain_seconds)
                models.close()
                drain(server, models, 1.0)  # let the clients hear of it
    models.close()


if __name__ == "__main__":
    cli.run(main)
