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
    rules: HandOver
    lead: timedelta

    @property
    def length(self) -> timedelta:
        return self.ends_at - self.since

    @property
    def margin(self) -> timedelta:
        return _margin(self.rules, self.length)

    @property
    def window(self) -> timedelta:
        """From when its successor is due to the end; never more than half of the walltime."""
        return min(self.lead + self.margin, self.length / 2)

    @property
    def soon(self) -> timedelta:
        """From when on it is rather let go than another one, so that it needs no successor."""
        return min(2 * self.window, self.length / 2)


@dataclass(frozen=True, slots=True)
class HandOvers:
    """What walltimes ask of one set, now."""

    going: tuple[Replica, ...]  # due, or with a successor already; the soonest end first
    successors: Mapping[int, Replica]  # by the predecessor's id: those that exist
    last_call: frozenset[str]  # names: to be drained now, whoever follows
    due: frozenset[str]  # names: need a successor by now, of whatever spec
    soon: frozenset[str]  # names: rather let go of these than of others
    reports: tuple[Report, ...]


def start_lead(replica_set: ReplicaSet) -> timedelta:
    """How long before it shall serve a replica of this set has to be created."""
    if replica_set.start_lead_seconds is None:
        return seconds(replica_set.spec.hand_over.default_lead_seconds)
    return timedelta(seconds=replica_set.start_lead_seconds)


def yields_at(rules: HandOver, running_since: datetime, ends_at: datetime) -> datetime:
    """From when on a successor should serve instead, and new requests go to others if there are any."""
    return ends_at - _margin(rules, ends_at - running_since)


def _margin(rules: HandOver, length: timedelta) -> timedelta:
    return min(seconds(rules.margin_seconds), length / 4)


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
    slots = replica_set.max_replicas + replica_set.spec.surge - target
    walltimes = _walltimes(replica_set, replicas, ends_at)
    served = [one for one in walltimes if one.replica.phase is Phase.RUNNING and _has_served(one.replica, endpoints)]
    of_spec = [one for one in served if one.replica.spec_hash == replica_set.spec_hash]
    successors = {one.succeeds: one for one in replicas if one.exists and one.succeeds is not None}
    going: list[Replica] = []
    reports = _too_short(replica_set, of_spec)
    for one, due_at in zip(of_spec, _due(of_spec, slots), strict=True):
        successor, subject = successors.get(one.replica.id), f"hand-over of {one.replica.name}"
        if successor is None and now < due_at:
            continue
        if successor is None and closing is not None and _is_in_vain(one, replica_set, closing):
            reports.append(Report(subject, f"no successor before its walltime ends: {closing.opening}"))
            continue
        going.append(one.replica)
        if (trouble := _trouble(one, successor, endpoints, has_room=slots > 0, now=now)) is not None:
            reports.append(Report(subject, trouble))
    calls = [one for one in served if now >= one.ends_at - _last_call(one, has_room=slots > 0)]
    return HandOvers(
        going=tuple(going),
        successors=successors,
        last_call=frozenset(one.replica.name for one in calls),
        due=frozenset(one.replica.name for one, at in zip(served, _due(served, slots), strict=True) if now >= at),
        soon=frozenset(one.replica.name for one in walltimes if now >= one.ends_at - one.soon),
        reports=tuple(reports) if target else (),
    )


def _walltimes(replica_set: ReplicaSet, replicas: Iterable[Replica], ends_at: Mapping[str, datetime]) -> list[Walltime]:
    """The soonest end first."""
    rules, lead = replica_set.spec.hand_over, start_lead(replica_set)
    walltimes = [
        Walltime(one, one.running_since, ends_at[one.name], rules, lead)
        for one in replicas
        if one.running_since is not None and one.name in ends_at and ends_at[one.name] > one.running_since
    ]
    return sorted(walltimes, key=lambda one: (one.ends_at, one.replica.id))


def _has_served(replica: Replica, endpoints: Mapping[str, Endpoint]) -> bool:
    """Whether it does at this moment does not matter: a failed probe must not take a successor's place away."""
    endpoint = endpoints.get(replica.name)
    return endpoint is not None and endpoint.first_ready_at is not None


def _due(walltimes: Sequence[Walltime], slots: int) -> list[datetime]:
    """When each of these needs its successor created, so that `slots` at a time suffice."""
    at_once = max(1, slots)
    due: list[datetime] = []  # the latest end first
    for number, one in enumerate(reversed(walltimes)):
        # with no room beside, the successor begins when the predecessor has left: an early start gains nothing
        at = one.ends_at - (one.window if slots > 0 else one.margin)
        if number >= at_once:
            at = min(at, due[number - at_once] - one.window)
        due.append(max(at, one.ends_at - one.length / 2))
    return due[::-1]


def _is_in_vain(one: Walltime, replica_set: ReplicaSet, closing: Closing) -> bool:
    """Would a successor have to end with its predecessor, because a reservation begins?"""
    resources = replica_set.spec.slurm
    assert resources is not None  # only sets that Slurm runs have walltimes
    return one.ends_at + seconds(resources.min_time_limit_seconds) > closing.at


def _last_call(one: Walltime, *, has_room: bool) -> timedelta:
    return min(one.margin / 2, _LAST_CALL) if has_room else one.margin


# --- what an operator should know --------------------------------------------------------------------------


def _too_short(replica_set: ReplicaSet, walltimes: Iterable[Walltime]) -> list[Report]:
    for one in walltimes:
        if one.lead + one.margin > one.length / 2:
            needs = f"{one.lead.total_seconds():.0f} s to start and a margin of {one.margin.total_seconds():.0f} s"
            length = f"{one.length.total_seconds():.0f} s"
            message = f"a walltime of {length} is too short to be handed over in time: it takes {needs}"
            return [Report(f"walltimes of {replica_set.name}", message)]
    return []


def _trouble(
    one: Walltime, successor: Replica | None, endpoints: Mapping[str, Endpoint], *, has_room: bool, now: datetime
) -> str | None:
    end = f"{one.ends_at:%H:%M:%S}"
    if not has_room:
        return f"no room for a successor beside it: it leaves first, its walltime ends at {end}"
    endpoint = endpoints.get(successor.name) if successor is not None else None
    if now < one.ends_at - one.margin or (endpoint is not None and endpoint.health is Health.READY):
        return None
    whose = f"{successor.name} is {successor.phase}" if successor is not None else "it has no successor"
    return f"hand-over is late: {whose}, and the walltime ends at {end}"
