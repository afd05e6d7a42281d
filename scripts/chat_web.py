"""Chat in the browser, and the OpenAI API: `python -m scripts.chat_web`, then open the address it prints.

`--model NAME` serves any model on this machine, and more than one when it is given several times.
"""

import contextlib
import logging
import os
import signal
import sys
import threading
from dataclasses import dataclass

from nanochat import cli, named_model
from nanochat.cli import option
from nanochat.compute import Compute
from nanochat.server import create_app, drain, make_server
from nanochat.service import Models, ServerConfig


@dataclass(frozen=True)
class Config(ServerConfig):
    """What to serve, and where."""

    host: str = option("127.0.0.1", "address to listen on; 0.0.0.0 lets other machines in: see --api-keys")
    port: int = option(8000, "port to listen on; 0 takes any free one")
    model: tuple[str, ...] | None = option(None, "a model by its name or folder; repeat the flag for more of them")
    stage: str = option("sft", "without --model: training stage of a model of your own", choices=named_model.STAGES)
    model_tag: str | None = option(None, "which model of that stage; unset: the newest")
    step: int | None = option(None, "which step; unset: the last")
    int8: bool = option(False, "weights of a model of this project in 8 bits, on CPU")
    drain_seconds: float = option(30.0, "at SIGTERM, how long answers that were begun may take to end")
    access_log: bool = option(True, "a line of JSON on stderr for each request, without what was said")
    device_type: str | None = option(None, "cuda, mps or cpu; unset: the best there is")
    devices: str | None = option(None, named_model.DEVICES)


def main() -> None:
    """Serve models until Ctrl-C, or until SIGTERM and the end of what was begun. The port is open while they load."""
    config = cli.parse(Config, description=__doc__)
    device = Compute.create(config.device_type).device
    names = config.model or ("/".join(filter(None, (config.stage, config.model_tag))),)
    found = named_model.find_all(names, device, config.step, lambda line: print(line, file=sys.stderr), config.devices)
    models = Models(config, [each.name for each in found])
    server = make_server(create_app(models), config.host, config.port)
    logging.basicConfig(format="%(message)s")
    logging.getLogger("nanochat.access").setLevel(logging.INFO if config.access_log else logging.WARNING)
    failures: list[Exception] = []

    def load() -> None:
        try:
            for each in found:
                models.add(each.name, *each.load(device, config.max_batch, config.int8))
            print(f"chat at http://{config.host}:{server.effective_port}  (Ctrl-C stops)", flush=True)
        except Exception as error:
            failures.append(error)
            os.kill(os.getpid(), signal.SIGINT)

    def wait_and_end() -> None:
        if not drain(server, models, config.drain_seconds):
            logging.warning("answers were cut off after %g seconds", config.drain_seconds)
            models.close()
            drain(server, models, 1.0)  # their readers are told
        os.kill(os.getpid(), signal.SIGINT)

    def begin_to_end(signum: int, frame: object) -> None:
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # who cannot wait says it twice
        threading.Thread(target=wait_and_end, daemon=True).start()

    signal.signal(signal.SIGTERM, begin_to_end)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # KeyboardInterrupt ends run(); also where it was ignored
    with contextlib.suppress(KeyboardInterrupt):  # before run() hears of it
        threading.Thread(target=load, daemon=True).start()
        server.run()
    models.close()
    if failures:
        raise failures[0]


if __name__ == "__main__":
    cli.run(main)
