"""`POST /webhooks/grafana` and `/webhooks/alertmanager`: judge each alert, store it, then answer 202.

Grafana does not send again what was refused before the group's next flush, so nothing is refused that could be stored:
an alert nobody may act upon is kept with the reason. When the 202 leaves, PostgreSQL has committed. Repeats are
harmless and are answered alike; Slurm is never asked.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from datetime import datetime

from loguru import logger
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from controlplane.core.alerts import judge
from controlplane.core.types import Alert, ReplicaSet
from controlplane.db import Database, DbUnavailable, Duplicate, alerts, replica_sets
from controlplane.metrics import ControlPlaneMetrics
from controlplane.web.bodies import read_body
from controlplane.web.credentials import WebhookCredentials, check_webhook
from controlplane.web.errors import Refused
from controlplane.web.payloads import Delivery, Source, ToldAlert, parse


def routes(
    db: Database,
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
                stored, delivery = await _store(db, credentials, source, body, request.headers, clock())
            except (Refused, DbUnavailable) as error:
                outcome = _OUTCOMES[error.status_code if isinstance(error, Refused) else 503]
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


_OUTCOMES = {400: "malformed", 401: "unauthorized", 413: "too_large", 503: "unavailable"}
"""Words of `controlplane_alerts_total` for a delivery that was refused as a whole, and counts once."""


async def _store(
    db: Database,
    credentials: WebhookCredentials,
    source: Source,
    body: bytes,
    headers: Mapping[str, str],
    now: datetime,
) -> tuple[alerts.Stored, Delivery]:
    signature = check_webhook(credentials, headers, body, now=now)
    delivery = parse(source, body)
    known = await replica_sets.load_all(db)
    arrived = [(_judged(source, told, known, now), told.payload) for told in delivery.alerts]
    try:
        stored = await alerts.store(
            db, arrived, now=now, signature=(signature.digest, signature.expires_at) if signature else None
        )
    except Duplicate:
        raise Refused(401, "this signature was used before") from None
    return stored, delivery


def _judged(source: Source, told: ToldAlert, known: Iterable[ReplicaSet], now: datetime) -> Alert:
    verdict = judge(told.labels, told.annotations, known)
    return Alert(
        source=source,
        org_id=told.org_id,
        fingerprint=told.fingerprint,
        alertname=told.labels.get("alertname", ""),
        is_firing=told.is_firing,
        starts_at=told.starts_at,
        ends_at=told.ends_at,
        refreshed_at=now,
        labels=told.labels,
        annotations=told.annotations,
        values=told.values,
        action=verdict.action,
        ignored_reason=verdict.ignored_reason,
        step=verdict.step,
    )
