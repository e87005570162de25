"""Pulls the active alerts from Grafana and Alertmanager: heals what webhooks lost.

Grafana does not repeat a failed delivery until the group's next flush, and never one that resolved meanwhile. So the
complete list is read on a timer, and at once when a delivery was cut short or had to be refused: what is active in it
fires, what is silenced or inhibited in it has ended, because whoever silenced it wants quiet. A list that could not be
had, or not be read, changes nothing.

What a list lacks has resolved only when it was missing from every list for a while. A source that has just started
lists nothing, and its rules tell it again within a minute or so (Prometheus' `--rules.alert.resend-delay` is 1 m;
Grafana posts what fires to its own Alertmanager about every 30 s). Being late to end a pressure costs little; to lift
the drain of a bad node because Alertmanager was upgraded costs much.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any

import httpx

from controlplane.core.alerts import Target, judge
from controlplane.core.log_text import without
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
    absence_seconds: float = 90.0  # missing from every list for so long: resolved


@dataclass(frozen=True, slots=True)
class Listing:
    """What a source knows of. `undecided`: it has heard of them, and not yet looked whether they are silenced."""

    active: Sequence[Alert]
    silent: frozenset[str]
    undecided: frozenset[str]


class UnreadableAlerts(Exception):
    """The list could not be had, or is not one: nothing is known."""


class AlertPullLoop:
    name = "alerts"

    def __init__(self, db: Database, options: AlertPullOptions, http: httpx.AsyncClient) -> None:
        self._db = db
        self._options = options
        self._http = http
        self._missing: dict[AlertSource, dict[str, datetime]] = {}  # what fires here, and since when it is not listed
        self.interval_seconds = options.interval_seconds

    async def run_once(self, now: datetime) -> str | None:
        """Read every source. One that fails does not keep the others from being read; it raises at the end."""
        known = await replica_sets.load_targets(self._db)
        changed: dict[str, int] = {}
        failures: list[str] = []
        for source in self._options.sources:
            try:
                listing = await self._pull(source, known, now)
            except UnreadableAlerts as error:
                failures.append(f"{source.source}: {error}")
                continue
            spared = await self._spared(source, listing, now)
            count = await alerts.refresh(self._db, source.source, source.org_id, listing.active, now=now, spared=spared)
            if count:
                changed[source.source] = count
        if failures:
            raise UnreadableAlerts("; ".join(failures))
        return ", ".join(f"{count} alerts healed from {name}" for name, count in changed.items()) or None

    async def _spared(self, source: AlertSource, listing: Listing, now: datetime) -> frozenset[str]:
        """What must not be taken for resolved, although it is not in the list as active."""
        listed = {one.fingerprint for one in listing.active} | listing.silent | listing.undecided
        before = self._missing.get(source, {})
        missing = {}
        for fingerprint, heard_at in (await alerts.load_firing(self._db, source.source, source.org_id)).items():
            if fingerprint not in listed:
                since = before.get(fingerprint, now)
                missing[fingerprint] = since if heard_at <= since else now
        self._missing[source] = missing
        absence = timedelta(seconds=self._options.absence_seconds)
        return listing.undecided | {fingerprint for fingerprint, since in missing.items() if now - since < absence}

    async def _pull(self, source: AlertSource, known: Mapping[str, Target], now: datetime) -> Listing:
        try:
            answer = await self._http.get(
                source.url.rstrip("/") + _PATHS[source.source],
                params={"active": "true", "silenced": "true", "inhibited": "true"},
                headers={} if source.token is None else {"Authorization": f"Bearer {source.token}"},
                timeout=self._options.timeout_seconds,
            )
        except httpx.HTTPError as error:
            raise UnreadableAlerts(_words(error, source)) from None
        if answer.status_code != 200:
            raise UnreadableAlerts(f"answered {answer.status_code}")
        try:
            listed = storable(answer.json())
            if not isinstance(listed, list):  # an empty object must not read as "nothing fires"
                raise TypeError(f"it is a {type(listed).__name__}")
            return _listing(listed, source, known, now)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise UnreadableAlerts(f"not a list of alerts: {_words(error, source)}") from None


def _words(error: Exception, source: AlertSource) -> str:
    return without(f"{type(error).__name__}: {error}", source.token)[:256]  # it may quote what was sent


def _listing(
    entries: Sequence[Mapping[str, Any]], source: AlertSource, known: Mapping[str, Target], now: datetime
) -> Listing:
    states = [(entry["status"]["state"], entry) for entry in entries]  # active, suppressed, or unprocessed
    return Listing(
        active=[_alert(entry, source, known, now) for state, entry in states if state == "active"],
        silent=frozenset(str(entry["fingerprint"]) for state, entry in states if state == "suppressed"),
        undecided=frozenset(
            str(entry["fingerprint"]) for state, entry in states if state not in ("active", "suppressed")
        ),
    )


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
        values=_values(entry["annotations"].get("__values__")),
        action=verdict.action,
        ignored_reason=verdict.ignored_reason,
        step=verdict.step,
    )


def _values(text: object) -> dict[str, float]:
    """Grafana keeps the values in a hidden annotation, as JSON. They are for show: what cannot be read is left out."""
    try:
        numbers = storable(json.loads(text)) if isinstance(text, str) else None
    except (ValueError, RecursionError):
        return {}
    if not isinstance(numbers, dict):
        return {}
    return {
        name: number
        for name, number in numbers.items()
        if isinstance(number, int | float) and not isinstance(number, bool)
    }


def _is_hidden(name: str) -> bool:
    return name.startswith("__") and name.endswith("__")
