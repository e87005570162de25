"""Waiting rooms whose time passes when the test says so, and what they are told of models and endpoints."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from typing import Any

from controlplane.core.types import RoutableEndpoint, ServedModel
from controlplane.proxy.directory import Snapshot
from controlplane.proxy.errors import ApiError
from controlplane.proxy.waiting import Waiting, WaitingOptions, WaitingRooms

MODEL = "m"
BEGIN = datetime(2026, 1, 1, 12, tzinfo=UTC)


class Time:
    """A clock and a loop in one: `pass_` runs what is due, in its order."""

    def __init__(self) -> None:
        self.now = 0.0
        self._due: list[tuple[float, int, Callable[[], None]]] = []
        self._numbers = itertools.count()

    def __call__(self) -> float:
        return self.now

    def utc(self) -> datetime:
        return BEGIN + timedelta(seconds=self.now)

    def call_soon(self, callback: Callable[[], None], /) -> None:
        self.call_later(0.0, callback)

    def call_later(self, delay: float, callback: Callable[[], None], /) -> None:
        heapq.heappush(self._due, (self.now + delay, next(self._numbers), callback))

    @property
    def is_idle(self) -> bool:
        """No timer runs."""
        return not self._due

    def pass_(self, seconds: float = 0.0) -> None:
        end = self.now + seconds
        while self._due and self._due[0][0] <= end:
            self.now, _, callback = heapq.heappop(self._due)
            callback()
        self.now = end


def an_endpoint(number: int = 1) -> RoutableEndpoint:
    return RoutableEndpoint(number, MODEL, "s", 100, f"http://n{number}", None, None, BEGIN, None)


def a_model(**changes: Any) -> ServedModel:
    return replace(ServedModel(MODEL, BEGIN, False, None, 0, None, None), **changes)


def a_snapshot(*endpoints: RoutableEndpoint, **changes: Any) -> Snapshot:
    return Snapshot({MODEL: a_model(**changes)}, {MODEL: endpoints} if endpoints else {}, {})


@dataclass(eq=False)
class Visit:
    """One request: seated at once, waiting, seated later, refused."""

    tenant: str
    at: float
    waiting: Waiting | None = None
    seated_at: float | None = None
    refusal: ApiError | None = None
    refused_at: float | None = None


@dataclass
class Rig:
    """`seats`: how many requests each endpoint has at once."""

    rooms: WaitingRooms
    time: Time
    seated: list[Visit] = field(default_factory=list)

    def visit(
        self, tenant: str = "t", *, is_stream: bool = True, on_turn: Callable[[Visit], None] = lambda _: None
    ) -> Visit:
        visit = Visit(tenant, self.time.now)

        def turn() -> None:
            visit.seated_at = self.time.now
            self.seated.append(visit)
            on_turn(visit)

        def refused(error: ApiError) -> None:
            visit.refusal, visit.refused_at = error, self.time.now

        if self.rooms.enter(MODEL, tenant):
            turn()
        else:
            visit.waiting = self.rooms.wait(MODEL, tenant, turn, refused, self.time.now, is_stream=is_stream)
        return visit

    def leave(self, visit: Visit) -> None:
        self.seated.remove(visit)
        self.rooms.leave(MODEL, visit.tenant)

    def follow(self, snapshot: Snapshot) -> None:
        self.rooms.follow(snapshot, self.time.now)


def a_rig(
    options: WaitingOptions | None = None,
    *,
    seats: int = 4,
    in_flight_of: Callable[[str], int] = lambda _: 0,
    workers: Callable[[], int] = lambda: 1,
    weights: Mapping[str, float] | None = None,
) -> Rig:
    time = Time()
    rooms = WaitingRooms(
        options,
        live_workers=workers,
        in_flight_of=in_flight_of,
        weight_of=lambda tenant: (weights or {}).get(tenant, 1.0),
        max_in_flight_of=lambda _: seats,
        clock=time,
        utc_clock=time.utc,
        loop=time,
    )
    return Rig(rooms, time)
