"""Where deliveries wait to be stored: many at a time, in one commit.

One writer takes all that wait, judges and stores them, and only when PostgreSQL has committed is each told. While it
commits, others gather. So a burst costs few commits, and a delivery alone waits for nobody. Nothing is kept in memory
beyond that: who was not told is not stored, and will send again.

Failure behaviour: when PostgreSQL refuses what several brought together, each is stored alone, and only the one at
fault is told so. When it is away all who wait are told at once. When too much waits, who comes is refused at the door
(`Overloaded`): a sender that is told to come back loses less than one that is never answered. After deliveries had to
be refused, the next that is stored asks for a pull: it heals what they would have told.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime

from controlplane.core.alerts import Target, judge
from controlplane.core.types import Alert
from controlplane.db import Database, DatabaseError, DbUnavailable, Duplicate, alerts, replica_sets
from controlplane.db.alert_words import Arrival
from controlplane.web.payloads import Delivery, Source, ToldAlert

_MOST_AT_ONCE = 500  # deliveries in one commit
_MOST_BYTES = 64 * 1024 * 1024


class Overloaded(Exception):
    """Too much waits to be stored already; nothing was kept."""


@dataclass(frozen=True, slots=True)
class Parcel:
    """A delivery whose sender has proven who they are."""

    source: Source
    delivery: Delivery
    size_bytes: int
    at: datetime
    signature: tuple[bytes, datetime] | None = None


@dataclass(frozen=True, slots=True)
class _Waiting:
    parcel: Parcel
    outcome: asyncio.Future[alerts.Stored]


class Intake:
    def __init__(self, db: Database, *, max_waiting: int) -> None:
        self._db = db
        self._max_waiting = max_waiting
        self._waiting: deque[_Waiting] = deque()
        self._waiting_bytes = 0
        self._writer: asyncio.Task[None] | None = None
        self._missed_some = False

    async def store(self, parcel: Parcel) -> alerts.Stored:
        """Returns when PostgreSQL has committed. Raises Overloaded, Duplicate (its signature was used before),
        DbUnavailable, DatabaseError."""
        if len(self._waiting) >= self._max_waiting or self._waiting_bytes + parcel.size_bytes > _MOST_BYTES:
            self._missed_some = True
            raise Overloaded(f"{len(self._waiting)} deliveries wait to be stored already")
        waiting = _Waiting(parcel, asyncio.get_running_loop().create_future())
        self._waiting.append(waiting)
        self._waiting_bytes += parcel.size_bytes
        if self._writer is None or self._writer.done():
            self._writer = asyncio.create_task(self._write(), name="intake")
        return await waiting.outcome

    async def _write(self) -> None:
        group: list[_Waiting] = []
        try:
            while self._waiting:
                group = [self._waiting.popleft() for _ in range(min(len(self._waiting), _MOST_AT_ONCE))]
                self._waiting_bytes -= sum(one.parcel.size_bytes for one in group)
                for waiting, outcome in zip(group, await self._outcomes([one.parcel for one in group]), strict=True):
                    _tell(waiting, outcome)
        finally:
            for waiting in (*group, *self._waiting):  # nobody, unless this was cancelled or has a fault
                _tell(waiting, DbUnavailable("nothing is stored any more"))
            self._waiting.clear()
            self._waiting_bytes = 0

    async def _outcomes(self, parcels: Sequence[Parcel]) -> Sequence[alerts.Stored | DatabaseError]:
        try:
            return await self._store_all(parcels)
        except DatabaseError as error:
            if isinstance(error, DbUnavailable) or len(parcels) == 1:
                self._missed_some = True
                return [error] * len(parcels)
        return [outcome for one in parcels for outcome in await self._outcomes([one])]

    async def _store_all(self, parcels: Sequence[Parcel]) -> list[alerts.Stored | DatabaseError]:
        known = await replica_sets.load_targets(self._db)
        arrivals = [_arrival(one, known) for one in parcels]
        missed_some, self._missed_some = self._missed_some, False  # who is refused meanwhile sets it again
        wants_pull = missed_some or any(one.delivery.truncated for one in parcels)
        try:
            stored = await alerts.store_all(self._db, arrivals, wants_pull=wants_pull)
        except DatabaseError:
            self._missed_some |= missed_some
            raise
        return [Duplicate("this signature was used before") if one is None else one for one in stored]


def _tell(waiting: _Waiting, outcome: alerts.Stored | DatabaseError) -> None:
    if waiting.outcome.done():
        return  # told before, or nobody waits any more
    if isinstance(outcome, DatabaseError):
        waiting.outcome.set_exception(outcome)
    else:
        waiting.outcome.set_result(outcome)


def _arrival(parcel: Parcel, known: Mapping[str, Target]) -> Arrival:
    told = tuple((_judged(parcel.source, one, known, parcel.at), one.payload) for one in parcel.delivery.alerts)
    return Arrival(told, parcel.at, parcel.signature)


def _judged(source: Source, told: ToldAlert, known: Mapping[str, Target], at: datetime) -> Alert:
    verdict = judge(told.labels, told.annotations, known)
    return Alert(
        source=source,
        org_id=told.org_id,
        fingerprint=told.fingerprint,
        alertname=told.labels.get("alertname", ""),
        is_firing=told.is_firing,
        starts_at=told.starts_at,
        ends_at=told.ends_at,
        refreshed_at=at,
        labels=told.labels,
        annotations=told.annotations,
        values=told.values,
        action=verdict.action,
        ignored_reason=verdict.ignored_reason,
        step=verdict.step,
    )
