"""Chat in the browser, and the OpenAI chat API: `python -m scripts.chat_web`, then open the address it prints."""

import signal
from dataclasses import dataclass

from nanochat import cli
from nanochat.checkpoint import load_model
from nanochat.cli import option
from nanochat.compute import Compute
from nanochat.engine import Engine
from nanochat.server import create_app, make_server


@dataclass(frozen=True)
class Config:
    """What to serve, and where."""

    host: str = option("127.0.0.1", "address to listen on; 0.0.0.0 lets other machines in, and there are no passwords")
    port: int = option(8000, "port to listen on; 0 takes any free one")
    stage: str = option("sft", "training stage of the model", choices=("base", "mid", "sft", "rl"))
    model_tag: str | None = option(None, "which model of that stage; unset: the newest")
    step: int | None = option(None, "which step; unset: the last")
    temperature: float = option(0.0, "for requests that give none; 0 is the likeliest answer")
    max_batch: int = option(32, "answers made at the same time; further ones wait")
    device_type: str | None = option(None, "cuda, mps or cpu; unset: the best there is")


def main() -> None:
    """Load a model and serve it until Ctrl-C or SIGTERM."""
    config = cli.parse(Config, description=__doc__)
    compute = Compute.create(config.device_type)
    model, tokenizer, meta = load_model(config.stage, compute.device, config.model_tag, config.step)
    engine = Engine(model, tokenizer, config.max_batch)
    app = create_app(engine, model_name=f"nanochat-{meta['stage']}-{meta['tag']}", temperature=config.temperature)
    server = make_server(app, config.host, config.port)
    for end in (signal.SIGINT, signal.SIGTERM):  # also where a shell started us with SIGINT ignored
        signal.signal(end, signal.default_int_handler)  # KeyboardInterrupt, which ends run()
    print(f"chat at http://{config.host}:{server.effective_port}  (Ctrl-C stops)", flush=True)
    server.run()
    app.extensions["engine_loop"].close()


if __name__ == "__main__":
    cli.run(main)
