"""The command `nanochat`, or `python -m nanochat`: each stage of the pipeline is a subcommand.

    nanochat base-train --depth 4         is        python -m scripts.base_train --depth 4
    torchrun --nproc-per-node=8 -m nanochat base-train --depth 20

In a checkout both forms work. After `pip install .` only the command is there.
"""

import argparse
import runpy
import sys

from nanochat import cli
from nanochat.common import scripts_root

# In the order in which they are used.
COMMANDS = {
    "dataset": ("nanochat.dataset", "make a dataset: built-in, downloaded, or from a folder of your own text"),
    "public": ("tasks.public", "download published conversations and benchmarks"),
    "tok-train": ("scripts.tok_train", "train the tokenizer"),
    "tok-eval": ("scripts.tok_eval", "bytes per token by kind of text"),
    "tokenizer": ("nanochat.tokenizer", "encode and decode files and pipes"),
    "base-train": ("scripts.base_train", "pretraining"),
    "base-eval": ("scripts.base_eval", "bits per byte, CORE and samples of a pretrained model"),
    "mid-train": ("scripts.mid_train", "midtraining: chat format, tools, multiple choice"),
    "chat-sft": ("scripts.chat_sft", "supervised fine-tuning"),
    "chat-rl": ("scripts.chat_rl", "reinforcement learning"),
    "chat-eval": ("scripts.chat_eval", "chat tasks and ChatCORE"),
    "report": ("scripts.report", "report.md from the records of all stages"),
    "chat-cli": ("scripts.chat_cli", "chat in the terminal"),
    "chat-web": ("scripts.chat_web", "chat in the browser, and the OpenAI API"),
    "models": ("scripts.models", "open-weights models: download, list, play, import, export"),
    "infer-bench": ("scripts.infer_bench", "measure how fast the engine answers"),
}


def main() -> None:
    """Run the stage that the first argument names, with the rest as its command line."""
    parser = cli.Parser(
        prog="nanochat",
        usage="nanochat COMMAND [FLAGS]",
        description="From raw text to a chat model you can talk to. Each command has its own --help.",
        epilog="commands:\n" + "\n".join(f"  {name:12} {about}" for name, (_, about) in COMMANDS.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("command", type=with_dashes, choices=COMMANDS, help=argparse.SUPPRESS)
    command = parser.parse_args(sys.argv[1:2]).command

    module, _ = COMMANDS[command]
    sys.path.insert(0, str(scripts_root()))
    sys.argv = sys.argv[1:]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def with_dashes(name: str) -> str:
    """Return a command's name as it is in COMMANDS: base_train is base-train."""
    return name.replace("_", "-")


if __name__ == "__main__":
    main()
