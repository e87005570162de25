"""What the proxy knows follows the database at once, and outlives it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import replace
from urllib.parse import urlsplit

import pytest
from loguru import logger

from controlplane.clock import utc_now
from controlplane.core.types import Health
from controlplane.db import Database, endpoints, keys, replica_sets
from tests.conftest import eventually
from tests.integration.proxy_rig import (
    MODEL,
    QUICK,
    SECONDS,
    Connection,
    Received,
    make_key,
    make_routable,
    opened,
    running_proxy,
    until,
    until_status,
    upstream,
)


@pytest.fixture
async def db(database_url: str) -> AsyncIterator[Database]:
    async with opened(database_url) as database:
        yield database


@pytest.fixture
def lines() -> Iterator[list[str]]:
    """What is logged from level INFO on."""
    seen: list[str] = []
    sink = logger.add(lambda message: seen.append(message.record["message"]), level="INFO")
    yield seen
    logger.remove(sink)


async def reply(request: Received, connection: Connection) -> None:
    await connection.answer(b"{}")


class Wire:
    """A way to PostgreSQL that can be cut, and be laid again."""

    def __init__(self, database_url: str) -> None:
        self._there = urlsplit(database_url)
        self._ends: set[asyncio.StreamWriter] = set()
        self._server: asyncio.Server | None = None
        self._port = 0

    @property
    def url(self) -> str:
        login = self._there.netloc.rpartition("@")[0]
        return self._there._replace(netloc=f"{login}@127.0.0.1:{self._port}").geturl()

    async def lay(self) -> None:
        self._server = await asyncio.start_server(self._connect, "127.0.0.1", self._port)
        self._port = self._server.sockets[0].getsockname()[1]

    async def cut(self) -> None:
        assert self._server is not None
        self._server.close()
        for end in self._ends:
            end.transport.abort()
        await self._server.wait_closed()

    async def _connect(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        server = self._server
        far_reader, far_writer = await asyncio.open_connection(self._there.hostname, self._there.port)
        if server is not self._server or server is None or not server.is_serving():
            writer.transport.abort()  # it was cut meanwhile
            far_writer.transport.abort()
            return
        self._ends |= {writer, far_writer}
        await asyncio.gather(_copy(reader, far_writer), _copy(far_reader, writer))
        self._ends -= {writer, far_writer}


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()
    except ConnectionError:
        pass
    finally:
        writer.close()


@asynccontextmanager
async def laid_wire(database_url: str) -> AsyncIterator[Wire]:
    wire = Wire(database_url)
    await wire.lay()
    try:
        yield wire
    finally:
        await wire.cut()


async def test_what_changes_in_the_database_is_followed_at_once(db: Database) -> None:
    options = replace(QUICK, refresh_seconds=60.0)
    key = await make_key(db)
    async with upstream(reply) as one, upstream(reply) as two, running_proxy(db, options, key=key) as proxy:
        assert (await proxy.chat()).status_code == 404
        name = await make_routable(db, one.url)
        await until_status(proxy.chat, 200)
        [endpoint] = await endpoints.load_live(db)
        await endpoints.save(db, replace(endpoint, health=Health.FAILING, failing_since=utc_now()), seen=endpoint)
        await until_status(proxy.chat, 503)
        await make_routable(db, two.url)
        await until_status(proxy.chat, 200)
        assert len(two.requests) == 1
        await replica_sets.pause(db, name, actor="test", now=utc_now())
        await until_status(proxy.chat, 503)


async def test_a_new_key_works_and_a_revoked_key_stops_working_at_once(db: Database) -> None:
    async with running_proxy(db) as proxy:
        key = await make_key(db)
        proxy.client.headers["authorization"] = f"Bearer {key}"

        await until_status(proxy.models, 200)
        await keys.revoke(db, key, utc_now(), actor="test")
        await until_status(proxy.models, 401)


async def test_a_stream_goes_on_when_its_endpoint_is_no_longer_routable_and_then_its_connection_is_closed(
    db: Database,
) -> None:
    go_on, closed = asyncio.Event(), asyncio.Event()

    async def slow(request: Received, connection: Connection) -> None:
        await connection.begin_stream()
        await connection.event("1")
        await go_on.wait()
        await connection.event("[DONE]")
        await connection.end_stream()
        await connection.closed_by_the_proxy()
        closed.set()

    async with upstream(slow) as server:
        name = await make_routable(db, server.url)
        async with running_proxy(db, replace(QUICK, keepalive_seconds=60.0), key=await make_key(db)) as proxy:
            async with proxy.client.stream("POST", "/v1/completions", json={"model": MODEL}) as response:
                pieces = response.aiter_raw()
                assert await anext(pieces) == b"data: 1\n\n"
                await replica_sets.pause(db, name, actor="test", now=utc_now())
                await until(proxy.models, lambda answer: answer.json()["data"][0]["state"] == "paused")
                go_on.set()
                assert b"".join([piece async for piece in pieces]) == b"data: [DONE]\n\n"
            async with asyncio.timeout(SECONDS):
                await closed.wait()


async def test_an_idle_connection_to_an_endpoint_that_is_no_longer_routable_is_closed(db: Database) -> None:
    closed = asyncio.Event()

    async def watch(request: Received, connection: Connection) -> None:
        await connection.answer(b"{}")
        await connection.closed_by_the_proxy()
        closed.set()

    async with upstream(watch) as server:
        name = await make_routable(db, server.url)
        async with running_proxy(db, replace(QUICK, keepalive_seconds=60.0), key=await make_key(db)) as proxy:
            assert (await proxy.chat()).status_code == 200
            await replica_sets.pause(db, name, actor="test", now=utc_now())
            async with asyncio.timeout(SECONDS):
                await closed.wait()


async def test_requests_go_on_while_postgresql_is_away_and_changes_are_seen_when_it_is_back(
    db: Database, database_url: str, lines: list[str]
) -> None:
    options = replace(QUICK, refresh_seconds=0.2)
    async with (
        laid_wire(database_url) as wire,
        opened(wire.url, timeout_seconds=1.0) as cut_off,
        upstream(reply) as server,
    ):
        await make_routable(db, server.url)
        async with running_proxy(cut_off, options, key=await make_key(db)) as proxy:
            await until(proxy.ready, lambda answer: answer.json() == {"status": "ready"})
            lines.clear()  # on a busy machine a read may have taken too long before
            await wire.cut()
            degraded = await until(proxy.ready, lambda answer: answer.json()["status"] == "degraded")
            assert degraded.status_code == 200
            assert degraded.json()["message"].startswith("PostgreSQL cannot be read: the endpoints and keys in use are")
            assert (await proxy.chat()).status_code == 200
            await eventually(lambda: "the directory cannot be read; the last one stays in use" in lines)
            before = proxy.metric("proxy_directory_age_seconds")
            await eventually(lambda: proxy.metric("proxy_directory_age_seconds") > before + 1.5)  # others failed, too
            assert lines.count("the directory cannot be read; the last one stays in use") == 1

            later = await make_key(db)
            await wire.lay()
            proxy.client.headers["authorization"] = f"Bearer {later}"
            await until(proxy.chat, lambda answer: answer.status_code == 200)
            await until(proxy.ready, lambda answer: answer.json() == {"status": "ready"})
            await eventually(lambda: proxy.metric("proxy_directory_age_seconds") < 0.5)
    assert "the directory can be read again" in lines
    assert "the directory is not told of changes" not in lines


async def test_changes_are_heard_of_again_after_the_listening_connection_broke(db: Database) -> None:
    async with running_proxy(db) as proxy:
        key = await make_key(db)
        proxy.client.headers["authorization"] = f"Bearer {key}"

        await until_status(proxy.models, 200)
        [listener] = await listeners(db)
        async with db.connection() as connection:
            await connection.execute("SELECT pg_terminate_backend(%s)", (listener,))
        await until(lambda: listeners(db), lambda found: found and found != [listener])
        await keys.revoke(db, key, utc_now(), actor="test")
        await until_status(proxy.models, 401)


async def listeners(db: Database) -> list[int]:
    """The server's processes that listen for changes of this database."""
    async with db.connection() as connection:
        cursor = await connection.execute(
            "SELECT pid FROM pg_stat_activity WHERE query LIKE 'LISTEN%' AND datname = current_database()"
        )
        return [row["pid"] for row in await cursor.fetchall()]


async def test_before_the_first_read_the_proxy_is_unready_and_answers_503(database_url: str) -> None:
    async with laid_wire(database_url) as wire, opened(wire.url, timeout_seconds=0.3) as cut_off:
        await wire.cut()
        async with running_proxy(cut_off, replace(QUICK, refresh_seconds=0.2)) as proxy:
            ready = await proxy.ready()
            assert ready.status_code == 503
            assert ready.json()["status"] == "unready"
            assert "PostgreSQL" in ready.json()["message"]
            assert (await proxy.client.get("/health")).status_code == 200
            for response in (await proxy.chat(), await proxy.models()):
                assert response.status_code == 503
                assert response.json()["error"]["type"] == "service_unavailable_error"
                assert response.headers["retry-after"] == "5"
            await wire.lay()
            await until(proxy.ready, lambda answer: answer.json() == {"status": "ready"})
            assert (await proxy.chat()).status_code == 401
