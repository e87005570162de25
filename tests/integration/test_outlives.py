"""What the proxy outlives under load: PostgreSQL that stops, an endpoint that is killed.

`make outage` stops PostgreSQL for longer than `make test` does.
"""

from __future__ import annotations

import asyncio
import os
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from controlplane.db import migrate
from controlplane.demo.postgres import PrivatePostgres
from tests.conftest import eventually
from tests.integration.arrivals import CUT, WHOLE, Arrivals
from tests.integration.proxy_process import proxy_process
from tests.integration.proxy_rig import CHAT, Connection, Received, upstream
from tests.integration.test_fake_vllm import running_fake

OUTAGE_SECONDS = float(os.environ.get("OUTAGE_SECONDS") or 15)


async def short(request: Received, connection: Connection) -> None:
    """A body, or a stream of two events."""
    if b'"stream": true' not in request.body:
        await connection.answer(b'{"choices":[]}')
        return
    await connection.begin_stream()
    await connection.event('{"choices":[]}')
    await connection.event("[DONE]")
    await connection.end_stream()


def by_turns(number: int) -> dict[str, Any]:
    return {"stream": number % 2 == 0}


async def test_no_request_fails_while_postgresql_is_away(session_directory: Path, tmp_path: Path) -> None:
    loop = asyncio.get_running_loop()
    with PrivatePostgres(session_directory / "postgres-outage", is_durable=False) as postgres:
        url = postgres.create_database("outage")
        migrate(url)
        quick = {"CONTROLPLANE_PROXY__REFRESH_SECONDS": "1"}
        async with upstream(short) as server, proxy_process(tmp_path, url, server.url, **quick) as proxy:
            arrivals = Arrivals(proxy.port, proxy.key)
            is_over = asyncio.Event()
            load = asyncio.create_task(arrivals.come(50, is_over.is_set, by_turns))
            async with proxy.client() as client:

                async def says(status: str) -> bool:
                    return bool((await client.get("/ready")).json()["status"] == status)

                await eventually(lambda: arrivals.ended[WHOLE] > 50)
                await asyncio.to_thread(postgres.kill)
                away_since, before = loop.time(), arrivals.ended[WHOLE]
                await eventually(lambda: says("degraded"), timeout_seconds=30)
                while loop.time() < away_since + OUTAGE_SECONDS:
                    assert (await client.get("/v1/models")).status_code == 200
                    stranger = await client.post(CHAT, json={}, headers={"authorization": "Bearer sk-nobody"})
                    assert stranger.status_code == 401
                    await asyncio.sleep(0.5)
                during = arrivals.ended[WHOLE] - before
                await asyncio.to_thread(postgres.restart)
                await eventually(lambda: says("ready"), timeout_seconds=30)
            is_over.set()
            await load
            await proxy.until_at_rest()
            proxy.check_log()
    print(f"{during} requests while PostgreSQL was away for {OUTAGE_SECONDS:g} s, {arrivals.ended}")  # noqa: T201
    assert set(arrivals.ended) == {WHOLE}
    assert during >= OUTAGE_SECONDS * 50 * 0.8


async def test_of_200_requests_a_second_only_streams_that_had_begun_at_a_killed_endpoint_are_lost(
    database_url: str, tmp_path: Path
) -> None:
    """Of three endpoints one dies. Each lost stream ends with the error in it; all else is answered whole."""
    with ExitStack() as stack:
        fakes = [
            stack.enter_context(running_fake("--tokens-per-second", "20", "--max-num-seqs", "256")) for _ in range(3)
        ]
        async with proxy_process(tmp_path, database_url, *(fake.url for fake in fakes)) as proxy:
            arrivals = Arrivals(proxy.port, proxy.key)
            is_over = asyncio.Event()
            messages = [{"role": "user", "content": "hello"}]
            load = asyncio.create_task(
                arrivals.come(
                    200, is_over.is_set, lambda number: {**by_turns(number), "messages": messages, "max_tokens": 6}
                )
            )
            await eventually(lambda: arrivals.ended[WHOLE] > 300)
            fakes[1].process.kill()
            ended = arrivals.ended.total()
            await eventually(lambda: arrivals.ended.total() > ended + 600, timeout_seconds=30)
            is_over.set()
            await load
            await proxy.until_at_rest()
            proxy.check_log()
    print(arrivals.ended)  # noqa: T201
    assert set(arrivals.ended) == {WHOLE, CUT}
    assert arrivals.ended[CUT] < 100  # what one of three had running: 200/s for 0.3 s, and a slow machine
