"""Replicas with a past, from an alert to the job's end, as the loops would write it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime, timedelta
from typing import Any

from controlplane.core.types import (
    Alert,
    AlertAction,
    Decision,
    DecisionReason,
    Health,
    JobState,
    Move,
    Phase,
    Reason,
    Replica,
    SlurmJob,
)
from controlplane.db import Database, alerts, endpoints, replica_sets, replicas, slurm_jobs
from tests.integration.db_rows import NOW, make_set, to

PAYLOAD = {
    "labels": {"alertname": "Requests queue", "action": "scale_up", "model": "m"},
    "annotations": {"summary": "m: 22 requests wait"},
    "values": {"A": 22, "B": None},
    "generatorURL": "http://grafana.example/alerting/grafana/queue-rule/view?orgId=1",
    "silenceURL": "http://grafana.example/alerting/silence/new",
}
QUEUE = Alert(
    source="grafana",
    org_id=1,
    fingerprint="f1",
    alertname="Requests queue",
    is_firing=True,
    starts_at=NOW,
    ends_at=None,
    refreshed_at=NOW,
    labels=PAYLOAD["labels"],  # type: ignore[arg-type]
    annotations=PAYLOAD["annotations"],  # type: ignore[arg-type]
    values={"A": 22.0},
    action=AlertAction.SCALE_UP,
)
SECRET = "x" * 32


def after(seconds: float) -> datetime:
    return NOW + timedelta(seconds=seconds)


async def fires(db: Database, at: datetime, **changes: Any) -> Alert:
    alert = replace(QUEUE, refreshed_at=at, **changes)
    await alerts.store(db, [(alert, PAYLOAD)], now=at)
    return alert


async def decided(
    db: Database, at: datetime, reason: DecisionReason, previous: int, desired: int, *alerts: Alert
) -> None:
    keys_of = tuple(alert.key for alert in alerts)
    decision = Decision("a", desired, previous, reason, f"{reason} for a test", keys_of)
    await replica_sets.decide(db, decision, actor="reconciler", now=at)


async def made(
    db: Database, at: datetime, port: int, *, beside: Sequence[str] = (), succeeds: int | None = None
) -> Replica:
    return await replicas.create(
        db,
        await replica_sets.load(db, "a"),
        port=port,
        secret=SECRET,
        actor="reconciler",
        now=at,
        beside=beside,
        succeeds=succeeds,
    )


async def walked(db: Database, replica: Replica, *steps: Move | Phase, at: datetime) -> Replica:
    for number, step in enumerate(steps):
        move = replace(step, replica=replica) if isinstance(step, Move) else to(replica, step)
        replica = await replicas.move(db, move, actor="reconciler", now=at + timedelta(seconds=number))
    return replica


def job(replica: Replica, state: JobState, **changes: Any) -> SlurmJob:
    assert replica.slurm_job_id is not None
    return SlurmJob(replica.slurm_job_id, replica.name, "llm", state, raw_state=str(state), **changes)


def crashed(replica: Replica) -> Move:
    return Move(replica, Phase.ENDED, Reason.CRASHED, "job ended FAILED, exit code 1")


async def whole_life(db: Database) -> Replica:
    """An alert, a refusal, a decision, a replica that waits, runs, serves, drains and ends."""
    await make_set(db)
    alert = await fires(db, after(1))
    await decided(db, after(2), DecisionReason.COOLDOWN, 0, 0, alert)
    await decided(db, after(5), DecisionReason.SCALED_UP, 0, 1, alert)
    replica = await made(db, after(5), 20001)
    replica = await walked(db, replica, Phase.SUBMITTING, Phase.QUEUED, at=after(6))
    await slurm_jobs.record(db, [(replica.id, job(replica, JobState.PENDING, is_held=True))], after(8))
    waiting = job(replica, JobState.PENDING, state_reason="Priority")
    await slurm_jobs.record(db, [(replica.id, waiting)], after(10))
    await slurm_jobs.record(db, [(replica.id, waiting)], after(15))
    replica = await walked(db, replica, Phase.RUNNING, at=after(20))
    await slurm_jobs.record(db, [(replica.id, job(replica, JobState.RUNNING, nodes="n1"))], after(20))
    await endpoints.ensure(db, replica, "http://n1:20001")
    [seen] = await endpoints.load_live(db)
    ready = replace(seen, health=Health.READY, probed_at=after(30), confirmed_at=after(30), first_ready_at=after(30))
    await endpoints.save(db, ready, seen=seen)
    await endpoints.save(db, replace(ready, probed_at=after(35)), seen=seen)
    await fires(db, after(40), is_firing=False, ends_at=after(39))
    await decided(db, after(50), DecisionReason.SCALED_DOWN, 1, 0)
    return await walked(db, replica, Phase.DRAINING, Phase.STOPPING, Phase.ENDED, at=after(50))
