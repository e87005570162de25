"""What operators, schedules and modes have to say beside the alerts, and whom a model's alert presses then."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from datetime import timedelta
from random import Random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from controlplane.core.bounds import bounded
from controlplane.core.scaling import pressures
from controlplane.core.types import (
    Alert,
    Change,
    DecisionReason,
    Freeze,
    Mode,
    OperatorBounds,
    Pin,
    PolicyType,
    ReplicaSet,
    ScaleDown,
    ScaleUp,
    ScalingPolicy,
    ScheduledBounds,
    SelectPolicy,
)
from tests.unit.deciding import STALE_AFTER, a_tuned, decided, down, up
from tests.unit.test_invariants import ALERTS, ALIKE
from tests.unit.worlds import NOW, a_set, a_spec, ago

DISABLED = SelectPolicy.DISABLED

frozen = Freeze(False, "ann", ago(100), "benchmark")
pinned = Pin(3, NOW + timedelta(hours=1), "ann", "demo")

# --- pins, freezes, advice --------------------------------------------------------------------------------


def test_a_pin_holds_against_alerts_and_bounds_that_schedules_ask_for() -> None:
    held = a_tuned(3)
    held = bounded(replace(held, pin=pinned))
    for alerts in ([], [up], [down], [up, down]):
        decision = decided(held, *alerts)
        assert (decision.reason, decision.desired) == (DecisionReason.PINNED, 3)
        assert decision.explanation == "pinned at 3 by ann until 2026-01-01 13:00 UTC (demo)"
    opened = decided(held, up, scheduled=ScheduledBounds(("night",), None, 1))
    assert (opened.reason, opened.desired, opened.scheduled) == (
        DecisionReason.SCHEDULED,
        3,
        ScheduledBounds(("night",), None, 1),
    )


def test_what_is_not_at_its_pin_goes_there() -> None:
    assert decided(bounded(replace(a_tuned(7), pin=pinned, desired_replicas=3)), up).desired == 3
    assert decided(replace(a_tuned(7), pin=pinned)).desired == 3


def test_a_freeze_refuses_both_directions_and_says_what_would_have_been() -> None:
    for alert, to in ((up, 4), (down, 2)):
        decision = decided(replace(a_tuned(3), freezes=(frozen,)), alert)
        assert (decision.reason, decision.desired, decision.alerts) == (DecisionReason.FROZEN, 3, (alert.key,))
        assert decision.explanation.startswith(f"frozen by ann (benchmark); would go 3 -> {to}: ")
    quiet = decided(replace(a_tuned(3), freezes=(replace(frozen, is_of_all=True, until=NOW),)))
    assert quiet.explanation == "all sets are frozen by ann until 2026-01-01 12:00 UTC (benchmark)"
    assert (quiet.reason, quiet.alerts) == (DecisionReason.FROZEN, ())


def test_a_freeze_keeps_schedules_waiting() -> None:
    decision = decided(replace(a_tuned(3), freezes=(frozen,)), scheduled=ScheduledBounds(("night",), 5, None))
    assert (decision.reason, decision.desired, decision.scheduled) == (DecisionReason.FROZEN, 3, None)
    assert "would go 3 -> 5: schedule night opens" in decision.explanation
    unmoved = decided(replace(a_tuned(3), freezes=(frozen,)), up, scheduled=ScheduledBounds(("night",), 1, 3))
    assert (unmoved.reason, unmoved.desired) == (DecisionReason.FROZEN, 3)
    assert "would go" not in unmoved.explanation  # at the max that the schedule would set


def test_advice_keeps_its_reason_and_changes_nothing() -> None:
    advisory = a_tuned(3, mode=Mode.ADVISORY)
    for alert, reason, to in ((up, DecisionReason.SCALED_UP, 4), (down, DecisionReason.SCALED_DOWN, 2)):
        decision = decided(advisory, alert)
        assert (decision.reason, decision.desired, decision.previous) == (reason, 3, 3)
        assert decision.explanation.startswith(f"advisory: would go 3 -> {to}: ")
        assert decided(advisory, alert) == decision  # nothing new to record in the next round
    night = decided(advisory, up, scheduled=ScheduledBounds(("night",), None, 1))
    assert (night.reason, night.desired, night.scheduled) == (DecisionReason.SCHEDULED, 3, None)
    assert night.explanation.startswith("advisory: would go 3 -> 1: schedule night opens")
    wider = decided(advisory, up, scheduled=ScheduledBounds(("day",), 1, None))
    assert wider.explanation.startswith("advisory: would go 3 -> 4: QueueGrows")


def test_a_pause_comes_before_all_else() -> None:
    everything = replace(a_tuned(3, mode=Mode.ADVISORY), is_paused=True, pin=pinned, freezes=(frozen,))
    assert decided(everything, up, scheduled=ScheduledBounds(("night",), 5, 5)).reason is DecisionReason.PAUSED


# --- several sets of one model ----------------------------------------------------------------------------


def siblings(**first: Any) -> list[ReplicaSet]:
    """The cheap one, changed, and a dear one; both could grow and shrink."""
    spec_changes = {name: first.pop(name) for name in ("mode", "scale_up", "scale_down") if name in first}
    cheap = a_set(1, spec=a_spec("cheap", priority=10, **spec_changes))
    return [replace(cheap, **first), a_set(1, spec=a_spec("dear", priority=30))]


def who_feels(sets: Iterable[ReplicaSet], alert: Alert, **more: Any) -> list[str]:
    found = pressures(sets, [alert], now=NOW, stale_after=STALE_AFTER, **more)
    return [name for name, pressure in found.items() if pressure.up or pressure.down]


@pytest.mark.parametrize(
    ("first", "more"),
    [
        ({"freezes": (frozen,)}, {}),
        ({"pin": replace(pinned, replicas=1)}, {}),
        ({"is_paused": True}, {}),
        ({"desired_replicas": 4}, {}),
        ({"scale_up": ScaleUp(select_policy=DISABLED)}, {}),
        ({}, {"backing_off": {"cheap"}}),
    ],
)
def test_a_set_that_cannot_grow_passes_the_pressure_on(first: dict[str, Any], more: dict[str, Any]) -> None:
    assert who_feels(siblings(), up) == ["cheap"]
    assert who_feels(siblings(**first), up, **more) == ["dear"]


def test_a_dear_set_that_cannot_shrink_passes_the_pressure_on() -> None:
    cheap, dear = siblings()
    assert who_feels([cheap, dear], down) == ["dear"]
    held = {"freezes": (frozen,)}, {"pin": pinned}, {"desired_replicas": 0}, {"is_paused": True}
    for change in held:
        assert who_feels([cheap, replace(dear, **change)], down) == ["cheap"]
    disabled = replace(dear.spec, scale_down=ScaleDown(select_policy=DISABLED))
    assert who_feels([cheap, replace(dear, spec=disabled)], down) == ["cheap"]


def test_a_set_that_advises_feels_what_it_would_and_takes_it_from_none() -> None:
    assert who_feels(siblings(mode=Mode.ADVISORY), up) == ["cheap", "dear"]
    full = siblings(mode=Mode.ADVISORY, desired_replicas=4)
    assert who_feels(full, up) == ["dear"]


def test_a_set_that_an_alert_names_is_pressed_whether_it_can_grow_or_not() -> None:
    named = replace(up, labels={"replica_set": "cheap"})
    assert who_feels(siblings(freezes=(frozen,)), named, backing_off={"cheap"}) == ["cheap"]


# --- what holds always ------------------------------------------------------------------------------------

COUNTS = st.integers(0, 6)
MAYBE_COUNT = st.none() | COUNTS
POLICIES = st.lists(
    st.builds(ScalingPolicy, st.sampled_from(PolicyType), st.integers(1, 5), st.sampled_from([15, 60, 300])), max_size=2
).map(tuple)
SELECT = st.sampled_from(SelectPolicy)
WINDOWS = st.sampled_from([0, 15, 60, 300])
UPS = st.builds(ScaleUp, st.integers(1, 4), WINDOWS, WINDOWS, POLICIES, SELECT)
DOWNS = st.builds(ScaleDown, st.integers(1, 4), WINDOWS, WINDOWS, POLICIES, SELECT)
SCHEDULED = st.builds(
    lambda low, high: ScheduledBounds(("s",) if (low, high) != (None, None) else (), low, high),
    MAYBE_COUNT,
    MAYBE_COUNT,
)
CHANGES = st.lists(
    st.builds(lambda age, before, after: Change(ago(age), before, after), st.integers(0, 400), COUNTS, COUNTS),
    max_size=4,
)


@st.composite
def worlds(draw: st.DrawFn) -> ReplicaSet:
    """A set as the database may hold one: with the bounds in force that are due."""
    low = draw(COUNTS)
    spec = a_spec(
        "a",
        min_replicas=low,
        max_replicas=low + draw(COUNTS),
        scale_up=draw(UPS),
        scale_down=draw(DOWNS),
        mode=draw(st.sampled_from(Mode)),
    )
    bounds = draw(st.none() | st.builds(OperatorBounds, st.just(1), st.integers(1, 6)))
    whole = a_set(
        draw(COUNTS),
        spec=spec,
        operator_bounds=bounds,
        scheduled=draw(SCHEDULED),
        pin=draw(st.none() | st.builds(Pin, COUNTS, st.just(NOW), st.just("ann"))),
        freezes=draw(st.sampled_from([(), (frozen,)])),
        scaled_up_at=draw(st.none() | st.integers(0, 400).map(ago)),
        scaled_down_at=draw(st.none() | st.integers(0, 400).map(ago)),
    )
    return bounded(whole)


@ALIKE
@given(one=worlds(), alerts=ALERTS, scheduled=SCHEDULED, changes=CHANGES)
def test_no_decision_leaves_the_bounds_in_force_nor_moves_what_is_held(
    one: ReplicaSet, alerts: list[Alert], scheduled: ScheduledBounds, changes: list[Change]
) -> None:
    decision = decided(one, *alerts, scheduled=scheduled, changes=changes)
    after = one if decision.scheduled is None else bounded(replace(one, scheduled=decision.scheduled))
    assert after.min_replicas <= decision.desired <= after.max_replicas
    if one.freezes or one.is_advisory:
        assert (decision.desired, decision.scheduled) == (one.desired_replicas, None)
    if one.pin is not None:
        assert decision.desired == one.pin.replicas
    if decision.scheduled is None and decision.desired > decision.previous:
        assert one.spec.scale_up.select_policy is not DISABLED
    if decision.scheduled is None and decision.desired < decision.previous:
        assert one.spec.scale_down.select_policy is not DISABLED


@ALIKE
@given(one=worlds(), alerts=ALERTS, scheduled=SCHEDULED, changes=CHANGES, seed=st.integers(0, 2**16))
def test_neither_the_order_of_alerts_nor_that_of_changes_decides_anything(
    one: ReplicaSet, alerts: list[Alert], scheduled: ScheduledBounds, changes: list[Change], seed: int
) -> None:
    first = decided(one, *alerts, scheduled=scheduled, changes=changes)
    rng = Random(seed)
    rng.shuffle(alerts)
    rng.shuffle(changes)
    assert decided(one, *alerts, scheduled=scheduled, changes=changes) == first
