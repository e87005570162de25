"""A client's connection: HTTP/1.1 as it comes in, request by request.

The routes of `ROUTES`, which carry prompts, are served here, below ASGI: where the parser has read a request, a `Call`
begins, and what its upstream says is written to this connection's transport as it comes. A framework's objects and
tasks would cost more than all that is done for a request. Every other route is handed to the ASGI application, in
uvicorn's own way.

States: idle, reading a head, reading a body, answering. Requests that come while one is answered are read when their
turn comes, in order (RFC 9112, 9.3.2). A request that cannot be understood is answered 400, and the connection closed:
after it nobody can tell where the next one begins. What a client sends beyond a refusal is read and thrown away for a
moment, because closing at once would take the refusal from it.

Requests are read strictly, and written anew for the upstream with a length of our own: two readings of the same bytes,
of which request smuggling lives, cannot arise (RFC 9112, 11.2).
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections import deque
from collections.abc import Callable
from typing import Any, cast
from urllib.parse import unquote

import httptools
from uvicorn.config import Config
from uvicorn.protocols.http.flow_control import FlowControl
from uvicorn.protocols.http.httptools_impl import RequestResponseCycle
from uvicorn.protocols.utils import get_local_addr, get_remote_addr, is_ssl
from uvicorn.server import ServerState

from controlplane.core.types import ApiKey
from controlplane.proxy import wire
from controlplane.proxy.auth import authenticate, credential_of, good_key
from controlplane.proxy.call import CLIENT_LEFT, Call, Upload
from controlplane.proxy.errors import (
    ApiError,
    BadRequest,
    bad_request,
    head_too_large,
    invalid_api_key,
    nothing_known_yet,
    request_timeout,
    request_too_large,
)
from controlplane.proxy.heads import KnownHead
from controlplane.proxy.multipart import ModelInForm
from controlplane.proxy.plane import Plane
from controlplane.proxy.request import Request, RequestHead, header, request_id_of

_logger = logging.getLogger("uvicorn.error")

ROUTES = frozenset(
    {
        b"/v1/chat/completions",
        b"/v1/completions",
        b"/v1/embeddings",
        b"/v1/responses",
        b"/v1/messages",
        b"/v1/rerank",
        b"/v1/score",
        b"/tokenize",
        b"/detokenize",
    }
)
"""JSON routes whose body names a `model`: passed on and back unread otherwise."""

FORM_ROUTES = frozenset({b"/v1/audio/transcriptions", b"/v1/audio/translations"})
"""Routes whose body is a form with a field `model`, and files that may be large: passed on while they come."""

_NOT_SENT_ON = wire.HOP_BY_HOP | {
    b"expect",
    # the client's credentials: an upstream gets its own
    b"authorization",
    b"x-api-key",
    b"api-key",
    b"cookie",
    # said anew for the upstream
    b"host",
    b"content-length",
    b"x-request-id",
    # an answer that is compressed could neither be read nor passed on piece by piece
    b"accept-encoding",
}
_VERSIONS = ("1.1", "1.0")
_READ_AHEAD_BYTES = 65536  # of what follows a request that is being answered
_OTHER_BODY_BYTES = 65536  # of a request that has no use for one
_THROWN_AWAY_SECONDS = 2.0
_WAIT_FOR_REST = 1024 * 1024  # a refused body up to this is read, so that the connection can go on


class _Incoming:
    """A request that is being read, or has been read and waits for its turn."""

    __slots__ = (
        "body",
        "coding",
        "credential",
        "expects_continue",
        "fields",
        "form",
        "head_bytes",
        "hosts",
        "is_plain",
        "is_short",
        "keeps_alive",
        "key",
        "length",
        "method",
        "model",
        "path",
        "refusal",
        "request",
        "size",
        "target",
        "version",
    )

    def __init__(self) -> None:
        self.target = b""
        self.fields: list[tuple[bytes, bytes]] = []
        self.method = ""
        self.version = "1.1"
        self.path = b""
        self.keeps_alive = True
        self.expects_continue = False
        self.head_bytes = 0
        self.length: int | None = None  # of the body, as announced; None: it comes in chunks
        self.form: ModelInForm | None = None
        self.model: str | None = None  # that a form asks for; None: not known yet, or not a form
        self.hosts = 0
        self.coding: bytes | None = None  # of its transfer, if it has one
        self.credential = b""
        self.is_plain = True  # no coding, no expectation, nothing to do with the connection
        self.is_short = True  # if it is refused, its body is read to its end all the same
        self.body: list[bytes] = []
        self.size = 0
        self.request: Request | None = None  # None: not one of ours, the application's
        self.key: ApiKey | None = None
        self.refusal: ApiError | None = None

    def note(self, name: bytes, value: bytes) -> None:
        """A header that says how the request is framed, or none of ours."""
        if name == b"host":
            self.hosts += 1
        elif name == b"content-length":
            self.length = int(value)
            self.is_short = self.length <= _WAIT_FOR_REST
        elif name == b"expect":
            self.is_plain = False
            self.expects_continue = value.lower() == b"100-continue" and self.version != "1.0"  # knows no such answer
        elif name == b"transfer-encoding":
            self.is_plain = False
            self.coding = value.lower()

    def check_framing(self) -> None:
        """Once all headers are noted. Raises BadRequest."""
        if self.version not in _VERSIONS:
            raise bad_request("This server speaks HTTP/1.1 and HTTP/1.0.")
        if self.coding is not None and (self.coding != b"chunked" or self.version == "1.0"):
            raise bad_request("The only transfer coding that is understood is `chunked`, in HTTP/1.1.")
        if self.hosts != 1 and (self.hosts or self.version != "1.0"):
            raise bad_request("A request must have exactly one Host header.")


class ClientConnection(asyncio.Protocol):
    """Made by uvicorn for each connection; `plane` is what the worker's requests share."""

    __slots__ = (
        "_call",
        "_cycle",
        "_flow",
        "_incoming",
        "_is_advancing",
        "_is_closing_softly",
        "_is_deaf",
        "_is_stopping",
        "_is_uploading",
        "_parser",
        "_queue",
        "_read_ahead",
        "_usual_head",
        "app_state",
        "config",
        "deadline",
        "is_full",
        "is_new",
        "keeps_alive",
        "loop",
        "plane",
        "state",
        "transport",
        "write",
    )

    def __init__(
        self,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
        *,
        plane: Plane,
    ) -> None:
        self.plane = plane
        self.config = config
        self.state = server_state
        self.app_state = app_state
        self.loop = _loop or asyncio.get_running_loop()
        self.transport: asyncio.Transport
        self.write: Callable[[bytes], None]
        self.deadline = math.inf
        self.keeps_alive = True  # after the answer that is given now
        self.is_new = True  # no request has been read on it: one may be on its way
        self.is_full = False  # the client does not read as fast as we write
        self._flow: FlowControl | None = None
        self._call: Call | None = None
        self._cycle: RequestResponseCycle | None = None
        self._incoming: _Incoming | None = None
        self._queue: deque[_Incoming] = deque()
        self._read_ahead = b""
        self._is_advancing = False
        self._is_stopping = False
        self._is_uploading = False  # the call has begun, and its request is not whole
        self._is_closing_softly = False
        self._is_deaf = False  # nothing more can be read: where the next request begins is not known
        self._parser: httptools.HttpRequestParser | None = None  # most connections never need one
        self._usual_head: KnownHead | None = None  # of the last request: a client says the same one again

    # --- the event loop's side ----------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)
        self.write = self.transport.write
        self.state.connections.add(self)  # type: ignore[arg-type]  # it need only be told to `shutdown`
        self.plane.connections.add(self)
        self.deadline = self.plane.now + self.plane.options.head_timeout_seconds

    def data_received(self, data: bytes) -> None:
        if self._is_closing_softly:
            return
        if self._is_uploading:
            self._feed(data)
            return
        if self._call is not None or self._cycle is not None or self.is_full:
            self._read_ahead += data
            if len(self._read_ahead) > _READ_AHEAD_BYTES:
                self.transport.pause_reading()
            return
        if self._incoming is None and not self._is_deaf:
            head = self._usual_head
            body = None if head is None else head.body_in(data)
            if body is None:
                head = self._usual_head = self.plane.heads.find(data)
                body = None if head is None else head.body_in(data)
            if head is not None and body is not None:
                self._begin_known(head, body)
                return
            self._feed(data)
            if len(self._queue) == 1 and self._incoming is None:
                self._remember(data, self._queue[0])
        else:
            self._feed(data)
        self._advance()

    def eof_received(self) -> bool:
        """A client that closes its side is gone: HTTP has no use for half a connection."""
        return False

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002 - asyncio's
        self.state.connections.discard(self)
        self.plane.connections.discard(self)
        self._parser = None  # it refers back to this
        call, cycle = self._call, self._cycle
        if call is not None:
            call.client_left()
        elif not self._is_deaf and self._incoming is not None and self._incoming.key is not None:
            self.plane.metrics.ended("", self._incoming.key.tenant, CLIENT_LEFT, 0.0)
        if cycle is not None:
            cycle.disconnected = True
            cycle.message_event.set()
        if self._flow is not None:
            self._flow.resume_writing()

    def pause_writing(self) -> None:
        self.is_full = True
        self.deadline = self.plane.now + self.plane.options.client_timeout_seconds
        if self._flow is not None:
            self._flow.pause_writing()
        if self._call is not None:
            self._call.client_is_full()

    def resume_writing(self) -> None:
        self.is_full = False
        if self._flow is not None:
            self._flow.resume_writing()
        if self._call is not None:
            self._call.client_has_room()
        elif self._cycle is not None:
            self.deadline = math.inf
        elif not self.transport.is_closing():
            self._await_next()

    # --- uvicorn's side -----------------------------------------------------------------------------------

    def shutdown(self) -> None:
        """The server stops: what is under way may end, and is the last on this connection."""
        self._is_stopping = True
        self.keeps_alive = False
        if self._cycle is not None:
            self._cycle.keep_alive = False
        elif self._call is None and self._incoming is None:
            self._close()

    # --- time ---------------------------------------------------------------------------------------------

    def deadline_passed(self, now: float) -> None:
        if self.is_full or self.transport.is_closing():
            self.abort()  # it reads nothing
        elif self._call is not None:
            self._call.deadline_passed(now)
        elif self._is_closing_softly or self._incoming is None:
            self._close()
        else:
            self._give_up(request_timeout())
            self._advance()

    def abort(self) -> None:
        self.deadline = math.inf
        self.transport.abort()

    def _close(self) -> None:
        """Once the client has read what it was told; it has not for ever."""
        self.deadline = self.plane.now + self.plane.options.client_timeout_seconds
        self.transport.close()

    # --- reading ------------------------------------------------------------------------------------------

    def _feed(self, data: bytes) -> None:
        if (incoming := self._incoming) is not None:
            incoming.head_bytes += len(data)
        try:
            while data and not self._is_deaf:
                data = self._parse(data)
        except httptools.HttpParserError:
            self._give_up(bad_request("This is not a valid HTTP request."))
            return
        # a head; or, without a piece of the body between, trailers or extensions of chunks, for which nobody has asked
        limit = self.plane.options.max_head_bytes
        if (incoming := self._incoming) is not None and incoming.head_bytes > limit:
            self._give_up(head_too_large(limit))

    def _parse(self, data: bytes) -> bytes:
        """What of it is to be parsed anew. Raises HttpParserError."""
        parser = self._parser = self._parser or httptools.HttpRequestParser(self)
        try:
            parser.feed_data(data)
        except httptools.HttpParserUpgrade as offer:
            return self._decline(self._queue.pop(), data[offer.args[0] :]) if self._queue else b""
        return b""

    def _decline(self, incoming: _Incoming, rest: bytes) -> bytes:
        """A request that offers to change to another protocol, as `curl --http2` does, is served in this one.

        The parser has stopped behind its head, and takes what follows for the other protocol: it is read anew, without
        the offer.
        """
        if incoming.method == "CONNECT":
            self._give_up(bad_request("This server is no tunnel."))
            return b""
        fields = [
            (name, b"close" if b"close" in value.lower() else b"keep-alive") if name == b"connection" else (name, value)
            for name, value in incoming.fields
            if name != b"upgrade"
        ]
        line = b"%b %b HTTP/%b\r\n" % (incoming.method.encode(), incoming.target, incoming.version.encode())
        self._parser = httptools.HttpRequestParser(self)
        return line + wire.lines(fields) + b"\r\n" + rest

    def _look_at_part(self, incoming: _Incoming) -> None:
        """The next request is not whole yet; there may be something to say to it all the same."""
        options, now = self.plane.options, self.plane.now
        if not incoming.method:
            if not incoming.head_bytes:
                incoming.head_bytes = 1
                self.deadline = now + options.head_timeout_seconds
            return
        self.deadline = now + options.body_timeout_seconds
        if incoming.refusal is not None and (incoming.expects_continue or not incoming.is_short):
            self._give_up(incoming.refusal, incoming)
            return
        if incoming.expects_continue:
            incoming.expects_continue = False
            self.write(wire.CONTINUE)
        if incoming.model is not None and incoming.refusal is None:
            self._begin_upload(incoming, incoming.model)

    def _begin_upload(self, incoming: _Incoming, model: str) -> None:
        """Pass a form on before it is whole: where it goes is known."""
        request = incoming.request
        assert request is not None
        request.body = b"".join(incoming.body)
        incoming.body.clear()
        now = request.received_at = time.monotonic()
        self.is_new = False
        self.keeps_alive = False  # unless all of it is read
        self._is_uploading = True
        self._call = call = Call(self.plane, self, request, incoming.key)
        call.begin_form(model, now, Upload(incoming.length))

    def on_message_begin(self) -> None:
        self._incoming = _Incoming()

    def on_url(self, url: bytes) -> None:
        assert self._incoming is not None
        self._incoming.target += url

    def on_header(self, name: bytes, value: bytes) -> None:
        incoming = self._incoming
        assert incoming is not None
        if not incoming.method:  # what comes after the body is a trailer, and nobody asked for it (RFC 9110, 6.5.1)
            incoming.fields.append((name.lower(), value))

    def on_headers_complete(self) -> None:
        incoming, parser = self._incoming, self._parser
        assert incoming is not None
        assert parser is not None
        incoming.method = parser.get_method().decode("ascii")
        incoming.version = parser.get_http_version()
        incoming.keeps_alive = parser.should_keep_alive()
        path, mark, query = incoming.target.partition(b"?")
        if not path.startswith(b"/"):
            path, mark, query = _origin_form(incoming.target)
        incoming.path = path
        try:
            if (path in ROUTES or path in FORM_ROUTES) and incoming.method == "POST":
                head = RequestHead(path, mark + query, incoming.fields)
                incoming.request = request = Request(head, b"", b"", time.monotonic())
                self._read_head(incoming, request)
            else:
                for name, value in incoming.fields:
                    incoming.note(name, value)
                incoming.check_framing()
        except ApiError as error:
            incoming.refusal = error
            if isinstance(error, BadRequest):
                incoming.keeps_alive = False  # whoever is between us may have read it otherwise

    def _read_head(self, incoming: _Incoming, request: Request) -> None:
        """Raises ApiError."""
        authorization = x_api_key = request_id = hops = None
        passed = []
        for name, value in incoming.fields:
            if name not in _NOT_SENT_ON:
                passed.append(b"%b: %b\r\n" % (name, value))
            elif name == b"authorization":
                authorization = value
            elif name == b"x-request-id":
                request_id = value
            elif name == b"x-api-key":
                x_api_key = value
            elif name == b"connection":
                hops = value.lower() if hops is None else b"%b,%b" % (hops, value.lower())
                incoming.is_plain = incoming.is_plain and hops == b"keep-alive"
            else:
                incoming.note(name, value)
        request.request_id = request_id_of(request_id)
        request.is_http_10 = incoming.version == "1.0"
        incoming.check_framing()
        if hops is not None and hops not in (b"keep-alive", b"close"):
            passed = wire.without_named(passed, hops)
        request.head.headers = b"".join(passed)
        snapshot = self.plane.directory.snapshot
        if snapshot is None:
            raise nothing_known_yet()
        incoming.credential = credential_of(authorization, x_api_key) or b""
        incoming.key = authenticate(incoming.credential, snapshot.keys)
        if incoming.length is not None and incoming.length > self.plane.options.max_body_bytes:
            raise request_too_large(self.plane.options.max_body_bytes)
        if incoming.path in FORM_ROUTES:
            incoming.is_plain = False
            incoming.form = ModelInForm(header(incoming.fields, b"content-type") or b"")

    def on_body(self, body: bytes) -> None:
        incoming = self._incoming
        assert incoming is not None
        incoming.size += len(body)
        incoming.head_bytes = 0
        if incoming.refusal is not None:
            return
        limit = self.plane.options.max_body_bytes if incoming.request is not None else _OTHER_BODY_BYTES
        if incoming.size > limit:
            self._refuse_rest(incoming, request_too_large(limit))
            return
        if incoming.form is not None:
            try:
                incoming.model = incoming.form.feed(body)
            except ApiError as error:
                self._refuse_rest(incoming, error)
                return
        if self._is_uploading and self._call is not None:
            self._call.more_came(body)
        else:
            incoming.body.append(body)

    def _refuse_rest(self, incoming: _Incoming, error: ApiError) -> None:
        incoming.refusal = error
        incoming.is_short = False
        incoming.body.clear()
        if self._is_uploading and self._call is not None:
            self._call.give_up(error)

    def on_message_complete(self) -> None:
        incoming, self._incoming = self._incoming, None
        if incoming is None or self._is_closing_softly:
            return
        if incoming.form is not None and incoming.refusal is None:
            try:
                incoming.model = incoming.form.finish()
            except ApiError as error:
                if self._is_uploading:
                    self._refuse_rest(incoming, error)
                    return
                incoming.refusal = error
        if not self._is_uploading:
            self._queue.append(incoming)
        elif self._call is not None:
            self._is_uploading = False
            self._call.all_came(keeps_alive=incoming.keeps_alive and not self._is_stopping)

    # --- heads that are known -----------------------------------------------------------------------------

    def _remember(self, data: bytes, incoming: _Incoming) -> None:
        """The request that `data` is, if another one with such a head would mean the same."""
        request = incoming.request
        if (
            request is not None
            and incoming.refusal is None
            and incoming.keeps_alive
            and incoming.is_plain
            and not request.is_http_10
        ):
            self.plane.heads.learn(data, request.head, incoming.credential)

    def _begin_known(self, head: KnownHead, body: bytes) -> None:
        """A request is whole, and its head is known."""
        now = time.monotonic()
        plane = self.plane
        self.is_new = False
        self.keeps_alive = not self._is_stopping
        self.deadline = math.inf
        request = Request(head.says, request_id_of(None), body, now)
        snapshot = plane.directory.snapshot
        key = None if snapshot is None else good_key(head.credential_hash, snapshot.keys)
        self._call = call = Call(plane, self, request, key)
        if key is None:
            call.refuse(nothing_known_yet() if snapshot is None else invalid_api_key())
        elif len(body) > plane.options.max_body_bytes:
            call.refuse(request_too_large(plane.options.max_body_bytes))
        else:
            call.begin(now)

    # --- answering ----------------------------------------------------------------------------------------

    def _begin(self, incoming: _Incoming) -> None:
        self.is_new = False
        # a parser that cannot go on: this is the last one, but for those that wait already
        can_go_on = not self._is_deaf or bool(self._queue)
        self.keeps_alive = incoming.keeps_alive and not self._is_stopping and can_go_on
        request, body = incoming.request, incoming.body
        if request is not None:
            request.body = body[0] if len(body) == 1 else b"".join(body)
            now = request.received_at = time.monotonic()
            self.deadline = math.inf
            self._call = call = Call(self.plane, self, request, incoming.key)
            if incoming.refusal is not None:
                call.refuse(incoming.refusal)
            elif incoming.model is not None:
                call.begin_form(incoming.model, now, None)
            else:
                call.begin(now)
        elif incoming.refusal is not None:
            self._refuse(incoming.refusal)
        else:
            self.deadline = math.inf
            self._serve_by_application(incoming)

    def _refuse(self, error: ApiError) -> None:
        self.write(wire.refusal(error, request_id_of(None), self.default_lines, closes=not self.keeps_alive))
        self.plane.metrics.ended("", "", error.status, 0.0)
        self._answered()

    def _give_up(self, error: ApiError, incoming: _Incoming | None = None) -> None:
        """Answer, and close: where the next request begins cannot be known, or would be too long in coming."""
        if self._is_closing_softly:
            return
        self._is_deaf = True
        if self._is_uploading and self._call is not None:
            self._call.give_up(error)
            return
        incoming = incoming or _Incoming()
        incoming.refusal = error
        incoming.keeps_alive = False
        self._incoming = None
        self._queue.append(incoming)

    def _serve_by_application(self, incoming: _Incoming) -> None:
        path, _, query = incoming.target.partition(b"?")
        flow = self._flow = self._flow or FlowControl(self.transport)
        scope = {
            "type": "http",
            "asgi": {"version": self.config.asgi_version, "spec_version": "2.3"},
            "http_version": incoming.version,
            "server": get_local_addr(self.transport),
            "client": get_remote_addr(self.transport),
            "scheme": "https" if is_ssl(self.transport) else "http",
            "root_path": self.config.root_path,
            "method": incoming.method,
            "path": unquote(incoming.path.decode("latin-1")),
            "raw_path": path,
            "query_string": query,
            "headers": incoming.fields,
            "state": self.app_state.copy(),
        }
        self._cycle = cycle = RequestResponseCycle(
            scope=cast("Any", scope),
            transport=self.transport,
            flow=flow,
            logger=_logger,
            access_logger=_logger,
            access_log=False,
            default_headers=self.state.default_headers,
            message_event=asyncio.Event(),
            expect_100_continue=False,
            keep_alive=self.keeps_alive,
            on_response=self._application_answered,
        )
        cycle.body = bytearray(b"".join(incoming.body))
        cycle.more_body = False
        cycle.message_event.set()
        task = self.loop.create_task(cycle.run_asgi(self.config.loaded_app))
        task.add_done_callback(self.state.tasks.discard)
        self.state.tasks.add(task)

    def _application_answered(self) -> None:
        cycle, self._cycle = self._cycle, None
        assert cycle is not None
        self.keeps_alive = cycle.keep_alive
        self._answered()

    # --- what a call asks of it ---------------------------------------------------------------------------

    @property
    def default_lines(self) -> bytes:
        """What every answer says: `date`, and what else uvicorn is told to say."""
        plane, headers = self.plane, self.state.default_headers
        return plane.default_lines if headers is plane.default_headers else plane.write_default_lines(headers)

    def cut_short(self) -> None:
        """End an answer visibly before its end."""
        self.keeps_alive = False
        if self._call is not None and self._call.request.is_http_10:
            self.transport.abort()  # its end would look like the answer's

    def call_ended(self) -> None:
        self._call = None
        if self._is_uploading:  # answered before all of it came
            self._is_uploading = False
            self._is_deaf = True
        self._answered()

    def _answered(self) -> None:
        self.state.total_requests += 1
        if self.transport.is_closing():
            self.deadline = self.plane.now + self.plane.options.client_timeout_seconds
        elif self.keeps_alive:
            if not self.is_full:  # or the next answer would only be piled upon this one
                self._await_next()
        elif self._is_deaf and not self._is_stopping:
            self._close_softly()
        else:
            self._close()

    def _await_next(self) -> None:
        self.deadline = self.plane.now + self.config.timeout_keep_alive
        if self._queue or self._read_ahead or self._incoming is not None:
            self._advance()

    def _close_softly(self) -> None:
        """Say that nothing more will come, and read on for a moment: closing at once would reset the connection, and
        take the answer from a client that is still sending."""
        self._is_closing_softly = True
        self._read_ahead = b""
        self.deadline = self.plane.now + _THROWN_AWAY_SECONDS
        self.transport.resume_reading()
        if self.transport.can_write_eof():
            self.transport.write_eof()

    def _advance(self) -> None:
        """Go on with what has been sent meanwhile."""
        if self._is_advancing:
            return
        self._is_advancing = True
        while self._call is None and self._cycle is None and not (self._is_closing_softly or self.is_full):
            if self._queue:
                self._begin(self._queue.popleft())
            elif self._read_ahead:
                data, self._read_ahead = self._read_ahead, b""
                self.transport.resume_reading()
                self._feed(data)
            elif self._incoming is not None:
                self._look_at_part(self._incoming)
                if not self._queue:
                    break
            else:
                break
        self._is_advancing = False


def _origin_form(target: bytes) -> tuple[bytes, bytes, bytes]:
    """Path, `?` and query of a target in another form (RFC 9112, 3.2.2: a server must accept the absolute one)."""
    try:
        url = httptools.parse_url(target)
    except httptools.HttpParserInvalidURLError:
        return target, b"", b""
    query = url.query or b""
    return url.path or b"/", b"?" if query else b"", query
