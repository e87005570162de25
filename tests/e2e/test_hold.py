"""Requests at a model with zero replicas, on real Slurm: they start one job, and all are answered by it."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import pytest

from controlplane.clock import utc_now
from controlplane.db import Database, DatabaseOptions, replica_sets
from controlplane.demo.postgres import PrivatePostgres
from controlplane.demo.slurm_cluster import SlurmCluster
from tests.conftest import eventually
from tests.e2e.plant import SPEC, Plant, jobs_of, living
from tests.integration.arrivals import WHOLE, Arrivals

REQUESTS = 200


@pytest.fixture(scope="module")
def up(
    session_directory: Path, slurm: SlurmCluster, postgres: PrivatePostgres, template_database: str
) -> Iterator[Plant]:
    """One control plane and one proxy."""
    url = postgres.create_database("hold", template=template_database)
    directory = session_directory / "hold"
    directory.mkdir()
    with Plant(directory, slurm, url) as plant:
        plant.serve("control", "control")
        plant.serve("proxy", "proxy")
        yield plant


async def test_200_requests_at_a_model_with_zero_replicas_start_one_job_and_are_all_answered(up: Plant) -> None:
    spec = replace(SPEC, name="asleep", model="asleep model", min_replicas=0, max_replicas=2)
    async with Database(DatabaseOptions(up.database_url)) as db:
        await replica_sets.apply(db, spec, actor="test", now=utc_now())
        async with httpx.AsyncClient(base_url=up.url("proxy"), trust_env=False) as client:
            headers = {"authorization": f"Bearer {up.api_key}"}

            async def is_known() -> bool:
                return (await client.get(f"/v1/models/{spec.model}", headers=headers)).status_code == 200

            await eventually(is_known)
        port = urlsplit(up.url("proxy")).port
        assert port is not None
        arrivals = Arrivals(port, up.api_key, limit_seconds=180)
        fields = {"model": spec.model, "messages": [{"role": "user", "content": "hello"}], "max_tokens": 4}
        try:
            async with asyncio.TaskGroup() as clients:
                for number in range(REQUESTS):
                    clients.create_task(arrivals.one({**fields, "stream": number % 2 == 0}))
            jobs = await jobs_of(up.slurm, db)
        finally:
            await replica_sets.pause(db, spec.name, actor="test", now=utc_now())

            async def is_gone() -> bool:
                return not living(await jobs_of(up.slurm, db))

            await eventually(is_gone, timeout_seconds=60)
    assert arrivals.ended == {WHOLE: REQUESTS}
    assert len(jobs) == 1
