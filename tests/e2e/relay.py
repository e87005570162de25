"""A TCP relay in front of slurmrestd that can lose a request, or the answer after the request was carried out.

It is also where a test learns that a request is on its way, or was answered, and can do something at that moment.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Self
from urllib.parse import urlsplit

Act = Callable[[], Awaitable[None]]


class Relay:
    """Passes everything on, but for what it was told to lose: then the client sees the connection break."""

    def __init__(self, upstream_url: str) -> None:
        parts = urlsplit(upstream_url)
        self._upstream = (parts.hostname or "", parts.port or 80)
        self._server: asyncio.Server | None = None
        self._to_lose: list[bytes] = []
        self._to_swallow: list[bytes] = []
        self._before: list[tuple[bytes, Act]] = []
        self._after: list[tuple[bytes, Act]] = []
        self._doing: set[asyncio.Future[None]] = set()
        self.lost = 0

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._server is not None
        self._server.close()

    @property
    def url(self) -> str:
        assert self._server is not None
        host, port = self._server.sockets[0].getsockname()[:2]
        return f"http://{host}:{port}"

    def lose_answer_to(self, text: bytes) -> None:
        """Of the next request that holds `text`, the answer is lost."""
        self._to_lose.append(text)

    def swallow(self, text: bytes) -> None:
        """The next request that holds `text` never reaches slurmrestd."""
        self._to_swallow.append(text)

    def before(self, text: bytes, act: Act) -> None:
        """Do this when the next request that holds `text` has come, and pass it on after."""
        self._before.append((text, act))

    def after(self, text: bytes, act: Act) -> None:
        """Do this when the next request that holds `text` was answered, and pass the answer on after."""
        self._after.append((text, act))

    @property
    def is_done(self) -> bool:
        """Was everything met that it was told to do or to lose, and done?"""
        return not (self._to_lose or self._to_swallow or self._before or self._after or self._doing)

    def forget(self) -> None:
        """Do and lose nothing of what was not met yet."""
        for orders in (self._to_lose, self._to_swallow, self._before, self._after):
            orders.clear()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            upstream_reader, upstream_writer = await asyncio.open_connection(*self._upstream)
        except ConnectionError:
            writer.close()
            return
        losing = asyncio.Event()
        afterwards: list[Act] = []
        passing = [
            asyncio.create_task(self._pass_requests(reader, upstream_writer, losing, afterwards)),
            asyncio.create_task(self._pass_answers(upstream_reader, writer, losing, afterwards)),
        ]
        await asyncio.wait(passing, return_when=asyncio.FIRST_COMPLETED)
        for task in passing:
            task.cancel()
            with suppress(ConnectionError, asyncio.CancelledError):
                await task
        writer.close()
        upstream_writer.close()

    async def _do(self, act: Act) -> None:
        """To its end, even if that is what makes the connection break."""
        doing = asyncio.ensure_future(act())
        self._doing.add(doing)
        doing.add_done_callback(self._doing.discard)
        await asyncio.shield(doing)

    async def _pass_requests(
        self,
        reader: asyncio.StreamReader,
        upstream: asyncio.StreamWriter,
        losing: asyncio.Event,
        afterwards: list[Act],
    ) -> None:
        while data := await reader.read(65536):
            for act in _taken(self._before, data):
                await self._do(act)
            afterwards += _taken(self._after, data)
            for text in [text for text in self._to_swallow if text in data]:
                self._to_swallow.remove(text)
                self.lost += 1
                return
            for text in [text for text in self._to_lose if text in data]:
                self._to_lose.remove(text)
                losing.set()
            upstream.write(data)
            await upstream.drain()

    async def _pass_answers(
        self,
        upstream: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        losing: asyncio.Event,
        afterwards: list[Act],
    ) -> None:
        while data := await upstream.read(65536):
            while afterwards:
                await self._do(afterwards.pop(0))
            if losing.is_set():
                self.lost += 1
                return  # carried out, and nobody hears of it
            writer.write(data)
            await writer.drain()


def _taken(orders: list[tuple[bytes, Act]], data: bytes) -> list[Act]:
    """The acts that this request is meant for; they are done once."""
    met = [order for order in orders if order[0] in data]
    for order in met:
        orders.remove(order)
    return [act for _, act in met]
