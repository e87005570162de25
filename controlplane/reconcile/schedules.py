"""What the schedules of a set ask for at this moment."""

from __future__ import annotations

from datetime import datetime

from controlplane.core.bounds import taken_together
from controlplane.core.types import ReplicaSet, Report, ScheduledBounds
from controlplane.specs.schedules import is_open


def scheduled_bounds(replica_set: ReplicaSet, now: datetime) -> ScheduledBounds | Report:
    """Of those whose windows are open. A Report if one cannot be read: then nothing is known, and nothing changes.

    What was applied was readable; another host's time zones may be fewer.
    """
    open_now = []
    for schedule in replica_set.spec.schedules:
        try:
            if is_open(schedule, now):
                open_now.append(schedule)
        except ValueError as error:
            message = f"schedule {schedule.name} is not followed: {schedule.time_zone}, {schedule.cron}: {error}"
            return Report(f"schedules of {replica_set.name}", message)
    return taken_together(open_now)
