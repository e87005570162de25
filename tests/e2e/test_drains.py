"""Drains under load: real proxies, real jobs, dozens of streams. None breaks but at a deadline, which is counted."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from controlplane.clock import utc_now
from controlplane.core.types import Phase, Reason, VllmOptions
from controlplane.db import Database, DatabaseOptions, endpoints, replica_sets, replicas
from controlplane.demo.postgres import PrivatePostgres
from controlplane.demo.slurm_cluster import SlurmCluster
from tests.conftest import eventually
from tests.e2e.plant import SHORT_WAITS, SPEC, Plant, jobs_of, living, twins
from tests.e2e.slurm_matrix import release_under_test
from tests.e2e.streams import CUT, WHOLE, Streams

PROXIES = ("proxy one", "proxy two")


@pytest.fixture(scope="module")
def up(session_directory: Path, postgres: PrivatePostgres, template_database: str) -> Iterator[Plant]:
    """One control plane and two proxies."""
    url = postgres.create_database("drains", template=template_database)
    directory = session_directory / "drains"
    directory.mkdir()
    with (
        SlurmCluster(directory / "slurm", extra_conf=SHORT_WAITS, root=release_under_test()) as slurm,
        Plant(directory / "plant", slurm, url) as plant,
    ):
        plant.serve("control", "control")
        for name in PROXIES:
            plant.serve(name, "proxy")
        yield plant


def streams_of(up: Plant, model: str) -> Streams:
    return Streams([up.url(name) for name in PROXIES], up.api_key, model)


async def say(up: Plant, *words: str) -> None:
    """What an operator types."""
    command = [sys.executable, "-m", "controlplane.cli", *words]
    done = await asyncio.to_thread(subprocess.run, command, env=up.settings(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


async def until_serving(db: Database, count: int, *, spec_hash: str | None = None) -> list[str]:
    """Until so many replicas run and are routable, all of them of this spec if given; their names."""

    async def serving() -> list[str] | None:
        live = [one for one in await replicas.load_live(db) if one.exists]
        routable = {one.replica for one in await endpoints.load_routable(db)}
        is_so = {one.name for one in live} == routable and len(live) == count
        is_so = is_so and (spec_hash is None or {one.spec_hash for one in live} == {spec_hash})
        return [one.name for one in live] if is_so else None

    return await eventually(serving, timeout_seconds=120)


async def until_gone(up: Plant, db: Database, *, left: int) -> None:
    async def is_so() -> bool:
        return len(await replicas.load_live(db)) == left == len(living(await jobs_of(up.slurm, db)))

    await eventually(is_so, timeout_seconds=120)


async def test_no_stream_breaks_while_replicas_are_drained_undrained_rolled_and_scaled_down(up: Plant) -> None:
    async with Database(DatabaseOptions(up.database_url)) as db:
        spec = replace(SPEC, surge=3)  # or each successor would wait for the streams of another one's predecessor
        await replica_sets.apply(db, spec, actor="test", now=utc_now())
        await replica_sets.scale(db, SPEC.name, replicas=3, actor="test", now=utc_now())
        drained, *_ = await until_serving(db, 3)
        streams = streams_of(up, SPEC.model)
        async with streams.trickle():
            await streams.open(44, tokens=80)
            await streams.open(6, tokens=200)  # some for each, so that no drain is over before it is undone
            await say(up, "drain", drained)

            async def successor() -> bool:
                return len(await replicas.load_live(db)) == 4

            await eventually(successor, timeout_seconds=30)
            assert drained not in {one.replica for one in await endpoints.load_routable(db)}
            await say(up, "undrain", drained)
            assert drained in await until_serving(db, 3)

            args = (*SPEC.vllm.args, "--max-model-len", "4096")
            changed = replace(spec, vllm=VllmOptions(args=args))
            await replica_sets.apply(db, changed, actor="test", now=utc_now())
            rolled = await until_serving(db, 3, spec_hash=(await replica_sets.load(db, SPEC.name)).spec_hash)
            assert drained not in rolled

            await streams.open(50, tokens=60)
            await replica_sets.scale(db, SPEC.name, replicas=1, actor="test", now=utc_now())
            up.freeze(PROXIES[1])  # it hears of no drain until all of them are over, with half of the streams
            try:
                await until_gone(up, db, left=1)
            finally:
                up.wake(PROXIES[1])
            await streams.all_ended()
        assert set(streams.ended) == {WHOLE}, streams.ended
        assert streams.ended[WHOLE] > 100
        await replica_sets.scale(db, SPEC.name, replicas=0, actor="test", now=utc_now())
        await until_gone(up, db, left=0)
        steps = await replicas.load_history(db)
        stops = [step for step in steps if step.to_phase is Phase.STOPPING]
        assert {step.message for step in stops if step.from_phase is Phase.DRAINING} <= {
            "drained: no request was left",
            None,  # the successor of the drain that was undone had never been given a request
        }
        assert {step.reason for step in stops} <= {Reason.ROLLED, Reason.SCALED_DOWN}
        assert {one.cut_requests for one in await replicas.load_newest(db)} == {None}
        assert twins(await jobs_of(up.slurm, db)) == []
    assert up.metric("control", f'controlplane_requests_cut_total{{replica_set="{SPEC.name}"}}') == 0


async def test_at_its_deadline_a_drain_cuts_what_is_left_and_tells_its_clients_and_counts_it(up: Plant) -> None:
    spec = replace(SPEC, name="cut", model="cut model", drain_timeout_seconds=4)
    async with Database(DatabaseOptions(up.database_url)) as db:
        await replica_sets.apply(db, spec, actor="test", now=utc_now())
        await replica_sets.scale(db, spec.name, replicas=1, actor="test", now=utc_now())
        [name] = await until_serving(db, 1)
        streams = streams_of(up, spec.model)
        await streams.open(4, tokens=1200)
        await streams.open(6, tokens=8)
        await replica_sets.scale(db, spec.name, replicas=0, actor="test", now=utc_now())
        assert await streams.all_ended() == {WHOLE: 6, CUT: 4}

        async def ended() -> bool:
            return (await replicas.load(db, name)).phase is Phase.ENDED

        await eventually(ended, timeout_seconds=30)
        cut = await replicas.load(db, name)
        assert (cut.cut_requests, cut.reason) == (4, Reason.SCALED_DOWN)
        assert up.metric("control", f'controlplane_requests_cut_total{{replica_set="{spec.name}"}}') == 4
        seen = [up.metric(one, f'proxy_broken_streams_total{{model="{spec.model}"}}') for one in PROXIES]
        assert sum(seen) == 4
        await until_gone(up, db, left=0)
