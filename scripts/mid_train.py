"""Midtraining: the chat format, tool use and multiple choice, on a mixture: python -m scripts.mid_train"""

from dataclasses import dataclass

from nanochat import cli
from nanochat.compute import Compute
from nanochat.finetune import FinetuneConfig, finetune
from tasks.builtin import mixture
from tasks.common import Multiturn


@dataclass(frozen=True)
class MidTrain(FinetuneConfig):
    """Flags of midtraining."""

    tasks_dir: str | None = cli.option(None, "folder with smoltalk/{train,test}.parquet, real conversations to mix in")
    scale: float = cli.option(8.0, "size of the built-in mixture, in thousands of each skill")


def main() -> None:
    config = cli.parse(MidTrain, description=__doc__)
    compute = Compute.create(config.device_type)
    skills = mixture("train", config.scale, config.seed, identity=False, tasks_dir=config.tasks_dir)
    held_out = mixture("test", 0.1, config.seed, identity=False, tasks_dir=config.tasks_dir)
    finetune("mid", "base", config, Multiturn(skills, max_turns=2, seed=config.seed), held_out, compute)


if __name__ == "__main__":
    cli.run(main)
