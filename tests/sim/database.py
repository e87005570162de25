"""The one real database, for one life after another."""

from __future__ import annotations

from controlplane.db import Database, DatabaseOptions
from controlplane.db.pool import Connection

TABLES = (  # who refers to others before them; all with an id that counts, if True
    ("slurm_job_history", True),
    ("slurm_jobs", False),
    ("endpoint_history", True),
    ("endpoints", True),
    ("job_logs", False),
    ("back_offs", False),
    ("replica_history", False),
    ("replicas", True),
    ("decisions", True),
    ("audit", True),
    ("freezes", False),
    ("node_history", True),
    ("nodes", False),
    ("replica_sets", False),
    ("alert_deliveries", False),
    ("alerts", False),
    ("held_requests", False),
    ("webhook_signatures", False),
    ("leases", False),
    ("job_runs", False),
    ("usage", False),
    ("usage_batches", False),
    ("tenant_months", False),
    ("limit_parts", False),
    ("proxy_workers", False),
)
_EMPTY = "; ".join(f"DELETE FROM {table}" for table, _ in TABLES)
_COUNT_ANEW = "SELECT " + ", ".join(
    f"setval(pg_get_serial_sequence('{table}', 'id'), 1, false)" for table, counts in TABLES if counts
)


class _Close(Database):
    """The server is here, and stays: nobody asks it so before each use, which would be half of all that is asked."""

    async def _check(self, connection: Connection) -> None:
        pass


def open_database(url: str) -> Database:
    return _Close(DatabaseOptions(url=url, max_connections=1, timeout_seconds=60))


async def empty(db: Database) -> None:
    """Not by TRUNCATE, which takes longer than many a life does."""
    async with db.transaction() as connection:
        await connection.execute(_EMPTY)
        await connection.execute(_COUNT_ANEW)
