"""Usage is stored exactly once, whatever breaks, and the GPU-seconds of jobs are shared out by it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from datetime import UTC, date, datetime, timedelta
from typing import Any

import pytest

from controlplane.core.types import JobState, Phase, Replica, SlurmResources
from controlplane.db import Database, DatabaseOptions, DbUnavailable, replicas, usage
from controlplane.db.usage import By
from controlplane.proxy.usage import Usage, UsageOptions
from tests.integration.db_rows import NOW, make_replica, make_set, observe, opened, to
from tests.integration.test_proxy_directory import laid_wire

TODAY = NOW.date()
FIRST, END = date(2026, 1, 1), date(2026, 2, 1)
EVER = datetime(2027, 1, 1, tzinfo=UTC)


@pytest.fixture
async def db(database_url: str) -> AsyncIterator[Database]:
    async with opened(database_url) as opened_db:
        yield opened_db


def count(usage: Usage, tenant: str = "lab", tokens: int = 10, day: date = TODAY, **more: Any) -> None:
    given = {"model": "m", "endpoint_id": 1, "replica": None, "cached": 0, "is_aborted": False, **more}
    usage.record(tenant, prompt=tokens, completion=0, today=day, **given)


async def stored(db: Database) -> dict[str, tuple[int, int]]:
    """Requests and prompt tokens by tenant."""
    found = await usage.report(db, By.TENANT, FIRST, END, EVER)
    return {line.name: (line.requests, line.prompt_tokens) for line in found.lines}


async def month_tokens(db: Database, tenant: str = "lab") -> int:
    async with db.connection() as connection:
        cursor = await connection.execute("SELECT tokens FROM tenant_months WHERE tenant = %s", (tenant,))
        row = await cursor.fetchone()
    return row["tokens"] if row else 0


# --- exactly once ----------------------------------------------------------------------------------------


async def test_what_was_counted_is_stored_by_day_tenant_model_and_endpoint(db: Database) -> None:
    counted = Usage(db, "w")
    counted.record("lab", "m", 7, "cp-a-3", 100, 20, 60, False, TODAY)
    counted.record("lab", "m", 7, "cp-a-3", 10, 0, 0, True, TODAY)
    counted.record("other", "m", 0, None, 0, 0, 0, True, TODAY + timedelta(days=1))
    assert await counted.flush()
    assert await counted.flush()
    async with db.connection() as connection:
        rows = await (await connection.execute("SELECT * FROM usage ORDER BY tenant")).fetchall()
    assert [tuple(row.values()) for row in rows] == [
        (TODAY, "lab", "m", 7, "a", "cp-a-3", 2, 1, 110, 20, 60),
        (TODAY + timedelta(days=1), "other", "m", 0, "", "", 1, 1, 0, 0, 0),
    ]
    assert await month_tokens(db) == 130


async def test_the_set_of_a_fixed_endpoint_is_looked_up(db: Database) -> None:
    async with db.connection() as connection:
        await make_set(db, "box")
        cursor = await connection.execute(
            "INSERT INTO endpoints (replica_set, url) VALUES ('box', 'http://h:1') RETURNING id"
        )
        row = await cursor.fetchone()
    assert row is not None
    counted = Usage(db, "w")
    count(counted, endpoint_id=row["id"])
    await counted.flush()
    report = await usage.report(db, By.REPLICA_SET, FIRST, END, EVER)
    assert [line.name for line in report.lines] == ["box"]


async def test_a_batch_that_is_sent_again_is_not_counted_again(db: Database) -> None:
    row = usage.Row(TODAY, "lab", "m", 1, None, 1, 0, 10, 5, 0)
    assert await usage.store(db, "w", 1, [row])
    assert not await usage.store(db, "w", 1, [row])
    assert await usage.store(db, "w", 2, [row])
    assert not await usage.store(db, "w", 1, [row])
    assert await usage.store(db, "x", 1, [row])
    assert await stored(db) == {"lab": (3, 30)}
    assert await month_tokens(db) == 45


async def test_a_connection_that_breaks_after_the_commit_counts_once(
    db: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The statement is committed, and the answer is lost."""
    store = usage.store
    lost = 0

    async def store_and_lose_the_answer(*arguments: Any) -> bool:
        nonlocal lost
        await store(*arguments)
        lost += 1
        raise DbUnavailable("server closed the connection unexpectedly")

    counted = Usage(db, "w")
    count(counted)
    monkeypatch.setattr(usage, "store", store_and_lose_the_answer)
    assert not await counted.flush()
    assert not await counted.flush()
    count(counted)  # belongs to the next batch, and not to one that may be stored already
    monkeypatch.setattr(usage, "store", store)
    assert lost == 2
    assert await counted.flush()
    assert await counted.flush()
    assert await stored(db) == {"lab": (2, 20)}
    assert counted.tally("lab", FIRST) == (20, 20)


async def test_a_server_that_kills_the_connection_midway_counts_once(db: Database, database_url: str) -> None:
    async with opened(database_url) as broken:
        counted = Usage(broken, "w")
        for round_number in range(1, 6):
            count(counted)
            flushing = asyncio.create_task(counted.flush())
            async with db.connection() as connection:
                await connection.execute(
                    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
                    "WHERE datname = current_database() AND pid <> pg_backend_pid()"
                )
            await flushing
            while not await counted.flush():
                pass
            await counted.flush()
            assert await stored(db) == {"lab": (round_number, 10 * round_number)}


async def test_many_workers_count_the_same_rows_at_once_and_nothing_is_lost(db: Database) -> None:
    workers = [Usage(db, f"w{number}") for number in range(4)]
    for number, worker in enumerate(workers):
        for tenant in ["a", "b", "c"] if number % 2 else ["c", "b", "a"]:
            count(worker, tenant)
    await asyncio.gather(*(worker.flush() for worker in workers))
    for worker in workers:
        assert await worker.flush()
    assert await stored(db) == {"a": (4, 40), "b": (4, 40), "c": (4, 40)}


async def test_while_the_database_is_away_it_is_kept_up_to_a_bound_and_what_is_lost_is_counted(
    db: Database, database_url: str
) -> None:
    async with laid_wire(database_url) as wire, Database(DatabaseOptions(wire.url, timeout_seconds=0.3)) as cut_off:
        counted = Usage(cut_off, "w", UsageOptions(most_keys=2))
        await wire.cut()
        count(counted, "a")
        assert not await counted.flush()
        count(counted, "a")
        count(counted, "b")  # one key too many, with the one that was sent
        count(counted, "a")
        assert (counted.lost_requests, counted.lost_tokens) == (1, 10)
        assert not await counted.flush()
        await wire.lay()
        await counted.close()
    assert await stored(db) == {"a": (3, 30)}


async def test_what_cannot_be_stored_at_the_end_is_counted_as_lost(free_port: int) -> None:
    async with Database(DatabaseOptions(f"postgresql://u:p@127.0.0.1:{free_port}/x", timeout_seconds=0.2)) as nowhere:
        counted = Usage(nowhere, "w")
        count(counted)
        count(counted, "b")
        assert not await counted.flush()
        count(counted)
        await counted.close()
    assert (counted.lost_requests, counted.lost_tokens) == (3, 30)


async def test_a_new_month_begins_a_new_tally(db: Database) -> None:
    counted = Usage(db, "w")
    count(counted, day=date(2026, 1, 31))
    count(counted, day=date(2026, 2, 1), tokens=7)
    count(counted, day=date(2026, 1, 31), tokens=1)  # a straggler
    assert counted.tally("lab", date(2026, 1, 1)) == (0, 0)
    assert counted.tally("lab", date(2026, 2, 1))[1] == 0
    await counted.flush()
    assert counted.tally("lab", date(2026, 2, 1))[1] == 7


# --- shares of GPU-seconds -------------------------------------------------------------------------------


async def a_job(db: Database, name: str, *, started: datetime, **resources: Any) -> Replica:
    """A replica whose job has run since then, as Slurm tells."""
    a_set = await make_set(db, name, slurm=SlurmResources(time_limit_seconds=86400, **resources))
    replica = await make_replica(db, a_set, Phase.RUNNING)
    await observe(db, replica, JobState.RUNNING, started_at=started)
    return replica


async def end(db: Database, replica: Replica, at: datetime, *, started: datetime | None = NOW) -> None:
    """`started`: as Slurm tells at its end; None: it does not tell of the job any more."""
    if started is not None:
        await observe(db, replica, JobState.COMPLETED, started_at=started, ends_at=at)
    for phase in (Phase.DRAINING, Phase.STOPPING, Phase.ENDED):
        replica = await replicas.move(db, to(replica, phase), actor="test", now=at + timedelta(seconds=4))


async def runs(db: Database) -> list[tuple[int, float | None]]:
    """GPUs and seconds of every run, in order of their beginnings."""
    async with db.connection() as connection:
        cursor = await connection.execute(
            "SELECT gpus, extract(epoch FROM ended_at - started_at)::float AS took FROM job_runs ORDER BY started_at"
        )
        return [(row["gpus"], row["took"]) for row in await cursor.fetchall()]


async def test_the_shares_of_tenants_and_what_was_idle_are_the_jobs_gpu_seconds(db: Database) -> None:
    busy = await a_job(db, "busy", started=NOW, nodes=2, gpus_per_node=4)  # 12:00, and over midnight
    idle = await a_job(db, "idle", started=NOW + timedelta(hours=1), gpus_per_node=1)
    counted = Usage(db, "w")
    for tenant, day, tokens in [("a", 0, 3000), ("b", 0, 1000), ("b", 1, 7)]:
        count(counted, tenant, tokens, TODAY + timedelta(days=day), endpoint_id=1, replica=busy.name)
    count(counted, "c", 0, endpoint_id=2, replica=idle.name)  # a request without a token
    count(counted, "a", 500, endpoint_id=3)  # of an endpoint that Slurm does not run
    await counted.flush()
    later = NOW + timedelta(hours=40)  # two days after noon, 04:00
    await end(db, idle, NOW + timedelta(hours=3), started=NOW + timedelta(hours=1))

    report = await usage.report(db, By.TENANT, FIRST, END, later)

    job = 8 * 40 * 3600 + 2 * 3600
    assert report.gpu_seconds == pytest.approx(job)
    shares = {line.name: line.gpu_seconds for line in report.lines}
    assert shares == pytest.approx({"a": 8 * 12 * 3600 * 0.75, "b": 8 * 12 * 3600 * 0.25 + 8 * 24 * 3600, "c": 0})
    assert report.idle_gpu_seconds == pytest.approx(8 * 4 * 3600 + 2 * 3600)
    for by in By:
        grouped = await usage.report(db, by, FIRST, END, later)
        total = sum(line.gpu_seconds for line in grouped.lines) + grouped.idle_gpu_seconds
        assert total == pytest.approx(job, rel=0.01), by


async def test_a_report_is_of_its_days_only(db: Database) -> None:
    busy = await a_job(db, "busy", started=datetime(2025, 12, 31, 22, tzinfo=UTC), gpus_per_node=1)
    counted = Usage(db, "w")
    for day in (date(2025, 12, 31), date(2026, 1, 1), date(2026, 2, 1)):
        count(counted, "a", 10, day, replica=busy.name)
    await counted.flush()
    at = datetime(2026, 2, 3, tzinfo=UTC)
    december = await usage.report(db, By.TENANT, date(2025, 12, 1), FIRST, at)
    assert [(line.requests, line.gpu_seconds) for line in december.lines] == [(1, 7200)]
    january = await usage.report(db, By.DAY, FIRST, END, at)
    assert [(line.name, line.gpu_seconds) for line in january.lines] == [("2026-01-01", 86400)]
    assert (january.gpu_seconds, january.idle_gpu_seconds) == (31 * 86400, 30 * 86400)
    one = await usage.report(db, By.MODEL, FIRST, END, at, tenant="a")
    assert [(line.name, line.requests) for line in one.lines] == [("m", 1)]
    assert (await usage.report(db, By.MODEL, FIRST, END, at, tenant="nobody")).lines == ()


async def test_what_a_job_ran_outlives_its_replica_and_is_as_slurm_told(db: Database) -> None:
    told = await a_job(db, "a", started=NOW, gpus_per_node=2)
    await end(db, told, NOW + timedelta(seconds=90))
    untold = await a_job(db, "b", started=NOW + timedelta(seconds=10), gpus_per_node=1)
    await end(db, untold, NOW + timedelta(seconds=70), started=None)
    without = await a_job(db, "c", started=NOW + timedelta(seconds=20))
    assert await replicas.forget(db, older_than=timedelta(0), now=EVER) == 2
    assert await runs(db) == [(2, 90.0), (1, 64.0), (0, None)]
    assert without.phase is Phase.RUNNING


async def test_a_requeued_job_ran_twice_and_its_wait_is_no_run(db: Database) -> None:
    one = await a_job(db, "a", started=NOW, gpus_per_node=1)
    async with db.connection() as connection:  # 60 s later
        await connection.execute(
            "UPDATE slurm_jobs SET state = 'PENDING', started_at = NULL, observed_at = %s",
            (NOW + timedelta(minutes=1),),
        )
        await connection.execute(
            "UPDATE slurm_jobs SET state = 'RUNNING', started_at = %s, observed_at = %s",
            (NOW + timedelta(minutes=5), NOW + timedelta(minutes=5)),
        )
        assert await runs(db) == [(1, 60.0), (1, None)]
        await connection.execute(  # and again, and nobody saw it wait
            "UPDATE slurm_jobs SET started_at = %s, observed_at = %s",
            (NOW + timedelta(minutes=9), NOW + timedelta(minutes=9)),
        )
    assert await runs(db) == [(1, 60.0), (1, 240.0), (1, None)]
    assert one.phase is Phase.RUNNING


async def test_a_job_that_ran_unseen_is_known_by_what_slurm_tells_at_its_end(db: Database) -> None:
    a_set = await make_set(db, slurm=SlurmResources(time_limit_seconds=60, gpus_per_node=1))
    queued = await make_replica(db, a_set, Phase.QUEUED)
    await observe(db, queued, JobState.PENDING)
    await observe(db, queued, JobState.FAILED, started_at=NOW, ends_at=NOW + timedelta(seconds=3))
    never = await make_replica(db, replace(a_set), Phase.QUEUED)
    await observe(db, never, JobState.CANCELLED, started_at=NOW, ends_at=NOW)
    assert await runs(db) == [(1, 3.0)]
