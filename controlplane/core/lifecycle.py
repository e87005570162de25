"""What Slurm's answer means for one replica: the transition table.

    PENDING -> SUBMITTING -> QUEUED -> RUNNING -> DRAINING -> STOPPING -> ENDED

Only what Slurm says moves a replica here; what we want of it is in `planning`. Two rules hold everywhere: a list that
could not be had moves nothing (callers do not come here without one), and a state this version has never heard of is
waited out. The list must have been asked for *after* the replica was read, so that a job recorded in the replica
cannot be younger than the list that lacks it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from datetime import datetime, timedelta

from controlplane.core.types import JobList, JobState, Move, Phase, Reason, Replica, SlurmJob

_INSTANCE_ID = re.compile(r"[0-9a-f]{32}")  # as the schema makes them
_END_REASONS = {
    # whatever its exit code: nobody asked it to end (an engine that dies can exit with 0)
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


def comment_for(name: str, instance_id: str) -> str:
    """The comment of a replica's job: its name again, and which installation it belongs to."""
    return f"{name} {instance_id}"


def is_anothers(job: SlurmJob, instance_id: str) -> bool:
    """Does the job say that it belongs to another installation under the same Slurm user?

    Names are unique within one database only. A comment that somebody changed says nothing: then the name counts, for
    a job of ours that we do not recognise would be submitted again.
    """
    said = job.comment.removeprefix(f"{job.name} ")
    return said != job.comment and _INSTANCE_ID.fullmatch(said) is not None and said != instance_id


def job_of(replica: Replica, jobs: Iterable[SlurmJob]) -> SlurmJob | None:
    """The job that is this replica: the one recorded; until one is, the oldest of its name that lives, else the newest.

    A remembered id alone is never trusted (Slurm gives ids again), so the name must match as well. A recorded job that
    is gone is never exchanged for a twin: a replica is one job, and is not revived by another.
    """
    named = sorted((job for job in jobs if job.name == replica.name), key=lambda job: job.job_id)
    if replica.slurm_job_id is not None:
        return next((job for job in named if job.job_id == replica.slurm_job_id), None)
    living = [job for job in named if not job.is_over]
    return living[0] if living else named[-1] if named else None


def twins_of(replica: Replica, jobs: Iterable[SlurmJob]) -> list[SlurmJob]:
    """Live jobs of this replica's name that are not the replica: a lost answer's, held and never released.

    None are named before the replica's own job is recorded: until then somebody else may record another choice.
    """
    if replica.slurm_job_id is None:
        return []
    return [
        job
        for job in jobs
        if job.name == replica.name
        and job.job_id != replica.slurm_job_id
        and not job.is_over
        and job.state is not JobState.COMPLETING
    ]


def advance(replica: Replica, listed: JobList, *, now: datetime, submit_grace: timedelta) -> Move | None:
    """The step that Slurm's complete answer asks for, or None.

    `submit_grace`: after this long a request that left can no longer make a job.
    """
    job = job_of(replica, listed.jobs)
    match replica.phase:
        case Phase.PENDING:
            return _adopt(replica, job) if job is not None and not job.is_over else None
        case Phase.SUBMITTING:
            return _submitting(replica, job, listed, submit_grace)
        case Phase.QUEUED | Phase.RUNNING:
            return _observed(replica, job, now)
        case Phase.DRAINING | Phase.STOPPING:
            return _leaving(replica, job)
        case Phase.ENDED:
            return None


def _adopt(replica: Replica, job: SlurmJob) -> Move:
    return Move(replica, Phase.QUEUED, slurm_job_id=job.job_id, message="found by name and adopted")


def _submitting(replica: Replica, job: SlurmJob | None, listed: JobList, grace: timedelta) -> Move | None:
    if job is not None:
        return _adopt(replica, job)
    assert replica.submitted_at is not None  # the schema says so
    if listed.asked_at < replica.submitted_at + grace:
        return None  # the request may still be on its way
    return Move(replica, Phase.PENDING, message="the submit's answer was lost and it made no job")


def _observed(replica: Replica, job: SlurmJob | None, now: datetime) -> Move | None:
    if job is None:
        return Move(replica, Phase.ENDED, reason=Reason.LOST, message="Slurm does not know the job any more")
    if job.is_over:
        return Move(replica, Phase.ENDED, reason=_END_REASONS[job.state], message=_last_words(job))
    if replica.phase is Phase.QUEUED and job.state is JobState.RUNNING:
        return Move(replica, Phase.RUNNING, running_since=job.started_at or now)
    if replica.phase is Phase.RUNNING and job.state is JobState.PENDING:
        return Move(replica, Phase.QUEUED, message="Slurm requeued the job")
    if replica.phase is Phase.RUNNING and _was_started_again(replica, job):
        return Move(replica, Phase.QUEUED, message="Slurm started the job a second time")
    return None


def _leaving(replica: Replica, job: SlurmJob | None) -> Move | None:
    if job is None or job.is_over:
        return Move(replica, Phase.ENDED, message=_last_words(job) if job is not None else None)
    if replica.phase is Phase.DRAINING and job.state is JobState.PENDING:
        return Move(replica, Phase.STOPPING, message="requeued while draining: not started again")
    if replica.phase is Phase.DRAINING and _was_started_again(replica, job):
        return Move(replica, Phase.STOPPING, message="started a second time while draining")
    return None


def _was_started_again(replica: Replica, job: SlurmJob) -> bool:
    """Was it requeued and started between two looks? What then serves may be on another node, or be the old process.

    The time of the start tells, and not Slurm's count: a slurmctld that lost its last seconds starts a job again
    without counting.
    """
    return (
        job.state is JobState.RUNNING
        and replica.running_since is not None
        and job.started_at is not None
        and job.started_at > replica.running_since
    )


def _last_words(job: SlurmJob) -> str:
    words = f"job {job.job_id} ended {job.raw_state or job.state}"
    if job.signal:
        words += f", signal {job.signal}"
    elif job.exit_code is not None:
        words += f", exit code {job.exit_code}"
    if job.state_reason and job.state_reason != "None":
        words += f", {job.state_reason}"
    return words
