"""Your own conversations, one JSON value a line."""

import json
from pathlib import Path

from nanochat.conversation import validate
from tasks.common import Conversation, Task, name_skipped


class CustomJSON(Task):
    """The lines of a JSONL file, each {"messages": [...]} or the list of messages alone; there is nothing to judge.

    A line that is no conversation is named as FILE:LINE, counted in `skipped` and left out; ValueError when all are.
    """

    name = "customjson"

    def __init__(self, path: Path | str) -> None:
        self._conversations: list[Conversation] = []
        problems = []
        with open(path, "rb") as lines:
            for number, line in enumerate(lines, 1):
                if not line.strip():
                    continue
                try:
                    value = json.loads(line.decode("utf-8-sig"))
                    conversation = {"messages": value.get("messages") if isinstance(value, dict) else value}
                    validate(conversation)
                    json.dumps(conversation, ensure_ascii=False).encode()  # half of a surrogate pair is no text
                    self._conversations.append(conversation)
                except (ValueError, RecursionError) as error:
                    problems.append(f"{path}:{number}: {error}")
        total = len(self._conversations) + len(problems)
        self.skipped = name_skipped(str(path), problems, total)
        if not self._conversations:
            raise ValueError(f'{path} holds no conversation: write one {{"messages": [...]}} a line')
        super().__init__(len(self._conversations))

    def example(self, index: int) -> Conversation:
        return self._conversations[index]
