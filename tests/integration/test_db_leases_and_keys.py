"""Leases judged by the database's clock, and API keys that are shown once."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from datetime import timedelta

import pytest

from controlplane.db import (
    Database,
    DatabaseOptions,
    DbUnavailable,
    NotFound,
    directory,
    keys,
    leases,
    missing_migrations,
    replica_sets,
)
from tests.conftest import eventually
from tests.integration.db_rows import NOW, make_set, opened

LONG, SHORT = timedelta(minutes=10), timedelta(milliseconds=50)


@pytest.fixture
async def db(database_url: str) -> AsyncIterator[Database]:
    async with opened(database_url) as opened_db:
        yield opened_db


async def test_a_lease_is_kept_by_its_holder_and_denied_to_others(db: Database) -> None:
    assert await leases.acquire(db, "reconcile", "one", LONG) == 1
    assert await leases.acquire(db, "reconcile", "two", LONG) is None
    assert await leases.acquire(db, "reconcile", "one", LONG) == 1
    assert await leases.load_held(db) == [leases.Lease("reconcile", "one", 1)]


async def test_a_holder_that_is_stopped_amid_a_transaction_keeps_nobody_waiting(
    db: Database, database_url: str
) -> None:
    async def sleep_amid_a_transaction(sleeper: Database) -> None:
        async with sleeper.transaction() as connection:
            await connection.execute("SELECT FROM replica_sets FOR UPDATE")
            await replica_sets.scale(db, "a", replicas=2, actor="other", now=NOW)  # which needs the row
            await connection.execute("UPDATE replica_sets SET desired_replicas = 1")

    await make_set(db)
    async with opened(database_url) as sleeper:
        with pytest.raises(DbUnavailable):
            await sleep_amid_a_transaction(sleeper)
    assert (await replica_sets.load(db, "a")).desired_replicas == 2


async def test_the_term_grows_when_a_lease_passes_on(db: Database) -> None:
    assert await leases.acquire(db, "reconcile", "one", SHORT) == 1

    async def second() -> int:
        return await leases.acquire(db, "reconcile", "two", LONG) or 0

    term: int = await eventually(second)
    assert term == 2
    assert await leases.acquire(db, "reconcile", "one", LONG) is None


async def test_a_lease_given_back_is_free_at_once_and_only_its_holder_can_give_it(db: Database) -> None:
    await leases.acquire(db, "reconcile", "one", LONG)
    await leases.give_back(db, "reconcile", "two")
    assert await leases.acquire(db, "reconcile", "two", LONG) is None
    await leases.give_back(db, "reconcile", "one")
    assert await leases.load_held(db) == []
    assert await leases.acquire(db, "reconcile", "two", LONG) == 2


async def test_of_many_who_ask_at_once_one_gets_the_lease(db: Database) -> None:
    terms = await asyncio.gather(*(leases.acquire(db, "reconcile", str(i), LONG) for i in range(8)))
    assert sorted(term for term in terms if term is not None) == [1]


async def test_a_key_is_known_by_its_hash_only_and_revoked_by_its_prefix(db: Database) -> None:
    key, made = await keys.create(db, "lab", models=["m"], expires_at=NOW + LONG, actor="ann", now=NOW)
    assert made.key_hash == keys.hash_key(key)
    assert key.startswith(made.prefix)
    assert (made.tenant, made.models) == ("lab", frozenset({"m"}))
    async with db.connection() as connection:
        row = await (await connection.execute("SELECT api_keys::text AS all FROM api_keys")).fetchone()
    assert row is not None
    assert key not in row["all"]
    assert (await directory.read(db, NOW)).keys == (made,)
    assert (await directory.read(db, NOW + LONG)).keys == ()
    revoked = await keys.revoke(db, key, NOW, actor="ann")
    assert await keys.revoke(db, made.prefix, NOW + LONG, actor="ann") == revoked
    assert (await directory.read(db, NOW)).keys == ()
    with pytest.raises(NotFound):
        await keys.revoke(db, "sk-nobody00", NOW, actor="ann")


async def test_a_migrated_database_lacks_nothing_and_an_empty_one_lacks_all(db: Database) -> None:
    assert await missing_migrations(db) == []
    async with db.connection() as connection:
        await connection.execute("DROP TABLE _yoyo_migration")
    assert await missing_migrations(db) != []


async def test_a_database_that_is_away_is_unavailable_and_nothing_else(free_port: int) -> None:
    options = DatabaseOptions(url=f"postgresql://u:p@127.0.0.1:{free_port}/x", timeout_seconds=0.2)
    async with Database(options) as db:
        with pytest.raises(DbUnavailable):
            await db.ping()
