"""What the proxy measures, in plain numbers of one process: a count costs a fraction of a microsecond.

Counting needs no lock, because one event loop does all of it. Gauges that somebody else knows are read when asked for:
whoever knows assigns the callable. A worker's numbers travel as a `snapshot`; `exposition` makes the text of them.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import Metric
from prometheus_client.registry import Collector

from controlplane.metrics.numbers import (
    FAST_BUCKETS,
    SLOW_BUCKETS,
    Labels,
    Numbers,
    Value,
    counter,
    gauge,
    histogram,
    metrics_of,
)

REQUESTS = counter("proxy_requests", "Requests answered, by HTTP status", ["model", "tenant", "code"])
REQUEST_SECONDS = histogram(
    "proxy_request_seconds", "From the request to the last byte", ["model"], buckets=SLOW_BUCKETS
)
FIRST_BYTE_SECONDS = histogram(
    "proxy_first_byte_seconds",
    "From the request to the upstream's first byte of body",
    ["model"],
    buckets=SLOW_BUCKETS,
)
OVERHEAD_SECONDS = histogram(
    "proxy_overhead_seconds",
    "Time before the first byte that was not spent waiting for an upstream",
    buckets=FAST_BUCKETS,
)
IN_FLIGHT = gauge("proxy_in_flight", "Requests sent and not yet finished", ["model"])
HELD_REQUESTS = gauge("proxy_held_requests", "Requests that wait for a replica or for their turn", ["model"])
UPSTREAM_RETRIES = counter("proxy_upstream_retries", "Requests tried at another endpoint", ["model", "reason"])
BROKEN_STREAMS = counter("proxy_broken_streams", "Answers that broke off after they had begun", ["model"])
CLIENT_DISCONNECTS = counter("proxy_client_disconnects", "Clients that left before their answer ended", ["model"])
TOKENS = counter("proxy_tokens", "Tokens that upstreams counted", ["model", "tenant", "kind"])
LIMITED_REQUESTS = counter("proxy_limited_requests", "Requests refused by a tenant's limit", ["tenant", "limit"])
USAGE_LOST = counter("proxy_usage_lost", "Usage that could not be kept", ["kind"])
DIRECTORY_AGE_SECONDS = gauge(
    "proxy_directory_age_seconds", "Since the list of endpoints and keys was last read", is_largest=True
)
OPEN_CONNECTIONS = gauge("proxy_open_connections", "Connections of clients")
UPSTREAM_CONNECTIONS = gauge("proxy_upstream_connections", "Connections to endpoints", ["state"])
WORKERS = gauge("proxy_workers", "Processes that serve the proxy's port")

FAMILIES = (
    REQUESTS,
    REQUEST_SECONDS,
    FIRST_BYTE_SECONDS,
    OVERHEAD_SECONDS,
    IN_FLIGHT,
    HELD_REQUESTS,
    UPSTREAM_RETRIES,
    BROKEN_STREAMS,
    CLIENT_DISCONNECTS,
    TOKENS,
    LIMITED_REQUESTS,
    USAGE_LOST,
    DIRECTORY_AGE_SECONDS,
    OPEN_CONNECTIONS,
    UPSTREAM_CONNECTIONS,
    WORKERS,
)


class ProxyMetrics(Collector):
    """One process's. `registry` has them and nothing else, for who wants them from there.

    A model that does not exist must never be a label's value: such requests are counted with the model "".
    """

    def __init__(self, registry: CollectorRegistry | None = None) -> None:
        self.registry = registry or CollectorRegistry()
        self.registry.register(self)
        self._served: dict[tuple[str, str], _Served] = {}  # by model and tenant
        self._request_seconds: dict[str, list[float]] = defaultdict(REQUEST_SECONDS.empty)
        self._first_byte_seconds: dict[str, list[float]] = defaultdict(FIRST_BYTE_SECONDS.empty)
        self._overhead_seconds = OVERHEAD_SECONDS.empty()
        self._retries: dict[tuple[str, str], int] = defaultdict(int)
        self._broken: dict[str, int] = defaultdict(int)
        self._disconnects: dict[str, int] = defaultdict(int)

        self.in_flight: dict[str, int] = defaultdict(int)
        """By model. Whoever passes a request on adds 1 and takes it off again."""
        self.held_requests: Callable[[], Mapping[str, int]] = dict
        self.limited_requests: Callable[[], Mapping[tuple[str, str], int]] = dict  # by tenant, limit
        self.usage_lost: Callable[[], Mapping[str, int]] = dict  # by kind
        self.upstream_connections: Callable[[], Mapping[str, int]] = dict  # by state
        self.open_connections: Callable[[], int] = int
        self.directory_age_seconds: Callable[[], float] = float

    # --- counting -----------------------------------------------------------------------------------------

    def ended(
        self,
        model: str,
        tenant: str,
        status: int,
        seconds: float,
        *,
        first_byte_seconds: float | None = None,
        overhead_seconds: float = 0.0,
        prompt: int = 0,
        completion: int = 0,
        cached: int = 0,
    ) -> None:
        """A request is over: after how long, and how it was answered; 499: its client left before any answer.

        `first_byte_seconds`: from the request to its answer's first byte of body, if there was one; `overhead_seconds`
        of them, the proxy did not spend on waiting for others. The rest are
        tokens, as far as they are known; `cached` are some of the prompt's.
        """
        served = self._served.get((model, tenant))
        if served is None:
            served = self._served[model, tenant] = _Served()
        served.codes[status] += 1
        if not model:
            return
        series = self._request_seconds[model]
        series[bisect_left(SLOW_BUCKETS, seconds)] += 1
        series[-1] += seconds
        if first_byte_seconds is not None:
            series = self._first_byte_seconds[model]
            series[bisect_left(SLOW_BUCKETS, first_byte_seconds)] += 1
            series[-1] += first_byte_seconds
            series = self._overhead_seconds
            series[bisect_left(FAST_BUCKETS, overhead_seconds)] += 1
            series[-1] += overhead_seconds
        served.prompt += prompt
        served.completion += completion
        served.cached += cached

    def retried(self, model: str, reason: str) -> None:
        self._retries[model, reason] += 1

    def broke(self, model: str) -> None:
        self._broken[model] += 1

    def client_left(self, model: str) -> None:
        self._disconnects[model] += 1

    # --- telling ------------------------------------------------------------------------------------------

    def snapshot(self) -> Numbers:
        """All of it, as a copy."""
        return {
            REQUESTS.name: {
                (*whose, str(code)): count for whose, one in self._served.items() for code, count in one.codes.items()
            },
            REQUEST_SECONDS.name: _copies(self._request_seconds),
            FIRST_BYTE_SECONDS.name: _copies(self._first_byte_seconds),
            OVERHEAD_SECONDS.name: {(): list(self._overhead_seconds)},
            IN_FLIGHT.name: _by_one(self.in_flight),
            HELD_REQUESTS.name: _by_one(self.held_requests()),
            UPSTREAM_RETRIES.name: _copied(self._retries),
            BROKEN_STREAMS.name: _by_one(self._broken),
            CLIENT_DISCONNECTS.name: _by_one(self._disconnects),
            TOKENS.name: {(*whose, kind): count for whose, one in self._served.items() for kind, count in one.tokens()},
            LIMITED_REQUESTS.name: _copied(self.limited_requests()),
            USAGE_LOST.name: _by_one(self.usage_lost()),
            DIRECTORY_AGE_SECONDS.name: {(): self.directory_age_seconds()},
            OPEN_CONNECTIONS.name: {(): self.open_connections()},
            UPSTREAM_CONNECTIONS.name: _by_one(self.upstream_connections()),
            WORKERS.name: {(): 1},
        }

    def collect(self) -> Iterator[Metric]:
        return metrics_of(FAMILIES, self.snapshot())


class _Served:
    """What is counted of one tenant's requests for one model."""

    __slots__ = ("cached", "codes", "completion", "prompt")

    def __init__(self) -> None:
        self.codes: dict[int, int] = defaultdict(int)  # by HTTP status
        self.prompt = self.completion = self.cached = 0

    def tokens(self) -> Iterator[tuple[str, int]]:
        """By kind, where there were any."""
        if self.prompt or self.completion:
            yield "prompt", self.prompt
            yield "completion", self.completion
        if self.cached:
            yield "cached", self.cached


def exposition(numbers: Numbers) -> bytes:
    """Prometheus' text (`CONTENT_TYPE_LATEST`) of one process's numbers, or of several processes' total."""
    registry = CollectorRegistry()
    registry.register(_Fixed(numbers))
    return generate_latest(registry)


class _Fixed(Collector):
    def __init__(self, numbers: Numbers) -> None:
        self._numbers = numbers

    def collect(self) -> Iterator[Metric]:
        return metrics_of(FAMILIES, self._numbers)


def _copied(counts: Mapping[Any, float]) -> dict[Labels, Value]:
    """Of counts whose keys are the labels' values."""
    return dict(counts)


def _by_one(counts: Mapping[str, float]) -> dict[Labels, Value]:
    return {(label,): count for label, count in counts.items()}


def _copies(series: Mapping[str, list[float]]) -> dict[Labels, Value]:
    return {(label,): list(one) for label, one in series.items()}
