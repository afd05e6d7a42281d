"""Counters, gauges and histograms in Prometheus' text format. Names follow vLLM's (docs.vllm.ai, "Metrics")."""

from collections.abc import Iterator, Sequence
from typing import Any

from nanochat.engine import Engine

# Upper ends of the histograms' buckets: from a token on a GPU (5 ms) to a long answer on a laptop (a minute).
SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 60)

# Key of Engine.stats -> name and help text. Counters end in _total, the others are gauges.
ENGINE_FIGURES = {
    "running": ("num_requests_running", "Sequences in prefill or decode"),
    "waiting": ("num_requests_waiting", "Sequences in the queue"),
    "cache_tokens": ("kv_cache_tokens", "Tokens of running sequences in the KV cache"),
    "prompt_tokens": ("prompt_tokens_total", "Prompt tokens, those found in the prefix cache included"),
    "output_tokens": ("generation_tokens_total", "Tokens of answers"),
    "prefix_queried_tokens": ("prefix_cache_queries_total", "Tokens looked up in the prefix cache"),
    "prefix_reused_tokens": ("prefix_cache_hits_total", "Tokens found in the prefix cache"),
    "preemptions": ("num_preemptions_total", "Sequences that had to give up their place in the KV cache"),
}


class Metrics:
    """The measurements of a server, labelled by model. Engines count for themselves and are asked at each scrape."""

    def __init__(self) -> None:
        from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector

        # A registry of its own and not the library's global one: tests make many servers in one process.
        self.registry = CollectorRegistry()
        self._engines: dict[str, Sequence[Engine]] = {}

        def counter(name: str, text: str, labels: list[str]) -> Counter:
            return Counter(f"nanochat_{name}", text, labels, registry=self.registry)

        def histogram(name: str, text: str) -> Histogram:
            return Histogram(
                name=f"nanochat_{name}_seconds",
                documentation=text,
                labelnames=["model_name"],
                buckets=SECONDS,
                registry=self.registry,
            )

        self.requests = counter("request_success", "Sequences that ended", ["model_name", "finished_reason"])
        self.refused = counter("requests_refused", "HTTP answers of status 400 and more", ["status"])
        self.cache_hits = counter("response_cache_hits", "Answers from the response cache", ["model_name"])
        self.queue_time = histogram("request_queue_time", "Arrival to first work")
        self.first_token = histogram("time_to_first_token", "Arrival to first token")
        self.between_tokens = histogram("inter_token_latency", "Token to token")
        self.end_to_end = histogram("e2e_request_latency", "Arrival to last token")
        self.replica_up = Gauge(
            name="nanochat_replica_up",
            documentation="1 while the engine works",
            labelnames=["model_name", "replica"],
            registry=self.registry,
        )
        self.registry.register(self)  # calls `collect` at each scrape
        ProcessCollector(registry=self.registry)  # memory, processor time, open files

    def add_model(self, model_name: str, engines: Sequence[Engine]) -> None:
        """Begin the series of a model at zero, so that a scrape sees them before the first request."""
        self._engines[model_name] = engines
        self.cache_hits.labels(model_name)
        for times in (self.queue_time, self.first_token, self.between_tokens, self.end_to_end):
            times.labels(model_name)
        for replica in range(len(engines)):
            self.replica_up.labels(model_name, str(replica)).set(1)

    def replica_died(self, model_name: str, replica: int) -> None:
        """Record that an engine has stopped for good."""
        self.replica_up.labels(model_name, str(replica)).set(0)

    def started(self, model_name: str, since_arrival: float) -> None:
        """Record that a sequence left the queue."""
        self.queue_time.labels(model_name).observe(since_arrival)

    def new_tokens(self, model_name: str, n: int, since_arrival: float, since_last: float | None) -> None:
        """Record that a step gave a sequence `n` tokens. since_last: seconds since the step before; None: its first."""
        if since_last is None:
            self.first_token.labels(model_name).observe(since_arrival)
        else:
            # A tool's result comes as several tokens at once; the reader waited once for all of them.
            self.between_tokens.labels(model_name).observe(since_last / n)

    def finished(self, model_name: str, reason: str, since_arrival: float | None = None) -> None:
        """Record the end of a sequence; its latency counts only if it came to a regular end."""
        self.requests.labels(model_name, reason).inc()
        # Aborted and broken answers end early; among the latencies they would make a bad hour look fast.
        if since_arrival is not None:
            self.end_to_end.labels(model_name).observe(since_arrival)

    def engine_figures(self, model_name: str) -> dict[str, int]:
        """Return the figures of Engine.stats, summed over the model's replicas."""
        # Read from a handler's thread while the engine runs: these are lengths and counters, one step old at worst.
        figures = [engine.stats() for engine in self._engines[model_name]]
        return {key: sum(each[key] for each in figures) for key in ENGINE_FIGURES}

    def collect(self) -> Iterator[Any]:
        """Yield the engines' figures as metric families (the collector protocol of prometheus_client)."""
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

        figures = {model_name: self.engine_figures(model_name) for model_name in list(self._engines)}
        for key, (name, text) in ENGINE_FIGURES.items():
            kind = CounterMetricFamily if name.endswith("_total") else GaugeMetricFamily
            family = kind(f"nanochat_{name}", text, labels=["model_name"])
            for model_name, values in figures.items():
                family.add_metric([model_name], values[key])
            yield family

    def text(self) -> bytes:
        """Return the body of /metrics."""
        from prometheus_client import generate_latest

        return generate_latest(self.registry)
