"""A TCP relay in front of slurmrestd that can lose a request, or the answer after the request was carried out."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import Self
from urllib.parse import urlsplit


class Relay:
    """Passes everything on, but for what it was told to lose: then the client sees the connection break."""

    def __init__(self, upstream_url: str) -> None:
        parts = urlsplit(upstream_url)
        self._upstream = (parts.hostname or "", parts.port or 80)
        self._server: asyncio.Server | None = None
        self._to_lose: list[bytes] = []
        self._to_swallow: list[bytes] = []
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

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        upstream_reader, upstream_writer = await asyncio.open_connection(*self._upstream)
        losing = asyncio.Event()
        with suppress(ConnectionError):
            await asyncio.wait(
                [
                    asyncio.create_task(self._pass_requests(reader, upstream_writer, losing)),
                    asyncio.create_task(self._pass_answers(upstream_reader, writer, losing)),
                ],
                return_when=asyncio.FIRST_COMPLETED,
            )
        writer.close()
        upstream_writer.close()

    async def _pass_requests(
        self, reader: asyncio.StreamReader, upstream: asyncio.StreamWriter, losing: asyncio.Event
    ) -> None:
        while data := await reader.read(65536):
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
        self, upstream: asyncio.StreamReader, writer: asyncio.StreamWriter, losing: asyncio.Event
    ) -> None:
        while data := await upstream.read(65536):
            if losing.is_set():
                self.lost += 1
                return  # carried out, and nobody hears of it
            writer.write(data)
            await writer.drain()
