"""Walltime hand-over: which replicas need a successor now, so that it serves before their job's time limit is reached.

    created ... ready     due          yields     last call   end
       |----------|--------|--------------|-----------|--------|
                           |-- lead ------|-- margin ----------|

`lead` is what a start of this set takes, queue and load, as measured; `margin` is what the last requests may need.
A replica that is due gets one successor, which takes its place in the count; when the successor serves, the
predecessor drains. Where it is late, the predecessor stays routable until the last call, and the proxy prefers others
from `yields` on.

- Only a replica that has served is ever due, and not before half of its walltime is over: however long starts take,
  no successor of a successor that does not serve is made, and no chain of starts.
- Where several are due at about the same time and there is room for few successors, the first ones are due earlier.
- Where there is no room beside at all, a predecessor leaves first, a margin before its end.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

from controlplane.core.reservations import Closing
from controlplane.core.types import Endpoint, HandOver, Health, Phase, Replica, ReplicaSet, Report, seconds

CANCEL_LEAD = timedelta(seconds=5)  # a drain is over so long before the end: a later cancel would come too late
_LAST_CALL = timedelta(seconds=60)  # before the end of a predecessor whose successor is late: most requests are shorter


@dataclass(frozen=True, slots=True)
class Walltime:
    """The time limit of a job that runs, and what a hand-over makes of it."""

    replica: Replica
    since: datetime
    ends_at: datetime

    @property
    def length(self) -> timedelta:
        return self.ends_at - self.since

    def margin(self, rules: HandOver) -> timedelta:
        return min(seconds(rules.margin_seconds), self.length / 4)

    def window(self, replica_set: ReplicaSet) -> timedelta:
        """From when a successor is due to the end; never more than half of the walltime."""
        return min(start_lead(replica_set) + self.margin(replica_set.spec.hand_over), self.length / 2)

    def is_too_short(self, replica_set: ReplicaSet) -> bool:
        return start_lead(replica_set) + self.margin(replica_set.spec.hand_over) > self.length / 2


@dataclass(frozen=True, slots=True)
class HandOvers:
    """What walltimes ask of one set, now."""

    going: tuple[Replica, ...] = ()  # due, or with a successor already; the soonest end first
    successors: Mapping[int, Replica] | None = None  # by the predecessor's id: those that exist
    last_call: frozenset[str] = frozenset()  # names: to be drained now, whoever follows
    soon: Mapping[str, datetime] | None = None  # ends by name: rather let go of these than of others
    reports: tuple[Report, ...] = ()

    def has_successor(self, replica: Replica) -> bool:
        return replica.id in (self.successors or {})

    def ends_soon(self, replica: Replica) -> bool:
        return replica.name in (self.soon or {})


def start_lead(replica_set: ReplicaSet) -> timedelta:
    """How long before it shall serve a replica of this set has to be created."""
    if replica_set.start_lead_seconds is None:
        return seconds(replica_set.spec.hand_over.default_lead_seconds)
    return timedelta(seconds=replica_set.start_lead_seconds)


def yields_at(rules: HandOver, running_since: datetime, ends_at: datetime) -> datetime:
    """From when on a successor should serve instead, and new requests go to others if there are any."""
    return ends_at - min(seconds(rules.margin_seconds), (ends_at - running_since) / 4)


def look(
    replica_set: ReplicaSet,
    replicas: Iterable[Replica],
    endpoints: Mapping[str, Endpoint],
    ends_at: Mapping[str, datetime],
    closing: Closing | None,
    *,
    target: int,
    now: datetime,
) -> HandOvers:
    """Whose walltime ends so soon that it matters. `target`: how many replicas are wanted."""
    replicas = tuple(replicas)
    walltimes = [
        Walltime(one, one.running_since, ends_at[one.name])
        for one in replicas
        if one.running_since is not None and one.name in ends_at and ends_at[one.name] > one.running_since
    ]
    soon = {one.replica.name: one.ends_at for one in walltimes if now >= one.ends_at - 2 * one.window(replica_set)}
    served = [one for one in walltimes if one.replica.phase is Phase.RUNNING and _has_served(one.replica, endpoints)]
    served.sort(key=lambda one: (one.ends_at, one.replica.id))
    slots = replica_set.max_replicas + replica_set.spec.surge - target
    successors = {one.succeeds: one for one in replicas if one.exists and one.succeeds is not None}
    of_spec = [one for one in served if one.replica.spec_hash == replica_set.spec_hash]
    due = _due(replica_set, of_spec, slots)
    going = [
        one
        for one, due_at in zip(of_spec, due, strict=True)
        if one.replica.id in successors or (now >= due_at and not _is_in_vain(one, replica_set, closing))
    ]
    calls = [one for one in served if now >= one.ends_at - _last_call(one, replica_set, slots)]
    return HandOvers(
        going=tuple(one.replica for one in going),
        successors=successors,
        last_call=frozenset(one.replica.name for one in calls),
        soon=soon,
        reports=tuple(_reports(replica_set, of_spec, due, going, successors, endpoints, closing, slots, target, now)),
    )


def _has_served(replica: Replica, endpoints: Mapping[str, Endpoint]) -> bool:
    """Whether it does at this moment does not matter: a failed probe must not take a successor's place away."""
    endpoint = endpoints.get(replica.name)
    return endpoint is not None and endpoint.first_ready_at is not None


def _due(replica_set: ReplicaSet, walltimes: Sequence[Walltime], slots: int) -> list[datetime]:
    """When each, the soonest end first, needs its successor created, so that `slots` at a time suffice."""
    due: list[datetime] = []  # the latest end first
    for number, one in enumerate(reversed(walltimes)):
        window = one.window(replica_set)
        # with no room beside, the successor begins when the predecessor has left: an early start gains nothing
        at = one.ends_at - (window if slots > 0 else one.margin(replica_set.spec.hand_over))
        if number >= max(1, slots):
            at = min(at, due[number - max(1, slots)] - window)
        due.append(max(at, one.ends_at - one.length / 2))
    return due[::-1]


def _is_in_vain(one: Walltime, replica_set: ReplicaSet, closing: Closing | None) -> bool:
    """Would a successor have to end with its predecessor, because a reservation begins?"""
    resources = replica_set.spec.slurm
    assert resources is not None  # only sets that Slurm runs have walltimes
    return closing is not None and one.ends_at + seconds(resources.min_time_limit_seconds) > closing.at


def _last_call(one: Walltime, replica_set: ReplicaSet, slots: int) -> timedelta:
    margin = one.margin(replica_set.spec.hand_over)
    return min(margin / 2, _LAST_CALL) if slots > 0 else margin


# --- what an operator should know --------------------------------------------------------------------------


def _reports(
    replica_set: ReplicaSet,
    of_spec: Sequence[Walltime],
    due: Sequence[datetime],
    going: Sequence[Walltime],
    successors: Mapping[int, Replica],
    endpoints: Mapping[str, Endpoint],
    closing: Closing | None,
    slots: int,
    target: int,
    now: datetime,
) -> Iterable[Report]:
    rules = replica_set.spec.hand_over
    if target and (short := next((one for one in of_spec if one.is_too_short(replica_set)), None)) is not None:
        needs = f"{start_lead(replica_set).total_seconds():.0f} s to start and a margin of {rules.margin_seconds} s"
        length = f"{short.length.total_seconds():.0f} s"
        message = f"a walltime of {length} is too short to be handed over in time: it takes {needs}"
        yield Report(f"walltimes of {replica_set.name}", message)
    for one, due_at in zip(of_spec, due, strict=True):
        subject, end = f"hand-over of {one.replica.name}", f"{one.ends_at:%H:%M:%S}"
        successor = successors.get(one.replica.id)
        if one not in going:
            if target and now >= due_at and closing is not None:
                yield Report(subject, f"no successor before its walltime ends: {closing.opening}")
        elif slots <= 0:
            yield Report(subject, f"no room for a successor beside it: it leaves first, its walltime ends at {end}")
        elif now >= yields_at(rules, one.since, one.ends_at) and not _serves(successor, endpoints):
            whose = f"{successor.name} is {successor.phase}" if successor is not None else "it has no successor"
            yield Report(subject, f"hand-over is late: {whose}, and the walltime ends at {end}")


def _serves(replica: Replica | None, endpoints: Mapping[str, Endpoint]) -> bool:
    endpoint = endpoints.get(replica.name) if replica is not None else None
    return endpoint is not None and endpoint.health is Health.READY
