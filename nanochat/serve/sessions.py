"""What a server remembers between requests: conversations by session name, and answers that would repeat exactly.

`begin` and `end` enclose the making of an answer in a session, which has one turn at a time:

    turn = sessions.begin((0, "ada"), [{"role": "user", "content": "And now?"}])
    turn.messages                   the conversation so far, with the new question
    sessions.end(turn, content)     the session holds `content` from now on
    sessions.end(turn)              it goes on from where it was: there was no answer
"""

import contextlib
import hashlib
import json
import threading
import time
from dataclasses import dataclass
from typing import Any

from cachetools import TTLCache

from nanochat.conversation import ChatFormat, Message
from nanochat.serve.messages import mend
from nanochat.serve.objects import SessionContent
from nanochat.serve.schema import ApiError

Key = tuple[int, str]  # the owner (the number of an API key) and the session's name: keys do not see each other's


@dataclass(eq=False)
class SessionTurn:
    """A turn that is being answered: the conversation up to its question, and the turns that no longer fit."""

    key: Key
    messages: list[Message]
    dropped_turns: int
    deleted: bool = False  # while it was answered


class Sessions:
    """Conversations by owner and name, each cut to `budget` tokens.

    They are forgotten `seconds` after their last turn; when there are more than `most`, the least recently used goes
    first.
    """

    def __init__(self, chat_format: ChatFormat, budget: int, most: int, seconds: float) -> None:
        self.chat_format = chat_format
        self.budget = budget
        self.seconds = seconds
        self._kept: TTLCache[Key, tuple[SessionContent, float]] = TTLCache(most, seconds)  # and when it expires
        self._answering: dict[Key, SessionTurn] = {}
        self._lock = threading.Lock()  # guards the two above

    def __len__(self) -> int:
        with self._lock:
            return len(self._kept)

    def begin(self, key: Key, new: list[Message]) -> SessionTurn:
        """Append messages to the conversation and let it be answered; a new system message replaces the old one.

        Raises ApiError 409 while another turn of the session is being answered, and ValueError if the messages do not
        follow on those before.
        """
        with self._lock:
            # Two turns at once would each be answered without the other, and the later answer would overwrite the
            # earlier. The lock is not held while the model writes: the turn keeps the name, other sessions go on.
            if key in self._answering:
                message = f"session {key[1]!r} is answering: wait for its answer"
                raise ApiError(409, message, "session_id", "session_busy")
            content, _ = self._kept.get(key, (None, 0.0))
            turn = SessionTurn(key, [], content["dropped_turns"] if content else 0)
            self._answering[key] = turn
        before = content["messages"] if content else []
        if any(message["role"] == "system" for message in new):
            before = [message for message in before if message["role"] != "system"]
        try:
            conversation = mend([*before, *new])
            turn.messages = self.chat_format.fit(conversation, self.budget)
        except BaseException:
            self.end(turn)
            raise
        # What is dropped goes in pairs: a question and its answer.
        turn.dropped_turns += (len(conversation) - len(turn.messages)) // 2
        return turn

    def end(self, turn: SessionTurn, content: SessionContent | None = None) -> None:
        """Let the next turn begin. content: what the session now holds; None leaves it as it was before this turn.

        A turn that has ended already stays as it is.
        """
        with self._lock:
            if self._answering.get(turn.key) is not turn:
                return
            del self._answering[turn.key]
            # A client that deletes a session while it answers does not want it to come back with the answer.
            if content is not None and not turn.deleted:
                self._kept[turn.key] = (content, time.monotonic() + self.seconds)

    def get(self, key: Key) -> SessionContent | None:
        """Return what the session holds, with the seconds it has left; None if there is no such session (any more)."""
        with self._lock:
            if key not in self._kept:
                return None
            kept, expires = self._kept[key]
        # A copy, because the seconds that are left differ each time.
        content = kept.copy()
        content["expires_in"] = round(max(0.0, expires - time.monotonic()), 1)
        return content

    def forget(self, key: Key) -> bool:
        """Delete a session, and the answer it is waiting for. Returns False if there is none."""
        with self._lock:
            turn = self._answering.get(key)
            if turn is not None:
                turn.deleted = True
            return self._kept.pop(key, None) is not None or turn is not None


class ResponseCache:
    """Answers that are sure to repeat (temperature 0, or a seed), so that asking again costs no computing.

    They are kept for `seconds`; beyond `most_bytes` the oldest go. app.py says what an answer's key is made of.
    """

    def __init__(self, most_bytes: int, seconds: float) -> None:
        # The length of the text form is near enough to the memory that an answer takes.
        self._kept: TTLCache[str, Any] = TTLCache(most_bytes, seconds, getsizeof=lambda value: len(repr(value)))
        self._n_cleared = 0
        self._lock = threading.Lock()

    def __len__(self) -> int:
        with self._lock:
            return len(self._kept)

    def key(self, question: Any) -> str:
        """Return a key for a JSON value. `clear` changes all keys, so an answer begun before it is not found after."""
        # A digest and not the question itself: a key is 64 characters long, whatever the conversation.
        return hashlib.sha256(json.dumps([self._n_cleared, question], sort_keys=True).encode()).hexdigest()

    def get(self, key: str) -> Any | None:
        """Return what is kept under `key`, if anything."""
        with self._lock:
            return self._kept.get(key)

    def put(self, key: str, value: Any) -> None:
        """Keep a value, unless it is larger than the whole cache."""
        with self._lock, contextlib.suppress(ValueError):
            self._kept[key] = value

    def clear(self) -> int:
        """Forget all answers; return how many there were."""
        with self._lock:
            n = len(self._kept)
            self._kept.clear()
            self._n_cleared += 1
        return n
