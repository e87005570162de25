"""The connection pool, and the door at which psycopg's exceptions stop.

States: `open()` returns at once, connected or not; every later call raises DbUnavailable while PostgreSQL is away and
works again when it is back. Connections commit by themselves; what belongs together says `transaction()`.

A task that is cancelled in here ends cancelled, so that no loop runs on for ever. Below, a cancellation can be lost: to
`asyncio.wait_for` of Python 3.11, when the pool's connection comes at the same moment, and to the error of a server
that goes away while psycopg cancels the query.

A server that is frozen keeps its connections and says nothing; its kernel goes on answering keep-alives. So nothing
here waits for longer than patience allows: then the connection is broken from this side, which is DbUnavailable.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import socket
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from contextlib import aclosing, asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, Self

import psycopg
from psycopg import sql
from psycopg.rows import DictRow, dict_row
from psycopg_pool import AsyncConnectionPool

from controlplane.db.errors import DatabaseError, DbUnavailable, Duplicate

WAKE_CHANNEL = "controlplane_wake"
PULL_CHANNEL = "controlplane_pull"  # wakes the pull of alerts, which no other news concerns
ENDPOINTS_CHANNEL = "controlplane_endpoints"  # announced by the schema's triggers
WORKERS_CHANNEL = "controlplane_workers"  # another proxy's worker shares the limits from now on

Connection = psycopg.AsyncConnection[DictRow]
_TransactionLost = psycopg.errors.IdleInTransactionSessionTimeout

# a host that is gone says nothing: without these a call to it would hang for a quarter of an hour, a listener for hours
_LOST_HOST = {"tcp_user_timeout": 10_000, "keepalives_idle": 10, "keepalives_interval": 5, "keepalives_count": 2}

# a process that is stopped in the middle of a transaction keeps its locks, and everybody else from what they need; ours
# take milliseconds between two statements
_NO_FROZEN_LOCKS = "-c idle_in_transaction_session_timeout=5000"


def process_name() -> str:
    """A name for who writes, among all processes of all hosts, for ever; another one at each call.

    Containers may share a host name and all have the process id 1.
    """
    return f"{socket.gethostname()}/{os.getpid()}/{secrets.token_hex(4)}"


@dataclass(frozen=True, slots=True)
class DatabaseOptions:
    url: str = field(repr=False)
    max_connections: int = 10
    timeout_seconds: float = 5.0  # to get a connection from the pool, and to open one
    statement_timeout_seconds: float = 30.0
    application_name: str = "controlplane"


class Database:
    """A pool of connections. Open it before use, close it after; every noun's function takes it first."""

    def __init__(self, options: DatabaseOptions) -> None:
        self._options = options
        self._pool: AsyncConnectionPool[Connection] = AsyncConnectionPool(
            options.url,
            min_size=1,
            max_size=options.max_connections,
            timeout=options.timeout_seconds,
            reconnect_timeout=0,
            open=False,
            check=self._check,
            kwargs=self._arguments(),
            name=options.application_name,
        )

    async def open(self) -> None:
        await self._pool.open(wait=False)

    async def close(self) -> None:
        await self._pool.close()

    async def __aenter__(self) -> Self:
        await self.open()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    @asynccontextmanager
    async def connection(self, *, timeout_seconds: float | None = None) -> AsyncIterator[Connection]:
        """One connection, committing by itself. Raises DbUnavailable, Duplicate, DatabaseError.

        `timeout_seconds`: to wait for one; None: as long as the options say.
        """
        asked = _cancellations()
        async with _translated(), self._pool.connection(timeout_seconds) as connection:
            if _cancellations() > asked:
                raise asyncio.CancelledError
            with _patience(connection, self._options.statement_timeout_seconds + self._options.timeout_seconds):
                yield connection

    @asynccontextmanager
    async def transaction(self) -> AsyncIterator[Connection]:
        """One connection, one transaction: all of it or nothing. Never hold one across a network call."""
        async with self.connection() as connection, connection.transaction():
            yield connection

    async def ping(self) -> None:
        """Raises DbUnavailable when PostgreSQL does not answer, at once and with the reason.

        Over a connection of its own: the pool goes on trying by itself and could only say that none came in time.
        """
        async with _translated(), await self._connect() as connection:
            await self._check(connection)

    async def wake(self) -> None:
        """`wake`, when nothing else is written."""
        async with self.connection() as connection:
            await wake(connection)

    async def listen(self, *channels: str) -> AsyncIterator[str]:
        """Yield the name of each channel that is notified, over a connection of its own.

        Once connected it yields "" first: what was announced before is lost, so read everything then. Raises
        DbUnavailable when the connection breaks: call it again.
        """
        async with _translated(), await self._connect() as connection:
            for channel in channels:
                await connection.execute(sql.SQL("LISTEN {}").format(sql.Identifier(channel)))
            yield ""
            async with aclosing(_notified(connection)) as notified:  # the loop lets go of the socket while it is open
                async for channel in notified:
                    yield channel

    async def _check(self, connection: Connection) -> None:
        with _patience(connection, self._options.timeout_seconds):
            await AsyncConnectionPool.check_connection(connection)

    async def _connect(self) -> Connection:
        arguments = {**self._arguments(), "connect_timeout": int(self._options.timeout_seconds) or 1}
        return await psycopg.AsyncConnection.connect(self._options.url, **arguments)

    def _arguments(self) -> dict[str, Any]:
        milliseconds = int(self._options.statement_timeout_seconds * 1000)
        return {
            "autocommit": True,
            "row_factory": dict_row,
            "application_name": self._options.application_name,
            **_LOST_HOST,
            "options": f"-c statement_timeout={milliseconds} -c timezone=UTC {_NO_FROZEN_LOCKS}",
        }


async def _notified(connection: Connection) -> AsyncGenerator[str, None]:
    """psycopg's own `notifies` wakes ten times a second to look for signals, which costs an idle process most of what
    it does. Raises psycopg.OperationalError when the connection breaks."""
    loop, server = asyncio.get_running_loop(), connection.pgconn
    has_come = asyncio.Event()
    has_come.set()  # it may have while LISTEN was said
    file = connection.fileno()
    loop.add_reader(file, has_come.set)
    try:
        while True:
            await has_come.wait()
            has_come.clear()
            server.consume_input()
            while (notification := server.notifies()) is not None:
                yield notification.relname.decode()
    finally:
        loop.remove_reader(file)


@asynccontextmanager
async def _translated() -> AsyncIterator[None]:
    asked = _cancellations()
    try:
        yield
    except (psycopg.Error, OSError) as error:
        if _cancellations() > asked:
            raise asyncio.CancelledError from error
        raise _translation(error) from error


@contextmanager
def _patience(connection: Connection, seconds: float) -> Iterator[None]:
    """Break the connection if the block has not ended by then: whoever waits for its server gets an error at once."""
    giving_up = asyncio.get_running_loop().call_later(seconds, _break, connection)
    try:
        yield
    finally:
        giving_up.cancel()


def _break(connection: Connection) -> None:
    with suppress(psycopg.Error, OSError), socket.socket(fileno=socket.dup(connection.fileno())) as tcp:
        tcp.shutdown(socket.SHUT_RDWR)  # not closed: the descriptor must not become somebody else's meanwhile


def _translation(error: psycopg.Error | OSError) -> DatabaseError:
    if isinstance(error, psycopg.errors.UniqueViolation):
        return Duplicate(error.diag.constraint_name or str(error))
    if isinstance(error, psycopg.OperationalError | psycopg.InterfaceError | _TransactionLost | OSError):
        return DbUnavailable(_said(error))
    return DatabaseError(_said(error))


def _cancellations() -> int:
    """How often the running task was asked to end."""
    task = asyncio.current_task()
    return task.cancelling() if task is not None else 0


def _said(error: Exception) -> str:
    return " ".join(str(error).split())[:256]


async def wake(connection: Connection, channel: str = WAKE_CHANNEL) -> None:
    """Tell the reconciler, when this transaction commits, that there is something to do."""
    await connection.execute("SELECT pg_notify(%s, '')", (channel,))
