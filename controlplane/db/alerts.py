"""Alerts as levels, and the deliveries that told of them.

What arrives is ordered by `starts_at`, then `ends_at`, never by arrival: an older word about an alert is counted and
changes nothing. A repeated word only refreshes. All alerts of one delivery are kept, or none.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from psycopg.rows import DictRow
from psycopg.types.json import Jsonb

from controlplane.core.types import Alert, AlertAction
from controlplane.db.errors import Duplicate
from controlplane.db.pool import Connection, Database, wake


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
    """Keep each alert with its payload, durably, then wake the reconciler. May be repeated.

    `signature`: the delivery's, and when it stops being accepted; raises Duplicate if it was used before.
    """
    accepted = duplicates = 0
    ignored: dict[str, int] = {}
    async with db.transaction() as connection:
        if signature is not None:
            await _use_signature(connection, *signature, now)
        # one order for all: two deliveries of the same group cannot wait for each other
        for alert, payload in sorted(arrived, key=lambda pair: pair[0].key):
            is_new = await _record_delivery(connection, alert, payload, now)
            await _keep_newest(connection, alert)
            if not is_new:
                duplicates += 1
            elif alert.ignored_reason is not None:
                ignored[alert.ignored_reason] = ignored.get(alert.ignored_reason, 0) + 1
            else:
                accepted += 1
        await wake(connection)
    return Stored(accepted=accepted, duplicates=duplicates, ignored=ignored)


async def refresh(db: Database, source: str, org_id: int, active: Iterable[Alert], *, now: datetime) -> int:
    """Take a complete list of what is active in a source's organization: heals what webhooks lost.

    Returns how many changed.

    What fires here and is not in the list has been resolved; what is in it fires, whatever arrived or did not, unless
    it was heard of after `now`: when the list was asked for.
    """
    active = list(active)
    async with db.transaction() as connection:
        # deliveries wait: each locks its alerts in its own order, and this would lock them all in another
        await connection.execute("LOCK TABLE alerts IN SHARE ROW EXCLUSIVE MODE")
        changed = 0
        for alert in sorted(active, key=lambda one: one.key):
            changed += await _keep_newest(connection, alert, is_pulled=True)
        cursor = await connection.execute(
            "UPDATE alerts SET status = 'resolved', ends_at = %(now)s, refreshed_at = %(now)s "
            "WHERE source = %(source)s AND org_id = %(org_id)s AND status = 'firing' AND refreshed_at <= %(now)s "
            "AND fingerprint <> ALL (%(active)s)",
            {"now": now, "source": source, "org_id": org_id, "active": [alert.fingerprint for alert in active]},
        )
        changed += cursor.rowcount
        if changed:
            await wake(connection)
    return changed


async def load_since(db: Database, since: datetime) -> tuple[Alert, ...]:
    """Alerts that were confirmed, or that ended, at this time or later; newest first."""
    async with db.connection() as connection:
        cursor = await connection.execute(
            "SELECT source, org_id, fingerprint, alertname, status, starts_at, ends_at, refreshed_at, labels, "
            "annotations, values, action, step, ignored_reason FROM alerts WHERE refreshed_at >= %s "
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


async def forget(db: Database, *, older_than: timedelta, now: datetime) -> int:
    """Delete what nobody has confirmed for so long; returns how many alerts went."""
    async with db.transaction() as connection:
        before = now - older_than
        await connection.execute("DELETE FROM alert_deliveries WHERE last_received_at < %s", (before,))
        await connection.execute("DELETE FROM webhook_signatures WHERE expires_at < %s", (now,))
        return (await connection.execute("DELETE FROM alerts WHERE refreshed_at < %s", (before,))).rowcount


async def _use_signature(connection: Connection, signature: bytes, expires_at: datetime, now: datetime) -> None:
    cursor = await connection.execute(
        "INSERT INTO webhook_signatures AS s (signature, expires_at) VALUES (%s, %s) "
        "ON CONFLICT (signature) DO UPDATE SET expires_at = excluded.expires_at WHERE s.expires_at < %s",
        (signature, expires_at, now),
    )
    if cursor.rowcount == 0:
        raise Duplicate("this signature was used before")


async def _record_delivery(connection: Connection, alert: Alert, payload: Mapping[str, Any], now: datetime) -> bool:
    cursor = await connection.execute(
        """
        INSERT INTO alert_deliveries AS d
               (source, org_id, fingerprint, starts_at, status, payload, first_received_at, last_received_at)
        VALUES (%(source)s, %(org)s, %(fingerprint)s, %(starts)s, %(status)s, %(payload)s, %(now)s, %(now)s)
        ON CONFLICT (source, org_id, fingerprint, starts_at, status) DO UPDATE
           SET deliveries = d.deliveries + 1, last_received_at = excluded.last_received_at, payload = excluded.payload
        RETURNING deliveries = 1 AS is_new
        """,
        {
            "source": alert.source,
            "org": alert.org_id,
            "fingerprint": alert.fingerprint,
            "starts": alert.starts_at,
            "status": "firing" if alert.is_firing else "resolved",
            "payload": Jsonb(payload),
            "now": now,
        },
    )
    row = await cursor.fetchone()
    return bool(row and row["is_new"])


async def _keep_newest(connection: Connection, alert: Alert, *, is_pulled: bool = False) -> int:
    """Returns 1 if this changed what is known, 0 if it confirmed it or was older.

    A delivery that fires after the same alert was resolved is a late one. A pull that shows it is not: the alert was
    missing from an earlier list, because it was silenced or the source had just started.
    """
    cursor = await connection.execute(
        """
        WITH before AS (
            SELECT status, starts_at FROM alerts
             WHERE source = %(source)s AND org_id = %(org_id)s AND fingerprint = %(fingerprint)s
        )
        INSERT INTO alerts AS a (source, org_id, fingerprint, alertname, status, starts_at, ends_at, refreshed_at,
                                 labels, annotations, values, action, step, ignored_reason)
        VALUES (%(source)s, %(org_id)s, %(fingerprint)s, %(alertname)s, %(status)s, %(starts_at)s, %(ends_at)s,
                %(refreshed_at)s, %(labels)s, %(annotations)s, %(values)s, %(action)s, %(step)s, %(ignored_reason)s)
        ON CONFLICT (source, org_id, fingerprint) DO UPDATE
           SET alertname = excluded.alertname, status = excluded.status, starts_at = excluded.starts_at,
               ends_at = excluded.ends_at, refreshed_at = greatest(a.refreshed_at, excluded.refreshed_at),
               labels = excluded.labels, annotations = excluded.annotations, values = excluded.values,
               action = excluded.action, step = excluded.step, ignored_reason = excluded.ignored_reason
         WHERE (excluded.starts_at, coalesce(excluded.ends_at, '-infinity'))
               >= (a.starts_at, coalesce(a.ends_at, '-infinity'))
            OR (%(is_pulled)s AND excluded.starts_at = a.starts_at AND excluded.refreshed_at > a.refreshed_at)
        RETURNING (SELECT count(*) FROM before WHERE before.status = %(status)s
                                                 AND before.starts_at = %(starts_at)s) = 0 AS is_change
        """,
        {
            "is_pulled": is_pulled,
            "source": alert.source,
            "org_id": alert.org_id,
            "fingerprint": alert.fingerprint,
            "alertname": alert.alertname,
            "status": "firing" if alert.is_firing else "resolved",
            "starts_at": alert.starts_at,
            "ends_at": alert.ends_at,
            "refreshed_at": alert.refreshed_at,
            "labels": Jsonb(dict(alert.labels)),
            "annotations": Jsonb(dict(alert.annotations)),
            "values": Jsonb(dict(alert.values)),
            "action": alert.action,
            "step": alert.step,
            "ignored_reason": alert.ignored_reason,
        },
    )
    row = await cursor.fetchone()
    return int(bool(row and row["is_change"]))


def _alert(row: DictRow) -> Alert:
    fields = {**row, "is_firing": row["status"] == "firing"}
    del fields["status"]
    fields["action"] = AlertAction(row["action"]) if row["action"] else None
    return Alert(**fields)
