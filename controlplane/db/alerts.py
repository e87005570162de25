"""Alerts as levels, and the deliveries that told of them.

What arrives is a word about an alert: that it fires since then, or that it ended then. Words are ordered by the moment
they tell of, never by arrival: an older one is counted and changes nothing, a repeated one only refreshes. So two
Grafanas that evaluate one rule, and each begin its episode a little apart, tell of one level. All alerts of one
delivery are kept, or none.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from psycopg.rows import DictRow

from controlplane.core.types import Alert, AlertAction
from controlplane.db.errors import Duplicate
from controlplane.db.pool import PULL_CHANNEL, Connection, Database, wake


@dataclass(frozen=True, slots=True)
class Arrival:
    """One delivery: its alerts, each with its payload.

    `signature`: its own, and when it stops being accepted; None: nothing keeps it from being delivered again.
    """

    alerts: Sequence[tuple[Alert, Mapping[str, Any]]]
    at: datetime
    signature: tuple[bytes, datetime] | None = None


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
        good = await _use_signatures(connection, arrivals)
        kept = [one for one, is_good in zip(arrivals, good, strict=True) if is_good]
        new = await _record_deliveries(connection, kept)
        changed = await _keep_newest(connection, [alert for one in kept for alert, _ in one.alerts])
        if new or changed:
            await wake(connection)
        if wants_pull:
            await wake(connection, PULL_CHANNEL)
    return [_counted(one, new) if is_good else None for one, is_good in zip(arrivals, good, strict=True)]


def _counted(arrival: Arrival, new: set[_Word]) -> Stored:
    """Takes what it counts as new out of `new`: whoever tells it again repeats it."""
    accepted = duplicates = 0
    ignored: dict[str, int] = {}
    for alert, _ in arrival.alerts:
        word = _word(alert)
        if word not in new:
            duplicates += 1
            continue
        new.remove(word)
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
        changed = await _keep_newest(connection, active, is_pulled=True)
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


async def load_since(db: Database, since: datetime) -> tuple[Alert, ...]:
    """Alerts that were confirmed, or that ended, at this time or later; newest first."""
    async with db.connection() as connection:
        cursor = await connection.execute(
            "SELECT source, org_id, fingerprint, alertname, status, starts_at, ends_at, refreshed_at, labels, "
            "annotations, values, action, step, ignored_reason, stale_since FROM alerts WHERE refreshed_at >= %s "
            "ORDER BY refreshed_at DESC, fingerprint",
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
    """Mark what fires, would press, and was not confirmed for so long; returns the keys of those newly marked."""
    async with db.connection() as connection:
        cursor = await connection.execute(
            f"UPDATE alerts SET stale_since = %s WHERE ctid = {_UNLOCKED.format('alerts', _UNCONFIRMED)} "
            "RETURNING source || '/' || org_id || '/' || fingerprint AS key",
            (now, now - stale_after),
        )
        return sorted(row["key"] for row in await cursor.fetchall())


async def count_stale(db: Database) -> dict[str, int]:
    """How many alerts are marked as stale, by source."""
    async with db.connection() as connection:
        cursor = await connection.execute(
            "SELECT source, count(*) FROM alerts WHERE status = 'firing' AND stale_since IS NOT NULL GROUP BY source"
        )
        return {row["source"]: row["count"] for row in await cursor.fetchall()}


_UNCONFIRMED = "status = 'firing' AND action IS NOT NULL AND stale_since IS NULL AND refreshed_at < %s"
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


_Word = tuple[str, int, str, datetime, str]
"""What identifies a delivery of one alert: source, organization, fingerprint, start, status."""


def _word(alert: Alert) -> _Word:
    return alert.source, alert.org_id, alert.fingerprint, alert.starts_at, _status(alert)


def _status(alert: Alert) -> str:
    return "firing" if alert.is_firing else "resolved"


async def _use_signatures(connection: Connection, arrivals: Sequence[Arrival]) -> list[bool]:
    """Which of the deliveries are good: those that are not signed, or by a signature that was not used before."""
    signatures: dict[bytes, datetime] = {}
    for one in arrivals:
        if one.signature is not None:
            signatures.setdefault(*one.signature)
    if not signatures:
        return [True] * len(arrivals)
    cursor = await connection.execute(
        "INSERT INTO webhook_signatures AS s (signature, expires_at) "
        "SELECT * FROM unnest(%s::bytea[], %s::timestamptz[]) AS t (signature, expires_at) ORDER BY signature "
        "ON CONFLICT (signature) DO UPDATE SET expires_at = excluded.expires_at WHERE s.expires_at < %s "
        "RETURNING signature",
        (list(signatures), list(signatures.values()), min(one.at for one in arrivals)),
    )
    unused = {bytes(row["signature"]) for row in await cursor.fetchall()}
    good = []
    for one in arrivals:
        good.append(one.signature is None or one.signature[0] in unused)
        if one.signature is not None:
            unused.discard(one.signature[0])  # the same one twice: the second is a replay
    return good


async def _record_deliveries(connection: Connection, arrivals: Iterable[Arrival]) -> set[_Word]:
    """Returns those that were not known. Rows are locked in one order by all: nobody waits for each other."""
    told = [
        {
            "n": n,
            "source": alert.source,
            "org_id": alert.org_id,
            "fingerprint": alert.fingerprint,
            "starts_at": alert.starts_at.isoformat(),
            "status": _status(alert),
            "payload": payload,
            "at": at.isoformat(),
        }
        for n, (alert, payload, at) in enumerate((*pair, one.at) for one in arrivals for pair in one.alerts)
    ]
    if not told:
        return set()
    cursor = await connection.execute(
        """
        WITH told AS (
            SELECT source, org_id, fingerprint, starts_at, status, (array_agg(payload ORDER BY n DESC))[1] AS payload,
                   min(at) AS first_at, max(at) AS last_at, count(*) AS times
              FROM json_to_recordset(%s::json)
                   AS t (n integer, source text, org_id bigint, fingerprint text, starts_at timestamptz, status text,
                         payload jsonb, at timestamptz)
             GROUP BY source, org_id, fingerprint, starts_at, status
        ), recorded AS (
            INSERT INTO alert_deliveries AS d (source, org_id, fingerprint, starts_at, status, payload,
                                               first_received_at, last_received_at, deliveries)
            SELECT * FROM told ORDER BY source, org_id, fingerprint, starts_at, status
            ON CONFLICT (source, org_id, fingerprint, starts_at, status) DO UPDATE
               SET deliveries = d.deliveries + excluded.deliveries, payload = excluded.payload,
                   last_received_at = greatest(d.last_received_at, excluded.last_received_at)
            RETURNING source, org_id, fingerprint, starts_at, status, deliveries
        )
        SELECT source, org_id, fingerprint, starts_at, status
          FROM recorded JOIN told USING (source, org_id, fingerprint, starts_at, status) WHERE deliveries = times
        """,
        (json.dumps(told),),
    )
    return {
        (row["source"], row["org_id"], row["fingerprint"], row["starts_at"], row["status"])
        for row in await cursor.fetchall()
    }


async def _keep_newest(connection: Connection, told: Sequence[Alert], *, is_pulled: bool = False) -> int:
    """Returns how many levels this changed; the others it confirmed, or it was older.

    The moment of a word is when the alert ended, or else when it began; of two with one moment the end counts. So a
    delivery that fires and began before the known end is a late one. A pull that shows the same is not: the alert was
    missing from an earlier list, because it was silenced or the source had just started.

    What it asks for is judged while it fires and kept when it ends: also an end that only says "I cannot see any more"
    ends a pressure that was felt until then.
    """
    if not told:
        return 0
    cursor = await connection.execute(
        """
        WITH told AS (
            SELECT DISTINCT ON (source, org_id, fingerprint) *
              FROM json_to_recordset(%(told)s::json)
                   AS t (n integer, source text, org_id bigint, fingerprint text, alertname text, status text,
                         starts_at timestamptz, ends_at timestamptz, refreshed_at timestamptz, labels jsonb,
                         annotations jsonb, values jsonb, action text, step integer, ignored_reason text)
             ORDER BY source, org_id, fingerprint, greatest(starts_at, ends_at) DESC, status = 'resolved' DESC, n DESC
        ), before AS (
            SELECT a.source, a.org_id, a.fingerprint, a.status, a.starts_at
              FROM alerts a JOIN told USING (source, org_id, fingerprint)
        ), kept AS (
            INSERT INTO alerts AS a (source, org_id, fingerprint, alertname, status, starts_at, ends_at, refreshed_at,
                                     labels, annotations, values, action, step, ignored_reason)
            SELECT source, org_id, fingerprint, alertname, status, starts_at, ends_at, refreshed_at,
                   labels, annotations, values, action, step, ignored_reason
              FROM told ORDER BY source, org_id, fingerprint
            ON CONFLICT (source, org_id, fingerprint) DO UPDATE
               SET alertname = excluded.alertname, status = excluded.status, ends_at = excluded.ends_at,
                   starts_at = CASE a.status WHEN 'firing' THEN greatest(a.starts_at, excluded.starts_at)
                                             ELSE excluded.starts_at END,
                   refreshed_at = greatest(a.refreshed_at, excluded.refreshed_at), stale_since = NULL,
                   labels = excluded.labels, annotations = excluded.annotations, values = excluded.values,
                   action = CASE excluded.status WHEN 'firing' THEN excluded.action ELSE a.action END,
                   step = CASE excluded.status WHEN 'firing' THEN excluded.step ELSE a.step END,
                   ignored_reason = CASE excluded.status WHEN 'firing' THEN excluded.ignored_reason
                                                         ELSE a.ignored_reason END
             WHERE (greatest(excluded.starts_at, excluded.ends_at), excluded.status = 'resolved')
                   >= (greatest(a.starts_at, a.ends_at), a.status = 'resolved')
                OR (%(is_pulled)s AND excluded.refreshed_at > a.refreshed_at)
            RETURNING source, org_id, fingerprint, status, starts_at
        )
        SELECT count(*) AS changed FROM kept LEFT JOIN before USING (source, org_id, fingerprint)
         WHERE (before.status, before.starts_at) IS DISTINCT FROM (kept.status, kept.starts_at)
        """,
        {
            "is_pulled": is_pulled,
            "told": json.dumps(
                [
                    {
                        "n": n,
                        "source": alert.source,
                        "org_id": alert.org_id,
                        "fingerprint": alert.fingerprint,
                        "alertname": alert.alertname,
                        "status": _status(alert),
                        "starts_at": alert.starts_at.isoformat(),
                        "ends_at": alert.ends_at and alert.ends_at.isoformat(),
                        "refreshed_at": alert.refreshed_at.isoformat(),
                        "labels": dict(alert.labels),
                        "annotations": dict(alert.annotations),
                        "values": dict(alert.values),
                        "action": alert.action,
                        "step": alert.step,
                        "ignored_reason": alert.ignored_reason,
                    }
                    for n, alert in enumerate(told)
                ]
            ),
        },
    )
    row = await cursor.fetchone()
    return int(row["changed"]) if row else 0


def _alert(row: DictRow) -> Alert:
    fields = {**row, "is_firing": row["status"] == "firing"}
    del fields["status"]
    fields["action"] = AlertAction(row["action"]) if row["action"] else None
    return Alert(**fields)
