"""A worker's end of the wire to its supervisor.

States: it answers what was counted until it is closed, while the worker drains as well. When the supervisor is gone,
`told_to_stop` is set: nobody would replace this worker, add up its numbers or stop it any more.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable

from loguru import logger

from controlplane.metrics import Numbers
from controlplane.workers.channel import Channel, Kind

_TOTAL_SECONDS = 1.0  # of which the supervisor gives the other workers a fifth


class Link:
    """`counted` says what this worker has counted."""

    def __init__(self, channel: Channel, counted: Callable[[], Numbers]) -> None:
        self._channel = channel
        self._counted = counted
        self._total: asyncio.Future[bytes] | None = None
        self.told_to_stop = asyncio.Event()

    @classmethod
    async def over(cls, connected: socket.socket, counted: Callable[[], Numbers]) -> Link:
        return cls(await Channel.over(connected), counted)

    async def run(self) -> None:
        """Until the supervisor is gone, or cancelled."""
        while message := await self._channel.receive():
            if message.kind is Kind.ASK:
                self._channel.send(Kind.COUNTED, self._counted())
            elif message.kind is Kind.TOTAL and self._total is not None and not self._total.done():
                self._total.set_result(message.text.encode())
        logger.warning("the supervisor is gone: this worker stops")
        self.told_to_stop.set()

    async def total(self) -> bytes | None:
        """Prometheus' text of all workers together; None: the supervisor does not tell it in time."""
        if self._total is None or self._total.done():
            self._total = asyncio.get_running_loop().create_future()
            self._channel.send(Kind.SCRAPE)
        try:
            async with asyncio.timeout(_TOTAL_SECONDS):
                return await asyncio.shield(self._total)  # others may wait for the same
        except TimeoutError:
            return None

    def stops(self) -> None:
        """Say that connections are left to others from now on."""
        self._channel.send(Kind.STOPPING)

    async def close(self) -> None:
        """With the last word on what was counted."""
        self._channel.send(Kind.COUNTED, self._counted())
        await self._channel.close()
