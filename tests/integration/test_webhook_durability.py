"""What was answered 202 is there, whoever is killed at that moment; and many words at once are one decision.

The control plane is a process, PostgreSQL is one that survives power cuts, and slurmrestd is down.
"""

from __future__ import annotations

import asyncio
import copy
import json
import os
import random
import signal
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import Any

import httpx
import psycopg
import pytest

from controlplane.db import migrate
from controlplane.demo.children import free_ports
from controlplane.demo.postgres import PrivatePostgres
from tests.conftest import eventually_sync
from tests.integration.test_serve import SECONDS, Serve, serving, until_ready
from tests.integration.webhook_rig import ours

TOKEN = {"Authorization": "Bearer test-token"}
CLIENTS = 20

Start = Callable[[], AbstractContextManager[Serve]]


@pytest.fixture(scope="module")
def durable(session_directory: Path) -> Iterator[PrivatePostgres]:
    """A PostgreSQL of this module alone: one of its processes is killed, and then all of its sessions end."""
    with PrivatePostgres(session_directory / "postgres-durable") as server:
        yield server


@pytest.fixture
def url(durable: PrivatePostgres, request: pytest.FixtureRequest) -> str:
    found = durable.create_database(f"durable_{abs(hash(request.node.name))}")
    migrate(found)
    return found


@pytest.fixture
def start(url: str, tmp_path: Path) -> Start:
    """Starts a control plane on the same database each time."""
    [nobody] = free_ports(1)
    settings = {
        "CONTROLPLANE_WEBHOOK__BEARER_TOKENS": "test-token",
        "CONTROLPLANE_OPERATOR__TOKENS": "ann:test-token",
        "CONTROLPLANE_RECONCILE__INTERVAL_SECONDS": "0.5",
        "CONTROLPLANE_RECONCILE__LEASE_SECONDS": "2",
        "CONTROLPLANE_SLURM__URL": f"http://127.0.0.1:{nobody}",
        "CONTROLPLANE_SLURM__USER_NAME": "vllm",
        "CONTROLPLANE_SLURM__TOKEN": "not-a-jwt",
        "CONTROLPLANE_SLURM__JOB_DIRECTORY": str(tmp_path),
    }
    return lambda: serving(tmp_path, url, "--role", "control", **settings)


def rows(url: str, query: str) -> list[tuple[Any, ...]]:
    with psycopg.connect(url) as connection:
        return connection.execute(query).fetchall()


async def accepted_until(serve: Serve, count: int, then: Callable[[], None]) -> set[str]:
    """Posts alerts from many clients; with the 202 that makes it `count`, does `then` before anything else.

    Returns the fingerprints of all that were answered 202 before they broke off.
    """
    accepted: set[str] = set()
    is_over = False

    async def client(number: int) -> None:
        nonlocal is_over
        async with httpx.AsyncClient(base_url=serve.web, headers=TOKEN, timeout=SECONDS) as http:
            for turn in range(10_000):
                fingerprint = f"{number}-{turn}"
                try:
                    answer = await http.post("/webhooks/grafana", json=ours(fingerprint=fingerprint))
                except httpx.TransportError:
                    return
                if answer.status_code == 202:
                    accepted.add(fingerprint)
                if len(accepted) >= count and not is_over:
                    is_over = True
                    then()
                if is_over:
                    return

    await asyncio.gather(*(client(number) for number in range(CLIENTS)))
    return accepted


def shown(serve: Serve) -> set[str]:
    """The alerts that the control plane tells an operator of."""
    answer = httpx.get(f"{serve.web}/api/v1/alerts", headers=TOKEN)
    assert answer.status_code == 200, answer.text
    return {one["fingerprint"] for one in answer.json()["alerts"]}


@pytest.mark.parametrize("count", [1, 100])
def test_a_control_plane_killed_with_its_202_has_stored_all_it_accepted(start: Start, url: str, count: int) -> None:
    with start() as serve:
        until_ready(serve, serve.web)
        accepted = asyncio.run(accepted_until(serve, count, serve.process.kill))
        assert serve.process.wait(SECONDS) == -signal.SIGKILL
    assert len(accepted) >= count
    assert accepted <= {row[0] for row in rows(url, "SELECT fingerprint FROM alert_deliveries")}
    with start() as again:
        until_ready(again, again.web)
        assert accepted <= shown(again)


def test_a_connection_of_postgresql_killed_with_the_202_has_stored_all_that_was_accepted(
    start: Start, url: str
) -> None:
    """PostgreSQL ends every session then, recovers from its log, and takes connections again."""
    own = "SELECT pid FROM pg_stat_activity WHERE application_name = 'controlplane' AND datname = current_database()"

    def kill_connections() -> None:
        for (pid,) in found:
            with suppress(ProcessLookupError):  # a look at the database over a connection of its own is over by now
                os.kill(pid, signal.SIGKILL)

    with start() as serve:
        until_ready(serve, serve.web)
        asyncio.run(accepted_until(serve, 5, lambda: None))  # its pool is as large as it gets
        found = rows(url, own)
        assert found
        accepted = asyncio.run(accepted_until(serve, 40, kill_connections))
        assert len(accepted) >= 40
        until_ready(serve, serve.web)

        def takes_posts() -> bool:
            answer = httpx.post(f"{serve.web}/webhooks/grafana", json=ours(fingerprint="after"), headers=TOKEN)
            return answer.status_code == 202

        assert eventually_sync(takes_posts, timeout_seconds=SECONDS)
        assert accepted | {"after"} <= shown(serve)
    assert not {pid for (pid,) in found} & {pid for (pid,) in rows(url, own)}


def test_two_grafanas_telling_of_one_alert_a_hundred_times_at_once_make_one_level_and_one_decision(
    start: Start, url: str
) -> None:
    spec = {
        "name": "a",
        "model": "qwen3-8b",
        "max_replicas": 4,
        "scale_up": {"cooldown_seconds": 1},
        "slurm": {"partition": "gpu", "time_limit_seconds": 3600},
        "template": "fake-vllm",
    }
    bodies = []
    for starts_at in ("2026-11-22T09:51:20Z", "2026-11-22T09:51:23Z"):
        body = copy.deepcopy(ours())
        body["alerts"][0]["startsAt"] = starts_at
        bodies.append(body)
    order = bodies * 100
    random.Random(7).shuffle(order)

    async def post_all(serve: Serve) -> list[int]:
        async with httpx.AsyncClient(base_url=serve.web, headers=TOKEN, timeout=SECONDS) as http:
            answers = await asyncio.gather(*(http.post("/webhooks/grafana", json=body) for body in order))
        return [answer.status_code for answer in answers]

    with start() as serve:
        serve.command("apply", "-f", "-", stdin=json.dumps({"replica_sets": [spec]}))
        until_ready(serve, serve.web)
        assert asyncio.run(post_all(serve)) == [202] * 200
        assert rows(url, "SELECT fingerprint, status FROM alerts") == [("f67ccfbef6174272", "firing")]
        assert rows(url, "SELECT count(*), sum(deliveries) FROM alert_deliveries") == [(2, 200)]

        def rounds() -> float:
            lines = httpx.get(f"{serve.web}/metrics").text.splitlines()
            [line] = [one for one in lines if one.startswith('controlplane_round_seconds_count{loop="replicas"}')]
            return float(line.split()[1])

        before = rounds()
        eventually_sync(lambda: rounds() >= before + 5, timeout_seconds=SECONDS)
        changes = rows(url, "SELECT previous, desired, reason FROM decisions WHERE previous <> desired")
        assert changes == [(0, 1, "SCALED_UP")]
