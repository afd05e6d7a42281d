"""What a server counts and times, in Prometheus' text format; names follow vLLM's (docs.vllm.ai, "Metrics")."""

from collections.abc import Iterator
from typing import Any

from nanochat.engine import Engine

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 60)
ENGINE = {  # key of Engine.stats -> name and meaning; counters end in _total
    "running": ("num_requests_running", "Sequences that are read or continued"),
    "waiting": ("num_requests_waiting", "Sequences in the queue"),
    "cache_tokens": ("kv_cache_tokens", "Tokens of running sequences in the cache"),
    "prompt_tokens": ("prompt_tokens_total", "Tokens of prompts, known beginnings included"),
    "output_tokens": ("generation_tokens_total", "Tokens of answers"),
    "prefix_queried_tokens": ("prefix_cache_queries_total", "Tokens looked up among known beginnings"),
    "prefix_reused_tokens": ("prefix_cache_hits_total", "Tokens found there"),
    "preemptions": ("num_preemptions_total", "Sequences that had to give up their place"),
}


class Metrics:
    """One server's counters and histograms; the engine's own figures are read when they are asked for."""

    def __init__(self, engine: Engine) -> None:
        from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector

        self.registry = CollectorRegistry()

        def count(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"nanochat_{name}", text, labels, registry=self.registry)

        def time(name: str, text: str) -> Histogram:
            return Histogram(f"nanochat_{name}_seconds", text, buckets=SECONDS, registry=self.registry)

        self.requests = count("request_success", "Sequences that ended", "finished_reason")
        self.refused = count("requests_refused", "HTTP answers of status 400 and more", "status")
        self.cache_hits = count("response_cache_hits", "Answers given again from the response cache")
        self.first_token = time("time_to_first_token", "Arrival to first token")
        self.between_tokens = time("inter_token_latency", "Token to token")
        self.end_to_end = time("e2e_request_latency", "Arrival to last token")
        self.queue_time = time("request_queue_time", "Arrival to first work")
        self.registry.register(_EngineFigures(engine))
        ProcessCollector(registry=self.registry)  # memory, processor time, open files

    def new_tokens(self, n: int, since_arrival: float, since_last: float | None) -> None:
        """A sequence got `n` tokens, `since_last` seconds after those before, None = its first."""
        if since_last is None:
            self.first_token.observe(since_arrival)
        else:
            self.between_tokens.observe(since_last / n)

    def finished(self, reason: str, seconds: float | None = None) -> None:
        """A sequence has ended, so long after it came."""
        self.requests.labels(reason).inc()
        if seconds is not None:
            self.end_to_end.observe(seconds)

    def text(self) -> bytes:
        """The content of /metrics."""
        from prometheus_client import generate_latest

        return generate_latest(self.registry)


class _EngineFigures:
    """A collector of Prometheus' client over `Engine.stats`."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    def collect(self) -> Iterator[Any]:
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

        for key, value in self.engine.stats().items():
            name, text = ENGINE[key]
            kind = CounterMetricFamily if name.endswith("_total") else GaugeMetricFamily
            yield kind(f"nanochat_{name}", text, value=value)
