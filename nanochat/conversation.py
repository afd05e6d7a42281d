"""Conversation to token ids and loss mask, and back: the one place that knows the chat format.

    <|bos|>
    <|user_start|> text <|user_end|>
    <|assistant_start|> text <|python_start|> code <|python_end|> <|output_start|> result <|output_end|> text
    <|assistant_end|>

The assistant produces its text, its `<|python_start|> code <|python_end|>` and its `<|assistant_end|>`, and is trained
on exactly these (mask 1). The start of its turn and the results of its tools are given to it (mask 0).
"""

from bisect import bisect_left
from collections.abc import Callable
from typing import Any

from nanochat.tokenizer import Tokenizer

ROLES = ("user", "assistant")
# Kind of a part of an assistant's message -> the marks around it, and whether the assistant produces it.
PARTS: dict[str, tuple[str | None, str | None, bool]] = {
    "text": (None, None, True),
    "python": ("<|python_start|>", "<|python_end|>", True),
    "python_output": ("<|output_start|>", "<|output_end|>", False),
}
Message = dict[str, Any]
Part = dict[str, str]
Rendered = tuple[list[int], list[int]]  # ids, and their mask


def validate(conversation: dict[str, Any], allow_empty_reply: bool = False) -> None:
    """Raise ValueError, naming message and problem, unless `conversation` is well-formed.

    That is: {"messages": [...]} of an optional system message, then user and assistant in turns, each with non-empty
    content: text, or a list of parts {"type", "text"}, of which `python` and `python_output` are the assistant's own.
    `allow_empty_reply` accepts assistant messages without content, as a history may hold but training must not.
    """
    messages = conversation.get("messages") if isinstance(conversation, dict) else None
    if not isinstance(messages, list) or not messages:
        raise ValueError('a conversation must be {"messages": [...]} with at least one message')
    for i, message in enumerate(messages):
        if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
            raise ValueError(f'message {i}: must be {{"role": ..., "content": ...}}, not {message!r:.80}')
    turns = messages[1:] if messages[0]["role"] == "system" else messages
    if not turns:
        raise ValueError("message 1: a user message must follow the system message")
    first = len(messages) - len(turns)
    for i, message in enumerate(messages):
        role, content = message["role"], message["content"]
        if i >= first and role != (expected := ROLES[(i - first) % 2]):
            raise ValueError(f"message {i}: role {role!r} where {expected!r} must come (optional system, then turns)")
        if problem := _content_problem(content, role == "assistant", allow_empty_reply):
            raise ValueError(f"message {i} ({role}): {problem}")


def _content_problem(content: Any, is_assistant: bool, allow_empty_reply: bool) -> str | None:
    """What is wrong with a message's content, or None."""
    if not isinstance(content, (str, list)):
        return f"content must be text or a list of parts, not {type(content).__name__}"
    if not content:
        return None if is_assistant and allow_empty_reply else "content is empty"
    for part in _parts(content):
        if not isinstance(part, dict) or not isinstance(part.get("text"), str):
            return f'a part must be {{"type": ..., "text": text}}, not {part!r:.80}'
        kind = part.get("type")
        if not isinstance(kind, str) or kind not in (PARTS if is_assistant else ("text",)):
            return f"unknown part type {kind!r}; known here: {', '.join(PARTS if is_assistant else ('text',))}"
        if not part["text"] and kind != "python_output":  # a program may print nothing
            return f"a {kind} part is empty"
    return None


def _parts(content: str | list[Part]) -> list[Part]:
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


def plain_text(message: Message) -> str:
    """The text of a message, whether it is whole or in parts."""
    return "".join(part["text"] for part in _parts(message["content"]))


def _render(messages: list[Message], tokenizer: Tokenizer) -> Rendered:
    """Ids and mask of valid messages, whole; the system text comes before the first user's."""
    if messages[0]["role"] == "system":
        system, user, *rest = messages
        messages = [{"role": "user", "content": f"{plain_text(system)}\n\n{plain_text(user)}"}, *rest]
    ids, mask = [tokenizer.get_bos_token_id()], [0]

    def add(tokens: list[int], supervised: bool = False) -> None:
        ids.extend(tokens)
        mask.extend([int(supervised)] * len(tokens))

    special = tokenizer.encode_special
    for message in messages:
        if message["role"] == "user":
            add(tokenizer.encode(plain_text(message), prepend="<|user_start|>", append="<|user_end|>"))
            continue
        add([special("<|assistant_start|>")])
        for part in _parts(message["content"]):
            start, end, supervised = PARTS[part["type"]]
            add(tokenizer.encode(part["text"], prepend=start, append=end), supervised)
        add([special("<|assistant_end|>")], supervised=True)
    return ids, mask


def render(conversation: dict[str, Any], tokenizer: Tokenizer, max_tokens: int | None = None) -> Rendered:
    """Ids of a conversation and their mask, 1 where the assistant itself must produce the token.

    Both lists are cut on the right to `max_tokens`. The mask is of the ids, not of the shifted targets.
    """
    validate(conversation)
    ids, mask = _render(conversation["messages"], tokenizer)
    return ids[:max_tokens], mask[:max_tokens]


def render_for_completion(conversation: dict[str, Any], tokenizer: Tokenizer) -> list[int]:
    """Ids that end after `<|assistant_start|>`, for the assistant to continue; a last assistant message is left out."""
    validate(conversation, allow_empty_reply=True)
    messages = conversation["messages"]
    if messages[-1]["role"] == "assistant":
        messages = messages[:-1]
    return [*_render(messages, tokenizer)[0], tokenizer.encode_special("<|assistant_start|>")]


def drop_oldest_turns(
    messages: list[Message], tokenizer: Any, budget: int, render: Callable[[list[Message]], list[int]] | None = None
) -> list[Message]:
    """The newest messages of which `render` (unset: `render_for_completion`) makes at most `budget` (>= 8) tokens.

    Whole pairs of user and assistant go first, the oldest before the newer; the system message stays. A last question
    that is too long alone keeps its end; a system text that leaves it less than a quarter of the budget goes.
    """
    validate({"messages": messages}, allow_empty_reply=True)
    has_system = messages[0]["role"] == "system"
    system, turns = messages[:has_system], messages[has_system:]
    if turns[-1]["role"] == "assistant":
        turns = turns[:-1]

    def excess(candidate: list[Message]) -> int:
        ids = render(candidate) if render else render_for_completion({"messages": candidate}, tokenizer)
        return len(ids) - budget

    last = len(turns) // 2  # pairs before the last question
    dropped = bisect_left(range(last), True, key=lambda pairs: excess(system + turns[2 * pairs :]) <= 0)
    kept = system + turns[2 * dropped :]
    if dropped < last or excess(kept) <= 0:
        return kept
    text = plain_text(turns[-1])
    if excess([*system, {"role": "user", "content": text[-1]}]) > -(budget // 4):
        system = []
    while (over := excess([*system, {"role": "user", "content": text}])) > 0 and len(text) > 1:
        # The first token that stays may begin inside a character: that character goes too.
        shorter = tokenizer.decode(tokenizer.encode(text)[over:]).lstrip("\ufffd")
        text = shorter if 0 < len(shorter) < len(text) else text[(len(text) + 1) // 2 :]
    return [*system, {"role": "user", "content": text}]
