"""Reinforcement learning on problems whose answers can be checked, from the SFT model: python -m scripts.chat_rl"""

from dataclasses import dataclass

from nanochat import cli
from nanochat.rl import RLConfig, reinforce
from tasks.builtin import SCORED, mixture
from tasks.common import Task
from tasks.gsm8k import GSM8K

BUILT_IN = ("arithmetic", "spellingbee", "world", "identity")


@dataclass(frozen=True)
class ChatRL(RLConfig):
    """Flags of reinforcement learning."""

    tasks: str = cli.option("arithmetic,spellingbee", f"tasks, separated by commas: {', '.join(BUILT_IN)}, gsm8k")
    tasks_dir: str | None = cli.option(None, "folder with gsm8k/{train,test}.parquet; unset = from the hub")

    def __post_init__(self) -> None:
        super().__post_init__()
        if unknown := [name for name in self.tasks.split(",") if name not in (*BUILT_IN, "gsm8k")]:
            raise ValueError(f"--tasks: no task {', '.join(unknown)}; choose from {', '.join(BUILT_IN)}, gsm8k")

    def load(self, split: str) -> list[Task]:
        """The tasks' problems of "train" or "test"."""
        names = dict.fromkeys(self.tasks.split(","))
        return [GSM8K(split, self.tasks_dir) if name == "gsm8k" else SCORED[name](split) for name in names]


def main() -> None:
    """Train, and save as stage rl."""
    config = cli.parse(ChatRL, description=__doc__)
    held_out = mixture("test", 0.1, config.seed, identity=True)
    reinforce(config, config.load("train"), config.load("test"), held_out)


if __name__ == "__main__":
    cli.run(main)
