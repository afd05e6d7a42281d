"""Counters, gauges and histograms in Prometheus' text format. Names follow vLLM's (docs.vllm.ai, "Metrics").

The engine's thread writes latencies and ends of answers here (loop.py). Engines count tokens for themselves, so each
scrape asks them: prometheus_client calls `Metrics.collect`.
"""

from collections.abc import Iterator, Sequence

import torch
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Metric, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

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
    """The measurements of a server. The label `model_name` tells models apart; replicas of one are added up."""

    def __init__(self) -> None:
        # A registry of its own and not the library's global one: tests make many servers in one process.
        self.registry = CollectorRegistry()
        self._engines: dict[str, Sequence[Engine]] = {}
        self.requests = self._counter("request_success", "Sequences that ended", "model_name", "finished_reason")
        self.refused = self._counter("requests_refused", "HTTP answers of status 400 and more", "status")
        self.cache_hits = self._counter("response_cache_hits", "Answers from the response cache", "model_name")
        self.queue_time = self._histogram("request_queue_time", "Arrival to first work")
        self.first_token = self._histogram("time_to_first_token", "Arrival to first token")
        self.between_tokens = self._histogram("inter_token_latency", "Token to token")
        self.end_to_end = self._histogram("e2e_request_latency", "Arrival to last token")
        self.replica_up = Gauge(
            name="nanochat_replica_up",
            documentation="1 while the engine works",
            labelnames=["model_name", "replica"],
            registry=self.registry,
        )
        self.registry.register(self)
        ProcessCollector(registry=self.registry)  # memory, processor time, open files

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"nanochat_{name}", text, labels, registry=self.registry)

    def _histogram(self, name: str, text: str) -> Histogram:
        return Histogram(f"nanochat_{name}_seconds", text, ["model_name"], buckets=SECONDS, registry=self.registry)

    def add_model(self, model_name: str, engines: Sequence[Engine]) -> None:
        """Begin the series of a model at zero, so that a scrape sees them before the first request."""
        self._engines[model_name] = engines
        for series in (self.cache_hits, self.queue_time, self.first_token, self.between_tokens, self.end_to_end):
            series.labels(model_name)
        for replica in range(len(engines)):
            self.replica_up.labels(model_name, replica).set(1)

    def engine_figures(self, model_name: str) -> dict[str, int]:
        """Return the figures of Engine.stats, summed over the model's replicas."""
        # Read from a handler's thread while the engine runs: these are lengths and counters, one step old at worst.
        figures = [engine.stats() for engine in self._engines[model_name]]
        return {key: sum(each[key] for each in figures) for key in ENGINE_FIGURES}

    def collect(self) -> Iterator[Metric]:
        """Yield the engines' figures as metric families (the collector protocol of prometheus_client)."""
        figures = {model_name: self.engine_figures(model_name) for model_name in list(self._engines)}
        for key, (name, text) in ENGINE_FIGURES.items():
            kind = CounterMetricFamily if name.endswith("_total") else GaugeMetricFamily
            family = kind(f"nanochat_{name}", text, labels=["model_name"])
            for model_name, values in figures.items():
                family.add_metric([model_name], values[key])
            yield family
        gpus = self._gpus()
        if gpus:
            yield self._gpu_memory(gpus)

    def _gpus(self) -> list[torch.device]:
        """Return the GPUs that hold models."""
        devices = set()
        for engines in list(self._engines.values()):
            for engine in engines:
                devices.add(engine.model.device)
                # A model may be split over several GPUs. A layer's keys and values are on its GPU, once it ran.
                devices |= {layer.memory[0].device for layer in engine.cache.layers if layer.memory}
        return sorted((device for device in devices if device.type == "cuda"), key=str)

    def _gpu_memory(self, gpus: Sequence[torch.device]) -> Metric:
        """Return the memory in use on each GPU and its size, in bytes. PyTorch reserves more than its tensors take."""
        family = GaugeMetricFamily("nanochat_gpu_memory_bytes", "Memory of a GPU", labels=["device", "kind"])
        for device in gpus:
            family.add_metric([str(device), "tensors"], torch.cuda.memory_allocated(device))
            family.add_metric([str(device), "reserved"], torch.cuda.memory_reserved(device))
            family.add_metric([str(device), "peak"], torch.cuda.max_memory_allocated(device))
            family.add_metric([str(device), "total"], torch.cuda.mem_get_info(device)[1])
        return family
