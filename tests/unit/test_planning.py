"""What shall be done for one set: whom to let go, how a drain ends, what a roll may cost, when to try again."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from datetime import datetime, timedelta
from typing import Any

import pytest

from controlplane.core.back_off import explained
from controlplane.core.planning import PlanRules, Scene, back_off, idle_since, let_go, plan
from controlplane.core.reservations import Closing
from controlplane.core.types import (
    Action,
    Create,
    Decision,
    DecisionReason,
    Endpoint,
    Health,
    Move,
    PastReplica,
    Phase,
    Reason,
    Replica,
    Report,
    Submit,
)
from tests.unit.worlds import NOW, a_past, a_replica, a_scene, a_set, a_spec, ago, an_endpoint

RULES = PlanRules(
    drain_settle=timedelta(seconds=2), first_back_off=timedelta(seconds=10), longest_back_off=timedelta(minutes=10)
)
OLD = a_spec(image="zero.sif")  # not the spec in force

PENDING, SUBMITTING, QUEUED = Phase.PENDING, Phase.SUBMITTING, Phase.QUEUED
RUNNING, DRAINING, STOPPING, ENDED = Phase.RUNNING, Phase.DRAINING, Phase.STOPPING, Phase.ENDED


def planned(scene: Scene, *, now: datetime = NOW) -> list[Action]:
    return plan(scene, now=now, rules=RULES)


def in_words(actions: Iterable[Action]) -> list[str]:
    """`create`, `submit 1`, `1 DRAINING SCALED_DOWN`, `report`."""

    def words(action: Action) -> str:
        match action:
            case Create():
                return "create"
            case Submit(replica):
                return f"submit {replica.id}"
            case Move(replica, to, reason):
                return f"{replica.id} {to}" + (f" {reason}" if reason else "")
            case Report():
                return "report"
            case _:
                raise AssertionError(f"a plan has no {action}")

    return [words(action) for action in actions]


def said(scene: Scene, *, now: datetime = NOW) -> list[str]:
    return in_words(planned(scene, now=now))


def many(phase: Phase, *numbers: int, **changes: Any) -> list[Replica]:
    return [a_replica(number, phase, **changes) for number in numbers]


def starting(replica: Replica) -> Endpoint:
    return an_endpoint(replica, Health.UNPROVEN)


# --- the count ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("desired", "phases", "says"),
    [
        (0, [], []),
        (2, [], ["create", "create"]),
        (1, [PENDING], ["submit 1"]),
        (1, [SUBMITTING], []),
        (1, [QUEUED], []),
        (1, [RUNNING], []),
        (2, [RUNNING], ["create"]),
        (1, [DRAINING, RUNNING], []),
        (1, [STOPPING], ["create"]),
        (1, [ENDED], ["create"]),
        (0, [PENDING], ["1 ENDED SCALED_DOWN"]),
        (0, [SUBMITTING], []),  # has to be waited for
        (0, [QUEUED], ["1 STOPPING SCALED_DOWN"]),
        (0, [RUNNING], ["1 DRAINING SCALED_DOWN"]),
        (0, [DRAINING], []),
        (0, [STOPPING], []),
    ],
)
def test_what_is_missing_is_created_and_what_is_too_many_leaves(
    desired: int, phases: list[Phase], says: list[str]
) -> None:
    replicas = [a_replica(number, phase) for number, phase in enumerate(phases, 1)]
    past_settling = {one.name: an_endpoint(one, running=1) for one in replicas if one.phase is DRAINING}
    assert said(a_scene(a_set(desired), replicas, past_settling.values())) == says


def test_a_paused_set_wants_nothing_and_forgets_nothing() -> None:
    paused = a_set(2, is_paused=True)
    assert said(a_scene(paused, [*many(RUNNING, 1, 2), *many(PENDING, 3)])) == [
        "3 ENDED SCALED_DOWN",
        "2 DRAINING SCALED_DOWN",
        "1 DRAINING SCALED_DOWN",
    ]


def test_live_jobs_never_exceed_max_and_surge() -> None:
    leaving = many(STOPPING, 1, 2, 3)
    assert said(a_scene(a_set(4), leaving)) == ["create", "create"]  # 3 + 2 = max 4 + surge 1
    assert said(a_scene(a_set(4), [*leaving, *many(RUNNING, 4, 5)])) == []


def test_nothing_more_than_max_exists_whatever_is_desired() -> None:
    assert said(a_scene(a_set(9), [])) == ["create"] * 4


# --- whom to let go ----------------------------------------------------------------------------------------


def who_leaves(replicas: list[Replica], endpoints: Iterable[Endpoint] = (), **of_the_scene: Any) -> list[int]:
    """In order, as desired falls from all to none."""
    left: list[int] = []
    for desired in range(len(replicas) - 1, -1, -1):
        whole = a_spec(max_replicas=len(replicas))
        actions = planned(a_scene(a_set(desired, spec=whole), replicas, endpoints, **of_the_scene))
        left += [one.replica.id for one in actions if isinstance(one, Move) and one.replica.id not in left]
    return left


def test_those_leave_first_that_cost_least() -> None:
    serving, loading, failing = many(RUNNING, 1, 2, 3)
    replicas = [serving, loading, failing, *many(QUEUED, 4), *many(PENDING, 5)]
    endpoints = [an_endpoint(serving), starting(loading), an_endpoint(failing, Health.FAILING)]
    assert who_leaves(replicas, endpoints) == [5, 4, 3, 2, 1]


def test_a_replica_being_submitted_is_waited_for_rather_than_a_better_one_let_go() -> None:
    assert said(a_scene(a_set(1), [*many(SUBMITTING, 1), *many(RUNNING, 2)])) == []


def test_of_those_that_serve_the_one_with_the_fewest_requests_leaves_first() -> None:
    replicas = many(RUNNING, 1, 2, 3)
    load = {1: (2, 1), 2: (0, 2), 3: (4, 0)}
    endpoints = [an_endpoint(one, running=load[one.id][0], waiting=load[one.id][1]) for one in replicas]
    assert who_leaves(replicas, endpoints) == [2, 1, 3]


def test_of_those_with_as_many_requests_the_one_with_the_least_walltime_leaves_first() -> None:
    replicas = many(RUNNING, 1, 2, 3)
    ends_at = {"cp-s-1": ago(-500), "cp-s-2": ago(-100)}  # of the third no end is known
    assert who_leaves(replicas, ends_at=ends_at) == [2, 1, 3]


def test_of_equals_the_newest_leaves_first() -> None:
    assert who_leaves(many(QUEUED, 1, 3, 2)) == [3, 2, 1]


@pytest.mark.parametrize("phase", [SUBMITTING, DRAINING, STOPPING, ENDED])
def test_what_leaves_or_cannot_leave_yet_is_not_let_go(phase: Phase) -> None:
    assert let_go(a_replica(1, phase), Reason.SCALED_DOWN, now=NOW) is None


@pytest.mark.parametrize("health", [None, *Health])
def test_what_runs_drains_before_it_is_cancelled_whatever_was_seen_of_it(health: Health | None) -> None:
    """It may have become ready, and been given requests, since it was looked at."""
    replica = a_replica(1, RUNNING)
    scene = a_scene(a_set(0), [replica], [an_endpoint(replica, health)] if health else [])
    (step,) = plan(scene if health else replace(scene, endpoints={}), now=NOW, rules=RULES)
    assert step == Move(replica, DRAINING, Reason.SCALED_DOWN, drain_deadline=NOW + timedelta(seconds=300))


# --- drains ------------------------------------------------------------------------------------------------


def draining(since: float, **changes: Any) -> Replica:
    """Draining for so many seconds; the deadline is at 300."""
    return a_replica(1, DRAINING, phase_since=ago(since), drain_deadline=ago(since - 300), **changes)


BUSY, WAITING, SILENT = {"running": 1}, {"waiting": 1}, {"running": None, "waiting": None}


@pytest.mark.parametrize(
    ("confirmed", "metrics", "before", "since"),
    [
        (ago(1), {}, None, ago(1)),  # the first probe that says idle
        (ago(1), {}, ago(4), ago(4)),  # and the next ones
        (ago(8), {}, None, ago(8)),  # exactly when the proxies have had time to notice
        (ago(8.5), {}, None, None),  # too early
        (ago(30), {}, None, None),  # a probe from before the drain
        (None, {}, None, None),
        (ago(1), BUSY, ago(4), None),  # no longer
        (ago(1), WAITING, ago(4), None),
        (ago(1), SILENT, ago(4), None),  # not knowing is not idle
        (ago(1), {"waiting": None}, None, None),
    ],
)
def test_a_drain_is_idle_since_its_own_metrics_said_so_after_the_proxies_noticed(
    confirmed: datetime | None, metrics: dict[str, Any], before: datetime | None, since: datetime | None
) -> None:
    replica = draining(10, idle_since=before)
    endpoint = an_endpoint(replica, confirmed_at=confirmed, **metrics)
    assert idle_since(replica, endpoint, RULES) == since


def test_a_drain_without_an_endpoint_is_not_known_to_be_idle() -> None:
    assert idle_since(draining(10), None, RULES) is None


@pytest.mark.parametrize(
    ("idle", "confirmed", "metrics", "is_over"),
    [
        (ago(5), ago(1), {}, True),
        (ago(1), ago(1), {}, False),  # said once
        (ago(1.5), ago(1), {}, False),  # twice in a row: what came in between does not show yet
        (None, ago(1), {}, False),
        (ago(5), ago(1), BUSY, False),
        (ago(5), ago(1), WAITING, False),
        (ago(5), ago(1), SILENT, False),
        (ago(5), None, {}, False),
    ],
)
def test_a_drain_is_over_when_idle_was_said_twice(
    idle: datetime | None, confirmed: datetime | None, metrics: dict[str, Any], is_over: bool
) -> None:
    replica = draining(10, idle_since=idle)
    scene = a_scene(a_set(0), [replica], [an_endpoint(replica, confirmed_at=confirmed, **metrics)])
    assert said(scene) == (["1 STOPPING"] if is_over else [])


def test_the_drain_of_a_replica_that_never_was_ready_ends_at_once() -> None:
    replica = draining(1)
    assert said(a_scene(a_set(0), [replica], [starting(replica)])) == ["1 STOPPING"]
    assert in_words(plan(replace(a_scene(a_set(0), [replica]), endpoints={}), now=NOW, rules=RULES)) == ["1 STOPPING"]


def test_the_drain_of_a_replica_that_has_to_prove_itself_again_keeps_its_deadline() -> None:
    replica = draining(1)
    again = an_endpoint(replica, Health.UNPROVEN, first_ready_at=ago(500))
    assert said(a_scene(a_set(0), [replica], [again])) == []


@pytest.mark.parametrize(("since", "says"), [(299, []), (300, ["1 STOPPING"])])
def test_a_drain_ends_at_its_deadline_whatever_runs(since: int, says: list[str]) -> None:
    replica = draining(since)
    assert said(a_scene(a_set(0), [replica], [an_endpoint(replica, running=3)])) == says


@pytest.mark.parametrize(
    ("metrics", "left"),
    [({"running": 3, "waiting": 2}, "5"), ({"running": 3, "waiting": None}, "3"), (SILENT, "unknown")],
)
def test_a_drain_that_is_cut_says_how_many_requests_it_cut(metrics: dict[str, Any], left: str) -> None:
    replica = draining(300)
    (move,) = planned(a_scene(a_set(0), [replica], [an_endpoint(replica, **metrics)]))
    assert isinstance(move, Move)
    assert move.message == f"drain deadline reached; requests cut: {left}"
    assert move.cut_requests == (None if left == "unknown" else int(left))


# --- wanted again ------------------------------------------------------------------------------------------


def test_a_drain_is_undone_rather_than_another_replica_created() -> None:
    busy = draining(10)
    assert said(a_scene(a_set(2), [busy, *many(RUNNING, 2)], [an_endpoint(busy, running=1)])) == ["1 RUNNING"]


def test_no_more_drains_are_undone_than_are_missing() -> None:
    drains = [draining(10), replace(draining(10), id=2, name="cp-s-2")]
    endpoints = [an_endpoint(one, running=1) for one in drains]
    assert said(a_scene(a_set(1), drains, endpoints)) == ["1 RUNNING"]
    assert said(a_scene(a_set(3), drains, endpoints)) == ["1 RUNNING", "2 RUNNING", "create"]


@pytest.mark.parametrize(
    ("replica", "health"),
    [
        *((draining(10, reason=reason), Health.READY) for reason in (Reason.UNHEALTHY, Reason.REPLACED, Reason.ROLLED)),
        (draining(10, reason=Reason.DRAINED_BY_OPERATOR), Health.READY),
        (draining(10), Health.FAILING),
        (draining(10, spec_hash="older"), Health.READY),
    ],
)
def test_a_drain_for_a_reason_that_still_holds_is_not_undone(replica: Replica, health: Health) -> None:
    endpoint = an_endpoint(replica, health, running=1, waiting=0)
    assert said(a_scene(a_set(1), [replica], [endpoint])) == ["create"]


def test_a_drain_that_is_over_is_not_undone() -> None:
    idle = draining(10, idle_since=ago(5))
    assert said(a_scene(a_set(1), [idle])) == ["1 STOPPING", "create"]


# --- starts that fail, and health --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("failing_for", "is_over"), [(600, False), (601, True)], ids=["inside the budget", "beyond the budget"]
)
def test_a_replica_that_does_not_become_ready_in_its_start_budget_is_given_up(failing_for: int, is_over: bool) -> None:
    replica = a_replica(1, RUNNING)
    endpoint = an_endpoint(replica, Health.UNPROVEN, failing_since=ago(failing_for), message="connection refused")
    actions = planned(a_scene(a_set(1), [replica], [endpoint]))
    assert in_words(actions) == (["1 DRAINING START_TIMEOUT", "create"] if is_over else [])
    if is_over:
        assert isinstance(actions[0], Move)
        assert actions[0].message == "not ready 600 s after it was first looked at: connection refused"


def test_a_start_that_nobody_could_look_at_is_not_given_up() -> None:
    """After an hour without control plane, or without Slurm to tell the host: blindness never cancels."""
    long_ago = a_replica(1, RUNNING, running_since=ago(3600), phase_since=ago(3600))
    assert plan(replace(a_scene(a_set(1), [long_ago]), endpoints={}), now=NOW, rules=RULES) == []
    unseen = an_endpoint(long_ago, Health.UNPROVEN, fails=0, failing_since=None)
    assert said(a_scene(a_set(1), [long_ago], [unseen])) == []


def test_a_job_that_ran_unseen_for_an_hour_has_its_whole_start_budget_left() -> None:
    late = a_replica(1, RUNNING, running_since=ago(3600), phase_since=NOW)
    assert said(a_scene(a_set(1), [late], [an_endpoint(late, Health.UNPROVEN, failing_since=ago(3))])) == []


def test_a_requeued_job_that_never_becomes_ready_again_is_given_up() -> None:
    """Its endpoint was ready once; that once let it stay for ever."""
    replica = a_replica(1, RUNNING)
    endpoint = an_endpoint(replica, Health.UNPROVEN, first_ready_at=ago(9000), failing_since=ago(601))
    assert said(a_scene(a_set(1), [replica], [endpoint])) == ["1 DRAINING START_TIMEOUT", "create"]


@pytest.mark.parametrize(
    ("health", "failing_for", "says"),
    [
        (Health.FAILING, 121, ["1 DRAINING UNHEALTHY", "create"]),
        (Health.FAILING, 120, []),
        (Health.READY, 121, []),  # fails now and then, never in a row
    ],
)
def test_a_replica_that_fails_for_too_long_drains_and_is_replaced(
    health: Health, failing_for: int, says: list[str]
) -> None:
    replica = a_replica(1, RUNNING)
    endpoint = an_endpoint(replica, health, failing_since=ago(failing_for))
    assert said(a_scene(a_set(1), [replica], [endpoint])) == says


def test_a_replica_whose_newest_look_passed_is_given_time_to_recover() -> None:
    replica = a_replica(1, RUNNING)
    recovering = an_endpoint(replica, Health.FAILING, passes=1, fails=0, failing_since=ago(500))
    assert said(a_scene(a_set(1), [replica], [recovering])) == []


def test_an_unhealthy_replica_takes_the_probes_last_words_with_it() -> None:
    replica = a_replica(1, RUNNING)
    endpoint = an_endpoint(replica, Health.FAILING, failing_since=ago(500), message="no token in 10 s")
    move = planned(a_scene(a_set(1), [replica], [endpoint]))[0]
    assert isinstance(move, Move)
    assert (move.message, move.drain_deadline) == ("no token in 10 s", NOW + timedelta(seconds=300))


@pytest.mark.parametrize(
    ("phase", "says"),
    [
        (PENDING, ["1 ENDED REPLACED", "create"]),
        (SUBMITTING, []),
        (QUEUED, ["1 STOPPING REPLACED", "create"]),
        (RUNNING, ["1 DRAINING REPLACED", "create"]),
        (STOPPING, ["create"]),
    ],
)
def test_a_replica_to_be_replaced_leaves_and_another_is_created(phase: Phase, says: list[str]) -> None:
    assert said(a_scene(a_set(1), many(phase, 1), to_replace=["cp-s-1"])) == says


# --- back-off ----------------------------------------------------------------------------------------------


def failed(*ages: float, reason: Reason = Reason.CRASHED) -> list[PastReplica]:
    return [a_past(reason, ago(age)) for age in ages]


@pytest.mark.parametrize(
    ("past", "failures", "pause"),
    [
        ([], 0, None),
        (failed(5), 1, 10),
        (failed(5, reason=Reason.START_TIMEOUT), 1, 10),
        (failed(5, reason=Reason.REJECTED), 1, 10),
        (failed(5, 20), 2, 20),
        (failed(5, 20, 60), 3, 40),
        (failed(*range(5, 15)), 10, 600),  # no longer than the longest
        ([a_past(Reason.CRASHED, ago(5), was_ready=True), *failed(9)], 0, None),  # it did start
        ([a_past(Reason.SCALED_DOWN, ago(5)), *failed(9)], 0, None),
        ([*failed(5), a_past(Reason.CRASHED, ago(9), was_ready=True), *failed(11)], 1, 10),
        ([*failed(5), a_past(Reason.CRASHED, ago(9), spec=OLD)], 1, 10),
        ([a_past(Reason.CRASHED, ago(5), spec=OLD)], 0, None),  # a new spec is a new chance
    ],
)
def test_failed_starts_in_a_row_double_the_pause(past: list[PastReplica], failures: int, pause: int | None) -> None:
    resumes_at = None if pause is None else ago(5) + timedelta(seconds=pause)
    found = back_off(a_scene(a_set(1), [], past=past), RULES)
    assert (found.failures if found else 0, found.next_try_at if found else None) == (failures, resumes_at)


def taken(age: float, life: float = 60, reason: Reason = Reason.PREEMPTED) -> PastReplica:
    return replace(a_past(reason, ago(age)), created_at=ago(age + life))


@pytest.mark.parametrize(
    ("past", "times", "pause"),
    [
        ([taken(5)], 0, None),  # once is an accident
        ([taken(5), taken(90)], 2, 10),
        ([taken(5, reason=Reason.NODE_FAIL), taken(90), taken(200)], 3, 20),
        ([taken(5), taken(6), taken(7)], 0, None),  # three that went together
        ([taken(5), taken(6), taken(90), taken(91)], 2, 10),
        ([taken(5), taken(90, life=3600)], 0, None),  # the one before had lived long
        ([taken(5), a_past(Reason.SCALED_DOWN, ago(70)), taken(90)], 0, None),
        ([taken(5), taken(90), *failed(200)], 1, 10),  # it says nothing about the start that failed before
    ],
)
def test_jobs_taken_away_again_and_again_are_replaced_more_and_more_slowly(
    past: list[PastReplica], times: int, pause: int | None
) -> None:
    found = back_off(a_scene(a_set(1), [], past=past), RULES)
    assert (found.failures if found else 0) == times
    if found is not None:
        assert pause is not None
        assert found.next_try_at == found.newest.ended_at + timedelta(seconds=pause)


def test_what_an_operator_forgave_is_tried_again_at_once() -> None:
    scene = replace(a_scene(a_set(1), [], past=failed(5, 20)), forgiven_at=ago(4))
    assert said(scene) == ["create"]
    assert back_off(replace(scene, forgiven_at=ago(10)), RULES) is not None


def test_a_steady_decision_says_that_the_set_backs_off() -> None:
    pause = back_off(a_scene(a_set(1), [], past=failed(5, 20)), RULES)
    steady = Decision("s", 1, 1, DecisionReason.STEADY, "no alert presses")
    told = explained(steady, pause)
    assert (told.reason, told.desired) == (DecisionReason.BACKING_OFF, 1)
    assert told.explanation == "2 failed starts in a row; next try at 12:00:15: it said why"
    moving = replace(steady, desired=2, reason=DecisionReason.SCALED_UP)
    assert explained(moving, pause) == moving
    pressed = replace(steady, reason=DecisionReason.BACKING_OFF, explanation="A is firing, but starts fail")
    assert explained(pressed, pause).explanation == f"A is firing, but starts fail: {told.explanation}"
    assert explained(steady, None) == steady


def test_nothing_is_created_while_backing_off_and_the_operator_is_told() -> None:
    (report,) = planned(a_scene(a_set(2), [], past=failed(5, 20)))
    assert report == Report("s", "2 failed starts in a row; next try at 12:00:15: it said why")


def test_after_failed_starts_one_replica_tries_alone_until_it_serves() -> None:
    past = failed(100, 120)
    assert said(a_scene(a_set(4), [], past=past)) == ["create"]
    (trying,) = many(RUNNING, 1)
    assert said(a_scene(a_set(4), [trying], [starting(trying)], past=past)) == []
    assert said(a_scene(a_set(4), many(QUEUED, 1), past=past)) == []


def test_a_start_that_succeeded_since_ends_the_caution() -> None:
    past = failed(100, 120)
    (serving,) = many(RUNNING, 1)
    assert (
        said(a_scene(a_set(4), [serving], [an_endpoint(serving, first_ready_at=ago(50))], past=past)) == ["create"] * 3
    )
    older = an_endpoint(serving, first_ready_at=ago(110))  # it shows nothing of the newest failure
    assert said(a_scene(a_set(4), [serving], [older], past=past)) == ["create"]


# --- rolling -----------------------------------------------------------------------------------------------


def old(phase: Phase, *numbers: int) -> list[Replica]:
    return many(phase, *numbers, spec=OLD)


def test_a_new_spec_first_lets_go_of_what_serves_nobody() -> None:
    scene = a_scene(a_set(2), [*old(PENDING, 1), *old(QUEUED, 2), *old(SUBMITTING, 3)])
    assert said(scene) == ["1 ENDED ROLLED", "2 STOPPING ROLLED", "create"]


def test_a_roll_starts_one_successor_at_a_time() -> None:
    assert said(a_scene(a_set(3), old(RUNNING, 1, 2, 3))) == ["create"]
    assert said(a_scene(a_set(3), [*old(RUNNING, 1, 2, 3), *many(QUEUED, 4)])) == []


def test_a_predecessor_leaves_when_its_successor_serves() -> None:
    replicas = [*old(RUNNING, 1, 2, 3), *many(RUNNING, 4)]
    assert said(a_scene(a_set(3), replicas, [starting(replicas[3])])) == []
    assert said(a_scene(a_set(3), replicas)) == ["3 DRAINING ROLLED", "create"]


def test_a_roll_at_the_limit_of_the_surge_waits_for_the_successor() -> None:
    """Max and surge are used up by the successor itself: that is no reason to let a predecessor go before it serves."""
    replicas = [*old(RUNNING, 1, 2, 3, 4), *many(RUNNING, 5)]
    assert said(a_scene(a_set(4), replicas, [starting(replicas[4])])) == []
    assert said(a_scene(a_set(4), [*old(RUNNING, 1, 2, 3, 4), *many(QUEUED, 5)])) == []


def test_a_roll_waits_for_the_place_of_one_that_is_leaving() -> None:
    assert said(a_scene(a_set(4), [*old(RUNNING, 1, 2, 3, 4), *old(STOPPING, 5)])) == []


NO_SURGE = a_set(2, spec=a_spec(max_replicas=2, surge=0))


def test_without_surge_one_predecessor_makes_room() -> None:
    assert said(a_scene(NO_SURGE, old(RUNNING, 1, 2))) == ["2 DRAINING ROLLED"]


def test_without_surge_the_next_predecessor_waits_until_the_successor_serves() -> None:
    """Once every round let another one go, until none was left."""
    first, second = old(RUNNING, 1, 2)
    leaving = replace(second, phase=DRAINING, reason=Reason.ROLLED, drain_deadline=ago(-300))
    assert said(a_scene(NO_SURGE, [first, leaving], [an_endpoint(leaving, running=1)])) == []
    (successor,) = many(RUNNING, 3)
    assert said(a_scene(NO_SURGE, [first, successor], [starting(successor)])) == []
    assert said(a_scene(NO_SURGE, [first, successor])) == ["1 DRAINING ROLLED"]


def test_without_surge_no_predecessor_makes_room_for_what_may_not_start() -> None:
    """A reservation or a back-off would leave its place empty."""
    begins = Closing("reservation r", NOW + timedelta(seconds=30), NOW + timedelta(hours=5))
    full = a_scene(NO_SURGE, old(RUNNING, 1, 2))
    assert said(replace(full, closing=begins)) == []
    assert said(replace(full, past=tuple(failed(5, 20)))) == []
    assert said(replace(full, past=tuple(failed(100, 120)))) == ["2 DRAINING ROLLED"]
    staying = vacating(a_scene(NO_SURGE, many(RUNNING, 1, 2)), "cp-s-1")
    assert said(staying) == ["1 DRAINING NODE_DRAINED"]
    assert said(replace(staying, closing=begins)) == []


def test_a_set_scaled_to_nothing_while_rolling_is_scaled_down() -> None:
    assert said(a_scene(a_set(0), old(RUNNING, 1))) == ["1 DRAINING SCALED_DOWN"]


def test_a_predecessor_too_many_is_let_go_without_waiting() -> None:
    assert said(a_scene(a_set(1), old(RUNNING, 1, 2, 3))) == ["3 DRAINING ROLLED", "2 DRAINING ROLLED", "create"]


# --- nodes that are drained --------------------------------------------------------------------------------


def vacating(scene: Scene, *names: str, since: float = 10) -> Scene:
    return replace(scene, to_vacate={name: ago(since) for name in names})


def test_a_replica_on_a_drained_node_leaves_when_its_successor_serves() -> None:
    first, second, third = many(RUNNING, 1, 2, 3)
    scene = vacating(a_scene(a_set(2), [first, second]), first.name)
    assert planned(scene) == [Create("s", beside=(first.name,))]
    assert said(vacating(a_scene(a_set(2), [first, second, third], [starting(third)]), first.name)) == []
    assert said(vacating(a_scene(a_set(2), [first, second, third]), first.name)) == ["1 DRAINING NODE_DRAINED"]


def test_what_serves_nobody_on_a_drained_node_leaves_at_once() -> None:
    first, second = many(RUNNING, 1, 2)
    scene = vacating(a_scene(a_set(2), [first, second], [starting(first)]), first.name)
    assert said(scene) == ["1 DRAINING NODE_DRAINED", "create"]


def test_a_drained_node_is_not_waited_for_longer_than_a_start_may_take() -> None:
    (first,) = many(RUNNING, 1)
    budget = first.spec.start_timeout_seconds
    waiting = a_scene(a_set(1), [first, *many(QUEUED, 2)])
    assert said(vacating(waiting, first.name, since=budget)) == []
    assert said(vacating(waiting, first.name, since=budget + 1)) == ["1 DRAINING NODE_DRAINED"]


def test_those_on_a_drained_node_whose_turn_has_not_come_wait_for_their_own_successors() -> None:
    """Once all of them left when the time for the first one was over."""
    replicas = many(RUNNING, 1, 2, 3)
    names, budget = [one.name for one in replicas], replicas[0].spec.start_timeout_seconds
    successor, past = a_replica(4, QUEUED, created_at=ago(budget)), (a_past(Reason.NODE_DRAINED, ago(budget)),)

    def forced(*others: Replica, ended: Iterable[PastReplica] = ()) -> list[str]:
        return said(vacating(a_scene(a_set(3), [*replicas, *others], past=ended), *names, since=9999))

    assert forced(successor) == []
    assert forced(replace(successor, created_at=ago(budget + 1))) == ["1 DRAINING NODE_DRAINED"]
    assert forced() == ["1 DRAINING NODE_DRAINED", "create"], "none was made at all"
    late = replace(successor, created_at=ago(9000))
    leaving = a_replica(5, STOPPING, reason=Reason.NODE_DRAINED, phase_since=ago(budget))
    assert forced(late, leaving) == []
    assert forced(late, replace(leaving, phase_since=ago(budget + 1))) == ["1 DRAINING NODE_DRAINED"]
    assert forced(late, ended=past) == []
    assert forced(late, ended=[replace(past[0], ended_at=ago(budget + 1))]) == ["1 DRAINING NODE_DRAINED"]


def test_a_drain_is_undone_with_its_nodes() -> None:
    leaving = a_replica(1, DRAINING, reason=Reason.NODE_DRAINED)
    scene = a_scene(a_set(1), [leaving], [an_endpoint(leaving, running=1)])
    assert said(scene) == ["1 RUNNING"]
    assert said(vacating(scene, leaving.name)) == ["create"]


def test_when_no_replica_can_be_seen_to_serve_only_one_at_a_time_is_condemned() -> None:
    replica_set = a_set(3, spec=a_spec(max_replicas=3))
    failing = [a_replica(number, Phase.RUNNING) for number in (1, 2, 3)]
    blind = [an_endpoint(replica, Health.FAILING, failing_since=ago(999)) for replica in failing]
    moves = [one for one in plan(a_scene(replica_set, failing, blind), now=NOW, rules=RULES) if isinstance(one, Move)]
    assert [(move.replica.id, move.reason) for move in moves] == [(1, Reason.UNHEALTHY)]

    leaving = a_replica(1, Phase.DRAINING, reason=Reason.UNHEALTHY)
    rest = a_scene(replica_set, [leaving, *failing[1:]], blind)
    assert not [one for one in plan(rest, now=NOW, rules=RULES) if isinstance(one, Move) and one.replica.id != 1]

    seeing = [an_endpoint(failing[0]), *blind[1:]]
    moves = [one for one in plan(a_scene(replica_set, failing, seeing), now=NOW, rules=RULES) if isinstance(one, Move)]
    assert [(move.replica.id, move.reason) for move in moves] == [(2, Reason.UNHEALTHY), (3, Reason.UNHEALTHY)]


def test_an_old_failure_condemns_nobody_before_a_new_look() -> None:
    replica = a_replica(1, Phase.RUNNING)
    stale = an_endpoint(replica, Health.FAILING, failing_since=ago(999), probed_at=ago(990))
    assert plan(a_scene(a_set(), [replica], [stale]), now=NOW, rules=RULES) == []


def test_a_roll_while_no_replica_can_be_seen_to_serve_lets_none_go_that_has_served() -> None:
    replicas = old(RUNNING, 1, 2, 3)
    blind = [an_endpoint(replica, Health.FAILING, failing_since=ago(9)) for replica in replicas]
    successor = many(QUEUED, 4)
    assert said(a_scene(a_set(3), [*replicas, *successor], blind)) == []
    assert said(a_scene(a_set(0), replicas, blind)) == [f"{one} DRAINING SCALED_DOWN" for one in (3, 2, 1)]
    seeing = [an_endpoint(replicas[0]), *blind[1:]]
    assert said(a_scene(a_set(3), [*replicas, *successor], seeing)) == ["2 DRAINING ROLLED", "3 DRAINING ROLLED"]


def replaced_by(scene: Scene, names: Iterable[str]) -> list[int]:
    asked = replace(scene, to_replace=frozenset(names))
    steps = [one for one in plan(asked, now=NOW, rules=RULES) if isinstance(one, Move)]
    return [step.replica.id for step in steps if step.reason is Reason.REPLACED and step.replica.exists]


def test_an_alert_that_asks_to_replace_all_replaces_those_that_serve_one_at_a_time() -> None:
    three = [a_replica(number, Phase.RUNNING) for number in (1, 2, 3)]
    names = [replica.name for replica in three]
    serving = [an_endpoint(replica) for replica in three]
    many = a_set(3, spec=a_spec(max_replicas=4))
    assert replaced_by(a_scene(many, three, serving), names) == [1]

    leaving = a_replica(1, Phase.DRAINING, reason=Reason.REPLACED)
    assert replaced_by(a_scene(many, [leaving, *three[1:]], serving), names) == []

    successor = a_replica(4, Phase.RUNNING)
    starting = [*serving[1:], an_endpoint(successor, Health.UNPROVEN)]
    assert replaced_by(a_scene(many, [*three[1:], successor], starting), names) == []
    ready = [*serving[1:], an_endpoint(successor)]
    assert replaced_by(a_scene(many, [*three[1:], successor], ready), names) == [2]


def test_replicas_that_do_not_serve_are_replaced_at_once() -> None:
    three = [a_replica(number, Phase.RUNNING) for number in (1, 2, 3)]
    endpoints = [an_endpoint(three[0], Health.FAILING), an_endpoint(three[1], Health.FAILING), an_endpoint(three[2])]
    assert replaced_by(a_scene(a_set(3), three, endpoints), [replica.name for replica in three[:2]]) == [1, 2]
