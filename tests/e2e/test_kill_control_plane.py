"""The control plane is killed and comes back: the same replicas, no second job, and clients that notice nothing."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import httpx
import pytest

from controlplane.clock import utc_now
from controlplane.core.types import Phase
from controlplane.db import Database, DatabaseOptions, endpoints, replica_sets, replicas
from controlplane.demo.scenario import REPLICA_SET
from controlplane.demo.site import Site, SiteOptions
from tests.conftest import eventually

SPEC = replace(REPLICA_SET, name="killed")


@pytest.fixture
def site(session_directory: Path, database_url: str) -> Iterator[Site]:
    with Site(session_directory / "site", SiteOptions(SPEC, database_url=database_url)) as up:
        yield up


def jobs(site: Site) -> dict[str, str]:
    """What squeue shows: the job's id by its name. Fails on a name that stands there twice."""
    rows = [line.split() for line in site.slurm.run("squeue", "--noheader", "--format", "%j %i").splitlines()]
    assert len({name for name, _ in rows}) == len(rows), f"a replica has two jobs: {rows}"
    return dict(rows)


async def test_killed_during_scale_up_it_comes_back_to_the_same_replicas_and_no_second_job(site: Site) -> None:
    async with Database(DatabaseOptions(site.database_url)) as db:
        await replica_sets.scale(db, SPEC.name, replicas=3, actor="test", now=utc_now())

        async def is_under_way() -> bool:
            return any(replica.phase is Phase.QUEUED for replica in await replicas.load_live(db))

        await eventually(is_under_way)
        await asyncio.to_thread(site.children.kill, "controlplane")
        intended = {replica.name for replica in await replicas.load_live(db)}
        assert len(intended) == 3
        assert jobs(site).keys() <= intended

        await asyncio.to_thread(site.restart_control_plane)

        async def all_routable() -> bool:
            assert set(jobs(site)) <= intended
            return len(await endpoints.load_routable(db)) == 3

        # killed between an intent and its request: that is proven absent only once the request can no longer act
        await eventually(all_routable, timeout_seconds=150)
        after = {replica.name: str(replica.slurm_job_id) for replica in await replicas.load_live(db)}
        assert set(after) == intended
        assert jobs(site) == after


async def test_replicas_serve_on_while_the_control_plane_is_dead(site: Site) -> None:
    async with Database(DatabaseOptions(site.database_url)) as db:
        await replica_sets.scale(db, SPEC.name, replicas=1, actor="test", now=utc_now())

        async def is_routable() -> bool:
            return len(await endpoints.load_routable(db)) == 1

        await eventually(is_routable, timeout_seconds=60)
        before = jobs(site)
        await asyncio.to_thread(site.children.kill, "controlplane")
        assert jobs(site) == before
        await asyncio.to_thread(site.restart_control_plane)
        async with httpx.AsyncClient(
            base_url=site.proxy_url, headers={"Authorization": f"Bearer {site.api_key}"}
        ) as http:
            body = {"model": SPEC.model, "messages": [{"role": "user", "content": "hi"}], "max_tokens": 3}
            answer = await http.post("/v1/chat/completions", json=body)
        assert answer.status_code == 200, answer.text
        assert jobs(site) == before


async def test_a_site_on_a_database_of_an_earlier_one_starts_afresh(session_directory: Path, database_url: str) -> None:
    site = Site(session_directory / "site", SiteOptions(replace(SPEC, min_replicas=1), database_url=database_url))
    async with Database(DatabaseOptions(database_url)) as db:

        async def is_routable() -> bool:
            return len(await endpoints.load_routable(db)) == 1

        names = []
        for _ in range(2):
            await asyncio.to_thread(site.start)
            try:
                await eventually(is_routable, timeout_seconds=60)
                [replica] = await replicas.load_live(db)
                names.append(replica.name)
            finally:
                await asyncio.to_thread(site.stop)
        assert (await replicas.load(db, names[0])).phase is Phase.ENDED
        assert names[0] != names[1]
