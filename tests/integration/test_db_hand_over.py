"""Start leads, successors and yielding endpoints in a real PostgreSQL."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator
from datetime import timedelta

import psycopg
import pytest

from controlplane.clock import utc_now
from controlplane.core.types import HandOver, JobState, Phase, Replica, ReplicaSet, VllmOptions
from controlplane.db import Database, Stale, directory, endpoints, replica_sets, replicas, slurm_jobs
from controlplane.db.migrate import DIRECTORY
from controlplane.demo.postgres import PrivatePostgres
from tests.integration.db_rows import NOW, make_ready, make_replica, make_set, observe, opened, to

FIRST, *LATER = sorted(DIRECTORY.glob("*.sql"))
_ports = itertools.count(40000)


@pytest.fixture
async def db(database_url: str) -> AsyncIterator[Database]:
    async with opened(database_url) as opened_db:
        yield opened_db


async def start(db: Database, replica_set: ReplicaSet, seconds: float) -> None:
    """A start that took so long, of a replica that has ended since."""
    replica = await make_replica(db, replica_set, Phase.RUNNING)
    await make_ready(db, replica, f"http://n1:{replica.port}", at=NOW + timedelta(seconds=seconds))
    for phase in (Phase.DRAINING, Phase.STOPPING, Phase.ENDED):
        replica = await replicas.move(db, to(replica, phase), actor="test", now=NOW)


async def lead(db: Database) -> float | None:
    return (await replica_sets.load(db, "a")).start_lead_seconds


# --- start leads -------------------------------------------------------------------------------------------


async def test_the_start_lead_is_measured_when_a_replica_becomes_ready(db: Database) -> None:
    replica_set = await make_set(db)
    assert await lead(db) is None
    await make_replica(db, replica_set, Phase.QUEUED)
    assert await lead(db) is None
    await start(db, replica_set, 40)
    assert await lead(db) == 40
    await start(db, replica_set, 140)
    assert await lead(db) == pytest.approx(135)  # of two, 95 of 100 parts of the way
    async with db.connection() as connection:
        row = await (await connection.execute("SELECT * FROM replica_sets")).fetchone()
    assert row is not None
    assert (row["start_lead_starts"], row["start_lead_measured_at"]) == (2, NOW + timedelta(seconds=140))


async def test_a_replica_that_proves_itself_again_is_no_further_start(db: Database) -> None:
    replica = await make_replica(db, await make_set(db), Phase.RUNNING)
    await make_ready(db, replica, "http://n1:20000", at=NOW + timedelta(seconds=40))
    await endpoints.distrust(db, replica)
    (seen,) = await endpoints.load_live(db)
    await endpoints.save(db, seen, seen=seen)
    assert await lead(db) == 40


async def test_only_the_newest_starts_count(db: Database) -> None:
    replica_set = await make_set(db)
    for seconds in (900, *[30] * 20):
        await start(db, replica_set, seconds)
    assert await lead(db) == 30


async def test_starts_of_an_older_spec_count_until_there_are_three_of_the_one_in_force(db: Database) -> None:
    old = await make_set(db)
    for _ in range(3):
        await start(db, old, 900)
    new = await make_set(db, vllm=VllmOptions(image="two.sif"))
    await start(db, new, 30)
    await start(db, new, 30)
    assert (await lead(db) or 0) > 700
    await start(db, new, 30)
    assert await lead(db) == 30


async def test_sets_are_measured_apart_and_a_model_is_promised_the_longest_lead(db: Database) -> None:
    await start(db, await make_set(db), 40)
    await start(db, await make_set(db, "b"), 70)
    assert await lead(db) == 40
    (model,) = (await directory.read(db, utc_now())).models
    assert model.start_seconds_p95 == 70


async def test_the_migration_measures_what_a_database_of_the_first_schema_holds(postgres: PrivatePostgres) -> None:
    url = postgres.create_database("first-schema")
    async with await psycopg.AsyncConnection.connect(url) as connection:
        await connection.execute(FIRST.read_bytes())
        await connection.execute(
            """
            INSERT INTO replica_sets (name, model, priority, is_external, spec, spec_hash,
                                      min_replicas, max_replicas, desired_replicas)
            VALUES ('a', 'm', 1, false, '{"model": "m"}', 'h', 0, 1, 1), ('box', 'm', 1, true, '{}', 'h', 0, 0, 0);
            INSERT INTO replicas (id, name, replica_set, phase, spec, spec_hash, port, secret, slurm_job_id,
                                  created_at, phase_since, running_since)
            OVERRIDING SYSTEM VALUE
            VALUES (1, 'cp-a-1', 'a', 'RUNNING', '{"model": "m"}', 'h', 20000, repeat('x', 32), 7,
                    now() - interval '90 s', now(), now());
            INSERT INTO endpoints (replica_set, replica_id, url, api_key, health, first_ready_at, confirmed_at)
            VALUES ('a', 1, 'http://n1:1', 'k', 'READY', now() - interval '40 s', now());
            INSERT INTO slurm_jobs (replica_id, job_id, state, raw_state, ends_at, observed_at)
            VALUES (1, 7, 'RUNNING', 'RUNNING', now() + interval '1 h', now());
            """
        )
        for file in LATER:
            await connection.execute(file.read_bytes())
        cursor = await connection.execute(
            "SELECT start_lead_seconds, start_lead_starts FROM replica_sets ORDER BY name"
        )
        assert await cursor.fetchall() == [(50.0, 1), (None, None)]
    async with opened(url) as db:
        (endpoint,) = await endpoints.load_routable(db)
        assert endpoint.yields_at is not None
        assert endpoint.ends_at is not None
        assert endpoint.ends_at - endpoint.yields_at == timedelta(seconds=600), "the default margin"


# --- successors --------------------------------------------------------------------------------------------


async def succeed(db: Database, replica_set: ReplicaSet, predecessor: Replica) -> Replica:
    return await replicas.create(
        db, replica_set, port=next(_ports), secret="x" * 32, actor="test", now=NOW, succeeds=predecessor.id
    )


async def test_a_successor_is_created_beside_its_predecessor_and_the_pair_counts_as_one(db: Database) -> None:
    replica_set = await make_set(db, min_replicas=1, max_replicas=1, surge=2)
    first = await make_replica(db, replica_set, Phase.RUNNING)
    second = await succeed(db, replica_set, first)
    assert (second.succeeds, second.predecessor) == (first.id, first.name)
    with pytest.raises(Stale):
        await make_replica(db, replica_set)
    with pytest.raises(Stale):
        await succeed(db, replica_set, first)


async def test_of_many_who_create_a_successor_at_once_one_does(db: Database) -> None:
    replica_set = await make_set(db, min_replicas=1, max_replicas=1, surge=3)
    first = await make_replica(db, replica_set, Phase.RUNNING)
    results = await asyncio.gather(*(succeed(db, replica_set, first) for _ in range(5)), return_exceptions=True)
    assert sum(isinstance(result, Stale) for result in results) == 4
    assert len(await replicas.load_live(db)) == 2


async def test_a_successor_is_a_replica_like_any_other_when_its_predecessor_is_gone(db: Database) -> None:
    replica_set = await make_set(db, min_replicas=1, max_replicas=1, surge=2)
    first = await make_replica(db, replica_set, Phase.RUNNING)
    second = await succeed(db, replica_set, first)
    await replicas.move(db, to(first, Phase.DRAINING), actor="test", now=NOW)
    with pytest.raises(Stale):
        await make_replica(db, replica_set)
    for phase in (Phase.SUBMITTING, Phase.QUEUED, Phase.RUNNING):
        second = await replicas.move(db, to(second, phase), actor="test", now=NOW)
    assert (await succeed(db, replica_set, second)).succeeds == second.id


@pytest.mark.parametrize("phase", [Phase.QUEUED, Phase.DRAINING, Phase.ENDED])
async def test_nobody_succeeds_what_does_not_run(db: Database, phase: Phase) -> None:
    replica_set = await make_set(db, max_replicas=2)
    with pytest.raises(Stale):
        await succeed(db, replica_set, await make_replica(db, replica_set, phase))


async def test_a_successor_has_to_find_room_within_the_surge(db: Database) -> None:
    replica_set = await make_set(db, min_replicas=1, max_replicas=1, surge=0)
    with pytest.raises(Stale):
        await succeed(db, replica_set, await make_replica(db, replica_set, Phase.RUNNING))


async def test_a_forgotten_predecessor_leaves_its_ended_successor_alone(db: Database) -> None:
    """An ended replica is never changed again, not even to lose its predecessor."""
    replica_set = await make_set(db, min_replicas=1, max_replicas=1, surge=2)
    first = await make_replica(db, replica_set, Phase.RUNNING)
    second = await succeed(db, replica_set, first)
    await replicas.move(db, to(first, Phase.ENDED), actor="test", now=NOW)
    await replicas.move(db, to(second, Phase.ENDED), actor="test", now=NOW + timedelta(days=1))
    assert await replicas.forget(db, older_than=timedelta(hours=1), now=NOW + timedelta(days=1)) == 1
    assert (await replicas.load(db, second.name)).succeeds == first.id


# --- ends --------------------------------------------------------------------------------------------------


async def test_an_endpoint_is_known_to_yield_as_its_set_says_now(db: Database) -> None:
    replica = await make_replica(db, await make_set(db, hand_over=HandOver(margin_seconds=60)), Phase.RUNNING)
    ends_at = NOW + timedelta(hours=1)
    await make_ready(db, replica, "http://n1:20000", ends_at=ends_at)
    (endpoint,) = await endpoints.load_routable(db)
    assert endpoint.yields_at == ends_at - timedelta(seconds=60)
    await make_set(db, hand_over=HandOver(margin_seconds=90))
    (endpoint,) = await endpoints.load_routable(db)
    assert endpoint.yields_at == ends_at - timedelta(seconds=90)


async def test_the_ends_of_live_jobs_are_remembered_for_when_slurm_does_not_answer(db: Database) -> None:
    replica_set = await make_set(db)
    running, ended = [await make_replica(db, replica_set, Phase.RUNNING) for _ in range(2)]
    unknown = await make_replica(db, replica_set, Phase.RUNNING)
    for replica in (running, ended):
        await observe(db, replica, JobState.RUNNING, ends_at=NOW + timedelta(hours=1))
    await observe(db, unknown, JobState.RUNNING)
    await replicas.move(db, to(ended, Phase.ENDED), actor="test", now=NOW)
    assert await slurm_jobs.load_ends(db) == {running.name: NOW + timedelta(hours=1)}
