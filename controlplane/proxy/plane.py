"""What one worker's requests share."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from datetime import date
from typing import TYPE_CHECKING

from controlplane.clock import utc_now
from controlplane.core.retry_budget import RetryBudget
from controlplane.metrics import ProxyMetrics
from controlplane.proxy import wire
from controlplane.proxy.access_log import AccessLog
from controlplane.proxy.directory import Directory
from controlplane.proxy.heads import KnownHeads
from controlplane.proxy.limits import Limits
from controlplane.proxy.options import ProxyOptions
from controlplane.proxy.routing import Router
from controlplane.proxy.upstreams import Upstream, Upstreams
from controlplane.proxy.usage import Usage
from controlplane.proxy.waiting import WaitingRooms

if TYPE_CHECKING:
    from controlplane.proxy.protocol import ClientConnection


@dataclass(slots=True)
class Plane:
    options: ProxyOptions
    directory: Directory
    upstreams: Upstreams
    router: Router[Upstream]
    retries: RetryBudget
    rooms: WaitingRooms
    limits: Limits
    usage: Usage
    metrics: ProxyMetrics
    log: AccessLog
    heads: KnownHeads = field(default_factory=KnownHeads)
    connections: set[ClientConnection] = field(default_factory=set)  # clients'
    # Monotonic, and as old as a tick: a deadline is moved at every piece of every stream, and asking the clock each
    # time costs more than all else that is done then.
    now: float = field(default_factory=time.monotonic)
    today: date = field(default_factory=lambda: utc_now().date())

    # What every answer says: written anew when the server has a new list, which is once a second.
    default_headers: list[tuple[bytes, bytes]] = field(default_factory=list)
    default_lines: bytes = b""

    def write_default_lines(self, headers: list[tuple[bytes, bytes]]) -> bytes:
        self.default_headers = headers
        self.default_lines = wire.lines(headers)
        return self.default_lines

    def tick(self) -> None:
        """Look at every deadline. A stream that waits has one float, and no timer of its own."""
        self.now = now = time.monotonic()
        self.today = utc_now().date()
        for connection in [one for one in self.connections if one.deadline <= now]:
            connection.deadline_passed(now)
        self.upstreams.sweep(now)
