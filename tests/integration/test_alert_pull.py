"""Pulling active alerts: what it heals, and what an odd, empty or missing answer must not do."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from datetime import timedelta
from typing import Any

import httpx
import pytest
from loguru import logger
from prometheus_client import CollectorRegistry

from controlplane.core.types import Alert, AlertAction
from controlplane.db import PULL_CHANNEL, Database, alerts
from controlplane.metrics import ControlPlaneMetrics
from controlplane.reconcile.alerts import AlertPullLoop, AlertPullOptions, AlertSource, UnreadableAlerts
from controlplane.reconcile.loop import Runner, RunnerOptions
from controlplane.reconcile.staleness import StalenessLoop, StalenessOptions
from tests.conftest import eventually
from tests.integration.db_rows import NOW, make_set, opened
from tests.integration.web_rig import WebRig

LATER = NOW + timedelta(minutes=1)
ACTIVE: dict[str, Any] = {
    "status": {"state": "active"},
    "fingerprint": "pulled",
    "startsAt": "2026-01-01T12:00:00Z",
    "labels": {"alertname": "queue"},
    "annotations": {},
}
OURS = {"alertname": "queue", "owner": "controlplane", "action": "scale_up", "model": "m"}


@pytest.fixture
async def db(database_url: str) -> AsyncIterator[Database]:
    async with opened(database_url) as opened_db:
        yield opened_db


async def pull(db: Database, bodies: dict[str, str]) -> None:
    """One round over sources that answer with these bodies, by host, each of an organization of its own."""

    def answer(request: httpx.Request) -> httpx.Response:
        return httpx.Response(200, text=bodies[request.url.host])

    sources = [AlertSource("grafana", f"http://{host}", org_id=org_id) for org_id, host in enumerate(bodies)]
    async with httpx.AsyncClient(transport=httpx.MockTransport(answer)) as http:
        await AlertPullLoop(db, AlertPullOptions(sources), http).run_once(LATER)


def firing(fingerprint: str = "pulled", *, at: float = 0, **changes: Any) -> Alert:
    whole: dict[str, Any] = {"labels": OURS, "action": AlertAction.SCALE_UP} | changes
    when = NOW + timedelta(seconds=at)
    return Alert("grafana", 0, fingerprint, "queue", True, when, None, when, **whole)


async def deliver(db: Database, *told: Alert) -> None:
    await alerts.store(db, [(one, {}) for one in told], now=told[0].refreshed_at)


async def fires(db: Database) -> set[str]:
    return {one.fingerprint for one in await alerts.load_since(db, NOW - timedelta(days=1)) if one.is_firing}


class Source:
    """A source that answers with what it is made to know, until it is made to answer otherwise."""

    def __init__(self, db: Database) -> None:
        self.listed: list[dict[str, Any]] = []
        self.status = 200
        self.rounds = 0
        self._http = httpx.AsyncClient(transport=httpx.MockTransport(self._answer))
        sources = [AlertSource("grafana", "http://grafana")]
        self.loop = AlertPullLoop(db, AlertPullOptions(sources, interval_seconds=3600), self._http)

    async def close(self) -> None:
        await self._http.aclose()

    def knows(self, *fingerprints: str, state: str = "active") -> None:
        self.listed = [
            {**ACTIVE, "fingerprint": one, "labels": OURS, "status": {"state": state}} for one in fingerprints
        ]

    async def pulled(self, at: float) -> None:
        await self.loop.run_once(NOW + timedelta(seconds=at))

    def _answer(self, request: httpx.Request) -> httpx.Response:
        assert request.url.path == "/api/alertmanager/grafana/api/v2/alerts"
        self.rounds += 1
        return httpx.Response(self.status, text=json.dumps(self.listed))


@pytest.fixture
async def source(db: Database) -> AsyncIterator[Source]:
    await make_set(db)
    made = Source(db)
    yield made
    await made.close()


# --- what it heals --------------------------------------------------------------------------------------------


async def test_a_firing_that_was_lost_presses_after_a_pull_with_its_values(db: Database, source: Source) -> None:
    source.listed = [{**ACTIVE, "labels": OURS, "annotations": {"__values__": '{"A": 30, "B": null}', "summary": "30"}}]
    await source.pulled(at=1)
    [alert] = await alerts.load_since(db, NOW)
    assert (alert.is_firing, alert.action) == (True, AlertAction.SCALE_UP)
    assert (alert.values, alert.annotations) == ({"A": 30}, {"summary": "30"})


@pytest.mark.parametrize("text", ["", "x", "[]", "3", "[" * 100_000, '{"A": "1", "B": true, "C": NaN}'])
async def test_values_that_cannot_be_read_are_left_out(db: Database, source: Source, text: str) -> None:
    source.listed = [{**ACTIVE, "annotations": {"__values__": text}}]
    await source.pulled(at=1)
    assert [one.values for one in await alerts.load_since(db, NOW)] == [{}]


async def test_a_resolved_that_was_lost_ends_the_alert_once_every_list_lacked_it_for_a_while(
    db: Database, source: Source
) -> None:
    """Also a rule that was paused or deleted while nobody was told."""
    await deliver(db, firing("gone"), firing("stays"))
    source.knows("stays")
    for at in (15, 30, 60, 100):
        await source.pulled(at)
        assert await fires(db) == {"gone", "stays"}
    await source.pulled(at=105)
    assert await fires(db) == {"stays"}


async def test_a_source_that_restarted_and_lists_nothing_for_a_minute_resolves_nothing(
    db: Database, source: Source
) -> None:
    await deliver(db, firing())
    source.knows("pulled")
    await source.pulled(at=15)
    source.status = 503
    for at in range(30, 600, 15):
        with pytest.raises(UnreadableAlerts):
            await source.pulled(at)
    source.status = 200
    source.knows()
    for at in range(600, 660, 15):
        await source.pulled(at)
    assert await fires(db) == {"pulled"}
    source.knows("pulled")
    await source.pulled(at=675)
    source.knows()
    for at in range(690, 780, 15):  # missing anew: the time begins anew
        await source.pulled(at)
        assert await fires(db) == {"pulled"}
    await source.pulled(at=780)
    assert await fires(db) == set()


async def test_a_delivery_that_says_it_fires_begins_the_absence_anew(db: Database, source: Source) -> None:
    await deliver(db, firing())
    await source.pulled(at=15)
    await deliver(db, firing(at=60))
    await source.pulled(at=106)
    assert await fires(db) == {"pulled"}
    await source.pulled(at=196)
    assert await fires(db) == set()


async def test_what_is_silenced_ends_at_once_and_what_is_not_decided_yet_stays(db: Database, source: Source) -> None:
    await deliver(db, firing("silenced"), firing("undecided"))
    source.knows("silenced", state="suppressed")
    source.listed += [{**ACTIVE, "fingerprint": "undecided", "status": {"state": "unprocessed"}}]
    source.listed += [{**ACTIVE, "fingerprint": "new", "status": {"state": "unprocessed"}}]
    await source.pulled(at=15)
    assert await fires(db) == {"undecided"}
    await source.pulled(at=1000)
    assert await fires(db) == {"undecided"}


async def test_a_pull_shows_that_an_alert_fires_still_whatever_a_peer_has_told(db: Database, source: Source) -> None:
    """One Grafana of two says that its own episode is over, which began later; the one that is asked knows better."""
    ended = Alert("grafana", 0, "pulled", "queue", False, NOW + timedelta(seconds=3), NOW + timedelta(seconds=30), NOW)
    await alerts.store(db, [(Alert(**{**_fields(ended), "ignored_reason": "not_ours"}), {})], now=NOW)
    source.knows("pulled")
    await source.pulled(at=60)
    assert await fires(db) == {"pulled"}


def _fields(alert: Alert) -> dict[str, Any]:
    return {name: getattr(alert, name) for name in alert.__slots__}


async def test_a_pull_changes_what_is_thought_of_an_alert_when_a_replica_set_appears(
    db: Database, source: Source
) -> None:
    source.listed = [{**ACTIVE, "labels": {**OURS, "model": "tomorrow"}}]
    await source.pulled(at=1)
    assert [one.ignored_reason for one in await alerts.load_since(db, NOW)] == ["unknown_model"]
    await make_set(db, "b", model="tomorrow")
    await source.pulled(at=2)
    assert [one.action for one in await alerts.load_since(db, NOW)] == [AlertAction.SCALE_UP]


async def test_a_pull_is_woken_by_its_own_channel_and_not_by_every_delivery(db: Database, source: Source) -> None:
    options = RunnerOptions("here", channels={"alerts": PULL_CHANNEL})
    runner = Runner(db, [source.loop], options, ControlPlaneMetrics(CollectorRegistry()), lambda: LATER)
    running = asyncio.create_task(runner.run())
    try:
        await eventually(lambda: source.rounds)
        await eventually(lambda: listens(db))
        settled = source.rounds
        await deliver(db, firing("news"))
        await alerts.store_all(db, [], wants_pull=True)
        await eventually(lambda: source.rounds > settled)
        assert source.rounds <= settled + 2  # one more, if the first listening came late
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)


async def listens(db: Database) -> bool:
    async with db.connection() as connection:
        cursor = await connection.execute("SELECT FROM pg_stat_activity WHERE query LIKE 'LISTEN%'")
        return cursor.rowcount > 0


# --- what it must not do --------------------------------------------------------------------------------------


@pytest.mark.parametrize("body", ["{}", '""', "null", "<html>", "[" * 100_000, '[{"status": {}}]'])
async def test_an_answer_that_is_no_list_of_alerts_resolves_nothing(db: Database, body: str) -> None:
    await deliver(db, Alert("grafana", 0, "f", "queue", True, NOW, None, NOW, ignored_reason="not_ours"))
    with pytest.raises(UnreadableAlerts):
        await pull(db, {"grafana": body})
    assert [one.is_firing for one in await alerts.load_since(db, NOW)] == [True]


@pytest.mark.parametrize("status", [204, 301, 401, 403, 404, 500, 503])
async def test_an_answer_that_is_not_200_changes_nothing(db: Database, source: Source, status: int) -> None:
    await deliver(db, firing())
    source.status = status
    for at in (100, 1000, 10_000):
        with pytest.raises(UnreadableAlerts):
            await source.pulled(at)
    [alert] = await alerts.load_since(db, NOW)
    assert (alert.is_firing, alert.refreshed_at) == (True, NOW)


async def test_a_source_with_an_odd_alert_does_not_keep_the_next_one_from_being_read(db: Database) -> None:
    odd = json.dumps([{**ACTIVE, "labels": None}])
    with pytest.raises(UnreadableAlerts, match="AttributeError"):
        await pull(db, {"odd": odd, "good": json.dumps([ACTIVE])})
    assert [one.org_id for one in await alerts.load_since(db, NOW)] == [1]


async def test_text_that_postgresql_cannot_store_is_replaced_and_not_the_end_of_all_pulls(db: Database) -> None:
    await pull(db, {"grafana": json.dumps([{**ACTIVE, "annotations": {"summary": "a\0b"}}])})
    [kept] = await alerts.load_since(db, NOW)
    assert kept.annotations == {"summary": "a\N{REPLACEMENT CHARACTER}b"}


# --- what nobody confirms -------------------------------------------------------------------------------------


async def test_a_stale_alert_is_told_of_once_shown_and_fresh_again_with_the_next_word(db: Database) -> None:
    await deliver(db, firing("stale"), firing("foreign", action=None, ignored_reason="not_ours"))
    await deliver(db, firing("fresh", at=600))
    loop = StalenessLoop(db, StalenessOptions(stale_after=timedelta(minutes=15)))
    said: list[Any] = []
    sink = logger.add(lambda message: said.append(message.record["extra"]), level="WARNING")
    try:
        await loop.run_once(NOW + timedelta(minutes=15))
        assert said == []
        for minutes in (16, 17):
            await loop.run_once(NOW + timedelta(minutes=minutes))
    finally:
        logger.remove(sink)
    assert said == [{"count": 1, "alerts": "grafana/0/stale"}]

    rig = WebRig(db)
    assert 'controlplane_alerts_stale{source="grafana"} 1.0' in (await rig.ask("GET", "/metrics")).text
    shown = {
        one["fingerprint"]: one["stale_since"] for one in (await rig.ask("GET", "/api/v1/alerts")).json()["alerts"]
    }
    assert shown == {"stale": (NOW + timedelta(minutes=16)).isoformat(), "foreign": None, "fresh": None}

    await deliver(db, firing("stale", at=1100))
    assert await alerts.count_stale(db) == {}
    assert 'controlplane_alerts_stale{source="grafana"} 0.0' in (await rig.ask("GET", "/metrics")).text
