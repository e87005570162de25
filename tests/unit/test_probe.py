"""Looks at servers that answer oddly: each ends, in time, with a result that can be kept."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import httpx
import pytest

from controlplane.app import probing_client
from controlplane.core.types import Endpoint, Phase, ProbeResult
from controlplane.reconcile.probe import ProbeLimits, probe
from tests.unit.worlds import a_replica, an_endpoint

LIMITS = ProbeLimits(timeout_seconds=0.5, token_timeout_seconds=0.5)


def endpoint(url: str = "http://n1:20000") -> Endpoint:
    return replace(an_endpoint(a_replica(1, Phase.RUNNING)), url=url)


async def look(
    *, models: str | None = None, metrics: str = "", completion: httpx.Response | None = None
) -> ProbeResult:
    def answer(request: httpx.Request) -> httpx.Response:
        match request.url.path:
            case "/v1/models" if "authorization" not in request.headers:
                return httpx.Response(401)
            case "/v1/models":
                return httpx.Response(200, text=models or '{"data": [{"id": "m"}]}')
            case "/metrics":
                return httpx.Response(200, text=metrics)
            case _:
                return completion or httpx.Response(200, json={})

    async with httpx.AsyncClient(transport=httpx.MockTransport(answer)) as http:
        return await probe(http, endpoint(), "completion", LIMITS)


@pytest.mark.parametrize("value", ["NaN", "+Inf"])
async def test_a_load_that_is_no_number_is_not_known(value: str) -> None:
    result = await look(metrics=f"vllm:num_requests_running {value}\nvllm:num_requests_waiting 2.0\n")
    assert (result.passed, result.running, result.waiting) == (True, None, 2)


async def test_what_a_failing_server_says_can_be_stored() -> None:
    result = await look(completion=httpx.Response(500, text="out of\0memory\n"))
    assert result.message == "/v1/completions answered 500: out of memory "


async def test_models_nested_too_deep_to_be_read_are_no_models() -> None:
    result = await look(models="[" * 100_000)
    assert (result.passed, result.is_foreign) == (False, True)


async def test_an_address_that_makes_no_url_fails_the_look() -> None:
    async with probing_client() as http:
        result = await probe(http, endpoint("http://fd00::1:20000"), "completion", LIMITS)
    assert not result.passed
    assert (result.message or "").startswith("InvalidURL")


async def test_a_server_that_sends_a_byte_now_and_then_does_not_hold_the_look_for_ever() -> None:
    ended = asyncio.Event()

    async def drip(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 1000\r\n\r\n")
        while not writer.is_closing():
            writer.write(b" ")
            await asyncio.sleep(LIMITS.timeout_seconds / 5)
        writer.close()
        ended.set()

    async with await asyncio.start_server(drip, "127.0.0.1") as server, probing_client() as http:
        address = server.sockets[0].getsockname()
        async with asyncio.timeout(20):
            result = await probe(http, endpoint(f"http://127.0.0.1:{address[1]}"), "completion", LIMITS)
            await ended.wait()  # because the look hung up
    assert result.message == "TimeoutError: no answer in time"


async def test_a_hundred_servers_that_hang_do_not_keep_another_from_being_looked_at() -> None:
    arrived = 0
    all_arrived, may_end = asyncio.Event(), asyncio.Event()

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal arrived
        head = await reader.readuntil(b"\r\n\r\n")
        if head.startswith(b"GET /hang"):
            arrived += 1
            if arrived == 100:
                all_arrived.set()
            await may_end.wait()
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\nconnection: close\r\n\r\n")
        writer.close()

    async with await asyncio.start_server(answer, "127.0.0.1", backlog=200) as server, probing_client() as http:
        url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        hanging = [asyncio.create_task(http.get(f"{url}/hang", timeout=20)) for _ in range(100)]
        try:
            async with asyncio.timeout(20):
                await all_arrived.wait()
            assert (await http.get(url, timeout=2)).status_code == 200
        finally:
            may_end.set()
            await asyncio.gather(*hanging)


@pytest.mark.parametrize("padding", [0, 60])
async def test_a_server_that_quotes_our_key_is_shown_without_it(padding: int) -> None:
    key = endpoint().api_key or ""
    assert len(key) >= 32
    said = "-" * padding + f" Bearer {key}"
    refused = await look(completion=httpx.Response(500, text=said))
    other = await look(models=f'{{"data": [{{"id": "{said}"}}]}}')
    for result in (refused, other):
        assert result.message is not None
        assert "Bearer <secret>" in result.message, "and nothing that was cut off from it"
        assert key[:8] not in result.message
