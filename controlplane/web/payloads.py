"""The webhook bodies of Grafana (version "1") and Alertmanager (version "4"): the only file that knows their shape.

Read leniently: keys that are not known are ignored, and what only some versions send may be missing. What identifies,
orders or decides must be there and have the right shape, else the field at fault is named.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from typing import Any, TypeGuard

from controlplane.core.storable import storable
from controlplane.core.times import parse_time
from controlplane.web.errors import Refused


class Source(StrEnum):
    GRAFANA = "grafana"
    ALERTMANAGER = "alertmanager"


_VERSIONS = {Source.GRAFANA: "1", Source.ALERTMANAGER: "4"}
_LONGEST_FINGERPRINT = 128
_LARGEST_ORG_ID = 2**63 - 1


@dataclass(frozen=True, slots=True)
class ToldAlert:
    """One alert as its sender told of it. `ends_at` is None while it fires."""

    org_id: int
    fingerprint: str
    is_firing: bool
    starts_at: datetime
    ends_at: datetime | None
    labels: Mapping[str, str]
    annotations: Mapping[str, str]
    values: Mapping[str, float]
    payload: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Delivery:
    alerts: tuple[ToldAlert, ...]
    truncated: int  # how many alerts the sender left out, by its own limit


def parse(source: Source, body: bytes) -> Delivery:
    """Raises Refused (400) naming the field at fault."""
    try:
        document = storable(json.loads(body))
    except (ValueError, RecursionError):
        raise Refused(400, "the body is not JSON") from None
    if not isinstance(document, dict):
        raise Refused(400, "the body must be a JSON object")
    _check_version(source, document.get("version"))
    alerts = document.get("alerts")
    if not isinstance(alerts, list):
        raise _at("alerts", "must be a list")
    truncated = document.get("truncatedAlerts") or 0
    if not _is_whole(truncated) or truncated < 0:
        raise _at("truncatedAlerts", "must be a whole number")
    org_id = document.get("orgId") if source is Source.GRAFANA else 0  # Alertmanager knows no organizations
    return Delivery(tuple(_alert(f"alerts[{i}]", one, org_id) for i, one in enumerate(alerts)), truncated)


def _check_version(source: Source, version: object) -> None:
    if version == _VERSIONS[source]:
        return
    for other, its_version in _VERSIONS.items():
        if version == its_version:
            raise _at("version", f"this is a body of {other}; send it to /webhooks/{other}")
    raise _at("version", f'must be "{_VERSIONS[source]}": use the default payload')


def _alert(path: str, raw: object, org_id: object) -> ToldAlert:
    if not isinstance(raw, dict):
        raise _at(path, "must be an object")
    org_id = org_id if raw.get("orgId") is None else raw["orgId"]  # on the alert itself since Grafana 12.0
    if not _is_whole(org_id) or not 0 <= org_id <= _LARGEST_ORG_ID:
        raise _at("orgId", "must be a whole number")
    fingerprint = raw.get("fingerprint")
    if not isinstance(fingerprint, str) or not 0 < len(fingerprint) <= _LONGEST_FINGERPRINT:
        raise _at(f"{path}.fingerprint", f"must be text of 1 to {_LONGEST_FINGERPRINT} characters")
    if raw.get("status") not in ("firing", "resolved"):
        raise _at(f"{path}.status", "must be firing or resolved")
    is_firing = raw["status"] == "firing"
    return ToldAlert(
        org_id=org_id,
        fingerprint=fingerprint,
        is_firing=is_firing,
        starts_at=_time(f"{path}.startsAt", raw.get("startsAt")),
        # while it fires the end is Go's zero time, or a forecast: it has none
        ends_at=None if is_firing else _time(f"{path}.endsAt", raw.get("endsAt")),
        labels=_texts(f"{path}.labels", raw.get("labels")),
        annotations=_texts(f"{path}.annotations", raw.get("annotations")),
        values=_numbers(f"{path}.values", raw.get("values")),
        payload=raw,
    )


def _time(path: str, value: object) -> datetime:
    if not isinstance(value, str):
        raise _at(path, "must be an RFC 3339 time")
    try:
        time = parse_time(value)
    except ValueError as error:
        raise _at(path, str(error)) from None
    if time.year == 1:
        raise _at(path, "is Go's zero time")
    return time


def _texts(path: str, value: object) -> dict[str, str]:
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise _at(path, "must be an object")
    for key, text in value.items():
        if not isinstance(text, str):
            raise _at(f"{path}.{key[:64]}", "must be text")
    return value


def _numbers(path: str, value: object) -> dict[str, float]:
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise _at(path, "must be an object or null")
    numbers: dict[str, float] = {}
    for key, number in value.items():
        if isinstance(number, bool) or not isinstance(number, int | float | None):
            raise _at(f"{path}.{key[:64]}", "must be a number or null")
        if number is not None:
            numbers[key] = number
    return numbers


def _is_whole(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


def _at(path: str, message: str) -> Refused:
    return Refused(400, f"{path}: {message}", field=path)
