"""Decisions: how many replicas a set shall have, why, and who said so. Append-only."""

from __future__ import annotations

from collections import defaultdict
from datetime import datetime, timedelta

from psycopg.rows import DictRow

from controlplane.core.stories import RecordedDecision
from controlplane.core.types import Change, Decision, DecisionReason
from controlplane.db.causes import EVIDENCE, alert_then
from controlplane.db.pool import Connection, Database

COLUMNS = "id, at, replica_set, reason, previous, desired, explanation, alerts, actor, evidence"


async def record(connection: Connection, decision: Decision, *, actor: str, now: datetime) -> None:
    """Write one, in the caller's transaction, with the alerts that pressed as they are now."""
    await connection.execute(
        "INSERT INTO decisions (at, replica_set, reason, previous, desired, explanation, alerts, actor, evidence) "
        f"VALUES (%s, %s, %s, %s, %s, %s, %s, %s, ({EVIDENCE}))",
        (
            now,
            decision.replica_set,
            decision.reason,
            decision.previous,
            decision.desired,
            decision.explanation,
            list(decision.alerts),
            actor,
            list(decision.alerts),
        ),
    )


async def load_latest(db: Database) -> dict[str, RecordedDecision]:
    """The newest decision of every replica set that has one."""
    async with db.connection() as connection:
        cursor = await connection.execute(
            f"SELECT DISTINCT ON (replica_set) {COLUMNS} FROM decisions ORDER BY replica_set, id DESC"
        )
        return {row["replica_set"]: recorded(row) for row in await cursor.fetchall()}


async def load_newest(db: Database, *, replica_set: str | None = None, limit: int = 100) -> list[RecordedDecision]:
    """Newest first; of one set, or of all."""
    async with db.connection() as connection:
        cursor = await connection.execute(
            f"SELECT {COLUMNS} FROM decisions WHERE %(set)s::text IS NULL OR replica_set = %(set)s "
            "ORDER BY id DESC LIMIT %(limit)s",
            {"set": replica_set, "limit": limit},
        )
        return [recorded(row) for row in await cursor.fetchall()]


async def load_changes(db: Database, since: datetime) -> dict[str, list[Change]]:
    """What changed desired after that time, oldest first, by replica set."""
    async with db.connection() as connection:
        cursor = await connection.execute(
            "SELECT replica_set, at, previous, desired FROM decisions "
            "WHERE at > %s AND previous <> desired ORDER BY id",
            (since,),
        )
        changes: dict[str, list[Change]] = defaultdict(list)
        for row in await cursor.fetchall():
            changes[row["replica_set"]].append(Change(row["at"], row["previous"], row["desired"]))
        return changes


async def forget(db: Database, *, older_than: timedelta, now: datetime) -> int:
    """Delete the decisions that were taken so long ago; returns how many went.

    Each set's newest stays, and what a replica that is kept was made for.
    """
    async with db.connection() as connection:
        cursor = await connection.execute(
            "DELETE FROM decisions d WHERE at < %s "
            "AND id <> (SELECT max(id) FROM decisions WHERE replica_set = d.replica_set) "
            "AND NOT EXISTS (SELECT FROM replicas WHERE decision_id = d.id)",
            (now - older_than,),
        )
        return cursor.rowcount


def recorded(row: DictRow) -> RecordedDecision:
    """A decision from a row of `COLUMNS`."""
    return RecordedDecision(
        **{
            **row,
            "alerts": tuple(row["alerts"]),
            "reason": DecisionReason(row["reason"]),
            "evidence": tuple(alert_then(one) for one in row["evidence"]),
        }
    )
