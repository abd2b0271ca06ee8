"""What a monitor reads at /metrics: counts, times and the state of the engine, in Prometheus' form."""

from __future__ import annotations

from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from functional_lm.inference.engine import Engine, Handle

FIRST = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
EACH = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1)
WHOLE = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class Metrics:
    """The numbers of one engine, in a registry of their own."""

    def __init__(self, engine: Engine) -> None:
        self.registry = CollectorRegistry()
        to: Any = {"registry": self.registry, "namespace": "functional_lm"}
        self._answers = Counter("http_requests", "Answers over HTTP", ["method", "route", "status"], **to)
        self._errors = Counter("errors", "Answers with status 4xx and 5xx", ["route", "status"], **to)
        self._ended = Counter("requests", "Requests to the engine that have ended", ["reason"], **to)
        self._tokens = Counter(
            "tokens", "Tokens read (prompt), found in a slot (cached), said (completion)", ["kind"], **to
        )
        self._first = Histogram("time_to_first_token_seconds", "From the queue on", buckets=FIRST, **to)
        self._each = Histogram("time_per_token_seconds", "Mean of a request, behind its first", buckets=EACH, **to)
        self._whole = Histogram("request_seconds", "From the queue to the end", buckets=WHOLE, **to)
        for name, about in (
            ("slots", "Slots of the engine"),
            ("running", "Slots in use"),
            ("waiting", "Requests in the queue"),
        ):
            Gauge(name, about, **to).set_function(lambda name=name: engine.stats()[name])  # type: ignore[misc]
        for kind in ("prompt", "cached", "completion"):
            self._tokens.labels(kind)
        engine.listeners.append(self._end)

    def _end(self, handle: Handle) -> None:
        """A request has ended; called on the engine's thread."""
        self._ended.labels(handle.finish_reason).inc()
        self._tokens.labels("completion").inc(handle.made)
        self._whole.observe(handle.seconds or 0.0)
        if handle.first_token is None:
            return
        self._tokens.labels("prompt").inc(len(handle.request.prompt))
        self._tokens.labels("cached").inc(handle.cached)
        self._first.observe(handle.first_token)
        if handle.made > 1 and handle.seconds is not None:
            self._each.observe((handle.seconds - handle.first_token) / (handle.made - 1))

    def answered(self, method: str, route: str, status: int) -> None:
        """An HTTP request has been answered; `route` is a rule, not what a client wrote."""
        self._answers.labels(method, route, str(status)).inc()
        if status >= 400:
            self._errors.labels(route, str(status)).inc()

    def text(self) -> bytes:
        """The page."""
        return generate_latest(self.registry)
