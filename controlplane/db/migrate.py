"""Brings a database to this version's schema: plain SQL files in order, applied once, by yoyo-migrations.

Safe to run from several hosts at once: a session-wide advisory lock lets one of them work at a time. It is the
server that frees the lock, so a killed migration leaves none behind (yoyo's own lock table would).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import psycopg
import yoyo
from psycopg.conninfo import conninfo_to_dict

from controlplane.db.errors import DatabaseError, DbUnavailable
from controlplane.db.pool import Database

DIRECTORY = Path(__file__).parent / "migrations"
_LOCK = 0x636F6E74726F6C  # "control": any constant that nobody else in this database uses
OLDEST_SERVER = 140000


def migrate(url: str) -> list[str]:
    """Apply what is missing; returns the ids of the migrations applied. Raises DbUnavailable, DatabaseError."""
    with _locked(url), _backend(url) as (backend, migrations):
        missing = backend.to_apply(migrations)
        try:
            backend.apply_migrations(missing)
        except psycopg.Error as error:
            raise DatabaseError(f"a migration failed and was rolled back: {error}") from error
        return [migration.id for migration in missing]


async def missing_migrations(db: Database, *, timeout_seconds: float | None = None) -> list[str]:
    """Ids of the migrations that this version has and the database lacks. Raises DbUnavailable.

    Read from what yoyo has written down: takes no lock, so that it can be asked at any time.
    """
    applied: set[str] = set()
    async with db.connection(timeout_seconds=timeout_seconds) as connection:
        try:
            cursor = await connection.execute("SELECT migration_id FROM _yoyo_migration")
            applied = {one["migration_id"] for one in await cursor.fetchall()}
        except psycopg.errors.UndefinedTable:
            pass  # none ever was
    return sorted({file.stem for file in DIRECTORY.glob("*.sql")} - applied)


@contextmanager
def _locked(url: str) -> Iterator[None]:
    try:
        connection = psycopg.connect(url, autocommit=True, connect_timeout=10)
    except psycopg.Error as error:
        raise DbUnavailable(str(error)) from error
    with connection:
        if connection.info.server_version < OLDEST_SERVER:
            raise DatabaseError(f"PostgreSQL 14 or newer is needed; this is {connection.info.server_version // 10000}")
        connection.execute("SELECT pg_advisory_lock(%s)", (_LOCK,))
        yield


@contextmanager
def _backend(url: str) -> Iterator[tuple[Any, Any]]:
    # yoyo knows fewer URL forms than libpq: let psycopg read the URL and hand yoyo the parts as arguments
    backend = yoyo.get_backend("postgresql+psycopg:///?" + urlencode(_arguments(url)))
    try:
        yield backend, yoyo.read_migrations(str(DIRECTORY))
    finally:
        backend.connection.close()


def _arguments(url: str) -> dict[str, str]:
    return {key: str(value) for key, value in conninfo_to_dict(url).items() if value is not None}
