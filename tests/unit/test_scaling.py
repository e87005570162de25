"""How many replicas a set shall have: every reason, and whom an alert presses."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest

from controlplane.core.scaling import Pressure, decide, is_starting, presses, pressures
from controlplane.core.types import (
    Alert,
    AlertAction,
    Decision,
    DecisionReason,
    Endpoint,
    ExternalEndpoint,
    Health,
    Phase,
    Replica,
    ReplicaSet,
    ScaleDown,
    ScaleUp,
)
from tests.unit.worlds import NOW, a_replica, a_set, a_spec, ago, an_alert, an_endpoint

STALE_AFTER = timedelta(minutes=15)
UP, DOWN, REPLACE = AlertAction.SCALE_UP, AlertAction.SCALE_DOWN, AlertAction.REPLACE
EXISTING = (Phase.PENDING, Phase.SUBMITTING, Phase.QUEUED)

up, down = an_alert(UP, "up"), an_alert(DOWN, "down", alertname="Idle")
resolved_up = replace(up, is_firing=False, ends_at=ago(100))


def pressed(*alerts: Alert, sets: Iterable[ReplicaSet]) -> dict[str, Pressure]:
    return pressures(sets, alerts, now=NOW, stale_after=STALE_AFTER)


def decided(
    replica_set: ReplicaSet, *alerts: Alert, replicas: Iterable[Replica] = (), endpoints: Iterable[Endpoint] = ()
) -> Decision:
    by_name = {one.replica: one for one in endpoints if one.replica is not None}
    pressure = pressed(*alerts, sets=[replica_set])[replica_set.name]
    return decide(replica_set, pressure, replicas, by_name, now=NOW)


def tame(desired: int, *, step_up: int = 1, step_down: int = 1, window: int = 300, **changes: Any) -> ReplicaSet:
    """Between 1 and 4 replicas; cooldowns of 60 s up and 120 s down."""
    spec = a_spec(
        min_replicas=1,
        scale_up=ScaleUp(step=step_up, cooldown_seconds=60),
        scale_down=ScaleDown(step=step_down, cooldown_seconds=120, stabilization_window_seconds=window),
    )
    return a_set(desired, spec=spec, **changes)


# --- every reason ------------------------------------------------------------------------------------------

EVERY_REASON = [
    (DecisionReason.STEADY, tame(2), [], 2),
    (DecisionReason.STEADY, tame(2), [resolved_up], 2),
    (DecisionReason.PAUSED, tame(2, is_paused=True, paused_reason="upkeep"), [up], 2),
    (DecisionReason.PAUSED, tame(0, is_paused=True), [], 0),
    (DecisionReason.BELOW_MIN, tame(0), [], 1),
    (DecisionReason.BELOW_MIN, tame(0), [down], 1),
    (DecisionReason.ABOVE_MAX, tame(6), [], 4),
    (DecisionReason.ABOVE_MAX, tame(6), [up], 4),
    (DecisionReason.SCALED_UP, tame(2), [up], 3),
    (DecisionReason.SCALED_UP, tame(2, step_up=2), [up], 4),
    (DecisionReason.SCALED_UP, tame(3, step_up=2), [up], 4),  # never beyond max
    (DecisionReason.SCALED_UP, tame(1), [replace(up, step=3)], 4),  # the alert's own step
    (DecisionReason.SCALED_UP, tame(1), [up, an_alert(UP, "more", step=2)], 3),  # the largest of several, no sum
    (DecisionReason.SCALED_UP, tame(2), [up, down], 3),  # up wins
    (DecisionReason.SCALED_UP, tame(2, scaled_up_at=ago(60)), [up], 3),
    (DecisionReason.SCALED_UP, tame(2, scaled_down_at=ago(1)), [up], 3),
    (DecisionReason.COOLDOWN, tame(2, scaled_up_at=ago(59)), [up], 2),
    (DecisionReason.AT_MAX, tame(4), [up], 4),
    (DecisionReason.AT_MAX, tame(4), [up, down], 4),  # up still wins
    (DecisionReason.SCALED_DOWN, tame(3), [down], 2),
    (DecisionReason.SCALED_DOWN, tame(3, step_down=5), [down], 1),  # never below min
    (DecisionReason.SCALED_DOWN, tame(4), [replace(down, step=2)], 2),
    (DecisionReason.SCALED_DOWN, tame(3, scaled_down_at=ago(120)), [down], 2),
    (DecisionReason.STABILIZING, tame(3, scaled_up_at=ago(1)), [down], 3),  # an operator wanted more
    (DecisionReason.SCALED_DOWN, tame(3, window=99), [down, resolved_up], 2),
    (DecisionReason.COOLDOWN, tame(3, scaled_down_at=ago(119)), [down], 3),
    (DecisionReason.STABILIZING, tame(3), [down, resolved_up], 3),
    (DecisionReason.STABILIZING, tame(3, window=100), [down, resolved_up], 3),
    (DecisionReason.AT_MIN, tame(1), [down], 1),
]


@pytest.mark.parametrize(("reason", "replica_set", "alerts", "desired"), EVERY_REASON)
def test_each_situation_has_one_decision(
    reason: DecisionReason, replica_set: ReplicaSet, alerts: list[Alert], desired: int
) -> None:
    decision = decided(replica_set, *alerts)
    assert (decision.reason, decision.desired, decision.previous) == (reason, desired, replica_set.desired_replicas)


def test_every_reason_is_tested() -> None:
    elsewhere = {DecisionReason.STARTING, DecisionReason.OPERATOR}  # below; and never decided, only recorded
    elsewhere |= {DecisionReason.LIMITED, DecisionReason.DISABLED}  # test_policies
    elsewhere |= {DecisionReason.SCHEDULED, DecisionReason.PINNED, DecisionReason.FROZEN}  # test_steering
    elsewhere |= {DecisionReason.BACKING_OFF}  # below, and with the back-off
    assert {reason for reason, *_ in EVERY_REASON} | elsewhere == set(DecisionReason)


def test_a_decision_names_the_alerts_that_pressed_and_what_they_said() -> None:
    said = replace(up, annotations={"summary": "12 requests wait"})
    decision = decided(tame(2), said, down, an_alert(UP, "also"))
    assert decision.alerts == ("grafana/1/also", "grafana/1/up")
    assert decision.explanation == "QueueGrows is firing; QueueGrows is firing (12 requests wait)"


def test_a_decision_without_pressure_names_no_alert() -> None:
    assert decided(tame(2), resolved_up).alerts == ()


# --- the pending guard -------------------------------------------------------------------------------------

running, budget = a_replica(1, Phase.RUNNING), a_spec().start_timeout_seconds


@pytest.mark.parametrize(
    ("replica", "endpoint", "starts"),
    [
        *((a_replica(1, phase, phase_since=ago(9999)), None, True) for phase in EXISTING),  # the queue is not our fault
        *((a_replica(1, phase), None, False) for phase in (Phase.DRAINING, Phase.STOPPING, Phase.ENDED)),
        (replace(running, phase_since=ago(budget)), None, True),
        (replace(running, phase_since=ago(budget + 1)), None, False),
        (running, an_endpoint(running, Health.UNPROVEN), True),
        (running, an_endpoint(running, Health.UNPROVEN, failing_since=ago(budget)), True),
        (running, an_endpoint(running, Health.UNPROVEN, failing_since=ago(budget + 1)), False),
        (running, an_endpoint(running, Health.READY), False),
        (running, an_endpoint(running, Health.FAILING), False),
    ],
)
def test_a_replica_is_starting_until_it_is_proven_or_its_budget_is_spent(
    replica: Replica, endpoint: Endpoint | None, starts: bool
) -> None:
    assert is_starting(replica, endpoint, NOW) is starts


def test_a_job_that_slurm_started_again_is_starting_again() -> None:
    """Its endpoint was ready once, and has to prove itself from the start."""
    again = an_endpoint(running, Health.UNPROVEN, first_ready_at=ago(5000), failing_since=ago(10))
    assert is_starting(running, again, NOW)


def test_no_step_up_is_taken_while_one_is_starting() -> None:
    decision = decided(tame(2), up, replicas=[a_replica(7, Phase.QUEUED)])
    assert (decision.reason, decision.desired) == (DecisionReason.STARTING, 2)
    assert "cp-s-7" in decision.explanation


def test_a_successor_that_is_starting_beside_its_predecessor_is_no_help_on_its_way() -> None:
    old, successor = a_replica(6, Phase.RUNNING), a_replica(7, Phase.QUEUED, succeeds=6)
    beside = decided(tame(2), up, replicas=[old, successor], endpoints=[an_endpoint(old)])
    assert beside.reason is DecisionReason.SCALED_UP
    assert decided(tame(2), up, replicas=[successor]).reason is DecisionReason.STARTING


def test_a_step_down_does_not_wait_for_one_that_is_starting() -> None:
    assert decided(tame(3), down, replicas=[a_replica(7, Phase.QUEUED)]).reason is DecisionReason.SCALED_DOWN


def test_a_set_at_its_max_says_so_even_while_one_is_starting() -> None:
    assert decided(tame(4), up, replicas=[a_replica(7, Phase.QUEUED)]).reason is DecisionReason.AT_MAX


# --- a set whose starts fail ---------------------------------------------------------------------------------


@pytest.mark.parametrize("labels", [{"model": "m"}, {"replica_set": "s"}])
def test_a_set_in_back_off_does_not_grow_though_none_else_can_take_the_pressure(labels: dict[str, str]) -> None:
    asking = replace(up, labels=labels)
    (pressure,) = pressures([tame(2)], [asking], now=NOW, stale_after=STALE_AFTER, backing_off={"s"}).values()
    decision = decide(tame(2), pressure, [], {}, now=NOW)
    assert (decision.reason, decision.desired) == (DecisionReason.BACKING_OFF, 2)
    assert (decision.explanation, decision.alerts) == ("QueueGrows is firing, but starts fail", (asking.key,))
    assert decide(tame(4), pressure, [], {}, now=NOW).reason is DecisionReason.AT_MAX
    trying = decide(tame(2), pressure, [a_replica(7, Phase.QUEUED)], {}, now=NOW)
    assert trying.reason is DecisionReason.STARTING


def test_a_set_in_back_off_shrinks_all_the_same() -> None:
    (pressure,) = pressures([tame(3)], [down], now=NOW, stale_after=STALE_AFTER, backing_off={"s"}).values()
    assert decide(tame(3), pressure, [], {}, now=NOW).reason is DecisionReason.SCALED_DOWN


# --- alerts are levels -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("alert", "does"),
    [
        (up, True),
        (replace(up, refreshed_at=NOW - STALE_AFTER), True),
        (replace(up, refreshed_at=NOW - STALE_AFTER - timedelta(seconds=1)), False),
        (resolved_up, False),
        (an_alert(None, ignored_reason="not_ours"), False),
    ],
)
def test_an_alert_presses_while_it_fires_is_fresh_and_asks_for_something(alert: Alert, does: bool) -> None:
    assert presses(alert, now=NOW, stale_after=STALE_AFTER) is does


@pytest.mark.parametrize("alert", [up, down])
def test_a_stale_alert_presses_nothing(alert: Alert) -> None:
    stale = replace(alert, refreshed_at=NOW - STALE_AFTER - timedelta(seconds=1))
    assert decided(tame(2), stale).reason is DecisionReason.STEADY


def test_a_resolved_alert_alone_never_scales_down_however_long_ago() -> None:
    for age in (1, 1000, 100_000):
        gone = [replace(alert, is_firing=False, ends_at=ago(age), refreshed_at=ago(age)) for alert in (up, down)]
        assert not decided(tame(4), *gone).changes_desired


@pytest.mark.parametrize("copies", [1, 3])
@pytest.mark.parametrize("alert", [up, down])
def test_the_same_alert_many_times_is_one_step(alert: Alert, copies: int) -> None:
    assert abs(decided(tame(2), *[alert] * copies).desired - 2) == 1


def test_up_pressure_that_went_stale_was_felt_until_it_did() -> None:
    stale = replace(up, refreshed_at=NOW - STALE_AFTER - timedelta(seconds=200))
    assert decided(tame(3, window=200), down, stale).reason is DecisionReason.STABILIZING
    assert decided(tame(3, window=199), down, stale).reason is DecisionReason.SCALED_DOWN


def test_down_pressure_keeps_no_window_open() -> None:
    gone = replace(down, fingerprint="gone", is_firing=False, ends_at=ago(1))
    assert decided(tame(3), down, gone).reason is DecisionReason.SCALED_DOWN


# --- whom an alert presses ---------------------------------------------------------------------------------


def sibling(name: str, priority: int, desired: int, **changes: Any) -> ReplicaSet:
    return a_set(desired, spec=a_spec(name, priority=priority, min_replicas=1, max_replicas=3), **changes)


def who_feels(kind: str, *alerts: Alert, sets: Iterable[ReplicaSet]) -> list[str]:
    return [name for name, pressure in pressed(*alerts, sets=sets).items() if getattr(pressure, kind)]


@pytest.mark.parametrize(
    ("desired", "grows", "shrinks"),
    [  # of cheap, middle, dear; each between 1 and 3
        ((1, 1, 1), "cheap", "cheap"),  # nobody can shrink: the cheapest says AT_MIN
        ((2, 1, 1), "cheap", "cheap"),
        ((3, 1, 1), "middle", "cheap"),
        ((3, 2, 1), "middle", "middle"),
        ((3, 3, 2), "dear", "dear"),
        ((1, 1, 2), "cheap", "dear"),
        ((3, 3, 3), "dear", "dear"),  # nobody can grow: the dearest says AT_MAX
    ],
)
def test_an_alert_on_a_model_grows_the_cheapest_and_shrinks_the_dearest_set(
    desired: tuple[int, int, int], grows: str, shrinks: str
) -> None:
    names = (("middle", 20), ("dear", 30), ("cheap", 10))
    counts = dict(zip(("cheap", "middle", "dear"), desired, strict=True))
    sets = [sibling(name, priority, counts[name]) for name, priority in names]
    assert who_feels("up", up, sets=sets) == [grows]
    assert who_feels("down", down, sets=sets) == [shrinks]


def test_sets_of_one_priority_are_taken_by_name() -> None:
    sets = [sibling("b", 10, 1), sibling("a", 10, 1)]
    assert who_feels("up", up, sets=sets) == ["a"]


def test_a_paused_set_is_passed_over() -> None:
    sets = [sibling("cheap", 10, 1, is_paused=True), sibling("dear", 30, 1)]
    assert who_feels("up", up, sets=sets) == ["dear"]
    assert who_feels("up", up, sets=[replace(one, is_paused=True) for one in sets]) == []


def test_another_models_set_feels_nothing() -> None:
    other = a_set(1, spec=a_spec("other", model="another"))
    assert who_feels("up", up, sets=[other]) == []


def test_an_external_set_feels_nothing() -> None:
    external = a_set(0, spec=a_spec(slurm=None, endpoints=(ExternalEndpoint("http://10.0.0.7:8000"),)))
    assert pressed(up, sets=[external]) == {}


def test_an_alert_on_a_set_presses_that_set_whatever_its_priority_and_room() -> None:
    sets = [sibling("cheap", 10, 1), sibling("dear", 30, 3)]
    meant = replace(up, labels={"model": "m", "replica_set": "dear"})
    assert who_feels("up", meant, sets=sets) == ["dear"]


def test_an_empty_label_is_an_absent_one() -> None:
    meant = replace(up, labels={"model": "m", "replica_set": ""})
    assert who_feels("up", meant, sets=[a_set()]) == ["s"]


def test_a_replace_alert_presses_the_set_of_its_replica_only() -> None:
    alert = an_alert(REPLACE, labels={"replica": "cp-a-b-7", "model": "m"})
    sets = [a_set(1, spec=a_spec(name)) for name in ("a", "a-b", "b")]
    assert who_feels("replace", alert, sets=sets) == ["a-b"]
    assert who_feels("replace", replace(alert, is_firing=False), sets=sets) == []


@pytest.mark.parametrize("window", [0, 300])
def test_up_on_one_set_keeps_its_sibling_of_the_same_model_from_shrinking(window: int) -> None:
    """The model needs more: it presses the cheap set up, and must not let the dear one go at the same moment."""
    policy = ScaleDown(stabilization_window_seconds=window)
    cheap = a_set(1, spec=a_spec("cheap", priority=10, scale_down=policy))
    dear = a_set(3, spec=a_spec("dear", priority=30, scale_down=policy))
    pressure = pressed(up, down, sets=[cheap, dear])
    assert decide(cheap, pressure["cheap"], [], {}, now=NOW).reason is DecisionReason.SCALED_UP
    assert decide(dear, pressure["dear"], [], {}, now=NOW).reason is DecisionReason.STABILIZING


def test_what_an_operator_asked_for_a_moment_ago_is_not_undone_by_an_alert_that_stands() -> None:
    raised = tame(3, scaled_up_at=ago(10))
    assert decided(raised, down).reason is DecisionReason.STABILIZING
    assert decided(replace(raised, scaled_up_at=ago(301)), down).reason is DecisionReason.SCALED_DOWN
