"""Builders for the core's nouns: each gives a plausible whole, of which a test names only what it is about.

What the schema demands of a phase (a job id, a deadline, a reason) is filled in, so that no test lives in a world that
the database would refuse. Replicas are of the replica set `s`, named `cp-s-<id>`; the job of replica `n` is `100 + n`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

from controlplane.core.planning import Scene
from controlplane.core.specs import spec_hash
from controlplane.core.types import (
    Alert,
    AlertAction,
    Endpoint,
    Health,
    JobList,
    JobState,
    PastReplica,
    Phase,
    Reason,
    Replica,
    ReplicaSet,
    ReplicaSetSpec,
    SlurmJob,
    SlurmResources,
    VllmOptions,
)

NOW = datetime(2026, 1, 1, 12, 0, tzinfo=UTC)

_WITH_A_JOB = frozenset({Phase.QUEUED, Phase.RUNNING, Phase.DRAINING, Phase.STOPPING})
_LEAVING = frozenset({Phase.DRAINING, Phase.STOPPING, Phase.ENDED})


def ago(seconds: float) -> datetime:
    return NOW - timedelta(seconds=seconds)


def a_spec(name: str = "s", *, image: str = "one.sif", **changes: Any) -> ReplicaSetSpec:
    """Up to 4 replicas, surge 1. Another `image` is another hash."""
    whole = ReplicaSetSpec(
        name=name,
        model="m",
        template="vllm-apptainer",
        max_replicas=4,
        slurm=SlurmResources(time_limit_seconds=3600),
        vllm=VllmOptions(image=image),
        start_timeout_seconds=600,
        drain_timeout_seconds=300,
        unhealthy_timeout_seconds=120,
    )
    return replace(whole, **changes)


def a_set(desired: int = 1, *, spec: ReplicaSetSpec | None = None, **changes: Any) -> ReplicaSet:
    """A set with the spec's own bounds in force."""
    spec = spec or a_spec()
    whole = ReplicaSet(spec, desired, spec_hash(spec), spec.min_replicas, spec.max_replicas)
    return replace(whole, **changes)


def a_replica(number: int, phase: Phase, *, spec: ReplicaSetSpec | None = None, **changes: Any) -> Replica:
    """A replica that has been in its phase for a minute."""
    spec = spec or a_spec()
    whole = Replica(
        id=number,
        name=f"cp-{spec.name}-{number}",
        replica_set=spec.name,
        phase=phase,
        version=3,
        spec=spec,
        spec_hash=spec_hash(spec),
        port=20000 + number,
        secret="x" * 32,
        created_at=ago(1000 - number),
        phase_since=ago(60),
        reason=Reason.SCALED_DOWN if phase in _LEAVING else None,
        slurm_job_id=100 + number if phase in _WITH_A_JOB else None,
        submitted_at=None if phase is Phase.PENDING else ago(60),
        running_since=ago(60) if phase in (Phase.RUNNING, Phase.DRAINING) else None,
        drain_deadline=ago(60) + timedelta(seconds=spec.drain_timeout_seconds) if phase is Phase.DRAINING else None,
    )
    return replace(whole, **changes)


def a_job(replica: Replica, state: JobState, **changes: Any) -> SlurmJob:
    """The replica's own job; held by nobody."""
    whole = SlurmJob(job_id=100 + replica.id, name=replica.name, user_name="us", state=state, raw_state=str(state))
    return replace(whole, **changes)


def listed(*jobs: SlurmJob, asked_at: datetime = NOW) -> JobList:
    return JobList(jobs, asked_at)


def an_endpoint(replica: Replica, health: Health = Health.READY, **changes: Any) -> Endpoint:
    """READY: confirmed a second ago, and idle. FAILING and UNPROVEN: since ten seconds."""
    was_ready = health is not Health.UNPROVEN
    whole = Endpoint(
        id=replica.id,
        replica_set=replica.replica_set,
        model=replica.spec.model,
        url=f"http://n1:{replica.port}",
        api_key=replica.secret,
        replica=replica.name,
        is_draining=replica.phase is Phase.DRAINING,
        health=health,
        first_ready_at=ago(50) if was_ready else None,
        fails=0 if health is Health.READY else 3,
        failing_since=None if health is Health.READY else ago(10),
        confirmed_at=ago(1) if health is Health.READY else ago(10) if was_ready else None,
        probed_at=ago(0),
        running=0 if health is Health.READY else None,
        waiting=0 if health is Health.READY else None,
    )
    return replace(whole, **changes)


def a_scene(
    replica_set: ReplicaSet,
    replicas: Iterable[Replica],
    endpoints: Iterable[Endpoint] = (),
    *,
    past: Iterable[PastReplica] = (),
    ends_at: dict[str, datetime] | None = None,
    to_replace: Iterable[str] = (),
) -> Scene:
    """A running replica of which nothing is said serves."""
    replicas = tuple(replicas)
    said = {one.replica: one for one in endpoints}
    serving = {one.name: an_endpoint(one) for one in replicas if one.phase in (Phase.RUNNING, Phase.DRAINING)}
    return Scene(
        replica_set=replica_set,
        replicas=replicas,
        endpoints=serving | {name: one for name, one in said.items() if name is not None},
        past=tuple(past),
        ends_at=ends_at or {},
        to_replace=frozenset(to_replace),
    )


def a_past(
    reason: Reason, ended_at: datetime, *, spec: ReplicaSetSpec | None = None, was_ready: bool = False
) -> PastReplica:
    return PastReplica("cp-s-0", "s", spec_hash(spec or a_spec()), reason, "it said why", ended_at, was_ready)


def an_alert(action: AlertAction | None, fingerprint: str = "f", **changes: Any) -> Alert:
    """Firing for a minute, confirmed ten seconds ago, meant for the model `m`."""
    whole = Alert(
        source="grafana",
        org_id=1,
        fingerprint=fingerprint,
        alertname="QueueGrows",
        is_firing=True,
        starts_at=ago(60),
        ends_at=None,
        refreshed_at=ago(10),
        labels={"model": "m"},
        action=action,
    )
    return replace(whole, **changes)
