"""Chat in the browser, and the OpenAI API: `python -m scripts.chat_web`, then open the address it prints.

`--model NAME` serves any model on this machine, and more than one when it is given several times.
"""

import contextlib
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from nanochat import cli
from nanochat.cli import option
from nanochat.common import STAGES
from nanochat.compute import Compute
from nanochat.hf import store
from nanochat.serve import replicas
from nanochat.serve.app import create_app, drain, make_server, read_api_keys
from nanochat.serve.service import Models, ServerConfig


@dataclass(frozen=True)
class Config(ServerConfig):
    """What to serve, and where."""

    host: str = option("127.0.0.1", "address to listen on; 0.0.0.0 lets other machines in: see --api-keys")
    port: int = option(8000, "port to listen on; 0 takes any free one")
    model: tuple[str, ...] | None = option(None, "a model by its name or folder; repeat the flag for more of them")
    stage: str = option("sft", "without --model: training stage of a model of your own", choices=STAGES)
    model_tag: str | None = option(None, "which model of that stage; unset: the newest")
    step: int | None = option(None, "which step; unset: the last")
    replicas: int | None = option(None, "servers, each with a GPU or its share of the cores, behind this address")
    int8: bool = option(False, "weights of a model of this project in 8 bits, on CPU")
    drain_seconds: float = option(30.0, "at SIGTERM, how long answers that were begun may take to end")
    access_log: bool = option(True, "a line of JSON on stderr for each request, without what was said")
    device_type: str | None = option(None, "cuda, mps or cpu; unset: the best there is")
    devices: str | None = option(None, store.DEVICES)


def here(config: Config, names: Sequence[str]) -> tuple[Any, Any, Callable[[], None]]:
    """(models, application, what loads them) of a server in this process."""
    device, number = Compute.create(config.device_type).device, os.environ.get(replicas.VARIABLE)
    who = f"replica {number}: " if number else ""
    found = store.find_all(names, device, config.step, config.devices)
    for each in found:
        print(f"{who}{each.placement}", file=sys.stderr)
    models = Models(config, [each.name for each in found])
    if number:
        threading.Thread(target=replicas.end_with_front, args=(models,), daemon=True).start()

    def load() -> None:
        for each in found:
            models.add(each.name, *each.load(device, config.max_batch, config.int8))

    return models, create_app(models), load


def in_replicas(config: Config, names: Sequence[str], n: int) -> tuple[Any, Any, Callable[[], None]]:
    """The same of n servers in processes of their own, which are told what this one was; else ValueError."""
    if config.devices:
        raise ValueError("--replicas gives each server a device of its own: leave --devices out")
    read_api_keys(config.api_keys)  # a mistake is told once, not by each of them
    n_models = len({store.find(name, config.step).name for name in names})
    command = [sys.executable, "-m", "scripts.chat_web", *sys.argv[1:], "--host", "127.0.0.1", "--port", "0"]
    most_open = n * n_models * (config.max_batch + config.max_waiting)
    servers = replicas.Replicas(command, replicas.environments(n, config.device_type), most_open)
    return servers, replicas.create_front(servers, config.max_body), servers.start


def main() -> None:
    """Serve models until Ctrl-C, or until SIGTERM and the end of what was begun. The port is open while they load."""
    config = cli.parse(Config, description=__doc__)
    cli.require_positive(config, "replicas")
    cli.require_positive(config, "port", "drain_seconds", zero=True)
    if config.port > 65535:  # the system would take what is left of it
        raise ValueError(f"--port {config.port}: must be 65535 at most")
    names = config.model or ("/".join(filter(None, (config.stage, config.model_tag))),)
    is_replica = replicas.VARIABLE in os.environ
    n, patience = 1 if is_replica else config.replicas or 1, config.drain_seconds
    models, app, load_all = here(config, names) if n == 1 else in_replicas(config, names, n)
    server = make_server(app, config.host, config.port, **replicas.TRUST if is_replica else {})
    logging.basicConfig(format="%(message)s")
    logging.getLogger("nanochat.access").setLevel(logging.INFO if config.access_log else logging.WARNING)
    failures: list[Exception] = []

    def load() -> None:
        try:
            load_all()
            print(f"chat at http://{config.host}:{server.effective_port}  (Ctrl-C stops)", flush=True)
        except Exception as error:
            failures.append(error)
            os.kill(os.getpid(), signal.SIGINT)

    def wait_and_end() -> None:
        if not drain(server, models, patience + 10 * (n > 1)):  # replicas keep to it themselves
            logging.warning("answers were cut off after %g seconds", patience)
            models.close()
            drain(server, models, 1.0)  # their readers are told
        os.kill(os.getpid(), signal.SIGINT)

    def begin_to_end(signum: int, frame: object) -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)  # who cannot wait says it twice, but
        # a replica hears it from systemd and from its front, which kills it if it must
        signal.signal(signal.SIGTERM, signal.SIG_IGN if is_replica else signal.default_int_handler)
        threading.Thread(target=wait_and_end, daemon=True).start()

    loader = threading.Thread(target=load, daemon=True)
    signal.signal(signal.SIGTERM, begin_to_end)
    # KeyboardInterrupt ends run(); also where it was ignored
    signal.signal(signal.SIGINT, signal.default_int_handler if n == 1 else begin_to_end)
    with contextlib.suppress(KeyboardInterrupt):  # before run() hears of it
        loader.start()
        server.run()
    models.close()
    if loader.is_alive():  # it may be deep inside torch, which a thread that is ended there takes the process with
        os._exit(0)
    if failures:
        raise failures[0]


if __name__ == "__main__":
    cli.run(main)
