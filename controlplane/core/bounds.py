"""Between which bounds a set may have replicas, of the many who have a say.

For each bound by itself, the first that is given: an operator's, that of the schedules whose windows are open, the
spec's. Of several open schedules hold the highest min and the lowest max. Where min then is greater than max, the one
of higher rank stands and the other gives way; of one rank, min stands: what was promised to clients goes before thrift.

A pin is held whatever schedules do: the bounds make room for it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from controlplane.core.types import OperatorBounds, ReplicaSet, Schedule, ScheduledBounds

_NONE_GIVEN = OperatorBounds(None, None)


def taken_together(open_schedules: Iterable[Schedule]) -> ScheduledBounds:
    """What the schedules whose windows are open ask for."""
    schedules = sorted(open_schedules, key=lambda one: one.name)
    mins = [one.min_replicas for one in schedules if one.min_replicas is not None]
    maxes = [one.max_replicas for one in schedules if one.max_replicas is not None]
    return ScheduledBounds(tuple(one.name for one in schedules), max(mins, default=None), min(maxes, default=None))


def in_force(replica_set: ReplicaSet) -> tuple[int, int]:
    """Min and max, of all that the set says of itself."""
    if replica_set.spec.is_external:
        return 0, 0
    layers = (replica_set.operator_bounds or _NONE_GIVEN, replica_set.scheduled, replica_set.spec)
    low_rank, low = _first([one.min_replicas for one in layers])
    high_rank, high = _first([one.max_replicas for one in layers])
    if low > high:
        low, high = (low, low) if low_rank <= high_rank else (high, high)
    if replica_set.pin is not None:
        low, high = min(low, replica_set.pin.replicas), max(high, replica_set.pin.replicas)
    return low, high


def bounded(replica_set: ReplicaSet) -> ReplicaSet:
    """The same set, with the bounds that are due in force, and desired moved inside them, or to its pin."""
    low, high = in_force(replica_set)
    wanted = replica_set.desired_replicas if replica_set.pin is None else replica_set.pin.replicas
    return replace(replica_set, min_replicas=low, max_replicas=high, desired_replicas=max(low, min(high, wanted)))


def _first(given: list[int | None]) -> tuple[int, int]:
    """The first that is given, after its rank: 0 is the highest."""
    return next((rank, bound) for rank, bound in enumerate(given) if bound is not None)
