"""Rows that tests of the database start from, made through the database room's own functions."""

from __future__ import annotations

import itertools
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from typing import Any

from controlplane.core.types import (
    Endpoint,
    Health,
    JobState,
    Move,
    Phase,
    Reason,
    Replica,
    ReplicaSet,
    ReplicaSetSpec,
    SlurmJob,
    SlurmResources,
)
from controlplane.db import Database, DatabaseOptions, endpoints, replica_sets, replicas, slurm_jobs

NOW = datetime(2026, 1, 1, 12, tzinfo=UTC)
_ports = itertools.count(20000)


@asynccontextmanager
async def opened(url: str) -> AsyncIterator[Database]:
    async with Database(DatabaseOptions(url=url, timeout_seconds=10)) as db:
        yield db


def slurm_spec(name: str = "a", **changes: Any) -> ReplicaSetSpec:
    defaults: dict[str, Any] = {
        "model": "m",
        "template": "fake-vllm",
        "max_replicas": 4,
        "slurm": SlurmResources(time_limit_seconds=3600),
    }
    return ReplicaSetSpec(name=name, **{**defaults, **changes})


async def make_set(db: Database, name: str = "a", **changes: Any) -> ReplicaSet:
    await replica_sets.apply(db, slurm_spec(name, **changes), actor="test", now=NOW)
    return await replica_sets.load(db, name)


async def make_replica(db: Database, replica_set: ReplicaSet, phase: Phase = Phase.PENDING) -> Replica:
    """A replica that is wanted, and has walked to this phase, step by step."""
    wanted = replica_set.max_replicas
    await replica_sets.scale(db, replica_set.name, replicas=wanted, actor="test", now=NOW)
    replica = await replicas.create(db, replica_set, port=next(_ports), secret="x" * 32, actor="test", now=NOW)
    for step in (Phase.SUBMITTING, Phase.QUEUED, Phase.RUNNING, Phase.DRAINING, Phase.STOPPING, Phase.ENDED):
        if replica.phase is phase:
            break
        replica = await replicas.move(db, to(replica, step), actor="test", now=NOW)
    return replica


def to(replica: Replica, phase: Phase) -> Move:
    """The ordinary step to this phase."""
    return Move(
        replica,
        phase,
        reason=Reason.SCALED_DOWN if phase in (Phase.DRAINING, Phase.STOPPING, Phase.ENDED) else None,
        slurm_job_id=1000 + replica.id if phase is Phase.QUEUED else None,
        running_since=NOW if phase is Phase.RUNNING else None,
        drain_deadline=NOW + timedelta(minutes=10) if phase is Phase.DRAINING else None,
    )


async def observe(db: Database, replica: Replica, state: JobState, **changes: Any) -> None:
    """What Slurm says of the replica's job."""
    assert replica.slurm_job_id is not None
    told = {"nodes": "n1", "submitted_at": NOW, **changes}
    job = SlurmJob(replica.slurm_job_id, replica.name, "u", state, **told)
    await slurm_jobs.record(db, [(replica.id, job)], NOW)


async def make_ready(
    db: Database, replica: Replica, url: str, *, at: datetime = NOW, ends_at: datetime | None = None
) -> None:
    """The running replica has passed its probe, at this time."""
    await observe(db, replica, JobState.RUNNING, ends_at=ends_at)
    await endpoints.ensure(db, replica, url)
    (seen,) = [one for one in await endpoints.load_live(db) if one.replica == replica.name]
    ready = Endpoint(
        seen.id,
        seen.replica_set,
        seen.model,
        seen.url,
        seen.api_key,
        health=Health.READY,
        first_ready_at=at,
        confirmed_at=at,
    )
    await endpoints.save(db, ready, seen=seen)
