"""The runner of loops, and what a round makes of Slurm's answers, on a real PostgreSQL."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from datetime import datetime, timedelta
from pathlib import Path
from random import Random
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from controlplane.core.reservations import Calendar
from controlplane.core.types import JobList, JobState, Phase, SlurmJob
from controlplane.db import Database, endpoints
from controlplane.metrics import ControlPlaneMetrics
from controlplane.reconcile.actions import ActionOptions, Actor
from controlplane.reconcile.loop import Runner, RunnerOptions
from controlplane.reconcile.replicas import ReplicaLoop, ReplicaOptions
from controlplane.slurm.script import ScriptOptions
from tests.conftest import eventually
from tests.integration.db_rows import NOW, make_replica, make_set, opened


@pytest.fixture
async def db(database_url: str) -> AsyncIterator[Database]:
    async with opened(database_url) as opened_db:
        yield opened_db


class CountedLoop:
    name = "counted"
    interval_seconds = 60.0

    def __init__(self) -> None:
        self.rounds = 0

    async def run_once(self, _now: datetime) -> None:
        self.rounds += 1


async def test_a_storm_of_wakes_is_a_few_rounds(db: Database) -> None:
    loop = CountedLoop()
    metrics = ControlPlaneMetrics(CollectorRegistry())
    runner = Runner(db, [loop], RunnerOptions("here"), metrics, lambda: NOW)
    running = asyncio.create_task(runner.run())
    try:
        await eventually(lambda: loop.rounds)
        for _ in range(500):
            runner.wake()
            await asyncio.sleep(0.001)
        await eventually(lambda: loop.rounds >= 2)
        assert loop.rounds <= 10
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)


async def test_a_round_that_fails_leaves_the_time_of_the_last_that_did_not(db: Database) -> None:
    registry = CollectorRegistry()
    now = [NOW]

    class Failing(CountedLoop):
        async def run_once(self, _now: datetime) -> None:
            self.rounds += 1
            if self.rounds > 1:
                raise ValueError("the list is not one")

    def sample(name: str) -> float | None:
        return registry.get_sample_value(f"controlplane_round_{name}", {"loop": "counted"})

    loop = Failing()
    runner = Runner(db, [loop], RunnerOptions("here"), ControlPlaneMetrics(registry), lambda: now[0])
    running = asyncio.create_task(runner.run())
    try:
        await eventually(lambda: sample("succeeded_timestamp_seconds") == NOW.timestamp())
        now[0] += timedelta(minutes=1)
        runner.wake()
        await eventually(lambda: sample("failures_total"))
        assert sample("succeeded_timestamp_seconds") == NOW.timestamp()
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)


class OneJob:
    """A Slurm that knows of one job."""

    submit_grace = timedelta(minutes=2)

    def __init__(self, job: SlurmJob, address: str) -> None:
        self._job, self._address = job, address

    async def list_jobs(self, now: datetime) -> JobList:
        return JobList((self._job,), now)

    async def calendar(self) -> Calendar:
        return Calendar()

    async def node_address(self, _node: str) -> str:
        return self._address


@pytest.mark.parametrize(("address", "host"), [("10.0.0.7", "10.0.0.7"), ("fd00::7", "[fd00::7]")])
async def test_a_replicas_url_holds_its_nodes_address_whatever_its_kind(db: Database, address: str, host: str) -> None:
    replica = await make_replica(db, await make_set(db, min_replicas=1, max_replicas=1), Phase.RUNNING)
    assert replica.slurm_job_id is not None
    job = SlurmJob(replica.slurm_job_id, replica.name, "user", JobState.RUNNING, batch_host="n1")
    slurm: Any = OneJob(job, address)
    options = ActionOptions(Path("/jobs"), ScriptOptions(), "i" * 32)
    actor = Actor(db, slurm, options, lambda: NOW, Random(1))
    metrics = ControlPlaneMetrics(CollectorRegistry())
    await ReplicaLoop(db, slurm, actor, ReplicaOptions("i" * 32), metrics, lambda: NOW).run_once(NOW)
    [endpoint] = await endpoints.load_live(db)
    assert endpoint.url == f"http://{host}:{replica.port}"
