"""Chat in the browser, and the OpenAI API: `python -m scripts.chat_web`, then open the address it prints."""

import logging
import os
import signal
import threading
from dataclasses import dataclass

from nanochat import cli
from nanochat.checkpoint import load_model
from nanochat.cli import option
from nanochat.compute import Compute
from nanochat.engine import Engine
from nanochat.server import create_app, drain, make_server
from nanochat.service import ServerConfig


@dataclass(frozen=True)
class Config(ServerConfig):
    """What to serve, and where."""

    host: str = option("127.0.0.1", "address to listen on; 0.0.0.0 lets other machines in: see --api-keys")
    port: int = option(8000, "port to listen on; 0 takes any free one")
    stage: str = option("sft", "training stage of the model", choices=("base", "mid", "sft", "rl"))
    model_tag: str | None = option(None, "which model of that stage; unset: the newest")
    step: int | None = option(None, "which step; unset: the last")
    max_batch: int = option(32, "answers made at the same time; further ones wait")
    int8: bool = option(False, "weights of a model of this project in 8 bits, on CPU")
    drain_seconds: float = option(30.0, "at SIGTERM, how long answers that were begun may take to end")
    access_log: bool = option(True, "a line of JSON on stderr for each request, without what was said")
    device_type: str | None = option(None, "cuda, mps or cpu; unset: the best there is")


def main() -> None:
    """Load a model and serve it until Ctrl-C, or until SIGTERM and the end of what was begun."""
    config = cli.parse(Config, description=__doc__)
    compute = Compute.create(config.device_type)
    model, tokenizer, meta = load_model(config.stage, compute.device, config.model_tag, config.step)
    engine = Engine(model, tokenizer, config.max_batch, int8=config.int8)
    app = create_app(engine, f"nanochat-{meta['stage']}-{meta['tag']}", config)
    server, loop = make_server(app, config.host, config.port), app.extensions["engine_loop"]
    logging.basicConfig(format="%(message)s")
    logging.getLogger("nanochat.access").setLevel(logging.INFO if config.access_log else logging.WARNING)

    def wait_and_end() -> None:
        if not drain(server, loop, config.drain_seconds):
            logging.warning("answers were cut off after %g seconds", config.drain_seconds)
            loop.close()
            drain(server, loop, 1.0)  # their readers are told
        os.kill(os.getpid(), signal.SIGINT)

    def begin_to_end(signum: int, frame: object) -> None:
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # who cannot wait says it twice
        threading.Thread(target=wait_and_end, daemon=True).start()

    signal.signal(signal.SIGTERM, begin_to_end)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # KeyboardInterrupt ends run(); also where it was ignored
    print(f"chat at http://{config.host}:{server.effective_port}  (Ctrl-C stops)", flush=True)
    server.run()
    loop.close()


if __name__ == "__main__":
    cli.run(main)
