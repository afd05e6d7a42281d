"""Reinforcement learning on problems whose answers can be checked, from the SFT model: python -m scripts.chat_rl"""

from dataclasses import dataclass

from nanochat import cli
from nanochat.rl import RLConfig, reinforce
from tasks.builtin import SCORED, mixture
from tasks.common import Task
from tasks.gsm8k import GSM8K

NAMES = ("arithmetic", "spellingbee", "world", "identity", "gsm8k")


@dataclass(frozen=True)
class ChatRL(RLConfig):
    """Flags of reinforcement learning."""

    tasks: str = cli.option("arithmetic,spellingbee", f"tasks, separated by commas: {', '.join(NAMES)}")
    tasks_dir: str | None = cli.option(None, "folder with gsm8k/{train,test}.parquet; unset = from the hub")

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in self.tasks.split(","):
            if name not in NAMES:
                raise ValueError(f"--tasks: no task '{name}'; choose from {', '.join(NAMES)}")

    def load(self, split: str) -> list[Task]:
        """Return the tasks with their problems of a split, "train" or "test"."""
        tasks: list[Task] = []
        for name in dict.fromkeys(self.tasks.split(",")):  # each once
            if name == "gsm8k":
                tasks.append(GSM8K(split, self.tasks_dir))
            else:
                tasks.append(SCORED[name](split))
        return tasks


def main() -> None:
    config = cli.parse(ChatRL, description=__doc__)
    # Conversations that earn no reward: their bits per byte show whether the model forgets them.
    held_out = mixture("test", 0.1, config.seed, identity=True)
    reinforce(config, config.load("train"), config.load("test"), held_out)


if __name__ == "__main__":
    cli.run(main)
