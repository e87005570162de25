"""Walltimes: when a successor is made, when its predecessor leaves, and what is said when that is late or cannot be."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from datetime import datetime, timedelta
from typing import Any

import pytest

from controlplane.core.hand_over import start_lead, yields_at
from controlplane.core.planning import PlanRules, Scene, plan
from controlplane.core.reservations import Closing
from controlplane.core.types import (
    Action,
    Create,
    Endpoint,
    HandOver,
    Health,
    Move,
    Phase,
    Replica,
    ReplicaSet,
    Report,
    SlurmResources,
    Submit,
    TimeLimit,
)
from tests.unit.test_planning import in_words
from tests.unit.worlds import NOW, a_replica, a_scene, a_set, a_spec, ago, an_endpoint

PENDING, QUEUED, RUNNING, DRAINING = Phase.PENDING, Phase.QUEUED, Phase.RUNNING, Phase.DRAINING
RULES = HandOver(margin_seconds=300, default_lead_seconds=200)  # due 500 s before the end
WALLTIME = 3600


def a_short_set(desired: int = 1, *, lead: float | None = None, **of_the_spec: Any) -> ReplicaSet:
    return a_set(desired, spec=a_spec(hand_over=RULES, **of_the_spec), start_lead_seconds=lead)


def ending(number: int, left: float, *, walltime: float = WALLTIME, phase: Phase = RUNNING, **changes: Any) -> Replica:
    """A replica whose walltime ends in so many seconds; see `scene`."""
    return a_replica(number, phase, running_since=ago(walltime - left), **changes)


def after(number: int, predecessor: int, phase: Phase = RUNNING, **changes: Any) -> Replica:
    return a_replica(number, phase, succeeds=predecessor, **changes)


def scene(
    replica_set: ReplicaSet,
    replicas: Iterable[Replica],
    endpoints: Iterable[Endpoint] = (),
    *,
    walltime: float = WALLTIME,
    closing: Closing | None = None,
) -> Scene:
    """Every job that runs does so for `walltime`."""
    replicas = tuple(replicas)
    ends = {
        one.name: one.running_since + timedelta(seconds=walltime) for one in replicas if one.running_since is not None
    }
    return replace(a_scene(replica_set, replicas, endpoints, ends_at=ends), closing=closing)


def planned(given: Scene) -> list[Action]:
    return plan(given, now=NOW, rules=PlanRules())


def said(given: Scene) -> list[str]:
    """What is to be done, without what is to be told."""
    return [words for words in in_words(planned(given)) if words != "report"]


def told(given: Scene) -> dict[str, str]:
    return {one.subject: one.message for one in planned(given) if isinstance(one, Report)}


# --- when a successor is made ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("left", "lead", "says"),
    [
        (501, None, []),
        (500, None, ["create"]),  # the margin, and what a start is thought to take
        (400, 90.0, []),
        (390, 90.0, ["create"]),  # the margin, and what starts took
        (1000, 700.0, ["create"]),
        (1801, 7000.0, []),  # never before half of the walltime is over
        (1800, 7000.0, ["create"]),
    ],
)
def test_a_successor_is_made_a_margin_and_a_start_before_the_end(
    left: float, lead: float | None, says: list[str]
) -> None:
    assert said(scene(a_short_set(lead=lead), [ending(1, left)])) == says


def test_a_successor_names_its_predecessor() -> None:
    assert planned(scene(a_short_set(), [ending(7, 450)])) == [Create("s", succeeds=7)]


def test_what_is_lost_during_a_hand_over_is_replaced_at_once() -> None:
    """The predecessor's place is taken by its successor already: it keeps nobody else's free."""
    given = scene(a_short_set(2, max_replicas=4), [ending(1, 450), after(2, 1, QUEUED)])
    assert planned(given) == [Create("s")]


def test_the_lead_is_what_was_measured_and_until_then_the_specs() -> None:
    assert start_lead(a_short_set()) == timedelta(seconds=200)
    assert start_lead(a_short_set(lead=12.5)) == timedelta(seconds=12.5)


@pytest.mark.parametrize(
    ("replica", "health"),
    [
        (a_replica(1, QUEUED), None),
        (ending(1, 450), Health.UNPROVEN),  # a start that takes longer than the walltime makes no chain of starts
    ],
)
def test_nothing_succeeds_a_replica_that_has_not_served_yet(replica: Replica, health: Health | None) -> None:
    endpoints = [an_endpoint(replica, health)] if health else []
    assert said(scene(a_short_set(), [replica], endpoints)) == []


def test_nobody_succeeds_a_successor_that_does_not_serve_yet() -> None:
    replicas = [ending(1, 40, walltime=400), after(2, 1, running_since=ago(390))]
    loading = an_endpoint(replicas[1], Health.UNPROVEN)
    assert "create" not in said(scene(a_short_set(), replicas, [loading], walltime=400))


def test_a_predecessor_has_one_successor() -> None:
    assert said(scene(a_short_set(), [ending(1, 450), after(2, 1, QUEUED)])) == []


def test_a_successor_that_ended_is_made_again() -> None:
    replicas = [ending(1, 450), after(2, 1, Phase.STOPPING)]
    assert planned(scene(a_short_set(), replicas)) == [Create("s", succeeds=1)]
    assert planned(scene(a_short_set(max_replicas=1), replicas)) == []  # when there is room for a third job


def test_a_pair_stays_a_pair_when_a_measured_lead_says_that_it_was_too_early() -> None:
    """Else one of them would be one too many, and the next round would make it again."""
    assert said(scene(a_short_set(lead=10), [ending(1, 450), after(2, 1, QUEUED)])) == []


def test_what_is_missing_anyway_is_made_first_and_succeeds_nobody() -> None:
    actions = planned(scene(a_short_set(2, max_replicas=2), [ending(1, 450)]))
    assert actions == [Create("s"), Create("s", succeeds=1)]
    assert planned(scene(a_short_set(2, max_replicas=2, surge=0), [ending(1, 450)])) == [Create("s")]


def test_those_that_end_together_are_succeeded_in_time_though_there_is_room_for_one_at_a_time() -> None:
    """The last one is due 500 s before the end, so the one before it 1000 s, and the first 1500 s."""
    full = a_short_set(3, max_replicas=3, surge=1)
    for left, first in ((1501, None), (1500, 1), (1400, 1)):
        replicas = [ending(number, left) for number in (1, 2, 3)]
        assert planned(scene(full, replicas)) == ([Create("s", succeeds=first)] if first else [])
    two = replace(full, spec=replace(full.spec, surge=2))
    assert planned(scene(two, [ending(number, 1001) for number in (1, 2, 3)])) == []
    assert planned(scene(two, [ending(number, 1000) for number in (1, 2, 3)])) == [Create("s", succeeds=1)]
    assert len(planned(scene(two, [ending(number, 500) for number in (1, 2, 3)]))) == 2


def test_an_outdated_replica_is_succeeded_by_the_roll_alone() -> None:
    old = a_spec(image="zero.sif")
    assert planned(scene(a_short_set(), [ending(1, 450, spec=old)])) == [Create("s")]


def test_outdated_replicas_that_end_together_do_not_wait_for_each_others_successors() -> None:
    """Once one of three was succeeded in time, though there was room for all."""
    roomy = a_short_set(3, max_replicas=4, surge=2)
    replicas = [ending(number, 450, spec=a_spec(image="zero.sif")) for number in (1, 2, 3)]
    assert said(scene(roomy, replicas)) == ["create"] * 3
    assert said(scene(roomy, [*replicas, a_replica(4, QUEUED)])) == ["create"] * 2
    vacated = [ending(number, 450) for number in (1, 2, 3)]
    drained = replace(scene(roomy, vacated), to_vacate={one.name: ago(10) for one in vacated})
    assert [one for one in said(drained) if one == "create"] == ["create"] * 3
    assert said(scene(roomy, [*replicas[:1], *(replace(one, running_since=NOW) for one in replicas[1:])])) == ["create"]
    mixed = replace(scene(roomy, vacated), to_vacate={vacated[0].name: ago(10)})
    assert said(mixed) == ["create"] * 3


# --- when the predecessor leaves ---------------------------------------------------------------------------


def test_a_predecessor_drains_when_its_successor_serves_and_not_before() -> None:
    replicas = [ending(1, 450), after(2, 1)]
    assert said(scene(a_short_set(), replicas, [an_endpoint(replicas[1], Health.UNPROVEN)])) == []
    assert said(scene(a_short_set(), replicas)) == ["1 DRAINING HANDED_OVER"]


@pytest.mark.parametrize(("left", "deadline"), [(450, 300), (200, 195), (3, 0)])
def test_a_drain_is_over_before_the_walltime_is(left: float, deadline: float) -> None:
    actions = planned(scene(a_short_set(), [ending(1, left), after(2, 1)]))
    (step,) = [one for one in actions if isinstance(one, Move)]
    assert step.drain_deadline == NOW + timedelta(seconds=deadline)


def test_a_drain_for_any_other_reason_is_over_before_the_walltime_is_too() -> None:
    failing = an_endpoint(replica := ending(1, 200), Health.FAILING, failing_since=ago(500))
    for given in (scene(a_short_set(0), [replica]), scene(a_short_set(), [replica], [failing])):
        (step,) = [one for one in planned(given) if isinstance(one, Move)]
        assert step.drain_deadline == NOW + timedelta(seconds=195)


def test_a_predecessor_that_fails_a_probe_keeps_its_successor_and_waits_for_it() -> None:
    replicas = [ending(1, 450), after(2, 1, QUEUED)]
    shaky = an_endpoint(replicas[0], Health.FAILING)
    assert said(scene(a_short_set(), replicas, [shaky])) == []
    assert planned(scene(a_short_set(), replicas[:1], [shaky])) == [Create("s", succeeds=1)]
    assert said(scene(a_short_set(), [replicas[0], after(2, 1)], [shaky])) == ["1 DRAINING HANDED_OVER"]


def test_of_two_the_one_that_ends_first_leaves_when_a_successor_serves() -> None:
    full = a_short_set(2, max_replicas=2, surge=2)
    replicas = [ending(1, 450), ending(2, 420), after(3, 1), after(4, 2, QUEUED)]
    assert said(scene(full, replicas)) == ["2 DRAINING HANDED_OVER"]


def test_a_replica_that_ends_leaves_without_a_successor_when_fewer_are_desired() -> None:
    busy = an_endpoint(replica := ending(1, 450), running=9)
    assert said(scene(a_short_set(1), [replica, ending(2, 3000)], [busy])) == ["1 DRAINING SCALED_DOWN"]


def test_of_two_that_end_and_of_which_one_is_wanted_the_one_that_fails_leaves_and_the_other_is_succeeded() -> None:
    """Once a successor of the failing one was asked for in every round, and never made: the count was full."""
    replicas = [ending(1, 400), ending(2, 410)]
    shaky = an_endpoint(replicas[0], Health.FAILING)
    given = scene(a_short_set(1), replicas, [shaky])
    assert said(given) == ["1 DRAINING SCALED_DOWN", "create"]
    assert [one for one in planned(given) if isinstance(one, Create)] == [Create("s", succeeds=2)]
    both = planned(scene(a_short_set(1), replicas))
    assert in_words(both) == ["1 DRAINING SCALED_DOWN", "create"]
    assert Create("s", succeeds=2) in both


def test_a_successor_that_is_wanted_no_more_goes_before_anything_that_serves() -> None:
    replicas = [ending(1, 450), after(2, 1, QUEUED), ending(3, 3000)]
    assert said(scene(a_short_set(1), replicas)) == ["2 STOPPING SCALED_DOWN", "1 DRAINING HANDED_OVER"]


def test_the_oldest_that_is_about_to_end_is_scaled_down_rather_than_the_youngest() -> None:
    """Though it has the most to do, and nobody has to succeed it yet."""
    replicas = [ending(1, 900), ending(2, 3000), ending(3, 3500)]
    endpoints = [an_endpoint(one, running=running) for one, running in zip(replicas, (9, 0, 1), strict=True)]
    assert said(scene(a_short_set(2), replicas, endpoints)) == ["1 DRAINING SCALED_DOWN"]
    replicas[0] = ending(1, 2000)  # not about to end: the one with the least to do
    assert said(scene(a_short_set(2), replicas, endpoints)) == ["2 DRAINING SCALED_DOWN"]


def test_a_drain_is_not_undone_for_a_replica_that_ends_soon() -> None:
    """It would have to be succeeded at once."""
    replica = a_replica(1, DRAINING, running_since=ago(WALLTIME - 450))
    busy = an_endpoint(replica, running=1)
    assert said(scene(a_short_set(1), [replica], [busy])) == ["create"]
    lasting = replace(replica, running_since=ago(60))
    assert said(scene(a_short_set(1), [lasting], [busy])) == ["1 RUNNING"]


# --- late, no room, too short ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("left", "says", "is_told"),
    [(301, [], False), (300, [], True), (61, [], True), (60, ["1 DRAINING TIME_LIMIT"], True)],
)
def test_a_predecessor_serves_on_while_its_successor_is_late_until_the_last_call(
    left: float, says: list[str], is_told: bool
) -> None:
    given = scene(a_short_set(), [ending(1, left), after(2, 1, QUEUED)])
    assert said(given) == says
    end = f"{NOW + timedelta(seconds=left):%H:%M:%S}"
    late = {"hand-over of cp-s-1": f"hand-over is late: cp-s-2 is QUEUED, and the walltime ends at {end}"}
    assert told(given) == (late if is_told else {})


def test_a_late_hand_over_without_a_successor_says_so() -> None:
    given = scene(a_short_set(), [ending(1, 100), a_replica(2, DRAINING)])
    assert told(given)["hand-over of cp-s-1"].startswith("hand-over is late: it has no successor, and")


def test_what_takes_the_place_of_one_that_was_called_succeeds_nobody() -> None:
    given = scene(a_short_set(), [ending(1, 60)])
    assert said(given) == ["1 DRAINING TIME_LIMIT", "create"]
    assert Create("s") in planned(given)


def test_a_replica_that_never_served_is_not_called() -> None:
    replica = ending(1, 30)
    assert said(scene(a_short_set(), [replica], [an_endpoint(replica, Health.UNPROVEN)])) == []


def test_without_room_beside_a_predecessor_leaves_a_margin_before_its_end() -> None:
    full = a_short_set(1, max_replicas=1, surge=0)
    assert planned(scene(full, [ending(1, 301)])) == []
    given = scene(full, [ending(1, 300)])
    assert said(given) == ["1 DRAINING HANDED_OVER"]
    assert "no room for a successor beside it" in told(given)["hand-over of cp-s-1"]


def test_without_room_those_that_end_together_make_room_one_at_a_time_as_long_as_there_is_time() -> None:
    full = a_short_set(2, max_replicas=2, surge=0)
    assert said(scene(full, [ending(1, 801), ending(2, 801)])) == []
    assert said(scene(full, [ending(1, 800), ending(2, 800)])) == ["1 DRAINING HANDED_OVER"]
    leaving = ending(1, 700, phase=DRAINING)
    assert said(scene(full, [leaving, ending(2, 700)], [an_endpoint(leaving, running=1)])) == []
    assert said(scene(full, [leaving, ending(2, 300)], [an_endpoint(leaving, running=1)])) == ["2 DRAINING TIME_LIMIT"]


@pytest.mark.parametrize(("lead", "is_short"), [(1500, False), (1501, True)])
def test_a_walltime_that_is_too_short_for_its_starts_is_told(lead: float, is_short: bool) -> None:
    given = scene(a_short_set(lead=lead), [ending(1, 3000)])
    too_short = {
        "walltimes of s": "a walltime of 3600 s is too short to be handed over in time: it takes 1501 s to start and a "
        "margin of 300 s"
    }
    assert told(given) == (too_short if is_short else {})


@pytest.mark.parametrize(("walltime", "margin"), [(3600, 300), (1200, 300), (120, 30)])
def test_an_endpoint_yields_a_margin_before_its_end_but_only_for_a_quarter_of_its_life(
    walltime: int, margin: int
) -> None:
    ends_at = NOW + timedelta(seconds=walltime)
    assert yields_at(RULES, NOW, ends_at) == ends_at - timedelta(seconds=margin)


def test_a_job_whose_end_is_not_known_is_left_alone() -> None:
    assert said(a_scene(a_short_set(), [ending(1, 100)])) == []


def test_a_paused_set_hands_nothing_over() -> None:
    paused = replace(a_short_set(), is_paused=True)
    assert in_words(planned(scene(paused, [ending(1, 450)]))) == ["1 DRAINING SCALED_DOWN"]


# --- reservations ------------------------------------------------------------------------------------------


def closing_in(seconds: float) -> Closing:
    at: datetime = NOW + timedelta(seconds=seconds)
    return Closing("reservation r", at, at + timedelta(hours=1))


HALF_AN_HOUR: dict[str, Any] = {"slurm": SlurmResources(WALLTIME, min_time_limit_seconds=1800)}


def test_what_is_created_or_submitted_asks_for_what_a_reservation_leaves() -> None:
    limit = TimeLimit(2400, "2400 s asked for instead of 3600 s: reservation r begins at 2026-01-01 12:45:30")
    given = scene(a_short_set(**HALF_AN_HOUR), [], closing=closing_in(2730))  # of which 200 are for the start
    assert planned(given) == [Create("s", limit=limit)]
    pending = a_replica(1, PENDING, spec=given.replica_set.spec)
    assert planned(replace(given, replicas=(pending,))) == [Submit(pending, limit)]


def test_nothing_is_created_or_submitted_that_a_reservation_leaves_too_little() -> None:
    given = scene(a_short_set(**HALF_AN_HOUR), [], closing=closing_in(1700))
    waits = "nothing is submitted before 2026-01-01 13:28:20: reservation r begins at 2026-01-01 12:28:20"
    assert planned(given) == [Report("s", waits)]
    pending = a_replica(1, PENDING, spec=given.replica_set.spec)
    assert planned(replace(given, replicas=(pending,))) == [Report("cp-s-1", waits)]


def test_no_successor_is_made_that_would_have_to_end_with_its_predecessor() -> None:
    for left, closes, says in ((450, 2200, []), (450, 2400, ["create"]), (450, -5, [])):
        assert said(scene(a_short_set(**HALF_AN_HOUR), [ending(1, left)], closing=closing_in(closes))) == says
    given = scene(a_short_set(**HALF_AN_HOUR), [ending(1, 450)], closing=closing_in(2200))
    begins = "reservation r begins at 2026-01-01 12:36:40"
    assert told(given) == {"hand-over of cp-s-1": f"no successor before its walltime ends: {begins}"}
