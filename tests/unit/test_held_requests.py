"""What requests that wait ask of the scaling: one replica from zero, at once, and one only."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from datetime import datetime
from typing import Any

import pytest

from controlplane.core.alerts import Ignored, Target
from controlplane.core.held_requests import GOOD_FOR, HELD, QUEUED, HeldRequests, fingerprint_of, firing
from controlplane.core.scaling import decide, help_for, presses, pressures
from controlplane.core.types import (
    Alert,
    AlertAction,
    Decision,
    DecisionReason,
    Endpoint,
    Freeze,
    Health,
    Phase,
    Replica,
    ReplicaSet,
    ScaleDown,
    ScaleUp,
    ScalingPolicy,
    SelectPolicy,
)
from controlplane.core.types import PolicyType as P
from tests.unit.worlds import NOW, a_replica, a_set, a_spec, ago, an_alert, an_endpoint

STALE_AFTER = GOOD_FOR * 30
KNOWN = {"s": Target("s", "m", is_external=False), "box": Target("box", "m-office", is_external=True)}


def waits(model: str = "m", *, held: int = 0, queued: int = 0, told_at: datetime = NOW) -> Alert:
    return firing(HeldRequests(model, held, queued, workers=1), KNOWN, starts_at=ago(60), now=told_at)


HELD_ONES, QUEUED_ONES = waits(held=200), waits(queued=9)
down = an_alert(AlertAction.SCALE_DOWN, "down", alertname="Idle")


def decided(
    replica_set: ReplicaSet,
    *alerts: Alert,
    replicas: Iterable[Replica] = (),
    endpoints: Iterable[Endpoint] = (),
    others: Iterable[ReplicaSet] = (),
    backing_off: Iterable[str] = (),
    now: datetime = NOW,
) -> Decision:
    sets, replicas = [replica_set, *others], tuple(replicas)
    by_name = {one.replica: one for one in endpoints if one.replica is not None}
    pressing = pressures(
        sets,
        alerts,
        now=now,
        stale_after=STALE_AFTER,
        backing_off=set(backing_off),
        help_there=help_for(sets, replicas, by_name, now),
    )
    own = [one for one in replicas if one.replica_set == replica_set.name]
    return decide(replica_set, pressing[replica_set.name], own, by_name, now=now)


def slow(desired: int, name: str = "s", **changes: Any) -> ReplicaSet:
    """All that may slow growth down does."""
    rules = ScaleUp(
        step=3,
        cooldown_seconds=3600,
        stabilization_window_seconds=3600,
        policies=(ScalingPolicy(P.REPLICAS, 1, 3600),),
    )
    return a_set(desired, spec=a_spec(name, scale_up=rules, **changes.pop("spec", {})), **changes)


# --- the alert ---------------------------------------------------------------------------------------------


def test_it_is_an_alert_like_any_other_that_names_a_model() -> None:
    assert (HELD_ONES.action, HELD_ONES.step, HELD_ONES.ignored_reason) == (AlertAction.SCALE_UP, 1, None)
    assert HELD_ONES.key == f"proxy/0/{fingerprint_of('m')}" == QUEUED_ONES.key
    assert HELD_ONES.values == {"held": 200, "queued": 0, "workers": 1}


def test_whoever_sees_a_queue_knows_more_than_who_sees_nothing_routable() -> None:
    assert waits(held=1, queued=1).alertname == QUEUED
    assert waits(held=1).alertname == HELD


@pytest.mark.parametrize(("model", "reason"), [("gone", Ignored.UNKNOWN_MODEL), ("m-office", Ignored.NOT_RUN_BY_SLURM)])
def test_of_a_model_that_cannot_grow_it_is_kept_and_ignored(model: str, reason: Ignored) -> None:
    assert (waits(model, held=1).action, waits(model, held=1).ignored_reason) == (None, reason)


def test_it_is_stale_soon_because_it_is_told_again_soon() -> None:
    assert presses(waits(held=1, told_at=NOW - GOOD_FOR), now=NOW, stale_after=STALE_AFTER)
    assert not presses(waits(held=1, told_at=ago(31)), now=NOW, stale_after=STALE_AFTER)
    assert not presses(waits(held=1, told_at=ago(9)), now=NOW, stale_after=GOOD_FOR / 5)


# --- from zero ---------------------------------------------------------------------------------------------


def test_the_first_replica_is_wanted_at_once_and_only_one_whatever_slows_growth_down() -> None:
    decision = decided(slow(0, scaled_up_at=ago(1), scaled_down_at=ago(1)), HELD_ONES)
    assert (decision.reason, decision.desired) == (DecisionReason.SCALED_UP, 1)
    assert decision.alerts == (HELD_ONES.key,)
    assert decision.explanation == (
        "RequestsHeld is firing (requests wait for a replica: none is routable); the first one, at once"
    )


def test_an_alert_of_grafana_keeps_to_what_slows_growth_down() -> None:
    asked = an_alert(AlertAction.SCALE_UP)
    assert decided(slow(0, scaled_up_at=ago(1)), asked).reason is DecisionReason.COOLDOWN


@pytest.mark.parametrize(
    ("replica_set", "reason"),
    [
        (slow(0, is_paused=True), DecisionReason.PAUSED),
        (slow(0, freezes=(Freeze(is_of_all=True, actor="ann", since=ago(9)),)), DecisionReason.FROZEN),
        (a_set(0, spec=a_spec(scale_up=ScaleUp(select_policy=SelectPolicy.DISABLED))), DecisionReason.DISABLED),
        (slow(0, max_replicas=0), DecisionReason.AT_MAX),
    ],
)
def test_what_operators_said_stands_above_it(replica_set: ReplicaSet, reason: DecisionReason) -> None:
    decision = decided(replica_set, HELD_ONES)
    assert (decision.reason, decision.desired) == (reason, 0)


def test_a_set_whose_starts_fail_is_not_tried_before_its_time() -> None:
    assert decided(slow(0), HELD_ONES, backing_off=["s"]).reason is DecisionReason.BACKING_OFF


def test_one_that_leaves_because_nobody_wanted_it_is_wanted_again() -> None:
    decision = decided(slow(0), HELD_ONES, replicas=[a_replica(1, Phase.QUEUED)])
    assert (decision.reason, decision.desired) == (DecisionReason.SCALED_UP, 1)


# --- and no second one -------------------------------------------------------------------------------------

EAGER = a_set(1, spec=a_spec(scale_up=ScaleUp(cooldown_seconds=0)))
running = a_replica(1, Phase.RUNNING)


@pytest.mark.parametrize("phase", [Phase.PENDING, Phase.SUBMITTING, Phase.QUEUED, Phase.RUNNING])
@pytest.mark.parametrize("alert", [HELD_ONES, QUEUED_ONES])
def test_while_one_is_on_its_way_no_second_one_is_wanted(phase: Phase, alert: Alert) -> None:
    decision = decided(EAGER, alert, replicas=[a_replica(1, phase)])
    assert (decision.reason, decision.desired) == (DecisionReason.STARTING, 1)


@pytest.mark.parametrize("alert", [HELD_ONES, QUEUED_ONES])
def test_one_that_is_wanted_and_not_made_yet_is_on_its_way(alert: Alert) -> None:
    decision = decided(EAGER, alert)
    assert (decision.reason, decision.desired) == (DecisionReason.STARTING, 1)
    assert decision.explanation.endswith("; 1 more are wanted already")


def test_a_hold_that_was_told_before_the_replica_was_ready_asks_for_nothing() -> None:
    decision = decided(EAGER, HELD_ONES, replicas=[running], endpoints=[an_endpoint(running)])
    assert (decision.reason, decision.desired) == (DecisionReason.STEADY, 1)


def test_a_queue_before_replicas_that_are_ready_asks_for_one_more_by_the_policies() -> None:
    there = {"replicas": [running], "endpoints": [an_endpoint(running)]}
    assert decided(EAGER, QUEUED_ONES, **there).desired == 2  # type: ignore[arg-type]
    cooling = replace(EAGER, spec=a_spec(scale_up=ScaleUp(cooldown_seconds=60)), scaled_up_at=ago(59))
    assert decided(cooling, QUEUED_ONES, **there).reason is DecisionReason.COOLDOWN  # type: ignore[arg-type]


def test_requests_that_are_held_though_a_replica_is_there_but_fails_bring_another_one() -> None:
    failing = an_endpoint(running, Health.FAILING)
    assert decided(EAGER, HELD_ONES, replicas=[running], endpoints=[failing]).desired == 2


def test_while_one_set_of_the_model_starts_a_replica_no_other_set_is_pressed() -> None:
    cheap = a_set(1, spec=a_spec("s", max_replicas=1, priority=1))
    dear = a_set(0, spec=a_spec("t", priority=2))
    coming = a_replica(1, Phase.QUEUED, spec=cheap.spec)
    assert decided(dear, HELD_ONES, others=[cheap]).reason is DecisionReason.STEADY, "wanted, and not made yet"
    assert decided(dear, HELD_ONES, others=[cheap], replicas=[coming]).reason is DecisionReason.STEADY
    assert decided(cheap, HELD_ONES, others=[dear], replicas=[coming]).reason is DecisionReason.AT_MAX
    assert decided(dear, HELD_ONES, others=[cheap], backing_off=["s"]).desired == 1, "its starts fail: the other one"


def test_while_one_set_serves_the_model_a_hold_that_was_told_before_presses_no_other() -> None:
    cheap = a_set(1, spec=a_spec("s", max_replicas=1, priority=1))
    dear = a_set(0, spec=a_spec("t", priority=2))
    there = a_replica(1, Phase.RUNNING, spec=cheap.spec)
    serving = {"others": [cheap], "replicas": [there], "endpoints": [an_endpoint(there)]}
    assert decided(dear, HELD_ONES, **serving).reason is DecisionReason.STEADY  # type: ignore[arg-type]
    assert decided(dear, QUEUED_ONES, **serving).desired == 1  # type: ignore[arg-type]


# --- and it stays ------------------------------------------------------------------------------------------


def test_the_fresh_replica_is_not_drained_before_the_window_after_the_hold_is_over() -> None:
    rules = ScaleDown(cooldown_seconds=0, stabilization_window_seconds=300)
    one = a_set(1, spec=a_spec(scale_down=rules), scaled_up_at=ago(900))
    there: dict[str, Any] = {"replicas": [running], "endpoints": [an_endpoint(running)]}
    ended = replace(HELD_ONES, is_firing=False, ends_at=ago(299))
    assert decided(one, down, ended, **there).reason is DecisionReason.STABILIZING
    assert decided(one, down, replace(ended, ends_at=ago(301)), **there).reason is DecisionReason.SCALED_DOWN
    abandoned = replace(HELD_ONES, refreshed_at=ago(329))  # by a proxy that was killed: felt until it was stale
    assert decided(one, down, abandoned, **there).reason is DecisionReason.STABILIZING
    assert decided(one, down, replace(abandoned, refreshed_at=ago(331)), **there).reason is DecisionReason.SCALED_DOWN
