"""A model folder's `tokenizer.json`, run by the `tokenizers` package, behind the interface of tokenizer.py.

Special tokens are never read from text: what a user types stays text, as in tokenizer.py.
"""

import copy
import functools
import hashlib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nanochat.common import read_json
from nanochat.tokenizer import Codec, replace_surrogates

if TYPE_CHECKING:
    import tokenizers

_LARGEST_ID = 1 << 22
_BYTE = re.compile(r"<0x([0-9A-F]{2})>")


class HFTokenizer(Codec):
    """Text to ids and back as the model was trained: what is asked of a `Tokenizer`, over a `tokenizers.Tokenizer`.

    `settings` is the folder's tokenizer_config.json; `stop_tokens` are the ids that end an answer.
    """

    title = "this model's tokenizer"

    def __init__(
        self,
        backend: "tokenizers.Tokenizer",
        bos: int | None = None,
        stop_tokens: Sequence[int] = (),
        settings: dict[str, Any] | None = None,
    ) -> None:
        self.backend, self._bos, self.settings = backend, bos, settings or {}
        self.stop_tokens = frozenset(stop_tokens)
        self._added = backend.get_added_tokens_decoder()
        self.special_tokens = {token.content: i for i, token in sorted(self._added.items()) if token.special}
        if bos is not None:
            self.special_tokens["<|bos|>"] = bos
        backend.encode_special_tokens = True  # the package's words for: those spelled out in a text are text

    @classmethod
    def from_directory(cls, folder: Path | str) -> "HFTokenizer":
        """The tokenizer of a model's folder. ValueError names the file that is missing or damaged."""
        import tokenizers

        folder = Path(folder)
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise ValueError(f"{folder} holds no tokenizer.json: download the whole model")
        try:
            backend = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the package raises nothing narrower
            raise ValueError(f"{path} is damaged or of a kind that is not supported ({error})") from error
        if max(backend.get_vocab(with_added_tokens=True).values(), default=0) > _LARGEST_ID:
            raise ValueError(f"{path} has ids above {_LARGEST_ID}, which no model has")
        names = ("config.json", "tokenizer_config.json", "generation_config.json")
        config, settings, generation = (read_json(folder / n) if (folder / n).is_file() else {} for n in names)
        for name, values in zip(names, (config, settings, generation)):
            if not isinstance(values, dict):
                raise ValueError(f"{folder / name} must hold an object")

        def first_id(*candidates: Any) -> int | None:
            ids = (_id_of(backend, candidate) for candidate in candidates)
            return next((i for i in ids if i is not None), None)

        bos = first_id(settings.get("bos_token"), config.get("bos_token_id"), "<|endoftext|>")
        ends = [settings.get("eos_token")]
        for values in (config, generation):
            end = values.get("eos_token_id")
            ends += end if isinstance(end, list) else [end]
        stop_tokens = [i for end in ends if (i := _id_of(backend, end)) is not None]
        return cls(backend, bos, stop_tokens, settings)

    @functools.cached_property
    def hash(self) -> str:
        """Hex SHA-256 of the tokenizer's definition."""
        return hashlib.sha256(self.backend.to_str().encode()).hexdigest()

    @functools.cached_property
    def _bytes(self) -> list[bytes]:
        """What each id stands for. Byte-level vocabularies spell bytes in an alphabet of their own, the others write
        a space as U+2581 and bytes without a character as <0x..>."""
        byte_level = self.backend.decoder is not None and self.backend.decoder.decode(["Ġ"]) == " "
        alphabet = byte_alphabet() if byte_level else {}
        result = []
        for i in range(self.get_vocab_size()):
            token = self.backend.id_to_token(i) or ""
            if i in self._added:
                result.append(token.encode())
            elif byte_level and all(c in alphabet for c in token):
                result.append(bytes(alphabet[c] for c in token))
            elif match := _BYTE.fullmatch(token):
                result.append(bytes([int(match[1], 16)]))
            else:
                result.append(token.replace("\u2581", " ").encode())
        return result

    @functools.cached_property
    def token_bytes(self) -> list[int]:
        """How many bytes of text each id stands for; 0 for special tokens."""
        special = set(self.special_tokens.values())
        return [0 if i in special else len(data) for i, data in enumerate(self._bytes)]

    def get_vocab_size(self) -> int:
        """One more than the largest id; the model may have more rows."""
        vocab = self.backend.get_vocab(with_added_tokens=True)
        return max(vocab.values(), default=-1) + 1

    def get_bos_token_id(self) -> int | None:
        """The id that begins a document: the one so named, else <|endoftext|>, else None."""
        return self._bos

    def encode_rows(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text."""
        rows = self.backend.encode_batch([replace_surrogates(text) for text in texts], add_special_tokens=False)
        return [row.ids for row in rows]

    def encode_marked(self, text: str) -> list[int]:
        """Ids of a text in which special tokens are meant, such as a rendered template; never of what a user typed."""
        return self._marked.encode(replace_surrogates(text), add_special_tokens=False).ids

    @functools.cached_property
    def _marked(self) -> "tokenizers.Tokenizer":
        backend = copy.deepcopy(self.backend)
        backend.encode_special_tokens = False
        return backend

    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        """The exact bytes of `ids`; nothing for ids that the model has and the tokenizer has not."""
        table = self._bytes
        return b"".join(table[i] for i in ids if 0 <= i < len(table))


def _id_of(backend: "tokenizers.Tokenizer", token: Any) -> int | None:
    """The id of a token given as id, as text, or as the object that tokenizer_config.json may hold."""
    if isinstance(token, dict):
        token = token.get("content")
    if isinstance(token, str):
        return backend.token_to_id(token)
    return token if isinstance(token, int) and not isinstance(token, bool) and token >= 0 else None


def byte_alphabet() -> dict[str, int]:
    """The printable character that stands for each byte in byte-level vocabularies (GPT-2)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = sorted(set(range(256)) - set(printable))
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}
