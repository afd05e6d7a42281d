"""The chat format: conversations to token ids, a loss mask, and prompts.

A conversation is {"messages": [{"role": ..., "content": ...}, ...]}. It is written as

    <|bos|>
    <|user_start|> text <|user_end|>
    <|assistant_start|> text <|python_start|> code <|python_end|> <|output_start|> result <|output_end|> text
    <|assistant_end|>

Training calls `render`, which also returns the loss mask. It is 1 on the tokens that the model learns to produce:

* the assistant's text, its code with <|python_start|> and <|python_end|>, and <|assistant_end|>, which ends its turn;
* not the user's text: the model answers it and never writes it;
* not <|assistant_start|>: the engine puts it there, and the model goes on from it;
* not the tool's output: when the model chats, the engine evaluates the expression and inserts the result. A model
  trained on results would learn to invent them instead of waiting for the tool.

A turn with `"weight": 0`, as OpenAI's fine-tuning format has it, is not learned at all: it is context for the others.

The terminal chat and the server use a `ChatFormat`: `prompt` renders the messages up to the next answer, without the
oldest turns if they do not fit, and `decoder` reads that answer. Open-weights models bring formats of their own, which
subclass it (hf/chat.py). `TextFormat` is for models that only continue text.

A row starts with <|bos|> because pretraining put it in front of every document: it says that nothing comes before.
Special tokens cannot be typed: the tokenizer reads `<|user_end|>` inside a message as plain characters.
"""

import copy
from bisect import bisect_left
from collections.abc import Sequence
from typing import Any

from typing_extensions import Self

from nanochat.detokenizer import AnswerDecoder
from nanochat.tokenizer import Tokenizer

ROLES = ("user", "assistant")
# type of a part of an assistant's message -> special token before it, special token after it, is it trained on?
PARTS: dict[str, tuple[str | None, str | None, bool]] = {
    "text": (None, None, True),
    "python": ("<|python_start|>", "<|python_end|>", True),
    "python_output": ("<|output_start|>", "<|output_end|>", False),
}
Message = dict[str, Any]
Part = dict[str, str]
Rendered = tuple[list[int], list[int]]  # ids and mask, of equal length


def validate(conversation: dict[str, Any], allow_empty: bool = False) -> None:
    """Check that `conversation` is {"messages": [...]}: an optional system message, then user and assistant in turns.

    Content is text or a list of parts {"type", "text"}; `python` and `python_output` are the assistant's alone. Its
    messages may have a weight, 0 or 1. Raises ValueError, which names the message and the problem, if not, or if
    content is empty. With `allow_empty`, an assistant message may be empty, and a user message that was answered: a
    chat's history can hold such, training data must not.
    """
    messages = conversation.get("messages") if isinstance(conversation, dict) else None
    if not isinstance(messages, list) or not messages:
        raise ValueError('a conversation must be {"messages": [...]} with at least one message')
    for i, message in enumerate(messages):
        if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
            raise ValueError(f'message {i}: must be {{"role": ..., "content": ...}}, not {message!r:.80}')
    first_turn = 1 if messages[0]["role"] == "system" else 0
    if len(messages) == first_turn:
        raise ValueError("message 1: a user message must follow the system message")
    for i, message in enumerate(messages):
        role = message["role"]
        expected = ROLES[(i - first_turn) % 2]
        if i >= first_turn and role != expected:
            raise ValueError(f"message {i}: role {role!r} where {expected!r} must come (optional system, then turns)")
        is_assistant = role == "assistant"
        may_be_empty = allow_empty and (is_assistant or (role == "user" and i < len(messages) - 1))
        problem = _content_problem(message["content"], is_assistant, may_be_empty)
        problem = problem or _weight_problem(message.get("weight"), is_assistant)
        if problem:
            raise ValueError(f"message {i} ({role}): {problem}")


def _content_problem(content: Any, is_assistant: bool, may_be_empty: bool) -> str | None:
    """Return what is wrong with a message's content, or None."""
    if not isinstance(content, (str, list)):
        return f"content must be text or a list of parts, not {type(content).__name__}"
    if not content:
        return None if may_be_empty else "content is empty"
    known = PARTS if is_assistant else ("text",)
    for part in _parts(content):
        if not isinstance(part, dict) or not isinstance(part.get("text"), str):
            return f'a part must be {{"type": ..., "text": text}}, not {part!r:.80}'
        kind = part.get("type")
        if not isinstance(kind, str) or kind not in known:
            return f"unknown part type {kind!r}; known here: {', '.join(known)}"
        if not part["text"] and kind != "python_output":  # a program may print nothing
            return f"a {kind} part is empty"
    return None


def _weight_problem(weight: Any, is_assistant: bool) -> str | None:
    """Return what is wrong with a message's weight, or None.

    Null counts as absent, as Parquet files have it. pandas turns a column of numbers and nulls to floats: 0.0 is 0.
    """
    is_number = type(weight) in (int, float)
    if weight is None or (is_number and weight == 0):
        return None
    if not is_assistant:
        return f"weight must be 0 or absent, not {weight!r:.80}: only the assistant's turns are learned"
    if is_number and weight == 1:
        return None
    return f"weight must be 0 or 1, not {weight!r:.80}"


def _parts(content: str | list[Part]) -> list[Part]:
    if isinstance(content, str):
        return [{"type": "text", "text": content}]
    return content


def plain_text(message: Message) -> str:
    """Return the text of a message, whether its content is a string or parts."""
    return "".join(part["text"] for part in _parts(message["content"]))


# --- training


def render(conversation: dict[str, Any], tokenizer: Tokenizer, max_tokens: int | None = None) -> Rendered:
    """Return the ids of a conversation, and its mask: 1 where the assistant must produce the token.

    Both lists are truncated to `max_tokens`. The mask belongs to the ids, not to the targets, which are shifted by one.
    Raises ValueError if the conversation is malformed.
    """
    validate(conversation)
    ids, mask = _encode_turns(conversation["messages"], tokenizer)
    return ids[:max_tokens], mask[:max_tokens]


def render_for_completion(conversation: dict[str, Any], tokenizer: Tokenizer) -> list[int]:
    """Return ids that end after <|assistant_start|>, for the model to continue. A last assistant message is left out.

    Raises ValueError if the conversation is malformed.
    """
    validate(conversation, allow_empty=True)
    messages = conversation["messages"]
    if messages[-1]["role"] == "assistant":
        messages = messages[:-1]
    ids, _ = _encode_turns(messages, tokenizer)
    return [*ids, tokenizer.encode_special("<|assistant_start|>")]


def _encode_turns(messages: list[Message], tokenizer: Tokenizer) -> Rendered:
    """Return the ids of valid messages, from <|bos|> to the end of the last turn, and their mask."""
    if messages[0]["role"] == "system":
        # The format has no system turn: its text is put before the first question.
        system, user, *rest = messages
        messages = [{"role": "user", "content": f"{plain_text(system)}\n\n{plain_text(user)}"}, *rest]
    ids = [tokenizer.get_bos_token_id()]
    mask = [0]

    def add(tokens: list[int], trained: bool) -> None:
        ids.extend(tokens)
        mask.extend([int(trained)] * len(tokens))

    for message in messages:
        if message["role"] == "user":
            turn = tokenizer.encode(plain_text(message), prepend="<|user_start|>", append="<|user_end|>")
            add(turn, trained=False)
            continue
        is_learned = message.get("weight") != 0
        add([tokenizer.encode_special("<|assistant_start|>")], trained=False)
        for part in _parts(message["content"]):
            start, end, trained = PARTS[part["type"]]
            add(tokenizer.encode(part["text"], prepend=start, append=end), trained=trained and is_learned)
        add([tokenizer.encode_special("<|assistant_end|>")], trained=is_learned)
    return ids, mask


# --- chatting, and continuing a text


def text_prompt(text: str, tokenizer: Any) -> list[int]:
    """Return the ids of a text for the model to continue. It is all text: special tokens in it are plain characters."""
    # Models are trained on documents that begin with <|bos|>; some tokenizers of others have no such token.
    bos = tokenizer.get_bos_token_id()
    ids = tokenizer.encode(text)
    return ids if bos is None else [bos, *ids]


class ChatFormat:
    """A model's chat format: messages -> prompt ids, and a decoder for the answer. This one is the project's own."""

    # Names of what a request may set beside its messages, such as reasoning_effort: none in our own format.
    argument_names: frozenset[str] = frozenset()
    can_chat = True  # False: the model only continues texts

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer  # a Tokenizer; in the formats of open-weights models an HFTokenizer
        self.arguments: dict[str, Any] = {}

    def with_arguments(self, arguments: dict[str, Any]) -> Self:
        """Return a copy of this format that renders with these arguments, such as {"enable_thinking": False}.

        Raises ValueError for a name that is not among `argument_names`.
        """
        unknown = sorted(arguments.keys() - self.argument_names)
        if unknown:
            known = ", ".join(sorted(self.argument_names)) or "none"
            raise ValueError(f"the model's chat format has no {', '.join(unknown)}: its arguments are {known}")
        form = copy.copy(self)
        form.arguments = arguments
        return form

    def encode(self, messages: list[Message]) -> list[int]:
        """Return the ids of the conversation, ending where the assistant's next turn begins.

        A last message of the assistant is the beginning of that turn (prefill), which the model continues. Raises
        ValueError if the messages are malformed.
        """
        if messages and messages[-1]["role"] == "assistant":
            validate({"messages": messages}, allow_empty=True)
            ids, _ = _encode_turns(messages, self.tokenizer)
            return ids[:-1]  # without <|assistant_end|>: the answer has begun, and goes on
        return render_for_completion({"messages": messages}, self.tokenizer)

    def prompt(self, messages: list[Message], context: int, max_tokens: int | None = None) -> list[int]:
        """Return the ids of the next answer's prompt, without the oldest turns if they would leave too little room.

        The answer gets `max_tokens`, but a long limit does not push the conversation out: at most a quarter of the
        context is reserved. Raises ValueError if the messages are malformed.
        """
        reserved = min(max_tokens or context, context // 4)
        return self.encode(self.fit(messages, context - reserved))

    def fit(self, messages: list[Message], budget: int) -> list[Message]:
        """Return the newest messages that `encode` fits into `budget` (at least 8) tokens.

        Pairs of question and answer are dropped, the oldest first; the system message stays. If the last question alone
        is too long, its end is kept. If the system message leaves that question less than a quarter of the budget, it
        is dropped, too. A last message of the assistant stays: it is the beginning of the answer. Raises ValueError if
        the messages are malformed.
        """
        validate({"messages": messages}, allow_empty=True)
        n_system = 1 if messages[0]["role"] == "system" else 0
        system = messages[:n_system]
        turns = messages[n_system:]
        begun = turns[-1:] if turns[-1]["role"] == "assistant" else []
        question = turns[-1 - len(begun)]

        def fits_without(n_pairs: int) -> bool:
            return len(self.encode(system + turns[2 * n_pairs :])) <= budget

        # Fewer pairs are fewer tokens, so bisection finds how many must go.
        all_pairs = (len(turns) - 1) // 2
        n_dropped = bisect_left(range(all_pairs), True, key=fits_without)
        if n_dropped < all_pairs or fits_without(all_pairs):
            return system + turns[2 * n_dropped :]
        return self._fit_question(system, plain_text(question), begun, budget)

    def _fit_question(self, system: list[Message], text: str, begun: list[Message], budget: int) -> list[Message]:
        """Return a conversation of the last question alone, whose beginning is cut off until it fits.

        begun: the beginning of its answer, if there is one.
        """

        def size(question: str) -> int:
            return len(self.encode([*system, {"role": "user", "content": question}, *begun]))

        if budget - size(text[-1:]) < budget // 4:
            system = []
        while len(text) > 1 and (excess := size(text) - budget) > 0:
            # The first token that stays may begin inside a character (U+FFFD once decoded): that character goes, too.
            shorter = self.tokenizer.decode(self.tokenizer.encode(text)[excess:]).lstrip("\ufffd")
            if not 0 < len(shorter) < len(text):  # nothing is left of it, or nothing went: halve it
                shorter = text[(len(text) + 1) // 2 :]
            text = shorter
        return [*system, {"role": "user", "content": text}, *begun]

    def decoder(self, prompt: Sequence[int] = (), stop: Sequence[str] = ()) -> AnswerDecoder:
        """Return a new decoder for the answer to `prompt`. The answer ends at the first of the texts in `stop`."""
        return AnswerDecoder(self.tokenizer, stop)


class TextFormat(ChatFormat):
    """For models that were not trained to chat: the last message is continued like any text, without the others."""

    can_chat = False

    def encode(self, messages: list[Message]) -> list[int]:
        """Return the ids of the last message. Raises ValueError as other formats do."""
        validate({"messages": messages}, allow_empty=True)
        return text_prompt(plain_text(messages[-1]), self.tokenizer)
