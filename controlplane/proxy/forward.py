"""One request to one upstream, and its answer back to the client, byte for byte as it comes.

Nothing is sent to the client before the upstream's first byte of body: until then a failure is an error with a status
of its own, afterwards it is a broken stream. A request is sent again only if no connection was made. httpx tells that
apart with certainty (`ConnectError`, `ConnectTimeout`); whether a kept connection that closed without an answer had
carried the request, it cannot tell, so that such a request fails. It is rare: idle connections are dropped before
vLLM would close them, and httpcore looks for the end of file right before it reuses one.

When the client leaves, at any moment, the upstream connection is closed at once: vLLM then stops generating.
Replies of an upstream are passed back whatever their status, vLLM's own 401 or 500 included.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from random import Random

import anyio
import httpx
from starlette.types import Receive, Send

from controlplane.clock import utc_now
from controlplane.core.balancing import Failure, may_retry, pick
from controlplane.core.types import RoutableEndpoint
from controlplane.proxy.errors import ApiError, upstream_error, upstream_timeout
from controlplane.proxy.options import ProxyOptions
from controlplane.proxy.request import ClientLeft, ClientRequest, RawHeaders, header
from controlplane.proxy.upstreams import Upstreams

_HOP_BY_HOP = frozenset(
    {
        b"connection",
        b"keep-alive",
        b"proxy-authenticate",
        b"proxy-authorization",
        b"proxy-connection",
        b"te",
        b"trailer",
        b"transfer-encoding",
        b"upgrade",
    }
)
_NOT_SENT_ON = _HOP_BY_HOP | {
    # the client's credentials: an upstream gets its own
    b"authorization",
    b"x-api-key",
    b"api-key",
    b"cookie",
    # said anew for the upstream
    b"host",
    b"content-length",
    b"expect",
    b"x-request-id",
}
_NOT_SENT_BACK = _HOP_BY_HOP | {b"server", b"date", b"x-request-id"}  # our server and our id are named instead
_EVENT_STREAM = b"text/event-stream"
_END_OF_EVENT = (b"\n\n", b"\r\n\r\n", b"\r\r")


Routable = Callable[[], Sequence[RoutableEndpoint]]
"""Where the model is served at the moment of the call."""


@dataclass(slots=True)
class Exchange:
    """What became of one request; `forward` fills it in, metrics and the log are made of it."""

    status: int = 499  # nothing was answered: the client left
    upstream: str | None = None  # URL of the last endpoint tried
    retries: tuple[Failure, ...] = ()
    waited_seconds: float = 0.0  # for upstreams, before the first byte
    first_byte_at: float | None = None  # monotonic
    failure: Failure | None = None
    client_left: bool = False


class UpstreamFailed(Exception):
    """No answer, or not all of it."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(failure.value)
        self.failure = failure


class Forwarder:
    def __init__(self, options: ProxyOptions, upstreams: Upstreams, rng: Random) -> None:
        self._options = options
        self._upstreams = upstreams
        self._rng = rng

    async def forward(
        self,
        request: ClientRequest,
        routable: Routable,
        exchange: Exchange,
        receive: Receive,
        send: Send,
    ) -> None:
        """Answer the request from one of the endpoints. The request's body must have been received whole.

        `routable` is asked before each try: a drain counts on it that no request leaves for an endpoint that the
        directory no longer has.

        Raises ApiError while nothing has been answered yet, and ClientLeft. Returns when the answer is complete, and
        when it broke off: then the client has been told in the stream, or its answer is left without an end.
        """
        answer = _Answer(exchange, request.request_id, send)
        with anyio.CancelScope() as scope:
            watcher = asyncio.ensure_future(_cancel_when_client_leaves(receive, scope, exchange))
            try:
                await self._answer_from_any(request, routable, exchange, answer, scope)
            except UpstreamFailed as error:
                exchange.failure = error.failure
            finally:
                watcher.cancel()
        if exchange.client_left:
            raise ClientLeft
        if scope.cancelled_caught:
            exchange.failure = Failure.BROKEN if answer.has_begun else Failure.LATE
        if exchange.failure is None:
            await answer.end()
        elif answer.has_begun:
            await answer.break_off(self._sentence(exchange.failure))
        else:
            raise self._refusal(exchange.failure)

    async def _answer_from_any(
        self,
        request: ClientRequest,
        routable: Routable,
        exchange: Exchange,
        answer: _Answer,
        scope: anyio.CancelScope,
    ) -> None:
        """Try endpoints, each at most once, until one takes the request. Raises UpstreamFailed."""
        scope.deadline = anyio.current_time() + self._options.first_byte_timeout_seconds
        tried: set[str] = set()
        failed = UpstreamFailed(Failure.REFUSED)  # unless one is tried: all are gone
        while (endpoint := self._choose(routable(), tried)) is not None:
            if tried:
                exchange.retries += (failed.failure,)
            tried.add(endpoint.url)
            exchange.upstream = endpoint.url
            try:
                with self._upstreams.request_in_flight(endpoint.url):
                    return await self._answer_from(endpoint, request, exchange, answer, scope)
            except UpstreamFailed as error:
                if not may_retry(error.failure):
                    raise
                self._upstreams.avoid(endpoint.url)
                failed = error
        raise failed

    def _choose(self, endpoints: Sequence[RoutableEndpoint], tried: set[str]) -> RoutableEndpoint | None:
        in_flight, now = self._upstreams.in_flight, utc_now()
        chosen = pick(endpoints, in_flight, self._rng, tried.union(self._upstreams.avoided()), now=now)
        return chosen or pick(endpoints, in_flight, self._rng, tried, now=now)

    async def _answer_from(
        self,
        endpoint: RoutableEndpoint,
        request: ClientRequest,
        exchange: Exchange,
        answer: _Answer,
        scope: anyio.CancelScope,
    ) -> None:
        """Send the request to this endpoint and pass the answer back, but for its end. Raises UpstreamFailed."""
        transport = self._upstreams.take(endpoint.url)
        reply: httpx.Response | None = None
        is_complete = False
        asked_at = time.monotonic()
        try:
            with _failures_named(answer):
                try:
                    reply = await transport.handle_async_request(self._upstream_request(endpoint, request))
                    assert isinstance(reply.stream, httpx.AsyncByteStream)
                    pieces = aiter(reply.stream)  # not decoded
                    piece = await anext(pieces, None)
                finally:
                    exchange.waited_seconds += time.monotonic() - asked_at
                await answer.begin(reply.status_code, reply.headers.raw)
                while piece is not None:
                    scope.deadline = math.inf  # a client that reads slowly is not the upstream's fault
                    await answer.pass_on(piece)
                    scope.deadline = anyio.current_time() + self._options.idle_timeout_seconds
                    piece = await anext(pieces, None)
                is_complete = True
        finally:
            with anyio.CancelScope(shield=True):  # the client's leaving must not keep the upstream from being closed
                if reply is not None:
                    await reply.aclose()
                if is_complete:
                    await self._upstreams.give_back(endpoint.url, transport)
                else:
                    await transport.aclose()

    def _upstream_request(self, endpoint: RoutableEndpoint, request: ClientRequest) -> httpx.Request:
        target = endpoint.url.rstrip("/") + request.path.decode("latin-1")
        if request.query:
            target += "?" + request.query.decode("latin-1")
        headers = [*_passable(request.headers, _NOT_SENT_ON), (b"x-request-id", request.request_id)]
        if endpoint.api_key is not None:
            headers.append((b"authorization", b"Bearer " + endpoint.api_key.encode()))
        timeouts = {"connect": self._options.connect_timeout_seconds}  # the others are this scope's deadline
        return httpx.Request(
            "POST", _parsed(target), headers=headers, content=request.body, extensions={"timeout": timeouts}
        )

    def _refusal(self, failure: Failure) -> ApiError:
        sentence = self._sentence(failure)
        return upstream_timeout(sentence) if failure is Failure.LATE else upstream_error(sentence)

    def _sentence(self, failure: Failure) -> str:
        match failure:
            case Failure.REFUSED | Failure.CONNECT_TIMEOUT:
                return "No replica of the model could be reached."
            case Failure.LOST:
                return "The replica closed the connection without an answer. The request may have been worked on."
            case Failure.LATE:
                return f"The replica sent nothing for {self._options.first_byte_timeout_seconds:g} s."
            case Failure.BROKEN:
                return "The answer broke off: the replica stopped sending it."


class _Answer:
    """The client's side: an ASGI response that begins, goes on, and ends or breaks off."""

    def __init__(self, exchange: Exchange, request_id: bytes, send: Send) -> None:
        self._exchange = exchange
        self._request_id = request_id
        self._send = send
        self._is_event_stream = False
        self._last_piece = b""
        self.has_begun = False

    async def begin(self, status: int, upstream_headers: RawHeaders) -> None:
        self.has_begun = True
        self._exchange.status = status
        self._exchange.first_byte_at = time.monotonic()
        headers = [*_passable(upstream_headers, _NOT_SENT_BACK), (b"x-request-id", self._request_id)]
        if (header(headers, b"content-type") or b"").lower().startswith(_EVENT_STREAM):
            self._is_event_stream = header(headers, b"content-encoding") is None
            headers = [item for item in headers if item[0] not in (b"cache-control", b"x-accel-buffering")]
            headers += [(b"cache-control", b"no-cache"), (b"x-accel-buffering", b"no")]
        await self._send({"type": "http.response.start", "status": status, "headers": headers})

    async def pass_on(self, piece: bytes) -> None:
        self._last_piece = piece
        await self._send({"type": "http.response.body", "body": piece, "more_body": True})

    async def end(self) -> None:
        await self._send({"type": "http.response.body"})

    async def break_off(self, sentence: str) -> None:
        """Tell an event stream's reader in one last event; any other body is left short of its end.

        Returning from the application with an open answer makes the server close the connection, which is how HTTP
        tells a client that a body is not whole.
        """
        if not self._is_event_stream:
            return
        gap = b"" if self._last_piece.endswith(_END_OF_EVENT) else b"\n\n"
        event = gap + b"data: " + upstream_error(sentence).body() + b"\n\n"
        await self._send({"type": "http.response.body", "body": event})


async def _cancel_when_client_leaves(receive: Receive, scope: anyio.CancelScope, exchange: Exchange) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    exchange.client_left = True
    scope.cancel()


@contextmanager
def _failures_named(answer: _Answer) -> Iterator[None]:
    """httpx's exceptions stop here. Raises UpstreamFailed."""
    try:
        yield
    except httpx.ConnectTimeout as error:
        raise UpstreamFailed(Failure.CONNECT_TIMEOUT) from error
    except httpx.ConnectError as error:
        raise UpstreamFailed(Failure.REFUSED) from error
    except httpx.TransportError as error:
        raise UpstreamFailed(Failure.BROKEN if answer.has_begun else Failure.LOST) from error


@lru_cache(maxsize=1024)
def _parsed(target: str) -> httpx.URL:
    """Parsing costs about as much as all else that is done to a request; there are few endpoints and routes."""
    return httpx.URL(target)


def _passable(headers: RawHeaders, dropped: frozenset[bytes]) -> list[tuple[bytes, bytes]]:
    """Without those that belong to one connection, or that its `Connection` header names. Names in lower case."""
    lower = [(name.lower(), value) for name, value in headers]
    named = [token.strip().lower() for name, value in lower if name == b"connection" for token in value.split(b",")]
    return [(name, value) for name, value in lower if name not in dropped and name not in named]
