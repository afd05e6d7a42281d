"""Tokenizers in and out: the original nanochat's pickled tiktoken encoding, and tokenizer.json of `tokenizers`.

    tokenizer.pkl   -> read_pickled         -> Tokenizer
    tokenizer.json  -> from_tokenizer_json  -> Tokenizer  -> to_tokenizer_json  -> tokenizer.json

All three are byte-level BPE and differ in what they write down: tiktoken has each token with its rank, `tokenizers` has
the list of merges. Both ways end with a check on sample texts: a conversion that would encode one of them differently
is refused.
"""

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

# Contractions, groups of digits, white space of many kinds, letters of many scripts, long runs of one character.
SAMPLES = (
    "Hello world, it's 12345 o'clock\r\n\r\n  and I'LL go!\t\tTabs   \n",
    "Grüße! 東京は日本の首都 👩‍👩‍👧 naïve ﬁn ÀÉ’s 3.14159 x==y//2 {'a': [1, 2]}\n\n\n   end  ",
    " " * 700 + "a" + "\n" * 300 + "ab" * 300 + "7" * 50,
)


class _StandIn:
    """Takes the place of `tiktoken.Encoding` while its pickle is read: gets its fields, runs nothing."""


class _Unpickler(pickle.Unpickler):
    """Reads pickles that hold plain values and one encoding.

    A pickle may name any function to be called, so every other name is refused.
    """

    def find_class(self, module: str, name: str) -> type:
        """Return the stand-in for the encoding; raises UnpicklingError for any other name."""
        if (module, name) != ("tiktoken.core", "Encoding"):
            raise pickle.UnpicklingError(f"it asks for {module}.{name}")
        return _StandIn


def read_pickled(path: Path) -> Tokenizer:
    """Read the original's tokenizer.pkl without running anything in it.

    Raises ValueError if the file is missing or anything but a plain tiktoken encoding with our special tokens.
    """
    from pydantic import TypeAdapter

    try:
        with open(path, "rb") as file:
            state = vars(_Unpickler(file).load())
        pattern = state["pat_str"]
        ranks = TypeAdapter(dict[bytes, int]).validate_python(state["mergeable_ranks"], strict=True)
        special = TypeAdapter(dict[str, int]).validate_python(state["special_tokens"], strict=True)
    except OSError as error:
        raise ValueError(f"no tokenizer at {path}: name its folder with --tokenizer") from error
    except Exception as error:  # a hostile pickle can raise anything
        raise ValueError(f"{path} is not a pickled tiktoken encoding ({error})") from error
    return _make_tokenizer(path, pattern, ranks, special)


def _make_tokenizer(path: Path, pattern: Any, ranks: dict[bytes, int], special: dict[str, int]) -> Tokenizer:
    """Return a Tokenizer of its parts, which are checked first: tiktoken panics on some wrong ones."""
    ids = sorted([*ranks.values(), *special.values()])
    if ids != list(range(len(ids))):
        raise ValueError(f"{path} is no whole vocabulary: its ids must be 0, 1, 2 and so on")
    single_bytes = {bytes([byte]) for byte in range(256)}
    if not single_bytes <= ranks.keys() or not set(SPECIAL_TOKENS) <= special.keys():
        raise ValueError(f"{path} lacks single bytes, or special tokens of nanochat's conversations")
    try:
        return Tokenizer(tiktoken.Encoding("nanochat", pat_str=pattern, mergeable_ranks=ranks, special_tokens=special))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: tiktoken refuses it ({error})") from error


def from_tokenizer_json(path: Path) -> Tokenizer:
    """Read a tokenizer.json as our Tokenizer. Raises ValueError unless it is a byte-level BPE that encodes alike."""
    import tokenizers

    try:
        backend = tokenizers.Tokenizer.from_file(str(path))
        backend.encode_special_tokens = True  # those spelled out in a text are text, as they are for us
        data = json.loads(backend.to_str(pretty=False))
        special = {token["content"]: token["id"] for token in data["added_tokens"]}
        alphabet = byte_alphabet()
        ranks = {}
        for token, rank in data["model"]["vocab"].items():
            if token not in special:
                ranks[bytes(alphabet[letter] for letter in token)] = rank
        steps = data["pre_tokenizer"].get("pretokenizers", [data["pre_tokenizer"]])
        pattern = next(step["pattern"]["Regex"] for step in steps if step["type"] == "Split")
    except Exception as error:  # the package raises nothing narrower
        raise ValueError(f"{path} is not a byte-level BPE as nanochat's are ({error!r:.200})") from error
    tokenizer = _make_tokenizer(path, pattern, ranks, special)
    if any(backend.encode(text, add_special_tokens=False).ids != tokenizer.encode(text) for text in SAMPLES):
        raise ValueError(f"{path} cannot be run by tiktoken with the same ids")
    return tokenizer


def to_tokenizer_json(tokenizer: Tokenizer) -> str:
    """Return the text of a tokenizer.json that encodes as `tokenizer` does; raises ValueError if there is none."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, processors

    letters = {byte: letter for letter, byte in byte_alphabet().items()}

    def spell(token: bytes) -> str:
        return "".join(letters[byte] for byte in token)

    ranks = tokenizer.encoding._mergeable_ranks
    vocab = {spell(token): rank for token, rank in ranks.items()}
    merges = [(spell(left), spell(right)) for left, right in _find_merges(ranks)]
    # tiktoken looks a whole piece up before it merges anything; ignore_merges makes the other package do so, too.
    backend = tokenizers.Tokenizer(models.BPE(vocab, merges, ignore_merges=True))
    # "{1,3}+" is a possessive repeat for tiktoken and a repeat of a repeat for `tokenizers`. In these patterns no more
    # could match after the range anyway, so the plus is left out.
    pattern = re.sub(r"(\{\d+(,\d*)?\})\+", r"\1", tokenizer.encoding._pat_str)
    split = pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    backend.decoder = decoders.ByteLevel()
    special = tokenizer.encoding._special_tokens
    # Ids are given in the order of this list, from the end of the vocabulary on.
    names = sorted(special, key=special.__getitem__)
    backend.add_special_tokens([tokenizers.AddedToken(name, special=True, normalized=False) for name in names])
    # Every document that the model has seen began with <|bos|>. Programs call the tokenizer on plain text and expect
    # it to put that in front; a chat template writes its own.
    backend.post_processor = processors.TemplateProcessing(
        single="<|bos|> $A", pair="<|bos|> $A <|bos|> $B", special_tokens=[("<|bos|>", special["<|bos|>"])]
    )

    same_text = all(backend.encode(text, add_special_tokens=False).ids == tokenizer.encode(text) for text in SAMPLES)
    same_special = all(backend.token_to_id(name) == i for name, i in special.items())
    if not same_text or not same_special:
        raise ValueError("this tokenizer's split pattern or ids have no equal in the tokenizers package")
    return backend.to_str(pretty=False)


def _find_merges(ranks: dict[bytes, int]) -> list[tuple[bytes, bytes]]:
    """Return the pair of tokens that each token of two bytes or more was merged from, in the order of their ranks.

    tiktoken keeps no merges. They are found by encoding each token with the tokens of lower rank alone, which stops
    one merge before the end: b"the" with rank 300 ends as [b"t", b"he"] or [b"th", b"e"].
    """
    merges = []
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        parts = [bytes([byte]) for byte in token]
        while len(parts) > 2:
            pair_ranks = [ranks.get(left + right, rank) for left, right in itertools.pairwise(parts)]
            lowest = min(pair_ranks)
            if lowest >= rank:
                raise ValueError(f"token {token!r} is made of no earlier tokens: it cannot be written as a merge")
            i = pair_ranks.index(lowest)
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
        if len(parts) == 2:
            merges.append((parts[0], parts[1]))
    return merges


def find_tokenizer(folder: Path, given: str | None = None) -> Tokenizer:
    """Read a checkpoint's tokenizer from `given`, or from `folder`, or from where the original keeps it.

    Raises ValueError if none of these has a tokenizer.pkl or tokenizer.json.
    """
    places = [Path(given)] if given else [folder / "tokenizer", folder, folder.parent.parent / "tokenizer"]
    for place in places:
        if (place / "tokenizer.pkl").is_file():
            return read_pickled(place / "tokenizer.pkl")
        path = place / "tokenizer.json"
        if path.is_file():
            is_ours = "format" in read_json(path)
            return Tokenizer.from_directory(place) if is_ours else from_tokenizer_json(path)
    raise ValueError(f"no tokenizer.pkl or tokenizer.json in {', '.join(map(str, places))}: name one with --tokenizer")
