"""Your own conversations to train on, one JSON value a line:

{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}

An answer with `"weight": 0` beside its role and content, as OpenAI's fine-tuning format has it, is context only.

An answer that uses the calculator is a list of parts. What the tool returned is one of them, and is not learned; a
message of role "tool", as OpenAI's API has, is refused. It must be one line, and is only broken here to be read:

{"messages": [{"role": "user", "content": "What is 37*48?"}, {"role": "assistant", "content": [
    {"type": "text", "text": "It is "},
    {"type": "python", "text": "37*48"}, {"type": "python_output", "text": "1776"},
    {"type": "text", "text": "1776."}]}]}
"""

import json
from pathlib import Path

from nanochat.conversation import validate
from tasks.common import Conversation, Task, name_skipped


class CustomJSON(Task):
    """The lines of a JSONL file, each {"messages": [...]} or the list of messages alone; there is nothing to judge.

    A line that is no conversation is named as FILE:LINE, counted in `skipped` and left out. Raises ValueError if no
    line is one.
    """

    name = "customjson"

    def __init__(self, path: Path | str) -> None:
        self.conversations: list[Conversation] = []
        problems = []
        with open(path, "rb") as lines:
            for number, line in enumerate(lines, start=1):
                if not line.strip():
                    continue
                try:
                    self.conversations.append(_conversation(line))
                except (ValueError, RecursionError) as error:
                    problems.append(f"{path}:{number}: {error}")
        total = len(self.conversations) + len(problems)
        self.skipped = name_skipped(str(path), problems, total)
        if not self.conversations:
            raise ValueError(f'{path} holds no conversation: write one {{"messages": [...]}} a line')
        super().__init__(len(self.conversations))

    def example(self, index: int) -> Conversation:
        return self.conversations[index]


def _conversation(line: bytes) -> Conversation:
    """Return the conversation of a line. Raises ValueError if it is none."""
    value = json.loads(line.decode("utf-8-sig"))
    messages = value.get("messages") if isinstance(value, dict) else value
    conversation = {"messages": messages}
    validate(conversation)
    # JSON can spell half of a surrogate pair, which is no text: encoding it raises ValueError.
    json.dumps(conversation, ensure_ascii=False).encode()
    return conversation
