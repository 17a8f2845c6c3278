"""Counters of the server, for Prometheus."""

from collections.abc import Callable

import prometheus_client as prometheus

CONTENT_TYPE = prometheus.CONTENT_TYPE_PLAIN_0_0_4
_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
_QUERIES = (1, 2, 4, 8, 16, 32, 64, 128, 256)


class Metrics:
    """Counters of one server."""

    def __init__(self):
        self._registry = registry = prometheus.CollectorRegistry()
        prometheus.ProcessCollector(registry=registry)
        self._requests = prometheus.Counter(
            "xmc_requests", "Requests by route and status.", ("route", "status"), registry=registry
        )
        self._seconds = prometheus.Histogram(
            "xmc_request_seconds",
            "From the head of a request to the end of its answer.",
            ("route",),
            registry=registry,
            buckets=_SECONDS,
        )
        self._batch_queries = prometheus.Histogram(
            "xmc_batch_queries", "Queries ranked in one call.", registry=registry, buckets=_QUERIES
        )
        self._batch_seconds = prometheus.Histogram(
            "xmc_batch_seconds", "Of ranking a batch.", registry=registry, buckets=_SECONDS
        )
        self._reloads = prometheus.Counter(
            "xmc_reloads", "Artifacts opened again.", ("result",), registry=registry
        )

    def gauge(self, name: str, said: str, value: Callable[[], int]) -> None:
        """Has a value read whenever the metrics are."""
        prometheus.Gauge(name, said, registry=self._registry).set_function(value)

    def request(self, route: str, status: int, seconds: float) -> None:
        """Counts a request."""
        self._requests.labels(route, status).inc()
        self._seconds.labels(route).observe(seconds)

    def batch(self, queries: int, seconds: float) -> None:
        """Counts a batch; for any thread."""
        self._batch_queries.observe(queries)
        self._batch_seconds.observe(seconds)

    def reload(self, result: str) -> None:
        """Counts a reload, "replaced", "unchanged" or "failed"."""
        self._reloads.labels(result).inc()

    def text(self) -> bytes:
        """All of it, in the text format."""
        return prometheus.generate_latest(self._registry)
