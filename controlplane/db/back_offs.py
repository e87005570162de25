"""Replica sets that are not tried again before their time, and why: as of the reconciler's newest round.

An operator's word (`resume`, `scale`, a spec) forgives what failed until then: the next round tries again.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime

from controlplane.core.back_off import BackOff
from controlplane.db.pool import Connection, Database


@dataclass(frozen=True, slots=True)
class RecordedBackOff:
    """`replica`, `reason` and `message`: of the newest that failed. `log_tail`: the end of its job's log, if known."""

    replica_set: str
    failures: int
    since: datetime
    next_try_at: datetime
    replica: str
    reason: str
    message: str | None
    log_tail: str | None


async def load(db: Database) -> dict[str, RecordedBackOff]:
    """Every set that backs off now, by name. A time that has passed: the next try is under way."""
    async with db.connection() as connection:
        cursor = await connection.execute(
            "SELECT b.replica_set, b.failures, b.since, b.next_try_at, b.replica, b.reason, b.message, "
            "l.tail AS log_tail FROM back_offs b LEFT JOIN replicas r ON r.name = b.replica "
            "LEFT JOIN job_logs l ON l.replica_id = r.id WHERE b.failures > 0"
        )
        return {row["replica_set"]: RecordedBackOff(**row) for row in await cursor.fetchall()}


async def load_forgiven(db: Database) -> dict[str, datetime]:
    """When an operator last said to try again, by replica set."""
    async with db.connection() as connection:
        cursor = await connection.execute(
            "SELECT replica_set, forgiven_at FROM back_offs WHERE forgiven_at IS NOT NULL"
        )
        return {row["replica_set"]: row["forgiven_at"] for row in await cursor.fetchall()}


async def record(db: Database, found: Mapping[str, BackOff | None], *, now: datetime) -> None:
    """Keep what the round found of each set; None: it backs off no more. Only what changed is written."""
    async with db.transaction() as connection:
        await connection.execute(
            "UPDATE back_offs SET failures = 0, since = NULL, next_try_at = NULL, replica = NULL, reason = NULL, "
            "message = NULL WHERE failures > 0 AND replica_set = ANY (%s)",
            ([name for name, one in found.items() if one is None],),
        )
        for name, one in sorted(found.items()):
            if one is None:
                continue
            await connection.execute(
                """
                INSERT INTO back_offs AS b (replica_set, failures, since, next_try_at, replica, reason, message)
                SELECT s.name, %(failures)s, %(now)s, %(next)s, %(replica)s, %(reason)s, %(message)s
                  FROM replica_sets s WHERE s.name = %(set)s
                ON CONFLICT (replica_set) DO UPDATE
                   SET failures = excluded.failures, since = coalesce(b.since, excluded.since),
                       next_try_at = excluded.next_try_at, replica = excluded.replica, reason = excluded.reason,
                       message = excluded.message
                 WHERE (b.failures, b.next_try_at, b.replica)
                       IS DISTINCT FROM (excluded.failures, excluded.next_try_at, excluded.replica)
                """,
                {
                    "set": name,
                    "failures": one.failures,
                    "now": now,
                    "next": one.next_try_at,
                    "replica": one.newest.name,
                    "reason": one.newest.reason,
                    "message": one.newest.message,
                },
            )


async def forgive(connection: Connection, replica_set: str, now: datetime) -> bool:
    """Try again at once, in the caller's transaction. Returns whether the set was backing off."""
    cursor = await connection.execute(
        "INSERT INTO back_offs AS b (replica_set, forgiven_at) VALUES (%(set)s, %(now)s) "
        "ON CONFLICT (replica_set) DO UPDATE SET forgiven_at = excluded.forgiven_at "
        "RETURNING b.failures > 0 AS was_backing_off",
        {"set": replica_set, "now": now},
    )
    row = await cursor.fetchone()
    return bool(row and row["was_backing_off"])
