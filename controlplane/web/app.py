"""The control plane's ASGI app: which routes there are, and what each is given."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime

from starlette.applications import Starlette

from controlplane.clock import utc_now
from controlplane.db import Database
from controlplane.metrics import ControlPlaneMetrics
from controlplane.slurm.script import ScriptOptions
from controlplane.web import health, operators, scrape, service_discovery, webhooks
from controlplane.web.credentials import OperatorToken, WebhookCredentials
from controlplane.web.errors import HANDLED, answer_error
from controlplane.web.intake import Intake


@dataclass(frozen=True, slots=True)
class WebOptions:
    """Without credentials every webhook, without operators every verb is refused.

    `script`: how job scripts are made here, to refuse a spec that none can be made of; None: no Slurm is configured,
    and only replica sets with fixed endpoints are accepted. `max_waiting`: deliveries that wait to be stored at most.
    """

    webhook: WebhookCredentials = field(default_factory=WebhookCredentials)
    operators: tuple[OperatorToken, ...] = ()
    script: ScriptOptions | None = None
    max_body_bytes: int = 4 * 1024 * 1024
    max_waiting: int = 2000


def create_app(
    db: Database,
    options: WebOptions,
    metrics: ControlPlaneMetrics,
    *,
    slurm_status: Callable[[], health.Part | None],
    clock: Callable[[], datetime] = utc_now,
) -> Starlette:
    """The app; `db` is the caller's to open and close. `slurm_status`: as last seen, None when none is configured."""
    intake = Intake(db, max_waiting=options.max_waiting)
    app = Starlette(
        routes=[
            *webhooks.routes(intake, options.webhook, metrics, clock, max_body_bytes=options.max_body_bytes),
            *operators.routes(db, options.operators, options.script, clock, max_body_bytes=options.max_body_bytes),
            *service_discovery.routes(db),
            *health.routes(db, slurm_status),
            *scrape.routes(db, metrics, clock),
        ],
        exception_handlers=dict.fromkeys(HANDLED, answer_error),
    )
    app.router.redirect_slashes = False  # a redirected POST becomes a GET, and the alert is lost
    return app
