"""One request with a prompt, from its whole body to the last byte of its answer.

    ADMITTED -> WAITING -> CONNECTING -> ASKED -> ANSWERING -> over

WAITING is for a replica that starts, or for a place at one that is full (`waiting`); most calls pass through it in no
time. From CONNECTING and ASKED a call may go back to another endpoint: where no connection was made, where it was lost
without an answer, or where the answer is a failure of the engine, in its status or in a stream's first event. Each
endpoint is tried once, within a budget of retries, and nothing is sent to the client before that is decided. A first
byte that is late is not tried again: the request is being worked on.

Nothing here waits. The event loop calls in: the connections (`upstreams`), the room, the client's connection when its
client is gone, and its deadline, of which there is one a call. Whatever happens, a call ends once, in `_end`: there its
place, its connection, its share of the limits are given back, and what became of it is counted and told.
"""

from __future__ import annotations

import asyncio
import math
import time
from enum import Enum, auto
from typing import TYPE_CHECKING

from controlplane.core.balancing import Failure, may_retry
from controlplane.core.types import ApiKey, RoutableEndpoint
from controlplane.proxy import wire
from controlplane.proxy.auth import may_use
from controlplane.proxy.errors import (
    ApiError,
    model_not_found,
    nothing_known_yet,
    request_timeout,
    upstream_error,
    upstream_timeout,
)
from controlplane.proxy.request import Asked, Request, asks_for_usage, read_asked, with_usage_asked_for
from controlplane.proxy.tokens import (
    USAGE,
    BodyReader,
    EventReader,
    TokenCount,
    error_in,
    first_event,
    tokens_of,
)
from controlplane.proxy.upstreams import Head, Upstream, UpstreamConnection

if TYPE_CHECKING:
    from controlplane.proxy.limits import Grant
    from controlplane.proxy.plane import Plane
    from controlplane.proxy.protocol import ClientConnection
    from controlplane.proxy.waiting import Waiting

TELLS_USAGE_IF_ASKED = frozenset({b"/v1/chat/completions", b"/v1/completions"})
"""Streams of these say what they cost only if the request asks for it."""

NOT_SENT_TWICE = frozenset({b"/v1/responses"})
"""What an upstream may keep of such a request outlives the connection; all others end with it."""

_ENGINE_FAILED = frozenset({500, 502, 503, 504})
_STALE_SECONDS = 1.0  # a server that had closed an idle connection says so as soon as a request arrives on it
_LONGEST_OPENING = 65536  # of a stream whose first event is not whole
_BYTES_A_TOKEN = 4  # about; only where nobody has counted
_COMMENT = b": keep-alive\n\n"
_EVENT_STREAM = b"content-type: text/event-stream; charset=utf-8\r\n"
_NOT_GATHERED = b"cache-control: no-cache\r\nx-accel-buffering: no\r\n"  # by what is between us and the client
_SAID_OF_STREAMS = (b"cache-control:", b"x-accel-buffering:")
CLIENT_LEFT = 499  # for metrics and the log: nobody was answered


class Upload:
    """A request's body that is passed on while it comes."""

    __slots__ = ("is_blocked", "is_whole", "length", "pieces", "was_sent")

    def __init__(self, length: int | None) -> None:
        self.length = length  # None: it comes in chunks, and is passed on so
        self.pieces: list[bytes] = []  # that came before there was a connection
        self.was_sent = False  # some of it, and it is kept nowhere: it cannot be sent again
        self.is_whole = False
        self.is_blocked = False  # the upstream takes no more for now


class Phase(Enum):
    ADMITTED = auto()
    WAITING = auto()
    CONNECTING = auto()
    ASKED = auto()
    ANSWERING = auto()
    OVER = auto()


# asked for at every piece of every stream, where an attribute of the class would be looked up
_ADMITTED, _WAITING, _CONNECTING, _ASKED, _ANSWERING, _OVER = Phase


class Call:
    # What most calls never change is the class's: a request costs less so.
    code: str | None = None
    failure: Failure | None = None
    endpoint: RoutableEndpoint | None = None  # the last one tried
    has_client_left = False
    _asked: Asked
    _grant: Grant | None = None
    _waiting: Waiting | None = None
    _has_place = False
    _tried: tuple[str, ...] = ()
    _retries: tuple[Failure, ...] = ()
    _upstream: Upstream | None = None
    _connecting: asyncio.Task[None] | None = None
    _connection: UpstreamConnection | None = None
    _head: Head | None = None
    _opening = b""  # of a stream whose first event is not whole yet
    _events: EventReader | None = None
    _reader: BodyReader | None = None
    _tokens: TokenCount | None = None  # of an answer that came at once
    _hides_usage = False
    _has_begun = False  # something was sent to the client
    _is_chunked = False
    _upload: Upload | None = None
    _is_form = False
    _pieces = 0
    _overhead = 0.0
    _first_byte_at = 0.0
    _sent_at = 0.0
    _heard_at = 0.0
    _breaks_at = math.inf
    _patience = 0.0

    def __init__(self, plane: Plane, client: ClientConnection, request: Request, key: ApiKey | None) -> None:
        self._plane = plane
        self._client = client
        self.request = request
        self._body = request.body
        self._key = key
        self.tenant = key.tenant if key is not None else ""
        self.model = ""
        self.status = CLIENT_LEFT
        self._phase = _ADMITTED

    # --- on its way to an upstream ------------------------------------------------------------------------

    def begin(self, now: float) -> None:
        """The request is whole. Answers it, or sees to it that it will be."""
        body = self.request.body
        try:
            self._admit(read_asked(body), len(body), now)
        except ApiError as error:
            self.refuse(error)

    def begin_form(self, model: str, now: float, upload: Upload | None) -> None:
        """The same for a form that asks for this model. `upload`: what of it is still to come."""
        self._is_form = True
        if upload is not None:
            self._upload = upload
            self._client.transport.pause_reading()  # until there is somebody who takes it
        try:
            self._admit(Asked(model=model), 0, now)  # nobody knows what sound costs
        except ApiError as error:
            self.refuse(error)

    def _admit(self, asked: Asked, prompt_bytes: int, now: float) -> None:
        """Raises ApiError."""
        plane, request, key = self._plane, self.request, self._key
        assert key is not None  # or it would have been refused
        self._asked = asked
        model = asked.model
        snapshot = plane.directory.snapshot
        if snapshot is None:
            raise nothing_known_yet()
        if model not in snapshot.models or not may_use(key, model):
            raise model_not_found(model)
        self.model = model
        self._grant = plane.limits.admit(key.tenant, prompt_bytes, asked.most_tokens, now)
        if asked.stream and request.head.path in TELLS_USAGE_IF_ASKED and not asks_for_usage(asked):
            self._hides_usage = True
            self._body = with_usage_asked_for(request.body, asked)
        if plane.rooms.enter(model, key.tenant):
            self._take_turn(now)
        else:
            self._wait(now)

    def _wait(self, now: float) -> None:
        """For a place at the model. Raises ApiError."""
        self._phase = _WAITING
        self._waiting = self._plane.rooms.wait(
            self.model, self.tenant, self._let_in, self._turned_away, now, is_stream=self._asked.stream
        )
        self._breaks_at = math.inf  # the room has the deadline
        self._await_silence(now)

    def _let_in(self) -> None:
        self._waiting = None
        now = time.monotonic()
        self.request.received_at = now  # what was waited for is not the proxy's own time
        self._take_turn(now)

    def _turned_away(self, error: ApiError) -> None:
        self._waiting = None
        self.refuse(error)

    def _take_turn(self, now: float) -> None:
        self._has_place = True
        plane = self._plane
        plane.metrics.in_flight[self.model] += 1
        plane.retries.request(now)
        upstream = self._another(now)
        if upstream is not None:
            self._go(upstream, now)
            self._overhead = time.monotonic() - self.request.received_at
            return
        self._give_place_back()  # what was routable has left in this moment
        try:
            if plane.rooms.enter(self.model, self.tenant):
                self._take_turn(now)
            else:
                self._wait(now)
        except ApiError as error:
            self.refuse(error)

    def _another(self, now: float) -> Upstream | None:
        """An endpoint that was not tried, of those that are routable now: a drain counts on that."""
        router, model = self._plane.router, self.model
        affinity = None
        if router.wants_affinity(model):
            affinity = router.affinity_of(model, self.request.head.fields, self.request.body)
        return router.pick(model, affinity, self._tried, now)

    def _go(self, upstream: Upstream, now: float) -> None:
        self._upstream = upstream
        self.endpoint = upstream.endpoint
        self._tried += (upstream.url,)
        upstream.in_flight += 1
        if not upstream.breaker.is_calm:
            upstream.breaker.began(now)
        # what is passed on while it comes cannot be sent again, as it could be on one that was closed meanwhile
        connection = upstream.take() if self._upload is None else None
        if connection is not None:
            self._ask(connection, now)
        else:
            self._connect(upstream, now)

    def _connect(self, upstream: Upstream, now: float) -> None:
        self._phase = _CONNECTING
        if self._upload is not None:
            self._client.transport.pause_reading()  # nobody takes what comes
            self._upload.is_blocked = False  # as another one was
        self._connecting = upstream.connect(self)
        self._breaks_at = now + self._plane.options.connect_timeout_seconds
        self._await_silence(now)

    def connected(self, connection: UpstreamConnection) -> None:
        self._connecting = None
        self._ask(connection, time.monotonic())

    def not_connected(self, failure: Failure) -> None:
        self._connecting = None
        self._failed(failure)

    def _ask(self, connection: UpstreamConnection, now: float) -> None:
        request, upstream, upload = self.request, connection.upstream, self._upload
        head = request.head
        self._phase = _ASKED
        self._connection = connection
        self._sent_at = now
        if upload is None:
            body = self._body
            length = b"content-length: %d\r\n" % len(body)
        else:
            connection.is_sending = True
            body = b""
            length = wire.CHUNKED if upload.length is None else b"content-length: %d\r\n" % upload.length
        connection.send(
            self,
            b"POST %b%b%b%b%b%bx-request-id: %b\r\n\r\n%b"
            % (
                upstream.path,
                head.path,
                head.query,
                upstream.head,
                head.headers,
                length,
                request.request_id,
                body,
            ),
        )
        if upload is not None:
            self._send_beginning(connection, upload, now)
            return
        self._breaks_at = now + self._plane.options.first_byte_timeout_seconds
        self._await_silence(now)

    # --- a body that is still coming ----------------------------------------------------------------------

    def _send_beginning(self, connection: UpstreamConnection, upload: Upload, now: float) -> None:
        """Of the body: what has come until now."""
        pieces, upload.pieces = upload.pieces, []
        for piece in (self.request.body, *pieces):
            self._pass_up(connection, upload, piece)
        upload.was_sent = bool(pieces)
        if upload.is_whole:
            self._sent_all(connection, upload, now)
            return
        if not upload.is_blocked:  # by what came first, which may have been much
            self._client.transport.resume_reading()
        self._await_rest(now)

    def more_came(self, piece: bytes) -> None:
        """Of the body."""
        upload, connection = self._upload, self._connection
        if upload is None:
            return  # the call is over
        if connection is None or self._phase is _CONNECTING:
            upload.pieces.append(piece)
            return
        upload.was_sent = True
        self._pass_up(connection, upload, piece)
        if self._phase is _ASKED:
            self._await_rest(self._plane.now)

    def all_came(self, *, keeps_alive: bool) -> None:
        """The body is whole. `keeps_alive`: the client's connection may serve another request after it."""
        upload, connection = self._upload, self._connection
        if upload is None:
            return
        if not self._has_begun:  # else the client was told that the connection will be closed
            self._client.keeps_alive = keeps_alive
        upload.is_whole = True
        if connection is not None:
            self._sent_all(connection, upload, time.monotonic())

    def give_up(self, error: ApiError) -> None:
        """The body cannot be passed on any further."""
        self._leave_upstream(None)
        if self._phase is _ANSWERING:
            self._client.cut_short()
            self._end()
        else:
            self.refuse(error)

    def _pass_up(self, connection: UpstreamConnection, upload: Upload, piece: bytes) -> None:
        if piece:
            connection.transport.write(piece if upload.length is not None else wire.chunk(piece))

    def _sent_all(self, connection: UpstreamConnection, upload: Upload, now: float) -> None:
        connection.is_sending = False
        if upload.length is None:
            connection.transport.write(wire.LAST_CHUNK)
        self._client.transport.resume_reading()
        if self._phase is _ASKED:
            self._breaks_at = now + self._plane.options.first_byte_timeout_seconds
            self._await_silence(now)

    def _await_rest(self, now: float) -> None:
        self._breaks_at = now + self._plane.options.body_timeout_seconds
        self._await_silence(now)

    def upstream_is_full(self) -> None:
        if self._upload is not None and not self._upload.is_whole:
            self._upload.is_blocked = True
            self._client.transport.pause_reading()

    def upstream_has_room(self) -> None:
        if self._upload is not None and self._upload.is_blocked:
            self._upload.is_blocked = False
            self._client.transport.resume_reading()
            if self._phase is _ASKED and not self._upload.is_whole:
                self._await_rest(self._plane.now)

    # --- an answer ----------------------------------------------------------------------------------------

    def head_came(self, head: Head) -> None:
        self._head = head
        if head.status in _ENGINE_FAILED and self._retry(Failure.ENGINE_FAILED):
            return
        if head.status == 200 and head.is_event_stream:
            self._events = EventReader(hides_usage=self._hides_usage)

    def body_came(self, piece: bytes) -> None:
        if self._phase is not _ANSWERING:
            self._first_piece(piece)
            return
        self._heard_at = self._plane.now  # the deadline is moved when it passes: most streams end before
        self._pieces += 1
        if self._events is not None:
            piece = self._events.feed(piece)
            if not piece:
                return
        elif self._reader is not None:
            self._reader.feed(piece)
        self._client.write(b"%x\r\n%b\r\n" % (len(piece), piece) if self._is_chunked else piece)

    def chunk_came(self, chunk: bytes) -> bool:
        """One that can be passed on as it is, if it says nothing of usage."""
        events = self._events
        if self._phase is not _ANSWERING or not self._is_chunked or events is None or events.tail or USAGE in chunk:
            return False
        events.is_inside = False
        self._heard_at = self._plane.now
        self._pieces += 1
        self._client.write(chunk)
        return True

    def answer_ended(self, last: bytes) -> None:
        """The answer is whole; `last` is what of it was not told yet."""
        self._connection = None  # it may serve somebody else by now
        if self._phase is not _ANSWERING:
            if not self._answer_began(last, is_whole=True):
                return
            last = b""
        elif self._events is not None:
            last = self._events.feed(last) + self._events.tail if last or self._events.tail else b""
        elif self._reader is not None:
            self._reader.feed(last)
        if self._is_chunked:
            self._client.write(wire.chunk(last) + wire.LAST_CHUNK if last else wire.LAST_CHUNK)
        elif last:
            self._client.write(last)
        self._end()

    def _first_piece(self, piece: bytes) -> None:
        received_at = time.monotonic()
        if self._answer_began(piece, is_whole=False):
            self._overhead += time.monotonic() - received_at

    def _answer_began(self, piece: bytes, *, is_whole: bool) -> bool:
        """Pass the beginning on. False: not yet, or not at all, and it was seen to."""
        head, upstream, events = self._head, self._upstream, self._events
        assert head is not None
        assert upstream is not None
        if events is not None:
            piece = self._opening = self._opening + piece
            event = first_event(piece)
            if event is None and not is_whole and len(piece) <= _LONGEST_OPENING:
                return False
            if event is not None and (refused := error_in(event)) is not None:
                self._refused_in_stream(*refused)
                return False
            piece = events.feed(piece)
            if is_whole:
                piece += events.tail
            self._opening = b""
        elif self._has_begun:  # the client has been told that it gets a stream, and this is none: most likely an error
            self._opening += piece
            if is_whole:
                _tell_breaker(upstream, head.status, time.monotonic())
                self._tokens = tokens_of(self._opening)
                self._end_stream_with(self._opening)
            return False
        now = self._first_byte_at = time.monotonic()
        _tell_breaker(upstream, head.status, now)
        self._phase = _ANSWERING
        options = self._plane.options
        self._patience = options.idle_timeout_seconds
        if events is not None:
            self._patience = min(self._patience, options.keepalive_comment_seconds)
        elif is_whole:
            self._tokens = tokens_of(piece)
        else:
            self._reader = BodyReader()
            self._reader.feed(piece)
        self._client.deadline = now + self._patience
        self._heard_at = now
        if self._has_begun:  # with a comment
            self._client.write(wire.chunk(piece) if self._is_chunked and piece else piece)
            return True
        self._has_begun = True
        self.status = head.status
        framing = self._framing(head, len(piece) if is_whole else None)
        self._client.write(
            b"%b%b%b%bx-request-id: %b\r\n%b%b\r\n%b"
            % (
                wire.STATUS_LINES.get(head.status) or wire.status_line(head.status),
                self._client.default_lines,
                b"".join(head.lines if events is None else _of_stream(head.lines)),
                b"" if self._grant is None else self._grant.headers,
                self.request.request_id,
                framing,
                b"" if self._client.keeps_alive else wire.CLOSE,
                wire.chunk(piece) if self._is_chunked and piece else piece,
            )
        )
        return True

    def _framing(self, head: Head, whole: int | None) -> bytes:
        """The header that says where the answer ends. `whole`: its length, if it is here already."""
        if head.status == 204 or head.status == 304:
            return b""
        if self._events is None:  # or events are hidden, and comments put in
            length = whole if head.content_length is None else head.content_length
            if length is not None:
                return b"content-length: %d\r\n" % length
        if self.request.is_http_10:
            self._client.keeps_alive = False  # which is how it ends
            return b""
        self._is_chunked = True
        return wire.CHUNKED

    # --- before there is an answer ------------------------------------------------------------------------

    def upstream_lost(self) -> None:
        """The connection ended before the answer did."""
        connection, self._connection = self._connection, None
        if self._phase is _ANSWERING:
            self._break_off(Failure.BROKEN)
            return
        upstream, now = self._upstream, time.monotonic()
        assert upstream is not None
        assert connection is not None
        is_stale = not connection.is_fresh and self._head is None and now - self._sent_at < _STALE_SECONDS
        if is_stale and upstream.is_routable:
            # It had been closed while it was idle, as the others of that time have been.
            upstream.close_idle(math.inf)
            self._connect(upstream, now)
            return
        self._failed(Failure.LOST)

    def _failed(self, failure: Failure) -> None:
        if not self._retry(failure):
            self._fail(failure)

    def _retry(self, failure: Failure) -> bool:
        """Ask another endpoint, if that is allowed and there is one."""
        plane, now = self._plane, time.monotonic()
        if not may_retry(failure, self._retries, is_repeatable=self.request.head.path not in NOT_SENT_TWICE):
            return False
        if len(self._tried) >= plane.options.max_tries or (self._upload is not None and self._upload.was_sent):
            return False
        other = self._another(now)
        # a refused connection cost nobody anything, and each endpoint is tried once
        if other is None or not (failure is Failure.REFUSED or plane.retries.may_retry(now)):
            return False
        self._leave_upstream(failure)
        self._retries += (failure,)
        self._head = self._events = self._reader = None
        self._opening = b""
        self._go(other, now)
        return True

    def _refused_in_stream(self, status: int, body: bytes) -> None:
        """An event stream that begins with an error: nothing of it has been passed on."""
        if status in _ENGINE_FAILED and self._retry(Failure.ENGINE_FAILED):
            return
        if self._upstream is not None:
            _tell_breaker(self._upstream, status, time.monotonic())  # it has answered, and a probe waits to hear that
        self._leave_upstream(None)
        if self._has_begun:
            self._end_stream_with(body)
        else:
            self._answer(status, body)

    def _fail(self, failure: Failure) -> None:
        self._leave_upstream(failure)
        self.failure = failure
        sentence = self._sentence(failure)
        self.refuse(upstream_timeout(sentence) if failure is Failure.LATE else upstream_error(sentence))

    def _sentence(self, failure: Failure) -> str:
        match failure:
            case Failure.REFUSED | Failure.CONNECT_TIMEOUT:
                return "No replica of the model could be reached."
            case Failure.LOST:
                return "The replica closed the connection without an answer. The request may have been worked on."
            case Failure.LATE:
                return f"The replica sent nothing for {self._plane.options.first_byte_timeout_seconds:g} s."
            case _:
                return "The answer broke off: the replica stopped sending it."

    def _answer(self, status: int, body: bytes) -> None:
        """An upstream's refusal, as an answer of its own."""
        self.status = status
        client = self._client
        client.write(
            wire.document(status, body, self.request.request_id, client.default_lines, closes=not client.keeps_alive)
        )
        self._end()

    def refuse(self, error: ApiError) -> None:
        """Answer with an error, now."""
        self.code = error.code
        if self._has_begun:
            self._end_stream_with(error.body())
            return
        self.status = error.status
        self._client.write(
            wire.refusal(
                error, self.request.request_id, self._client.default_lines, closes=not self._client.keeps_alive
            )
        )
        self._end()

    # --- an end before the end ----------------------------------------------------------------------------

    def _break_off(self, failure: Failure) -> None:
        """Tell an event stream's reader in one last event; any other body is left short of its end.

        An event whose own end never came is not passed on.
        """
        self._leave_upstream(failure)
        self.failure = failure
        if self._events is not None and not self._events.is_inside:
            self._end_stream_with(upstream_error(self._sentence(failure)).body())
            return
        self._client.cut_short()
        self._end()

    def _end_stream_with(self, error: bytes) -> None:
        event = b"data: %b\n\n" % b"\ndata: ".join(error.splitlines())
        self._client.keeps_alive = False
        self._client.write(wire.chunk(event) + wire.LAST_CHUNK if self._is_chunked else event)
        self._end()

    def client_left(self) -> None:
        if self._waiting is not None:
            self._waiting.leave()
        self._leave_upstream(None)
        self.has_client_left = True
        self._end()

    # --- time, and the client's pace ----------------------------------------------------------------------

    def deadline_passed(self, now: float) -> None:
        """The client's deadline, which is this call's while there is one."""
        if self._phase is _ANSWERING and now < self._heard_at + self._patience:
            self._client.deadline = self._heard_at + self._patience
        elif self._phase is _ANSWERING and now - self._heard_at >= self._plane.options.idle_timeout_seconds:
            self._break_off(Failure.BROKEN)
        elif self._phase is _CONNECTING and now >= self._breaks_at:
            self._failed(Failure.CONNECT_TIMEOUT)
        elif self._phase is _ASKED and now >= self._breaks_at:
            if self._upload is None or self._upload.is_whole or self._upload.is_blocked:
                self._fail(Failure.LATE)
            else:
                self.give_up(request_timeout())
        else:
            self._comment(now)

    def _await_silence(self, now: float) -> None:
        """Wake when the next comment is due, where one can be sent, or when it has taken too long."""
        self._client.deadline = (
            min(self._breaks_at, now + self._plane.options.keepalive_comment_seconds)
            if self._asked.stream or self._events is not None
            else self._breaks_at
        )

    def _comment(self, now: float) -> None:
        """Tell the client, and what is between, that the stream lives. From now on it is one, whatever comes."""
        client = self._client
        if self._phase is _ANSWERING:
            self._breaks_at = self._heard_at + self._plane.options.idle_timeout_seconds
        elif not self._has_begun:
            self._has_begun = True
            self.status = 200
            self._is_chunked = not self.request.is_http_10
            if not self._is_chunked:
                client.keeps_alive = False
            client.write(
                b"%b%b%bx-request-id: %b\r\n%b%b\r\n"
                % (
                    wire.STATUS_LINES[200],
                    client.default_lines,
                    _EVENT_STREAM + _NOT_GATHERED,
                    self.request.request_id,
                    wire.CHUNKED if self._is_chunked else b"",
                    b"" if client.keeps_alive else wire.CLOSE,
                )
            )
        if self._events is None or not self._events.is_inside:
            client.write(wire.chunk(_COMMENT) if self._is_chunked else _COMMENT)
        self._await_silence(now)

    def client_is_full(self) -> None:
        """The client reads more slowly than the upstream writes; that is not the upstream's fault."""
        if self._connection is not None:
            self._connection.transport.pause_reading()

    def client_has_room(self) -> None:
        if self._connection is not None:
            self._connection.transport.resume_reading()
        self._heard_at = self._plane.now
        self._client.deadline = self._plane.now + self._patience

    # --- the end ------------------------------------------------------------------------------------------

    def _leave_upstream(self, failure: Failure | None) -> None:
        if self._connecting is not None:
            self._connecting.cancel()
            self._connecting = None
        if self._connection is not None:
            self._connection.abandon()
            self._connection = None
        if self._upstream is not None:
            self._upstream.in_flight -= 1
            if failure is not None:
                is_unreachable = failure is Failure.REFUSED or failure is Failure.CONNECT_TIMEOUT
                self._upstream.breaker.failed(time.monotonic(), is_unreachable=is_unreachable)
            self._upstream = None

    def _give_place_back(self) -> None:
        self._has_place = False
        self._plane.metrics.in_flight[self.model] -= 1
        self._plane.rooms.leave(self.model, self.tenant)

    def _end(self) -> None:
        self._phase = _OVER
        self._upload = None
        plane, upstream, now = self._plane, self._upstream, time.monotonic()
        if upstream is not None:
            upstream.in_flight -= 1
        if self._has_place:
            self._give_place_back()
        tokens = self._tokens or self._read_tokens()
        self._count(tokens, now)
        if self._grant is not None:
            if tokens.is_known:
                self._grant.settle(tokens.prompt + tokens.completion)
            else:
                self._grant.settle(None if self._sent_at else 0)  # what reached no engine has cost nothing
        if self.status >= 400 or self.failure is not None or not plane.log.is_quiet:
            self._tell(now)
        self._client.call_ended()

    def _tell(self, now: float) -> None:
        self._plane.log.write(
            request_id=self.request.request_id,
            tenant=self.tenant,
            model=self.model,
            status=self.status,
            code=self.code,
            upstream=None if self.endpoint is None else self.endpoint.url,
            failure=None if self.failure is None else self.failure.value,
            retries=len(self._retries),
            is_broken=self.failure is not None and self._first_byte_at > 0.0,
            client_left=self.has_client_left,
            seconds=now - self.request.started_at,
            now=now,
        )

    def _read_tokens(self) -> TokenCount:
        if self._events is not None:
            return self._events.tokens
        if self._reader is not None:
            if not self.has_client_left and self.failure is None:
                self._reader.end()
            return self._reader.tokens
        return TokenCount()

    def _count(self, tokens: TokenCount, now: float) -> None:
        plane, started_at, first_byte_at = self._plane, self.request.started_at, self._first_byte_at
        metrics, model, tenant, endpoint = plane.metrics, self.model, self.tenant, self.endpoint
        is_aborted = self.has_client_left or self.failure is not None
        if is_aborted or self._retries:
            self._count_faults()
        if endpoint is not None and self._sent_at:
            if is_aborted and first_byte_at and not tokens.is_known:
                # it did not live to tell: a piece of a stream is a token, or a few
                tokens.prompt = 0 if self._is_form else len(self.request.body) // _BYTES_A_TOKEN
                tokens.completion = self._pieces
            if is_aborted or self.status < 400:
                plane.usage.record(
                    tenant,
                    model,
                    endpoint.endpoint_id,
                    endpoint.replica,
                    tokens.prompt,
                    tokens.completion,
                    tokens.cached,
                    is_aborted,
                    plane.today,
                )
        metrics.ended(
            model,
            tenant,
            self.status,
            now - started_at,
            first_byte_seconds=first_byte_at - started_at if first_byte_at else None,
            overhead_seconds=self._overhead,
            prompt=tokens.prompt,
            completion=tokens.completion,
            cached=tokens.cached,
        )

    def _count_faults(self) -> None:
        metrics, model = self._plane.metrics, self.model
        for failure in self._retries:
            metrics.retried(model, failure.value)
        if self.failure is not None and self._first_byte_at:
            metrics.broke(model)
        if self.has_client_left:
            metrics.client_left(model)


def _tell_breaker(upstream: Upstream, status: int, now: float) -> None:
    """It has answered with this status, in its head or in a stream's first event."""
    breaker = upstream.breaker
    if status in _ENGINE_FAILED:
        breaker.failed(now)
    elif not breaker.is_calm:
        breaker.succeeded(now)


def _of_stream(lines: list[bytes]) -> list[bytes]:
    """An event stream's headers, saying that nothing in between shall keep or gather it."""
    return [*(line for line in lines if not line.startswith(_SAID_OF_STREAMS)), _NOT_GATHERED]
