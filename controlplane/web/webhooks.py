"""`POST /webhooks/grafana` and `/webhooks/alertmanager`: judge each alert, store it, then answer 202.

Grafana does not send again what was refused before the group's next flush, so nothing is refused that could be stored:
an alert nobody may act upon is kept with the reason. When the 202 leaves, PostgreSQL has committed. Repeats are
harmless and are answered alike; Slurm is never asked.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from datetime import datetime

from loguru import logger
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from controlplane.db import DatabaseError, DbUnavailable, Duplicate, alerts
from controlplane.metrics import ControlPlaneMetrics
from controlplane.web.bodies import read_body
from controlplane.web.credentials import WebhookCredentials, check_webhook
from controlplane.web.errors import Refused
from controlplane.web.intake import Intake, Overloaded, Parcel
from controlplane.web.payloads import Delivery, Source, parse


def routes(
    intake: Intake,
    credentials: WebhookCredentials,
    metrics: ControlPlaneMetrics,
    clock: Callable[[], datetime],
    *,
    max_body_bytes: int,
) -> list[Route]:
    def route(source: Source) -> Route:
        async def receive(request: Request) -> JSONResponse:
            try:
                body = await read_body(request, max_body_bytes)
                stored, delivery = await _store(intake, credentials, source, body, request.headers, clock())
            except (Refused, DatabaseError) as error:
                outcome = _outcome(error)
                metrics.alerts.labels(source, outcome).inc()
                logger.warning("webhook refused", source=source, outcome=outcome, error=str(error)[:256])
                raise
            ignored = sum(stored.ignored.values())
            counts = {"accepted": stored.accepted, "duplicates": stored.duplicates, "ignored": ignored}
            for outcome, count in {**counts, "truncated": delivery.truncated}.items():
                metrics.alerts.labels(source, outcome).inc(count)
            logger.info("alerts stored", source=source, **counts)
            if delivery.truncated:
                logger.warning(
                    "the sender left alerts out; set its limit to 0", source=source, count=delivery.truncated
                )
            return JSONResponse(
                {**counts, "ignored_reasons": stored.ignored, "truncated": delivery.truncated}, status_code=202
            )

        return Route(f"/webhooks/{source}", receive, methods=["POST"])

    return [route(source) for source in Source]


_OUTCOMES = {400: "malformed", 401: "unauthorized", 413: "too_large", 503: "overloaded"}
"""Words of `controlplane_alerts_total` for a delivery that was refused as a whole, and counts once."""


def _outcome(error: Refused | DatabaseError) -> str:
    if isinstance(error, Refused):
        return _OUTCOMES[error.status_code]
    return "unavailable" if isinstance(error, DbUnavailable) else "failed"


async def _store(
    intake: Intake,
    credentials: WebhookCredentials,
    source: Source,
    body: bytes,
    headers: Mapping[str, str],
    now: datetime,
) -> tuple[alerts.Stored, Delivery]:
    used = check_webhook(credentials, headers, body, now=now)
    delivery = parse(source, body)
    signature = (used.digest, used.expires_at) if used else None
    try:
        stored = await intake.store(Parcel(source, delivery, len(body), now, signature))
    except Duplicate:
        raise Refused(401, "this signature was used before") from None
    except Overloaded as error:
        raise Refused(503, f"{error}; try again later", headers={"Retry-After": "1"}) from None
    return stored, delivery
