"""What a server offers: its limits, and its models by name.

`ServerConfig` holds the flags that every part of the server obeys. `Models` is the catalogue that the routes ask: it
knows which models there are, which of them are loaded, and whether this server should get requests at all.
"""

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from nanochat.cli import option, require_positive
from nanochat.conversation import ChatFormat
from nanochat.engine import Engine
from nanochat.serve.loop import ENGINE_DEAD, Model
from nanochat.serve.metrics import Metrics
from nanochat.serve.schema import ApiError
from nanochat.serve.sessions import ResponseCache, Sessions

KEYS_VARIABLE = "NANOCHAT_API_KEYS"


@dataclass(frozen=True)
class ServerConfig:
    """The limits and defaults of a server."""

    temperature: float = option(0.0, "for requests that give none; 0 is the likeliest answer")
    max_batch: int = option(32, "answers that a model makes at the same time; further ones wait")
    max_waiting: int = option(64, "answers that may wait while others are made; more are refused with 429")
    max_tokens: int | None = option(None, "longest answer in tokens; unset: as far as the context goes")
    max_body: int = option(1 << 20, "longest body of a request, in bytes")
    api_keys: str | None = option(None, f"file of API keys, one a line; ${KEYS_VARIABLE} (by commas) adds to them")
    cors_origin: str | None = option(None, "web pages of this origin may use the API, * = of any; unset: none but ours")
    max_sessions: int = option(1000, "conversations kept by session_id; the least recently used goes first")
    session_seconds: float = option(3600.0, "how long a session is kept after its last turn")
    cache_mb: float = option(16.0, "memory per model for answers that would come out the same again; 0: none kept")
    cache_seconds: float = option(600.0, "how long such an answer is kept")

    def __post_init__(self) -> None:
        """Raise ValueError for a flag with which no request could be answered."""
        require_positive(self, "max_batch", "max_tokens", "max_body", "max_sessions")
        require_positive(self, "session_seconds", "cache_seconds")
        require_positive(self, "temperature", "max_waiting", "cache_mb", zero=True)


class Models:
    """The models of a server by name. A name is known before its model is loaded; until `add` it answers 503."""

    def __init__(self, config: ServerConfig, names: Iterable[str], n_replicas: int = 1) -> None:
        self.config = config
        self.n_replicas = n_replicas
        self.metrics = Metrics()
        self.started = time.time()
        self.draining = False
        self._models: dict[str, Model | None] = dict.fromkeys(names)

    def add(self, name: str, engines: Sequence[Engine], chat_format: ChatFormat) -> None:
        """Start the threads of a model's replicas and let it answer."""
        context = engines[0].context
        # ChatFormat.prompt leaves the same share of the context to the conversation, so that what a session keeps still
        # fits its next prompt.
        budget = context - context // 4
        config = self.config
        self._models[name] = Model(
            name=name,
            engines=engines,
            chat_format=chat_format,
            sessions=Sessions(chat_format, budget, config.max_sessions, config.session_seconds),
            responses=ResponseCache(int(config.cache_mb * 2**20), config.cache_seconds),
            max_waiting=config.max_waiting,
            metrics=self.metrics,
        )

    @property
    def loaded(self) -> list[Model]:
        """The models that can be asked."""
        # A copy of the values: the loading thread may add a model while a handler goes through them.
        return [model for model in list(self._models.values()) if model is not None]

    def get(self, name: str | None) -> Model:
        """Return a model by name; None means the first. Raises ApiError 404 if there is none, 503 while it loads."""
        if name is None:
            name = next(iter(self._models))
        if name not in self._models:
            message = f"there is no model {name!r}: this server has {', '.join(self._models)}"
            raise ApiError(404, message, "model", "model_not_found")
        model = self._models[name]
        if model is None:
            raise ApiError(503, "the model is being loaded; try again later", headers={"Retry-After": "5"})
        return model

    def get_for_answer(self, name: str | None) -> Model:
        """As `get`, and raise ApiError 503 if the model makes no answers: after SIGTERM, or when its engines are dead.

        Answers from the response cache are refused, too: a load balancer should hear the same from every request.
        """
        model = self.get(name)
        if self.draining:
            raise ApiError(503, "the server is shutting down; try again later", headers={"Retry-After": "5"})
        if not model.alive:
            raise ApiError(503, ENGINE_DEAD, headers={"Retry-After": "5"})
        return model

    @property
    def trouble(self) -> str | None:
        """Why this server should get no requests now, for /health; None when all is well."""
        # One living replica is enough: a load balancer that heard 503 would take away the others' answers, too.
        dead = [model.name for model in self.loaded if not model.alive]
        if dead:
            return f"the engine died: {', '.join(dead)}"
        if self.draining:
            return "shutting down"
        if len(self.loaded) < len(self._models):
            return "loading"
        return None

    @property
    def n_open(self) -> int:
        """Number of requests that run or wait, over all models."""
        return sum(model.n_open for model in self.loaded)

    @property
    def most_open(self) -> int:
        """The largest `n_open` that can be, with all models loaded."""
        # The server's threads are counted before any model is loaded, so those still to come are counted by the flags.
        each = self.n_replicas * (self.config.max_batch + self.config.max_waiting)
        return sum(model.limit if model else each for model in self._models.values())

    def drain(self) -> None:
        """Refuse new answers from now on; those that were begun go on.

        The port stays open meanwhile: clients hear 503 with Retry-After, which tells them and the load balancer more
        than a refused connection.
        """
        self.draining = True

    def close(self) -> None:
        """End the threads of all engines."""
        for model in self.loaded:
            for loop in model.replicas:
                loop.close()
