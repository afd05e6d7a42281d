"""Many clients against a running server: latencies, errors, and what is left when they have gone.

    python -m scripts.chat_web --port 8000 --cache-mb 0 &
    python -m dev.load_test --clients 64 --seconds 120

Each client is a thread that asks, reads its answer as a stream, and asks again. `--leave 0.5` lets half of the answers
be left in the middle. The record has percentiles of the time to the first token, between tokens and to the end, errors
by kind, and the server's memory and gauges before, during and after.
"""

import http.client
import json
import random
import statistics
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import Any

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

    def __post_init__(self) -> None:
        """Raise ValueError for an address of another protocol."""
        if not self.url.startswith(("http://", "https://")):
            raise ValueError(f"--url {self.url} must be like http://127.0.0.1:8000")


@dataclass
class Result:
    """What one client, or all of them, saw. Times are in seconds."""

    first: list[float] = field(default_factory=list)  # from asking to the first text
    between: list[float] = field(default_factory=list)  # between one piece of text and the next
    whole: list[float] = field(default_factory=list)  # from asking to the end
    tokens: int = 0
    left: int = 0
    errors: Counter[str] = field(default_factory=Counter)

    def add(self, other: "Result") -> None:
        """Take up what another client saw."""
        self.first += other.first
        self.between += other.between
        self.whole += other.whole
        self.tokens += other.tokens
        self.left += other.left
        self.errors += other.errors


def connect(config: Config, path: str, body: Any = None) -> Any:
    """Return the open response to a GET, or to a POST of `body`. Raises OSError if there is none, or a refusal."""
    headers = {"Content-Type": "application/json"}
    if config.api_key:
        headers["Authorization"] = f"Bearer {config.api_key}"
    data = json.dumps(body).encode() if body else None
    request = urllib.request.Request(config.url.rstrip("/") + path, data, headers)
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # whatever $http_proxy says
    return direct.open(request, timeout=120)


def read_figures(config: Config) -> dict[str, float]:
    """Return the gauges and the memory that /metrics tells, each summed over all models."""
    from prometheus_client.parser import text_string_to_metric_families

    with connect(config, "/metrics") as response:
        text = response.read().decode()
    figures: Counter[str] = Counter()
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            figures[sample.name] += sample.value
    return {name: figures[name] for name in (*GAUGES, MEMORY) if name in figures}


def ask(config: Config, rng: random.Random, result: Result) -> None:
    """Ask once and read the answer, or leave in the middle of it. Raises OSError or HTTPException if it breaks off."""
    body = {
        "messages": [{"role": "user", "content": rng.choice(QUESTIONS)}],
        "stream": True,
        "stream_options": {"include_usage": True},
        "max_tokens": config.max_tokens,
        "temperature": config.temperature,
        "seed": rng.getrandbits(31),
    }
    leave_after = rng.randint(0, 8) if rng.random() < config.leave else None
    n_pieces = 0
    asked = time.monotonic()
    last = asked
    with connect(config, "/v1/chat/completions", body) as response:
        for line in response:
            if n_pieces == leave_after:
                result.left += 1
                return
            if not line.startswith(b"data: "):
                continue
            now = time.monotonic()
            if line.strip() == b"data: [DONE]":
                result.whole.append(now - asked)
                return
            event = json.loads(line[len(b"data: ") :])
            if "error" in event:
                result.errors[event["error"]["message"]] += 1
                return
            if event["usage"]:
                result.tokens += event["usage"]["completion_tokens"]
            elif event["choices"][0]["delta"].get("content"):
                times = result.between if n_pieces else result.first
                times.append(now - last)
                last = now
                n_pieces += 1
    result.errors["the stream ended without [DONE]"] += 1


def client(config: Config, seed: int, until: float, result: Result) -> None:
    """Ask again and again until the time is over."""
    rng = random.Random(seed)
    while time.monotonic() < until:
        try:
            ask(config, rng, result)
        except urllib.error.HTTPError as refusal:
            result.errors[f"status {refusal.code}"] += 1
            time.sleep(float(refusal.headers.get("Retry-After") or 0.1))
        except (OSError, http.client.HTTPException) as error:
            result.errors[type(error).__name__] += 1
            time.sleep(0.1)


def percentiles(values: list[float]) -> dict[str, float] | None:
    """Return milliseconds at 50, 90, 99 % and the longest; None where there was nothing to measure."""
    if len(values) < 2:
        return None
    cuts = statistics.quantiles(values, n=100, method="inclusive")
    shares = {"p50": cuts[49], "p90": cuts[89], "p99": cuts[98], "max": max(values)}
    return {name: round(1000 * value, 2) for name, value in shares.items()}


def load(config: Config) -> dict[str, Any]:
    """Put the load on and return the record."""
    from tqdm import tqdm

    before = read_figures(config)
    results = [Result() for _ in range(config.clients)]
    started = time.monotonic()
    until = started + config.seconds
    threads = []
    for seed, result in enumerate(results):
        thread = threading.Thread(target=client, args=(config, seed, until, result), daemon=True)
        thread.start()
        threads.append(thread)
    memory = []
    with tqdm(total=round(config.seconds), unit="s", desc="load") as bar:
        while time.monotonic() < until:
            time.sleep(min(5, max(0, until - time.monotonic())))
            bar.update(round(time.monotonic() - started) - bar.n)
            memory.append(round(read_figures(config)[MEMORY] / 2**20, 1))
    for thread in threads:
        thread.join(120)
    seconds = time.monotonic() - started
    # The server looks four times a second whether a client has left, so its gauges may need a moment.
    after = read_figures(config)
    deadline = time.monotonic() + 10
    while any(after[name] for name in GAUGES) and time.monotonic() < deadline:
        time.sleep(0.1)
        after = read_figures(config)
    total = Result()
    for result in results:
        total.add(result)
    settings = asdict(config)
    del settings["api_key"]
    return {
        "config": settings,
        "seconds": round(seconds, 1),
        "answers": len(total.whole),
        "left_by_client": total.left,
        "errors": dict(total.errors),
        "stuck_clients": sum(thread.is_alive() for thread in threads),
        "tokens_per_second": round(total.tokens / seconds, 1),
        "time_to_first_token_ms": percentiles(total.first),
        "between_pieces_ms": percentiles(total.between),
        "whole_answer_ms": percentiles(total.whole),
        "server_before": before,
        "server_memory_mib": memory,
        "server_after": after,
    }


def main() -> None:
    """Put the load on, print and keep the record; errors and clients that are stuck end with status 2."""
    config = cli.parse(Config, description=__doc__)
    try:
        record = load(config)
    except OSError as error:
        hint = "start one with python -m scripts.chat_web, or give --api-key"
        raise ValueError(f"no answer from the server at --url {config.url} ({error}): {hint}") from error
    print(json.dumps(record, indent=1))
    write_record(config.output or get_base_dir() / "evals" / "load_test.json", record)
    if record["errors"] or record["stuck_clients"] or any(record["server_after"][name] for name in GAUGES):
        raise ValueError("there were errors, stuck clients or places that were not freed: see the record")


if __name__ == "__main__":
    cli.run(main)
