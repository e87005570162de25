"""Requests at a steady rate, whoever is slow, and what became of each: for tests in which none may fail unseen.

A client is a connection of its own that reads to the end. It is bytes on a socket, because an HTTP library would cost
more than everything that is tested.
"""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from tests.integration.proxy_rig import CHAT, MODEL

WHOLE = "whole"
CUT = "begun, and cut with an error event"


@dataclass
class Arrivals:
    """`ended` counts outcomes: WHOLE, CUT, or what else came, in plain words."""

    port: int
    key: str = field(repr=False)
    limit_seconds: float = 30.0  # of one request
    ended: Counter[str] = field(default_factory=Counter)

    async def come(self, per_second: float, until: Callable[[], bool], body: Callable[[int], dict[str, Any]]) -> None:
        """Let them come until that is so; return when the last has its answer. `body`: of the n-th, but the model."""
        loop = asyncio.get_running_loop()
        began_at, number = loop.time(), 0
        async with asyncio.TaskGroup() as clients:
            while not until():
                clients.create_task(self.one(body(number)))
                number += 1
                await asyncio.sleep(began_at + number / per_second - loop.time())

    async def one(self, fields: dict[str, Any]) -> None:
        try:
            async with asyncio.timeout(self.limit_seconds):
                answer = await self._answer({"model": MODEL, "messages": [], **fields})
        except (OSError, TimeoutError) as error:
            self.ended[f"{type(error).__name__}: {error}"] += 1
        else:
            self.ended[_outcome(answer, bool(fields.get("stream")))] += 1

    async def _answer(self, fields: dict[str, Any]) -> bytes:
        body = json.dumps(fields).encode()
        head = (
            f"POST {CHAT} HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {self.key}\r\ncontent-type: application/json\r\n"
        )
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        try:
            writer.write(f"{head}connection: close\r\ncontent-length: {len(body)}\r\n\r\n".encode() + body)
            return await reader.read()
        finally:
            writer.close()


def _outcome(answer: bytes, is_stream: bool) -> str:
    head, _, body = answer.partition(b"\r\n\r\n")
    if not head.startswith(b"HTTP/1.1 200 "):
        return f"{head[:20].decode('latin-1')}: {body[:200].decode('latin-1')}"
    if not is_stream:
        return WHOLE if body.rstrip().endswith(b"}") else f"a body that is not whole: {body[-100:].decode('latin-1')}"
    has_error, is_done = b'data: {"error"' in body, b"data: [DONE]" in body
    if is_done and not has_error:
        return WHOLE
    if has_error and not is_done and body.index(b"data: ") < body.index(b'data: {"error"'):
        return CUT
    return f"a stream that ended otherwise: {body[-100:].decode('latin-1')}"
