"""Open-weights models: fetch them, look at them, talk to them, bring checkpoints in and out.

python -m scripts.models download ORG/NAME      then list, info, verify, remove, and: play NAME
"""

import argparse
import json
from pathlib import Path
from typing import Any

from nanochat import cli, terminal
from nanochat.hf import convert as interchange
from nanochat.hf import named_model
from nanochat.hf import store as model_store
from nanochat.hf.store import info


def build_parser() -> argparse.ArgumentParser:
    """One subcommand a verb."""
    parser = cli.Parser(prog="python -m scripts.models", description=__doc__.splitlines()[0], allow_abbrev=False)
    verbs = parser.add_subparsers(dest="verb", required=True)

    def verb(name: str, help: str, first: str = "", metavar: str = "NAME", **options: Any) -> argparse.ArgumentParser:
        command = verbs.add_parser(name, help=help, description=help, **options)
        if first:
            command.add_argument(first.strip("?"), nargs="?" if first.endswith("?") else None, metavar=metavar)
        return command

    download = verb("download", "fetch a model from the hub, or what is missing of it", "name", metavar="ORG/NAME")
    download.add_argument("--revision", default="main", help="branch, tag or commit (default: main)")
    download.add_argument("--include", action="append", default=[], metavar="GLOB", help="only files like this; repeat")
    download.add_argument("--offline", action="store_true", help="fetch nothing: check that all is here")
    download.add_argument("--workers", type=int, default=8, help="files at the same time (default: 8)")
    verb("list", "what is on this machine, own checkpoints too")
    verb("info", "architecture, size, context", "name")
    verb("verify", "compare every file with its hash", "name", metavar="ORG/NAME")
    verb("remove", "delete a model", "name", metavar="ORG/NAME")
    flags = {"parents": [cli.build_parser(terminal.Config)], "conflict_handler": "resolve"}
    verb("play", "chat with a model; without a name, list what there is", "name?", **flags)
    bring = verb("import", "a nanochat checkpoint, or a transformers NanoChat, into a stage", "dir", metavar="DIR")
    bring.add_argument("--stage", choices=named_model.STAGES, required=True, help="stage of training")
    bring.add_argument("--tag", required=True, help="name of the model there")
    bring.add_argument("--tokenizer", metavar="DIR", help="folder of tokenizer.pkl (default: beside the checkpoint)")
    give = verb("export", "a checkpoint as a safetensors bundle that transformers loads", "dir", metavar="DIR")
    give.add_argument("--stage", choices=named_model.STAGES, default="sft", help="default: sft")
    give.add_argument("--tag", help="which model of that stage (default: the newest)")
    give.add_argument("--step", type=int, help="which step (default: the last)")
    give.add_argument("--format", choices=("auto", "nanochat", "code", "gguf"), default="auto", help="default: auto")
    return parser


def show_list() -> None:
    """The names of what can be played, a line each."""
    for name in model_store.list_models():
        facts = info(model_store.find(name))
        print(f"{name}  {facts['architecture']}, {facts['parameters'] / 1e6:.1f} M, {facts['bytes'] / 1e9:.2f} GB")
    for name in named_model.own_checkpoints():
        print(f"{name}  own checkpoint")
    if not model_store.list_models() and not named_model.own_checkpoints():
        print("nothing yet: python -m scripts.models download ORG/NAME")


def main() -> None:
    """Do what the verb says."""
    args = build_parser().parse_args()
    if args.verb == "download":
        folder = model_store.download(args.name, args.revision, args.include, args.offline, workers=args.workers)
        print(f"{args.name} is in {folder}")
    elif args.verb == "list" or (args.verb == "play" and args.name is None):
        show_list()
    elif args.verb == "info":
        print(json.dumps(info(model_store.find(args.name)), indent=1))
    elif args.verb == "verify":
        print(f"{args.name}: {model_store.verify(args.name)} files as they were on the hub")
    elif args.verb == "remove":
        print(f"{args.name} deleted, {model_store.remove(args.name) / 1e9:.2f} GB free again")
    elif args.verb == "play":
        given = {name: value for name, value in vars(args).items() if name not in ("verb", "name")}
        terminal.hold(args.name, cli.fill(terminal.Config, given))
    elif args.verb == "import":
        where = interchange.import_checkpoint(Path(args.dir), args.stage, args.tag, args.tokenizer)
        print(f"imported as {where}: python -m scripts.chat_cli --stage {args.stage} --model-tag {args.tag}")
    else:
        print(interchange.export_checkpoint(Path(args.dir), args.stage, args.tag, args.step, args.format))


if __name__ == "__main__":
    cli.run(main)
