"""How many replicas a set shall have: from alerts as levels, within bounds, one careful step at a time.

An alert presses while it is firing and fresh. Up wins over down. Up: one step per cooldown, and not while a replica is
still starting. Down: one step per cooldown, after a window without up-pressure. "Resolved" ends a pressure and is
never a reason to shrink; neither is anything that is not known.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta

from controlplane.core.types import (
    Alert,
    AlertAction,
    Decision,
    DecisionReason,
    Endpoint,
    Health,
    Phase,
    Replica,
    ReplicaSet,
    seconds,
)


@dataclass(frozen=True, slots=True)
class Pressure:
    """What the alerts ask of one replica set."""

    up: tuple[Alert, ...] = ()
    down: tuple[Alert, ...] = ()
    replace: tuple[Alert, ...] = ()
    last_up_at: datetime | None = None  # when up-pressure was felt last; now, while it is felt


def presses(alert: Alert, *, now: datetime, stale_after: timedelta) -> bool:
    """Is this alert a reason to act, now?"""
    return alert.action is not None and alert.is_firing and now - alert.refreshed_at <= stale_after


def pressures(
    replica_sets: Iterable[ReplicaSet], alerts: Iterable[Alert], *, now: datetime, stale_after: timedelta
) -> dict[str, Pressure]:
    """Whom each alert presses. One that names a model presses one set: the cheapest with room up, the dearest down."""
    scalable = [one for one in replica_sets if not one.spec.is_external]
    alerts = tuple(alerts)
    return {one.name: _pressure_on(one, scalable, alerts, now, stale_after) for one in scalable}


def _pressure_on(
    replica_set: ReplicaSet,
    all_sets: list[ReplicaSet],
    alerts: tuple[Alert, ...],
    now: datetime,
    stale_after: timedelta,
) -> Pressure:
    meant = [alert for alert in alerts if _is_meant(replica_set, alert, all_sets)]
    pressing = [alert for alert in meant if presses(alert, now=now, stale_after=stale_after)]

    def acting(action: AlertAction) -> tuple[Alert, ...]:
        return tuple(alert for alert in pressing if alert.action is action)

    felt = [
        _felt_until(alert, now, stale_after)
        for alert in alerts
        if alert.action is AlertAction.SCALE_UP and _names(replica_set, alert)
    ]
    return Pressure(
        up=acting(AlertAction.SCALE_UP),
        down=acting(AlertAction.SCALE_DOWN),
        replace=acting(AlertAction.REPLACE),
        last_up_at=max(felt, default=None),
    )


def _names(replica_set: ReplicaSet, alert: Alert) -> bool:
    if alert.action is AlertAction.REPLACE:
        return alert.labels.get("replica", "").rpartition("-")[0] == f"cp-{replica_set.name}"
    if alert.labels.get("replica_set"):
        return alert.labels["replica_set"] == replica_set.name
    return alert.labels.get("model") == replica_set.spec.model


def _is_meant(replica_set: ReplicaSet, alert: Alert, all_sets: list[ReplicaSet]) -> bool:
    if not _names(replica_set, alert):
        return False
    if alert.action is AlertAction.REPLACE or alert.labels.get("replica_set"):
        return True
    siblings = sorted(
        (one for one in all_sets if one.spec.model == replica_set.spec.model and not one.is_paused),
        key=lambda one: (one.spec.priority, one.name),
    )
    if alert.action is AlertAction.SCALE_UP:
        able = [one for one in siblings if one.desired_replicas < one.max_replicas]
        return replica_set in (able[:1] or siblings[-1:])
    able = [one for one in siblings if one.desired_replicas > one.min_replicas]
    return replica_set in (able[-1:] or siblings[:1])


def _felt_until(alert: Alert, now: datetime, stale_after: timedelta) -> datetime:
    if alert.is_firing:
        return min(now, alert.refreshed_at + stale_after)
    return min(now, alert.ends_at or alert.refreshed_at)


def decide(
    replica_set: ReplicaSet,
    pressure: Pressure,
    replicas: Iterable[Replica],
    endpoints: Mapping[str, Endpoint],
    *,
    now: datetime,
) -> Decision:
    """The decision for one set, this round. `endpoints` by replica name; may be asked again at any time."""
    desired = replica_set.desired_replicas
    if replica_set.is_paused:
        return _stay(
            replica_set,
            DecisionReason.PAUSED,
            f"paused: {replica_set.paused_reason}" if replica_set.paused_reason else "paused",
        )
    if desired < replica_set.min_replicas:
        return _move(replica_set, replica_set.min_replicas, DecisionReason.BELOW_MIN, "fewer than min_replicas")
    if desired > replica_set.max_replicas:
        return _move(replica_set, replica_set.max_replicas, DecisionReason.ABOVE_MAX, "more than max_replicas")
    if pressure.up:
        replicas = tuple(replicas)
        existing = {one.id for one in replicas if one.exists}  # a successor beside one of these is no help
        starting = [
            one for one in replicas if one.succeeds not in existing and is_starting(one, endpoints.get(one.name), now)
        ]
        return _decide_up(replica_set, pressure.up, starting, now)
    if pressure.down:
        return _decide_down(replica_set, pressure, now)
    return _stay(replica_set, DecisionReason.STEADY, "no alert presses")


def is_starting(replica: Replica, endpoint: Endpoint | None, now: datetime) -> bool:
    """Is help on its way? Waiting in Slurm's queue counts; loading counts until the start budget is spent."""
    if replica.phase in (Phase.PENDING, Phase.SUBMITTING, Phase.QUEUED):
        return True
    if replica.phase is not Phase.RUNNING or (endpoint is not None and endpoint.health is not Health.UNPROVEN):
        return False
    since = (endpoint.failing_since if endpoint is not None else None) or replica.phase_since
    return now - since <= seconds(replica.spec.start_timeout_seconds)


def _decide_up(replica_set: ReplicaSet, up: tuple[Alert, ...], starting: list[Replica], now: datetime) -> Decision:
    policy = replica_set.spec.scale_up
    what = _words(up)
    if replica_set.desired_replicas >= replica_set.max_replicas:
        return _stay(replica_set, DecisionReason.AT_MAX, f"{what}, but max_replicas is {replica_set.max_replicas}", up)
    if starting:
        return _stay(replica_set, DecisionReason.STARTING, f"{what}; {starting[0].name} is still starting", up)
    if (left := _cooldown_left(replica_set.scaled_up_at, policy.cooldown_seconds, now)) is not None:
        return _stay(replica_set, DecisionReason.COOLDOWN, f"{what}; cooling down until {left:%H:%M:%S}", up)
    step = max((alert.step or policy.step) for alert in up)
    desired = min(replica_set.desired_replicas + step, replica_set.max_replicas)
    return _move(replica_set, desired, DecisionReason.SCALED_UP, what, up)


def _decide_down(replica_set: ReplicaSet, pressure: Pressure, now: datetime) -> Decision:
    policy = replica_set.spec.scale_down
    down, what = pressure.down, _words(pressure.down)
    if replica_set.desired_replicas <= replica_set.min_replicas:
        return _stay(
            replica_set, DecisionReason.AT_MIN, f"{what}, but min_replicas is {replica_set.min_replicas}", down
        )
    # an alert wanted more then, or an operator did, who may expect load that is not there yet
    wanted_more_at = max((at for at in (pressure.last_up_at, replica_set.scaled_up_at) if at is not None), default=None)
    window_ends = wanted_more_at and wanted_more_at + seconds(policy.stabilization_window_seconds)
    if window_ends is not None and now <= window_ends:  # up wins, even where the window has no length
        return _stay(
            replica_set,
            DecisionReason.STABILIZING,
            f"{what}; more were wanted too recently, until {window_ends:%H:%M:%S}",
            down,
        )
    if (left := _cooldown_left(replica_set.scaled_down_at, policy.cooldown_seconds, now)) is not None:
        return _stay(replica_set, DecisionReason.COOLDOWN, f"{what}; cooling down until {left:%H:%M:%S}", down)
    step = max((alert.step or policy.step) for alert in down)
    desired = max(replica_set.desired_replicas - step, replica_set.min_replicas)
    return _move(replica_set, desired, DecisionReason.SCALED_DOWN, what, down)


def _cooldown_left(last: datetime | None, cooldown_seconds: int, now: datetime) -> datetime | None:
    if last is None:
        return None
    ends = last + seconds(cooldown_seconds)
    return ends if now < ends else None


def _words(alerts: tuple[Alert, ...]) -> str:
    """The alerts in words, each with its own summary: that is where a rule tells its value."""
    said = sorted({(alert.alertname, alert.annotations.get("summary", "")) for alert in alerts})
    return "; ".join(f"{name} is firing" + (f" ({summary})" if summary else "") for name, summary in said)[:512]


def _stay(
    replica_set: ReplicaSet, reason: DecisionReason, explanation: str, alerts: tuple[Alert, ...] = ()
) -> Decision:
    return _move(replica_set, replica_set.desired_replicas, reason, explanation, alerts)


def _move(
    replica_set: ReplicaSet, desired: int, reason: DecisionReason, explanation: str, alerts: tuple[Alert, ...] = ()
) -> Decision:
    return Decision(
        replica_set=replica_set.name,
        desired=desired,
        previous=replica_set.desired_replicas,
        reason=reason,
        explanation=explanation,
        alerts=tuple(sorted(alert.key for alert in alerts)),
    )
