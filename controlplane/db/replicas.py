"""Replicas, and the history of their phases.

`move` is the only way to change a phase: one statement that checks phase and version and writes `replica_history`,
so that a step is recorded exactly when it happened, and happens at most once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import Any

from psycopg.rows import DictRow

from controlplane.core.stories import Step
from controlplane.core.types import EXISTING_PHASES, LIVE_PHASES, Move, PastReplica, Phase, Reason, Replica, ReplicaSet
from controlplane.core.verbs import Verb, interpret
from controlplane.db.causes import CAUSE
from controlplane.db.errors import Duplicate, NotFound, Stale
from controlplane.db.pool import Connection, Database
from controlplane.db.replica_sets import SPECS

_COLUMNS = (
    "id, name, replica_set, phase, version, spec, spec_hash, port, secret, created_at, phase_since, reason, message, "
    "slurm_job_id, submitted_at, running_since, drain_deadline, idle_since, cut_requests, succeeds"
)


_VERB_ATTEMPTS = 5

PORT_REST = timedelta(hours=6)
"""How long the port of a replica that may live on is not given again."""


@dataclass(frozen=True, slots=True)
class Obeyed:
    """The replica after a verb, and whether that changed it; after a dry run, as they would be."""

    replica: Replica
    is_changed: bool


async def load_live(db: Database) -> tuple[Replica, ...]:
    """Every replica that has not ended, oldest first."""
    async with db.connection() as connection:
        cursor = await connection.execute(f"SELECT {_COLUMNS} FROM replicas WHERE phase <> 'ENDED' ORDER BY id")
        return tuple(_replica(row) for row in await cursor.fetchall())


async def load_newest(db: Database, *, limit: int = 100) -> tuple[Replica, ...]:
    """The newest replicas, ended ones included, newest first."""
    async with db.connection() as connection:
        cursor = await connection.execute(f"SELECT {_COLUMNS} FROM replicas ORDER BY id DESC LIMIT %s", (limit,))
        return tuple(_replica(row) for row in await cursor.fetchall())


async def load_past(db: Database, *, per_set: int) -> tuple[PastReplica, ...]:
    """The replicas of each set that ended last, newest first."""
    async with db.connection() as connection:
        cursor = await connection.execute(
            """
            SELECT r.name, r.replica_set, r.spec_hash, r.reason, r.message, r.ended_at, r.created_at,
                   e.first_ready_at IS NOT NULL AS was_ready
              FROM replica_sets s
             CROSS JOIN LATERAL (SELECT * FROM replicas WHERE replica_set = s.name AND phase = 'ENDED'
                                  ORDER BY ended_at DESC, id DESC LIMIT %s) r
              LEFT JOIN endpoints e ON e.replica_id = r.id
             ORDER BY r.ended_at DESC, r.id DESC
            """,
            (per_set,),
        )
        return tuple(PastReplica(**{**row, "reason": Reason(row["reason"])}) for row in await cursor.fetchall())


async def load(db: Database, name: str) -> Replica:
    """Raises NotFound."""
    async with db.connection() as connection:
        cursor = await connection.execute(f"SELECT {_COLUMNS} FROM replicas WHERE name = %s", (name,))
        row = await cursor.fetchone()
    if row is None:
        raise NotFound(f"there is no replica {name!r}")
    return _replica(row)


async def names_that_ended(db: Database, names: list[str]) -> set[str]:
    """Which of these names belong to replicas that have ended."""
    async with db.connection() as connection:
        cursor = await connection.execute(
            "SELECT name FROM replicas WHERE name = ANY (%s) AND phase = 'ENDED'", (names,)
        )
        return {row["name"] for row in await cursor.fetchall()}


async def create(
    db: Database,
    replica_set: ReplicaSet,
    *,
    port: int,
    secret: str,
    actor: str,
    now: datetime,
    beside: Sequence[str] = (),
    succeeds: int | None = None,
) -> Replica:
    """Add one PENDING replica. Raises Duplicate (the port is taken), Stale (no further one is wanted any more).

    `beside`: replicas of the set that are to leave their nodes for it; they do not count against the desired ones, as
    long as those nodes are drained still. Of one on several nodes it suffices here that any node is.
    `succeeds`: a running replica's id. Of it and its successor only the one counts, and it has one at most.
    The set's row is locked meanwhile, so that two control planes cannot both make the last one that is missing.
    """
    async with db.transaction() as connection:
        if await _port_rests(connection, port, now):
            raise Duplicate("a process that nobody saw end may still have this port")
        await connection.execute("SELECT FROM replica_sets WHERE name = %s FOR UPDATE", (replica_set.name,))
        cursor = await connection.execute(
            f"""
            WITH {CAUSE}, fresh AS (
                INSERT INTO replicas (id, name, replica_set, spec, spec_hash, port, secret, created_at, phase_since,
                                      succeeds, decision_id, replaces)
                OVERRIDING SYSTEM VALUE
                SELECT n.id, 'cp-' || s.name || '-' || n.id, s.name, s.spec, s.spec_hash, %(port)s, %(secret)s,
                       %(now)s, %(now)s, %(succeeds)s, (SELECT decision_id FROM cause), (SELECT replaces FROM cause)
                  FROM replica_sets s, (SELECT nextval(pg_get_serial_sequence('replicas', 'id')) AS id) n
                 WHERE s.name = %(set)s AND NOT s.is_paused AND s.spec_hash = %(spec_hash)s
                   AND (SELECT count(*) FROM replicas r
                         WHERE r.replica_set = s.name AND r.spec_hash = s.spec_hash AND r.phase = ANY (%(existing)s)
                           AND NOT (r.name = ANY (%(beside)s) AND EXISTS (
                                   SELECT FROM slurm_jobs j JOIN nodes n ON n.node = j.nodes OR j.nodes ~ '[[,]'
                                    WHERE j.replica_id = r.id AND j.job_id = r.slurm_job_id
                                      AND n.cause <> 'failures' AND n.cleared_at IS NULL))
                           AND r.id IS DISTINCT FROM %(succeeds)s
                           AND NOT EXISTS (SELECT FROM replicas follower
                                            WHERE follower.succeeds = r.id AND follower.phase = ANY (%(existing)s)))
                       < s.desired_replicas
                   AND (%(succeeds)s::bigint IS NULL OR EXISTS (
                            SELECT FROM replicas WHERE id = %(succeeds)s AND phase = 'RUNNING'))
                   AND NOT EXISTS (
                            SELECT FROM replicas WHERE succeeds = %(succeeds)s AND phase = ANY (%(existing)s))
                   AND (SELECT count(*) FROM replicas r
                         WHERE r.replica_set = s.name AND r.phase = ANY (%(live)s))
                       < s.max_replicas + (s.spec->>'surge')::int
                RETURNING *
            ), history AS (
                INSERT INTO replica_history (replica_id, version, at, to_phase, actor)
                SELECT id, version, %(now)s, phase, %(actor)s FROM fresh
            )
            SELECT {_COLUMNS} FROM fresh
            """,
            {
                "set": replica_set.name,
                "spec_hash": replica_set.spec_hash,
                "port": port,
                "secret": secret,
                "actor": actor,
                "now": now,
                "succeeds": succeeds,
                "existing": list(EXISTING_PHASES),
                "live": list(LIVE_PHASES),
                "beside": list(beside),
            },
        )
        row = await cursor.fetchone()
    if row is None:
        raise Stale(f"{replica_set.name}: no further replica of this spec is wanted, or there is no room for one")
    return _replica(row)


async def _port_rests(connection: Connection, port: int, now: datetime) -> bool:
    """Did a replica with this port end lately, and nobody knows whether its process did?

    A node that failed, and a job that a list no longer knew, are no proof of death: the old process may go on to serve,
    on a node that a new job may be given as well.
    """
    cursor = await connection.execute(
        """
        SELECT FROM replicas r LEFT JOIN slurm_jobs j ON j.replica_id = r.id AND j.job_id = r.slurm_job_id
         WHERE r.port = %(port)s AND r.phase = 'ENDED' AND r.ended_at > %(since)s AND r.slurm_job_id IS NOT NULL
           AND (r.reason IN ('NODE_FAIL', 'LOST') OR j.state IN ('NODE_FAIL', 'BOOT_FAIL'))
        """,
        {"port": port, "since": now - PORT_REST},
    )
    return await cursor.fetchone() is not None


async def move(db: Database, step: Move, *, actor: str, now: datetime) -> Replica:
    """Take one step of the phase machine, if the replica still stands where the step was decided. Raises Stale."""
    replica = step.replica
    async with db.connection() as connection:
        cursor = await connection.execute(
            f"""
            WITH moved AS (
                UPDATE replicas
                   SET phase = %(to)s, version = version + 1, phase_since = %(now)s,
                       reason = CASE WHEN %(to)s IN ('DRAINING', 'STOPPING', 'ENDED')
                                     THEN coalesce(%(reason)s, reason) END,
                       message = coalesce(%(message)s, message),
                       slurm_job_id = CASE WHEN %(to)s = 'PENDING' THEN NULL
                                           ELSE coalesce(%(job_id)s, slurm_job_id) END,
                       submitted_at = CASE WHEN %(to)s = 'SUBMITTING' THEN %(now)s ELSE submitted_at END,
                       running_since = CASE WHEN %(to)s = 'QUEUED' THEN NULL
                                            ELSE coalesce(%(running_since)s, running_since) END,
                       drain_deadline = CASE WHEN %(to)s = 'RUNNING' THEN NULL
                                             ELSE coalesce(%(deadline)s, drain_deadline) END,
                       idle_since = NULL,
                       cut_requests = coalesce(%(cut)s, cut_requests),
                       ended_at = CASE WHEN %(to)s = 'ENDED' THEN %(now)s::timestamptz END
                 WHERE id = %(id)s AND phase = %(from)s AND version = %(version)s
                RETURNING *
            ), history AS (
                INSERT INTO replica_history
                       (replica_id, version, at, from_phase, to_phase, reason, message, slurm_job_id, actor)
                SELECT id, version, %(now)s, %(from)s, phase, reason, %(message)s, slurm_job_id, %(actor)s
                  FROM moved
            )
            SELECT {_COLUMNS} FROM moved
            """,
            {
                "id": replica.id,
                "from": replica.phase,
                "version": replica.version,
                "to": step.to,
                "reason": step.reason,
                "message": step.message[:1024] if step.message else None,
                "job_id": step.slurm_job_id,
                "running_since": step.running_since,
                "deadline": step.drain_deadline,
                "cut": step.cut_requests,
                "actor": actor,
                "now": now,
            },
        )
        row = await cursor.fetchone()
    if row is None:
        raise Stale(f"{replica.name} is no longer {replica.phase} at version {replica.version}")
    return _replica(row)


async def obey(
    db: Database,
    name: str,
    verb: Verb,
    *,
    actor: str,
    now: datetime,
    reason: str | None = None,
    dry_run: bool = False,
) -> Obeyed:
    """Do what an operator said to one replica, and wake the reconciler. May be repeated.

    Raises NotFound, VerbRefused; Stale when the replica moved on at every attempt.
    """
    for _ in range(_VERB_ATTEMPTS):
        replica = await load(db, name)
        step = interpret(verb, replica, actor=actor, now=now, reason=reason)
        if step is None:
            return Obeyed(replica, is_changed=False)
        if dry_run:
            return Obeyed(replace(replica, phase=step.to, reason=step.reason), is_changed=True)
        try:
            moved = await move(db, step, actor=actor, now=now)
        except Stale:
            continue
        await db.wake()
        return Obeyed(moved, is_changed=True)
    raise Stale(f"{name} moved on at every attempt; try again")


async def forget(db: Database, *, older_than: timedelta, now: datetime) -> int:
    """Delete the replicas that ended so long ago, with all that belongs to them; returns how many went."""
    async with db.connection() as connection:
        cursor = await connection.execute(
            "DELETE FROM replicas WHERE phase = 'ENDED' AND ended_at < %s", (now - older_than,)
        )
        return cursor.rowcount


async def mark_idle(db: Database, replica: Replica, since: datetime | None) -> None:
    """While draining: since when the endpoint's own metrics have said idle without a break; None: they do not."""
    async with db.connection() as connection:
        await connection.execute(
            "UPDATE replicas SET idle_since = %s WHERE id = %s AND version = %s", (since, replica.id, replica.version)
        )


async def load_history(
    db: Database, *, name: str | None = None, since: datetime | None = None, limit: int = 1000
) -> list[Step]:
    """The steps of one replica, or of all, oldest first; of those at or after `since` if given, the newest `limit`."""
    async with db.connection() as connection:
        cursor = await connection.execute(
            """
            SELECT r.name AS replica, h.at, h.from_phase, h.to_phase, h.reason, h.message, h.slurm_job_id, h.actor
              FROM replica_history h JOIN replicas r ON r.id = h.replica_id
             WHERE (%(name)s::text IS NULL OR r.name = %(name)s)
               AND (%(since)s::timestamptz IS NULL OR h.at >= %(since)s)
             ORDER BY h.at DESC, h.replica_id DESC, h.version DESC LIMIT %(limit)s
            """,
            {"name": name, "since": since, "limit": limit},
        )
        return [read_step(row) for row in reversed(await cursor.fetchall())]


def read_step(row: DictRow) -> Step:
    """A step from a row that has its fields."""
    return Step(
        **{
            **row,
            "from_phase": Phase(row["from_phase"]) if row["from_phase"] else None,
            "to_phase": Phase(row["to_phase"]),
            "reason": Reason(row["reason"]) if row["reason"] else None,
        }
    )


def _replica(row: DictRow) -> Replica:
    fields: dict[str, Any] = {
        **row,
        "phase": Phase(row["phase"]),
        "reason": Reason(row["reason"]) if row["reason"] else None,
        "spec": SPECS.validate_python(row["spec"]),
    }
    return Replica(**fields)
