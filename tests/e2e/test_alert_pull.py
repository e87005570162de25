"""The pull against a real Alertmanager whose webhooks all get lost: silenced, restarted, resolved."""

from __future__ import annotations

from collections.abc import AsyncIterator
from datetime import datetime, timedelta
from typing import Any

import httpx
import pytest

from controlplane.clock import utc_now
from controlplane.core.types import AlertAction
from controlplane.db import Database, alerts
from controlplane.demo.prometheus import Alertmanager, AlertmanagerOptions
from controlplane.reconcile.alerts import AlertPullLoop, AlertPullOptions, AlertSource, UnreadableAlerts
from tests.conftest import eventually
from tests.e2e.conftest import AlertmanagerFactory
from tests.integration.db_rows import make_set, opened

LABELS = {"alertname": "queue", "owner": "controlplane", "action": "scale_up", "model": "m"}
ABSENCE = timedelta(seconds=90)


class Pulled:
    """An Alertmanager, and what a pull of it leaves in the database."""

    def __init__(self, db: Database, alertmanager: Alertmanager, http: httpx.AsyncClient) -> None:
        self.alertmanager = alertmanager
        self.db = db
        self._http = http
        options = AlertPullOptions([AlertSource("alertmanager", alertmanager.url)])
        self._loop = AlertPullLoop(db, options, http)
        self._ahead = timedelta()

    async def fires(self, *, after: timedelta = timedelta()) -> bool:
        """Pull, that much later than before; does the alert fire then?"""
        self._ahead += after
        await self._loop.run_once(self.now())
        return [one.is_firing for one in await alerts.load_since(self.db, self.now() - timedelta(days=1))] == [True]

    def now(self) -> datetime:
        return utc_now() + self._ahead

    async def tell(self, **more: str) -> None:
        """What Prometheus posts, again and again, while the rule's expression is true."""
        await self._ask("POST", "alerts", [{"labels": LABELS, **more}])

    async def states(self) -> list[str]:
        return [one["status"]["state"] for one in await self._ask("GET", "alerts")]

    async def silence(self) -> str:
        matchers = [{"name": "alertname", "value": "queue", "isRegex": False, "isEqual": True}]
        times = {"startsAt": utc_now().isoformat(), "endsAt": (utc_now() + timedelta(hours=1)).isoformat()}
        made = await self._ask("POST", "silences", {"matchers": matchers, **times, "createdBy": "ann", "comment": "c"})
        return str(made["silenceID"])

    async def end_silence(self, silence: str) -> None:
        await self._ask("DELETE", f"silence/{silence}")

    async def _ask(self, method: str, path: str, body: Any = None) -> Any:
        answer = await self._http.request(method, f"{self.alertmanager.url}/api/v2/{path}", json=body)
        assert answer.is_success, answer.text
        return answer.json() if answer.content else None


@pytest.fixture
async def pulled(database_url: str, alertmanager_factory: AlertmanagerFactory, free_port: int) -> AsyncIterator[Pulled]:
    nobody = AlertmanagerOptions(webhook_url=f"http://127.0.0.1:{free_port}/webhooks/alertmanager")
    alertmanager = alertmanager_factory(nobody)
    async with opened(database_url) as db, httpx.AsyncClient(trust_env=False) as http:
        await make_set(db)
        yield Pulled(db, alertmanager, http)


async def test_a_pull_follows_an_alert_through_silence_restart_and_end(pulled: Pulled) -> None:
    assert not await pulled.fires()
    await pulled.tell()
    await eventually(pulled.fires)
    [alert] = await alerts.load_since(pulled.db, pulled.now() - timedelta(days=1))
    assert (alert.action, alert.source, alert.org_id) == (AlertAction.SCALE_UP, "alertmanager", 0)

    silence = await pulled.silence()
    await eventually(lambda: is_listed(pulled, "suppressed"))
    assert not await pulled.fires()
    await pulled.end_silence(silence)
    await eventually(lambda: is_listed(pulled, "active"))
    assert await pulled.fires()

    pulled.alertmanager.children.kill("alertmanager")
    with pytest.raises(UnreadableAlerts):
        await pulled.fires(after=timedelta(minutes=10))
    pulled.alertmanager.restart()
    assert await pulled.states() == []  # it keeps no alerts
    assert await pulled.fires()
    assert await pulled.fires(after=ABSENCE / 2)
    await pulled.tell()
    await eventually(lambda: is_listed(pulled, "active"))
    assert await pulled.fires(after=ABSENCE)

    await pulled.tell(endsAt=(utc_now() - timedelta(seconds=1)).isoformat())
    await eventually(lambda: is_listed(pulled))
    assert await pulled.fires()
    assert not await pulled.fires(after=ABSENCE + timedelta(seconds=1))


async def is_listed(pulled: Pulled, *states: str) -> bool:
    return await pulled.states() == [*states]
