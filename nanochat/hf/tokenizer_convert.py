"""Tokenizers in and out: original nanochat's pickled tiktoken encoding, and the `tokenizers` package's JSON."""

import itertools
import json
import pickle
import re
from pathlib import Path
from typing import Any

import tiktoken

from nanochat.common import read_json
from nanochat.hf.tokenizer import byte_alphabet
from nanochat.tokenizer import SPECIAL_TOKENS, Tokenizer

# a conversion that does not say the same of these is not made
_SAMPLES = (
    "Hello world, it's 12345 o'clock\r\n\r\n  and I'LL go!\t\tTabs   \n",
    "Grüße! 東京は日本の首都 👩‍👩‍👧 naïve ﬁn ÀÉ’s 3.14159 x==y//2 {'a': [1, 2]}\n\n\n   end  ",
    " " * 700 + "a" + "\n" * 300 + "ab" * 300 + "7" * 50,
)


class _Encoding:
    """What a pickled `tiktoken.Encoding` is read into: its fields, and nothing that runs."""

    state: dict[str, Any]

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.state = state


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> type:
        if (module, name) != ("tiktoken.core", "Encoding"):
            raise pickle.UnpicklingError(f"it asks for {module}.{name}")
        return _Encoding


def read_pickled(path: Path | str) -> Tokenizer:
    """The original's tokenizer.pkl. Nothing in it is run: anything but a plain tiktoken encoding raises ValueError."""
    try:
        with open(path, "rb") as file:
            state = _Unpickler(file).load().state
        pattern, ranks, special = state["pat_str"], state["mergeable_ranks"], state["special_tokens"]
    except OSError as error:
        raise ValueError(f"no tokenizer at {path}: name its folder with --tokenizer") from error
    except Exception as error:  # a hostile pickle can raise anything
        raise ValueError(f"{path} is not a pickled tiktoken encoding ({error})") from error
    return _make(path, pattern, ranks, special)


def _make(path: Path | str, pattern: Any, ranks: Any, special: Any) -> Tokenizer:
    """A Tokenizer of checked parts; tiktoken itself panics on some wrong ones."""
    right = isinstance(pattern, str) and isinstance(ranks, dict) and isinstance(special, dict)
    right = right and all(isinstance(token, bytes) and token for token in ranks)
    right = right and all(isinstance(name, str) for name in special)
    ids = [*ranks.values(), *special.values()] if right else []
    if not right or not all(type(i) is int for i in ids) or sorted(ids) != list(range(len(ids))):
        raise ValueError(f"{path} is no whole byte-level vocabulary: its ids must be 0, 1, 2 and so on")
    if any(bytes([byte]) not in ranks for byte in range(256)) or not set(SPECIAL_TOKENS) <= special.keys():
        raise ValueError(f"{path} lacks single bytes, or special tokens of nanochat's conversations")
    try:
        return Tokenizer(tiktoken.Encoding("nanochat", pat_str=pattern, mergeable_ranks=ranks, special_tokens=special))
    except BaseException as error:  # a panic in Rust is no Exception
        if isinstance(error, KeyboardInterrupt):
            raise
        raise ValueError(f"{path}: tiktoken refuses it ({error})") from error


def _merges(ranks: dict[bytes, int]) -> list[tuple[bytes, bytes]]:
    """The pair that each token was merged from: what byte-pair encoding leaves of it without its own rank."""
    pairs = []
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        parts = [bytes([byte]) for byte in token]
        while len(parts) > 2:
            found = [ranks.get(a + b, rank) for a, b in itertools.pairwise(parts)]
            best = min(range(len(found)), key=found.__getitem__)
            if found[best] >= rank:
                raise ValueError(f"token {token!r} is made of no earlier tokens: it cannot be written as a merge")
            parts[best : best + 2] = [parts[best] + parts[best + 1]]
        if len(parts) == 2:
            pairs.append((parts[0], parts[1]))
    return pairs


def to_tokenizer_json(tokenizer: Tokenizer) -> str:
    """The same tokenizer as `tokenizers` writes it. ValueError when it would not encode alike."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers

    letters = {byte: letter for letter, byte in byte_alphabet().items()}
    ranks, pattern = tokenizer.encoding._mergeable_ranks, tokenizer.encoding._pat_str

    def spell(token: bytes) -> str:
        return "".join(letters[byte] for byte in token)

    vocab = {spell(token): rank for token, rank in ranks.items()}
    merges = [(spell(a), spell(b)) for a, b in _merges(ranks)]
    backend = tokenizers.Tokenizer(models.BPE(vocab, merges, ignore_merges=True))
    # possessive repeats of a range mean another thing to `tokenizers`, and nothing here where no more can match
    split = pre_tokenizers.Split(tokenizers.Regex(re.sub(r"(\{\d+(,\d*)?\})\+", r"\1", pattern)), "isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    backend.decoder = decoders.ByteLevel()
    special = sorted(tokenizer.encoding._special_tokens.items(), key=lambda item: item[1])
    backend.add_special_tokens([tokenizers.AddedToken(name, special=True, normalized=False) for name, _ in special])
    alike = all(backend.encode(s, add_special_tokens=False).ids == tokenizer.encode(s) for s in _SAMPLES)
    if not alike or any(backend.token_to_id(name) != i for name, i in special):
        raise ValueError("this tokenizer's split pattern or ids have no equal in the tokenizers package")
    return backend.to_str(pretty=False)


def from_tokenizer_json(path: Path) -> Tokenizer:
    """The project's Tokenizer of a byte-level BPE; ValueError when it is none, or would not encode alike."""
    import tokenizers

    try:
        backend = tokenizers.Tokenizer.from_file(str(path))
        backend.encode_special_tokens = True
        data, alphabet = json.loads(backend.to_str(pretty=False)), byte_alphabet()
        special = {token["content"]: token["id"] for token in data["added_tokens"]}
        vocab = data["model"]["vocab"].items()
        ranks = {bytes(alphabet[letter] for letter in token): i for token, i in vocab if token not in special}
        steps = data["pre_tokenizer"].get("pretokenizers", [data["pre_tokenizer"]])
        pattern = next(step["pattern"]["Regex"] for step in steps if step["type"] == "Split")
    except Exception as error:  # the package raises nothing narrower
        raise ValueError(f"{path} is not a byte-level BPE as nanochat's are ({error!r:.200})") from error
    tokenizer = _make(path, pattern, ranks, special)
    if any(backend.encode(s, add_special_tokens=False).ids != tokenizer.encode(s) for s in _SAMPLES):
        raise ValueError(f"{path} cannot be run by tiktoken with the same ids")
    return tokenizer


def find_tokenizer(folder: Path, given: str | None = None) -> Tokenizer:
    """A checkpoint's tokenizer: in `given`, or in `folder`, or where the original keeps it. ValueError without one."""
    places = [Path(given)] if given else [folder / "tokenizer", folder, folder.parent.parent / "tokenizer"]
    for place in places:
        if (place / "tokenizer.pkl").is_file():
            return read_pickled(place / "tokenizer.pkl")
        if (place / "tokenizer.json").is_file():
            own = "format" in read_json(place / "tokenizer.json")
            return Tokenizer.from_directory(place) if own else from_tokenizer_json(place / "tokenizer.json")
    raise ValueError(f"no tokenizer.pkl or tokenizer.json in {', '.join(map(str, places))}: name one with --tokenizer")
