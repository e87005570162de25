"""Connections to PostgreSQL, as the operating system sees them."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress

import psycopg
import pytest

from controlplane.db import Database, DatabaseOptions, DbUnavailable
from controlplane.db.pool import Connection
from tests.conftest import eventually
from tests.integration.db_rows import opened


async def test_a_host_that_is_gone_is_noticed_in_seconds(database_url: str) -> None:
    """Its silence cannot be had without a firewall: what is asked of the kernel can be looked at."""
    async with opened(database_url) as db, db.connection() as connection:
        with socket.socket(fileno=socket.dup(connection.fileno())) as tcp:
            assert tcp.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 10_000  # milliseconds
            assert tcp.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
            idle, between, count = (
                tcp.getsockopt(socket.IPPROTO_TCP, option)
                for option in (socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL, socket.TCP_KEEPCNT)
            )
    assert idle + between * count <= 30


@pytest.mark.parametrize("turns", range(8))
async def test_a_cancellation_that_comes_with_the_connection_is_not_lost(database_url: str, turns: int) -> None:
    """`turns` of the event loop lie between the connection's coming free and the cancellation of who waits for it."""
    async with Database(DatabaseOptions(database_url, max_connections=1)) as db:

        async def use_one() -> None:
            async with db.connection():
                pass
            await asyncio.Event().wait()  # what a loop would do that never heard of its end

        async with db.connection():
            waiting = asyncio.create_task(use_one())
            await asyncio.sleep(0.02)  # it has reached the pool's queue, where the race is; else it passes
        for _ in range(turns):
            await asyncio.sleep(0)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asyncio.wait_for(waiting, timeout=5)
        async with db.connection() as connection:  # and it gave the connection back
            await connection.execute("SELECT 1")


async def test_a_cancelled_query_on_a_server_that_goes_away_ends_cancelled(database_url: str) -> None:
    async with opened(database_url) as db:

        async def ask() -> None:
            async with db.connection() as connection:
                try:
                    await connection.execute("SELECT pg_sleep(60)")
                except asyncio.CancelledError:
                    raise psycopg.OperationalError("the server closed the connection") from None

        asking = asyncio.create_task(ask())
        await asyncio.sleep(0.1)
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking


@asynccontextmanager
async def frozen_backend(connection: Connection) -> AsyncIterator[int]:
    """Stop the server's process behind this connection. Nothing breaks: its kernel goes on answering keep-alives."""
    row = await (await connection.execute("SELECT pg_backend_pid() AS pid")).fetchone()
    assert row is not None
    os.kill(row["pid"], signal.SIGSTOP)
    try:
        yield row["pid"]
    finally:
        os.kill(row["pid"], signal.SIGCONT)


async def test_who_waits_for_a_frozen_server_is_told_that_it_is_away(database_url: str) -> None:
    options = DatabaseOptions(database_url, timeout_seconds=0.2, statement_timeout_seconds=0.2)
    async with Database(options) as db, asyncio.timeout(30):
        with pytest.raises(DbUnavailable):
            async with db.connection() as connection, frozen_backend(connection):
                await connection.execute("SELECT 1")


async def test_an_idle_connection_to_a_frozen_process_is_exchanged(database_url: str) -> None:
    options = DatabaseOptions(database_url, max_connections=1, timeout_seconds=5)
    async with Database(options) as db, asyncio.timeout(60), AsyncExitStack() as stack:
        async with db.connection() as connection:
            frozen = await stack.enter_async_context(frozen_backend(connection))

        async def another() -> bool:
            try:
                async with db.connection() as connection:
                    row = await (await connection.execute("SELECT pg_backend_pid() AS pid")).fetchone()
            except DbUnavailable:
                return False  # the time to get one was spent on looking at the frozen one
            return row is not None and row["pid"] != frozen

        await eventually(another, timeout_seconds=30)


async def test_who_stops_listening_in_the_middle_leaves_nothing_behind_in_the_event_loop(
    database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its socket's number is soon another one's, who would wait for ever if it were no longer watched."""
    loop = asyncio.get_running_loop()
    let_go: list[bool] = []
    remove = loop.remove_reader

    def note(file: int) -> bool:
        was_watched = remove(file)
        with suppress(OSError):
            os.fstat(file)
            let_go.append(was_watched)
        return was_watched

    async with opened(database_url) as db:
        heard = db.listen("one", "two")
        assert await anext(heard) == ""
        async with db.connection() as connection:
            await connection.execute("SELECT pg_notify('two', '')")
        assert await anext(heard) == "two"
        monkeypatch.setattr(loop, "remove_reader", note)
        await heard.aclose()  # type: ignore[attr-defined]  # a generator, whatever it is said to be
        assert let_go == [True], "while the socket was open"


async def test_many_notifications_at_once_are_all_heard(database_url: str) -> None:
    async with opened(database_url) as db:
        heard = db.listen("one", "two")
        assert await anext(heard) == ""
        async with db.connection() as connection:
            await connection.execute("SELECT pg_notify('one', repeat('x', 200) || n) FROM generate_series(1, 2000) n")
            await connection.execute("SELECT pg_notify('two', '')")
        count = 0
        async with asyncio.timeout(20):
            async for channel in heard:
                if channel == "two":
                    break
                count += 1
        await heard.aclose()  # type: ignore[attr-defined]
        assert count == 2000
