"""What the server counts, for Prometheus."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST

_SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class Metrics:
    """Counters of one server."""

    content_type = CONTENT_TYPE_LATEST

    def __init__(self) -> None:
        """Start all at zero."""
        registry = self._registry = CollectorRegistry()

        def counter(name: str, says: str, *labels: str) -> Counter:
            return Counter(f"pocketlm_{name}", says, labels, registry=registry)

        def seconds(name: str, says: str, *labels: str) -> Histogram:
            return Histogram(f"pocketlm_{name}_seconds", says, labels, buckets=_SECONDS, registry=registry)

        def gauge(name: str, says: str) -> Gauge:
            return Gauge(f"pocketlm_{name}", says, ("model",), registry=registry)

        self.requests = counter("requests", "Requests answered or refused", "route", "status")
        self.left = counter("clients_left", "Clients that left before their answer was whole", "route")
        self.prompt_tokens = counter("prompt_tokens", "Tokens of prompts", "model")
        self.answer_tokens = counter("answer_tokens", "Tokens of answers", "model")
        self.escalations = counter("escalations", "Requests passed to the larger model", "outcome")
        for outcome in ("answered", "failed"):  # zeros from the start: a rate can be taken of the first one
            self.escalations.labels(outcome)
        self.latency = seconds("request", "From a request to the end of its answer", "route")
        self.queueing = seconds("queue", "Waiting for a turn", "model")
        self.confidence = Histogram(
            "pocketlm_confidence",
            "Confidence in local answers where escalation is on",
            buckets=[tenth / 10 for tenth in range(1, 11)],
            registry=registry,
        )
        self.running = gauge("running", "Requests that the engine works on")
        self.waiting = gauge("waiting", "Requests that wait for a turn")
        self.engine_up = gauge("engine_up", "1 where the engine answers")
        self.engine_starts = gauge("engine_starts", "How often the engine was started")

    def text(self) -> bytes:
        """Return all in Prometheus' text format."""
        return generate_latest(self._registry)
