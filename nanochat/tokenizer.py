"""Byte-pair encoding (BPE): text to token ids and back.

BPE starts from the 256 bytes and merges, again and again, the two neighbouring tokens that occur most often together:

    "low lower lowest"    l+o -> "lo", lo+w -> "low", low+e -> "lowe", ...

A pattern first splits text into words, numbers and signs, and no merge crosses such a piece. rustbpe learns the merges,
tiktoken applies them, and one file, tokenizer.json, holds them. Since every byte is a token, any text and any bytes
become ids and come back unchanged.

Special tokens mark the structure of a conversation. They are never read from text: only `prepend`, `append` and
`encode_special` make them, so nobody can type a turn of the conversation into a message.

    python -m nanochat.tokenizer train FILE... --out DIR
    cat FILE | python -m nanochat.tokenizer encode | python -m nanochat.tokenizer decode
"""

import base64
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

SPECIAL_TOKENS = (
    "<|bos|>",  # begins every document and conversation
    "<|user_start|>",
    "<|user_end|>",
    "<|assistant_start|>",
    "<|assistant_end|>",
    "<|python_start|>",  # the assistant calls its tool
    "<|python_end|>",
    "<|output_start|>",  # what the tool answered
    "<|output_end|>",
)

# GPT-4's pattern (tiktoken's cl100k_base), but numbers in groups of at most two digits, which suits small vocabularies.
# Whitespace comes in pieces of at most 256: without a bound, a run of a million spaces overflows the stack of the regex
# engine and takes quadratic time.
SPLIT_PATTERN = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,2}+| ?[^\s\p{L}\p{N}]++[\r\n]*+"
    r"|\s{0,255}[\r\n]|\s{1,256}(?!\S)|\s"
)

FILE_NAME = "tokenizer.json"
FORMAT = "nanochat-bpe"
VERSION = 1


class Codec(ABC):
    """Text to ids and back: what our own tokenizer and those of open-weights models have in common."""

    special_tokens: dict[str, int]

    @abstractmethod
    def encode_rows(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of each text."""

    @abstractmethod
    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        """Return the exact bytes of `ids`."""

    def encode_special(self, name: str) -> int:
        """Return the id of a special token. Raises ValueError if this tokenizer has none of that name."""
        if name not in self.special_tokens:
            raise ValueError(f"this tokenizer has no special token {name}")
        return self.special_tokens[name]

    def encode(
        self, text: str | Sequence[str], prepend: int | str | None = None, append: int | str | None = None
    ) -> list[Any]:
        """Return the ids of a text, or for a list of texts a list of ids for each, encoded in threads.

        `prepend` and `append` are special tokens, by name or id, around each text. Special tokens that are spelled out
        in the text are plain characters; lone surrogates become U+FFFD.
        """
        first = self._mark(prepend)
        last = self._mark(append)
        if isinstance(text, str):
            [ids] = self.encode_rows([text])
            return first + ids + last
        return [first + ids + last for ids in self.encode_rows(text)]

    def _mark(self, token: int | str | None) -> list[int]:
        if token is None:
            return []
        return [self.encode_special(token) if isinstance(token, str) else token]

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of `ids`, special tokens by name. Bytes that are not UTF-8 become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")


class Tokenizer(Codec):
    """The project's own tokenizer: a `tiktoken.Encoding` with our special tokens."""

    def __init__(self, encoding: tiktoken.Encoding) -> None:
        self.encoding = encoding
        self.pattern: str = encoding._pat_str
        self.ranks: dict[bytes, int] = encoding._mergeable_ranks  # ids of the tokens; lower ranks are merged first
        self.special_tokens = dict(encoding._special_tokens)
        # The encodings of GPT-2 and GPT-4 have one special token that separates documents. It serves as BOS.
        if "<|bos|>" not in self.special_tokens and "<|endoftext|>" in self.special_tokens:
            self.special_tokens["<|bos|>"] = self.special_tokens["<|endoftext|>"]
        ends = ("<|assistant_end|>", "<|bos|>")
        self.stop_tokens = frozenset(self.special_tokens[name] for name in ends if name in self.special_tokens)

    @classmethod
    def train_from_iterator(cls, texts: Iterable[str], vocab_size: int) -> "Tokenizer":
        """Learn a vocabulary of `vocab_size` ids: 256 bytes, merges by frequency, and the nine special tokens.

        Text of too little variety for that many merges gives a smaller vocabulary, and a line says so. Raises
        ValueError if there is no text, or if `vocab_size` is below 265.
        """
        import rustbpe

        n_special = len(SPECIAL_TOKENS)
        if vocab_size < 256 + n_special:
            raise ValueError(
                f"--vocab-size {vocab_size} is smaller than the 256 bytes and {n_special} special tokens: "
                f"use at least {256 + n_special}"
            )
        trainer = rustbpe.Tokenizer()
        clean = (replace_surrogates(text) for text in texts)
        trainer.train_from_iterator(clean, vocab_size - n_special, pattern=SPLIT_PATTERN)
        ranks = {bytes(token): rank for token, rank in trainer.get_mergeable_ranks()}
        if len(ranks) == 256 and vocab_size > 256 + n_special:
            raise ValueError("no text to learn a tokenizer from: give it files or documents that hold some words")
        special_tokens = {name: len(ranks) + i for i, name in enumerate(SPECIAL_TOKENS)}
        tokenizer = cls(_encoding("nanochat", SPLIT_PATTERN, ranks, special_tokens))
        if tokenizer.get_vocab_size() < vocab_size:
            print0(f"the text supports {tokenizer.get_vocab_size()} tokens, not {vocab_size}: a smaller vocabulary")
        return tokenizer

    @classmethod
    def from_directory(cls, directory: Path | str, name: str = FILE_NAME) -> "Tokenizer":
        """Return the tokenizer that `save` wrote to `directory`. Raises ValueError if it is missing or altered."""
        path = Path(directory) / name
        if not path.is_file():
            raise ValueError(f"no tokenizer at {path}: run python -m scripts.tok_train")
        data = read_json(path)
        if not isinstance(data, dict) or (data.get("format"), data.get("version")) != (FORMAT, VERSION):
            raise ValueError(f"{path} is not a {FORMAT} file of version {VERSION}: train it again")
        try:
            ranks = {base64.b64decode(token, validate=True): rank for token, rank in data["ranks"].items()}
            # The hash is checked first: tiktoken panics on some altered vocabularies.
            if data["hash"] == _content_hash(data["pattern"], ranks, data["special_tokens"]):
                tokenizer = cls(_encoding(data["name"], data["pattern"], ranks, data["special_tokens"]))
                if tokenizer._to_dict() == data:
                    return tokenizer
        except (KeyError, TypeError, AttributeError, ValueError):
            pass
        raise ValueError(f"{path} is damaged (its content does not match its hash): restore it or train it again")

    @classmethod
    def from_pretrained(cls, name: str) -> "Tokenizer":
        """Return one of tiktoken's encodings (`gpt2`, `cl100k_base`, ...); its <|endoftext|> serves as <|bos|>.

        tiktoken downloads an encoding once and keeps it. Raises ValueError if it is not kept and cannot be downloaded.
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
        try:
            before = Tokenizer.from_directory(directory, name)
        except ValueError:  # none there, or a damaged one
            before = self
        if before.hash != self.hash:
            path.replace(path.with_name(kept_name(before.hash)))
        atomic_write_json(path, self._to_dict())

    def _to_dict(self) -> dict[str, Any]:
        in_order = sorted(self.ranks, key=self.ranks.__getitem__)
        return {
            "format": FORMAT,
            "version": VERSION,
            "name": self.encoding.name,
            "hash": self.hash,
            "pattern": self.pattern,
            "special_tokens": self.special_tokens,
            "ranks": {base64.b64encode(token).decode(): self.ranks[token] for token in in_order},
            "token_bytes": self.token_bytes,
        }

    @functools.cached_property
    def hash(self) -> str:
        """SHA-256 of split pattern, merges and special tokens, in hex. Equal hashes encode equally."""
        return _content_hash(self.pattern, self.ranks, self.special_tokens)

    @functools.cached_property
    def token_bytes(self) -> list[int]:
        """The number of bytes that each id stands for, 0 for special tokens. Bits per byte are counted with it.

        Taken from the raw bytes: many tokens are a part of a UTF-8 character, which a `str` cannot hold.
        """
        lengths = [0] * self.get_vocab_size()
        for token, rank in self.ranks.items():
            lengths[rank] = len(token)
        return lengths

    def get_vocab_size(self) -> int:
        """Return the number of ids, special tokens included."""
        return self.encoding.n_vocab

    def get_bos_token_id(self) -> int:
        """Return the id that begins every document and conversation."""
        return self.encode_special("<|bos|>")

    def encode_rows(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of each text. Several texts are encoded in threads: tiktoken releases the GIL."""
        if len(texts) == 1:
            return [self.encoding.encode_ordinary(texts[0])]
        return self.encoding.encode_ordinary_batch(list(texts), num_threads=os.cpu_count() or 1)

    def encode_bytes(self, data: bytes) -> list[int]:
        """Return ids for any bytes: as text where they are UTF-8, byte by byte elsewhere."""
        ids: list[int] = []
        # "surrogateescape" turns each invalid byte b into the character U+DC00 + b.
        for piece in re.split("([\udc80-\udcff])", data.decode("utf-8", errors="surrogateescape")):
            if "\udc80" <= piece <= "\udcff":
                ids.append(self.ranks[bytes([ord(piece) - 0xDC00])])
            else:
                ids += self.encoding.encode_ordinary(piece)
        return ids

    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        """Return the exact bytes of `ids`. Raises ValueError if an id is not in the vocabulary."""
        try:
            return self.encoding.decode_bytes(ids)
        except (KeyError, OverflowError) as error:
            known = {*self.ranks.values(), *self.special_tokens.values()}
            wrong = next(i for i in ids if i not in known)
            raise ValueError(f"token id {wrong} is not in the vocabulary of {len(known)} ids") from error


def load_tokenizer(content_hash: str = "") -> Tokenizer:
    """Return the newest tokenizer of `scripts.tok_train`, or the one of this hash. Raises ValueError if missing."""
    folder = get_base_dir() / "tokenizer"
    kept = kept_name(content_hash)
    return Tokenizer.from_directory(folder, kept if (folder / kept).is_file() else FILE_NAME)


def kept_name(content_hash: str) -> str:
    """Return the file name of a tokenizer that is no longer the newest: checkpoints name it by its hash."""
    return f"{content_hash[:12]}.json"


def replace_surrogates(text: str) -> str:
    """Make surrogate pairs their character and lone surrogates U+FFFD, as tiktoken does."""
    return text if text.isascii() else text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _encoding(name: str, pattern: str, ranks: dict[bytes, int], special_tokens: dict[str, int]) -> tiktoken.Encoding:
    return tiktoken.Encoding(name, pat_str=pattern, mergeable_ranks=ranks, special_tokens=special_tokens)


def _content_hash(pattern: str, ranks: dict[bytes, int], special_tokens: dict[str, int]) -> str:
    tokens = sorted((rank, token.hex()) for token, rank in ranks.items())
    content = json.dumps([pattern, tokens, sorted(special_tokens.items())])
    return hashlib.sha256(content.encode()).hexdigest()


# --- the command line


def main() -> None:
    """Run the commands `train`, `encode` and `decode` on plain files and pipes."""
    parser = cli.Parser(prog="python -m nanochat.tokenizer", description="Byte-pair encoding for files and pipes.")
    commands = parser.add_subparsers(dest="command", required=True)
    train = commands.add_parser("train", help="learn a vocabulary from text files")
    train.add_argument("files", nargs="+", metavar="FILE", help="text files; - is standard input")
    train.add_argument("--vocab-size", type=int, default=32768, help="ids, special tokens included (default: 32768)")
    train.add_argument("--out", required=True, metavar="DIR", help="folder for tokenizer.json")
    for name, about in (("encode", "bytes to ids, separated by blanks"), ("decode", "ids to bytes")):
        command = commands.add_parser(name, help=about)
        command.add_argument("file", nargs="?", default="-", metavar="FILE", help="default: standard input")
        folder = get_base_dir() / "tokenizer"
        command.add_argument("--tokenizer", default=folder, metavar="DIR", help="folder of tokenizer.json")
    args = parser.parse_args()

    if args.command == "train":
        tokenizer = Tokenizer.train_from_iterator(_read_texts(args.files), args.vocab_size)
        tokenizer.save(args.out)
        print(f"{tokenizer.get_vocab_size()} tokens in {Path(args.out) / FILE_NAME}")
        return
    tokenizer = Tokenizer.from_directory(args.tokenizer)
    data = sys.stdin.buffer.read() if args.file == "-" else Path(args.file).read_bytes()
    if args.command == "encode":
        print(*tokenizer.encode_bytes(data))
        return
    ids = []
    for word in data.split():
        if not word.isdigit():
            raise ValueError(f"{args.file}: {word.decode(errors='replace')!r} is not a token id")
        ids.append(int(word))
    sys.stdout.buffer.write(tokenizer.decode_bytes(ids))


def _read_texts(paths: Sequence[str], size: int = 1 << 14) -> Iterator[str]:
    """Yield the files' text in pieces of `size` characters, so that no file has to fit in memory."""
    for path in paths:
        source = sys.stdin.fileno() if path == "-" else path
        with open(source, encoding="utf-8", errors="replace", newline="", closefd=path != "-") as f:
            while piece := f.read(size):
                yield piece


if __name__ == "__main__":
    cli.run(main)
