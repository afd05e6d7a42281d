"""A model folder's `tokenizer.json`, run by the `tokenizers` package, behind the interface of tokenizer.py.

Special tokens are never read from text, as in tokenizer.py: what a user types stays text. Rendered chat templates, in
which they are meant, go through `encode_marked`:

    encode("<|im_end|>")         -> several ids, which spell "<|im_end|>"
    encode_marked("<|im_end|>")  -> one id, which ends a turn
"""

import copy
import functools
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nanochat.hf.added_tokens import LARGEST_ID, add_described_tokens, make_special, read_object
from nanochat.tokenizer import Codec, replace_surrogates

if TYPE_CHECKING:
    import tokenizers

MARK = re.compile(r"<[|｜].*[|｜]>")
BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")


class HFTokenizer(Codec):
    """Encodes and decodes as the model was trained, over a `tokenizers.Tokenizer`.

    `settings` is the folder's tokenizer_config.json, with what an older special_tokens_map.json adds to it;
    `stop_tokens` are the ids that end an answer. `special_tokens` are those that any of the files calls special; they
    stand for no text. `marks` are the names that are never read as tokens in a user's text: those of special tokens,
    and of added tokens that the chat template writes.
    """

    def __init__(
        self,
        backend: "tokenizers.Tokenizer",
        bos: int | None,
        stop_tokens: Sequence[int],
        settings: dict[str, Any],
        chat_template: str | None,
    ) -> None:
        self.backend = backend
        self.settings = settings
        self.chat_template = chat_template
        self.stop_tokens = frozenset(stop_tokens)
        self._bos = bos
        self._vocab_size = max(backend.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        self._added_tokens = backend.get_added_tokens_decoder()
        self.special_tokens = {token.content: i for i, token in sorted(self._added_tokens.items()) if token.special}
        # Added tokens in the template are marks even where no file calls them special: a user who could type one could
        # open a turn and speak for the assistant. Whitespace is no mark, because templates write it as plain text. Some
        # templates build marks, as in '<|' + message.role + '|>', so added tokens of that form are marks, too.
        unnamed_marks = []
        for token in self._added_tokens.values():
            is_written = token.content in (chat_template or "") and not token.content.isspace()
            if not token.special and (is_written or MARK.fullmatch(token.content)):
                unnamed_marks.append(token)
        self.marks = [*self.special_tokens, *(token.content for token in unnamed_marks)]
        make_special(backend, unnamed_marks)
        # The package's name for "special tokens spelled out in a text are encoded like the rest of the text".
        backend.encode_special_tokens = True
        if bos is not None:
            self.special_tokens["<|bos|>"] = bos  # the name under which the rest of the project asks for it

    @classmethod
    def from_directory(cls, folder: Path | str) -> "HFTokenizer":
        """Read the tokenizer of a model's folder. Raises ValueError, which names the file, if it is missing or damaged.

        Which tokens are special, begin a document or end an answer is spread over five more files, each of which may be
        absent: tokenizer_config.json, special_tokens_map.json, added_tokens.json, generation_config.json, config.json.
        """
        import tokenizers

        folder = Path(folder)
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise ValueError(f"{folder} holds no tokenizer.json: download the whole model")
        try:
            backend = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the package raises nothing narrower
            raise ValueError(f"{path} is damaged or of a kind that is not supported ({error})") from error
        # transformers saves the settings of its last call in this file, such as those of training.
        backend.no_truncation()
        backend.no_padding()

        config = read_object(folder / "config.json")
        generation = read_object(folder / "generation_config.json")
        settings = read_object(folder / "tokenizer_config.json")
        special_map = read_object(folder / "special_tokens_map.json")
        # As in transformers: the older file has the last word, unless the newer describes every token by itself.
        settings = {**special_map, **settings} if "added_tokens_decoder" in settings else {**settings, **special_map}
        add_described_tokens(backend, folder, settings)
        if max(backend.get_vocab(with_added_tokens=True).values(), default=-1) >= LARGEST_ID:
            raise ValueError(f"{path} has ids above {LARGEST_ID}, which no model has")

        # The tokenizer's own settings come first. Older folders have the id in config.json alone, or nowhere.
        bos_ids = _token_ids(backend, settings.get("bos_token"), config.get("bos_token_id"), "<|endoftext|>")
        # A chat model ends its turn with another token than a document. Models differ in which file names that token.
        end_ids = _token_ids(
            backend,
            settings.get("eos_token"),
            special_map.get("eos_token"),
            config.get("eos_token_id"),
            generation.get("eos_token_id"),
        )
        bos = bos_ids[0] if bos_ids else None
        return cls(backend, bos, end_ids, settings, _read_template(folder, settings))

    def get_vocab_size(self) -> int:
        """Return one more than the largest id; the model may have more rows."""
        return self._vocab_size

    def get_bos_token_id(self) -> int | None:
        """Return the id that begins a document, or None for a model that has none."""
        return self._bos

    def encode_rows(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of each text."""
        rows = self.backend.encode_batch([replace_surrogates(text) for text in texts], add_special_tokens=False)
        return [row.ids for row in rows]

    def normalize(self, text: str) -> str:
        """Return the text as the vocabulary sees it, such as "＜｜end｜＞" as "<|end|>" after NFKC."""
        normalizer = self.backend.normalizer
        return text if normalizer is None else normalizer.normalize_str(replace_surrogates(text))

    def encode_marked(self, text: str) -> list[int]:
        """Return the ids of a text in which special tokens are meant: a rendered template, never what a user typed."""
        return self._marked_backend.encode(replace_surrogates(text), add_special_tokens=False).ids

    @functools.cached_property
    def _marked_backend(self) -> "tokenizers.Tokenizer":
        # A copy, because another thread may encode a user's text at the same moment.
        backend = copy.deepcopy(self.backend)
        backend.encode_special_tokens = False
        return backend

    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        """Return the exact bytes of `ids`. Ids that the model has and the tokenizer has not stand for nothing."""
        return b"".join(self._bytes[i] for i in ids if 0 <= i < len(self._bytes))

    @functools.cached_property
    def token_bytes(self) -> list[int]:
        """Return the number of bytes of text that each id stands for; 0 for special tokens."""
        special = set(self.special_tokens.values())
        return [0 if i in special else len(data) for i, data in enumerate(self._bytes)]

    @functools.cached_property
    def _bytes(self) -> list[bytes]:
        """The bytes that each id stands for.

        Byte-level vocabularies (GPT-2) spell bytes in an alphabet of their own; SentencePiece ones write a space as
        U+2581 and bytes without a character as <0x..>.
        """
        # A byte-level decoder turns the letter for byte 32 into a space, any other leaves it alone.
        is_byte_level = self.backend.decoder is not None and self.backend.decoder.decode(["Ġ"]) == " "
        alphabet = byte_alphabet() if is_byte_level else {}
        result = []
        for i in range(self._vocab_size):
            token = self.backend.id_to_token(i) or ""
            if i in self._added_tokens:
                result.append(token.encode())
            elif is_byte_level and all(letter in alphabet for letter in token):
                result.append(bytes(alphabet[letter] for letter in token))
            elif match := BYTE_TOKEN.fullmatch(token):
                result.append(bytes.fromhex(match[1]))
            else:
                result.append(token.replace("\u2581", " ").encode())
        return result


def _read_template(folder: Path, settings: dict[str, Any]) -> str | None:
    """Return the Jinja template of a model's folder, from its own file or from the settings, if it has one."""
    path = folder / "chat_template.jinja"
    if path.is_file():
        return path.read_text(encoding="utf-8")
    source = settings.get("chat_template")
    # A list has several templates by name, such as default and tool_use.
    if isinstance(source, list):
        by_name = {entry.get("name"): entry.get("template") for entry in source if isinstance(entry, dict)}
        source = by_name.get("default")
    return source if isinstance(source, str) else None


def _token_ids(backend: "tokenizers.Tokenizer", *tokens: Any) -> list[int]:
    """Return the ids of tokens given as ids, as texts, as objects with their text, or as lists of these.

    Tokens that are not given (None) or that the vocabulary does not have are left out.
    """
    ids = []
    for token in tokens:
        if isinstance(token, list):
            ids += _token_ids(backend, *token)
            continue
        if isinstance(token, dict):
            token = token.get("content")
        if isinstance(token, str):
            token = backend.token_to_id(token)
        if isinstance(token, int) and token >= 0:
            ids.append(token)
    return ids


def byte_alphabet() -> dict[str, int]:
    """Return the byte for which each letter stands in byte-level vocabularies (GPT-2).

    Printable bytes stand for themselves. The others are numbered from U+0100 on: a space, byte 32, becomes Ġ, U+0120.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    alphabet = {chr(byte): byte for byte in printable}
    others = sorted(set(range(256)) - set(printable))
    for i, byte in enumerate(others):
        alphabet[chr(0x100 + i)] = byte
    return alphabet
