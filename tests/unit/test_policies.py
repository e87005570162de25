"""Policies and windows: how far and how often alerts may change a set."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from datetime import timedelta
from random import Random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from controlplane.core.policies import growth_limit, shrink_limit
from controlplane.core.scaling import longest_period
from controlplane.core.types import (
    Alert,
    AlertAction,
    Change,
    DecisionReason,
    PolicyType,
    ReplicaSet,
    ScaleDown,
    ScaleUp,
    ScalingPolicy,
    SelectPolicy,
)
from tests.unit.deciding import a_tuned, decided, down, up
from tests.unit.test_invariants import ALIKE
from tests.unit.worlds import NOW, a_set, ago, an_alert

MAX, MIN, DISABLED = SelectPolicy


def replicas(value: int, period: int = 60) -> ScalingPolicy:
    return ScalingPolicy(PolicyType.REPLICAS, value, period)


def percent(value: int, period: int = 60) -> ScalingPolicy:
    return ScalingPolicy(PolicyType.PERCENT, value, period)


def grown(seconds_ago: int, by: int = 1) -> Change:
    return Change(ago(seconds_ago), 1, 1 + by)


def shrunk(seconds_ago: int, by: int = 1) -> Change:
    return Change(ago(seconds_ago), 10, 10 - by)


# --- how far a policy lets go -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("policy", "current", "changes", "most"),
    [
        (replicas(4), 3, [], 7),
        (replicas(4), 5, [grown(59, 2)], 7),
        (replicas(4), 5, [grown(60, 2)], 9),  # a period ends now and begins after that change
        (replicas(4), 7, [grown(10, 4)], 7),
        (replicas(4), 9, [grown(10, 6)], 7),  # an operator went further
        (replicas(4), 3, [shrunk(10, 2)], 9),  # five at first, of which two went
        (percent(100), 3, [], 6),
        (percent(50), 3, [], 5),  # rounded up
        (percent(10), 1, [], 2),
        (percent(100), 0, [], 1),  # else nothing could ever grow from zero
        (percent(100), 6, [grown(10, 3)], 6),
        (percent(100), 4, [grown(30, 1), grown(20, 1)], 4),
    ],
)
def test_a_policy_allows_growth_from_the_count_at_its_periods_beginning(
    policy: ScalingPolicy, current: int, changes: list[Change], most: int
) -> None:
    limit = growth_limit(ScaleUp(policies=(policy,)), current, changes, now=NOW)
    assert limit is not None
    assert limit.count == most


@pytest.mark.parametrize(
    ("policy", "current", "changes", "least"),
    [
        (replicas(2), 5, [], 3),
        (replicas(2), 1, [], 0),
        (replicas(2), 4, [shrunk(10)], 3),
        (replicas(2), 3, [shrunk(10, 2)], 3),
        (replicas(2), 3, [shrunk(60, 2)], 1),
        (percent(50), 3, [], 1),  # as Kubernetes: of three, half is one and a half, and one is left
        (percent(10), 20, [], 18),
        (percent(10), 3, [], 2),  # one at least
        (percent(10), 18, [shrunk(10, 2)], 18),
        (percent(50), 5, [grown(10, 2)], 1),  # three at first
    ],
)
def test_a_policy_allows_shrinking_from_the_count_at_its_periods_beginning(
    policy: ScalingPolicy, current: int, changes: list[Change], least: int
) -> None:
    limit = shrink_limit(ScaleDown(policies=(policy,)), current, changes, now=NOW)
    assert limit is not None
    assert limit.count == least


@pytest.mark.parametrize(("select", "most", "least"), [(MAX, 20, 5), (MIN, 12, 8)])
def test_of_several_policies_the_largest_or_the_smallest_change_is_allowed(
    select: SelectPolicy, most: int, least: int
) -> None:
    both: Any = {"policies": (replicas(2), percent(100 if select is MAX else 50)), "select_policy": select}
    limit = growth_limit(ScaleUp(**both), 10, [], now=NOW)
    assert limit is not None
    assert limit.count == most
    both["policies"] = (replicas(2), percent(50))
    limit = shrink_limit(ScaleDown(**both), 10, [], now=NOW)
    assert limit is not None
    assert limit.count == least


def test_without_policies_nothing_is_limited() -> None:
    assert growth_limit(ScaleUp(), 3, [grown(1, 100)], now=NOW) is None
    assert shrink_limit(ScaleDown(), 3, [shrunk(1, 100)], now=NOW) is None
    assert longest_period(a_set()) == timedelta(0)


def test_changes_are_asked_for_as_far_back_as_the_longest_period() -> None:
    tuned = a_tuned(1, scale_up={"policies": (replicas(1, 30),)}, scale_down={"policies": (replicas(1, 600),)})
    assert longest_period(tuned) == timedelta(seconds=600)


# --- what decisions make of it ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("replica_set", "alerts", "changes", "reason", "desired", "said"),
    [
        (a_tuned(3, scale_up={"step": 9, "policies": (replicas(4),)}), [up], [], "SCALED_UP", 7, "4 replicas in 60 s"),
        (a_tuned(3, scale_up={"step": 2, "policies": (replicas(4),)}), [up], [], "SCALED_UP", 5, "is firing"),
        (a_tuned(7, scale_up={"policies": (replicas(4),)}), [up], [grown(10, 4)], "LIMITED", 7, "until 12:00:50"),
        (a_tuned(9, scale_up={"policies": (replicas(4),)}), [up], [grown(10, 6)], "LIMITED", 9, "allows 7"),
        (a_tuned(6, scale_up={"policies": (percent(100),)}), [up], [grown(10, 3)], "LIMITED", 6, "100% in 60 s"),
        (a_tuned(3, scale_up={"select_policy": DISABLED}), [up], [], "DISABLED", 3, "scale_up is Disabled"),
        (a_tuned(9, scale_down={"step": 9, "policies": (replicas(2),)}), [down], [], "SCALED_DOWN", 7, "2 replicas"),
        (a_tuned(7, scale_down={"policies": (replicas(2),)}), [down], [shrunk(10, 2)], "LIMITED", 7, "allows 7"),
        (a_tuned(3, scale_down={"select_policy": DISABLED}), [down], [], "DISABLED", 3, "scale_down is Disabled"),
    ],
)
def test_a_decision_says_which_policy_cut_or_refused_it(
    replica_set: ReplicaSet, alerts: list[Alert], changes: list[Change], reason: str, desired: int, said: str
) -> None:
    decision = decided(replica_set, *alerts, changes=changes)
    assert (decision.reason, decision.desired) == (reason, desired)
    assert said in decision.explanation
    assert decision.alerts == (alerts[0].key,)


def test_up_still_wins_over_down_where_up_is_disabled() -> None:
    assert decided(a_tuned(3, scale_up={"select_policy": DISABLED}), up, down).desired == 3


def test_growing_waits_until_one_alert_has_pressed_for_the_whole_window() -> None:
    tuned = a_tuned(3, scale_up={"stabilization_window_seconds": 60})
    young, old = replace(up, starts_at=ago(59)), replace(up, starts_at=ago(60))
    refused = decided(tuned, young)
    assert (refused.reason, refused.desired) == (DecisionReason.STABILIZING, 3)
    assert "until 12:00:01" in refused.explanation
    assert decided(tuned, old).desired == 4
    greedy = an_alert(AlertAction.SCALE_UP, "greedy", starts_at=ago(1), step=5)
    assert decided(tuned, old, greedy).desired == 4  # what it wants was not wanted for so long


def test_a_step_up_begins_the_window_anew_because_less_was_asked_for_before_it() -> None:
    tuned = a_tuned(3, scale_up={"stabilization_window_seconds": 60})
    old = replace(up, starts_at=ago(600))
    assert decided(replace(tuned, scaled_up_at=ago(59)), old).reason is DecisionReason.STABILIZING
    assert decided(replace(tuned, scaled_up_at=ago(60)), old).desired == 4


def test_without_a_window_an_alert_of_a_sender_whose_clock_is_ahead_presses_at_once() -> None:
    assert decided(a_tuned(3), replace(up, starts_at=NOW + timedelta(seconds=30))).desired == 4


# --- lives ---------------------------------------------------------------------------------------------


def lived(one: ReplicaSet, trace: Sequence[tuple[bool, bool]], *, tick: int = 15) -> list[Change]:
    """What a set does while two alerts fire and resolve, a sample each tick; its clock is that of the changes."""
    changes: list[Change] = []
    since: dict[str, Any] = {}
    ended: dict[str, Any] = {}
    for number, firing in enumerate(trace):
        now = NOW + timedelta(seconds=number * tick)
        alerts = []
        for alert, fires in zip((up, down), firing, strict=True):
            if fires:
                since.setdefault(alert.key, now)
                alerts.append(replace(alert, starts_at=since[alert.key], refreshed_at=now))
            else:
                if since.pop(alert.key, None) is not None:
                    ended[alert.key] = now
                if alert.key in ended:
                    at = ended[alert.key]
                    alerts.append(replace(alert, is_firing=False, ends_at=at, refreshed_at=at))
        decision = decided(one, *alerts, changes=changes, now=now)
        if decision.changes_desired:
            changes.append(Change(now, decision.previous, decision.desired))
            stamp: Any = {"scaled_up_at" if decision.desired > decision.previous else "scaled_down_at": now}
            one = replace(one, desired_replicas=decision.desired, **stamp)
    return changes


@ALIKE
@given(
    policy=st.builds(ScalingPolicy, st.sampled_from(PolicyType), st.integers(1, 60), st.sampled_from([15, 60, 100])),
    step=st.integers(1, 5),
    start=st.integers(0, 8),
    trace=st.lists(st.tuples(st.booleans(), st.booleans()), max_size=60),
)
def test_the_net_change_within_a_period_never_exceeds_the_policy(
    policy: ScalingPolicy, step: int, start: int, trace: list[tuple[bool, bool]]
) -> None:
    rules = {"step": step, "policies": (policy,)}
    one = a_tuned(start, scale_up=rules, scale_down=rules)
    changes = lived(one, trace)
    for number, change in enumerate(changes):
        within = [
            each for each in changes[: number + 1] if change.at - each.at < timedelta(seconds=policy.period_seconds)
        ]
        at_first = within[0].previous
        may = policy.value if policy.type is PolicyType.REPLICAS else max(1, -(-at_first * policy.value // 100))
        if change.desired > change.previous:
            assert change.desired <= at_first + may
        else:
            assert change.desired >= at_first - may


@ALIKE
@given(seed=st.integers(0, 2**32))
def test_an_hour_of_noise_changes_the_count_at_most_once_in_a_window(seed: int) -> None:
    """Load that jumps by 30 % each 15 s around what three replicas take, with thresholds well inside."""
    window = 300
    rng = Random(seed)
    load = [3 * rng.uniform(0.7, 1.3) for _ in range(240)]
    one = a_tuned(
        3,
        scale_up={"stabilization_window_seconds": window},
        scale_down={"stabilization_window_seconds": window, "cooldown_seconds": window},
    )
    changes = lived(one, [(each > 3.1, each < 2.9) for each in load])
    gaps = [after.at - before.at for before, after in itertools.pairwise(changes)]
    assert all(gap >= timedelta(seconds=window) for gap in gaps)


@ALIKE
@given(trace=st.lists(st.tuples(st.booleans(), st.booleans()), min_size=60, max_size=240))
def test_no_trace_at_all_changes_the_count_twice_in_a_window(trace: list[tuple[bool, bool]]) -> None:
    window = 120
    rules = {"stabilization_window_seconds": window, "cooldown_seconds": window}
    changes = lived(a_tuned(3, scale_up={**rules, "cooldown_seconds": 0}, scale_down=rules), trace)
    gaps = [after.at - before.at for before, after in itertools.pairwise(changes)]
    assert all(gap >= timedelta(seconds=window) for gap in gaps)


def test_noise_without_windows_does_change_the_count() -> None:
    """So that the tests above do not hold for want of pressure."""
    assert len(lived(a_tuned(3), [(number % 2 == 0, number % 2 == 1) for number in range(20)])) == 10
    lasting = lived(a_tuned(3, scale_up={"stabilization_window_seconds": 300}), [(True, False)] * 240)
    assert [change.desired for change in lasting][:3] == [4, 5, 6]
