"""What a server remembers: conversations under a session's name, and answers that would come out the same again."""

import contextlib
import hashlib
import json
import threading
import time
from typing import Any

from nanochat.chat_format import ChatFormat
from nanochat.conversation import Message
from nanochat.serve.schema import ApiError

Key = tuple[int, str]  # who owns a session (the number of an API key), and its name


class Sessions:
    """Conversations by their keys, forgotten `seconds` after their last turn, or when there are more than
    `most` (the one used longest ago first). Of each only the turns that fit `budget` tokens are kept.
    """

    def __init__(self, form: ChatFormat, budget: int, most: int, seconds: float) -> None:
        from cachetools import TTLCache

        self.form, self.budget, self.seconds = form, budget, seconds
        self._kept: TTLCache = TTLCache(most, seconds)
        self._busy: dict[Key, bool] = {}  # those that are answering, and whether to keep what comes of it
        self._lock = threading.Lock()

    def __len__(self) -> int:
        with self._lock:
            return len(self._kept)

    def begin(self, key: Key, new: list[Message]) -> tuple[list[Message], int]:
        """The conversation with messages `new` behind it, a new system message in the old one's place; and how many
        turns have been left out of it so far, to keep to the budget.

        Only one answer at a time: ApiError 409 until `end`, 400 when the messages do not follow each other.
        """
        with self._lock:
            if key in self._busy:
                message = f"session {key[1]!r} is answering: wait for its answer"
                raise ApiError(409, message, "session_id", "session_busy")
            kept = self._kept.get(key, {"messages": [], "dropped_turns": 0})
            self._busy[key] = True
        try:
            old, system = kept["messages"], []
            if new[0]["role"] == "system":
                system, new = new[:1], new[1:]
                old = old[1:] if old and old[0]["role"] == "system" else old
            whole = [*system, *old, *new]
            messages = self.form.fit(whole, self.budget)
            return messages, kept["dropped_turns"] + (len(whole) - len(messages)) // 2
        except ValueError as error:
            self.end(key)
            raise ApiError(400, str(error), "messages") from error

    def end(self, key: Key, turn: dict[str, Any] | None = None) -> None:
        """Let the next answer begin; `turn` is what the session now holds, None = what it held before."""
        with self._lock:
            if self._busy.pop(key) and turn is not None:
                self._kept[key] = {**turn, "expires": time.monotonic() + self.seconds}

    def get(self, key: Key) -> dict[str, Any] | None:
        """What the session holds, with the seconds until it ends; None when there is no such session (any more)."""
        with self._lock:
            if (turn := self._kept.get(key)) is None:
                return None
        left = round(max(0.0, turn["expires"] - time.monotonic()), 1)
        return {k: v for k, v in turn.items() if k != "expires"} | {"expires_in": left}

    def forget(self, key: Key) -> bool:
        """End a session, and with it what is being answered in it; False when there is none."""
        with self._lock:
            if answering := key in self._busy:
                self._busy[key] = False
            return self._kept.pop(key, None) is not None or answering


class ResponseCache:
    """Answers that would be the same (temperature 0 or a seed), for `seconds`; past `most_bytes` the oldest go."""

    def __init__(self, most_bytes: int, seconds: float) -> None:
        from cachetools import TTLCache

        self._kept: TTLCache = TTLCache(most_bytes, seconds, getsizeof=lambda value: len(repr(value)))  # near enough
        self._lock, self._n_cleared = threading.Lock(), 0

    def __len__(self) -> int:
        with self._lock:
            return len(self._kept)

    def key(self, parts: Any) -> str:
        """Name of a JSON value until the next `clear`: what was begun before it is not found after it."""
        return hashlib.sha256(json.dumps([self._n_cleared, parts], sort_keys=True).encode()).hexdigest()

    def get(self, key: str) -> Any | None:
        """What was put under `key`, if it is still there."""
        with self._lock:
            return self._kept.get(key)

    def put(self, key: str, value: Any) -> None:
        """Keep `value`, unless it is larger than the whole cache."""
        with self._lock, contextlib.suppress(ValueError):
            self._kept[key] = value

    def clear(self) -> int:
        """Forget everything; how many answers that were."""
        with self._lock:
            n = len(self._kept)
            self._kept.clear()
            self._n_cleared += 1
        return n
