"""What a server remembers: conversations under a session's name, and answers that would come out the same again."""

import contextlib
import hashlib
import json
import threading
import time
from typing import Any

from nanochat.api import ApiError
from nanochat.chat_format import Format
from nanochat.conversation import Message


class Sessions:
    """Conversations by (owner, session id), forgotten `seconds` after their last turn, or when there are more than
    `most` (the one used longest ago first). Of each only the turns that fit `budget` tokens are kept.
    """

    def __init__(self, form: Format, budget: int, most: int, seconds: float) -> None:
        from cachetools import TTLCache

        self.form, self.budget, self.seconds = form, budget, seconds
        self._kept: TTLCache = TTLCache(most, seconds)
        self._busy: set[tuple[int, str]] = set()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        with self._lock:
            return len(self._kept)

    def begin(self, owner: int, name: str, new: list[Message]) -> tuple[list[Message], int]:
        """The conversation with messages `new` behind it, a new system message in the old one's place; and how many
        turns have been left out of it so far, to keep to the budget.

        Only one answer at a time: ApiError 409 until `end`. ValueError when the messages do not follow each other.
        """
        with self._lock:
            if (owner, name) in self._busy:
                raise ApiError(409, f"session {name!r} is answering: wait for its answer", "session_id", "session_busy")
            kept = self._kept.get((owner, name), {"messages": [], "dropped_turns": 0})
            self._busy.add((owner, name))
        try:
            old, system = kept["messages"], []
            if new[0]["role"] == "system":
                system, new = new[:1], new[1:]
                old = old[1:] if old and old[0]["role"] == "system" else old
            whole = [*system, *old, *new]
            messages = self.form.fit(whole, self.budget)
            return messages, kept["dropped_turns"] + (len(whole) - len(messages)) // 2
        except ValueError:
            self.end(owner, name)
            raise

    def end(self, owner: int, name: str, turn: dict[str, Any] | None = None) -> None:
        """Let the next answer begin; `turn` is what the session now holds, None = what it held before."""
        with self._lock:
            self._busy.discard((owner, name))
            if turn is not None:
                self._kept[owner, name] = {**turn, "expires": time.monotonic() + self.seconds}

    def get(self, owner: int, name: str) -> dict[str, Any] | None:
        """What the session holds, with the seconds until it ends; None when there is no such session (any more)."""
        with self._lock:
            if (turn := self._kept.get((owner, name))) is None:
                return None
        left = round(max(0.0, turn["expires"] - time.monotonic()), 1)
        return {k: v for k, v in turn.items() if k != "expires"} | {"expires_in": left}

    def forget(self, owner: int, name: str) -> bool:
        """End a session; False when there is none."""
        with self._lock:
            return self._kept.pop((owner, name), None) is not None


class ResponseCache:
    """Answers that would be the same (temperature 0 or a seed), for `seconds`; past `most_bytes` the oldest go."""

    def __init__(self, most_bytes: int, seconds: float) -> None:
        from cachetools import TTLCache

        self._kept: TTLCache = TTLCache(most_bytes, seconds, getsizeof=lambda value: len(repr(value)))  # near enough
        self._lock = threading.Lock()

    def __len__(self) -> int:
        with self._lock:
            return len(self._kept)

    @staticmethod
    def key(parts: Any) -> str:
        """Name of a JSON value."""
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

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
        return n
