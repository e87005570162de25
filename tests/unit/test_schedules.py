"""When schedules are open: local time, both changes of clocks, and what is refused."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from controlplane.core.types import Report, Schedule, ScheduledBounds
from controlplane.reconcile.schedules import scheduled_bounds
from controlplane.specs import SpecError, parse_one
from controlplane.specs.schedules import is_open
from tests.unit.worlds import a_set, a_spec

SPRING, AUTUMN = datetime(2026, 3, 29, tzinfo=UTC), datetime(2026, 10, 25, tzinfo=UTC)  # Berlin's clocks, at 01:00 UTC
MINUTE = timedelta(minutes=1)


def openings(schedule: Schedule, first: datetime, days: int) -> list[tuple[str, str]]:
    """When it opened and closed within these days, looked at each minute; day and time in UTC."""
    changes: list[datetime] = []
    for number in range(days * 24 * 60):
        now = first + number * MINUTE
        if is_open(schedule, now) is (len(changes) % 2 == 0):
            changes.append(now)
    words = [f"{at:%d %H:%M}" for at in changes]
    return list(zip(words[::2], words[1::2], strict=True))


def berlin(cron: str, hours: float = 1) -> Schedule:
    return Schedule("s", cron, int(hours * 3600), "Europe/Berlin", min_replicas=1)


def test_a_window_opens_on_the_minute_and_lasts_as_long_as_it_says() -> None:
    schedule = Schedule("s", "30 7 * * MON-FRI", 5400, min_replicas=1)
    monday = datetime(2026, 1, 5, tzinfo=UTC)
    assert openings(schedule, monday, 2) == [("05 07:30", "05 09:00"), ("06 07:30", "06 09:00")]
    assert openings(schedule, monday - timedelta(days=2), 2) == []


def test_a_time_zone_is_local_time_in_summer_and_in_winter() -> None:
    working_day = berlin("0 8 * * *", 10)
    around_spring = openings(working_day, SPRING - timedelta(days=1), 3)
    assert around_spring == [("28 07:00", "28 17:00"), ("29 06:00", "29 16:00"), ("30 06:00", "30 16:00")]
    around_autumn = openings(working_day, AUTUMN - timedelta(days=1), 3)
    assert around_autumn == [("24 06:00", "24 16:00"), ("25 07:00", "25 17:00"), ("26 07:00", "26 17:00")]


def test_in_spring_what_would_open_in_the_skipped_hour_opens_at_its_end() -> None:
    assert openings(berlin("30 2 * * *"), SPRING, 2) == [("29 01:00", "29 02:00"), ("30 00:30", "30 01:30")]


def test_in_autumn_what_opens_in_the_repeated_hour_opens_once_and_lasts_its_elapsed_time() -> None:
    assert openings(berlin("30 2 * * *"), AUTUMN, 2) == [("25 00:30", "25 01:30"), ("26 01:30", "26 02:30")]
    assert openings(berlin("45 2 * * *", 0.5), AUTUMN, 1) == [("25 00:45", "25 01:15")]


def test_a_window_that_is_open_while_clocks_change_is_not_cut_or_stretched() -> None:
    night = berlin("0 22 * * *", 8)
    assert openings(night, SPRING - timedelta(hours=12), 1) == [("28 21:00", "29 05:00")]
    assert openings(night, AUTUMN - timedelta(hours=12), 1) == [("24 20:00", "25 04:00")]


def test_a_window_longer_than_the_time_to_the_next_opening_stays_open() -> None:
    hourly = Schedule("s", "0 * * * *", 7200, min_replicas=1)
    assert all(is_open(hourly, SPRING + number * MINUTE) for number in range(24 * 60))


def test_between_an_instant_and_its_minute_nothing_flickers() -> None:
    schedule, opens = Schedule("s", "0 8 * * *", 60), datetime(2026, 1, 5, 8, tzinfo=UTC)
    tick = timedelta(microseconds=1)
    seen = [is_open(schedule, at) for at in (opens - tick, opens, opens + MINUTE - tick, opens + MINUTE)]
    assert seen == [False, True, True, False]


def test_the_bounds_of_all_open_schedules_are_handed_on() -> None:
    schedules = (berlin("0 8 * * *"), Schedule("t", "30 7 * * *", 3600, max_replicas=3), berlin("0 9 * * *"))
    now = datetime(2026, 1, 5, 7, 45, tzinfo=UTC)
    assert scheduled_bounds(a_set(spec=a_spec(schedules=schedules)), now) == ScheduledBounds(("s", "t"), 1, 3)
    assert scheduled_bounds(a_set(), now) == ScheduledBounds()


def test_a_zone_that_this_host_does_not_know_is_reported_and_nothing_is_known() -> None:
    stranger = Schedule("s", "0 8 * * *", 60, "Europe/Atlantis", min_replicas=1)
    report = scheduled_bounds(a_set(spec=a_spec(schedules=(stranger,))), SPRING)
    assert isinstance(report, Report)
    assert report.message.startswith("schedule s is not followed: Europe/Atlantis, 0 8 * * *: is no time zone")


# --- what may be written ----------------------------------------------------------------------------------

SET = {"name": "a", "model": "m", "min_replicas": 1, "max_replicas": 4, "slurm": {"time_limit_seconds": 60}}
POLICY = {"type": "Percent", "value": 1, "period_seconds": 60}
NIGHT = {"name": "night", "cron": "0 22 * * *", "duration_seconds": 3600, "max_replicas": 1}


def test_a_schedule_is_read_with_its_defaults() -> None:
    spec = parse_one({**SET, "schedules": [NIGHT]})
    assert spec.schedules == (Schedule("night", "0 22 * * *", 3600, "UTC", None, 1),)


@pytest.mark.parametrize(
    ("change", "path", "words"),
    [
        ({"cron": "0 22 * *"}, "schedules[0].cron", "must have five fields"),
        ({"cron": "0 0 22 * * *"}, "schedules[0].cron", "must have five fields"),
        ({"cron": "@daily"}, "schedules[0].cron", "must have five fields"),
        ({"cron": "0 25 * * *"}, "schedules[0].cron", "bad hour"),
        ({"cron": "0 0 30 2 *"}, "schedules[0].cron", "bad day-of-month"),
        ({"time_zone": "Europe/Atlantis"}, "schedules[0].time_zone", "IANA's name, such as Europe/Berlin"),
        ({"time_zone": "Europe"}, "schedules[0].time_zone", "IANA's name"),
        ({"time_zone": "../../etc/passwd"}, "schedules[0].time_zone", "IANA's name"),
        ({"time_zone": "/etc/localtime"}, "schedules[0].time_zone", "IANA's name"),
        ({"duration_seconds": 59}, "schedules[0].duration_seconds", "60 or more"),
        ({"max_replicas": None}, "schedules[0]", "give min_replicas, max_replicas or both"),
        ({"min_replicas": 2}, "schedules[0]", "must not be greater"),
        ({"max_replicas": 0}, "", "schedules: night would have min_replicas 1 and max_replicas 0; give it both"),
        ({"until": "x"}, "schedules[0].until", "is not known here"),
    ],
)
def test_a_schedule_that_cannot_be_followed_is_refused(change: dict[str, Any], path: str, words: str) -> None:
    with pytest.raises(SpecError) as refused:
        parse_one({**SET, "schedules": [{**NIGHT, **change}]})
    [fault] = refused.value.faults
    assert fault.path == path
    assert words in fault.message


def test_two_schedules_of_one_name_are_refused() -> None:
    with pytest.raises(SpecError, match="each name may be given once"):
        parse_one({**SET, "schedules": [NIGHT, NIGHT]})


@pytest.mark.parametrize(
    ("policies", "path", "words"),
    [
        ({"select_policy": "max"}, "scale_up.select_policy", "must be one of 'Max', 'Min' or 'Disabled'"),
        ({"policies": [{"type": "Pods", "value": 1, "period_seconds": 1}]}, "scale_up.policies[0].type", "'Replicas'"),
        (
            {"policies": [{"type": "Percent", "value": 0, "period_seconds": 1}]},
            "scale_up.policies[0].value",
            "1 or more",
        ),
        (
            {"policies": [{"type": "Percent", "value": 1, "period_seconds": 0}]},
            "scale_up.policies[0].period_seconds",
            "more than 0",
        ),
    ],
)
def test_a_policy_that_makes_no_sense_is_refused(policies: dict[str, Any], path: str, words: str) -> None:
    with pytest.raises(SpecError) as refused:
        parse_one({**SET, "scale_up": policies})
    [fault] = refused.value.faults
    assert fault.path == path
    assert words in fault.message


def test_only_sets_that_slurm_runs_have_schedules_and_a_mode() -> None:
    external = {"name": "box", "model": "m", "endpoints": [{"url": "http://h:1"}]}
    for more in ({"schedules": [NIGHT | {"max_replicas": 1}]}, {"mode": "advisory"}):
        with pytest.raises(SpecError, match="is only for sets that Slurm runs"):
            parse_one({**external, **more})
