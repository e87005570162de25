"""Times as other people's JSON writes them."""

from __future__ import annotations

import re
from datetime import UTC, date, datetime, timedelta

_RFC3339 = re.compile(
    r"(?P<seconds>\d{4}-\d\d-\d\d[Tt ]\d\d:\d\d:\d\d)(?:\.(?P<fraction>\d+))?(?P<zone>[Zz]|[+-]\d\d:\d\d)", re.ASCII
)


def parse_time(text: str) -> datetime:
    """Read an RFC 3339 time with any zone offset, as UTC. Raises ValueError.

    Go writes up to nine digits of fraction; what is finer than a microsecond is cut, never rounded, so that the same
    text is the same time wherever it was read.
    """
    match = _RFC3339.fullmatch(text)
    if match is None:
        raise ValueError("must be an RFC 3339 time, such as 2026-01-31T12:00:00Z")
    fraction = (match["fraction"] or "0")[:6].ljust(6, "0")
    zone = "+00:00" if match["zone"] in "Zz" else match["zone"]
    try:
        return datetime.fromisoformat(f"{match['seconds'].upper()}.{fraction}{zone}").astimezone(UTC)
    except (ValueError, OverflowError):
        raise ValueError("is no time of any calendar") from None


_AGO = re.compile(r"-(\d{1,6})([smhd])", re.ASCII)
_UNITS = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days"}


def parse_moment(text: str, now: datetime) -> datetime:
    """A moment of the past, as people write it: ISO 8601 with its zone, or how long ago. Raises ValueError."""
    try:
        if match := _AGO.fullmatch(text):
            return now - timedelta(**{_UNITS[match[2]]: int(match[1])})
        time = datetime.fromisoformat(text)
        moment = time.astimezone(UTC) if time.tzinfo is not None else None
    except (ValueError, OverflowError):
        moment = None
    if moment is None:
        raise ValueError(
            f"{text[:64]!r} is neither a time with its zone, as 2026-01-31T18:00+01:00, "
            "nor how long ago, as -90s, -10m, -2h or -3d"
        )
    if moment > now:
        raise ValueError(f"{text[:64]} is still to come; give a moment of the past")
    return moment


def parse_month(text: str) -> tuple[date, date]:
    """`2026-11` as its first day, and the first of the next month. Raises ValueError with a sentence."""
    if not re.fullmatch(r"[1-9]\d{3}-(0[1-9]|1[0-2])", text, re.ASCII):
        raise ValueError(f"{text[:64]!r} is no month, as 2026-11")
    first = date(int(text[:4]), int(text[5:]), 1)
    if (first.year, first.month) == (date.max.year, 12):
        raise ValueError(f"{text!r} is too late")
    return first, (first + timedelta(days=31)).replace(day=1)
