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
    """One server's counters and histograms, labelled by model; an engine's own figures are read when asked for."""

    def __init__(self) -> None:
        from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector

        self.registry, self.engines = CollectorRegistry(), dict[str, Any]()

        def count(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"nanochat_{name}", text, labels, registry=self.registry)

        def time(name: str, text: str) -> Histogram:
            name = f"nanochat_{name}_seconds"
            return Histogram(name, text, ["model_name"], buckets=SECONDS, registry=self.registry)

        self.requests = count("request_success", "Sequences that ended", "model_name", "finished_reason")
        self.refused = count("requests_refused", "HTTP answers of status 400 and more", "status")
        self.cache_hits = count("response_cache_hits", "Answers given again from the response cache", "model_name")
        self.first_token = time("time_to_first_token", "Arrival to first token")
        self.between_tokens = time("inter_token_latency", "Token to token")
        self.end_to_end = time("e2e_request_latency", "Arrival to last token")
        self.queue_time = time("request_queue_time", "Arrival to first work")
        self.registry.register(self)
        ProcessCollector(registry=self.registry)  # memory, processor time, open files

    def collect(self) -> Iterator[Any]:
        """The engines' figures, for Prometheus' client."""
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

        figures = {model: engine.stats() for model, engine in list(self.engines.items())}
        for key, (name, text) in ENGINE.items():
            kind = CounterMetricFamily if name.endswith("_total") else GaugeMetricFamily
            family = kind(f"nanochat_{name}", text, labels=["model_name"])
            for model, values in figures.items():
                family.add_metric([model], values[key])
            yield family

    def text(self) -> bytes:
        """The content of /metrics."""
        from prometheus_client import generate_latest

        return generate_latest(self.registry)


class ModelMetrics:
    """What is measured of one model of a server."""

    def __init__(self, metrics: Metrics, model_name: str, engine: Engine) -> None:
        metrics.engines[model_name] = engine
        self._requests, self.model_name = metrics.requests, model_name
        self.cache_hits, self.queue_time = metrics.cache_hits.labels(model_name), metrics.queue_time.labels(model_name)
        times = metrics.first_token, metrics.between_tokens, metrics.end_to_end
        self._first_token, self._between_tokens, self._end_to_end = (each.labels(model_name) for each in times)

    def new_tokens(self, n: int, since_arrival: float, since_last: float | None) -> None:
        """A sequence got `n` tokens, `since_last` seconds after those before, None = its first."""
        if since_last is None:
            self._first_token.observe(since_arrival)
        else:
            self._between_tokens.observe(since_last / n)

    def finished(self, reason: str, seconds: float | None = None) -> None:
        """A sequence has ended, so long after it came."""
        self._requests.labels(self.model_name, reason).inc()
        if seconds is not None:
            self._end_to_end.observe(seconds)
