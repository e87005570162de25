"""Pulls the active alerts from Grafana and Alertmanager: heals what webhooks lost.

Grafana does not repeat a failed delivery until the group's next flush, and never one that resolved meanwhile. So the
complete list of what is active is read on a timer: what it names fires, what it lacks has resolved. A silenced alert
is not active: whoever silenced it wants quiet. A list that could not be had, or not be read, changes nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

import httpx

from controlplane.core.alerts import Target, judge
from controlplane.core.storable import storable
from controlplane.core.times import parse_time
from controlplane.core.types import Alert
from controlplane.db import Database, alerts, replica_sets

_PATHS = {"grafana": "/api/alertmanager/grafana/api/v2/alerts", "alertmanager": "/api/v2/alerts"}


@dataclass(frozen=True, slots=True)
class AlertSource:
    """Where active alerts can be read: `source` is `grafana` or `alertmanager`, `url` its root."""

    source: str
    url: str
    token: str | None = field(default=None, repr=False)
    org_id: int = 0


@dataclass(frozen=True, slots=True)
class AlertPullOptions:
    sources: Sequence[AlertSource]
    interval_seconds: float = 15.0
    timeout_seconds: float = 10.0


class UnreadableAlerts(Exception):
    """The list could not be had, or is not one: nothing is known."""


class AlertPullLoop:
    name = "alerts"

    def __init__(self, db: Database, options: AlertPullOptions, http: httpx.AsyncClient) -> None:
        self._db = db
        self._options = options
        self._http = http
        self.interval_seconds = options.interval_seconds

    async def run_once(self, now: datetime) -> str | None:
        """Read every source. One that fails does not keep the others from being read; it raises at the end."""
        known = await replica_sets.load_targets(self._db)
        changed: dict[str, int] = {}
        failures: list[str] = []
        for source in self._options.sources:
            try:
                active = await self._pull(source, known, now)
            except UnreadableAlerts as error:
                failures.append(f"{source.source}: {error}")
                continue
            if count := await alerts.refresh(self._db, source.source, source.org_id, active, now=now):
                changed[source.source] = count
        if failures:
            raise UnreadableAlerts("; ".join(failures))
        return ", ".join(f"{count} alerts healed from {name}" for name, count in changed.items()) or None

    async def _pull(self, source: AlertSource, known: Mapping[str, Target], now: datetime) -> list[Alert]:
        try:
            answer = await self._http.get(
                source.url.rstrip("/") + _PATHS[source.source],
                params={"active": "true", "silenced": "false", "inhibited": "false"},
                headers={} if source.token is None else {"Authorization": f"Bearer {source.token}"},
                timeout=self._options.timeout_seconds,
            )
        except httpx.HTTPError as error:
            raise UnreadableAlerts(f"{type(error).__name__}: {error}"[:256]) from error
        if answer.status_code != 200:
            raise UnreadableAlerts(f"answered {answer.status_code}")
        try:
            listed = storable(answer.json())
            if not isinstance(listed, list):  # an empty object must not read as "nothing fires"
                raise TypeError(f"it is a {type(listed).__name__}")
            return [_alert(entry, source, known, now) for entry in listed if entry["status"]["state"] == "active"]
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise UnreadableAlerts(f"not a list of alerts: {type(error).__name__}: {error}"[:256]) from error


def _alert(entry: Mapping[str, Any], source: AlertSource, known: Mapping[str, Target], now: datetime) -> Alert:
    # a name between double underscores is Grafana's own: webhooks do not carry those labels either
    labels = {str(name): str(value) for name, value in entry["labels"].items() if not _is_hidden(name)}
    annotations = {str(name): str(value) for name, value in entry["annotations"].items() if not _is_hidden(name)}
    verdict = judge(labels, annotations, known)
    return Alert(
        source=source.source,
        org_id=source.org_id,
        fingerprint=str(entry["fingerprint"]),
        alertname=labels.get("alertname", ""),
        is_firing=True,
        starts_at=parse_time(entry["startsAt"]),
        ends_at=None,
        refreshed_at=now,
        labels=labels,
        annotations=annotations,
        action=verdict.action,
        ignored_reason=verdict.ignored_reason,
        step=verdict.step,
    )


def _is_hidden(name: str) -> bool:
    return name.startswith("__") and name.endswith("__")
