"""Endpoints as one worker sees them: their connections, and what is in flight on each.

A connection is a protocol on httptools, without a task or a stream of its own: what comes in is parsed where the event
loop delivers it and handed to the call that waits for it. Idle connections are kept per endpoint, reused newest first,
and closed before vLLM closes its end, so that a request seldom meets a connection that is about to die.

An endpoint that is no longer routable gets no new requests; its idle connections are closed at once (vLLM waits for
them before it exits) and its busy ones when their answers end.
"""

from __future__ import annotations

import asyncio
import math
import ssl
import time
from collections import Counter, deque
from collections.abc import Collection, Iterable, Mapping
from typing import Protocol, cast
from urllib.parse import urlsplit

import httptools

from controlplane.core.balancing import Failure
from controlplane.core.breaker import Breaker
from controlplane.core.types import RoutableEndpoint
from controlplane.proxy import wire

_SAID_ANEW = frozenset({b"server", b"date", b"x-request-id"})
"""Our server and our id are named instead."""

_NOT_SENT_BACK = wire.HOP_BY_HOP | _SAID_ANEW

_INFORMATIONAL = 200  # statuses below are interim answers


class Head:
    """The status line and headers of an answer, as far as the client may see them."""

    status = 0
    content_length: int | None = None
    is_framed = False  # its end is told by a length or by chunks, not by the end of the connection
    is_event_stream = False
    names_hops: bytes | None = None  # what the `Connection` header says

    def __init__(self) -> None:
        self.lines: list[bytes] = []  # of the headers; names in lower case


class Caller(Protocol):
    """Who waits for an answer (`call.Call`)."""

    def connected(self, connection: UpstreamConnection) -> None: ...

    def not_connected(self, failure: Failure) -> None: ...

    def head_came(self, head: Head) -> None: ...  # may abandon the connection

    def body_came(self, piece: bytes) -> None: ...

    def chunk_came(self, chunk: bytes) -> bool: ...  # one of events, whole; False: it shall be told as body

    def answer_ended(self, last: bytes) -> None: ...

    def upstream_lost(self) -> None: ...

    def upstream_is_full(self) -> None: ...

    def upstream_has_room(self) -> None: ...


class Upstream:
    """One routable endpoint, or one that was until a moment ago. `in_flight` is changed by the calls."""

    __slots__ = (
        "_idle",
        "_tls",
        "breaker",
        "connecting",
        "endpoint",
        "head",
        "host",
        "in_flight",
        "is_routable",
        "path",
        "port",
        "url",
    )

    def __init__(self, endpoint: RoutableEndpoint, breaker: Breaker, tls: ssl.SSLContext) -> None:
        parts = urlsplit(endpoint.url)
        is_tls = parts.scheme == "https"
        self.url = endpoint.url
        self.endpoint = endpoint
        self.breaker = breaker
        self.in_flight = 0
        self.is_routable = True
        self.host = parts.hostname or ""
        self.port = parts.port or (443 if is_tls else 80)
        self.path = parts.path.rstrip("/").encode()
        self._tls = tls if is_tls else None
        # no user part: a password in an endpoint's URL is not what a `Host` header is for
        self.head = b" HTTP/1.1\r\nhost: %b\r\n" % parts.netloc.rpartition("@")[2].encode()
        if endpoint.api_key is not None:
            self.head += b"authorization: Bearer %b\r\n" % endpoint.api_key.encode()
        self.connecting: set[asyncio.Task[None]] = set()
        self._idle: deque[UpstreamConnection] = deque()

    def take(self) -> UpstreamConnection | None:
        """A connection that is idle; None: `connect`."""
        return self._idle.pop() if self._idle else None

    def connect(self, caller: Caller) -> asyncio.Task[None]:
        """Make a connection for the caller, who is told: `connected` or `not_connected`.

        Cancel the task if it takes too long, or is not wanted any more; then nobody is told.
        """
        task = asyncio.get_running_loop().create_task(self._connect(caller))
        self.connecting.add(task)
        task.add_done_callback(self.connecting.discard)
        return task

    async def _connect(self, caller: Caller) -> None:
        loop = asyncio.get_running_loop()
        try:
            _, connection = await loop.create_connection(
                lambda: UpstreamConnection(self), self.host, self.port, ssl=self._tls
            )
        except OSError:  # refused, unreachable, a name that is not known, a certificate that is wrong
            caller.not_connected(Failure.REFUSED)
        else:
            caller.connected(connection)

    def keep(self, connection: UpstreamConnection, now: float) -> None:
        """The answer was read to its end: the next request may use the connection."""
        if self.is_routable:
            connection.idle_since = now
            self._idle.append(connection)
        else:
            connection.close()

    def forget(self, connection: UpstreamConnection) -> None:
        if connection in self._idle:
            self._idle.remove(connection)

    def close_idle(self, since: float) -> None:
        """Close what has been idle since before then; `math.inf` closes all."""
        while self._idle and self._idle[0].idle_since <= since:
            self._idle.popleft().close()

    @property
    def idle(self) -> int:
        return len(self._idle)


class UpstreamConnection(asyncio.Protocol):
    """One connection to an upstream, serving one call at a time."""

    __slots__ = (
        "_has_begun",
        "_has_ended",
        "_is_between",
        "_is_overrun",
        "_is_reusable",
        "_is_told",
        "_parser",
        "_pieces",
        "caller",
        "head",
        "idle_since",
        "is_fresh",
        "is_sending",
        "on_body",
        "transport",
        "upstream",
    )

    def __init__(self, upstream: Upstream) -> None:
        self.upstream = upstream
        self.caller: Caller | None = None
        self.transport: asyncio.Transport
        self.idle_since = 0.0
        self.is_fresh = True
        self.is_sending = False  # the request is not whole yet
        self.head = Head()
        self._has_begun = self._has_ended = self._is_told = self._is_reusable = self._is_overrun = False
        self._is_between = False  # two chunks: what comes next begins one
        self._pieces: list[bytes] = []
        self.on_body = self._pieces.append  # the parser calls this one at every piece: no frame of Python's
        self._parser: httptools.HttpResponseParser | None = httptools.HttpResponseParser(self)

    # --- the call's side --------------------------------------------------------------------------------

    def send(self, caller: Caller, request: bytes) -> None:
        self.caller = caller
        self.head = Head()
        self._has_begun = self._has_ended = self._is_told = self._is_between = False
        self.transport.write(request)

    def abandon(self) -> None:
        """Nobody wants the answer: vLLM stops generating when the connection is closed."""
        self.caller = None
        self.transport.abort()

    def close(self) -> None:
        self.transport.close()

    # --- the event loop's side --------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)

    def data_received(self, data: bytes) -> None:
        caller, parser = self.caller, self._parser
        if caller is None or parser is None:
            self.transport.abort()  # nothing was asked
            return
        # Most of what a stream brings. The parser is between two chunks before and after it, so need not see it.
        if self._is_between and wire.is_chunk_of_events(data) and caller.chunk_came(data):
            return
        try:
            parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade):
            if not self._has_ended:
                self.caller = None
                self.transport.abort()
                caller.upstream_lost()
                return
            self._is_overrun = True  # the answer is whole; what comes behind it is no part of it
        if not self._is_told:
            if not self._has_begun:
                return
            self._is_told = True
            caller.head_came(self.head)
            if self.caller is not caller:
                return
        pieces = self._pieces
        piece = pieces.pop() if pieces else b""
        # What follows a piece is the end of its chunk, or would be a part of it; and neither the size of another one
        # nor the end of the answer ends like this.
        self._is_between = piece.endswith(wire.END_OF_EVENT) and data.endswith(wire.END_OF_CHUNK_OF_EVENTS)
        if pieces:
            piece = b"".join(pieces) + piece
            pieces.clear()
        if self._has_ended:
            self._end(caller, piece)
        elif piece:
            caller.body_came(piece)

    def connection_lost(self, exc: Exception | None) -> None:
        caller, self.caller, self._parser = self.caller, None, None  # the parser refers back to this
        if caller is None:
            self.upstream.forget(self)
        elif self._has_begun and not self.head.is_framed and exc is None:
            caller.answer_ended(b"")
        else:
            caller.upstream_lost()

    def pause_writing(self) -> None:
        if self.caller is not None:
            self.caller.upstream_is_full()

    def resume_writing(self) -> None:
        if self.caller is not None:
            self.caller.upstream_has_room()

    # --- the parser's side ------------------------------------------------------------------------------

    def on_message_begin(self) -> None:
        if self._has_ended:
            raise ValueError("it says more than it was asked")

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._has_begun or name in _SAID_ANEW:
            return  # a trailer, or what is nobody's business
        head = self.head
        name = name.lower()
        if name == b"content-length":
            head.is_framed = True
            head.content_length = int(value)
        elif name == b"content-type":
            head.is_event_stream = value[:17].lower() == b"text/event-stream"
            head.lines.append(b"content-type: %b\r\n" % value)
        elif name not in _NOT_SENT_BACK:
            head.lines.append(b"%b: %b\r\n" % (name, value))
        elif name == b"transfer-encoding":
            head.is_framed = True
        elif name == b"connection":
            head.names_hops = value if head.names_hops is None else b"%b,%b" % (head.names_hops, value)

    def on_headers_complete(self) -> None:
        parser, head = self._parser, self.head
        assert parser is not None
        status = parser.get_status_code()
        if status < _INFORMATIONAL:
            self.head = Head()
            return
        head.status = status
        if head.names_hops is not None:
            head.lines = wire.without_named(head.lines, head.names_hops)
        self._has_begun = True

    def on_message_complete(self) -> None:
        parser = self._parser
        assert parser is not None
        if parser.get_status_code() >= _INFORMATIONAL:
            self._has_ended = True
            self._is_reusable = parser.should_keep_alive()

    def _end(self, caller: Caller, last: bytes) -> None:
        self.caller = None
        self.is_fresh = False
        # before the call is told: the same client's next request may follow at once
        if self._is_reusable and not (self._is_overrun or self.is_sending or self.transport.is_closing()):
            self.upstream.keep(self, time.monotonic())
        elif self.is_sending:
            self.transport.abort()  # what of the request was not taken yet is not wanted
        else:
            self.transport.close()
        caller.answer_ended(last)


class Upstreams:
    """All of them, by endpoint. `follow` the directory, `sweep` now and then, `close` at the end."""

    def __init__(self, *, keepalive_seconds: float) -> None:
        self._keepalive_seconds = keepalive_seconds
        self._known: dict[tuple[int, str, str | None], Upstream] = {}
        self._leaving: list[Upstream] = []
        # the system's certificate authorities, where a site installs its own
        self._tls = ssl.create_default_context()

    def follow(self, routable: Mapping[str, Collection[RoutableEndpoint]]) -> dict[str, tuple[Upstream, ...]]:
        """These are the routable ones, by model; what connects to others is closed as soon as it is idle."""
        before, self._known = self._known, {}
        by_model = {
            model: tuple(self._follow(endpoint, before) for endpoint in endpoints)
            for model, endpoints in routable.items()
        }
        for upstream in before.values():
            upstream.is_routable = False
            upstream.close_idle(math.inf)
            if upstream.in_flight:
                self._leaving.append(upstream)
        return by_model

    def _follow(self, endpoint: RoutableEndpoint, before: dict[tuple[int, str, str | None], Upstream]) -> Upstream:
        name = (endpoint.endpoint_id, endpoint.url, endpoint.api_key)
        upstream = before.pop(name, None) or Upstream(endpoint, Breaker(), self._tls)
        upstream.endpoint = endpoint
        self._known[name] = upstream
        return upstream

    @property
    def in_flight(self) -> Counter[str]:
        """Requests by URL; endpoints without any are absent."""
        counts: Counter[str] = Counter()
        for upstream in self._all():
            if upstream.in_flight:
                counts[upstream.url] += upstream.in_flight
        return counts

    def in_flight_of(self, url: str) -> int:
        return sum(upstream.in_flight for upstream in self._all() if upstream.url == url)

    def connections(self) -> dict[str, int]:
        """How many, by what they do."""
        return {
            "idle": sum(one.idle for one in self._known.values()),
            "busy": sum(one.in_flight for one in self._all()),
        }

    def sweep(self, now: float) -> None:
        """Close what has been idle for too long."""
        for upstream in self._known.values():
            upstream.close_idle(now - self._keepalive_seconds)
        if self._leaving:
            self._leaving = [one for one in self._leaving if one.in_flight]

    def close(self) -> None:
        for upstream in self._all():
            upstream.is_routable = False
            upstream.close_idle(math.inf)
            for task in upstream.connecting:
                task.cancel()

    def _all(self) -> Iterable[Upstream]:
        yield from self._known.values()
        yield from self._leaving
