"""Endpoints as one proxy sees them, without a connection."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from controlplane.core.breaker import Breaker
from controlplane.core.types import RoutableEndpoint, RoutingPolicy

NOW = datetime(2026, 1, 1, 12, tzinfo=UTC)
AT = 1000.0  # the same moment by the monotonic clock
LONG_AGO = datetime(2026, 1, 1, tzinfo=UTC)
POLICY = RoutingPolicy()


@dataclass(eq=False)
class Upstream:
    url: str
    endpoint: RoutableEndpoint
    in_flight: int = 0
    breaker: Breaker = field(default_factory=Breaker)


def an_endpoint(name: str, routing: RoutingPolicy = POLICY, **fields: Any) -> RoutableEndpoint:
    values: dict[str, Any] = {
        "endpoint_id": 1,
        "model": "m",
        "replica_set": "s",
        "priority": 100,
        "url": f"http://{name}:20000",
        "api_key": None,
        "replica": f"cp-s-{name}",
        "first_ready_at": LONG_AGO,
        "ends_at": None,
        "routing": routing,
    }
    return RoutableEndpoint(**{**values, **fields})


def an_upstream(name: str, in_flight: int = 0, routing: RoutingPolicy = POLICY, **fields: Any) -> Upstream:
    endpoint = an_endpoint(name, routing, **fields)
    return Upstream(endpoint.url, endpoint, in_flight)


def upstreams(count: int, routing: RoutingPolicy = POLICY) -> list[Upstream]:
    return [an_upstream(str(number), routing=routing) for number in range(count)]


def break_for_good(*broken: Upstream, at: float = AT) -> None:
    for one in broken:
        one.breaker = Breaker(first_back_off_seconds=1e6, longest_back_off_seconds=1e6)
        one.breaker.failed(at, is_unreachable=True)


def loads(those: Sequence[Upstream]) -> list[int]:
    return [one.in_flight for one in those]
