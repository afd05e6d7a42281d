"""Open-weights models: fetch them, look at them, talk to them, bring checkpoints in and out.

python -m scripts.models download ORG/NAME      then list, info, verify, remove, and: play NAME
"""

import argparse
import json
import signal
import sys
from pathlib import Path

from nanochat import cli, interchange, model_store, play
from nanochat.compute import Compute
from nanochat.model_store import info


def build_parser() -> argparse.ArgumentParser:
    """One subcommand a verb."""
    parser = cli.Parser(prog="python -m scripts.models", description=__doc__.splitlines()[0], allow_abbrev=False)
    verbs = parser.add_subparsers(dest="verb", required=True)

    def verb(name: str, help: str, *positionals: str, **more: str) -> argparse.ArgumentParser:
        command = verbs.add_parser(name, help=help, description=help)
        for positional in positionals:
            command.add_argument(positional.strip("?"), nargs="?" if positional.endswith("?") else None, **more)
        return command

    download = verb("download", "fetch a model from the hub, or what is missing of it", "name", metavar="ORG/NAME")
    download.add_argument("--revision", default="main", help="branch, tag or commit (default: main)")
    download.add_argument("--include", action="append", default=[], metavar="GLOB", help="only files like this; repeat")
    download.add_argument("--offline", action="store_true", help="fetch nothing: check that all is here")
    download.add_argument("--workers", type=int, default=8, help="files at the same time (default: 8)")
    verb("list", "what is on this machine, own checkpoints too")
    verb("info", "architecture, size, context", "name", metavar="NAME")
    verb("verify", "compare every file with its hash", "name", metavar="ORG/NAME")
    verb("remove", "delete a model", "name", metavar="ORG/NAME")
    chat = verb("play", "chat with a model; without a name, list what there is", "name?", metavar="NAME")
    chat.add_argument("--temperature", type=float, default=0.0, help="0 is the likeliest answer (default: 0)")
    chat.add_argument("--top-p", type=float, help="draw from the likeliest tokens that make up this share")
    chat.add_argument("--max-tokens", type=int, help="longest answer (default: as far as the context goes)")
    chat.add_argument("--seed", type=int, default=42, help="the same seed gives the same answer")
    chat.add_argument("--device-type", choices=("cuda", "mps", "cpu"), help="default: the best there is")
    bring = verb(
        "import", "a nanochat checkpoint, or a transformers NanoChat folder, into a stage", "dir", metavar="DIR"
    )
    bring.add_argument("--stage", choices=("base", "mid", "sft", "rl"), required=True, help="stage of training")
    bring.add_argument("--tag", required=True, help="name of the model there")
    bring.add_argument("--tokenizer", metavar="DIR", help="folder of tokenizer.pkl (default: beside the checkpoint)")
    give = verb("export", "a checkpoint as a safetensors bundle that transformers loads", "dir", metavar="DIR")
    give.add_argument("--stage", choices=("base", "mid", "sft", "rl"), default="sft", help="default: sft")
    give.add_argument("--tag", help="which model of that stage (default: the newest)")
    give.add_argument("--step", type=int, help="which step (default: the last)")
    give.add_argument("--format", choices=("auto", "nanochat", "code", "gguf"), default="auto", help="default: auto")
    return parser


def show_list() -> None:
    """The names of what can be played, a line each."""
    for name in model_store.list_models():
        facts = info(model_store.find(name))
        print(f"{name}  {facts['architecture']}, {facts['parameters'] / 1e6:.1f} M, {facts['bytes'] / 1e9:.2f} GB")
    for name in play.own_checkpoints():
        print(f"{name}  own checkpoint")
    if not model_store.list_models() and not play.own_checkpoints():
        print("nothing yet: python -m scripts.models download ORG/NAME")


def chat(args: argparse.Namespace) -> None:
    """A chat in the terminal, until /exit or the end of input."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # also where a shell started us with SIGINT ignored
    device = Compute.create(args.device_type).device
    opened = play.open_model(args.name, device, say=lambda line: print(line, file=sys.stderr))
    on_terminal = sys.stdin.isatty() and sys.stdout.isatty()

    def write(text: str, aside: bool) -> None:
        if on_terminal and aside:
            text = f"\x1b[2m{text}\x1b[0m"
        print(text, end="", flush=True, file=sys.stdout if on_terminal or not aside else sys.stderr)

    settings = {"temperature": args.temperature, "max_tokens": args.max_tokens, "seed": args.seed}
    if args.top_p is not None:
        settings["top_p"] = args.top_p
    session = play.Session(*opened, write, **settings)
    if on_terminal:
        import readline  # noqa: F401  (gives input() line editing and history)

        print("Type a message. Ctrl-C stops an answer, /clear forgets the conversation, /exit or Ctrl-D ends.")
    while True:
        try:
            text = input("> " if on_terminal else "").strip()
        except EOFError:
            return
        if text in ("/exit", "/quit"):
            return
        elif text == "/clear":
            session.messages = []
        elif text:
            session.ask(text)
            print(flush=True)


def main() -> None:
    """Do what the verb says."""
    args = build_parser().parse_args()
    if args.verb == "download":
        folder = model_store.download(args.name, args.revision, args.include, args.offline, args.workers)
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
        chat(args)
    elif args.verb == "import":
        where = interchange.import_checkpoint(Path(args.dir), args.stage, args.tag, args.tokenizer)
        print(f"imported as {where}: python -m scripts.chat_cli --stage {args.stage} --model-tag {args.tag}")
    else:
        print(interchange.export_checkpoint(Path(args.dir), args.stage, args.tag, args.step, args.format))


if __name__ == "__main__":
    cli.run(main)
