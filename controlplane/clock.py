"""The wall clock, read in one place. Rules get `now` as an argument; only loops and handlers ask."""

from __future__ import annotations

from datetime import UTC, datetime


def utc_now() -> datetime:
    """The time, aware, in UTC."""
    return datetime.now(UTC)
