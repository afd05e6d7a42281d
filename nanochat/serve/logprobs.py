"""Log-probabilities of tokens in OpenAI's two shapes: objects for a chat, lists side by side for a continued text.

chat    {"content": [{"token": "Hi", "logprob": -0.1, "bytes": [72, 105], "top_logprobs": [...]}, ...]}
text    {"tokens": ["Hi", ...], "token_logprobs": [-0.1, ...], "top_logprobs": [{"Hi": -0.1, ...}, ...],
         "text_offset": [0, ...]}
"""

from collections.abc import Sequence

from typing_extensions import TypedDict  # pydantic does not take typing's own before Python 3.12

from nanochat.detokenizer import AnswerDecoder
from nanochat.scheduler import TokenScore
from nanochat.tokenizer import Tokenizer

# What a model rules out has the log-probability -inf, which JSON cannot write. OpenAI and vLLM write this.
LEAST = -9999.0


class TokenLogprob(TypedDict):
    """A token and its log-probability; `bytes` because a token may end in the middle of a character."""

    token: str
    logprob: float | None
    bytes: list[int]


class ScoredToken(TokenLogprob):
    """A token of the answer, and the likeliest tokens at its position."""

    top_logprobs: list[TokenLogprob]


class ChatLogprobs(TypedDict):
    """Log-probabilities of a chat's answer."""

    content: list[ScoredToken]
    refusal: None


class TextLogprobs(TypedDict):
    """Log-probabilities of a text completion: lists with one entry per token.

    With `echo` the prompt's tokens come first; its first token has no log-probability, because nothing comes before.
    """

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


def chat_logprobs(tokenizer: Tokenizer, scores: Sequence[TokenScore]) -> ChatLogprobs:
    """Return the log-probabilities of the next tokens of a chat's answer."""
    content: list[ScoredToken] = []
    for score in scores:
        top = [_token_logprob(tokenizer, token, logprob) for token, logprob in score.top.items()]
        content.append({**_token_logprob(tokenizer, score.token, score.logprob), "top_logprobs": top})
    return {"content": content, "refusal": None}


def _token_logprob(tokenizer: Tokenizer, token: int, logprob: float | None) -> TokenLogprob:
    data = tokenizer.decode_bytes([token])
    return {"token": data.decode("utf-8", "replace"), "logprob": _finite(logprob), "bytes": list(data)}


def _finite(logprob: float | None) -> float | None:
    return None if logprob is None else max(logprob, LEAST)


class TextScorer:
    """Writes the log-probabilities of one text as they come, and counts where in the text each token begins.

    A decoder of its own measures the text. A token in the middle of a character begins where the character does. A
    special token adds no text, so it begins where the next text does.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.decoder = AnswerDecoder(tokenizer)
        self.n_characters = 0

    def write(self, scores: Sequence[TokenScore]) -> TextLogprobs:
        """Return the log-probabilities of the next tokens."""
        logprobs: TextLogprobs = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        for score in scores:
            names = self._names([score.token, *score.top])
            top = None
            if score.logprob is not None:
                # As in OpenAI's API, the token itself always has an entry, even if it is not among the likeliest.
                entries = {**score.top, score.token: score.logprob} if score.top else {}
                top = {names[token]: max(logprob, LEAST) for token, logprob in entries.items()}
            logprobs["tokens"].append(names[score.token])
            logprobs["token_logprobs"].append(_finite(score.logprob))
            logprobs["top_logprobs"].append(top)
            logprobs["text_offset"].append(self.n_characters)
            for event in self.decoder.feed(score.token):
                if isinstance(event, str):
                    self.n_characters += len(event)
        return logprobs

    def _names(self, tokens: Sequence[int]) -> dict[int, str]:
        """Return a name for each token, no two alike: its text, where that is one, else its bytes or its id.

        Names are keys of a JSON object. All bytes of half a character decode to U+FFFD, and some vocabularies have
        several tokens of one text: under one key, the last of them would overwrite the others.
        """
        names: dict[int, str] = {}
        for token in dict.fromkeys(tokens):
            data = self.tokenizer.decode_bytes([token])
            try:
                name = data.decode("utf-8")
            except UnicodeDecodeError:
                name = "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)  # OpenAI's own form
            names[token] = f"token_id:{token}" if name in names.values() else name
        return names
