"""How requests shall be shared out reaches the proxies at once, and touches no replica."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import suppress
from dataclasses import replace

import pytest

from controlplane.core.types import (
    ChooseBy,
    ExternalEndpoint,
    Health,
    Phase,
    ReplicaSetSpec,
    RoutingPolicy,
)
from controlplane.db import Database, endpoints, replica_sets
from controlplane.proxy.directory import Directory, Snapshot
from tests.conftest import eventually
from tests.integration.db_rows import NOW, make_ready, make_replica, make_set, opened

PREFIX = RoutingPolicy(ChooseBy.PREFIX, weight=300, slow_start_seconds=5, max_in_flight=64)
SESSION = RoutingPolicy(ChooseBy.SESSION, session_header="x-chat")


@pytest.fixture
async def db(database_url: str) -> AsyncIterator[Database]:
    async with opened(database_url) as opened_db:
        yield opened_db


async def make_external(db: Database, name: str, routing: RoutingPolicy, priority: int = 100) -> None:
    """A set of one fixed endpoint that has proven itself, of the same model as `make_set`'s."""
    url = f"http://{name}:8000"
    spec = ReplicaSetSpec(name, "m", priority=priority, endpoints=(ExternalEndpoint(url),), routing=routing)
    await replica_sets.apply(db, spec, actor="test", now=NOW)
    for one in await endpoints.load_live(db):
        if one.url == url and one.health is not Health.READY:
            ready = replace(one, health=Health.READY, first_ready_at=NOW, confirmed_at=NOW)
            await endpoints.save(db, ready, seen=one)


async def test_a_running_replica_is_routed_as_its_set_says_now_and_is_not_rolled(db: Database) -> None:
    before = await make_set(db)
    replica = await make_replica(db, before, Phase.RUNNING)
    await make_ready(db, replica, "http://n1:20000")
    (endpoint,) = await endpoints.load_routable(db)
    assert endpoint.routing == RoutingPolicy()
    after = await make_set(db, routing=PREFIX)
    assert after.spec_hash == before.spec_hash == replica.spec_hash
    assert after.spec.routing == PREFIX
    (endpoint,) = await endpoints.load_routable(db)
    assert endpoint.routing == PREFIX
    assert (endpoint.weight, endpoint.max_in_flight) == (300, 64)


async def test_a_set_that_was_applied_before_there_was_routing_has_the_defaults(db: Database) -> None:
    await make_external(db, "old", PREFIX)
    async with db.connection() as connection:
        await connection.execute("UPDATE replica_sets SET spec = spec - 'routing'")
    (endpoint,) = await endpoints.load_routable(db)
    assert endpoint.routing == RoutingPolicy()
    assert (await replica_sets.load(db, "old")).spec.routing == RoutingPolicy()


async def test_proxies_hear_at_once_of_another_policy_and_of_another_set_that_says_it(db: Database) -> None:
    read: list[Snapshot] = []
    directory = Directory(db, refresh_seconds=60, on_read=read.append)
    await make_external(db, "first", SESSION)
    await make_external(db, "second", PREFIX, priority=200)
    assert await directory.refresh()
    assert read[-1].routing == {"m": SESSION}
    assert {one.replica_set: one.routing for one in read[-1].endpoints["m"]} == {"first": SESSION, "second": PREFIX}
    running = asyncio.create_task(directory.run())
    try:
        count = len(read)
        await eventually(lambda: len(read) > count)  # it listens, and has read what it may have missed
        await make_external(db, "first", RoutingPolicy())
        await eventually(lambda: read[-1].routing == {"m": RoutingPolicy()})
        await make_external(db, "second", PREFIX, priority=50)
        await eventually(lambda: read[-1].routing == {"m": PREFIX})
        await replica_sets.pause(db, "second", actor="test", now=NOW)
        await eventually(lambda: read[-1].routing == {"m": RoutingPolicy()})
    finally:
        running.cancel()
        with suppress(asyncio.CancelledError):
            await running
