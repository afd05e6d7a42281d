"""Many clients against a running server: latencies, errors, and what is left when they have gone.

    python -m scripts.chat_web --port 8000 --cache-mb 0 &
    python -m dev.load_test --clients 64 --seconds 120

Each client asks, reads its answer as a stream, and asks again. `--leave 0.5` lets half of the answers be left in the
middle. The record has percentiles of the time to the first token, between tokens and to the end, errors by kind, and
the server's memory and gauges before, during and after.
"""

import http.client
import json
import random
import statistics
import threading
import time
from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import Any
from urllib.parse import urlsplit

from nanochat import cli
from nanochat.cli import option
from nanochat.common import get_base_dir, write_record

QUESTIONS = ("What is 37*48?", "How many r are in strawberry?", "What is the capital of France?", "Tell me a story")
GAUGES = ("nanochat_num_requests_running", "nanochat_num_requests_waiting", "nanochat_kv_cache_tokens")
MEMORY = "process_resident_memory_bytes"


@dataclass(frozen=True)
class Config:
    """Which server, and what is done to it."""

    url: str = option("http://127.0.0.1:8000", "the server")
    api_key: str | None = option(None, "a key, where it wants one")
    clients: int = option(16, "clients at the same time")
    seconds: float = option(30.0, "how long they go on asking")
    max_tokens: int = option(64, "longest answer in tokens")
    temperature: float = option(0.8, "of the answers")
    leave: float = option(0.0, "share of the answers whose client leaves in the middle")
    output: str | None = option(None, "where the record goes; unset: evals/load_test.json in the base directory")


@dataclass
class Result:
    """What one client, or all of them, saw."""

    first: list[float] = field(default_factory=list)  # seconds from asking to the first text
    between: list[float] = field(default_factory=list)  # between one piece of text and the next
    whole: list[float] = field(default_factory=list)  # from asking to the end
    tokens: int = 0
    left: int = 0
    errors: Counter[str] = field(default_factory=Counter)

    def add(self, other: "Result") -> None:
        """Take up what another client saw."""
        for mine, theirs in ((self.first, other.first), (self.between, other.between), (self.whole, other.whole)):
            mine.extend(theirs)
        self.tokens, self.left = self.tokens + other.tokens, self.left + other.left
        self.errors.update(other.errors)


class Server:
    """The address of a server and how it is spoken to."""

    def __init__(self, config: Config) -> None:
        parts = urlsplit(config.url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"--url {config.url} must be like http://127.0.0.1:8000")
        self.config, self.address, self.path = config, (parts.hostname, parts.port), parts.path.rstrip("/")
        self.kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        self.headers = {"Content-Type": "application/json"}
        if config.api_key:
            self.headers["Authorization"] = f"Bearer {config.api_key}"

    def open(self, method: str, path: str, body: Any = None) -> tuple[Any, Any]:
        """(connection, response) of a request."""
        connection = self.kind(*self.address, timeout=120)
        connection.request(method, self.path + path, json.dumps(body) if body else None, self.headers)
        return connection, connection.getresponse()

    def figures(self) -> dict[str, float]:
        """The gauges and the memory that /metrics tells."""
        connection, response = self.open("GET", "/metrics")
        lines = [line.rsplit(" ", 1) for line in response.read().decode().splitlines() if not line.startswith("#")]
        connection.close()
        figures: Counter[str] = Counter()  # of all the models together
        for name, value in lines:
            figures[name.partition("{")[0]] += float(value)
        return {name: figures[name] for name in (*GAUGES, MEMORY) if name in figures}

    def ask(self, rng: random.Random, result: Result) -> None:
        """Ask once and read the answer, or leave in the middle of it."""
        config = self.config
        body = {"messages": [{"role": "user", "content": rng.choice(QUESTIONS)}], "stream": True}
        body |= {"max_tokens": config.max_tokens, "temperature": config.temperature, "seed": rng.getrandbits(31)}
        body["stream_options"] = {"include_usage": True}
        leave_after = rng.randint(0, 8) if rng.random() < config.leave else None
        asked = last = time.monotonic()
        connection, response = self.open("POST", "/v1/chat/completions", body)
        try:
            if response.status != 200:
                result.errors[f"status {response.status}"] += 1
                time.sleep(float(response.getheader("Retry-After") or 0.1))
                return
            n_pieces, done = 0, False
            for line in response:
                if leave_after is not None and n_pieces >= leave_after:
                    result.left += 1
                    return
                if not line.startswith(b"data: "):
                    continue
                if done := line.strip() == b"data: [DONE]":
                    break
                event, now = json.loads(line[6:]), time.monotonic()
                if "error" in event:
                    result.errors[event["error"]["message"]] += 1
                    return
                result.tokens += (event.get("usage") or {}).get("completion_tokens", 0)
                if event["choices"] and event["choices"][0]["delta"].get("content"):
                    (result.between if n_pieces else result.first).append(now - (last if n_pieces else asked))
                    last, n_pieces = now, n_pieces + 1
            if done:
                result.whole.append(time.monotonic() - asked)
            else:
                result.errors["the stream ended without [DONE]"] += 1
        finally:
            connection.close()

    def go_on_asking(self, seed: int, until: float, result: Result) -> None:
        """A client: ask until the time is over."""
        rng = random.Random(seed)
        while time.monotonic() < until:
            try:
                self.ask(rng, result)
            except (OSError, http.client.HTTPException) as error:
                result.errors[type(error).__name__] += 1
                time.sleep(0.1)


def percentiles(values: list[float]) -> dict[str, float] | None:
    """Milliseconds at 50, 90, 99 % and the longest; None where there was nothing to measure."""
    if len(values) < 2:
        return None
    cuts = statistics.quantiles(values, n=100, method="inclusive")
    shares = {"p50": cuts[49], "p90": cuts[89], "p99": cuts[98], "max": max(values)}
    return {name: round(1000 * value, 2) for name, value in shares.items()}


def load(config: Config) -> dict[str, Any]:
    """Put the load on and return the record."""
    from tqdm import tqdm

    server = Server(config)
    before = server.figures()
    results = [Result() for _ in range(config.clients)]
    started = time.monotonic()
    until = started + config.seconds
    jobs = [(i, until, result) for i, result in enumerate(results)]
    threads = [threading.Thread(target=server.go_on_asking, args=job, daemon=True) for job in jobs]
    for thread in threads:
        thread.start()
    during = []
    with tqdm(total=round(config.seconds), unit="s", desc="load") as bar:
        while (left := until - time.monotonic()) > 0:
            time.sleep(min(5, left))
            bar.update(round(time.monotonic() - started) - bar.n)
            during.append(server.figures())
    for thread in threads:
        thread.join(120)
    stuck = sum(thread.is_alive() for thread in threads)
    seconds = time.monotonic() - started
    deadline = time.monotonic() + 10
    while any((after := server.figures())[name] for name in GAUGES) and time.monotonic() < deadline:
        time.sleep(0.1)
    total = Result()
    for result in results:
        total.add(result)
    return {
        "config": {name: value for name, value in asdict(config).items() if name != "api_key"},
        "seconds": round(seconds, 1),
        "answers": len(total.whole),
        "left_by_client": total.left,
        "errors": dict(total.errors),
        "stuck_clients": stuck,
        "tokens_per_second": round(total.tokens / seconds, 1),
        "time_to_first_token_ms": percentiles(total.first),
        "between_pieces_ms": percentiles(total.between),
        "whole_answer_ms": percentiles(total.whole),
        "server_before": before,
        "server_memory_mib": [round(figures[MEMORY] / 2**20, 1) for figures in during],
        "server_after": after,
    }


def main() -> None:
    """Put the load on, print and keep the record; errors and clients that are stuck end with status 2."""
    config = cli.parse(Config, description=__doc__)
    try:
        record = load(config)
    except ConnectionError as error:
        raise ValueError(
            f"no server at --url {config.url} ({error}): start one with python -m scripts.chat_web"
        ) from error
    print(json.dumps(record, indent=1))
    write_record(config.output or get_base_dir() / "evals" / "load_test.json", record)
    if record["errors"] or record["stuck_clients"] or any(record["server_after"][name] for name in GAUGES):
        raise ValueError("there were errors, stuck clients or places that were not freed: see the record")


if __name__ == "__main__":
    cli.run(main)
