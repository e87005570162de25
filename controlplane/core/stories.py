"""What is told of the past: decisions with their evidence, and what became of a replica, each with its time.

A story is what was known at one moment: later facts are not in it. No story holds a secret.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime

from controlplane.core.types import DecisionReason, JobState, Phase, Reason


@dataclass(frozen=True, slots=True)
class AlertThen:
    """An alert as it was at the moment that is told of; `key` as in `Alert`."""

    key: str
    alertname: str
    action: str | None
    starts_at: datetime
    summary: str = ""
    labels: Mapping[str, str] = field(default_factory=dict)
    values: Mapping[str, float] = field(default_factory=dict)
    rule_uid: str | None = None  # Grafana's
    generator_url: str | None = None  # where the rule is shown
    ignored_reason: str | None = None


@dataclass(frozen=True, slots=True)
class RecordedDecision:
    id: int
    at: datetime
    replica_set: str
    reason: DecisionReason
    previous: int
    desired: int
    explanation: str
    alerts: tuple[str, ...]  # keys of those that pressed
    actor: str
    evidence: tuple[AlertThen, ...] = ()  # the same, as they were; fewer where none was kept

    @property
    def changes_desired(self) -> bool:
        return self.desired != self.previous

    @property
    def is_refusal(self) -> bool:
        """Did alerts press, and were not followed? The reason says why."""
        return bool(self.alerts) and not self.changes_desired


@dataclass(frozen=True, slots=True)
class Step:
    """One row of a replica's history."""

    replica: str
    at: datetime
    from_phase: Phase | None
    to_phase: Phase
    reason: Reason | None
    message: str | None
    slurm_job_id: int | None
    actor: str


@dataclass(frozen=True, slots=True)
class JobStep:
    """What Slurm said of a replica's job, when it said something new."""

    at: datetime
    job_id: int
    state: JobState
    raw_state: str
    state_reason: str
    is_held: bool
    nodes: str
    restart_count: int


@dataclass(frozen=True, slots=True)
class HealthStep:
    """What probes found at a replica's endpoint, when it was something new."""

    at: datetime
    health: str
    url: str
    message: str | None


@dataclass(frozen=True, slots=True)
class ReplicaStory:
    """One replica, from the alert that asked for it to its end, as far as `at`. `steps` has at least its creation."""

    name: str
    replica_set: str
    at: datetime
    steps: tuple[Step, ...]
    decision: RecordedDecision | None = None  # that it was made for; None: made before that was kept
    refused: tuple[RecordedDecision, ...] = ()  # what was refused before that decision
    replaces: str | None = None  # the replica that it was made in the place of
    replaced_left: Reason | None = None  # why that one left
    replaced_by: str | None = None
    named_by: tuple[AlertThen, ...] = ()  # alerts that asked to replace it
    jobs: tuple[JobStep, ...] = ()
    health: tuple[HealthStep, ...] = ()

    @property
    def newest(self) -> Step:
        return self.steps[-1]

    @property
    def job(self) -> JobStep | None:
        """The newest of its own job; not of a twin that bore its name."""
        own = [one for one in self.jobs if one.job_id == self.slurm_job_id]
        return own[-1] if own else None

    @property
    def slurm_job_id(self) -> int | None:
        return self.newest.slurm_job_id


@dataclass(frozen=True, slots=True)
class SetStory:
    """Why a replica set has as many replicas as it has, at `at`. `bounds` and `is_paused` are known of now only."""

    name: str
    model: str
    at: datetime
    is_now: bool
    bounds: tuple[int, int] | None = None
    is_paused: bool | None = None
    decision: RecordedDecision | None = None  # in force
    changed: RecordedDecision | None = None  # that changed the count last
    refused: tuple[RecordedDecision, ...] = ()  # since then
    alerts: tuple[AlertThen, ...] = ()  # that fired
    replicas: tuple[ReplicaStory, ...] = ()  # that had not ended
    endpoints: tuple[HealthStep, ...] = ()  # fixed ones, which Slurm does not run: what was found newest at each
    ended: tuple[ReplicaStory, ...] = ()  # the newest of those that had, newest first

    def pressed(self, alert: AlertThen) -> bool:
        """Is it one that the decision in force was taken because of?"""
        return self.decision is not None and alert.key in self.decision.alerts
