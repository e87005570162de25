"""Marks of nodes that new jobs are kept off, their history, and the runs that marks are derived from.

The reconciler makes the rows follow what is due; operators add theirs and clear any. Both lock the table's rows in one
order and look again under the lock, so that a mark cleared meanwhile is not put back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from datetime import datetime, timedelta

from psycopg.rows import DictRow

from controlplane.core.nodes import NodeCause, NodeMark, NodeRun, clear, expand, is_node_name
from controlplane.core.types import Reason
from controlplane.db import audit
from controlplane.db.pool import Connection, Database, wake
from controlplane.db.replica_sets import check_until

_COLUMNS = "node, cause, actor, reason, since, until, strikes, cleared_at, cleared_by"

Due = Mapping[tuple[str, NodeCause], NodeMark]


@dataclass(frozen=True, slots=True)
class Marked:
    """The active marks of one node after a verb, and whether that changed them; after a dry run, as they would be."""

    node: str
    marks: tuple[NodeMark, ...]
    is_changed: bool


async def load(db: Database) -> tuple[NodeMark, ...]:
    """Every mark, cleared ones included, by node."""
    async with db.connection() as connection:
        return await _load(connection)


async def drain(
    db: Database,
    node: str,
    *,
    actor: str,
    now: datetime,
    reason: str | None = None,
    until: datetime | None = None,
    dry_run: bool = False,
) -> Marked:
    """Keep new jobs off a node and let what runs there leave. May be repeated. ValueError names the field at fault."""
    _check_name(node)
    check_until(until, now)
    async with db.transaction() as connection:
        before = {mark.cause: mark for mark in await _load(connection, node, lock=True)}
        old = before.get(NodeCause.OPERATOR)
        mark = NodeMark(node, NodeCause.OPERATOR, actor, reason or "drained by an operator", now, until)
        if old is not None and (old.reason, old.until) == (mark.reason, mark.until):
            return _marked(node, before, is_changed=False)
        after = {**before, NodeCause.OPERATOR: mark if old is None else replace(mark, since=old.since)}
        if not dry_run:
            event = "kept_out" if old is None else "changed"
            await _write(connection, after[NodeCause.OPERATOR], event, actor, now)
            end = f" until {until.isoformat()}" if until is not None else ""
            words = f"drained by {actor}{end}" + (f" ({reason})" if reason else "")
            await audit.record(connection, audit.Said(now, actor, "node", node, words))
            await wake(connection)
    return _marked(node, after, is_changed=True)


async def undrain(db: Database, node: str, *, actor: str, now: datetime, dry_run: bool = False) -> Marked:
    """Clear every mark of a node, whoever made it. May be repeated.

    The alert that fires now, and the failures that happened until now, do not bring it back; later ones do.
    """
    _check_name(node)
    async with db.transaction() as connection:
        before = {mark.cause: mark for mark in await _load(connection, node, lock=True)}
        active = [mark for mark in before.values() if mark.is_active]
        if not active or dry_run:
            return Marked(node, (), is_changed=bool(active))
        for mark in active:
            if mark.cause is NodeCause.OPERATOR:
                await _remove(connection, mark, "cleared", actor, now)
            else:
                await _write(connection, clear(mark, actor=actor, now=now), "cleared", actor, now)
        await audit.record(connection, audit.Said(now, actor, "node", node, f"undrained by {actor}"))
        await wake(connection)
    return Marked(node, (), is_changed=True)


async def follow(db: Database, due: Callable[[tuple[NodeMark, ...]], Due], *, actor: str, now: datetime) -> list[str]:
    """Make the rows those that are due, given those that there are. Returns what changed, in words.

    `due` is asked under the lock, so that what an operator has just said is among what it is given.
    """
    found = await load(db)
    if due(found) == {(mark.node, mark.cause): mark for mark in found}:
        return []
    async with db.transaction() as connection:
        known = {(mark.node, mark.cause): mark for mark in await _load(connection, lock=True)}
        wanted = due(tuple(known.values()))
        said: list[str] = []
        for key, mark in wanted.items():
            old = known.get(key)
            if old == mark:
                continue
            is_new = old is None or not old.is_active
            await _write(connection, mark, "kept_out" if is_new else "changed", actor, now)
            if is_new:
                said.append(f"node {mark.node} is kept out: {mark.reason}")
        for key, mark in known.items():
            if key not in wanted:
                await _remove(connection, mark, "ended", actor, now)
                if mark.is_active:
                    said.append(f"node {mark.node} is let in again: {mark.reason}")
    return said


async def load_runs(db: Database, since: datetime) -> tuple[NodeRun, ...]:
    """What every job that lives, or ended since then, did on each node that it had."""
    async with db.connection() as connection:
        cursor = await connection.execute(
            """
            SELECT r.name AS replica, r.replica_set, r.spec_hash, j.nodes AS node, r.ended_at, e.first_ready_at,
                   CASE WHEN r.phase = 'ENDED' THEN r.reason END AS reason,
                   r.phase = 'ENDED' AND j.state IN ('NODE_FAIL', 'BOOT_FAIL') AS failed_there
              FROM replicas r
              JOIN slurm_jobs j ON j.replica_id = r.id AND j.job_id = r.slurm_job_id AND j.nodes <> ''
              LEFT JOIN endpoints e ON e.replica_id = r.id
             WHERE r.phase <> 'ENDED' OR r.ended_at > %s
             ORDER BY r.id
            """,
            (since,),
        )
        return tuple(
            NodeRun(**{**row, "node": node, "reason": Reason(row["reason"]) if row["reason"] else None})
            for row in await cursor.fetchall()
            for node in sorted(expand(row["node"]) or ())
        )


async def load_history(db: Database, node: str, *, limit: int = 100) -> list[DictRow]:
    """What happened to one node's marks, newest first."""
    async with db.connection() as connection:
        cursor = await connection.execute(
            "SELECT at, node, cause, event, reason, until, actor FROM node_history WHERE node = %s "
            "ORDER BY id DESC LIMIT %s",
            (node, limit),
        )
        return list(await cursor.fetchall())


async def forget_history(db: Database, *, older_than: timedelta, now: datetime) -> int:
    """Delete what happened to marks so long ago; returns how many rows went."""
    async with db.connection() as connection:
        return (await connection.execute("DELETE FROM node_history WHERE at < %s", (now - older_than,))).rowcount


def _check_name(node: str) -> None:
    if not is_node_name(node):
        raise ValueError("node: must be one node's name, as Slurm shows it; not a list or a range")


def _marked(node: str, marks: Mapping[NodeCause, NodeMark], *, is_changed: bool) -> Marked:
    return Marked(node, tuple(mark for mark in _in_order(marks.values()) if mark.is_active), is_changed)


def _in_order(marks: Iterable[NodeMark]) -> list[NodeMark]:
    return sorted(marks, key=lambda mark: (mark.node, list(NodeCause).index(mark.cause)))


async def _load(connection: Connection, node: str | None = None, *, lock: bool = False) -> tuple[NodeMark, ...]:
    if lock:  # rows that are not there yet cannot be locked: the table is
        await connection.execute("LOCK TABLE nodes IN SHARE ROW EXCLUSIVE MODE")
    cursor = await connection.execute(
        f"SELECT {_COLUMNS} FROM nodes WHERE %(node)s::text IS NULL OR node = %(node)s", {"node": node}
    )
    return tuple(_in_order(NodeMark(**{**row, "cause": NodeCause(row["cause"])}) for row in await cursor.fetchall()))


async def _write(connection: Connection, mark: NodeMark, event: str, actor: str, now: datetime) -> None:
    await connection.execute(
        f"INSERT INTO nodes ({_COLUMNS}) VALUES (%s, %s, %s, %s, %s, %s, %s, %s, %s) "
        "ON CONFLICT (node, cause) DO UPDATE "
        "SET actor = excluded.actor, reason = excluded.reason, since = excluded.since, until = excluded.until, "
        "strikes = excluded.strikes, cleared_at = excluded.cleared_at, cleared_by = excluded.cleared_by",
        (
            mark.node,
            mark.cause,
            mark.actor,
            mark.reason,
            mark.since,
            mark.until,
            mark.strikes,
            mark.cleared_at,
            mark.cleared_by,
        ),
    )
    await _record(connection, mark, event, actor, now)


async def _remove(connection: Connection, mark: NodeMark, event: str, actor: str, now: datetime) -> None:
    await connection.execute("DELETE FROM nodes WHERE node = %s AND cause = %s", (mark.node, mark.cause))
    if mark.is_active:
        await _record(connection, mark, event, actor, now)


async def _record(connection: Connection, mark: NodeMark, event: str, actor: str, now: datetime) -> None:
    await connection.execute(
        "INSERT INTO node_history (at, node, cause, event, reason, until, actor) VALUES (%s, %s, %s, %s, %s, %s, %s)",
        (now, mark.node, mark.cause, event, mark.reason, mark.until, actor),
    )
