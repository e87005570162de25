"""When a set that failed is tried again: after its starts failed in a row, or its jobs were lost again and again.

Two rows of ends are read, newest first, of the spec in force only. Starts that failed: the replica ended CRASHED,
START_TIMEOUT or REJECTED without ever having been ready; each doubles the pause. Jobs that were taken away soon after
they were made (PREEMPTED, NODE_FAIL): the first is replaced at once, for it is an accident; each further one, of a
successor that was lost in its turn, doubles the pause. Those say nothing about whether the job can start, and end no
row of failed starts.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta

from controlplane.core.types import Decision, DecisionReason, PastReplica, Reason

_FAILED_TO_START = frozenset({Reason.CRASHED, Reason.START_TIMEOUT, Reason.REJECTED})
_TAKEN_AWAY = frozenset({Reason.PREEMPTED, Reason.NODE_FAIL})


@dataclass(frozen=True, slots=True)
class BackOffRules:
    first_back_off: timedelta = timedelta(seconds=10)  # after one failed start; doubles with each further one
    longest_back_off: timedelta = timedelta(minutes=10)
    short_life: timedelta = timedelta(minutes=10)  # what was taken away sooner than this is likely to be so again


@dataclass(frozen=True, slots=True)
class BackOff:
    """A set that is not tried again before its time, and what came of the newest try."""

    failures: int
    next_try_at: datetime
    newest: PastReplica
    was_lost: bool = False  # Slurm took the jobs away; otherwise they did not start

    @property
    def sentence(self) -> str:
        at = f"{self.next_try_at:%H:%M:%S}"
        if self.was_lost:
            return f"{self.failures} jobs in a row lost soon; next try at {at}: {self.newest.message}"
        return f"{self.failures} failed starts in a row; next try at {at}: {self.newest.message}"


def failed_to_start(past: PastReplica) -> bool:
    return not past.was_ready and past.reason in _FAILED_TO_START


def backing_off(
    past: Iterable[PastReplica], *, spec_hash: str, since: datetime | None, rules: BackOffRules
) -> BackOff | None:
    """The back-off that these ends, newest first, ask for. `since`: what ended by then does not count."""

    def counts(one: PastReplica) -> bool:
        return one.spec_hash == spec_hash and (since is None or one.ended_at > since)

    counted = list(itertools.takewhile(counts, past))
    if failed := _failed_starts(counted):
        return BackOff(len(failed), failed[0].ended_at + _pause(len(failed), rules), failed[0])
    lost = _taken_away_soon(counted, rules)
    if len(lost) < 2:
        return None
    return BackOff(len(lost), lost[0].ended_at + _pause(len(lost) - 1, rules), lost[0], was_lost=True)


def explained(decision: Decision, pause: BackOff | None) -> Decision:
    """The decision, saying that the set backs off where it would say that all is well; and how, where it says that."""
    if pause is not None and decision.reason is DecisionReason.BACKING_OFF:
        return replace(decision, explanation=f"{decision.explanation}: {pause.sentence}")
    if pause is None or decision.reason is not DecisionReason.STEADY:
        return decision
    return replace(decision, reason=DecisionReason.BACKING_OFF, explanation=pause.sentence)


def _pause(times: int, rules: BackOffRules) -> timedelta:
    doubled: timedelta = rules.first_back_off * 2 ** min(times - 1, 20)
    return min(doubled, rules.longest_back_off)


def _failed_starts(past: Sequence[PastReplica]) -> list[PastReplica]:
    told = [one for one in past if one.was_ready or one.reason not in _TAKEN_AWAY]
    return list(itertools.takewhile(failed_to_start, told))


def _taken_away_soon(past: Sequence[PastReplica], rules: BackOffRules) -> list[PastReplica]:
    """Each one made after the one before it had ended: many that go together go once."""
    lost: list[PastReplica] = []
    for one in past:
        if one.reason not in _TAKEN_AWAY or one.created_at is None or one.ended_at - one.created_at > rules.short_life:
            break
        successor = lost[-1].created_at if lost else None
        if successor is None or one.ended_at <= successor:
            lost.append(one)
    return lost
