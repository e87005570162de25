"""What proxies ask for by the requests that they keep waiting: one alert for a model, of a source of their own.

It goes the way of all alerts: stored, shown, judged by its labels, pressing as a level. Three things are different,
because whoever tells it has seen the need with its own eyes and needs no more than one replica for a first answer:

- Requests that are held, for nothing is routable, bring a set from 0 to 1 at once: no cooldown, window or policy.
- It presses no set of a model while a replica of any of them is on its way, and a hold none that has a ready one.
- It is refreshed every few seconds, so it is stale after `GOOD_FOR`, and not after as long as a pull may fail.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta

from controlplane.core.alerts import OWNER, Target, judge
from controlplane.core.types import Alert, AlertAction

SOURCE = "proxy"
HELD = "RequestsHeld"
QUEUED = "RequestsQueued"
GOOD_FOR = timedelta(seconds=30)
"""What a worker has told holds for so long; it tells again several times meanwhile."""

_SUMMARIES = {
    HELD: "requests wait for a replica: none is routable",
    QUEUED: "requests wait: every replica has as many as it may",
}


@dataclass(frozen=True, slots=True)
class HeldRequests:
    """What all workers of all proxies together keep waiting for one model."""

    model: str
    held: int
    queued: int
    workers: int


def is_hold(alert: Alert) -> bool:
    """Does it say that nothing is routable?"""
    return alert.source == SOURCE and alert.alertname == HELD


def fingerprint_of(model: str) -> str:
    """One alert a model, whoever tells it."""
    return hashlib.sha256(model.encode()).hexdigest()[:16]


def firing(waiting: HeldRequests, known: Mapping[str, Target], *, starts_at: datetime, now: datetime) -> Alert:
    """The alert that these make. If somebody has a queue, something is routable: that word is the newer one.

    The summary has no numbers: a decision is told anew when its words change.
    """
    name = QUEUED if waiting.queued else HELD
    labels = {
        "alertname": name,
        "owner": OWNER,
        "action": AlertAction.SCALE_UP.value,
        "model": waiting.model,
        "step": "1",
    }
    annotations = {"summary": _SUMMARIES[name]}
    verdict = judge(labels, annotations, known)
    return Alert(
        source=SOURCE,
        org_id=0,
        fingerprint=fingerprint_of(waiting.model),
        alertname=name,
        is_firing=True,
        starts_at=starts_at,
        ends_at=None,
        refreshed_at=now,
        labels=labels,
        annotations=annotations,
        values={"held": waiting.held, "queued": waiting.queued, "workers": waiting.workers},
        action=verdict.action,
        ignored_reason=verdict.ignored_reason,
        step=verdict.step,
    )
