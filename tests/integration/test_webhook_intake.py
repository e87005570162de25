"""Deliveries that come together: one commit for many, one's fault is nobody else's, and a full room says so."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from dataclasses import replace
from datetime import timedelta

import pytest

from controlplane.db import PULL_CHANNEL, WAKE_CHANNEL, Database, DatabaseError, DatabaseOptions, DbUnavailable, alerts
from controlplane.web.intake import Intake, Overloaded, Parcel
from controlplane.web.payloads import Source, parse
from tests.conftest import eventually
from tests.integration.db_rows import make_set, opened
from tests.integration.webhook_rig import FIXTURES, SIGNED_AT, Rig, fixture, forget_everything, ours

RAW = (FIXTURES / "grafana-firing.raw").read_bytes()


@pytest.fixture
async def rig(shared_url: str) -> AsyncIterator[Rig]:
    async with opened(shared_url) as db:
        await forget_everything(db)
        await make_set(db, model="qwen3-8b")
        yield Rig(db)


def parcel(fingerprint: str, **changes: object) -> Parcel:
    delivery = parse(Source.GRAFANA, RAW)
    told = tuple(replace(one, fingerprint=fingerprint, **changes) for one in delivery.alerts)  # type: ignore[arg-type]
    return Parcel(Source.GRAFANA, replace(delivery, alerts=told), len(RAW), SIGNED_AT)


async def commits(db: Database) -> int:
    async with db.connection() as connection:
        cursor = await connection.execute("SELECT count(DISTINCT xmin::text) FROM alert_deliveries")
        row = await cursor.fetchone()
    assert row is not None
    return int(row["count"])


async def blocked(db: Database) -> bool:
    async with db.connection() as connection:
        cursor = await connection.execute("SELECT FROM pg_locks WHERE NOT granted")
        return await cursor.fetchone() is not None


async def test_deliveries_that_gather_while_one_is_stored_share_one_commit(rig: Rig) -> None:
    async with rig.db.transaction() as blocker:
        await blocker.execute("LOCK TABLE alerts IN EXCLUSIVE MODE")
        first = asyncio.create_task(rig.post(ours(fingerprint="first")))
        await eventually(lambda: blocked(rig.db))
        gathered = [asyncio.create_task(rig.post(ours(fingerprint=f"{n}"))) for n in range(50)]
        await asyncio.sleep(0)
    answers = await asyncio.gather(first, *gathered)
    assert [answer.json()["accepted"] for answer in answers] == [1] * 51
    assert len(await rig.stored()) == 51
    assert await commits(rig.db) < 10


async def test_one_delivery_that_the_database_refuses_harms_no_other_one(rig: Rig) -> None:
    intake = Intake(rig.db, max_waiting=100)
    parcels = [parcel(f"{n}") for n in range(10)]
    parcels[4] = parcel("bad", org_id=2**70)
    outcomes = await asyncio.gather(*(intake.store(one) for one in parcels), return_exceptions=True)
    assert isinstance(outcomes.pop(4), DatabaseError)
    assert all(isinstance(one, alerts.Stored) and one.accepted == 0 for one in outcomes)  # its labels name no owner
    assert set(await rig.stored()) == {f"{n}" for n in range(10) if n != 4}


async def test_who_leaves_before_the_answer_keeps_nobody_else_from_theirs(rig: Rig) -> None:
    intake = Intake(rig.db, max_waiting=100)
    async with rig.db.transaction() as blocker:
        await blocker.execute("LOCK TABLE alerts IN EXCLUSIVE MODE")
        leaves, stays = (asyncio.create_task(intake.store(parcel(name))) for name in ("leaves", "stays"))
        await eventually(lambda: blocked(rig.db))
        leaves.cancel()
    assert (await stays).ignored == {"not_ours": 1}
    with pytest.raises(asyncio.CancelledError):
        await leaves


async def test_a_full_room_refuses_with_a_time_to_come_back_and_keeps_what_it_took(rig: Rig) -> None:
    rig.max_waiting = 5
    async with rig.db.transaction() as blocker:
        await blocker.execute("LOCK TABLE alerts IN EXCLUSIVE MODE")
        first = asyncio.create_task(rig.post(ours(fingerprint="first")))
        await eventually(lambda: blocked(rig.db))
        crowd = [asyncio.create_task(rig.post(ours(fingerprint=f"{n}"))) for n in range(20)]
        refused = [await one for one in asyncio.as_completed(crowd[5:])]
        assert {answer.status_code for answer in refused} == {503}
        assert {answer.headers["Retry-After"] for answer in refused} == {"1"}
        assert not any(one.done() for one in (first, *crowd[:5]))
    assert [(await one).status_code for one in (first, *crowd[:5])] == [202] * 6
    assert set(await rig.stored()) == {"first", *(f"{n}" for n in range(5))}
    assert rig.counted("overloaded") == 15
    assert (await rig.post(ours(fingerprint="later"))).status_code == 202


async def test_bytes_fill_the_room_as_well(rig: Rig) -> None:
    intake = Intake(rig.db, max_waiting=100)
    with pytest.raises(Overloaded):
        await intake.store(replace(parcel("f"), size_bytes=2**40))


async def test_while_postgresql_is_away_everybody_is_told_and_nobody_waits_for_ever(free_port: int) -> None:
    options = DatabaseOptions(url=f"postgresql://user@127.0.0.1:{free_port}/x", timeout_seconds=0.2)
    async with Database(options) as db:
        rig = Rig(db)
        answers = await asyncio.gather(*(rig.post(ours(fingerprint=f"{n}")) for n in range(20)))
        assert {answer.status_code for answer in answers} == {503}
        assert all(answer.headers["Retry-After"] for answer in answers)


@pytest.mark.parametrize(
    ("body", "channels"),
    [
        (ours(), {WAKE_CHANNEL}),
        (fixture("grafana-truncated-max-alerts-1"), {WAKE_CHANNEL, PULL_CHANNEL}),
    ],
)
async def test_only_a_delivery_that_was_cut_short_wakes_the_pull(rig: Rig, body: object, channels: set[str]) -> None:
    heard = rig.db.listen(WAKE_CHANNEL, PULL_CHANNEL, "end")
    assert await anext(heard) == ""
    await rig.post(body)
    async with rig.db.connection() as connection:
        await connection.execute('NOTIFY "end"')
    found = set()
    while (channel := await asyncio.wait_for(anext(heard), 10)) != "end":
        found.add(channel)
    await heard.aclose()  # type: ignore[attr-defined]
    assert found == channels


async def test_after_deliveries_were_refused_the_next_one_asks_for_a_pull(rig: Rig) -> None:
    heard = rig.db.listen(PULL_CHANNEL)
    assert await anext(heard) == ""
    intake = Intake(rig.db, max_waiting=1)
    async with rig.db.transaction() as blocker:
        await blocker.execute("LOCK TABLE alerts IN EXCLUSIVE MODE")
        first = asyncio.create_task(intake.store(parcel("first")))
        await eventually(lambda: blocked(rig.db))
        second = asyncio.create_task(intake.store(parcel("second")))
        await asyncio.sleep(0)
        with pytest.raises(Overloaded):
            await intake.store(parcel("third"))
    await asyncio.gather(first, second)
    assert await asyncio.wait_for(anext(heard), 10) == PULL_CHANNEL
    await heard.aclose()  # type: ignore[attr-defined]


async def test_a_repeat_that_tells_nothing_new_wakes_nobody(rig: Rig) -> None:
    await rig.post(ours())
    heard = rig.db.listen(WAKE_CHANNEL, "end")
    assert await anext(heard) == ""
    rig.now += timedelta(minutes=1)
    await rig.post(ours("grafana-repeated"))
    async with rig.db.connection() as connection:
        await connection.execute('NOTIFY "end"')
    assert await asyncio.wait_for(anext(heard), 10) == "end"
    await heard.aclose()  # type: ignore[attr-defined]
    assert (await rig.stored())["f67ccfbef6174272"].refreshed_at == rig.now


# --- two Grafanas ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
async def test_the_words_of_two_grafanas_in_any_order_a_hundred_times_at_once_are_one_level(
    rig: Rig, seed: int
) -> None:
    """Each evaluates the rule by itself: one begins and ends the episode a little later than the other."""

    def told(name: str, **times: str) -> dict[str, object]:
        body = ours(name)
        body["alerts"] = [{**alert, **times} for alert in body["alerts"]]
        return body

    words = [
        told("grafana-firing", startsAt="2026-11-22T09:51:20Z"),
        told("grafana-firing", startsAt="2026-11-22T09:51:23Z"),
        told("grafana-resolved", startsAt="2026-11-22T09:51:20Z", endsAt="2026-11-22T09:58:00Z"),
        told("grafana-resolved", startsAt="2026-11-22T09:51:23Z", endsAt="2026-11-22T09:58:02Z"),
    ]
    order = words * 25
    random.Random(seed).shuffle(order)
    answers = await asyncio.gather(*(rig.post(body) for body in order))
    assert sum(answer.json()["accepted"] for answer in answers) == 4
    assert sum(answer.json()["duplicates"] for answer in answers) == 96
    [level] = (await rig.stored()).values()
    assert not level.is_firing
    assert str(level.ends_at) == "2026-11-22 09:58:02+00:00"


async def test_a_resolved_of_the_grafana_that_began_earlier_ends_the_level_of_the_other(rig: Rig) -> None:
    """The peers tell each other what was sent: of each word only one of the two arrives."""
    later, ended = ours("grafana-firing"), ours("grafana-resolved")
    later["alerts"][0]["startsAt"] = "2026-11-22T09:51:23Z"
    for order in ([later, ended], [ended, later]):
        await forget_everything(rig.db)
        for body in order:
            await rig.post(body)
        [level] = (await rig.stored()).values()
        assert not level.is_firing


async def test_who_waits_is_told_when_the_writer_ends(rig: Rig) -> None:
    intake = Intake(rig.db, max_waiting=100)
    async with rig.db.transaction() as blocker:
        await blocker.execute("LOCK TABLE alerts IN EXCLUSIVE MODE")
        first = asyncio.create_task(intake.store(parcel("first")))
        await eventually(lambda: blocked(rig.db))
        second = asyncio.create_task(intake.store(parcel("second")))
        await asyncio.sleep(0)
        [writer] = [task for task in asyncio.all_tasks() if task.get_name() == "intake"]
        writer.cancel()
        for told in await asyncio.gather(first, second, return_exceptions=True):
            assert isinstance(told, DbUnavailable)
    assert (await intake.store(parcel("third"))).ignored == {"not_ours": 1}
