"""The operator's words, over every phase."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest

from controlplane.core.types import Move, Phase, Reason, Replica, ReplicaSetSpec, SlurmResources
from controlplane.core.verbs import Verb, VerbRefused, interpret

NOW = datetime(2026, 1, 1, tzinfo=UTC)
SPEC = ReplicaSetSpec("s", "m", slurm=SlurmResources(time_limit_seconds=60), drain_timeout_seconds=90)
NOTHING, REFUSED = "nothing", "refused"

TABLE = {
    Phase.PENDING: (Phase.ENDED, NOTHING, Phase.ENDED),
    Phase.SUBMITTING: (REFUSED, NOTHING, REFUSED),
    Phase.QUEUED: (Phase.STOPPING, NOTHING, Phase.STOPPING),
    Phase.RUNNING: (Phase.DRAINING, NOTHING, Phase.STOPPING),
    Phase.DRAINING: (NOTHING, Phase.RUNNING, Phase.STOPPING),
    Phase.STOPPING: (NOTHING, REFUSED, NOTHING),
    Phase.ENDED: (NOTHING, REFUSED, NOTHING),
}
VERBS = (Verb.DRAIN, Verb.UNDRAIN, Verb.CANCEL)


def replica(phase: Phase) -> Replica:
    return Replica(
        id=1,
        name="cp-s-1",
        replica_set="s",
        phase=phase,
        version=3,
        spec=SPEC,
        spec_hash="h",
        port=20000,
        secret="x" * 32,
        created_at=NOW,
        phase_since=NOW,
    )


def meaning(verb: Verb, phase: Phase) -> str:
    try:
        step = interpret(verb, replica(phase), actor="ann", now=NOW)
    except VerbRefused:
        return REFUSED
    return step.to if step else NOTHING


def test_the_table_has_every_phase() -> None:
    assert set(TABLE) == set(Phase)


@pytest.mark.parametrize("phase", Phase)
def test_each_word_means_in_each_phase_what_the_table_says(phase: Phase) -> None:
    assert tuple(meaning(verb, phase) for verb in VERBS) == TABLE[phase]


@pytest.mark.parametrize("verb", VERBS)
def test_a_word_said_again_changes_nothing_more_unless_it_is_refused(verb: Verb) -> None:
    for phase in Phase:
        if (first := meaning(verb, phase)) in (NOTHING, REFUSED):
            continue
        assert meaning(verb, Phase(first)) == NOTHING


def test_a_drain_names_its_deadline_its_reason_and_its_actor() -> None:
    assert interpret(Verb.DRAIN, replica(Phase.RUNNING), actor="ann", now=NOW) == Move(
        replica(Phase.RUNNING),
        Phase.DRAINING,
        Reason.DRAINED_BY_OPERATOR,
        "drain by ann",
        drain_deadline=NOW + timedelta(seconds=90),
    )


def test_a_cancelled_replica_says_that_an_operator_did_it() -> None:
    step = interpret(Verb.CANCEL, replica(Phase.DRAINING), actor="ann", now=NOW)
    assert step is not None
    assert step.reason is Reason.CANCELLED_BY_OPERATOR
