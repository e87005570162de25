"""One HTTP request and its answer, over plain ASGI: fewer layers, because every token of every stream passes here."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from controlplane.demo.fake_vllm.answers import Refusal

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

JSON = "application/json"
EVENT_STREAM = "text/event-stream; charset=utf-8"

_CORS = (b"vary", b"Origin")  # what vLLM's CORS layer adds to whatever passes through it


class ClientGone(Exception):
    """The client closed the connection; nobody reads an answer."""


class Exchange:
    """Reads one request, sends one answer: `answer`, or `start_stream`, `write` ... `end_stream`."""

    __slots__ = ("_headers", "_receive", "_send", "method", "path", "status")

    def __init__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.path: str = scope["path"]
        self.method: str = scope["method"]
        self.status: int | None = None
        self._headers = dict(scope["headers"])
        self._receive = receive
        self._send = send

    def header(self, name: str) -> str | None:
        value: bytes | None = self._headers.get(name.encode())
        return None if value is None else value.decode("latin-1")

    async def body(self) -> bytes:
        """The whole request body. Raises ClientGone."""
        parts = []
        while True:
            message = await self._receive()
            if message["type"] == "http.disconnect":
                raise ClientGone
            parts.append(message.get("body", b""))
            if not message.get("more_body", False):
                return b"".join(parts)

    async def wait_for_disconnect(self) -> None:
        """Return when the client has left, or has its answer. Only after `body`."""
        while (await self._receive())["type"] != "http.disconnect":
            pass

    async def answer(
        self,
        status: int,
        body: bytes = b"",
        content_type: str | None = JSON,
        *,
        allow: str | None = None,
        has_cors: bool = True,
    ) -> None:
        """Send a whole answer."""
        headers = [(b"content-length", str(len(body)).encode())]
        if allow is not None:
            headers.append((b"allow", allow.encode()))
        if content_type is not None:
            headers.append((b"content-type", content_type.encode()))
        if has_cors:
            headers.append(_CORS)
        self.status = status
        await self._send({"type": "http.response.start", "status": status, "headers": headers})
        await self._send({"type": "http.response.body", "body": body})

    async def refuse(self, refusal: Refusal) -> None:
        """Send an error: a status of its own, or an event and the end of the stream if that has started."""
        if self.status is None:
            await self.answer(refusal.status, refusal.body(), has_cors=refusal.has_cors)
        else:
            await self.write(refusal.event())
            await self.end_stream()

    async def start_stream(self) -> None:
        headers = [(b"content-type", EVENT_STREAM.encode()), _CORS]
        self.status = 200
        await self._send({"type": "http.response.start", "status": 200, "headers": headers})

    async def write(self, events: bytes) -> None:
        await self._send({"type": "http.response.body", "body": events, "more_body": True})

    async def end_stream(self) -> None:
        """Send `[DONE]` and the end of the answer."""
        await self.write(b"data: [DONE]\n\n")
        await self._send({"type": "http.response.body", "body": b""})
