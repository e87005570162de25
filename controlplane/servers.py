"""HTTP servers and background duties in one process, from the first request to a clean end.

Addresses are taken before anything runs, so that one that is taken is an error and not a half-started process. The
first SIGTERM or SIGINT cancels the duties and stops the listening; answers under way may finish until the drain timeout
has passed. A second signal ends everything at once.

A server that stops takes the connections that have come to it, and hears those out that have not asked anything yet:
their request is on its way. Every answer from then on says `connection: close`, and idle connections are closed.
"""

from __future__ import annotations

import asyncio
import signal
import socket
import time
from collections.abc import Callable, Coroutine, Iterator, Sequence
from contextlib import contextmanager
from email.utils import formatdate
from typing import Any, Protocol, cast

import uvicorn
from loguru import logger
from starlette.types import ASGIApp
from uvicorn.server import ServerState

_BACKLOG = 2048
_KEEP_ALIVE_SECONDS = 75  # longer than clients keep idle connections: it is they who close them, between requests
_NEWCOMERS_SECONDS = 1.0  # who has connected sends a request at once, or keeps the connection for later
_LOOK_SECONDS = 0.02
_CLOSING = (b"connection", b"close")
_SIGNALS = (signal.SIGTERM, signal.SIGINT)

Duty = Callable[[], Coroutine[None, None, None]]


class CannotListen(Exception):
    """An address that is to be served is taken, or is none of this machine's."""


class Service(Protocol):
    """What runs until it is told to stop, and then takes its time to end well."""

    async def work(self) -> None:
        """Returns some time after `stop`. Cancelled, it ends at once."""

    def stop(self) -> None: ...


class _State(ServerState):
    """Renews `date` when an answer is to tell it, not each second whether there is one or not."""

    def __init__(self) -> None:
        self._second = -1
        super().__init__()

    @property
    def default_headers(self) -> list[tuple[bytes, bytes]]:
        """The same list, not only an equal one, as long as it says the same."""
        second = int(time.time())
        if second != self._second:
            self._second = second
            self._headers = [(b"date", formatdate(second, usegmt=True).encode()), *self._others]
        return self._headers

    @default_headers.setter
    def default_headers(self, headers: list[tuple[bytes, bytes]]) -> None:
        self._others = [header for header in headers if header[0] != b"date"]
        self._second = -1


class Server(uvicorn.Server):
    """One ASGI app on one address, which is taken at once: raises CannotListen. Or on a socket that listens already.

    `on_stop` is called when the stopping begins.
    """

    def __init__(
        self,
        name: str,
        app: ASGIApp,
        *,
        host: str,
        port: int,
        drain_timeout_seconds: float,
        listening: socket.socket | None = None,
        on_stop: Callable[[], None] = lambda: None,
        protocol: Callable[..., asyncio.Protocol] | None = None,
    ) -> None:
        self.socket = listening or listen(name, host, port)
        self.url = url_of(host, port)
        self.name = name
        self._on_stop = on_stop
        self._newcomers_seconds = min(_NEWCOMERS_SECONDS, drain_timeout_seconds)
        self._is_told = asyncio.Event()  # to stop
        super().__init__(
            uvicorn.Config(
                app,
                http=cast("Any", protocol or "httptools"),  # uvicorn calls it, whatever it is
                ws="none",
                lifespan="on",
                log_config=None,
                log_level="warning",
                access_log=False,
                server_header=False,
                proxy_headers=False,
                timeout_keep_alive=_KEEP_ALIVE_SECONDS,
                timeout_graceful_shutdown=round(drain_timeout_seconds),
            )
        )
        self.server_state = _State()

    async def work(self) -> None:
        await self.serve(sockets=[self.socket])

    def stop(self) -> None:
        self._on_stop()
        self._announce_end()
        self.should_exit = True
        self._is_told.set()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Say so when requests are answered: an app may take its time before."""
        await super().startup(sockets)
        logger.info(f"serving the {self.name} at {self.url}")

    async def main_loop(self) -> None:
        """uvicorn's wakes ten times a second, to look whether it shall end and what time it is. This one is told."""
        await self._is_told.wait()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        # uvicorn would close every connection that has no request, and what waits in the kernel's queue with the socket
        self._announce_end()
        await asyncio.sleep(0)  # one turn of the loop accepts all that wait
        for server in self.servers:
            server.close()
        for one in sockets or []:
            one.close()
        deadline = time.monotonic() + self._newcomers_seconds
        while self._has_newcomers() and time.monotonic() < deadline:  # noqa: ASYNC110 - uvicorn sets no event
            await asyncio.sleep(_LOOK_SECONDS)
        await super().shutdown(None)

    def _announce_end(self) -> None:
        """In every answer, for uvicorn closes connections by that header."""
        headers = self.server_state.default_headers
        if _CLOSING not in headers:
            self.server_state.default_headers = [*headers, _CLOSING]

    def _has_newcomers(self) -> bool:
        """Whether somebody has connected and not been heard yet: a protocol of ours says so, uvicorn's has no cycle."""
        connections = self.server_state.connections
        return any(getattr(one, "is_new", getattr(one, "cycle", one) is None) for one in connections)

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Nothing: signals are the process's business, not one server's."""
        yield


async def run_until_stopped(
    services: Sequence[Service], duties: Sequence[Duty], *, told_to_stop: asyncio.Event | None = None
) -> int:
    """Serve until a signal; returns the process's exit code: 0, or what a second signal makes of it.

    With `told_to_stop` this process has a supervisor, which tells by that event or by a signal, and which kills what
    shall end at once. So further signals mean nothing: some come from who signals every process of a group.
    """
    stop = told_to_stop or asyncio.Event()
    forced: list[int] | None = [] if told_to_stop is None else None
    with _signals(stop, forced):
        try:
            await _serve(services, duties, stop, can_be_forced=forced is not None)
        except asyncio.CancelledError:
            if not forced:
                raise
            logger.warning("stopped at once: answers under way were broken off")
            return 128 + forced[0]
    logger.info("stopped")
    return 0


async def _serve(
    services: Sequence[Service], duties: Sequence[Duty], stop: asyncio.Event, *, can_be_forced: bool
) -> None:
    async with asyncio.TaskGroup() as tasks:
        background = [tasks.create_task(duty()) for duty in duties]
        for service in services:
            tasks.create_task(service.work())
        await stop.wait()
        if can_be_forced:
            logger.info("stopping: answers under way may finish; a second signal ends them at once")
        else:
            logger.info("stopping: answers under way may finish")
        for service in services:
            service.stop()
        for task in background:
            task.cancel()


@contextmanager
def _signals(stop: asyncio.Event, forced: list[int] | None) -> Iterator[None]:
    loop, main = asyncio.get_running_loop(), asyncio.current_task()
    assert main is not None  # this runs in one

    def hear(number: int) -> None:
        if stop.is_set() and forced is not None:
            forced.append(number)
            main.cancel()
        stop.set()

    for number in _SIGNALS:
        loop.add_signal_handler(number, hear, number)
    try:
        yield
    finally:
        for number in _SIGNALS:
            loop.remove_signal_handler(number)


def url_of(host: str, port: int) -> str:
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


def listen(name: str, host: str, port: int) -> socket.socket:
    """A socket that has the address for itself. Raises CannotListen."""
    return _listening(name, host, port, is_shared=False)


def listen_together(name: str, host: str, port: int, count: int) -> list[socket.socket]:
    """So many sockets among which the kernel shares out the address's connections. Raises CannotListen.

    The first one takes the address as if it were alone, so that a second supervisor is refused like anybody else:
    sockets that share from the start are let in by the kernel whoever of the same user has them.
    """
    first = listen(name, host, port)
    first.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    port = first.getsockname()[1]
    return [first, *(listen_beside(name, host, port) for _ in range(count - 1))]


def listen_beside(name: str, host: str, port: int) -> socket.socket:
    """One more socket beside those of `listen_together`, or in the place of a closed one. Raises CannotListen."""
    return _listening(name, host, port, is_shared=True)


def _listening(name: str, host: str, port: int, *, is_shared: bool) -> socket.socket:
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        # the protocol is named, because asyncio turns Nagle's delay off only on sockets that say they are TCP
        listening = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if is_shared:
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        listening.bind(address[:2])
        listening.listen(_BACKLOG)
        return listening
    except OSError as error:
        raise CannotListen(f"the {name} cannot listen on {host} port {port}: {error.strerror}") from None
