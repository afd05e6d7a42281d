"""Chat in the terminal: `python -m scripts.chat_cli`, or `-p "..."` for one answer."""

from dataclasses import dataclass

from nanochat import cli, terminal
from nanochat.cli import option
from nanochat.hf import named_model


@dataclass(frozen=True)
class Config(terminal.Config):
    """What to chat with, and how it answers."""

    prompt: str | None = option(None, "answer this and exit", flag="-p")
    model: str | None = option(None, "any model by its name or folder: see python -m scripts.models list")
    stage: str = option("sft", "training stage of a model of your own", choices=named_model.STAGES)
    model_tag: str | None = option(None, "which model of that stage; unset: the newest")
    step: int | None = option(None, "which step; unset: the last")


def main() -> None:
    """Answer `--prompt`, or hold a session."""
    config = cli.parse(Config, description=__doc__)
    name = config.model or "/".join(filter(None, (config.stage, config.model_tag)))
    terminal.hold(name, config, config.step, config.prompt)


if __name__ == "__main__":
    cli.run(main)
