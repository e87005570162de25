"""Several workers keep one tenant's limits, through a real PostgreSQL, within the stated error."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from datetime import date
from typing import Any

import pytest
from loguru import logger

from controlplane.clock import utc_now
from controlplane.core.types import TenantLimits
from controlplane.db import WORKERS_CHANNEL, Database, DatabaseOptions, keys, tenants, usage
from controlplane.proxy.directory import Directory
from controlplane.proxy.errors import ApiError
from controlplane.proxy.limits import Grant, Limits
from controlplane.proxy.usage import Usage
from tests.conftest import eventually
from tests.integration.db_rows import opened
from tests.integration.test_proxy_directory import laid_wire

WORKERS = 3


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Worker:
    """One proxy process: its limits and its usage."""

    def __init__(self, db: Database, name: str, clock: Clock) -> None:
        self.clock = clock
        self.usage = Usage(db, name)
        self.limits = Limits(db, name, tally=self.usage.tally, clock=clock)

    def follow(self, **limits: Any) -> None:
        self.limits.follow({"lab": TenantLimits(**limits)}, self.clock())

    def admit(self, tokens: int = 0) -> Grant | None:
        try:
            return self.limits.admit("lab", 0, tokens, self.clock())
        except ApiError:
            return None

    def end(self, grant: Grant, tokens: int) -> None:
        self.usage.record("lab", "m", 1, None, tokens, 0, 0, False, utc_now().date())
        grant.settle(tokens)


@pytest.fixture
async def db(database_url: str) -> AsyncIterator[Database]:
    async with opened(database_url) as opened_db:
        yield opened_db


@pytest.fixture
def clock() -> Clock:
    return Clock()


async def a_group(db: Database, clock: Clock, number: int = WORKERS, **limits: Any) -> list[Worker]:
    """Workers that know of each other, for some time."""
    workers = [Worker(db, f"w{number}", clock) for number in range(number)]
    for worker in workers:
        worker.follow(**limits)
    for _ in range(2):
        for worker in workers:
            assert await worker.limits.exchange()
    assert [worker.limits.workers for worker in workers] == [number] * number
    return workers


async def exchange(*workers: Worker) -> None:
    for worker in workers:
        assert await worker.limits.exchange()


async def parts(db: Database) -> int:
    """Rows that tell of a tenant."""
    async with db.connection() as connection:
        row = await (await connection.execute("SELECT count(*) AS rows FROM limit_parts")).fetchone()
    assert row is not None
    return int(row["rows"])


@pytest.mark.parametrize("limit", [1, 2, 10, 50])
async def test_100_requests_at_once_over_three_workers_exceed_no_limit_by_more_than_two(
    db: Database, clock: Clock, limit: int
) -> None:
    workers = await a_group(db, clock, requests_per_minute=limit)
    admitted = 0
    for number in range(100):
        admitted += workers[number % WORKERS].admit() is not None
    assert limit <= admitted <= limit + WORKERS - 1
    for _ in range(3):
        await exchange(*workers)
        admitted += sum(worker.admit() is not None for worker in workers)
    assert admitted <= limit + WORKERS - 1


async def test_one_worker_alone_may_use_what_the_others_do_not(db: Database, clock: Clock) -> None:
    one, *others = await a_group(db, clock, requests_per_minute=60)
    admitted = 0
    by_round = []
    for _ in range(30):
        while one.admit() is not None:
            admitted += 1
        by_round.append(admitted)
        await exchange(*others, one)
    assert by_round[6] >= 54  # nine tenths of it, in three seconds
    assert 60 <= admitted <= 62
    assert one.admit() is None


async def test_what_slides_out_may_be_used_by_any_worker(db: Database, clock: Clock) -> None:
    one, two, three = await a_group(db, clock, requests_per_minute=3)
    assert sum(worker.admit() is not None for worker in (one, one, one, two, two, three)) == 3
    await exchange(one, two, three)
    await exchange(one, two, three)
    assert (one.admit(), two.admit(), three.admit()) == (None, None, None)
    clock.now += 120
    await exchange(one, two, three)
    assert two.admit() is not None


@pytest.mark.parametrize("limit", [1, 7])
async def test_concurrent_requests_are_those_of_all_workers(db: Database, clock: Clock, limit: int) -> None:
    workers = await a_group(db, clock, max_concurrent=limit)
    under_way: list[tuple[Worker, Grant]] = []
    for _ in range(20):
        under_way += [(worker, grant) for worker in workers if (grant := worker.admit()) is not None]
        await exchange(*workers)
        assert len(under_way) <= limit + WORKERS - 1
    assert len(under_way) >= limit
    for worker, grant in under_way:
        worker.end(grant, 0)
    await exchange(*workers)
    await exchange(*workers)
    assert workers[1].admit() is not None


@pytest.mark.parametrize("settled", [False, True])
async def test_100_at_the_edge_of_the_budget_exceed_it_by_no_more_than_one_request_per_worker(
    db: Database, clock: Clock, settled: bool
) -> None:
    """100 requests of 100 tokens each, where 1,000 tokens of the month's budget are left."""
    month = utc_now().date().replace(day=1)
    await usage.store(db, "before", 1, [usage.Row(month, "lab", "m", 1, None, 1, 0, 999_000, 0, 0)])
    workers = await a_group(db, clock, monthly_tokens=1_000_000)

    async def ask(number: int) -> int:
        worker = workers[number % WORKERS]
        await asyncio.sleep(number % 7 * 0.002)
        grant = worker.admit(100)
        if grant is None:
            return 0
        if settled:
            worker.end(grant, 100)
        if number % 5 == 0:
            await worker.usage.flush()
        if number % 3 == 0:
            await worker.limits.exchange()
        return 100

    used = sum(await asyncio.gather(*(ask(number) for number in range(100))))
    assert used >= 800  # and next to nothing is kept back while others hold their parts
    for _ in range(5):
        await exchange(*workers)
        for worker in workers:
            if (grant := worker.admit(100)) is not None:
                used += 100
                worker.end(grant, 100)
    assert 1000 <= used <= 1000 + WORKERS * 100
    assert all(worker.admit() is None for worker in workers)


async def test_a_budget_outlives_the_workers_that_used_it(db: Database, clock: Clock) -> None:
    [one] = await a_group(db, clock, 1, monthly_tokens=500)
    grant = one.admit(100)
    assert grant is not None
    one.end(grant, 500)
    assert one.admit() is None
    await one.usage.flush()
    assert one.admit() is None
    await one.limits.exchange()
    assert one.admit() is None
    await one.limits.close()
    [two] = await a_group(db, clock, 1, monthly_tokens=501)
    assert two.admit() is not None
    two.follow(monthly_tokens=500)
    await two.limits.exchange()
    assert two.admit() is None


async def test_nothing_is_told_of_a_tenant_that_nobody_uses(db: Database, clock: Clock) -> None:
    workers = await a_group(db, clock, requests_per_minute=60)
    assert await parts(db) == 0
    assert workers[0].admit() is not None
    await exchange(*workers)
    assert await parts(db) == WORKERS  # who used nothing gives up what it need not have
    clock.now += 180
    grant = workers[0].limits.admit("lab", 0, 0, clock())
    assert grant is not None
    grant.settle(0)
    clock.now += 180
    await exchange(*workers)
    await exchange(*workers)
    assert await parts(db) == 0


async def test_a_lone_worker_tells_nobody(db: Database, clock: Clock) -> None:
    [one] = await a_group(db, clock, 1, requests_per_minute=2)
    assert one.admit() is not None
    assert one.admit() is not None
    assert one.admit() is None
    await exchange(one)
    assert await parts(db) == 0


async def test_a_worker_that_ends_leaves_its_part_to_the_others(db: Database, clock: Clock) -> None:
    one, two = await a_group(db, clock, 2, max_concurrent=10)
    assert [two.admit() is not None for _ in range(6)].count(True) == 5
    await exchange(two, one)
    await two.limits.close()
    await exchange(one)
    assert one.limits.workers == 1
    assert [one.admit() is not None for _ in range(11)].count(True) == 10


async def test_while_the_database_is_away_each_worker_keeps_to_its_part(
    database_url: str, db: Database, clock: Clock
) -> None:
    lines: list[str] = []
    sink = logger.add(lambda message: lines.append(message.record["message"]), level="INFO")
    async with laid_wire(database_url) as wire, Database(DatabaseOptions(wire.url, timeout_seconds=0.3)) as cut_off:
        one, two, three = await a_group(cut_off, clock, requests_per_minute=30)
        assert two.admit() is not None
        await wire.cut()
        for worker in (one, two, three, one):
            assert not await worker.limits.exchange()
        clock.now += 10
        counts = [sum(worker.admit() is not None for _ in range(40)) for worker in (one, two, three)]
        assert counts == [10, 9, 10]
        clock.now += 120
        assert one.admit() is not None
        await wire.lay()

        async def is_back() -> bool:
            return await one.limits.exchange()

        assert await eventually(is_back)
    logger.remove(sink)
    assert lines.count("limits are not shared; each worker keeps to its part of them") == 3
    assert lines.count("limits are shared again") == 1


async def test_run_exchanges_by_itself_and_sooner_when_a_part_is_used_up(db: Database) -> None:
    async with AsyncExitStack() as stack:
        workers = []
        for number in range(2):
            counted = Usage(db, f"w{number}")
            limits = Limits(db, f"w{number}", tally=counted.tally)
            task = asyncio.create_task(limits.run())
            stack.callback(task.cancel)
            workers.append(limits)
        one, two = workers
        await eventually(lambda: one.workers == two.workers == 2)
        now = asyncio.get_running_loop().time()
        for limits in workers:
            limits.follow({"lab": TenantLimits(requests_per_minute=40)}, now)
        admitted = 0

        def all_admitted() -> bool:
            nonlocal admitted
            while True:
                try:
                    one.admit("lab", 0, 0, now)
                except ApiError:
                    return admitted >= 40
                admitted += 1

        await eventually(all_admitted, timeout_seconds=8)
        assert admitted <= 41


# --- how workers hear of it --------------------------------------------------------------------------------


async def test_a_worker_that_is_alone_hears_at_once_of_one_that_joins(db: Database) -> None:
    one, two = (Limits(db, name, tally=Usage(db, name).tally) for name in ("w0", "w1"))
    directory = Directory(db, refresh_seconds=60.0, on_read=lambda _: None, on_worker=one.worker_joined)
    async with AsyncExitStack() as stack:
        for duty in (one.run, directory.run):
            stack.callback(asyncio.create_task(duty()).cancel)
        await eventually(lambda: directory.snapshot is not None)
        assert await one.exchange()
        assert one.workers == 1
        assert await two.exchange()
        await eventually(lambda: one.workers == 2, timeout_seconds=1)


async def test_a_worker_that_was_forgotten_while_it_was_alone_says_that_it_has_joined(db: Database) -> None:
    one, two = (Limits(db, name, tally=Usage(db, name).tally) for name in ("w0", "w1"))
    assert await one.exchange()
    async with db.connection() as connection:
        await connection.execute("DELETE FROM proxy_workers")
    assert await two.exchange()
    assert (one.workers, two.workers) == (1, 1)
    async with asyncio.timeout(10):
        async for channel in db.listen(WORKERS_CHANNEL):
            if channel == WORKERS_CHANNEL:
                break
            assert await one.exchange()
    assert one.workers == 2


async def test_new_limits_and_revoked_keys_reach_every_directory_within_a_second(db: Database) -> None:
    key, _ = await keys.create(db, "lab", models=None, expires_at=None, actor="test", now=utc_now())
    directory = Directory(db, refresh_seconds=60.0, on_read=lambda _: None)
    running = asyncio.create_task(directory.run())
    try:

        def snapshot() -> Any:
            assert directory.snapshot is not None
            return directory.snapshot

        await eventually(lambda: snapshot().tenants == {"lab": TenantLimits()})
        await tenants.set_limits(db, "lab", {"requests_per_minute": 5, "weight": 2}, actor="ann", now=utc_now())
        heard = TenantLimits(requests_per_minute=5, weight=2)
        await eventually(lambda: snapshot().tenants == {"lab": heard}, timeout_seconds=1)
        await keys.revoke(db, key, utc_now(), actor="ann")
        await eventually(lambda: snapshot().keys == {}, timeout_seconds=1)
    finally:
        running.cancel()


async def test_the_month_of_the_budget_is_utcs(db: Database, clock: Clock) -> None:
    last_month = date(2000, 1, 1)
    await usage.store(db, "before", 1, [usage.Row(last_month, "lab", "m", 1, None, 1, 0, 10_000, 0, 0)])
    [one] = await a_group(db, clock, 1, monthly_tokens=1)
    assert one.admit(1) is not None
