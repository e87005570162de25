"""The only room that speaks SQL. One file per noun; psycopg's exceptions stop at this door.

`Database` is the pool; the functions of the nouns' modules take it and read or write in one short transaction each.
A write that depends on what was read is guarded (`WHERE phase = ... AND version = ...`) and raises `Stale` when
somebody else has moved on; callers drop such a write and look again in their next round.
"""

from controlplane.db.errors import DatabaseError, DbUnavailable, Duplicate, NotFound, Stale
from controlplane.db.migrate import migrate, missing_migrations
from controlplane.db.pool import (
    ENDPOINTS_CHANNEL,
    PULL_CHANNEL,
    WAKE_CHANNEL,
    WORKERS_CHANNEL,
    Database,
    DatabaseOptions,
    process_name,
)

__all__ = [
    "ENDPOINTS_CHANNEL",
    "PULL_CHANNEL",
    "WAKE_CHANNEL",
    "WORKERS_CHANNEL",
    "Database",
    "DatabaseError",
    "DatabaseOptions",
    "DbUnavailable",
    "Duplicate",
    "NotFound",
    "Stale",
    "migrate",
    "missing_migrations",
    "process_name",
]
