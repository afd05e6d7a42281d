"""The chat format of a model: messages -> prompt ids, and a decoder for the answer.

`ChatFormat` is the project's own format (conversation.py) and at the same time the protocol that the terminal chat and
the server rely on. `nanochat/hf/chat.py` subclasses it for the formats of open-weights models.
"""

from collections.abc import Sequence
from typing import Any

from nanochat.conversation import Message, drop_oldest_turns, render_for_completion
from nanochat.detokenizer import AnswerDecoder


class ChatFormat:
    """Renders conversations in the project's own special tokens."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer

    def render(self, messages: Sequence[Message]) -> list[int]:
        """Return the ids of the conversation, ending where the assistant's next turn begins.

        Raises ValueError for messages that are not a conversation."""
        return render_for_completion({"messages": messages}, self.tokenizer)

    def fit(self, messages: list[Message], budget: int) -> list[Message]:
        """Drop the oldest turns until the conversation has at most `budget` tokens: see `drop_oldest_turns`."""
        return drop_oldest_turns(messages, self.tokenizer, budget, self.render)

    def prompt(self, messages: list[Message], context: int, max_tokens: int | None = None) -> list[int]:
        """Return the ids of the next answer's prompt, without the oldest turns if they would leave too little room.

        The answer gets `max_tokens`, but a long limit does not push the conversation out: at most a quarter of the
        context is reserved."""
        reserved = min(max_tokens or context, context // 4)
        return self.render(self.fit(messages, context - reserved))

    def decoder(self, prompt: Sequence[int] = (), stop: Sequence[str] = ()) -> AnswerDecoder:
        """Return a new decoder for the answer to `prompt`. The answer ends at the first of the texts in `stop`."""
        return AnswerDecoder(self.tokenizer, stop)
