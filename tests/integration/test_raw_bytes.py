"""Bytes that no client should send: the proxy answers or closes, smuggles nothing upstream, and goes on serving.

`make fuzz` goes on for SECONDS with a new seed, or repeats one: SEED.
"""

from __future__ import annotations

import asyncio
import json
import os
import time
from collections.abc import AsyncIterator, Iterator
from itertools import count, islice
from random import SystemRandom

import pytest
import pytest_asyncio

from tests.integration.proxy_process import ProxyProcess, proxy_process
from tests.integration.proxy_rig import CHAT, MODEL, Connection, Received, Upstream, upstream
from tests.integration.raw_bytes import (
    BODY,
    SHAPES,
    SMUGGLED,
    Conversation,
    Heard,
    Outcome,
    Shape,
    conversation,
    converse,
    post,
    say,
)

ANSWER = b'{"answered":true}'
CASES = 600
AT_ONCE = 16
LENGTH = b"content-length: %d" % len(BODY)

pytestmark = pytest.mark.asyncio(loop_scope="module")


async def reply(request: Received, connection: Connection) -> None:
    await connection.answer(ANSWER)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def server() -> AsyncIterator[Upstream]:
    async with upstream(reply) as made:
        yield made


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def proxy(
    shared_url: str, tmp_path_factory: pytest.TempPathFactory, server: Upstream
) -> AsyncIterator[ProxyProcess]:
    async with proxy_process(tmp_path_factory.mktemp("raw"), shared_url, server.url) as process:
        yield process


@pytest_asyncio.fixture(autouse=True, loop_scope="module")
async def is_served_as_before(proxy: ProxyProcess, server: Upstream) -> AsyncIterator[None]:
    """Whatever a test did: the process lives, nothing stays in flight, and a good request gets its answer."""
    server.requests.clear()
    yield
    async with proxy.client() as client:
        answer = await client.post(CHAT, json={"model": MODEL})
    assert (answer.status_code, answer.content) == (200, ANSWER)
    await proxy.until_at_rest()
    assert proxy.serve.process.poll() is None, "the proxy has ended"


def credentials(proxy: ProxyProcess) -> bytes:
    return f"authorization: Bearer {proxy.key}".encode()


def check_what_went_upstream(requests: list[Received]) -> None:
    """Whatever came in: what goes out is one of our routes, framed once, and names the model that was checked."""
    for request in requests:
        method, target, version = request.line.split(" ")
        assert (method, version) == ("POST", "HTTP/1.1"), request
        assert target.partition("?")[0] == CHAT, request
        framing = request.header("content-length") + request.header("transfer-encoding")
        assert len(framing) == len(request.header("host")) == 1, request
        assert request.header("authorization") == [], request
        assert json.loads(request.body)["model"] == MODEL, request


# --- shapes ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.name)
async def test_a_shape_becomes_what_rfc_9112_wants_of_it(proxy: ProxyProcess, server: Upstream, shape: Shape) -> None:
    def is_answered(heard: Heard) -> bool:
        return shape.outcome is not Outcome.REFUSED and len(heard.statuses) > 0 and heard.data.endswith(b"}")

    heard = await say(proxy.port, shape.said(credentials(proxy)), until=is_answered)
    match shape.outcome:
        case Outcome.REFUSED:
            assert heard.statuses in ([], [400], [431])
            assert heard.is_closed
            assert server.requests == []
        case Outcome.TAKEN:
            assert heard.statuses == [200]
            assert [request.body for request in server.requests] == [BODY]
        case Outcome.ANSWERED:
            assert len(heard.statuses) == 1 or (heard.is_closed and not heard.statuses)
            assert max(heard.statuses, default=0) < 500
            assert len(server.requests) <= 1
    check_what_went_upstream(server.requests)
    assert all(request.header("x-smuggled") == [] for request in server.requests)


async def test_trailers_do_not_become_headers(proxy: ProxyProcess, server: Upstream) -> None:
    trailers = b"0\r\nx-request-id: mine\r\nx-trailer: 1\r\nauthorization: Bearer x\r\n\r\n"
    said = post(b"transfer-encoding: chunked", body=b"%x\r\n%b\r\n" % (len(BODY), BODY) + trailers)
    await say(proxy.port, said(credentials(proxy)), until=lambda heard: heard.data.endswith(ANSWER))
    [request] = server.requests
    assert request.header("x-trailer") == []
    assert request.header("x-request-id") != ["mine"]


async def test_pipelined_requests_are_answered_in_their_order(proxy: ProxyProcess, server: Upstream) -> None:
    good = post(LENGTH)(credentials(proxy))
    unknown = b"GET /nowhere HTTP/1.1\r\nhost: x\r\n\r\n"
    said = good + unknown + good + SMUGGLED + good
    heard = await say(proxy.port, said, until=lambda heard: len(heard.statuses) == 5 and heard.data.endswith(ANSWER))
    assert heard.statuses == [200, 404, 200, 401, 200]
    assert len(server.requests) == 3


async def test_what_was_good_before_a_fault_is_at_most_answered_and_nothing_behind_it_is(
    proxy: ProxyProcess, server: Upstream
) -> None:
    good = post(LENGTH)(credentials(proxy))
    bad = post(LENGTH, b"transfer-encoding: chunked", body=BODY)(credentials(proxy))
    heard = await say(proxy.port, good + bad + good, until=lambda heard: False)
    assert heard.is_closed
    assert heard.statuses in ([200, 400], [200], [400], [])
    assert len(server.requests) <= 1


async def test_a_request_that_comes_byte_by_byte_is_served(proxy: ProxyProcess, server: Upstream) -> None:
    said = post(LENGTH)(credentials(proxy))
    pieces = [bytes([byte]) for byte in said]
    heard = await say(proxy.port, *pieces, until=lambda heard: heard.data.endswith(ANSWER))
    assert heard.statuses == [200]


async def test_who_waits_to_be_told_to_continue_is_told(proxy: ProxyProcess, server: Upstream) -> None:
    said = post(LENGTH, b"expect: 100-continue", body=b"")(credentials(proxy))
    reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
    async with asyncio.timeout(10):
        writer.write(said)
        assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 100 ")
        writer.write(BODY)
        assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 200 ")
    writer.close()
    assert len(server.requests) == 1
    assert server.requests[0].header("expect") == []


@pytest.mark.parametrize("protocol", [b"h2c", b"websocket", b"TLS/1.0"])
async def test_an_upgrade_is_not_taken_up_and_the_request_is_served(
    proxy: ProxyProcess, server: Upstream, protocol: bytes
) -> None:
    upgrade = (
        b"connection: upgrade, http2-settings",
        b"upgrade: " + protocol,
        b"http2-settings: AAMAAABkAARAAAAAAAIAAAAA",
    )
    said = post(LENGTH, *upgrade)(credentials(proxy))
    heard = await say(proxy.port, said, until=lambda heard: heard.data.endswith(ANSWER))
    assert heard.statuses == [200]
    assert [request.body for request in server.requests] == [BODY]
    assert server.requests[0].header("upgrade") == []


async def test_a_connection_on_which_an_upgrade_was_refused_serves_on_or_closes(proxy: ProxyProcess) -> None:
    models = b"GET /v1/models HTTP/1.1\r\nhost: x\r\n" + credentials(proxy)
    said = models + b"\r\nconnection: upgrade\r\nupgrade: h2c\r\n\r\n" + models + b"\r\nconnection: close\r\n\r\n"
    heard = await say(proxy.port, said, until=lambda heard: False)
    assert heard.is_closed
    assert heard.statuses in ([200, 200], [200], [200, 400])


# --- made up ---------------------------------------------------------------------------------------------


def numbers(seconds: float | None) -> Iterator[int]:
    """So many cases, or as many as the time allows."""
    if seconds is None:
        yield from islice(count(), CASES)
    else:
        end = time.monotonic() + seconds
        for number in count():
            if time.monotonic() > end:
                return
            yield number


async def test_made_up_bytes_are_answered_or_closed_and_never_with_a_fault_of_ours(
    proxy: ProxyProcess, server: Upstream
) -> None:
    given = os.environ.get("FUZZ_SECONDS")
    seconds = float(given) if given else None
    seed = int(os.environ.get("FUZZ_SEED") or (1 if seconds is None else SystemRandom().randrange(2**32)))
    print(f"fuzz: seed {seed}")  # noqa: T201 - pytest shows it with a failure, `make fuzz` always
    left = numbers(seconds)
    done = 0

    async def work() -> None:
        nonlocal done
        for number in left:
            await check(conversation(seed, number, credentials(proxy)))
            done += 1

    async def check(what: Conversation) -> None:
        try:
            heard = await converse(proxy.port, what)
        except TimeoutError:
            pytest.fail(f"{what.name} hangs: {what.pieces}")
        faults = [status for status in heard.statuses if status >= 500]
        assert not faults, f"{what.name} was answered {faults}: {what.pieces}"

    async with asyncio.TaskGroup() as workers:
        for _ in range(AT_ONCE):
            workers.create_task(work())
    check_what_went_upstream(server.requests)
    print(f"fuzz: {done} conversations, {len(server.requests)} requests passed on")  # noqa: T201


async def test_nothing_of_all_this_was_logged_as_a_fault_of_ours(proxy: ProxyProcess) -> None:
    proxy.check_log()
