"""Tenants and their API keys. A key is shown once, when it is made; only its hash is kept."""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Iterable
from datetime import datetime

from psycopg.rows import DictRow

from controlplane.core.types import ApiKey
from controlplane.db import audit
from controlplane.db.errors import NotFound
from controlplane.db.pool import Database

_PREFIX_LENGTH = 11  # "sk-" and 8 characters: enough to tell keys apart, far too few to guess the rest

_COLUMNS = "id, tenant, prefix, key_hash, models, created_at, expires_at, revoked_at"
ACTIVE = (
    f"SELECT {_COLUMNS} FROM api_keys "
    "WHERE revoked_at IS NULL AND (expires_at IS NULL OR expires_at > %s) ORDER BY id DESC"
)


def hash_key(key: str) -> bytes:
    """SHA-256: a key has 256 random bits, so that neither salt nor slowness would add anything."""
    return hashlib.sha256(key.encode()).digest()


async def create(
    db: Database, tenant: str, *, models: Iterable[str] | None, expires_at: datetime | None, actor: str, now: datetime
) -> tuple[str, ApiKey]:
    """Make a key for a tenant, which is made too if it is new. Returns the key itself, for this one time."""
    key = "sk-" + secrets.token_urlsafe(32)
    async with db.transaction() as connection:
        await connection.execute("INSERT INTO tenants (name) VALUES (%s) ON CONFLICT DO NOTHING", (tenant,))
        cursor = await connection.execute(
            "INSERT INTO api_keys (tenant, prefix, key_hash, models, created_at, expires_at) "
            f"VALUES (%s, %s, %s, %s, %s, %s) RETURNING {_COLUMNS}",
            (tenant, key[:_PREFIX_LENGTH], hash_key(key), list(models) if models else None, now, expires_at),
        )
        row = await cursor.fetchone()
        assert row is not None
        made = _api_key(row)
        what = "every model" if made.models is None else ", ".join(sorted(made.models))
        end = f" until {expires_at.isoformat()}" if expires_at is not None else ""
        words = f"key {made.prefix}... made for {tenant}{end}: {what}"
        await audit.record(connection, audit.Said(now, actor, "API key", made.prefix, words))
    return key, made


async def load_all(db: Database) -> tuple[ApiKey, ...]:
    """Every key ever made, newest first."""
    async with db.connection() as connection:
        cursor = await connection.execute(f"SELECT {_COLUMNS} FROM api_keys ORDER BY id DESC")
        return keys_of(await cursor.fetchall())


async def revoke(db: Database, prefix: str, now: datetime, *, actor: str) -> ApiKey:
    """Make a key worthless, for good; again is harmless. Raises NotFound."""
    prefix = prefix[:_PREFIX_LENGTH]
    async with db.transaction() as connection:
        cursor = await connection.execute(
            "UPDATE api_keys SET revoked_at = %s WHERE prefix = %s AND revoked_at IS NULL", (now, prefix)
        )
        is_news = cursor.rowcount == 1
        cursor = await connection.execute(f"SELECT {_COLUMNS} FROM api_keys WHERE prefix = %s", (prefix,))
        row = await cursor.fetchone()
        if row is None:
            raise NotFound(f"no API key begins with {prefix!r}")
        if is_news:
            words = f"key {prefix}... of {row['tenant']} revoked"
            await audit.record(connection, audit.Said(now, actor, "API key", prefix, words))
    return _api_key(row)


def keys_of(rows: list[DictRow]) -> tuple[ApiKey, ...]:
    """What a query of `_COLUMNS` has found, such as `ACTIVE`."""
    return tuple(_api_key(row) for row in rows)


def _api_key(row: DictRow) -> ApiKey:
    models = row["models"]
    return ApiKey(**{**row, "models": None if models is None else frozenset(models)})
