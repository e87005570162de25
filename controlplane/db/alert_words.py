"""Words about alerts as rows: many at a time, one statement a table, and the order in which they hold.

A word says that an alert fires since then, or that it ended then. Words are ordered by the moment they tell of, never
by arrival. So two Grafanas that evaluate one rule, and each begin its episode a little apart, tell of one level.
Everything here runs in the caller's transaction.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from controlplane.core.types import Alert
from controlplane.db.pool import Connection


@dataclass(frozen=True, slots=True)
class Arrival:
    """One delivery: its alerts, each with its payload.

    `signature`: its own, and when it stops being accepted; None: nothing keeps it from being delivered again.
    """

    alerts: Sequence[tuple[Alert, Mapping[str, Any]]]
    at: datetime
    signature: tuple[bytes, datetime] | None = None


Word = tuple[str, int, str, datetime, str]
"""What identifies a delivery of one alert: source, organization, fingerprint, start, status."""


def word(alert: Alert) -> Word:
    return alert.source, alert.org_id, alert.fingerprint, alert.starts_at, _status(alert)


def _status(alert: Alert) -> str:
    return "firing" if alert.is_firing else "resolved"


async def use_signatures(connection: Connection, arrivals: Sequence[Arrival]) -> list[bool]:
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


async def record_deliveries(connection: Connection, arrivals: Iterable[Arrival]) -> set[Word]:
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


async def keep_newest(connection: Connection, told: Sequence[Alert], *, is_pulled: bool = False) -> int:
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
