"""What Slurm said of the jobs that were submitted for replicas: the newest observation of each job."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime

from controlplane.core.types import SlurmJob
from controlplane.db.pool import Database


@dataclass(frozen=True, slots=True)
class PendingJob:
    """A live replica's job that Slurm lets wait, since when, and why, in Slurm's words."""

    replica: str
    replica_set: str
    job_id: int
    state_reason: str
    since: datetime


async def record(db: Database, seen: Iterable[tuple[int, SlurmJob]], now: datetime) -> None:
    """Keep one observation per (replica id, job). May be repeated; only what changed is written."""
    rows = [
        {
            "replica_id": replica_id,
            "job_id": job.job_id,
            "state": job.state,
            "raw_state": job.raw_state or job.state,
            "state_reason": job.state_reason,
            "is_held": job.is_held,
            "nodes": job.nodes,
            "submitted_at": job.submitted_at,
            "started_at": job.started_at,
            "ends_at": job.ends_at,
            "exit_code": job.exit_code,
            "signal": job.signal,
            "restart_count": job.restart_count,
            "observed_at": now,
        }
        for replica_id, job in seen
    ]
    if not rows:
        return
    names = list(rows[0])
    changing = [name for name in names if name not in ("replica_id", "job_id")]
    async with db.connection() as connection, connection.pipeline():
        cursor = connection.cursor()
        await cursor.executemany(
            f"INSERT INTO slurm_jobs AS j ({', '.join(names)}) "
            f"VALUES ({', '.join(f'%({name})s' for name in names)}) "
            "ON CONFLICT (replica_id, job_id) DO UPDATE "
            f"SET {', '.join(f'{name} = excluded.{name}' for name in changing)} "
            "WHERE j.observed_at <= excluded.observed_at",
            rows,
        )


async def load_ends(db: Database) -> dict[str, datetime]:
    """When the walltimes of live replicas' jobs end, by replica name, as far as Slurm has ever told."""
    async with db.connection() as connection:
        cursor = await connection.execute(
            "SELECT r.name, j.ends_at "
            "FROM slurm_jobs j JOIN replicas r ON r.id = j.replica_id AND r.slurm_job_id = j.job_id "
            "WHERE r.phase <> 'ENDED' AND j.ends_at IS NOT NULL AND j.state <> 'COMPLETING'"
        )
        return {row["name"]: row["ends_at"] for row in await cursor.fetchall()}


async def load_nodes(db: Database) -> dict[str, str]:
    """Where live replicas' jobs ran when Slurm last told, by replica name, as Slurm writes it."""
    async with db.connection() as connection:
        cursor = await connection.execute(
            "SELECT r.name, j.nodes "
            "FROM slurm_jobs j JOIN replicas r ON r.id = j.replica_id AND r.slurm_job_id = j.job_id "
            "WHERE r.phase <> 'ENDED' AND j.nodes <> ''"
        )
        return {row["name"]: row["nodes"] for row in await cursor.fetchall()}


async def load_pending(db: Database) -> list[PendingJob]:
    async with db.connection() as connection:
        cursor = await connection.execute(
            "SELECT r.name AS replica, r.replica_set, j.job_id, j.state_reason, "
            "coalesce(j.submitted_at, r.submitted_at, r.created_at) AS since "
            "FROM slurm_jobs j JOIN replicas r ON r.id = j.replica_id AND r.slurm_job_id = j.job_id "
            "WHERE r.phase <> 'ENDED' AND j.state = 'PENDING' ORDER BY r.id"
        )
        return [PendingJob(**row) for row in await cursor.fetchall()]


async def instance_id(db: Database) -> str:
    """Names this installation in its jobs' comments, so that two under one Slurm user leave each other alone."""
    async with db.connection() as connection:
        row = await (await connection.execute("SELECT instance_id FROM installation")).fetchone()
    assert row is not None
    return str(row["instance_id"])
