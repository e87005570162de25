"""How many replicas a set shall have: from alerts as levels, within bounds, one careful step at a time.

An alert presses while it is firing and fresh. Up wins over down. Up: one step per cooldown, after a window in which no
less was asked for, and not while a replica is still starting. Down: one step per cooldown, after a window without
up-pressure. Policies cut the step. "Resolved" ends a pressure and is never a reason to shrink; neither is anything that
is not known.

Who has a say, the first first: a pause; an operator's pin; a freeze; the bounds, which schedules move; the alerts. A
set in advisory mode decides all the same, and stays.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta

from controlplane.core import held_requests
from controlplane.core.bounds import bounded
from controlplane.core.policies import growth_limit, shrink_limit
from controlplane.core.types import (
    Alert,
    AlertAction,
    Change,
    Decision,
    DecisionReason,
    Endpoint,
    Health,
    Phase,
    Replica,
    ReplicaSet,
    ScheduledBounds,
    SelectPolicy,
    seconds,
)


@dataclass(frozen=True, slots=True)
class Help:
    """Sets that have what a proxy's held requests ask for; by name."""

    coming: frozenset[str] = frozenset()  # a replica starts, or is wanted and not made yet
    ready: frozenset[str] = frozenset()  # a replica was proven


@dataclass(frozen=True, slots=True)
class Pressure:
    """What the alerts ask of one replica set."""

    up: tuple[Alert, ...] = ()
    down: tuple[Alert, ...] = ()
    replace: tuple[Alert, ...] = ()
    last_up_at: datetime | None = None  # when up-pressure was felt last; now, while it is felt
    is_backing_off: bool = False  # its starts fail: more of them are no help


def presses(alert: Alert, *, now: datetime, stale_after: timedelta) -> bool:
    """Is this alert a reason to act, now?"""
    return alert.action is not None and alert.is_firing and now - alert.refreshed_at <= _good_for(alert, stale_after)


def _good_for(alert: Alert, stale_after: timedelta) -> timedelta:
    return min(stale_after, held_requests.GOOD_FOR) if alert.source == held_requests.SOURCE else stale_after


def help_for(
    replica_sets: Iterable[ReplicaSet], replicas: Iterable[Replica], endpoints: Mapping[str, Endpoint], now: datetime
) -> Help:
    """Which sets have help, or have it on its way. `endpoints` by replica name."""
    replicas = tuple(replicas)
    coming, ready = set(), set()
    for one in replica_sets:
        own = [replica for replica in replicas if replica.replica_set == one.name]
        if one.is_paused:
            continue
        if _starting(own, endpoints, now) or _missing(one, own):
            coming.add(one.name)
        if any(_is_ready(replica, endpoints.get(replica.name)) for replica in own):
            ready.add(one.name)
    return Help(frozenset(coming), frozenset(ready))


def _starting(own: Sequence[Replica], endpoints: Mapping[str, Endpoint], now: datetime) -> list[Replica]:
    existing = {one.id for one in own if one.exists}  # a successor beside one of these is no help
    return [one for one in own if one.succeeds not in existing and is_starting(one, endpoints.get(one.name), now)]


def _missing(replica_set: ReplicaSet, own: Sequence[Replica]) -> int:
    return max(0, replica_set.desired_replicas - sum(one.exists for one in own))


def _is_ready(replica: Replica, endpoint: Endpoint | None) -> bool:
    return replica.phase is Phase.RUNNING and endpoint is not None and endpoint.health is Health.READY


def pressures(
    replica_sets: Iterable[ReplicaSet],
    alerts: Iterable[Alert],
    *,
    now: datetime,
    stale_after: timedelta,
    backing_off: Collection[str] = (),
    help_there: Help | None = None,
) -> dict[str, Pressure]:
    """Whom each alert presses. One that names a model presses one set: the cheapest that can grow, the dearest down.

    `backing_off`: names of the sets that cannot grow, because their starts fail. `help_there`: see `help_for`; of
    concern to what proxies tell.
    """
    scalable = [one for one in replica_sets if not one.spec.is_external]
    alerts = tuple(alerts)
    there = Help() if help_there is None else help_there
    return {one.name: _pressure_on(one, scalable, alerts, now, stale_after, backing_off, there) for one in scalable}


def _pressure_on(
    replica_set: ReplicaSet,
    all_sets: list[ReplicaSet],
    alerts: tuple[Alert, ...],
    now: datetime,
    stale_after: timedelta,
    backing_off: Collection[str],
    there: Help,
) -> Pressure:
    meant = [alert for alert in alerts if _is_meant(replica_set, alert, all_sets, backing_off, there)]
    pressing = [alert for alert in meant if presses(alert, now=now, stale_after=stale_after)]

    def acting(action: AlertAction) -> tuple[Alert, ...]:
        return tuple(alert for alert in pressing if alert.action is action)

    felt = [
        _felt_until(alert, now, _good_for(alert, stale_after))
        for alert in alerts
        if alert.action is AlertAction.SCALE_UP and _names(replica_set, alert)
    ]
    return Pressure(
        up=acting(AlertAction.SCALE_UP),
        down=acting(AlertAction.SCALE_DOWN),
        replace=acting(AlertAction.REPLACE),
        last_up_at=max(felt, default=None),
        is_backing_off=replica_set.name in backing_off,
    )


def _names(replica_set: ReplicaSet, alert: Alert) -> bool:
    if alert.action is AlertAction.REPLACE:
        return alert.labels.get("replica", "").rpartition("-")[0] == f"cp-{replica_set.name}"
    if alert.labels.get("replica_set"):
        return alert.labels["replica_set"] == replica_set.name
    return alert.labels.get("model") == replica_set.spec.model


def _is_meant(
    replica_set: ReplicaSet, alert: Alert, all_sets: list[ReplicaSet], backing_off: Collection[str], there: Help
) -> bool:
    if not _names(replica_set, alert):
        return False
    if alert.action is AlertAction.REPLACE or alert.labels.get("replica_set"):
        return True
    siblings = sorted(
        (one for one in all_sets if one.spec.model == replica_set.spec.model and _competes(one, replica_set)),
        key=lambda one: (one.spec.priority, one.name),
    )
    if alert.action is AlertAction.SCALE_UP:
        able = [one for one in siblings if _can_grow(one) and one.name not in backing_off]
        if alert.source == held_requests.SOURCE:
            if held_requests.is_hold(alert) and any(one.name in there.ready for one in siblings):
                return False  # the proxies have not heard of it yet, or we not of their hearing
            able = [one for one in siblings if one.name in there.coming and one.name not in backing_off] or able
        return replica_set in (able[:1] or siblings[-1:])
    able = [one for one in siblings if _can_shrink(one)]
    return replica_set in (able[-1:] or siblings[:1])


def _competes(one: ReplicaSet, replica_set: ReplicaSet) -> bool:
    """One that only advises is told what would press it, and takes no pressure from those that act."""
    return not one.is_paused and (one is replica_set or not one.is_advisory)


def _is_held(one: ReplicaSet) -> bool:
    return one.pin is not None or bool(one.freezes)


def _can_grow(one: ReplicaSet) -> bool:
    is_allowed = one.spec.scale_up.select_policy is not SelectPolicy.DISABLED
    return is_allowed and not _is_held(one) and one.desired_replicas < one.max_replicas


def _can_shrink(one: ReplicaSet) -> bool:
    is_allowed = one.spec.scale_down.select_policy is not SelectPolicy.DISABLED
    return is_allowed and not _is_held(one) and one.desired_replicas > one.min_replicas


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
    scheduled: ScheduledBounds | None = None,
    changes: Sequence[Change] = (),
) -> Decision:
    """The decision for one set, this round; may be asked again at any time.

    `endpoints` by replica name. `scheduled`: what open schedules ask for now; None: not known, so nothing changes.
    `changes`: the set's own of at least the longest period of its policies.
    """
    if replica_set.is_paused:
        return _stay(
            replica_set,
            DecisionReason.PAUSED,
            f"paused: {replica_set.paused_reason}" if replica_set.paused_reason else "paused",
        )
    due = replica_set
    if scheduled is not None and scheduled != replica_set.scheduled:
        due = bounded(replace(replica_set, scheduled=scheduled))
    is_held_back = bool(replica_set.freezes) or replica_set.is_advisory
    if due is not replica_set and not is_held_back:
        return replace(_scheduled(replica_set, due), scheduled=due.scheduled)
    if replica_set.pin is not None:
        return _pinned(replica_set)
    if due.desired_replicas != replica_set.desired_replicas:
        wish = _scheduled(replica_set, due)
    else:
        replicas = tuple(replicas)
        starting = _starting(replicas, endpoints, now)
        wish = _wish(due, pressure, starting, _missing(due, replicas), changes, now)
    if replica_set.freezes:
        return _frozen(replica_set, wish)
    if replica_set.is_advisory and wish.changes_desired:
        advice = f"advisory: would go {wish.previous} -> {wish.desired}: {wish.explanation}"
        return replace(wish, desired=wish.previous, explanation=advice)
    return wish


def longest_period(replica_set: ReplicaSet) -> timedelta:
    """How far back `decide` needs to know the set's changes."""
    policies = (*replica_set.spec.scale_up.policies, *replica_set.spec.scale_down.policies)
    return seconds(max((policy.period_seconds for policy in policies), default=0))


def _scheduled(before: ReplicaSet, due: ReplicaSet) -> Decision:
    opened = set(due.scheduled.schedules) - set(before.scheduled.schedules)
    ended = set(before.scheduled.schedules) - set(due.scheduled.schedules)
    said = [
        f"schedule {', '.join(sorted(names))} {what}" for names, what in ((opened, "opens"), (ended, "ends")) if names
    ]
    what = "; ".join(said) or f"schedule {', '.join(due.scheduled.schedules)} has changed"
    bounds = f"{what}: bounds {due.min_replicas} to {due.max_replicas}"
    return replace(_stay(before, DecisionReason.SCHEDULED, bounds), desired=due.desired_replicas)


def _pinned(replica_set: ReplicaSet) -> Decision:
    pin = replica_set.pin
    assert pin is not None  # the caller looked
    why = f" ({pin.reason})" if pin.reason else ""
    words = f"pinned at {pin.replicas} by {pin.actor} until {_when(pin.until)}{why}"
    return _move(replica_set, pin.replicas, DecisionReason.PINNED, words)


def _frozen(replica_set: ReplicaSet, wish: Decision) -> Decision:
    freeze = replica_set.freezes[0]
    until = f" until {_when(freeze.until)}" if freeze.until is not None else ""
    why = f" ({freeze.reason})" if freeze.reason else ""
    words = f"{'all sets are ' if freeze.is_of_all else ''}frozen by {freeze.actor}{until}{why}"
    if not wish.changes_desired:
        return _stay(replica_set, DecisionReason.FROZEN, words)
    words += f"; would go {wish.previous} -> {wish.desired}: {wish.explanation}"
    return replace(wish, desired=wish.previous, reason=DecisionReason.FROZEN, explanation=words)


def _wish(
    replica_set: ReplicaSet,
    pressure: Pressure,
    starting: list[Replica],
    missing: int,
    changes: Sequence[Change],
    now: datetime,
) -> Decision:
    """What bounds and alerts ask for."""
    desired = replica_set.desired_replicas
    if desired < replica_set.min_replicas:
        return _move(replica_set, replica_set.min_replicas, DecisionReason.BELOW_MIN, "fewer than min_replicas")
    if desired > replica_set.max_replicas:
        return _move(replica_set, replica_set.max_replicas, DecisionReason.ABOVE_MAX, "more than max_replicas")
    if pressure.up:
        return _decide_up(replica_set, pressure, starting, missing, changes, now)
    if pressure.down:
        return _decide_down(replica_set, pressure, changes, now)
    return _stay(replica_set, DecisionReason.STEADY, "no alert presses")


def is_starting(replica: Replica, endpoint: Endpoint | None, now: datetime) -> bool:
    """Is help on its way? Waiting in Slurm's queue counts; loading counts until the start budget is spent."""
    if replica.phase in (Phase.PENDING, Phase.SUBMITTING, Phase.QUEUED):
        return True
    if replica.phase is not Phase.RUNNING or (endpoint is not None and endpoint.health is not Health.UNPROVEN):
        return False
    since = (endpoint.failing_since if endpoint is not None else None) or replica.phase_since
    return now - since <= seconds(replica.spec.start_timeout_seconds)


def _decide_up(
    replica_set: ReplicaSet,
    pressure: Pressure,
    starting: list[Replica],
    missing: int,
    changes: Sequence[Change],
    now: datetime,
) -> Decision:
    rules = replica_set.spec.scale_up
    desired, up, what = replica_set.desired_replicas, pressure.up, _words(pressure.up)
    if rules.select_policy is SelectPolicy.DISABLED:
        return _stay(replica_set, DecisionReason.DISABLED, f"{what}, but scale_up is Disabled", up)
    if desired >= replica_set.max_replicas:
        return _stay(replica_set, DecisionReason.AT_MAX, f"{what}, but max_replicas is {replica_set.max_replicas}", up)
    is_first = desired == 0 and any(map(held_requests.is_hold, up))
    if starting and not is_first:  # one that nobody wanted any more is wanted again by the first step
        return _stay(replica_set, DecisionReason.STARTING, f"{what}; {starting[0].name} is still starting", up)
    if pressure.is_backing_off:
        return _stay(replica_set, DecisionReason.BACKING_OFF, f"{what}, but starts fail", up)
    if missing and all(alert.source == held_requests.SOURCE for alert in up):
        return _stay(replica_set, DecisionReason.STARTING, f"{what}; {missing} more are wanted already", up)
    if is_first:
        return _move(replica_set, 1, DecisionReason.SCALED_UP, f"{what}; the first one, at once", up)
    if (left := _cooldown_left(replica_set.scaled_up_at, rules.cooldown_seconds, now)) is not None:
        return _stay(replica_set, DecisionReason.COOLDOWN, f"{what}; cooling down until {left:%H:%M:%S}", up)
    # less was asked for while fewer were desired: a step begins the window anew
    window = seconds(rules.stabilization_window_seconds)
    asked_for = {alert.key: max(alert.starts_at, replica_set.scaled_up_at or alert.starts_at) for alert in up}
    lasting = tuple(alert for alert in up if window <= timedelta(0) or now - asked_for[alert.key] >= window)
    if not lasting:
        ends = min(asked_for.values()) + window
        return _stay(replica_set, DecisionReason.STABILIZING, f"{what}; not long enough, until {ends:%H:%M:%S}", up)
    wanted = min(desired + max((alert.step or rules.step) for alert in lasting), replica_set.max_replicas)
    limit = growth_limit(rules, desired, changes, now=now)
    if limit is None or limit.count >= wanted:
        return _move(replica_set, wanted, DecisionReason.SCALED_UP, what, up)
    if limit.count > desired:
        return _move(replica_set, limit.count, DecisionReason.SCALED_UP, f"{what}; {limit.in_words()}", up)
    return _stay(replica_set, DecisionReason.LIMITED, f"{what}; {limit.in_words()}", up)


def _decide_down(replica_set: ReplicaSet, pressure: Pressure, changes: Sequence[Change], now: datetime) -> Decision:
    rules = replica_set.spec.scale_down
    desired, down, what = replica_set.desired_replicas, pressure.down, _words(pressure.down)
    if rules.select_policy is SelectPolicy.DISABLED:
        return _stay(replica_set, DecisionReason.DISABLED, f"{what}, but scale_down is Disabled", down)
    if desired <= replica_set.min_replicas:
        return _stay(
            replica_set, DecisionReason.AT_MIN, f"{what}, but min_replicas is {replica_set.min_replicas}", down
        )
    # an alert wanted more then, or an operator did, who may expect load that is not there yet
    wanted_more_at = max((at for at in (pressure.last_up_at, replica_set.scaled_up_at) if at is not None), default=None)
    window_ends = wanted_more_at and wanted_more_at + seconds(rules.stabilization_window_seconds)
    if window_ends is not None and now <= window_ends:  # up wins, even where the window has no length
        return _stay(
            replica_set,
            DecisionReason.STABILIZING,
            f"{what}; more were wanted too recently, until {window_ends:%H:%M:%S}",
            down,
        )
    if (left := _cooldown_left(replica_set.scaled_down_at, rules.cooldown_seconds, now)) is not None:
        return _stay(replica_set, DecisionReason.COOLDOWN, f"{what}; cooling down until {left:%H:%M:%S}", down)
    wanted = max(desired - max((alert.step or rules.step) for alert in down), replica_set.min_replicas)
    limit = shrink_limit(rules, desired, changes, now=now)
    if limit is None or limit.count <= wanted:
        return _move(replica_set, wanted, DecisionReason.SCALED_DOWN, what, down)
    if limit.count < desired:
        return _move(replica_set, limit.count, DecisionReason.SCALED_DOWN, f"{what}; {limit.in_words()}", down)
    return _stay(replica_set, DecisionReason.LIMITED, f"{what}; {limit.in_words()}", down)


def _cooldown_left(last: datetime | None, cooldown_seconds: int, now: datetime) -> datetime | None:
    if last is None:
        return None
    ends = last + seconds(cooldown_seconds)
    return ends if now < ends else None


def _when(time: datetime) -> str:
    return f"{time:%Y-%m-%d %H:%M} UTC"


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
