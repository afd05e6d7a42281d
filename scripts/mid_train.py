"""Midtraining: python -m scripts.mid_train

The base model continues text. On a large mixture of conversations it learns the chat format, tool use and multiple
choice; what it knows comes from pretraining.
"""

from dataclasses import dataclass

from nanochat import cli
from nanochat.finetune import FinetuneConfig, finetune
from tasks.builtin import mixture
from tasks.common import Multiturn
from tasks.mixtures import join


@dataclass(frozen=True)
class MidTrain(FinetuneConfig):
    """Flags of midtraining."""

    scale: float = cli.option(8.0, "size of the built-in mixture, in thousands of each skill")


def main() -> None:
    config = cli.parse(MidTrain, description=__doc__)
    # Who the model is comes last, in fine-tuning.
    skills = mixture("train", config.scale, config.seed, identity=False)
    held_out = mixture("test", 0.1, config.seed, identity=False)
    conversations = Multiturn(skills, max_turns=2, seed=config.seed)
    finetune(
        config,
        stage="mid",
        from_stage="base",
        train_on=join("mid", conversations, config.seed, config.tasks_dir, config.custom_json),
        val_on=join("val", held_out, config.seed, config.tasks_dir),
    )


if __name__ == "__main__":
    cli.run(main)
