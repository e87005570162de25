"""HTTP servers and background duties in one process, from the first request to a clean end.

Addresses are taken before anything runs, so that one that is taken is an error and not a half-started process. The
first SIGTERM or SIGINT cancels the duties and stops the listening; answers under way may finish until the drain timeout
has passed. A second signal ends everything at once.
"""

from __future__ import annotations

import asyncio
import signal
import socket
from collections.abc import Callable, Coroutine, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import uvicorn
from loguru import logger
from starlette.types import ASGIApp

_BACKLOG = 2048
_KEEP_ALIVE_SECONDS = 75  # longer than clients keep idle connections: it is they who close them, between requests
_SIGNALS = (signal.SIGTERM, signal.SIGINT)

Duty = Callable[[], Coroutine[None, None, None]]


class CannotListen(Exception):
    """An address that is to be served is taken, or is none of this machine's."""


class Server(uvicorn.Server):
    """One ASGI app on one address, which is taken at once. Raises CannotListen."""

    def __init__(
        self,
        name: str,
        app: ASGIApp,
        *,
        host: str,
        port: int,
        drain_timeout_seconds: float,
        protocol: Callable[..., asyncio.Protocol] | None = None,
    ) -> None:
        self.socket = _listen(name, host, port)
        self.url = f"http://{f'[{host}]' if ':' in host else host}:{port}"
        self.name = name
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

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Say so when requests are answered: an app may take its time before."""
        await super().startup(sockets)
        logger.info(f"serving the {self.name} at {self.url}")

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Nothing: signals are the process's business, not one server's."""
        yield


async def run_until_stopped(servers: Sequence[Server], duties: Sequence[Duty]) -> int:
    """Serve until a signal; returns the process's exit code: 0, or what a second signal makes of it."""
    stop = asyncio.Event()
    forced: list[int] = []
    with _signals(stop, forced):
        try:
            await _serve(servers, duties, stop)
        except asyncio.CancelledError:
            if not forced:
                raise
            logger.warning("stopped at once: answers under way were broken off")
            return 128 + forced[0]
    logger.info("stopped")
    return 0


async def _serve(servers: Sequence[Server], duties: Sequence[Duty], stop: asyncio.Event) -> None:
    async with asyncio.TaskGroup() as tasks:
        background = [tasks.create_task(duty()) for duty in duties]
        for server in servers:
            tasks.create_task(server.serve(sockets=[server.socket]))
        await stop.wait()
        logger.info("stopping: answers under way may finish; a second signal ends them at once")
        for server in servers:
            server.should_exit = True
        for task in background:
            task.cancel()


@contextmanager
def _signals(stop: asyncio.Event, forced: list[int]) -> Iterator[None]:
    loop, main = asyncio.get_running_loop(), asyncio.current_task()
    assert main is not None  # this runs in one

    def hear(number: int) -> None:
        if stop.is_set():
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


def _listen(name: str, host: str, port: int) -> socket.socket:
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        # the protocol is named, because asyncio turns Nagle's delay off only on sockets that say they are TCP
        listening = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address[:2])
        listening.listen(_BACKLOG)
        return listening
    except OSError as error:
        raise CannotListen(f"the {name} cannot listen on {host} port {port}: {error.strerror}") from None
