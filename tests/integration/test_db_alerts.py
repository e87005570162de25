"""Alerts as levels in a real PostgreSQL: what arrives is ordered by its own times, never by its arrival."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from datetime import datetime, timedelta
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from controlplane.core.scaling import pressures
from controlplane.core.types import Alert, AlertAction
from controlplane.db import Database, Duplicate, alerts
from controlplane.demo.postgres import PrivatePostgres
from tests.conftest import eventually
from tests.integration.db_rows import NOW, make_set, opened


@pytest.fixture
async def db(database_url: str) -> AsyncIterator[Database]:
    async with opened(database_url) as opened_db:
        yield opened_db


def after(minutes: float) -> datetime:
    return NOW + timedelta(minutes=minutes)


def told(starts: float = 0, ends: float | None = None, **changes: Any) -> Alert:
    alert = Alert(
        source="grafana",
        org_id=1,
        fingerprint="f",
        alertname="queue",
        is_firing=ends is None,
        starts_at=after(starts),
        ends_at=None if ends is None else after(ends),
        refreshed_at=NOW,
        action=AlertAction.SCALE_UP,
    )
    return replace(alert, **changes)


async def store(db: Database, *arrived: Alert, now: datetime = NOW) -> alerts.Stored:
    return await alerts.store(db, [(replace(one, refreshed_at=now), {"a": 1}) for one in arrived], now=now)


async def stored(db: Database) -> dict[str, Alert]:
    return {one.key: one for one in await alerts.load_since(db, after(-(10**6)))}


async def level(db: Database) -> tuple[bool, datetime, datetime | None] | None:
    one = (await stored(db)).get("grafana/1/f")
    return None if one is None else (one.is_firing, one.starts_at, one.ends_at)


async def test_new_known_and_ignored_alerts_are_counted_apart(db: Database) -> None:
    ignored = told(fingerprint="g", action=None, ignored_reason="not_ours")
    assert await store(db, told(), ignored) == alerts.Stored(1, 0, {"not_ours": 1})
    assert await store(db, told(), ignored) == alerts.Stored(0, 2, {})
    assert await store(db, told(0, 5), told(7)) == alerts.Stored(2, 0, {})


async def test_the_same_fingerprint_of_another_source_or_organization_is_another_alert(db: Database) -> None:
    await store(db, told(), told(org_id=2), told(source="alertmanager", org_id=0))
    assert sorted(await stored(db)) == ["alertmanager/0/f", "grafana/1/f", "grafana/2/f"]


async def test_a_late_word_of_what_is_over_changes_nothing(db: Database) -> None:
    await store(db, told(0, 5), now=after(6))
    await store(db, told(0), now=after(7))
    assert await level(db) == (False, after(0), after(5))
    await store(db, told(8), now=after(8))
    await store(db, told(0, 5), now=after(9))
    assert await level(db) == (True, after(8), None)


async def test_a_repeated_word_refreshes_what_was_said_and_never_sets_the_clock_back(db: Database) -> None:
    await store(db, told(annotations={"summary": "3 waiting"}), now=after(3))
    await store(db, told(annotations={"summary": "9 waiting"}), now=after(2))
    (alert,) = (await stored(db)).values()
    assert (alert.refreshed_at, alert.annotations) == (after(3), {"summary": "9 waiting"})


async def test_an_end_in_blindness_does_not_hide_that_more_was_wanted_until_then(db: Database) -> None:
    """A paused rule or a vanished series ends the pressure; the window before anything shrinks begins there."""
    await store(db, told(0, annotations={}))
    blind = told(0, 5, action=None, ignored_reason="state_reason", annotations={"grafana_state_reason": "Paused"})
    await store(db, blind, now=after(5))
    await store(db, blind, now=after(5))
    [alert] = (await stored(db)).values()
    assert (alert.is_firing, alert.action, alert.ignored_reason) == (False, AlertAction.SCALE_UP, None)
    replica_set = await make_set(db, "a", model="m")
    named = replace(alert, labels={"model": "m"})
    pressure = pressures([replica_set], [named], now=after(6), stale_after=timedelta(hours=1))["a"]
    assert (pressure.up, pressure.last_up_at) == ((), after(5))


_EPISODES = [(0, None), (0, 4), (5, None), (5, 6), (5, 7), (9, None)]
"""One alert's life: fires, ends, fires again, ends (told twice, with two ends), fires."""


@pytest.fixture(scope="session")
def examples_url(postgres: PrivatePostgres, template_database: str) -> str:
    """One database for all examples: hypothesis does not run fixtures anew for each."""
    return postgres.create_database("permutations", template=template_database)


@settings(max_examples=60, deadline=None, database=None)
@given(data=st.data())
def test_any_order_and_any_repetition_of_the_same_words_ends_in_the_same_level(
    data: st.DataObject, examples_url: str
) -> None:
    words = data.draw(st.lists(st.sampled_from(_EPISODES), min_size=1, max_size=6, unique=True))
    shuffled = data.draw(st.permutations(words + data.draw(st.lists(st.sampled_from(words), max_size=6))))

    async def end_of(order: Sequence[tuple[int, int | None]]) -> object:
        async with opened(examples_url) as db:
            async with db.connection() as connection:
                await connection.execute("TRUNCATE alerts, alert_deliveries")
            for minute, (starts, ends) in enumerate(order):
                await store(db, told(starts, ends), now=after(minute))
            return await level(db)

    in_order = sorted(words, key=lambda word: (word[0], -1 if word[1] is None else word[1]))
    starts, ends = in_order[-1]
    expected = (ends is None, after(starts), None if ends is None else after(ends))
    assert asyncio.run(end_of(shuffled)) == expected


async def test_two_deliveries_of_one_group_in_opposite_order_do_not_block_each_other(db: Database) -> None:
    group = [told(fingerprint=f"{i}") for i in range(40)]
    results = await asyncio.gather(*(store(db, *(group if i % 2 else reversed(group))) for i in range(8)))
    assert sum(one.accepted for one in results) == 40
    assert sum(one.duplicates for one in results) == 280


async def test_a_delivery_wakes_the_reconciler(db: Database) -> None:
    heard = db.listen("controlplane_wake")
    assert await anext(heard) == ""
    await store(db, told())
    assert await asyncio.wait_for(anext(heard), 10) == "controlplane_wake"
    await heard.aclose()  # type: ignore[attr-defined]


async def test_a_signature_is_good_once_until_it_has_expired(db: Database) -> None:
    async def deliver(now: datetime) -> None:
        await alerts.store(db, [(told(), {})], now=now, signature=(b"s", after(5)))

    await deliver(NOW)
    async with db.connection() as connection:
        await connection.execute("TRUNCATE alerts")
    with pytest.raises(Duplicate):
        await deliver(after(4))
    assert await stored(db) == {}
    await deliver(after(6))


async def test_a_pull_heals_a_lost_firing_and_a_lost_resolved(db: Database) -> None:
    await store(db, told(), now=after(0))
    other = told(2, fingerprint="lost", refreshed_at=after(3))
    assert await alerts.refresh(db, "grafana", 1, [other], now=after(3)) == 2
    assert await level(db) == (False, after(0), after(3))
    assert (await stored(db))["grafana/1/lost"].is_firing
    assert await alerts.refresh(db, "grafana", 1, [replace(other, refreshed_at=after(4))], now=after(4)) == 0
    assert (await stored(db))["grafana/1/lost"].refreshed_at == after(4)


async def test_a_pull_of_one_organization_says_nothing_of_another(db: Database) -> None:
    await store(db, told(org_id=2), now=after(0))
    assert await alerts.refresh(db, "grafana", 1, [], now=after(3)) == 0
    assert (await stored(db))["grafana/2/f"].is_firing


async def test_a_pull_that_began_before_a_delivery_does_not_deny_it(db: Database) -> None:
    await store(db, told(1), now=after(1))
    await alerts.refresh(db, "grafana", 1, [], now=after(0.5))
    assert await level(db) == (True, after(1), None)
    await store(db, told(1, 2), now=after(2))
    await alerts.refresh(db, "grafana", 1, [told(1, refreshed_at=after(1.5))], now=after(1.5))
    assert await level(db) == (False, after(1), after(2))


async def test_what_a_later_pull_still_shows_fires_again_although_an_earlier_one_missed_it(db: Database) -> None:
    await store(db, told(), now=after(0))
    await alerts.refresh(db, "grafana", 1, [], now=after(1))
    assert await level(db) == (False, after(0), after(1))
    await alerts.refresh(db, "grafana", 1, [told(refreshed_at=after(2))], now=after(2))
    assert await level(db) == (True, after(0), None)


async def test_a_pull_of_one_source_says_nothing_of_another(db: Database) -> None:
    await store(db, told(source="alertmanager", org_id=0))
    await alerts.refresh(db, "grafana", 1, [], now=after(1))
    assert (await stored(db))["alertmanager/0/f"].is_firing


async def test_only_what_nobody_confirmed_for_long_is_forgotten(db: Database) -> None:
    await store(db, told(fingerprint="old"), now=after(0))
    await store(db, told(fingerprint="new"), now=after(60))
    assert await alerts.forget(db, older_than=timedelta(minutes=30), now=after(61)) == 1
    assert list(await stored(db)) == ["grafana/1/new"]


async def test_a_pull_waits_for_a_delivery_instead_of_locking_against_it(db: Database) -> None:
    await store(db, told(fingerprint="a"), told(fingerprint="b"))
    touch = "UPDATE alerts SET alertname = 'delivered' WHERE fingerprint = %s"
    async with db.transaction() as delivery:
        await delivery.execute(touch, ("b",))
        pull = asyncio.create_task(alerts.refresh(db, "grafana", 1, [], now=after(1)))
        await eventually(lambda: is_waiting(db))
        await delivery.execute(touch, ("a",))
    assert await pull == 2


async def is_waiting(db: Database) -> bool:
    """Does anybody wait for another's lock?"""
    async with db.connection() as connection:
        cursor = await connection.execute("SELECT FROM pg_stat_activity WHERE wait_event_type = 'Lock'")
        return cursor.rowcount > 0
