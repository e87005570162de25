"""The control plane's app over a database, asked through ASGI."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

import httpx
from prometheus_client import CollectorRegistry

from controlplane.db import Database
from controlplane.metrics import ControlPlaneMetrics
from controlplane.slurm.script import ScriptOptions
from controlplane.web import OperatorToken, Part, WebOptions, create_app
from tests.integration.db_rows import NOW

ANN = {"Authorization": "Bearer ann-token"}
OPTIONS = WebOptions(
    operators=(OperatorToken("bob", "bob-token"), OperatorToken("ann", "ann-token")), script=ScriptOptions()
)


@dataclass
class WebRig:
    db: Database
    options: WebOptions = OPTIONS
    slurm: Part | None = None
    now: datetime = NOW
    metrics: ControlPlaneMetrics = field(default_factory=lambda: ControlPlaneMetrics(CollectorRegistry()))

    async def ask(
        self, method: str, path: str, body: Any = None, *, headers: Mapping[str, str] = ANN
    ) -> httpx.Response:
        app = create_app(self.db, self.options, self.metrics, slurm_status=lambda: self.slurm, clock=lambda: self.now)
        content = {"content": body} if isinstance(body, bytes) else {"json": body} if body is not None else {}
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://cp") as client:
            return await client.request(method, path, headers=dict(headers), **content)
