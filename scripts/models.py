"""Open-weights models: download them, look at them, chat with them, bring checkpoints in and out.

python -m scripts.models download ORG/NAME     hf/download.py, as verify and remove
python -m scripts.models list                  hf/store.py, as info
python -m scripts.models play NAME             scripts/chat_cli.py
python -m scripts.models import DIR ...        hf/convert.py, as export
"""

import argparse
import json
import runpy
import sys
from pathlib import Path

from nanochat import cli
from nanochat.common import STAGES
from nanochat.hf import convert, download, store

NOTHING = "nothing yet: python -m scripts.models download ORG/NAME"


def build_parser() -> argparse.ArgumentParser:
    """Return the parser, with one subcommand per verb."""
    parser = cli.Parser(description=__doc__.splitlines()[0], allow_abbrev=False)
    verbs = parser.add_subparsers(dest="verb", required=True)

    def add_verb(name: str, help: str) -> argparse.ArgumentParser:
        return verbs.add_parser(name, help=help, description=help, allow_abbrev=False)

    name_help = "ORG/NAME, ORG/NAME@REVISION, or the address of the model's page"
    fetch = add_verb("download", "fetch a model, or what is missing of it, into Hugging Face's cache")
    fetch.add_argument("name", metavar="ORG/NAME", help=name_help)
    fetch.add_argument("--revision", help="branch, tag or commit (default: main)")
    fetch.add_argument("--include", action="append", default=[], metavar="GLOB", help="only files like this; repeat")
    fetch.add_argument("--offline", action="store_true", help="fetch nothing: check that all is here")
    fetch.add_argument("--workers", type=int, default=8, help="files at the same time (default: 8)")

    add_verb("list", "what is on this machine, own checkpoints too")
    add_verb("info", "architecture, size, context").add_argument("name", metavar="NAME", help=name_help)
    add_verb("verify", "compare every file with its hash").add_argument("name", metavar="NAME", help=name_help)
    add_verb("remove", "delete a model").add_argument("name", metavar="ORG/NAME")

    # REMAINDER leaves whatever follows the name, flags included, to chat_cli.
    play = add_verb("play", "chat with a model; without a name, choose one by its number")
    play.add_argument("name", nargs="?", metavar="NAME", help="as `list` shows it, or a folder")
    play.add_argument("flags", nargs=argparse.REMAINDER, help="those of python -m scripts.chat_cli, after the name")

    bring = add_verb("import", "a nanochat checkpoint, or a transformers NanoChat, into a stage")
    bring.add_argument("dir", metavar="DIR")
    bring.add_argument("--stage", choices=STAGES, required=True, help="stage of training")
    bring.add_argument("--tag", required=True, help="name of the model there")
    bring.add_argument("--tokenizer", metavar="DIR", help="folder of tokenizer.pkl (default: beside the checkpoint)")

    give = add_verb("export", "a checkpoint as a safetensors bundle that transformers loads")
    give.add_argument("dir", metavar="DIR")
    give.add_argument("--stage", choices=STAGES, default="sft", help="default: sft")
    give.add_argument("--tag", help="which model of that stage (default: the newest)")
    give.add_argument("--step", type=int, help="which step (default: the last)")
    give.add_argument("--format", choices=("auto", "nanochat", "code", "gguf"), default="auto", help="default: auto")
    return parser


def models_here() -> dict[str, str]:
    """Return what can be played, by name, each with words about it: your own checkpoints, then downloads."""
    about = dict.fromkeys(store.own_checkpoints(), "own checkpoint")
    for name, folder in store.list_models().items():
        facts = store.info(folder)
        about[name] = f"{facts['architecture']}, {facts['parameters'] / 1e6:.1f} M, {facts['bytes'] / 1e9:.2f} GB"
    return about


def show_list() -> None:
    """Print the name of each model that can be played."""
    about = models_here()
    for name, words in about.items():
        print(f"{name}  {words}")
    if not about:
        print(cli.commands_here(NOTHING))


def choose() -> str | None:
    """Let the user choose a model by its number; None = the input has ended.

    Raises ValueError if there is none, or if there is nobody to ask because stdin is not a terminal.
    """
    about = models_here()
    names = list(about)
    if not names:
        raise ValueError(NOTHING)
    if not sys.stdin.isatty():
        raise ValueError(f"play: stdin is no terminal to choose at, so name a model: {', '.join(names)}")
    for number, name in enumerate(names, start=1):
        print(f"{number:3}  {name}  {about[name]}")
    while True:
        try:
            answer = input(f"Which one, 1 to {len(names)}? ").strip()
        except EOFError:
            print()
            return None
        if answer in names:
            return answer
        if answer.isdecimal() and 1 <= int(answer) <= len(names):
            return names[int(answer) - 1]


def play(name: str, flags: list[str]) -> None:
    """Become `python -m scripts.chat_cli --model NAME`: the same terminal, signals and ranks of torchrun go on."""
    sys.argv = ["chat_cli", "--model", name, *flags]
    runpy.run_module("scripts.chat_cli", run_name="__main__", alter_sys=True)


def main() -> None:
    """Do what the verb says."""
    args = build_parser().parse_args()
    match args.verb:
        case "download":
            folder = download.download(args.name, args.revision, args.include, args.offline, args.workers)
            print(f"{args.name} is in {folder}")
        case "list":
            show_list()
        case "info":
            _, folder = store.find_folder(args.name)
            print(json.dumps(store.info(folder), indent=1))
        case "verify":
            print(f"{args.name}: {download.verify(args.name)} files as they were on the hub")
        case "remove":
            print(f"{args.name} deleted, {download.remove(args.name) / 1e9:.2f} GB free again")
        case "play":
            name = args.name or choose()
            if name:
                play(name, args.flags)
        case "import":
            where = convert.import_checkpoint(Path(args.dir), args.stage, args.tag, args.tokenizer)
            chat = cli.commands_here("python -m scripts.chat_cli")
            print(f"imported as {where}: {chat} --stage {args.stage} --model-tag {args.tag}")
        case "export":
            print(convert.export_checkpoint(Path(args.dir), args.stage, args.tag, args.step, args.format))


if __name__ == "__main__":
    cli.run(main)
