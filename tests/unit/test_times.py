"""RFC 3339 as Go and others write it."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta, timezone

import pytest
from hypothesis import given
from hypothesis import strategies as st

from controlplane.core.times import parse_moment, parse_time

NOW = datetime(2026, 1, 31, 12, tzinfo=UTC)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("2026-11-22T09:51:20Z", datetime(2026, 11, 22, 9, 51, 20, tzinfo=UTC)),
        ("2026-11-22t09:51:20z", datetime(2026, 11, 22, 9, 51, 20, tzinfo=UTC)),
        ("2026-11-22T09:51:20.5Z", datetime(2026, 11, 22, 9, 51, 20, 500_000, tzinfo=UTC)),
        ("2026-11-22T09:51:20.859368999Z", datetime(2026, 11, 22, 9, 51, 20, 859_368, tzinfo=UTC)),
        ("2026-11-22T11:21:20+01:30", datetime(2026, 11, 22, 9, 51, 20, tzinfo=UTC)),
        ("2026-11-22T00:51:20-09:00", datetime(2026, 11, 22, 9, 51, 20, tzinfo=UTC)),
        ("0001-01-01T00:00:00Z", datetime(1, 1, 1, tzinfo=UTC)),
    ],
)
def test_any_fraction_and_any_zone_is_read_as_utc(text: str, expected: datetime) -> None:
    assert parse_time(text) == expected
    assert parse_time(text).tzinfo is UTC


@pytest.mark.parametrize(
    "text",
    [
        "",
        "now",
        "2026-11-22",
        "2026-11-22T09:51:20",
        "2026-11-22T09:51:20Z ",
        "2026-13-22T09:51:20Z",
        "2026-11-22T09:51:60Z",
        "0001-01-01T00:00:00+01:00",
        "9999-12-31T23:59:59-01:00",
        "٢٠٢٦-11-22T09:51:20Z",
        "1795341083",
    ],
)
def test_what_is_no_time_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"must be an RFC 3339 time|is no time"):
        parse_time(text)


@given(
    st.datetimes(min_value=datetime(1900, 1, 1), max_value=datetime(2200, 1, 1)),  # noqa: DTZ001 (the zone is drawn)
    st.integers(-14 * 60, 14 * 60),
)
def test_every_time_is_read_back_as_it_was_written(naive: datetime, offset_minutes: int) -> None:
    time = naive.replace(tzinfo=timezone(timedelta(minutes=offset_minutes)))
    assert parse_time(time.isoformat()) == time


@pytest.mark.parametrize(
    ("text", "moment"),
    [
        ("-90s", NOW - timedelta(seconds=90)),
        ("-10m", NOW - timedelta(minutes=10)),
        ("-2h", NOW - timedelta(hours=2)),
        ("-3d", NOW - timedelta(days=3)),
        ("2026-01-31T11:30+01:00", datetime(2026, 1, 31, 10, 30, tzinfo=UTC)),
        ("2026-01-31 11:30:05.5Z", datetime(2026, 1, 31, 11, 30, 5, 500_000, tzinfo=UTC)),
        (NOW.isoformat(), NOW),
    ],
)
def test_a_moment_is_a_time_with_its_zone_or_how_long_ago(text: str, moment: datetime) -> None:
    assert parse_moment(text, NOW) == moment
    assert parse_moment(text, NOW).tzinfo is UTC


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "neither"),
        ("10m", "neither"),
        ("-10", "neither"),
        ("-10w", "neither"),
        ("-1000000d", "neither"),
        ("-999999d", "neither"),
        ("yesterday", "neither"),
        ("2026-01-31T11:30", "neither"),
        ("0001-01-01T00:00+01:00", "neither"),
        ("2026-01-31T11:30 01:00", "neither"),
        ("2999-01-01T00:00Z", "still to come"),
    ],
)
def test_a_moment_that_is_unclear_or_to_come_is_refused_by_name(text: str, why: str) -> None:
    with pytest.raises(ValueError, match=why) as refused:
        parse_moment(text, NOW)
    assert text in str(refused.value)
