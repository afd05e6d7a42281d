"""Supervised fine-tuning: python -m scripts.chat_sft

A short last stage at a lower learning rate: fewer conversations of each skill, longer ones, and who the model is.
"""

from dataclasses import dataclass

from nanochat import cli
from nanochat.finetune import FinetuneConfig, finetune
from tasks.builtin import mixture
from tasks.common import Multiturn
from tasks.mixtures import join


@dataclass(frozen=True)
class ChatSFT(FinetuneConfig):
    """Flags of fine-tuning."""

    init_lr_frac: float = cli.option(0.4, "factor on all learning rates")
    scale: float = cli.option(2.0, "size of the built-in mixture, in thousands of each skill")


def main() -> None:
    config = cli.parse(ChatSFT, description=__doc__)
    # Another seed than midtraining's draws other numbers, words and wordings, all from the training side.
    skills = mixture("train", config.scale, config.seed + 1, identity=True)
    held_out = mixture("test", 0.1, config.seed, identity=True)
    conversations = Multiturn(skills, max_turns=3, seed=config.seed)
    finetune(
        config,
        stage="sft",
        from_stage="mid",
        train_on=join("sft", conversations, config.seed, config.tasks_dir, config.custom_json),
        val_on=join("val", held_out, config.seed, config.tasks_dir),
    )


if __name__ == "__main__":
    cli.run(main)
