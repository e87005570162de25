"""Decisions of one set that is tuned for a test, whose jobs start at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime, timedelta
from typing import Any

from controlplane.core.scaling import decide, pressures
from controlplane.core.types import (
    Alert,
    AlertAction,
    Change,
    Decision,
    ReplicaSet,
    ScaleDown,
    ScaleUp,
    ScheduledBounds,
)
from tests.unit.worlds import NOW, a_set, a_spec, an_alert

STALE_AFTER = timedelta(minutes=15)

up, down = an_alert(AlertAction.SCALE_UP, "up"), an_alert(AlertAction.SCALE_DOWN, "down", alertname="Idle")


def decided(
    replica_set: ReplicaSet,
    *alerts: Alert,
    changes: Sequence[Change] = (),
    scheduled: ScheduledBounds | None = None,
    now: datetime = NOW,
) -> Decision:
    pressure = pressures([replica_set], alerts, now=now, stale_after=STALE_AFTER)[replica_set.name]
    return decide(replica_set, pressure, [], {}, now=now, scheduled=scheduled, changes=changes)


def a_tuned(desired: int, *, scale_up: Any = None, scale_down: Any = None, **changes: Any) -> ReplicaSet:
    """Between 0 and 20; no cooldown and no window but those given."""
    spec = a_spec(
        max_replicas=20,
        scale_up=ScaleUp(**{"cooldown_seconds": 0, **(scale_up or {})}),
        scale_down=ScaleDown(**{"cooldown_seconds": 0, "stabilization_window_seconds": 0, **(scale_down or {})}),
    )
    return a_set(desired, spec=replace(spec, **changes))
