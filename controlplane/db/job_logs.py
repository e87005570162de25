"""The ends of the logs of jobs that ended unasked: read once, kept with the replica."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime

from controlplane.core.types import Reason
from controlplane.db.pool import Database

UNASKED = (
    Reason.CRASHED,
    Reason.START_TIMEOUT,
    Reason.UNHEALTHY,
    Reason.NODE_FAIL,
    Reason.PREEMPTED,
    Reason.LOST,
    Reason.CANCELLED_OUTSIDE,
)
"""The reasons for which a log is worth reading: nobody wanted the job to end."""


@dataclass(frozen=True, slots=True)
class JobLog:
    """Either the end of the log, or why there is none."""

    read_at: datetime
    tail: str | None
    problem: str | None


@dataclass(frozen=True, slots=True)
class UnreadLog:
    """A job that ended unasked, and what must not be shown of its log."""

    replica_id: int
    replica: str
    model: str
    slurm_job_id: int
    ended_at: datetime
    secrets: tuple[str, ...]


async def load(db: Database, replicas: Iterable[str]) -> dict[str, JobLog]:
    """What is known of the logs of these replicas, by name."""
    async with db.connection() as connection:
        cursor = await connection.execute(
            "SELECT r.name, l.read_at, l.tail, l.problem FROM job_logs l JOIN replicas r ON r.id = l.replica_id "
            "WHERE r.name = ANY (%s)",
            (list(replicas),),
        )
        return {row["name"]: JobLog(row["read_at"], row["tail"], row["problem"]) for row in await cursor.fetchall()}


async def load_unread(db: Database, since: datetime, *, limit: int = 20) -> list[UnreadLog]:
    """Jobs that ended unasked at or after `since` and whose log was not read yet, oldest first."""
    async with db.connection() as connection:
        cursor = await connection.execute(
            """
            SELECT r.id AS replica_id, r.name AS replica, coalesce(r.spec->>'model', s.model) AS model,
                   r.slurm_job_id, r.ended_at, r.secret,
                   ARRAY(SELECT value FROM jsonb_each_text(r.spec->'vllm'->'environment')) AS environment
              FROM replicas r JOIN replica_sets s ON s.name = r.replica_set
             WHERE r.phase = 'ENDED' AND r.ended_at >= %s AND r.slurm_job_id IS NOT NULL AND r.reason = ANY (%s)
               AND NOT EXISTS (SELECT FROM job_logs l WHERE l.replica_id = r.id)
             ORDER BY r.ended_at, r.id LIMIT %s
            """,
            (since, list(UNASKED), limit),
        )
        return [
            UnreadLog(
                row["replica_id"],
                row["replica"],
                row["model"],
                row["slurm_job_id"],
                row["ended_at"],
                (row["secret"], *row["environment"]),
            )
            for row in await cursor.fetchall()
        ]


async def save(db: Database, replica_id: int, log: JobLog) -> None:
    """Keep it, unless another control plane has."""
    async with db.connection() as connection:
        await connection.execute(
            "INSERT INTO job_logs (replica_id, read_at, tail, problem) SELECT id, %s, %s, %s FROM replicas "
            "WHERE id = %s ON CONFLICT (replica_id) DO NOTHING",
            (log.read_at, log.tail, log.problem, replica_id),
        )
