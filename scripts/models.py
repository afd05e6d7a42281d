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
    play = add_verb("play", "chat with a model; without a name, list what there is")
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


def show_list() -> None:
    """Print the name of each model that can be played."""
    models = store.list_models()
    checkpoints = store.own_checkpoints()
    for name, folder in models.items():
        facts = store.info(folder)
        print(f"{name}  {facts['architecture']}, {facts['parameters'] / 1e6:.1f} M, {facts['bytes'] / 1e9:.2f} GB")
    for name in checkpoints:
        print(f"{name}  own checkpoint")
    if not models and not checkpoints:
        print(cli.commands_here("nothing yet: python -m scripts.models download ORG/NAME"))


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
        case "play" if args.name is None:
            show_list()
        case "play":
            play(args.name, args.flags)
        case "import":
            where = convert.import_checkpoint(Path(args.dir), args.stage, args.tag, args.tokenizer)
            chat = cli.commands_here("python -m scripts.chat_cli")
            print(f"imported as {where}: {chat} --stage {args.stage} --model-tag {args.tag}")
        case "export":
            print(convert.export_checkpoint(Path(args.dir), args.stage, args.tag, args.step, args.format))


if __name__ == "__main__":
    cli.run(main)
