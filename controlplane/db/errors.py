"""What a caller can do about a database that did not do as asked."""

from __future__ import annotations


class DatabaseError(Exception):
    """The database answered, and not with what was asked for."""


class DbUnavailable(DatabaseError):
    """No answer: nothing is known of this call's outcome. Try again later; every write here may be repeated."""


class Stale(DatabaseError):
    """The guard matched no row: somebody else has moved on. Drop the write and look again."""


class Duplicate(DatabaseError):
    """There is one already."""


class NotFound(DatabaseError):
    """There is none of that name."""
