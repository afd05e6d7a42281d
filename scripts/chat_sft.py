"""Fine-tuning: the last, short stage, on conversations of the kind wanted: python -m scripts.chat_sft"""

from dataclasses import dataclass

from nanochat import cli
from nanochat.compute import Compute
from nanochat.finetune import FinetuneConfig, finetune
from tasks.builtin import mixture
from tasks.common import Multiturn
from tasks.public import join


@dataclass(frozen=True)
class ChatSFT(FinetuneConfig):
    """Flags of fine-tuning."""

    init_lr_frac: float = cli.option(0.4, "factor on all learning rates")
    scale: float = cli.option(2.0, "size of the built-in mixture, in thousands of each skill")


def main() -> None:
    config = cli.parse(ChatSFT, description=__doc__)
    compute = Compute.create(config.device_type)
    # other questions than midtraining's: another seed draws other numbers, words and wordings of the training side
    skills = mixture("train", config.scale, config.seed + 1, identity=True)
    held_out = mixture("test", 0.1, config.seed, identity=True)
    talks = Multiturn(skills, max_turns=3, seed=config.seed)
    train = join("sft", talks, config.seed, config.tasks_dir, config.custom_json)
    finetune("sft", "mid", config, train, join("val", held_out, config.seed, config.tasks_dir), compute)


if __name__ == "__main__":
    cli.run(main)
