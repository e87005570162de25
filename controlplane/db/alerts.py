"""Alerts as levels, and the deliveries that told of them.

What arrives is a word about an alert (see `alert_words`): an older one is counted and changes nothing, a repeated one
only refreshes. All alerts of one delivery are kept, or none.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from psycopg.rows import DictRow

from controlplane.core import held_requests
from controlplane.core.types import Alert, AlertAction
from controlplane.db.alert_words import Arrival, Word, keep_newest, record_deliveries, use_signatures, word
from controlplane.db.errors import Duplicate
from controlplane.db.pool import PULL_CHANNEL, Connection, Database, wake


@dataclass(frozen=True, slots=True)
class Stored:
    """How many alerts of a delivery were new, known, and not to be acted upon (with the reasons, counted)."""

    accepted: int
    duplicates: int
    ignored: Mapping[str, int]


async def store(
    db: Database,
    arrived: Iterable[tuple[Alert, Mapping[str, Any]]],
    *,
    now: datetime,
    signature: tuple[bytes, datetime] | None = None,
) -> Stored:
    """`store_all` of one. Raises Duplicate if its signature was used before."""
    [stored] = await store_all(db, [Arrival(tuple(arrived), now, signature)])
    if stored is None:
        raise Duplicate("this signature was used before")
    return stored


async def store_all(db: Database, arrivals: Sequence[Arrival], *, wants_pull: bool = False) -> list[Stored | None]:
    """Keep every delivery, durably, in one commit, as if they had come one after the other. May be repeated.

    None stands for one whose signature was used before: nothing of it is kept. If anything is news the reconciler is
    woken; `wants_pull` wakes the pull: something was left out.
    """
    async with db.transaction() as connection:
        good = await use_signatures(connection, arrivals)
        kept = [one for one, is_good in zip(arrivals, good, strict=True) if is_good]
        new = await record_deliveries(connection, kept)
        changed = await keep_newest(connection, [alert for one in kept for alert, _ in one.alerts])
        if new or changed:
            await wake(connection)
        if wants_pull:
            await wake(connection, PULL_CHANNEL)
    return [_counted(one, new) if is_good else None for one, is_good in zip(arrivals, good, strict=True)]


def _counted(arrival: Arrival, new: set[Word]) -> Stored:
    """Takes what it counts as new out of `new`: whoever tells it again repeats it."""
    accepted = duplicates = 0
    ignored: dict[str, int] = {}
    for alert, _ in arrival.alerts:
        told = word(alert)
        if told not in new:
            duplicates += 1
            continue
        new.remove(told)
        if alert.ignored_reason is not None:
            ignored[alert.ignored_reason] = ignored.get(alert.ignored_reason, 0) + 1
        else:
            accepted += 1
    return Stored(accepted=accepted, duplicates=duplicates, ignored=ignored)


async def refresh(
    db: Database, source: str, org_id: int, active: Iterable[Alert], *, now: datetime, spared: Collection[str] = ()
) -> int:
    """Take a complete list of what is active in a source's organization: heals what webhooks lost.

    Returns how many changed.

    What fires here and is not in the list has been resolved, but for the fingerprints that are `spared`; what is in it
    fires, whatever arrived or did not, unless it was heard of after `now`: when the list was asked for.
    """
    active = list(active)
    async with db.transaction() as connection:
        # deliveries wait: each locks its alerts in its own order, and this would lock them all in another
        await connection.execute("LOCK TABLE alerts IN SHARE ROW EXCLUSIVE MODE")
        changed = await keep_newest(connection, active, is_pulled=True)
        cursor = await connection.execute(
            "UPDATE alerts SET status = 'resolved', ends_at = %(now)s, refreshed_at = %(now)s, stale_since = NULL "
            "WHERE source = %(source)s AND org_id = %(org_id)s AND status = 'firing' AND refreshed_at <= %(now)s "
            "AND fingerprint <> ALL (%(listed)s)",
            {
                "now": now,
                "source": source,
                "org_id": org_id,
                "listed": [*(alert.fingerprint for alert in active), *spared],
            },
        )
        changed += cursor.rowcount
        if changed:
            await wake(connection)
    return changed


async def load_firing(db: Database, source: str, org_id: int) -> dict[str, datetime]:
    """What fires in a source's organization, as far as is known: by fingerprint, when it was last heard of."""
    async with db.connection() as connection:
        cursor = await connection.execute(
            "SELECT fingerprint, refreshed_at FROM alerts WHERE source = %s AND org_id = %s AND status = 'firing'",
            (source, org_id),
        )
        return {row["fingerprint"]: row["refreshed_at"] for row in await cursor.fetchall()}


async def load_of_source(connection: Connection, source: str) -> dict[str, Alert]:
    """All of a source without organizations, by fingerprint."""
    cursor = await connection.execute(f"SELECT {_COLUMNS} FROM alerts WHERE source = %s AND org_id = 0", (source,))
    return {row["fingerprint"]: _alert(row) for row in await cursor.fetchall()}


async def load_since(db: Database, since: datetime) -> tuple[Alert, ...]:
    """Alerts that were confirmed, or that ended, at this time or later; newest first."""
    async with db.connection() as connection:
        cursor = await connection.execute(
            f"SELECT {_COLUMNS} FROM alerts WHERE refreshed_at >= %s ORDER BY refreshed_at DESC, fingerprint",
            (since,),
        )
        return tuple(_alert(row) for row in await cursor.fetchall())


async def load_first_receipts(db: Database, since: datetime) -> dict[str, datetime]:
    """When a webhook first told that an alert fires, by the alert's key; of what came at or after `since`."""
    async with db.connection() as connection:
        cursor = await connection.execute(
            "SELECT source || '/' || org_id || '/' || fingerprint AS key, min(first_received_at) AS at "
            "FROM alert_deliveries WHERE status = 'firing' AND first_received_at >= %s GROUP BY 1",
            (since,),
        )
        return {row["key"]: row["at"] for row in await cursor.fetchall()}


async def note_stale(db: Database, *, stale_after: timedelta, now: datetime) -> list[str]:
    """Mark what fires, would press, and was not confirmed for so long; returns the keys of those newly marked.

    What a proxy tells of the requests that it holds is stale much earlier: see `core.held_requests`.
    """
    async with db.connection() as connection:
        cursor = await connection.execute(
            f"UPDATE alerts SET stale_since = %s WHERE ctid = {_UNLOCKED.format('alerts', _UNCONFIRMED)} "
            "RETURNING source || '/' || org_id || '/' || fingerprint AS key",
            (now, held_requests.SOURCE, now - min(stale_after, held_requests.GOOD_FOR), now - stale_after),
        )
        return sorted(row["key"] for row in await cursor.fetchall())


async def count_stale(db: Database) -> dict[str, int]:
    """How many alerts are marked as stale, by source."""
    async with db.connection() as connection:
        cursor = await connection.execute(
            "SELECT source, count(*) FROM alerts WHERE status = 'firing' AND stale_since IS NOT NULL GROUP BY source"
        )
        return {row["source"]: row["count"] for row in await cursor.fetchall()}


_COLUMNS = (
    "source, org_id, fingerprint, alertname, status, starts_at, ends_at, refreshed_at, labels, annotations, values, "
    "action, step, ignored_reason, stale_since"
)
_UNCONFIRMED = (
    "status = 'firing' AND action IS NOT NULL AND stale_since IS NULL "
    "AND refreshed_at < CASE source WHEN %s THEN %s ELSE %s END"
)
_UNLOCKED = "ANY (ARRAY (SELECT ctid FROM {0} WHERE {1} FOR UPDATE SKIP LOCKED))"
"""Rows that no delivery holds: one that does is about to refresh it, and neither waits for the other."""


async def forget(db: Database, *, older_than: timedelta, now: datetime) -> int:
    """Delete what nobody has confirmed for so long; returns how many alerts went."""
    async with db.transaction() as connection:
        before = now - older_than

        async def delete(table: str, time: str, before: datetime) -> int:
            old = _UNLOCKED.format(table, f"{time} < %s")
            return (await connection.execute(f"DELETE FROM {table} WHERE ctid = {old}", (before,))).rowcount

        await delete("alert_deliveries", "last_received_at", before)
        await delete("webhook_signatures", "expires_at", now)
        return await delete("alerts", "refreshed_at", before)


def _alert(row: DictRow) -> Alert:
    fields = {**row, "is_firing": row["status"] == "firing"}
    del fields["status"]
    fields["action"] = AlertAction(row["action"]) if row["action"] else None
    return Alert(**fields)
