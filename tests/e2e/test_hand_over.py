"""Walltimes end under load, one after the other, and no client notices; on real Slurm, with the real proxy.

`make test` shows one hand-over; `make hand-over` shows three in a row and prints what came of them.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import datetime, timedelta
from pathlib import Path

import pytest
from loguru import logger

from controlplane.core.types import HandOver, Phase, Reason, Replica, ReplicaSetSpec, VllmOptions
from controlplane.db import Database, DatabaseOptions, endpoints, replica_sets, replicas
from controlplane.demo.load import Load, LoadOptions
from controlplane.demo.scenario import REPLICA_SET
from controlplane.demo.site import Site, SiteOptions
from controlplane.demo.slurm_cluster import SlurmCluster
from tests.conftest import eventually
from tests.e2e.reconciling import SPEC as SMALL
from tests.e2e.reconciling import reconciling

GENERATIONS = int(os.environ.get("HAND_OVER_GENERATIONS", "1"))
WALLTIME = timedelta(minutes=2)
CLIENTS = 4

assert REPLICA_SET.slurm is not None
SPEC = replace(
    REPLICA_SET,
    name="short",
    min_replicas=1,
    max_replicas=1,
    slurm=replace(REPLICA_SET.slurm, gpus_per_node=1, time_limit_seconds=int(WALLTIME.total_seconds())),
    vllm=VllmOptions(args=("--max-num-seqs", "12", "--tokens-per-second", "30"), load_seconds=3),
    hand_over=HandOver(margin_seconds=30, default_lead_seconds=20),
)


@pytest.fixture
def site(session_directory: Path, database_url: str) -> Iterator[Site]:
    with Site(session_directory / "site", SiteOptions(SPEC, database_url=database_url)) as up:
        yield up


async def until_routable(db: Database) -> Replica:
    async def the_only_one() -> Replica | None:
        live = [one for one in await replicas.load_live(db) if one.exists]
        routable = {one.replica for one in await endpoints.load_routable(db)}
        return live[0] if len(live) == 1 and live[0].name in routable else None

    return await eventually(the_only_one, timeout_seconds=90)


@pytest.mark.slow
async def test_generations_of_walltimes_end_under_load_and_no_stream_breaks(site: Site) -> None:
    async with Database(DatabaseOptions(site.database_url)) as db:
        load = Load(LoadOptions(site.proxy_url, site.api_key, SPEC.model, tokens=60))
        current = await until_routable(db)
        load.wanted = CLIENTS
        running = asyncio.create_task(load.run())
        told: list[str] = []
        try:
            for _ in range(GENERATIONS):
                gone = current

                async def is_gone(name: str = gone.name) -> Replica | None:
                    assert load.count.failed + load.count.broken == 0, load.count
                    replica = await replicas.load(db, name)
                    return replica if replica.phase is Phase.ENDED else None

                # Slurm itself ends a job up to half a minute after its time limit
                ended = await eventually(is_gone, timeout_seconds=WALLTIME.total_seconds() + 120)
                current = await until_routable(db)
                assert ended.reason is Reason.HANDED_OVER, ended
                assert current.succeeds == gone.id
                assert gone.running_since is not None
                ends_at = gone.running_since + WALLTIME
                assert await drained_at(db, gone) >= await ready_at(db, current)
                told.append(
                    f"{gone.name} -> {current.name}: the successor was ready "
                    f"{(ends_at - await ready_at(db, current)).total_seconds():.0f} s before the walltime's end, "
                    f"and the predecessor gone {(ends_at - ended.phase_since).total_seconds():.0f} s before it"
                )
        finally:
            load.wanted = 0
            await load.finish()
            running.cancel()
        everyone = await replicas.load_newest(db)
        lead = (await replica_sets.load(db, SPEC.name)).start_lead_seconds
    count = load.count
    told.append(f"requests: {count.done} done, {count.failed} failed, {count.broken} broken")
    title = f"{GENERATIONS} hand-over(s) of {WALLTIME}, {CLIENTS} clients, start lead {lead:.1f} s"
    print(f"\n{title}", *told, sep="\n  ")  # noqa: T201 -- `make hand-over` shows it
    assert (count.failed, count.broken) == (0, 0), count
    assert count.done > 10 * GENERATIONS
    started = [one.name for one in everyone if one.reason is not Reason.CRASHED]  # another process may have the port
    assert len(started) == GENERATIONS + 1, "a successor each, and no more"


async def drained_at(db: Database, replica: Replica) -> datetime:
    steps = await replicas.load_history(db, name=replica.name)
    return next(step.at for step in steps if step.to_phase is Phase.DRAINING)


async def ready_at(db: Database, replica: Replica) -> datetime:
    found = [one.first_ready_at for one in await endpoints.load_live(db) if one.replica == replica.name]
    assert found[0] is not None
    return found[0]


# --- reservations --------------------------------------------------------------------------------------------


@pytest.fixture
def maintenance(slurm: SlurmCluster) -> Iterator[Callable[[], object]]:
    """In an hour all nodes are reserved for maintenance; unless this is called, which calls it off."""
    starts_at = datetime.now() + timedelta(hours=1)  # noqa: DTZ005 -- scontrol reads the machine's own time
    slurm.run(
        *("scontrol", "create", "reservation", "ReservationName=fans", "users=root", "flags=maint", "nodes=ALL"),
        *(f"starttime={starts_at:%Y-%m-%dT%H:%M:%S}", "duration=120"),
    )

    def call_off() -> object:
        return slurm.run("scontrol", "delete", "ReservationName=fans")

    yield call_off
    if "fans" in slurm.run("scontrol", "show", "reservations"):
        call_off()


def small(least_seconds: int) -> ReplicaSetSpec:
    assert SMALL.slurm is not None
    limits = replace(SMALL.slurm, time_limit_seconds=12 * 3600, min_time_limit_seconds=least_seconds)
    return replace(SMALL, min_replicas=1, slurm=limits)


@pytest.mark.usefixtures("maintenance")
async def test_a_job_that_would_reach_into_a_maintenance_asks_for_less_time_and_says_so(
    slurm: SlurmCluster, database_url: str
) -> None:
    """With the time limit that it was to have, Slurm would not start it before the maintenance is over."""
    async with reconciling(slurm, database_url, spec=small(600)) as site:
        await site.until_routable(1)
        [replica] = await site.live()
        assert replica.message is not None
        assert "asked for instead of 43200 s: maintenance reservation fans begins at" in replica.message
        minutes = slurm.run("squeue", "--noheader", "--format=%l", f"--jobs={replica.slurm_job_id}").split(":")[0]
        assert int(minutes) in range(40, 60)  # less what a start is thought to take


async def test_a_job_that_a_maintenance_leaves_too_little_time_waits_and_says_so(
    slurm: SlurmCluster, database_url: str, maintenance: Callable[[], object], warnings: list[str]
) -> None:
    async with reconciling(slurm, database_url, spec=small(2 * 3600)) as site:
        await eventually(lambda: [line for line in warnings if "maintenance reservation fans begins at" in line])
        assert await site.live() == ()
        assert not site.jobs()
        maintenance()
        await site.until_routable(1, timeout_seconds=90)


@pytest.fixture
def warnings() -> Iterator[list[str]]:
    seen: list[str] = []
    sink = logger.add(lambda message: seen.append(message.record["message"]), level="WARNING")
    yield seen
    logger.remove(sink)
