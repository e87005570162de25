"""The seams of a request's life: framing, back-pressure and ends, where two things happen at once."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from contextlib import suppress
from dataclasses import replace

import pytest

from controlplane.core.breaker import BreakerState
from controlplane.core.types import TenantLimits
from controlplane.db import Database
from tests.conftest import eventually
from tests.integration.proxy_rig import (
    CHAT,
    MODEL,
    QUICK,
    SECONDS,
    Connection,
    Received,
    Running,
    make_key,
    make_routable,
    opened,
    refusing_url,
    running_proxy,
    upstream,
)

REPLY = b'{"id":"chatcmpl-1",  "choices":[]}'
SPEECH = "/v1/audio/transcriptions"
USAGE = '{"choices":[],"usage":{"prompt_tokens":3,"completion_tokens":4,"total_tokens":7}}'
MODEL_PART = b'--b\r\nContent-Disposition: form-data; name="model"\r\n\r\ntiny\r\n'
FILE_PART = b'--b\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n'
END = b"\r\n--b--\r\n"


@pytest.fixture
async def db(shared_url: str) -> AsyncIterator[Database]:
    async with opened(shared_url) as database:
        yield database


async def reply(request: Received, connection: Connection) -> None:
    await connection.answer(REPLY)


def post(proxy: Running, body: bytes, *lines: str, path: str = CHAT, length: bool = True) -> bytes:
    all_lines = [f"POST {path} HTTP/1.1", "host: x", f"authorization: Bearer {proxy.key}", *lines]
    if length:
        all_lines.append(f"content-length: {len(body)}")
    return "\r\n".join([*all_lines, "", ""]).encode() + body


def chat(**fields: object) -> bytes:
    return json.dumps({"model": MODEL, "messages": [], **fields}).encode()


async def read_answer(reader: asyncio.StreamReader) -> tuple[str, bytes]:
    """An answer's head, and its body, which has a length."""
    async with asyncio.timeout(SECONDS):
        head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
        length = int(head.partition("content-length: ")[2].partition("\r\n")[0])
        return head, await reader.readexactly(length)


def check_at_rest(proxy: Running) -> None:
    assert not proxy.app.in_flight
    assert not any(proxy.app._plane.metrics.in_flight.values())
    assert all(room.seats.is_empty for room in proxy.app._rooms._rooms.values())


class Faults:
    """What the event loop was told of exceptions that nobody caught."""

    def __init__(self) -> None:
        self.seen: list[dict[str, object]] = []

    def __enter__(self) -> list[dict[str, object]]:
        asyncio.get_running_loop().set_exception_handler(lambda _, context: self.seen.append(context))
        return self.seen

    def __exit__(self, *_: object) -> None:
        asyncio.get_running_loop().set_exception_handler(None)


# --- answers ---------------------------------------------------------------------------------------------


async def test_a_streams_length_is_said_anew_because_events_are_hidden_and_put_in(db: Database) -> None:
    stream = f'data: {{"choices":[1]}}\n\ndata: {USAGE}\n\ndata: [DONE]\n\n'.encode()

    async def with_a_length(request: Received, connection: Connection) -> None:
        await connection.answer(stream, content_type="text/event-stream")

    async with upstream(with_a_length) as server:
        await make_routable(db, server.url)
        async with running_proxy(db, key=await make_key(db)) as proxy:
            answer = await proxy.chat(stream=True)
    assert answer.content == b'data: {"choices":[1]}\n\ndata: [DONE]\n\n'
    assert "content-length" not in answer.headers


async def test_what_an_upstream_says_behind_its_answer_is_no_part_of_it(db: Database) -> None:
    async def says_too_much(request: Received, connection: Connection) -> None:
        one = b"HTTP/1.1 200 OK\r\nx-one: 1\r\ncontent-length: %d\r\n\r\n%b" % (len(REPLY), REPLY)
        await connection.send(one + b"HTTP/1.1 200 OK\r\nx-two: 2\r\ncontent-length: 3\r\n\r\nabc")

    async with upstream(says_too_much) as server:
        await make_routable(db, server.url)
        async with running_proxy(db, key=await make_key(db)) as proxy:
            for _ in range(2):
                answer = await proxy.chat()
                assert (answer.status_code, answer.content) == (200, REPLY)
                assert "x-two" not in answer.headers
    assert server.connections == 2


async def test_an_upstreams_trailers_do_not_become_headers(db: Database) -> None:
    async def with_trailers(request: Received, connection: Connection) -> None:
        head = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"
        await connection.send(head + b"2\r\n{}\r\n0\r\nx-trailer: 1\r\n\r\n")

    async with upstream(with_trailers) as server:
        await make_routable(db, server.url)
        async with running_proxy(db, key=await make_key(db)) as proxy:
            answer = await proxy.chat()
    assert answer.content == b"{}"
    assert "x-trailer" not in answer.headers


async def test_a_comment_never_comes_into_the_middle_of_an_event(db: Database) -> None:
    half, other_half = "x" * 70_000, "y" * 10

    async def pauses_in_a_long_event(request: Received, connection: Connection) -> None:
        await connection.begin_stream()
        await connection.event("{}")
        await connection.chunk(f"data: {half}".encode())
        await asyncio.sleep(0.5)  # several times as long as is waited with a comment
        await connection.chunk(f"{other_half}\n\n".encode())
        await connection.end_stream()

    async with upstream(pauses_in_a_long_event) as server:
        await make_routable(db, server.url)
        options = replace(QUICK, keepalive_comment_seconds=0.1)
        async with running_proxy(db, options, key=await make_key(db)) as proxy:
            answer = await proxy.chat(stream=True)
    assert f"data: {half}{other_half}\n\n" in answer.text


async def test_usage_that_cannot_be_read_is_no_fault(db: Database) -> None:
    deep = b'"usage":' + b'{"a":' * 1500

    async def nested(request: Received, connection: Connection) -> None:
        await connection.send(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n{" % (len(deep) + 1))
        await asyncio.sleep(0.05)
        await connection.send(deep)

    async with upstream(nested) as server:
        await make_routable(db, server.url)
        async with running_proxy(db, key=await make_key(db)) as proxy:
            with Faults() as faults:
                assert (await proxy.chat()).content == b"{" + deep
            check_at_rest(proxy)
    assert faults == []


@pytest.mark.parametrize("is_late", [False, True])
async def test_an_answer_that_refuses_a_stream_tells_the_breaker_that_there_is_one(db: Database, is_late: bool) -> None:
    async def refuses(request: Received, connection: Connection) -> None:
        if is_late:
            await asyncio.sleep(0.3)  # a comment has made it a stream by then
            await connection.answer(b'{"error":{"message":"no"}}', "400 Bad Request")
            return
        await connection.begin_stream()
        await connection.event('{"error":{"message":"no","code":400}}')
        await connection.end_stream()

    async with upstream(refuses) as server:
        await make_routable(db, server.url)
        options = replace(QUICK, keepalive_comment_seconds=0.1)
        async with running_proxy(db, options, key=await make_key(db)) as proxy:
            [endpoint] = proxy.app._plane.upstreams._known.values()
            endpoint.breaker.failed(time.monotonic(), is_unreachable=True)
            assert (await proxy.chat(stream=True)).status_code == (200 if is_late else 400)
            assert endpoint.breaker.state is BreakerState.CLOSED


async def test_a_request_that_reached_no_engine_uses_no_tokens_of_its_tenant(db: Database) -> None:
    with refusing_url() as url:
        await make_routable(db, url)
        async with running_proxy(db, key=await make_key(db)) as proxy:
            proxy.app._limits.follow({"tenant": TenantLimits(tokens_per_minute=1000)}, time.monotonic())
            for _ in range(2):
                assert (await proxy.chat(max_tokens=2000)).status_code == 502


# --- a client that reads slowly, or not at all ------------------------------------------------------------


async def test_a_request_that_follows_an_unread_answer_waits_until_that_is_read(db: Database) -> None:
    count, large = 200, b'{"x":"' + b"x" * 100_000 + b'"}'

    async def answer(request: Received, connection: Connection) -> None:
        await connection.answer(large)

    async with upstream(answer) as server:
        await make_routable(db, server.url)
        async with running_proxy(db, key=await make_key(db)) as proxy:
            reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port, limit=1024)
            writer.write(post(proxy, chat()) * count)
            await eventually(lambda: [one for one in proxy.app._plane.connections if one.is_full])
            [connection] = [one for one in proxy.app._plane.connections if one.is_full]
            with suppress(TimeoutError):
                async with asyncio.timeout(1):  # some ticks
                    await asyncio.Event().wait()
            assert connection.transport.get_write_buffer_size() < 500_000
            assert len(server.requests) < count
            for _ in range(count):
                head, body = await read_answer(reader)
                assert "application/json" in head
                assert body == large
            writer.close()
            await eventually(lambda: not proxy.app._plane.connections or None)
            check_at_rest(proxy)


async def test_a_client_that_never_reads_what_is_left_of_its_answers_is_let_go(db: Database) -> None:
    async def answer(request: Received, connection: Connection) -> None:
        await connection.answer(b"x" * 100_000)

    async with upstream(answer) as server:
        await make_routable(db, server.url)
        options = replace(QUICK, client_timeout_seconds=0.5)
        async with running_proxy(db, options, key=await make_key(db)) as proxy:
            _, writer = await asyncio.open_connection("127.0.0.1", proxy.port, limit=1024)
            writer.write(post(proxy, chat()) * 99 + post(proxy, chat(), "connection: close"))
            await eventually(lambda: bool(server.requests) or None)
            mine = [one for one in proxy.app._plane.connections if not one.is_new]
            await eventually(lambda: proxy.app._plane.connections.isdisjoint(mine) or None)
            writer.close()
            check_at_rest(proxy)


# --- requests --------------------------------------------------------------------------------------------


async def test_options_that_are_no_utf_8_are_the_upstreams_to_refuse(db: Database) -> None:
    body = b'{"model":"tiny","stream":true,"stream_options":{"a":"\xff"}}'
    async with upstream(reply) as server:
        await make_routable(db, server.url)
        async with running_proxy(db, key=await make_key(db)) as proxy:
            with Faults() as faults:
                answer = await proxy.client.post(CHAT, content=body)
    assert answer.status_code in (200, 400)
    assert faults == []


async def test_headers_that_any_connection_line_names_are_not_passed_on(db: Database) -> None:
    async with upstream(reply) as server:
        await make_routable(db, server.url)
        async with running_proxy(db, key=await make_key(db)) as proxy:
            reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
            writer.write(post(proxy, chat(), "connection: x-mine", "connection: keep-alive", "x-mine: 1"))
            await read_answer(reader)
            writer.close()
    assert server.requests[0].header("x-mine") == []


async def test_a_client_that_speaks_http_1_0_is_not_told_to_continue(db: Database) -> None:
    async with upstream(reply) as server:
        await make_routable(db, server.url)
        async with running_proxy(db, key=await make_key(db)) as proxy:
            reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
            whole = post(proxy, chat(), "expect: 100-continue").replace(b"HTTP/1.1", b"HTTP/1.0")
            writer.write(whole[:-5])
            await eventually(lambda: [one for one in proxy.app._plane.connections if one._incoming])
            writer.write(whole[-5:])
            head, body = await read_answer(reader)
            assert head.startswith("http/1.1 200 ")
            assert body == REPLY
            writer.close()


async def test_trailers_without_end_are_refused(db: Database) -> None:
    async with running_proxy(db) as proxy:
        reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
        writer.write(post(proxy, b"2\r\n{}\r\n0\r\nx: ", "transfer-encoding: chunked", length=False))
        async with asyncio.timeout(SECONDS):
            with suppress(ConnectionError):
                for _ in range(100):
                    writer.write(b"x" * 65536)
                    await writer.drain()
            assert b" 431 " in await reader.readline()
        writer.close()


async def test_many_offers_of_another_protocol_at_once_are_no_fault(db: Database) -> None:
    offer = b"GET /health HTTP/1.1\r\nhost: x\r\nconnection: upgrade\r\nupgrade: h2c\r\n\r\n"
    async with running_proxy(db) as proxy:
        with Faults() as faults:
            reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
            writer.write(offer * 2000)
            for _ in range(2000):
                head, _ = await read_answer(reader)
                assert " 200 ok" in head
            writer.close()
    assert faults == []


# --- forms that are passed on while they come -------------------------------------------------------------

FORM = ("content-type: multipart/form-data; boundary=b",)


async def test_a_form_whose_chunks_are_wrong_is_refused_at_once(db: Database) -> None:
    async with upstream(reply) as server:
        await make_routable(db, server.url)
        async with running_proxy(db, key=await make_key(db)) as proxy:
            reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
            begin = MODEL_PART + FILE_PART + b"x" * 100
            body = b"%x\r\n%b\r\n" % (len(begin), begin)
            writer.write(post(proxy, body, *FORM, "transfer-encoding: chunked", path=SPEECH, length=False))
            await eventually(lambda: bool(proxy.app.in_flight) or None)
            writer.write(b"what\r\n")
            head, _ = await read_answer(reader)
            assert " 400 " in head
            writer.close()
            await eventually(lambda: not proxy.app._plane.connections or None)
            check_at_rest(proxy)


async def test_a_form_is_read_no_faster_than_its_upstream_takes_it_from_the_first_byte_on(db: Database) -> None:
    over = asyncio.Event()

    async def takes_nothing(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await over.wait()
        writer.transport.abort()

    server = await asyncio.start_server(takes_nothing, "127.0.0.1", 0, limit=1024)
    await make_routable(db, f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}")
    async with running_proxy(db, key=await make_key(db)) as proxy:
        _, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
        whole = 30_000_000
        # what comes with the model is more than the upstream's connection takes
        first = FILE_PART + b"x" * 10_000_000 + b"\r\n" + MODEL_PART + FILE_PART
        lines = (*FORM, f"content-length: {whole}")
        writer.write(post(proxy, first, *lines, path=SPEECH, length=False))
        await eventually(lambda: bool(proxy.app.in_flight) or None)
        writer.write(b"x" * (whole - len(first)))
        [connection] = proxy.app._plane.connections - {one for one in proxy.app._plane.connections if not one._call}
        await asyncio.sleep(0.5)
        call = connection._call
        assert call is not None
        assert call._connection is not None
        assert call._connection.transport.get_write_buffer_size() < 12_000_000
        over.set()
        await eventually(lambda: not proxy.app.in_flight or None)
        writer.transport.abort()
        check_at_rest(proxy)
    server.close()


async def test_a_form_never_goes_over_a_connection_that_may_be_dying(db: Database) -> None:
    """What was passed on is kept nowhere: it could not be sent again."""

    async def closes_after_the_first(request: Received, connection: Connection) -> None:
        if connection.number == 0 and len(server.requests) == 2:
            connection.close()
            return
        await connection.answer(REPLY)

    body = MODEL_PART + FILE_PART + b"x" * 200_000 + END
    async with upstream(closes_after_the_first) as server:
        await make_routable(db, server.url)
        async with running_proxy(db, key=await make_key(db)) as proxy:
            assert (await proxy.chat()).status_code == 200

            async def pieces() -> AsyncIterator[bytes]:
                for start in range(0, len(body), 10_000):
                    yield body[start : start + 10_000]
                    await asyncio.sleep(0)

            headers = {"content-type": "multipart/form-data; boundary=b"}
            answer = await proxy.client.post(SPEECH, content=pieces(), headers=headers)
            assert answer.status_code == 200, answer.text
            check_at_rest(proxy)


async def test_a_form_that_is_answered_before_its_end_is_counted_once(db: Database) -> None:
    async def refuses_at_once(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 413 Too Large\r\ncontent-length: 2\r\nconnection: close\r\n\r\n{}")
        with suppress(ConnectionError):
            await reader.read()
        writer.close()

    server = await asyncio.start_server(refuses_at_once, "127.0.0.1", 0)
    await make_routable(db, f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}")
    async with running_proxy(db, key=await make_key(db)) as proxy:
        reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
        begin = MODEL_PART + FILE_PART + b"x" * 100
        writer.write(post(proxy, begin, *FORM, "content-length: 10000", path=SPEECH, length=False))
        head, _ = await read_answer(reader)
        assert " 413 " in head
        writer.close()
        await eventually(lambda: not proxy.app._plane.connections or None)
        check_at_rest(proxy)
        samples = [
            sample
            for metric in proxy.registry.collect()
            for sample in metric.samples
            if sample.name == "controlplane_proxy_requests_total" or sample.name.endswith("proxy_requests_total")
        ]
        assert sum(sample.value for sample in samples) == 1, samples
    server.close()


async def test_a_form_that_is_answered_in_events_is_kept_alive_by_comments(db: Database) -> None:
    async def slow_stream(request: Received, connection: Connection) -> None:
        await connection.begin_stream()
        await connection.event("{}")
        await asyncio.sleep(0.6)
        await connection.event("[DONE]")
        await connection.end_stream()

    async with upstream(slow_stream) as server:
        await make_routable(db, server.url)
        options = replace(QUICK, keepalive_comment_seconds=0.1)
        async with running_proxy(db, options, key=await make_key(db)) as proxy:
            headers = {"content-type": "multipart/form-data; boundary=b"}
            content = MODEL_PART + FILE_PART + b"x" + END
            answer = await proxy.client.post(SPEECH, content=content, headers=headers)
    assert answer.text.count(": keep-alive\n\n") >= 3
