"""Stories in words: every phase says why, and the chain is told in its order."""

from __future__ import annotations

from dataclasses import replace
from datetime import datetime, timedelta

import pytest

from controlplane.core.explaining import (
    NOTHING_KEPT,
    Kind,
    is_so_because,
    made_because,
    pending,
    stays_because,
    timeline,
    wanted_because,
)
from controlplane.core.stories import AlertThen, HealthStep, JobStep, RecordedDecision, ReplicaStory, SetStory, Step
from controlplane.core.types import DecisionReason, JobState, Phase, Reason
from tests.unit.worlds import NOW

ALERT = AlertThen("grafana/1/f", "Requests queue", "scale_up", NOW, "22 wait", values={"B": 1.5, "A": 22.0})


def after(seconds: float) -> datetime:
    return NOW + timedelta(seconds=seconds)


def decision(number: int, reason: DecisionReason, previous: int, desired: int, *alerts: AlertThen) -> RecordedDecision:
    keys = tuple(alert.key for alert in alerts)
    return RecordedDecision(number, after(number), "s", reason, previous, desired, "so", keys, "reconciler", alerts)


def step(to: Phase, seconds: float = 0, *, reason: Reason | None = None, message: str | None = None) -> Step:
    job_id = None if to in (Phase.PENDING, Phase.SUBMITTING) else 101
    return Step("cp-s-1", after(seconds), Phase.PENDING, to, reason, message, job_id, "reconciler")


def job(state: JobState, seconds: float = 0, *, reason: str = "", nodes: str = "", job_id: int = 101) -> JobStep:
    return JobStep(after(seconds), job_id, state, str(state), reason, False, nodes, 0)


def health(word: str, message: str | None = None) -> HealthStep:
    return HealthStep(after(9), word, "http://n1:1", message)


def story(*steps: Step, jobs: tuple[JobStep, ...] = (), health: tuple[HealthStep, ...] = ()) -> ReplicaStory:
    return ReplicaStory("cp-s-1", "s", after(60), (step(Phase.PENDING), *steps), jobs=jobs, health=health)


RUNS = (job(JobState.RUNNING, nodes="n1"),)


@pytest.mark.parametrize(
    ("told", "words"),
    [
        (story(), "nothing was asked of Slurm yet"),
        (story(step(Phase.PENDING, message="not submitted: no")), "nothing was asked of Slurm yet: not submitted: no"),
        (story(step(Phase.SUBMITTING)), "the answer to its submit is not known yet"),
        (story(step(Phase.QUEUED)), "job 101 has not started yet"),
        (
            story(step(Phase.QUEUED), jobs=(job(JobState.PENDING, reason="Licenses"),)),
            "Slurm lets job 101 wait, Licenses: Licences that it needs are in use.",
        ),
        (
            story(step(Phase.QUEUED), jobs=(job(JobState.PENDING, reason="OfTomorrow"),)),
            "Slurm lets job 101 wait, OfTomorrow: Slurm gives a reason that is not known here.",
        ),
        (story(step(Phase.QUEUED), jobs=RUNS), "job 101 has not started yet"),
        (story(step(Phase.RUNNING)), "job 101 runs; no endpoint is known yet"),
        (
            story(step(Phase.RUNNING), jobs=RUNS, health=(health("UNPROVEN"),)),
            "job 101 runs on n1; its endpoint has not passed a probe yet",
        ),
        (
            story(step(Phase.RUNNING), jobs=RUNS, health=(health("READY"),)),
            "job 101 runs on n1; its endpoint is ready",
        ),
        (
            story(step(Phase.RUNNING), jobs=RUNS, health=(health("READY"), health("FAILING", "no token"))),
            "job 101 runs on n1; its endpoint fails: no token",
        ),
        (story(step(Phase.DRAINING, reason=Reason.REPLACED)), "leaves, REPLACED"),
        (
            story(step(Phase.STOPPING, reason=Reason.SCALED_DOWN, message="drained: no request was left")),
            "leaves, SCALED_DOWN: drained: no request was left",
        ),
        (story(step(Phase.ENDED, reason=Reason.CRASHED, message="exit code 1")), "ended CRASHED: exit code 1"),
    ],
)
def test_every_phase_says_why(told: ReplicaStory, words: str) -> None:
    assert is_so_because(told) == words


def test_a_wait_began_when_it_began_and_not_when_its_reason_changed() -> None:
    waits = pending(
        story(
            step(Phase.QUEUED),
            jobs=(
                job(JobState.PENDING, 1),
                job(JobState.RUNNING, 2),
                job(JobState.PENDING, 3, reason="BeginTime"),
                job(JobState.PENDING, 4, reason="Resources"),
            ),
        )
    )
    assert waits is not None
    assert (waits.state_reason, waits.since) == ("Resources", after(3))


def test_a_twin_is_not_taken_for_the_replicas_job() -> None:
    told = story(step(Phase.QUEUED), jobs=(job(JobState.PENDING, 1, job_id=100), job(JobState.PENDING, 2)))
    assert told.job == told.jobs[1]
    assert story(step(Phase.QUEUED), jobs=(job(JobState.PENDING, 1, job_id=100),)).job is None


def test_why_a_replica_was_made() -> None:
    made = replace(story(), decision=decision(4, DecisionReason.SCALED_UP, 1, 2, ALERT))
    assert made_because(story()) == NOTHING_KEPT
    assert made_because(made) == "SCALED_UP, 1 -> 2: so"
    assert made_because(replace(made, replaces="cp-s-0")) == "it takes the place of cp-s-0"
    crashed = replace(made, replaces="cp-s-0", replaced_left=Reason.CRASHED)
    assert made_because(crashed) == "it takes the place of cp-s-0, which left CRASHED"
    birth = next(event for event in timeline(crashed) if event.kind is Kind.REPLICA)
    assert birth.words == "cp-s-1 made in the place of cp-s-0"


def test_what_happened_at_once_is_told_in_the_order_of_the_chain() -> None:
    told = replace(
        story(step(Phase.QUEUED), step(Phase.DRAINING), step(Phase.ENDED), jobs=(job(JobState.PENDING),)),
        decision=replace(decision(1, DecisionReason.SCALED_UP, 0, 1, ALERT), at=NOW),
        refused=(replace(decision(0, DecisionReason.AT_MAX, 0, 0, ALERT), at=NOW),),
        health=(replace(health("READY"), at=NOW),),
    )
    kinds = [event.kind for event in timeline(told)]
    assert kinds == sorted(kinds, key=list(Kind).index)
    assert set(kinds) == set(Kind)
    assert timeline(told)[0].words == "Requests queue (scale_up): 22 wait; A = 22, B = 1.5"


def test_why_a_set_has_as_many_as_it_has() -> None:
    steady = decision(7, DecisionReason.STEADY, 2, 2)
    refused = decision(8, DecisionReason.AT_MAX, 2, 2, ALERT)
    young = SetStory("s", "m", NOW, is_now=True)
    assert (wanted_because(young), stays_because(young)) == ("nothing was decided yet",) * 2
    told = replace(young, decision=steady)
    assert (wanted_because(told), stays_because(told)) == ("the count was never changed", "STEADY: so")
    told = replace(told, decision=refused, changed=decision(6, DecisionReason.SCALED_UP, 1, 2, ALERT))
    assert wanted_because(told) == "SCALED_UP, 1 -> 2: so"
    assert stays_because(told) == "refused because AT_MAX: so"
    assert told.pressed(ALERT)
    assert not told.pressed(replace(ALERT, key="grafana/1/g"))
