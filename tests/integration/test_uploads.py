"""Forms with audio are passed on while they come: byte for byte, at the upstream's pace, and given up where need be.

Client and upstream are plain sockets, so that either can stop, stall or leave in the middle of a body.
"""

from __future__ import annotations

import asyncio
import json
import re
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import ExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field, replace
from random import Random
from typing import Any

import pytest

from controlplane.clock import utc_now
from controlplane.core.types import ReplicaSetSpec, SlurmResources
from controlplane.db import Database, replica_sets
from controlplane.proxy import ProxyOptions
from controlplane.proxy.plane import Plane
from tests.integration.proxy_rig import (
    MODEL,
    QUICK,
    SECONDS,
    Running,
    make_key,
    make_routable,
    opened,
    refusing_url,
    running_proxy,
    until,
)

MEBIBYTE = 2**20
ROUTE = "/v1/audio/transcriptions"
AUDIO = Random(7).randbytes(20 * MEBIBYTE)
ANSWER = b'{"text":"hi"}'
BOUNDARY = b"----x0"
END = b"--" + BOUNDARY + b"--\r\n"


def part(disposition: bytes, value: bytes) -> bytes:
    return b"--" + BOUNDARY + b"\r\ncontent-disposition: form-data; " + disposition + b"\r\n\r\n" + value + b"\r\n"


def model_part(model: str = MODEL) -> bytes:
    return part(b'name="model"', model.encode())


def form(audio: bytes = AUDIO, model: str = MODEL) -> bytes:
    return model_part(model) + part(b'name="file"; filename="a.wav"', audio) + END


@pytest.fixture
async def db(database_url: str) -> AsyncIterator[Database]:
    async with opened(database_url) as database:
        yield database


# --- an upstream that takes what it likes ----------------------------------------------------------------


@dataclass
class Taker:
    """The upstream's end of one connection."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    head: bytes
    body: bytearray = field(default_factory=bytearray)
    _has_ended: bool = False

    @property
    def is_chunked(self) -> bool:
        return b"\r\ntransfer-encoding: chunked\r\n" in self.head

    @property
    def length(self) -> int:
        found = re.search(rb"\r\ncontent-length: (\d+)\r\n", self.head)
        assert found
        return int(found[1])

    async def take(self, size: int | None = None) -> None:
        """Read until so much of the body is here, or all of it."""
        while not self._has_ended and (size is None or len(self.body) < size):
            await self._take_piece()

    async def _take_piece(self) -> None:
        if not self.is_chunked:
            piece = await self.reader.read(MEBIBYTE)
            if not piece:
                raise ConnectionResetError
            self.body += piece
            self._has_ended = len(self.body) >= self.length
            return
        length = int(await self.reader.readline() or b"-1", 16)
        if length < 0:
            raise ConnectionResetError
        self.body += await self.reader.readexactly(length)
        assert await self.reader.readexactly(2) == b"\r\n"
        self._has_ended = length == 0

    async def answer(self, body: bytes = ANSWER, status: bytes = b"200 OK") -> None:
        head = b"HTTP/1.1 %b\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n" % (status, len(body))
        self.writer.write(head + body)
        await self.writer.drain()

    async def until_let_go(self) -> None:
        """Read on until the proxy has closed."""
        async with asyncio.timeout(SECONDS):
            with suppress(ConnectionError):
                while await self.reader.read(MEBIBYTE):
                    pass


@dataclass
class Place:
    url: str
    takers: list[Taker] = field(default_factory=list)

    async def taker(self, number: int = 0) -> Taker:
        """The one that got the request of this number, once its head is here."""

        async def found() -> list[Taker]:
            return self.takers

        return (await until(found, lambda takers: len(takers) > number))[number]


Play = Callable[[Taker], Awaitable[None]]


async def reply(taker: Taker) -> None:
    await taker.take()
    await taker.answer()


async def idle(taker: Taker) -> None:
    """Do what the test does with it."""
    await asyncio.Event().wait()


async def vanish(taker: Taker) -> None:
    """End the connection as a process that dies does."""
    taker.writer.transport.abort()


@asynccontextmanager
async def place(play: Play, *, receive_bytes: int | None = None) -> AsyncIterator[Place]:
    """`receive_bytes`: what the kernel keeps for it."""
    running: set[asyncio.Task[Any]] = set()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        running.add(task)
        try:
            while not writer.is_closing():
                head = await reader.readuntil(b"\r\n\r\n")
                made.takers.append(taker := Taker(reader, writer, head))
                await play(taker)
        except (ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass  # the proxy left
        finally:
            writer.close()
            running.discard(task)

    listener = socket.socket()
    if receive_bytes is not None:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
    listener.bind(("127.0.0.1", 0))
    server = await asyncio.start_server(serve, sock=listener)
    made = Place(f"http://127.0.0.1:{listener.getsockname()[1]}")
    try:
        yield made
    finally:
        server.close()
        for task in list(running):
            task.cancel()
        await asyncio.gather(*running)


# --- a client that sends what it likes -------------------------------------------------------------------


@dataclass
class Answer:
    status: int
    head: bytes
    body: bytes

    @property
    def code(self) -> str:
        return str(json.loads(self.body)["error"]["code"])

    @property
    def closes(self) -> bool:
        return b"\r\nconnection: close\r\n" in self.head


@dataclass
class Client:
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    is_chunked: bool

    async def send(self, data: bytes, *, piece_bytes: int = 65536) -> None:
        """So much of the body."""
        for start in range(0, len(data), piece_bytes):
            piece = data[start : start + piece_bytes]
            self.writer.write(b"%x\r\n%b\r\n" % (len(piece), piece) if self.is_chunked else piece)
            await self.writer.drain()

    async def end(self) -> None:
        if self.is_chunked:
            self.writer.write(b"0\r\n\r\n")
            await self.writer.drain()

    async def answer(self) -> Answer:
        async with asyncio.timeout(SECONDS):
            head = await self.reader.readuntil(b"\r\n\r\n")
            found = re.search(rb"\r\ncontent-length: (\d+)\r\n", head)
            assert found, head
            return Answer(int(head.split(b" ")[1]), head, await self.reader.readexactly(int(found[1])))

    async def until_closed(self) -> None:
        async with asyncio.timeout(SECONDS):
            assert await self.reader.read() == b""


@asynccontextmanager
async def client(
    proxy: Running, length: int | None, *extra: bytes, path: str = ROUTE, key: str | None = None
) -> AsyncIterator[Client]:
    """One request's head is sent. `length`: of its body; None: it will come in chunks."""
    reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
    framing = b"transfer-encoding: chunked" if length is None else b"content-length: %d" % length
    lines = (
        b"POST %b HTTP/1.1" % path.encode(),
        b"host: x",
        b"authorization: Bearer %b" % (key or proxy.key).encode(),
        b"content-type: multipart/form-data; boundary=" + BOUNDARY,
        framing,
        *extra,
    )
    writer.write(b"\r\n".join(lines) + b"\r\n\r\n")
    try:
        yield Client(reader, writer, length is None)
    finally:
        writer.close()


def plane_of(proxy: Running) -> Plane:
    """What its connections share."""
    plane: Plane = proxy.app.protocol.keywords["plane"]
    return plane


async def until_at_rest(proxy: Running) -> None:
    """Nothing is in flight, at no model and no upstream."""

    async def counted() -> tuple[float, int]:
        return proxy.metric("proxy_in_flight", model=MODEL), sum(proxy.app.in_flight.values())

    await until(counted, lambda counts: counts == (0, 0), seconds=2.0)


async def until_no_client_is_left(proxy: Running) -> None:
    async def connected() -> int:
        return len(plane_of(proxy).connections)

    await until(connected, lambda count: count == 0)


def answered(proxy: Running, status: int) -> float:
    """How many requests ended so, at whatever model."""
    return sum(
        sample.value
        for family in proxy.registry.collect()
        for sample in family.samples
        if sample.name == "proxy_requests_total" and sample.labels["code"] == str(status)
    )


@asynccontextmanager
async def proxy_of(db: Database, *urls: str, options: ProxyOptions = QUICK) -> AsyncIterator[Running]:
    if urls:
        await make_routable(db, *urls)
    async with running_proxy(db, options, key=await make_key(db)) as proxy:
        yield proxy
        await until_at_rest(proxy)


# --- on their way ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("route", [ROUTE, "/v1/audio/translations"])
@pytest.mark.parametrize("is_chunked", [False, True], ids=["with a length", "in chunks"])
async def test_20_mebibytes_arrive_as_they_were_sent_and_the_first_half_before_the_second_was(
    db: Database, is_chunked: bool, route: str
) -> None:
    body = form()
    half = len(body) // 2
    async with (
        place(idle) as up,
        proxy_of(db, up.url) as proxy,
        client(proxy, None if is_chunked else len(body), path=route) as sender,
    ):
        sending = asyncio.create_task(sender.send(body[:half]))
        taker = await up.taker()
        async with asyncio.timeout(SECONDS):
            await taker.take(half)  # nothing of the other half exists yet
            await sending
            assert bytes(taker.body) == body[:half]
            sending = asyncio.create_task(sender.send(body[half:]))
            await taker.take(len(body))
            await sending
            await sender.end()
            await taker.take()
        await taker.answer()
        answer = await sender.answer()
    assert bytes(taker.body) == body
    assert taker.is_chunked is is_chunked
    assert taker.head.startswith(f"POST {route} HTTP/1.1\r\n".encode())
    assert b"authorization" not in taker.head
    assert (answer.status, answer.body, answer.closes) == (200, ANSWER, False)


async def test_a_connection_serves_on_after_an_upload_what_was_sent_behind_it_included(db: Database) -> None:
    body = form(AUDIO[:300_000])
    async with place(reply) as up, proxy_of(db, up.url) as proxy, client(proxy, len(body)) as sender:
        await sender.send(body[:200_000])
        await up.taker()
        head = up.takers[0].head
        models = b"GET /v1/models HTTP/1.1\r\nhost: x\r\nauthorization: Bearer %b\r\n\r\n" % proxy.key.encode()
        await sender.send(body[200_000:] + models, piece_bytes=2**30)
        assert (await sender.answer()).body == ANSWER
        assert (await sender.answer()).status == 200
        assert len(up.takers) == 1
        assert b"content-length: %d\r\n" % len(body) in head


@pytest.mark.parametrize("is_chunked", [False, True], ids=["with a length", "in chunks"])
@pytest.mark.parametrize("model_at", ["first", "last"])
async def test_an_upstream_that_does_not_read_holds_the_client_back(
    db: Database, model_at: str, is_chunked: bool
) -> None:
    """Also where the beginning, which had to be kept to find the model, is more than the upstream takes at once."""
    audio = part(b'name="file"; filename="a.wav"', AUDIO[: 8 * MEBIBYTE])
    rest = part(b'name="more"; filename="b.wav"', AUDIO + AUDIO) + END
    opening = model_part() + audio if model_at == "first" else audio + model_part()
    body = opening + rest
    options = replace(QUICK, max_body_bytes=256 * MEBIBYTE)
    sent = 0

    async def push(sender: Client) -> None:
        nonlocal sent
        for start in range(0, len(body), MEBIBYTE // 4):
            await sender.send(body[start : start + MEBIBYTE // 4], piece_bytes=MEBIBYTE // 4)
            sent += MEBIBYTE // 4

    async with (
        place(idle, receive_bytes=262_144) as up,
        proxy_of(db, up.url, options=options) as proxy,
        client(proxy, None if is_chunked else len(body)) as sender,
    ):
        raw: socket.socket = sender.writer.get_extra_info("socket")
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 262_144)
        pushing = asyncio.create_task(push(sender))
        taker = await up.taker()
        before = -1
        while before != sent:  # half a second without a step
            before = sent
            await asyncio.sleep(0.5)
        assert not pushing.done()
        had_to_be_kept = len(audio) if model_at == "last" else 0
        [call] = [one._call for one in plane_of(proxy).connections if one._call is not None]
        assert call._connection is not None
        assert call._connection.transport.get_write_buffer_size() <= had_to_be_kept + MEBIBYTE
        assert sent <= had_to_be_kept + 16 * MEBIBYTE  # most of which are in the kernel's buffers
        async with asyncio.timeout(4 * SECONDS):
            await taker.take(len(body))
            await pushing
            await sender.end()
            await taker.take()
        await taker.answer()
        assert (await sender.answer()).status == 200
    assert bytes(taker.body) == body


async def test_a_form_is_kept_until_its_model_is_known_and_then_passed_on(db: Database) -> None:
    audio = part(b'name="file"; filename="a.wav"', AUDIO[:MEBIBYTE])
    rest = part(b'name="language"', b"de") + END
    async with place(idle) as up, proxy_of(db, up.url) as proxy, client(proxy, None) as sender:
        await sender.send(audio)

        async def kept() -> int:
            return sum(one._incoming.size for one in plane_of(proxy).connections if one._incoming is not None)

        await until(kept, lambda size: size == len(audio))
        assert up.takers == []
        beginning = audio + model_part() + rest[:-20]  # where the model ends is told by what follows
        await sender.send(beginning[len(audio) :])
        taker = await up.taker()
        async with asyncio.timeout(SECONDS):
            await taker.take(len(beginning))
        assert bytes(taker.body) == beginning
        await sender.send(rest[-20:])
        await sender.end()
        await taker.take()
        await taker.answer()
        assert (await sender.answer()).status == 200
        assert bytes(taker.body) == audio + model_part() + rest


async def test_who_waits_to_be_told_to_continue_is_told_or_refused(db: Database) -> None:
    body = form(AUDIO[:MEBIBYTE])
    async with place(reply) as up, proxy_of(db, up.url) as proxy:
        async with client(proxy, len(body), b"expect: 100-continue") as sender:
            async with asyncio.timeout(SECONDS):
                assert await sender.reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
            await sender.send(body)
            assert (await sender.answer()).status == 200
        assert [bytes(taker.body) for taker in up.takers] == [body]
        assert b"expect" not in up.takers[0].head
        async with client(proxy, len(body), b"expect: 100-continue", key="sk-nobody") as sender:
            assert (await sender.answer()).status == 401
        async with client(proxy, QUICK.max_body_bytes + 1, b"expect: 100-continue") as sender:
            assert (await sender.answer()).status == 413
        assert len(up.takers) == 1


async def test_an_upload_waits_for_a_replica_and_is_let_in(db: Database) -> None:
    body = form()
    asleep = ReplicaSetSpec("asleep", MODEL, template="t", slurm=SlurmResources(time_limit_seconds=3600))
    await replica_sets.apply(db, asleep, actor="test", now=utc_now())
    async with place(reply) as up, proxy_of(db) as proxy:
        async with client(proxy, len(body)) as sender:
            sending = asyncio.create_task(sender.send(body))

            async def held() -> int:
                return plane_of(proxy).rooms.held.get(MODEL, 0)

            await until(held, lambda count: count == 1)
            assert not sending.done()
            await make_routable(db, up.url)
            async with asyncio.timeout(SECONDS):
                await sending
            assert (await sender.answer()).body == ANSWER
        assert [bytes(taker.body) for taker in up.takers] == [body]


# --- given up --------------------------------------------------------------------------------------------


FAULTS = {
    "a second model": (b"\r\n" + model_part("secret"), "model"),
    "a part that is none": (b"\r\n--" + BOUNDARY + b"\r\nno header\r\n\r\n", "body"),
}
"""What may follow a good beginning, and the parameter that is at fault."""


@pytest.mark.parametrize("is_chunked", [False, True], ids=["with a length", "in chunks"])
@pytest.mark.parametrize("fault", FAULTS)
async def test_a_fault_behind_the_beginning_is_told_and_the_upstream_is_let_go(
    db: Database, fault: str, is_chunked: bool
) -> None:
    rest, param = FAULTS[fault]
    beginning = form()[: 2 * MEBIBYTE]
    async with place(idle) as up, proxy_of(db, up.url) as proxy:
        async with client(proxy, None if is_chunked else len(form())) as sender:
            sending = asyncio.create_task(sender.send(beginning))
            taker = await up.taker()
            await taker.take(len(beginning))
            await sending
            await sender.send(rest)
            answer = await sender.answer()
            await taker.until_let_go()
            await sender.until_closed()
        assert (answer.status, answer.code, answer.closes) == (400, "invalid_request", True)
        assert json.loads(answer.body)["error"]["param"] == param
        await until_no_client_is_left(proxy)
        assert answered(proxy, 400) == 1
        assert answered(proxy, 499) == 0


async def test_a_form_without_an_end_is_refused_at_its_length(db: Database) -> None:
    body = form(AUDIO[:MEBIBYTE])[: -len(END)]
    async with place(idle) as up, proxy_of(db, up.url) as proxy, client(proxy, len(body)) as sender:
        await sender.send(body[:-10])
        taker = await up.taker()
        await taker.take(len(body) - 10)
        await sender.send(body[-10:])
        answer = await sender.answer()
        assert (answer.status, answer.closes) == (400, True)
        await taker.until_let_go()
        await sender.until_closed()


async def test_a_chunk_that_is_none_is_refused_and_the_upstream_is_let_go(db: Database) -> None:
    beginning = form()[:MEBIBYTE]
    async with place(idle) as up, proxy_of(db, up.url) as proxy, client(proxy, None) as sender:
        await sender.send(beginning)
        taker = await up.taker()
        await taker.take(len(beginning))
        sender.writer.write(b"no size\r\n")
        answer = await sender.answer()
        assert (answer.status, answer.code, answer.closes) == (400, "invalid_request", True)
        await taker.until_let_go()
        await sender.until_closed()


async def test_more_than_the_limit_in_chunks_is_refused_and_the_upstream_is_let_go(db: Database) -> None:
    options = replace(QUICK, max_body_bytes=3 * MEBIBYTE)
    body = form()
    async with place(idle) as up, proxy_of(db, up.url, options=options) as proxy, client(proxy, None) as sender:
        sending = asyncio.create_task(sender.send(body[: 3 * MEBIBYTE]))
        taker = await up.taker()
        await taker.take(3 * MEBIBYTE)
        await sending
        await sender.send(b"x")
        answer = await sender.answer()
        assert (answer.status, answer.code, answer.closes) == (413, "request_too_large", True)
        await taker.until_let_go()
        await sender.until_closed()
        assert bytes(taker.body) == body[: 3 * MEBIBYTE]


@pytest.mark.parametrize("status", [200, 400])
async def test_an_answer_before_the_body_is_whole_reaches_the_client_and_closes(db: Database, status: int) -> None:
    async def hasty(taker: Taker) -> None:
        await taker.take(65536)
        await taker.answer(status=b"%d x" % status)
        await taker.until_let_go()

    async with place(hasty) as up, proxy_of(db, up.url) as proxy:
        async with client(proxy, len(form())) as sender:
            await sender.send(form()[:MEBIBYTE])
            answer = await sender.answer()
            assert (answer.status, answer.body, answer.closes) == (status, ANSWER, True)
            await sender.until_closed()
        await until_no_client_is_left(proxy)
        assert plane_of(proxy).upstreams.connections()["idle"] == 0  # half a request stands in it
        assert (answered(proxy, status), answered(proxy, 499)) == (1, 0)


async def test_an_answer_that_began_before_the_body_was_whole_ends_with_the_connection(db: Database) -> None:
    """It was said so in its head, and what an old client takes for its end is nothing else."""
    body = form(AUDIO[:MEBIBYTE])
    async with place(idle) as up, proxy_of(db, up.url) as proxy, client(proxy, len(body)) as sender:
        await sender.send(body[:-10])
        taker = await up.taker()
        await taker.take(len(body) - 10)
        taker.writer.write(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n3\r\none\r\n")
        async with asyncio.timeout(SECONDS):
            head = await sender.reader.readuntil(b"\r\n\r\n")
        assert b"\r\nconnection: close\r\n" in head
        await sender.send(body[-10:])
        await taker.take()
        assert bytes(taker.body) == body
        taker.writer.write(b"3\r\ntwo\r\n0\r\n\r\n")
        async with asyncio.timeout(2):  # an idle connection is closed after five
            assert await sender.reader.read() == b"3\r\none\r\n3\r\ntwo\r\n0\r\n\r\n"


async def test_of_a_transcript_that_broke_off_its_pieces_are_counted_and_no_prompt(db: Database) -> None:
    """Nobody knows what sound costs, and its bytes are no text."""

    async def breaks(taker: Taker) -> None:
        await taker.take()
        taker.writer.write(
            b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n"
            b"transfer-encoding: chunked\r\n\r\na\r\ndata: {}\n\n\r\n"
        )
        await taker.writer.drain()
        await vanish(taker)

    body = form()
    async with place(breaks) as up, proxy_of(db, up.url) as proxy:
        async with client(proxy, len(body)) as sender:
            sending = asyncio.create_task(sender.send(body))
            async with asyncio.timeout(SECONDS):
                assert b"upstream_error" in await sender.reader.readuntil(b"}}\n\n")
            await sending

        async def broken() -> float:
            return proxy.metric("proxy_broken_streams_total", model=MODEL)

        await until(broken, lambda count: count == 1)
        assert proxy.metric("proxy_tokens_total", model=MODEL, tenant="tenant", kind="prompt") == 0


async def test_an_upstream_that_is_lost_during_the_upload_is_not_asked_again(db: Database) -> None:
    beginning = form()[: 2 * MEBIBYTE]

    async def lost(taker: Taker) -> None:
        await taker.take(len(beginning))
        await vanish(taker)

    async with place(lost) as one, place(lost) as other, proxy_of(db, one.url, other.url) as proxy:
        async with client(proxy, len(form())) as sender:
            await sender.send(beginning)
            answer = await sender.answer()
            await sender.until_closed()
        assert (answer.status, answer.code, answer.closes) == (502, "upstream_error", True)
        assert len(one.takers) + len(other.takers) == 1


async def whole_after_one_is_gone(db: Database, play: Play) -> None:
    """The first upstream of two does so at its first request, of which only the beginning was sent."""
    body = form()
    takers: list[Taker] = []

    async def first_one(taker: Taker) -> None:
        takers.append(taker)
        await (play if len(takers) == 1 else reply)(taker)

    async with (
        place(first_one) as one,
        place(first_one) as other,
        proxy_of(db, one.url, other.url) as proxy,
        client(proxy, len(body)) as sender,
    ):
        await sender.send(body[:1000])

        async def begun() -> int:
            return len(takers)

        await until(begun, lambda count: count == 2)
        await sender.send(body[1000:])
        assert (await sender.answer()).body == ANSWER
    assert bytes(takers[1].body) == body
    assert {len(one.takers), len(other.takers)} == {1}


async def test_another_upstream_is_asked_if_only_the_beginning_was_sent(db: Database) -> None:
    async def lost(taker: Taker) -> None:
        await taker.take(1000)
        await vanish(taker)

    await whole_after_one_is_gone(db, lost)


async def test_another_upstream_is_asked_if_an_engine_fails_at_the_beginning(db: Database) -> None:
    async def failing(taker: Taker) -> None:
        await taker.take(1000)
        await taker.answer(status=b"503 Service Unavailable")
        await taker.until_let_go()

    await whole_after_one_is_gone(db, failing)


@pytest.fixture
def refusing() -> Iterator[list[str]]:
    with ExitStack() as stack:
        yield [stack.enter_context(refusing_url()) for _ in range(2)]


async def test_another_upstream_is_asked_if_no_connection_was_made(db: Database, refusing: list[str]) -> None:
    body = form()
    async with place(reply) as up, proxy_of(db, up.url, *refusing) as proxy:
        for _ in range(8):  # chance names the first
            async with client(proxy, len(body)) as sender:
                sending = asyncio.create_task(sender.send(body))
                answer = await sender.answer()
                await sending
            assert answer.body == ANSWER
        assert all(bytes(taker.body) == body for taker in up.takers)
        assert len(up.takers) == 8
        assert proxy.metric("proxy_upstream_retries_total", model=MODEL, reason="refused") >= 1


async def test_no_upstream_that_can_be_reached_is_told(db: Database, refusing: list[str]) -> None:
    async with proxy_of(db, *refusing) as proxy, client(proxy, len(form())) as sender:
        await sender.send(form()[:MEBIBYTE])
        answer = await sender.answer()
        assert (answer.status, answer.code, answer.closes) == (502, "upstream_error", True)
        await sender.until_closed()


@pytest.mark.parametrize("is_chunked", [False, True], ids=["with a length", "in chunks"])
async def test_a_client_that_leaves_in_the_middle_lets_its_upstream_go(db: Database, is_chunked: bool) -> None:
    beginning = form()[: 2 * MEBIBYTE]
    async with place(idle) as up, proxy_of(db, up.url) as proxy:
        async with client(proxy, None if is_chunked else len(form())) as sender:
            sending = asyncio.create_task(sender.send(beginning))
            taker = await up.taker()
            await taker.take(len(beginning))
            await sending
            sender.writer.transport.abort()
            await taker.until_let_go()
        await until_at_rest(proxy)
        assert answered(proxy, 499) == 1


async def test_a_client_that_stalls_is_told_and_its_upstream_let_go(db: Database) -> None:
    options = replace(QUICK, body_timeout_seconds=0.3)
    beginning = form()[:MEBIBYTE]
    async with place(idle) as up, proxy_of(db, up.url, options=options) as proxy:
        async with client(proxy, len(form())) as sender:
            await sender.send(beginning)
            taker = await up.taker()
            await taker.take(len(beginning))
            answer = await sender.answer()
            assert (answer.status, answer.code, answer.closes) == (408, "request_timeout", True)
            await taker.until_let_go()
            await sender.until_closed()
        # the same while the model is not known
        async with client(proxy, len(form())) as sender:
            await sender.send(part(b'name="file"; filename="a.wav"', b"RIFF"))
            assert (await sender.answer()).status == 408
        assert len(up.takers) == 1


async def test_an_upstream_that_takes_nothing_for_too_long_is_given_up(db: Database) -> None:
    """It is the upstream that is late, and not the client."""
    options = replace(QUICK, body_timeout_seconds=0.3)
    async with place(idle, receive_bytes=262_144) as up, proxy_of(db, up.url, options=options) as proxy:
        async with client(proxy, len(form())) as sender:
            sending = asyncio.create_task(sender.send(form()))
            answer = await sender.answer()
            assert (answer.status, answer.code) == (504, "upstream_timeout")
            with suppress(ConnectionError):
                await sending
        assert len(up.takers) == 1
