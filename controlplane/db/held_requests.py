"""What the proxies' workers keep waiting, and the alert of source `proxy` that is made of it.

Each worker tells of its own requests; a model's alert fires while any worker does. Many workers on many hosts so write
one alert: the episode that is under way goes on, whoever tells of it first, last, or again. A worker that was killed
tells nothing any more: its rows are removed by the next one that tells anything, and the alert ends with the last row.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import Any

from psycopg.rows import DictRow

from controlplane.core.alerts import Target
from controlplane.core.held_requests import GOOD_FOR, SOURCE, HeldRequests, firing
from controlplane.core.types import Alert
from controlplane.db import replica_sets
from controlplane.db.alert_words import Arrival, keep_newest, record_deliveries
from controlplane.db.alerts import load_of_source
from controlplane.db.pool import Connection, Database, wake

_A_MOMENT = timedelta(microseconds=1)


@dataclass(frozen=True, slots=True)
class Told:
    """Models whose alert this began, and whose it ended."""

    raised: tuple[str, ...] = ()
    resolved: tuple[str, ...] = ()


async def tell(db: Database, worker: str, waiting: Mapping[str, tuple[int, int]], *, now: datetime) -> Told:
    """All that this worker keeps waiting, as (held, queued) by model: what it does not name, it keeps no more.

    May be repeated, and is to be, at least three times in `GOOD_FOR` while anything waits. Wakes the reconciler if an
    alert begins or ends.
    """
    known = await replica_sets.load_targets(db)
    async with db.transaction() as connection:
        # one teller at a time: the alerts are made of the rows of all
        await connection.execute("LOCK TABLE held_requests IN SHARE ROW EXCLUSIVE MODE")
        await _keep(connection, worker, waiting, now)
        before = await load_of_source(connection, SOURCE)
        words = _words(await _totals(connection), before, known, now)
        new = await record_deliveries(connection, [Arrival([(one, _payload(one)) for one in words], now)])
        changed = await keep_newest(connection, words)
        if new or changed:
            await wake(connection)
    fired = {key for key, one in before.items() if one.is_firing}
    return Told(
        raised=tuple(one.labels["model"] for one in words if one.is_firing and one.fingerprint not in fired),
        resolved=tuple(one.labels["model"] for one in words if not one.is_firing),
    )


async def _keep(connection: Connection, worker: str, waiting: Mapping[str, tuple[int, int]], now: datetime) -> None:
    await connection.execute(
        "DELETE FROM held_requests WHERE (worker = %s AND model <> ALL (%s)) OR refreshed_at < %s",
        (worker, list(waiting), now - GOOD_FOR),
    )
    await connection.execute(
        "INSERT INTO held_requests AS h (model, worker, held, queued, refreshed_at) "
        "SELECT model, %s, held, queued, %s FROM unnest(%s::text[], %s::int[], %s::int[]) AS t (model, held, queued) "
        "ON CONFLICT (model, worker) DO UPDATE "
        "SET held = excluded.held, queued = excluded.queued, refreshed_at = excluded.refreshed_at",
        (
            worker,
            now,
            list(waiting),
            [held for held, _ in waiting.values()],
            [queued for _, queued in waiting.values()],
        ),
    )


async def _totals(connection: Connection) -> list[HeldRequests]:
    cursor = await connection.execute(
        "SELECT model, sum(held)::int AS held, sum(queued)::int AS queued, count(*)::int AS workers "
        "FROM held_requests GROUP BY model ORDER BY model"
    )
    rows: list[DictRow] = await cursor.fetchall()
    return [HeldRequests(**row) for row in rows]


def _words(
    totals: list[HeldRequests], before: Mapping[str, Alert], known: Mapping[str, Target], now: datetime
) -> list[Alert]:
    """What is to be said of each alert. `before`: by fingerprint. Hosts' clocks may differ: no time runs backwards."""
    words: list[Alert] = []
    for one in totals:
        alert = firing(one, known, starts_at=now, now=now)
        last = before.get(alert.fingerprint)
        if last is not None and last.is_firing:
            alert = replace(alert, starts_at=last.starts_at)
        elif last is not None and last.ends_at is not None:
            alert = replace(alert, starts_at=max(now, last.ends_at + _A_MOMENT))
        words.append(alert)
    waits = {one.fingerprint for one in words}
    for fingerprint, last in before.items():
        if last.is_firing and fingerprint not in waits:
            words.append(replace(last, is_firing=False, ends_at=max(now, last.starts_at), refreshed_at=now))
    return words


def _payload(alert: Alert) -> dict[str, Any]:
    """As a webhook would have told it."""
    return {"labels": dict(alert.labels), "annotations": dict(alert.annotations), "values": dict(alert.values)}
