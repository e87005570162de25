"""Pulling active alerts from a source that answers oddly: nothing that is not a list resolves anything."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from datetime import timedelta
from typing import Any

import httpx
import pytest

from controlplane.core.types import Alert
from controlplane.db import Database, alerts
from controlplane.reconcile.alerts import AlertPullLoop, AlertPullOptions, AlertSource, UnreadableAlerts
from tests.integration.db_rows import NOW, opened

LATER = NOW + timedelta(minutes=1)
ACTIVE: dict[str, Any] = {
    "status": {"state": "active"},
    "fingerprint": "pulled",
    "startsAt": "2026-01-01T12:00:00Z",
    "labels": {"alertname": "queue"},
    "annotations": {},
}


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


@pytest.mark.parametrize("body", ["{}", '""', "null", "<html>", "[" * 100_000, '[{"status": {}}]'])
async def test_an_answer_that_is_no_list_of_alerts_resolves_nothing(db: Database, body: str) -> None:
    firing = Alert("grafana", 0, "f", "queue", True, NOW, None, NOW, ignored_reason="not_ours")
    await alerts.store(db, [(firing, {})], now=NOW)
    with pytest.raises(UnreadableAlerts):
        await pull(db, {"grafana": body})
    assert [one.is_firing for one in await alerts.load_since(db, NOW)] == [True]


async def test_a_source_with_an_odd_alert_does_not_keep_the_next_one_from_being_read(db: Database) -> None:
    odd = json.dumps([{**ACTIVE, "labels": None}])
    with pytest.raises(UnreadableAlerts, match="AttributeError"):
        await pull(db, {"odd": odd, "good": json.dumps([ACTIVE])})
    assert [one.org_id for one in await alerts.load_since(db, NOW)] == [1]


async def test_text_that_postgresql_cannot_store_is_replaced_and_not_the_end_of_all_pulls(db: Database) -> None:
    await pull(db, {"grafana": json.dumps([{**ACTIVE, "annotations": {"summary": "a\0b"}}])})
    [kept] = await alerts.load_since(db, NOW)
    assert kept.annotations == {"summary": "a\N{REPLACEMENT CHARACTER}b"}
