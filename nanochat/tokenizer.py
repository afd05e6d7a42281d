"""Byte-level BPE: rustbpe trains it, tiktoken runs it, one `tokenizer.json` holds it.

Any text, and any bytes, become ids and come back unchanged. Special tokens are never read from text: only `prepend`,
`append` and `encode_special` make them, so nobody can type a turn of the conversation into a message.

    python -m nanochat.tokenizer train FILE... --out DIR
    cat FILE | python -m nanochat.tokenizer encode | python -m nanochat.tokenizer decode
"""

import base64
import contextlib
import functools
import hashlib
import json
import os
import re
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import tiktoken

from nanochat import cli
from nanochat.common import atomic_write_json, get_base_dir, print0, read_json

_NAMES = "bos user_start user_end assistant_start assistant_end python_start python_end output_start output_end"
SPECIAL_TOKENS = tuple(f"<|{name}|>" for name in _NAMES.split())

# GPT-4's pattern (tiktoken's cl100k_base), but numbers in groups of at most two digits, which suits small vocabularies.
# Whitespace comes in pieces of at most 256: without a bound, a run of a million spaces overflows the stack of the regex
# engine and takes quadratic time.
SPLIT_PATTERN = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,2}+| ?[^\s\p{L}\p{N}]++[\r\n]*+"
    r"|\s{0,255}[\r\n]|\s{1,256}(?!\S)|\s"
)

Mark = int | str  # a special token by id or name
FORMAT, VERSION = "nanochat-bpe", 1
FILE_NAME = "tokenizer.json"


class Codec(ABC):
    """Text to ids and back, whatever does the work."""

    title: str  # what users know it by
    special_tokens: dict[str, int]

    @abstractmethod
    def encode_rows(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text."""

    @abstractmethod
    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        """The exact bytes of `ids`."""

    def encode_special(self, name: str) -> int:
        """The id of a special token; ValueError when this tokenizer has none of that name."""
        if name not in self.special_tokens:
            raise ValueError(f"{self.title} has no special token {name}")
        return self.special_tokens[name]

    def encode(self, text: str | Sequence[str], prepend: Mark | None = None, append: Mark | None = None) -> list[Any]:
        """Ids of a text, or a list of ids for each text of a list (in threads), between special tokens by name or id.

        Special tokens spelled out in the text are plain characters; lone surrogates become U+FFFD.
        """
        ids = (self.encode_special(mark) if isinstance(mark, str) else mark for mark in (prepend, append))
        first, last = ([] if i is None else [i] for i in ids)
        rows = [first + row + last for row in self.encode_rows([text] if isinstance(text, str) else text)]
        return rows[0] if isinstance(text, str) else rows

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`, special tokens by name; bytes that are not UTF-8 become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")


class Tokenizer(Codec):
    """The project's own, over a `tiktoken.Encoding`."""

    def __init__(self, encoding: tiktoken.Encoding) -> None:
        self.encoding, self.title = encoding, f"tokenizer '{encoding.name}'"
        self.special_tokens: dict[str, int] = dict(encoding._special_tokens)
        if "<|bos|>" not in self.special_tokens and "<|endoftext|>" in self.special_tokens:
            self.special_tokens["<|bos|>"] = self.special_tokens["<|endoftext|>"]

    @classmethod
    def train_from_iterator(cls, texts: Iterable[str], vocab_size: int) -> "Tokenizer":
        """Learn a vocabulary of `vocab_size` ids: 256 bytes, merges by frequency, and the nine special tokens.

        Text of too little variety for that many merges gives a smaller vocabulary and says so; none raises ValueError.
        """
        import rustbpe

        smallest = 256 + len(SPECIAL_TOKENS)
        if vocab_size < smallest:
            raise ValueError(
                f"--vocab-size {vocab_size} is smaller than the 256 bytes and {len(SPECIAL_TOKENS)} special tokens: "
                f"use at least {smallest}"
            )
        trainer = rustbpe.Tokenizer()
        clean = (replace_surrogates(text) for text in texts)
        trainer.train_from_iterator(clean, vocab_size - len(SPECIAL_TOKENS), pattern=SPLIT_PATTERN)
        ranks = {bytes(token): rank for token, rank in trainer.get_mergeable_ranks()}
        if len(ranks) == 256 and vocab_size > smallest:
            raise ValueError("no text to learn a tokenizer from: give it files or documents that hold some words")
        specials = {name: len(ranks) + i for i, name in enumerate(SPECIAL_TOKENS)}
        tokenizer = cls(_encoding("nanochat", SPLIT_PATTERN, ranks, specials))
        if tokenizer.get_vocab_size() < vocab_size:
            print0(f"the text supports {tokenizer.get_vocab_size()} tokens, not {vocab_size}: a smaller vocabulary")
        return tokenizer

    @classmethod
    def from_directory(cls, directory: Path | str, name: str = FILE_NAME) -> "Tokenizer":
        """The tokenizer that `save` wrote to `directory`; a missing or altered file raises ValueError."""
        path = Path(directory) / name
        if not path.is_file():
            raise ValueError(f"no tokenizer at {path}: run python -m scripts.tok_train")
        data = read_json(path)
        if not isinstance(data, dict) or (data.get("format"), data.get("version")) != (FORMAT, VERSION):
            raise ValueError(f"{path} is not a {FORMAT} file of version {VERSION}: train it again")
        try:
            ranks = {base64.b64decode(token, validate=True): rank for token, rank in data["ranks"].items()}
            intact = data["hash"] == _content_hash(data["pattern"], ranks, data["special_tokens"])
            if intact:  # checked first: tiktoken panics on some altered vocabularies
                tokenizer = cls(_encoding(data["name"], data["pattern"], ranks, data["special_tokens"]))
                intact = tokenizer._to_dict() == data
        except (KeyError, TypeError, AttributeError, ValueError):
            intact = False
        if not intact:
            raise ValueError(f"{path} is damaged (its content does not match its hash): restore it or train it again")
        return tokenizer

    @classmethod
    def from_pretrained(cls, name: str) -> "Tokenizer":
        """One of tiktoken's encodings (`gpt2`, `cl100k_base`, ...); its <|endoftext|> serves as <|bos|>.

        tiktoken downloads an encoding once and keeps it; ValueError when it is neither kept nor within reach.
        """
        try:
            return cls(tiktoken.get_encoding(name))
        except ValueError as error:
            known = ", ".join(tiktoken.list_encoding_names())
            raise ValueError(f"tiktoken cannot load the encoding '{name}'; it knows {known}") from error
        except OSError as error:
            raise ValueError(
                f"the encoding '{name}' is not on this machine and cannot be downloaded: load it once on a machine "
                "with a network and copy tiktoken's cache, the folder named by TIKTOKEN_CACHE_DIR, to this one"
            ) from error

    def save(self, directory: Path | str, name: str = FILE_NAME) -> None:
        """Write `tokenizer.json` to `directory`, atomically. One that was there stays beside it, named by its hash."""
        path = Path(directory) / name
        with contextlib.suppress(ValueError):  # none there, or a damaged one
            if (before := Tokenizer.from_directory(directory, name).hash) != self.hash:
                path.replace(path.with_name(kept_name(before)))
        atomic_write_json(path, self._to_dict())

    def _to_dict(self) -> dict[str, Any]:
        ranks = sorted(self.encoding._mergeable_ranks.items(), key=lambda item: item[1])
        named = {"format": FORMAT, "version": VERSION, "name": self.encoding.name, "hash": self.hash}
        split = {"pattern": self.encoding._pat_str, "special_tokens": self.special_tokens}
        merges = {base64.b64encode(token).decode(): rank for token, rank in ranks}
        return {**named, **split, "ranks": merges, "token_bytes": self.token_bytes}

    @functools.cached_property
    def hash(self) -> str:
        """Hex SHA-256 of split pattern, merges and special tokens: equal hashes encode equally."""
        return _content_hash(self.encoding._pat_str, self.encoding._mergeable_ranks, self.special_tokens)

    @functools.cached_property
    def token_bytes(self) -> list[int]:
        """How many bytes of text each id stands for; 0 for special tokens. The unit of bits per byte.

        Counted on raw bytes: many tokens are a part of a UTF-8 character, whose length as a `str` is another.
        """
        lengths = [0] * self.get_vocab_size()
        for token, rank in self.encoding._mergeable_ranks.items():
            lengths[rank] = len(token)
        return lengths

    def get_vocab_size(self) -> int:
        """The number of ids, special tokens included."""
        return self.encoding.n_vocab

    @property
    def stop_tokens(self) -> frozenset[int]:
        """Ids that end an answer."""
        names = ("<|assistant_end|>", "<|bos|>")
        return frozenset(self.special_tokens[name] for name in names if name in self.special_tokens)

    def get_bos_token_id(self) -> int:
        """The id that begins every document and conversation."""
        return self.encode_special("<|bos|>")

    def encode_rows(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text, in threads where there are several."""
        if len(texts) == 1:
            return [self.encoding.encode_ordinary(texts[0])]
        return self.encoding.encode_ordinary_batch(list(texts), num_threads=os.cpu_count() or 1)

    def encode_bytes(self, data: bytes) -> list[int]:
        """Ids of any bytes: of text where they are UTF-8, byte by byte where not. `decode_bytes` restores them."""
        ids: list[int] = []
        # "surrogateescape" turns each invalid byte b into the character U+DC00 + b.
        for piece in re.split("([\udc80-\udcff])", data.decode("utf-8", errors="surrogateescape")):
            if "\udc80" <= piece <= "\udcff":
                ids.append(self.encoding.encode_single_token(bytes([ord(piece) - 0xDC00])))
            else:
                ids += self.encoding.encode_ordinary(piece)
        return ids

    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        """The exact bytes of `ids`; ValueError for an id outside the vocabulary."""
        try:
            return self.encoding.decode_bytes(ids)
        except (KeyError, OverflowError) as error:
            known = {*self.encoding._mergeable_ranks.values(), *self.special_tokens.values()}
            wrong = next(i for i in ids if i not in known)
            raise ValueError(f"token id {wrong} is not in the vocabulary of {len(known)} ids") from error


def kept_name(content_hash: str) -> str:
    """The file of a tokenizer that is no longer the newest."""
    return f"{content_hash[:12]}.json"


def load_tokenizer(content_hash: str | None = None) -> Tokenizer:
    """The tokenizer that `scripts.tok_train` made last, or the kept one of this hash; ValueError if there is none."""
    folder, name = get_base_dir() / "tokenizer", kept_name(content_hash or "")
    return Tokenizer.from_directory(folder, name if (folder / name).is_file() else FILE_NAME)


def _encoding(name: str, pattern: str, ranks: dict[bytes, int], specials: dict[str, int]) -> tiktoken.Encoding:
    return tiktoken.Encoding(name, pat_str=pattern, mergeable_ranks=ranks, special_tokens=specials)


def _content_hash(pattern: str, ranks: dict[bytes, int], specials: dict[str, int]) -> str:
    tokens = sorted((rank, token.hex()) for token, rank in ranks.items())
    return hashlib.sha256(json.dumps([pattern, tokens, sorted(specials.items())]).encode()).hexdigest()


def replace_surrogates(text: str) -> str:
    """As tiktoken does: surrogate pairs become their character, lone surrogates U+FFFD."""
    return text if text.isascii() else text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _read_bytes(path: str) -> bytes:
    return sys.stdin.buffer.read() if path == "-" else Path(path).read_bytes()


def _read_texts(paths: Sequence[str], size: int = 1 << 14) -> Iterator[str]:
    """The files' text in pieces of `size` characters, so that no file has to fit in memory."""
    for path in paths:
        source = sys.stdin.fileno() if path == "-" else path
        with open(source, encoding="utf-8", errors="replace", newline="", closefd=path != "-") as f:
            while piece := f.read(size):
                yield piece


def main() -> None:
    """`train`, `encode` and `decode` for plain files and pipes."""
    parser = cli.Parser(prog="python -m nanochat.tokenizer", description="Byte-pair encoding for files and pipes.")
    commands = parser.add_subparsers(dest="command", required=True)
    train = commands.add_parser("train", help="learn a vocabulary from text files")
    train.add_argument("files", nargs="+", metavar="FILE", help="text files; - is standard input")
    train.add_argument("--vocab-size", type=int, default=32768, help="ids, special tokens included (default: 32768)")
    train.add_argument("--out", required=True, metavar="DIR", help="folder for tokenizer.json")
    encode = commands.add_parser("encode", help="bytes to ids, separated by blanks")
    decode = commands.add_parser("decode", help="ids to bytes")
    for command in (encode, decode):
        command.add_argument("file", nargs="?", default="-", metavar="FILE", help="default: standard input")
        folder = get_base_dir() / "tokenizer"
        command.add_argument("--tokenizer", default=folder, metavar="DIR", help="folder of tokenizer.json")
    args = parser.parse_args()

    if args.command == "train":
        tokenizer = Tokenizer.train_from_iterator(_read_texts(args.files), args.vocab_size)
        tokenizer.save(args.out)
        print(f"{tokenizer.get_vocab_size()} tokens in {Path(args.out) / FILE_NAME}")
    elif args.command == "encode":
        tokenizer = Tokenizer.from_directory(args.tokenizer)
        print(" ".join(map(str, tokenizer.encode_bytes(_read_bytes(args.file)))))
    else:
        tokenizer, words = Tokenizer.from_directory(args.tokenizer), _read_bytes(args.file).split()
        if wrong := next((word for word in words if not word.isdigit()), None):
            raise ValueError(f"{args.file}: {wrong.decode(errors='replace')!r} is not a token id")
        sys.stdout.buffer.write(tokenizer.decode_bytes([int(word) for word in words]))


if __name__ == "__main__":
    cli.run(main)
