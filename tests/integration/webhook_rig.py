"""The webhooks' routes over a database, asked through ASGI, and the recorded bodies."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
from prometheus_client import CollectorRegistry
from starlette.applications import Starlette

from controlplane.core.types import Alert
from controlplane.db import Database, alerts
from controlplane.metrics import ControlPlaneMetrics
from controlplane.web import WebhookCredentials, WebOptions, create_app

FIXTURES = Path(__file__).parents[1] / "fixtures" / "grafana"
SIGNED_AT = datetime.fromtimestamp(1795341083, UTC)  # when the recorded signature was made
BEARER = {"Authorization": "Bearer test-token"}
TOKEN = WebhookCredentials(bearer_tokens=("test-token",))


@dataclass
class Rig:
    """One control plane; with other credentials it is another one on the same database."""

    db: Database
    credentials: WebhookCredentials = TOKEN
    now: datetime = SIGNED_AT
    max_waiting: int = 2000
    registry: CollectorRegistry = field(default_factory=CollectorRegistry)

    def __post_init__(self) -> None:
        self._metrics = ControlPlaneMetrics(self.registry)
        self._apps: dict[WebhookCredentials, Starlette] = {}

    async def post(
        self, body: Any, headers: Mapping[str, str] = BEARER, *, source: str = "grafana", path: str | None = None
    ) -> httpx.Response:
        content = body if isinstance(body, bytes | AsyncIterator) else json.dumps(body).encode()
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app=self._app()), base_url="http://cp") as client:
            return await client.post(path or f"/webhooks/{source}", content=content, headers=dict(headers))

    async def stored(self) -> dict[str, Alert]:
        return {one.fingerprint: one for one in await alerts.load_since(self.db, datetime(1900, 1, 1, tzinfo=UTC))}

    def counted(self, outcome: str, source: str = "grafana") -> float:
        labels = {"source": source, "outcome": outcome}
        return self.registry.get_sample_value("controlplane_alerts_total", labels) or 0.0

    def _app(self) -> Starlette:
        if self.credentials not in self._apps:
            self._apps[self.credentials] = create_app(
                self.db,
                WebOptions(webhook=self.credentials, max_waiting=self.max_waiting),
                self._metrics,
                slurm_status=lambda: None,
                clock=lambda: self.now,
            )
        return self._apps[self.credentials]


async def forget_everything(db: Database) -> None:
    async with db.connection() as connection:
        await connection.execute("TRUNCATE alerts, alert_deliveries, webhook_signatures, replica_sets CASCADE")


def fixture(name: str) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((FIXTURES / f"{name}.json").read_text())
    return loaded


def ours(name: str = "grafana-firing", *, fingerprint: str | None = None, **labels: str) -> dict[str, Any]:
    """A recorded body whose alerts have the labels that let them act."""
    body = fixture(name)
    for alert in body["alerts"]:
        alert["labels"] |= {"owner": "controlplane", "action": "scale_up", "model": "qwen3-8b", **labels}
        alert["fingerprint"] = fingerprint or alert["fingerprint"]
    return body
