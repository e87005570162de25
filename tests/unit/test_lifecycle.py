"""The transition table: every phase, and everything that a complete list can say of its job."""

from __future__ import annotations

from dataclasses import replace
from datetime import datetime, timedelta

import pytest

from controlplane.core.lifecycle import advance, job_of, twins_of
from controlplane.core.types import OVER_STATES, JobState, Move, Phase, Reason, Replica, SlurmJob
from tests.unit.worlds import NOW, a_job, a_replica, ago, listed

GRACE = timedelta(seconds=120)
STAYS = None

LIVING = tuple(state for state in JobState if state not in OVER_STATES)
OVER = tuple(state for state in JobState if state in OVER_STATES)

# what the list says of the job            -> where the replica goes, by the phase that it is in
TABLE: dict[Phase, dict[JobState | None, Phase | None]] = {
    Phase.PENDING: {
        None: STAYS,
        **dict.fromkeys(LIVING, Phase.QUEUED),  # found by name: adopted
        **dict.fromkeys(OVER, STAYS),  # an earlier attempt's; the next one is still to be made
    },
    Phase.SUBMITTING: {
        None: STAYS,  # the request may still act; see below for when it no longer can
        **dict.fromkeys(LIVING, Phase.QUEUED),
        **dict.fromkeys(OVER, Phase.QUEUED),  # adopted first, and declared over by the next step
    },
    Phase.QUEUED: {
        None: Phase.ENDED,
        **dict.fromkeys(LIVING, STAYS),
        JobState.RUNNING: Phase.RUNNING,
        **dict.fromkeys(OVER, Phase.ENDED),
    },
    Phase.RUNNING: {
        None: Phase.ENDED,
        **dict.fromkeys(LIVING, STAYS),
        JobState.PENDING: Phase.QUEUED,  # requeued
        **dict.fromkeys(OVER, Phase.ENDED),
    },
    Phase.DRAINING: {
        None: Phase.ENDED,
        **dict.fromkeys(LIVING, STAYS),
        JobState.PENDING: Phase.STOPPING,  # requeued: not started again
        **dict.fromkeys(OVER, Phase.ENDED),
    },
    Phase.STOPPING: {
        None: Phase.ENDED,
        **dict.fromkeys(LIVING, STAYS),  # its processes may still live: only "over" is over
        **dict.fromkeys(OVER, Phase.ENDED),
    },
    Phase.ENDED: dict.fromkeys((None, *JobState), STAYS),
}

END_REASONS = {
    JobState.COMPLETED: Reason.CRASHED,
    JobState.FAILED: Reason.CRASHED,
    JobState.OUT_OF_MEMORY: Reason.CRASHED,
    JobState.CANCELLED: Reason.CANCELLED_OUTSIDE,
    JobState.TIMEOUT: Reason.TIME_LIMIT,
    JobState.DEADLINE: Reason.TIME_LIMIT,
    JobState.NODE_FAIL: Reason.NODE_FAIL,
    JobState.BOOT_FAIL: Reason.NODE_FAIL,
    JobState.PREEMPTED: Reason.PREEMPTED,
}


def step(replica: Replica, *jobs: SlurmJob, asked_at: datetime = NOW) -> Move | None:
    return advance(replica, listed(*jobs, asked_at=asked_at), now=NOW, submit_grace=GRACE)


def forced(move: Move | None) -> Move:
    assert move is not None
    return move


def test_the_table_has_every_phase_and_every_state() -> None:
    assert set(TABLE) == set(Phase)
    assert all(set(row) == {None, *JobState} for row in TABLE.values())
    assert set(END_REASONS) == OVER_STATES


@pytest.mark.parametrize("phase", Phase)
def test_each_answer_of_slurm_moves_each_phase_as_the_table_says(phase: Phase) -> None:
    replica = a_replica(1, phase)

    def goes_to(state: JobState | None) -> Phase | None:
        move = step(replica) if state is None else step(replica, a_job(replica, state))
        return move.to if move else STAYS

    assert {state: goes_to(state) for state in (None, *JobState)} == TABLE[phase]


@pytest.mark.parametrize("phase", [Phase.QUEUED, Phase.RUNNING])
@pytest.mark.parametrize("state", OVER)
def test_a_job_that_ended_unasked_gives_its_replica_the_reason(phase: Phase, state: JobState) -> None:
    replica = a_replica(1, phase)
    assert forced(step(replica, a_job(replica, state))).reason is END_REASONS[state]


@pytest.mark.parametrize("phase", [Phase.QUEUED, Phase.RUNNING])
def test_a_job_that_a_complete_list_lacks_is_lost(phase: Phase) -> None:
    assert forced(step(a_replica(1, phase))).reason is Reason.LOST


@pytest.mark.parametrize("phase", [Phase.DRAINING, Phase.STOPPING])
@pytest.mark.parametrize("state", [None, *OVER])
def test_a_replica_that_was_leaving_keeps_the_reason_why_it_left(phase: Phase, state: JobState | None) -> None:
    replica = a_replica(1, phase)
    move = forced(step(replica) if state is None else step(replica, a_job(replica, state)))
    assert move.reason is None  # the write keeps the one there is


@pytest.mark.parametrize("phase", Phase)
def test_no_step_is_asked_for_twice(phase: Phase) -> None:
    """Following the steps comes to rest: the round that walks them ends."""
    for state in (None, *JobState):
        replica, walked = a_replica(1, phase), []
        jobs = () if state is None else (a_job(replica, state),)
        while (move := step(replica, *jobs)) is not None:
            walked.append(move.to)
            replica = a_replica(1, move.to, slurm_job_id=move.slurm_job_id or replica.slurm_job_id)
        assert len(walked) <= 2


# --- what a step carries -----------------------------------------------------------------------------------


def test_a_running_job_says_since_when_it_runs() -> None:
    replica = a_replica(1, Phase.QUEUED)
    assert forced(step(replica, a_job(replica, JobState.RUNNING, started_at=ago(7)))).running_since == ago(7)


def test_a_running_job_that_does_not_say_since_when_runs_since_now() -> None:
    replica = a_replica(1, Phase.QUEUED)
    assert forced(step(replica, a_job(replica, JobState.RUNNING))).running_since == NOW


def test_the_last_words_tell_the_job_its_state_and_its_signal() -> None:
    replica = a_replica(1, Phase.RUNNING)
    job = a_job(replica, JobState.FAILED, raw_state="FAILED", signal=9, exit_code=0, state_reason="RaisedSignal")
    assert forced(step(replica, job)).message == "job 101 ended FAILED, signal 9, RaisedSignal"


def test_the_last_words_tell_an_exit_code_and_leave_out_a_reason_that_is_none() -> None:
    replica = a_replica(1, Phase.RUNNING)
    job = a_job(replica, JobState.COMPLETED, raw_state="COMPLETED", exit_code=0, state_reason="None")
    assert forced(step(replica, job)).message == "job 101 ended COMPLETED, exit code 0"


# --- a submit whose answer was lost ------------------------------------------------------------------------


@pytest.mark.parametrize(("asked_at", "goes_to"), [(ago(1), STAYS), (NOW, Phase.PENDING)])
def test_a_lost_submit_is_made_again_only_when_the_old_request_can_no_longer_act(
    asked_at: datetime, goes_to: Phase | None
) -> None:
    replica = a_replica(1, Phase.SUBMITTING, submitted_at=NOW - GRACE)
    move = step(replica, asked_at=asked_at)
    assert (move.to if move else STAYS) is goes_to


def test_a_lost_submit_answer_adopts_the_job_instead_of_submitting_again() -> None:
    replica = a_replica(1, Phase.SUBMITTING, submitted_at=ago(10_000))
    move = forced(step(replica, a_job(replica, JobState.PENDING, is_held=True)))
    assert (move.to, move.slurm_job_id) == (Phase.QUEUED, 101)


def test_of_several_jobs_the_oldest_that_lives_is_adopted() -> None:
    replica = a_replica(1, Phase.SUBMITTING)
    jobs = [
        a_job(replica, JobState.PENDING, job_id=9),
        a_job(replica, JobState.PENDING, job_id=5),
        a_job(replica, JobState.CANCELLED, job_id=3),
    ]
    assert forced(step(replica, *jobs)).slurm_job_id == 5


def test_of_several_jobs_that_are_all_over_the_newest_is_the_replicas() -> None:
    replica = a_replica(1, Phase.SUBMITTING)
    jobs = [a_job(replica, JobState.FAILED, job_id=number) for number in (5, 9, 3)]
    assert job_of(replica, jobs) == jobs[1]


# --- whose job is it ---------------------------------------------------------------------------------------


def test_a_remembered_id_with_another_name_is_somebody_elses_job() -> None:
    replica = a_replica(1, Phase.RUNNING)
    stranger = a_job(replica, JobState.RUNNING, name="cp-s-77")
    assert job_of(replica, [stranger]) is None
    assert forced(step(replica, stranger)).reason is Reason.LOST


def test_the_recorded_job_is_the_replicas_even_beside_an_older_one() -> None:
    replica = a_replica(1, Phase.QUEUED)
    older, own = a_job(replica, JobState.PENDING, job_id=7), a_job(replica, JobState.PENDING)
    assert job_of(replica, [older, own]) is own
    assert twins_of(replica, [older, own]) == [older]


@pytest.mark.parametrize("phase", [Phase.QUEUED, Phase.RUNNING, Phase.DRAINING, Phase.STOPPING])
def test_a_recorded_job_that_is_gone_is_not_exchanged_for_its_twin(phase: Phase) -> None:
    """Once a released job was lost and its held twin took its place unrecorded, the replica was queued for ever."""
    replica = a_replica(1, phase)
    twin = a_job(replica, JobState.PENDING, job_id=500, is_held=True)
    assert job_of(replica, [twin]) is None
    assert forced(step(replica, twin)).to is Phase.ENDED
    assert twins_of(replica, [twin]) == [twin]


@pytest.mark.parametrize("phase", [Phase.PENDING, Phase.SUBMITTING])
def test_no_twin_is_named_before_the_choice_is_recorded(phase: Phase) -> None:
    """Somebody else may have recorded, released and made routable the very job that would be called a twin here."""
    replica = a_replica(1, phase)
    jobs = [a_job(replica, JobState.PENDING, job_id=5), a_job(replica, JobState.RUNNING, job_id=9)]
    assert twins_of(replica, jobs) == []


@pytest.mark.parametrize("state", [JobState.COMPLETING, *OVER])
def test_a_twin_that_is_ending_is_not_cancelled_again(state: JobState) -> None:
    replica = a_replica(1, Phase.RUNNING)
    jobs = [a_job(replica, JobState.RUNNING), a_job(replica, state, job_id=500)]
    assert twins_of(replica, jobs) == []


def test_a_job_of_another_replica_is_no_twin() -> None:
    replica = a_replica(1, Phase.RUNNING)
    assert (
        twins_of(replica, [a_job(replica, JobState.RUNNING), a_job(a_replica(11, Phase.RUNNING), JobState.RUNNING)])
        == []
    )


@pytest.mark.parametrize(("phase", "to"), [(Phase.RUNNING, Phase.QUEUED), (Phase.DRAINING, Phase.STOPPING)])
def test_a_job_that_was_started_again_between_two_looks_is_trusted_no_more(phase: Phase, to: Phase) -> None:
    """What answers may be the old process on another node, which has the same secret."""
    replica = a_replica(1, phase, running_since=ago(60))
    again = a_job(replica, JobState.RUNNING, started_at=ago(5), restart_count=0)
    moved = step(replica, again)
    assert moved is not None
    assert moved.to is to
    assert step(replica, replace(again, started_at=ago(60))) is None
    assert step(replica, replace(again, started_at=ago(61))) is None
    assert step(replica, replace(again, started_at=None)) is None


def test_a_job_that_was_started_again_runs_anew_in_the_same_round() -> None:
    queued = a_replica(1, Phase.QUEUED)
    moved = step(queued, a_job(queued, JobState.RUNNING, started_at=ago(5)))
    assert moved is not None
    assert (moved.to, moved.running_since) == (Phase.RUNNING, ago(5))
