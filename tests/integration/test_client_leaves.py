"""A client that leaves, at any moment and in any way: its upstream is let go at once, and no counter stays behind."""

from __future__ import annotations

import asyncio
import json
import socket
import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress

import pytest
import pytest_asyncio

from tests.conftest import eventually
from tests.integration.proxy_process import ProxyProcess, proxy_process
from tests.integration.proxy_rig import (
    CHAT,
    MODEL,
    SECONDS,
    Connection,
    Received,
    make_routable,
    opened,
    until,
    upstream,
)

pytestmark = pytest.mark.asyncio(loop_scope="module")

AT_ONCE_SECONDS = 2.0  # on a busy machine
BODY = json.dumps({"model": MODEL, "messages": [], "stream": True}).encode()
PIECE = b"data: " + b"x" * 65536 + b"\n\n"


class Stage:
    """An upstream that goes as far as it is told, and then waits to be let go."""

    def __init__(self, play: Callable[[Connection], Awaitable[None]]) -> None:
        self._play = play
        self.reached, self.let_go = asyncio.Event(), asyncio.Event()

    async def __call__(self, request: Received, connection: Connection) -> None:
        with suppress(ConnectionError):
            await self._play(connection)
            self.reached.set()
            await connection.closed_by_the_proxy()
        self.let_go.set()
        connection.close()


async def nothing(connection: Connection) -> None:
    pass


async def head(connection: Connection) -> None:
    await connection.begin_stream()


async def first_event(connection: Connection) -> None:
    await connection.begin_stream()
    await connection.event('{"choices":[]}')


async def half_a_body(connection: Connection) -> None:
    await connection.send(b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 100\r\n\r\n{")


async def more_than_is_read(connection: Connection) -> None:
    await connection.begin_stream()
    with suppress(TimeoutError):
        async with asyncio.timeout(1.0):  # until neither the proxy nor the client takes any more
            while True:
                await connection.chunk(PIECE)


PHASES = {
    "before the answer": nothing,
    "after its head": head,
    "in a stream": first_event,
    "in a body": half_a_body,
    "while it does not read": more_than_is_read,
}


def shut(writer: asyncio.StreamWriter) -> None:
    writer.close()


def reset(writer: asyncio.StreamWriter) -> None:
    raw: socket.socket = writer.get_extra_info("socket")
    raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.close()


WAYS: dict[str, Callable[[asyncio.StreamWriter], None]] = {"closes": shut, "resets": reset}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def proxy(shared_url: str, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[ProxyProcess]:
    quick = {"CONTROLPLANE_PROXY__REFRESH_SECONDS": "0.5"}
    async with proxy_process(
        tmp_path_factory.mktemp("leaves"), shared_url, "http://127.0.0.1:1", model="none", **quick
    ) as process:
        yield process


async def routed_to(proxy: ProxyProcess, database_url: str, url: str, model: str) -> None:
    """The model is served there, and the proxy has heard of it."""
    async with opened(database_url) as db:
        await make_routable(db, url, model=model)
    async with proxy.client() as client:
        await until(lambda: client.get(f"/v1/models/{model}"), lambda answer: answer.status_code == 200)


def request_of(proxy: ProxyProcess, model: str) -> bytes:
    body = BODY.replace(MODEL.encode(), model.encode())
    head = (
        f"POST {CHAT} HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {proxy.key}\r\ncontent-length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("phase", PHASES)
async def test_the_upstream_is_let_go_at_once(proxy: ProxyProcess, shared_url: str, phase: str, way: str) -> None:
    stage = Stage(PHASES[phase])
    model = f"{phase}-{way}".replace(" ", "-")
    async with upstream(stage) as server:
        await routed_to(proxy, shared_url, server.url, model)
        before = (await proxy.metrics()).get("proxy_client_disconnects_total", 0)
        _, writer = await asyncio.open_connection("127.0.0.1", proxy.port, limit=1024)
        writer.write(request_of(proxy, model))
        async with asyncio.timeout(SECONDS):
            await stage.reached.wait()
        WAYS[way](writer)
        async with asyncio.timeout(AT_ONCE_SECONDS):
            await stage.let_go.wait()
        await proxy.until_at_rest()
        assert (await proxy.metrics())["proxy_client_disconnects_total"] == before + 1
    proxy.check_log()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("share", [0.3, 0.9])
async def test_who_leaves_in_the_middle_of_a_request_reaches_no_upstream(
    proxy: ProxyProcess, shared_url: str, share: float, way: str
) -> None:
    stage = Stage(nothing)
    model = f"half-{share * 10:g}-{way}"
    async with upstream(stage) as server:
        await routed_to(proxy, shared_url, server.url, model)
        said = request_of(proxy, model)
        _, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
        writer.write(said[: int(len(said) * share)])
        await writer.drain()
        WAYS[way](writer)
        await proxy.until_at_rest()
        assert server.requests == []
    proxy.check_log()


async def test_who_leaves_after_the_answer_lets_the_upstreams_connection_be_used_again(
    proxy: ProxyProcess, shared_url: str
) -> None:
    async def reply(request: Received, connection: Connection) -> None:
        await connection.answer(b"{}")

    async with upstream(reply) as server:
        await routed_to(proxy, shared_url, server.url, "polite")
        for _ in range(3):
            reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
            writer.write(request_of(proxy, "polite"))
            async with asyncio.timeout(SECONDS):
                assert await reader.readuntil(b"{}")
            writer.close()
        await proxy.until_at_rest()
        assert len(server.requests) == 3
        assert server.connections == 1


async def test_a_hundred_that_leave_at_once_leave_nothing_behind(proxy: ProxyProcess, shared_url: str) -> None:
    let_go = 0

    async def stream(request: Received, connection: Connection) -> None:
        nonlocal let_go
        with suppress(ConnectionError):
            await first_event(connection)
            await connection.closed_by_the_proxy()
        let_go += 1
        connection.close()

    async with upstream(stream) as server:
        await routed_to(proxy, shared_url, server.url, "many")
        async with asyncio.timeout(30):
            clients = [await asyncio.open_connection("127.0.0.1", proxy.port) for _ in range(100)]
            for _, writer in clients:
                writer.write(request_of(proxy, "many"))
            for reader, _ in clients:
                await reader.readuntil(b"choices")
            for number, (_, writer) in enumerate(clients):
                (shut if number % 2 else reset)(writer)
            await eventually(lambda: let_go == 100, timeout_seconds=SECONDS)
        await proxy.until_at_rest()
    proxy.check_log()
