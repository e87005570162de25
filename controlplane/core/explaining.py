"""Stories in words: one sentence for each "why", and the events in the order in which they happened."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum

from controlplane.core.pending import explain
from controlplane.core.stories import AlertThen, HealthStep, JobStep, RecordedDecision, ReplicaStory, SetStory, Step
from controlplane.core.types import JobState, Phase

NOTHING_KEPT = "what it was made for was not kept"


class Kind(StrEnum):
    """What an event is of; in the order of the chain, for those that happened at the same time."""

    ALERT = "alert"
    REFUSED = "refused"
    DECISION = "decision"
    REPLICA = "replica"
    JOB = "job"
    ENDPOINT = "endpoint"
    DRAIN = "drain"
    END = "end"


_ORDER = list(Kind)


@dataclass(frozen=True, slots=True)
class Event:
    at: datetime
    kind: Kind
    words: str
    actor: str | None = None  # of decisions and steps


@dataclass(frozen=True, slots=True)
class Pending:
    """Why Slurm lets a job wait, in its own words and in ours; since when it has waited."""

    state_reason: str
    since: datetime
    meaning: str
    remedy: str


# --- one replica -----------------------------------------------------------------------------------------


def made_because(story: ReplicaStory) -> str:
    """Why the replica was made."""
    if story.replaces is not None:
        why = f", which left {story.replaced_left}" if story.replaced_left is not None else ""
        return f"it takes the place of {story.replaces}{why}"
    return NOTHING_KEPT if story.decision is None else decision_words(story.decision)


def is_so_because(story: ReplicaStory) -> str:
    """Why the replica is in its phase."""
    step, job, waits = story.newest, story.job, pending(story)
    said = f": {step.message}" if step.message else ""
    match step.to_phase:
        case Phase.PENDING:
            return f"nothing was asked of Slurm yet{said}"
        case Phase.SUBMITTING:
            return "the answer to its submit is not known yet"
        case Phase.QUEUED if waits is not None:
            return f"Slurm lets job {story.slurm_job_id} wait, {waits.state_reason}: {waits.meaning}"
        case Phase.QUEUED:
            return f"job {story.slurm_job_id} has not started yet"
        case Phase.RUNNING:
            where = f" on {job.nodes}" if job is not None and job.nodes else ""
            return f"job {story.slurm_job_id} runs{where}; {_endpoint_state(story)}"
        case Phase.ENDED:
            return f"ended {step.reason}{said}"
        case _:
            return f"leaves, {step.reason}{said}"


def _endpoint_state(story: ReplicaStory) -> str:
    if not story.health:
        return "no endpoint is known yet"
    newest = story.health[-1]
    match newest.health:
        case "READY":
            return "its endpoint is ready"
        case "FAILING":
            return "its endpoint fails" + (f": {newest.message}" if newest.message else "")
        case _:
            return "its endpoint has not passed a probe yet"


def pending(story: ReplicaStory) -> Pending | None:
    """What a queued replica waits for; None where its job does not wait, or was not seen yet."""
    if story.newest.to_phase is not Phase.QUEUED or (job := story.job) is None or job.state is not JobState.PENDING:
        return None
    since = job.at
    for one in reversed([one for one in story.jobs if one.job_id == job.job_id]):
        if one.state is not JobState.PENDING:
            break
        since = one.at
    waiting = explain(job.state_reason)
    remedy = waiting.remedy_for(story.replica_set, job.job_id)
    return Pending(job.state_reason or "None", since, waiting.meaning, remedy)


def timeline(story: ReplicaStory) -> tuple[Event, ...]:
    """The chain: alert, decision, replica, job, endpoint, drain, end; by time."""
    events = [*_causes(story), _birth(story), *map(_step_event, story.steps[1:]), *map(_job_event, story.jobs)]
    events += [Event(one.at, Kind.ENDPOINT, health_words(one)) for one in story.health]
    events += [Event(one.starts_at, Kind.ALERT, alert_words(one)) for one in story.named_by]
    return tuple(sorted(events, key=lambda event: (event.at, _ORDER.index(event.kind))))


def _causes(story: ReplicaStory) -> Iterator[Event]:
    if story.decision is None:
        return
    for alert in story.decision.evidence:
        yield Event(alert.starts_at, Kind.ALERT, alert_words(alert))
    for refused in story.refused:
        yield Event(refused.at, Kind.REFUSED, f"because {refused.reason}: {refused.explanation}", refused.actor)
    yield Event(story.decision.at, Kind.DECISION, decision_words(story.decision), story.decision.actor)


def _birth(story: ReplicaStory) -> Event:
    place = f" in the place of {story.replaces}" if story.replaces is not None else ""
    return Event(story.steps[0].at, Kind.REPLICA, f"{story.name} made{place}", story.steps[0].actor)


def _step_event(step: Step) -> Event:
    kind = {Phase.DRAINING: Kind.DRAIN, Phase.STOPPING: Kind.DRAIN, Phase.ENDED: Kind.END}.get(
        step.to_phase, Kind.REPLICA
    )
    words = str(step.to_phase)
    if step.to_phase is Phase.QUEUED and step.slurm_job_id is not None:
        words += f" as job {step.slurm_job_id}"
    if step.reason is not None:
        words += f", {step.reason}"
    return Event(step.at, kind, f"{words}: {step.message}" if step.message else words, step.actor)


def _job_event(job: JobStep) -> Event:
    words = f"job {job.job_id} {job.raw_state}"
    if job.is_held:
        words += ", held"
    if job.nodes and job.state is not JobState.PENDING:
        words += f" on {job.nodes}"
    if job.restart_count:
        words += f", restarted {job.restart_count} times"
    return Event(job.at, Kind.JOB, words if job.state_reason in ("", "None") else f"{words}: {job.state_reason}")


def health_words(one: HealthStep) -> str:
    return f"{one.health} at {one.url}" + (f": {one.message}" if one.message else "")


# --- one replica set -------------------------------------------------------------------------------------


def wanted_because(story: SetStory) -> str:
    """Why as many are wanted as are."""
    if story.changed is not None:
        return decision_words(story.changed)
    return "the count was never changed" if story.decision is not None else "nothing was decided yet"


def stays_because(story: SetStory) -> str:
    """What the decision in force says; of alerts that were not followed: why."""
    if story.decision is None:
        return "nothing was decided yet"
    refused = "refused because " if story.decision.is_refusal else ""
    return f"{refused}{story.decision.reason}: {story.decision.explanation}"


def decision_words(decision: RecordedDecision) -> str:
    count = f"{decision.previous} -> {decision.desired}" if decision.changes_desired else f"{decision.desired} wanted"
    return f"{decision.reason}, {count}: {decision.explanation}"


def alert_words(alert: AlertThen) -> str:
    """The alert, its rule and its values."""
    words = f"{alert.alertname} ({alert.action or 'no action'})"
    if alert.summary:
        words += f": {alert.summary}"
    if alert.values:
        words += "; " + ", ".join(f"{name} = {value:g}" for name, value in sorted(alert.values.items()))
    if alert.rule_uid:
        words += f"; rule {alert.rule_uid}"
    return f"{words}; ignored: {alert.ignored_reason}" if alert.ignored_reason else words
