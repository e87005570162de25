"""A model scaled to zero, on a real Slurm: requests that two workers hold bring one job, and are all let in."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from datetime import UTC, datetime

from controlplane.core.types import VllmOptions
from controlplane.db import alerts
from controlplane.demo.slurm_cluster import SlurmCluster
from controlplane.proxy.directory import Directory
from controlplane.proxy.errors import ApiError
from controlplane.proxy.pressure import HeldPressure
from controlplane.proxy.waiting import WaitingRooms
from tests.conftest import eventually
from tests.e2e.reconciling import SPEC, Reconciling, reconciling


@asynccontextmanager
async def a_worker(world: Reconciling) -> AsyncIterator[WaitingRooms]:
    """One of two."""
    rooms = WaitingRooms(live_workers=lambda: 2)
    directory = Directory(
        world.db, refresh_seconds=5, on_read=lambda snapshot: rooms.follow(snapshot, time.monotonic())
    )
    await directory.refresh()
    tasks = [asyncio.create_task(run()) for run in (directory.run, HeldPressure(world.db, rooms).run)]
    yield rooms
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def test_200_requests_at_a_model_with_no_replica_make_one_job_and_are_all_let_in(
    slurm: SlurmCluster, database_url: str
) -> None:
    spec = replace(SPEC, vllm=VllmOptions(load_seconds=3))
    let_in: list[float] = []
    refused: list[ApiError] = []
    async with (
        reconciling(slurm, database_url, spec=spec) as world,
        a_worker(world) as first,
        a_worker(world) as second,
    ):
        began = time.monotonic()
        for number in range(200):
            rooms = (first, second)[number % 2]
            assert not rooms.enter(SPEC.model, "t")
            rooms.wait(
                SPEC.model,
                "t",
                lambda: let_in.append(time.monotonic() - began),
                refused.append,
                time.monotonic(),
                is_stream=True,
            )

        async def asked() -> bool:
            return len(await world.live()) == 1

        await eventually(asked, timeout_seconds=5)
        await eventually(lambda: len(let_in) == 200, timeout_seconds=60)
        assert not refused
        assert not first.held
        assert not second.held

        async def is_over() -> bool:
            heard = await alerts.load_since(world.db, datetime(2020, 1, 1, tzinfo=UTC))
            return [one.is_firing for one in heard] == [False]

        await eventually(is_over, timeout_seconds=5)
        assert len(await world.live()) == 1
        assert world.calls.count(("submit", "ok")) == 1
