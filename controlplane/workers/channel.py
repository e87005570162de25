"""What a supervisor and a worker say to each other, over a pair of sockets that only they have.

A message is its length in four bytes and then JSON. When one end is gone the other one hears nothing more: that is how
a worker learns that its supervisor was killed.
"""

from __future__ import annotations

import asyncio
import json
import socket
from dataclasses import dataclass
from enum import StrEnum
from typing import Self

from controlplane.metrics import Numbers, decoded, encoded

_LENGTH_BYTES = 4


class Kind(StrEnum):
    ASK = "ask"  # supervisor: what have you counted?
    COUNTED = "counted"  # worker: this; also when it has served its last request
    SCRAPE = "scrape"  # worker: somebody wants the numbers of all
    TOTAL = "total"  # supervisor: these, as Prometheus reads them
    STOPPING = "stopping"  # worker: I take no more connections


@dataclass(frozen=True, slots=True)
class Message:
    kind: Kind
    numbers: Numbers
    text: str


class Channel:
    """One end. Sending never waits: little is said, and to a neighbour."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    @classmethod
    async def over(cls, connected: socket.socket) -> Self:
        return cls(*await asyncio.open_unix_connection(sock=connected))

    def send(self, kind: Kind, numbers: Numbers | None = None, text: str = "") -> None:
        """Nothing, once the other end is gone."""
        if not self._writer.is_closing():
            body = json.dumps([kind, encoded(numbers or {}), text]).encode()
            self._writer.write(len(body).to_bytes(_LENGTH_BYTES) + body)

    async def receive(self) -> Message | None:
        """The next message; None: the other end is gone."""
        try:
            length = int.from_bytes(await self._reader.readexactly(_LENGTH_BYTES))
            kind, numbers, text = json.loads(await self._reader.readexactly(length))
        except (asyncio.IncompleteReadError, OSError):
            return None
        return Message(Kind(kind), decoded(numbers), text)

    async def close(self) -> None:
        """Once what was sent has left."""
        self._writer.close()
        try:
            await self._writer.wait_closed()
        except OSError:  # the other end was gone first
            return
