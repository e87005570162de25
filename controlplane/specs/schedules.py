"""When a schedule's window is open: five-field cron in an IANA time zone, as Debian's cron understands both.

An opening that falls into the hour that is skipped in spring takes place at the hour's end; one that falls into the
hour that is repeated in autumn takes place once, the first time. (Expressions whose minute or hour begins with `*`
count elapsed time and know no such hours.) A window is as long as it says, in elapsed time.
"""

from __future__ import annotations

from datetime import UTC, datetime, tzinfo
from zoneinfo import ZoneInfo

from cronsim import CronSim, CronSimError

from controlplane.core.types import Schedule, seconds

_SOME_DAY = datetime(2024, 1, 1, tzinfo=UTC)


def is_open(schedule: Schedule, now: datetime) -> bool:
    """Did a window open within the last `duration_seconds`? Raises ValueError if cron or zone cannot be read."""
    since = now - seconds(schedule.duration_seconds)
    zone = zone_of(schedule.time_zone)
    try:
        for local in CronSim(schedule.cron, since.astimezone(zone)):
            # as UTC: two times of one zone are compared by their clocks, which an hour in autumn shows twice
            opening = local.astimezone(UTC)
            if opening > since:
                return opening <= now
    except CronSimError as error:
        raise ValueError(f"cron: {error}") from None
    return False  # within the next 50 years, either


def check_cron(text: str) -> None:
    """Raises ValueError, in words for whoever wrote it."""
    if len(text.split()) != 5:
        raise ValueError("must have five fields: minute, hour, day of month, month, day of week")
    try:
        next(CronSim(text, _SOME_DAY))
    except CronSimError as error:
        raise ValueError(f"is no cron expression: {str(error).lower()}") from None
    except StopIteration:
        raise ValueError("never comes: there is no such day") from None


def zone_of(name: str) -> tzinfo:
    """The zone of IANA's name. Raises ValueError; also on a host that has no time zones (Debian's package tzdata)."""
    if name == "UTC":
        return UTC
    try:
        return ZoneInfo(name)
    except (LookupError, ValueError, OSError):
        raise ValueError("is no time zone known here; give IANA's name, such as Europe/Berlin") from None
