"""Which bounds are in force, of all that have a say."""

from __future__ import annotations

from dataclasses import replace

import pytest

from controlplane.core.bounds import bounded, in_force, taken_together
from controlplane.core.types import ExternalEndpoint, OperatorBounds, Pin, ReplicaSet, Schedule, ScheduledBounds
from tests.unit.worlds import NOW, a_set, a_spec


def a_bounded(
    operator: tuple[int | None, int | None] | None = None,
    scheduled: tuple[int | None, int | None] | None = None,
    pin: int | None = None,
    desired: int = 2,
) -> ReplicaSet:
    """By its spec, between 1 and 4."""
    return a_set(
        desired,
        spec=a_spec(min_replicas=1),
        operator_bounds=OperatorBounds(*operator) if operator else None,
        scheduled=ScheduledBounds(("s",), *scheduled) if scheduled else ScheduledBounds(),
        pin=None if pin is None else Pin(pin, NOW, "ann"),
    )


@pytest.mark.parametrize(
    ("one", "bounds"),
    [
        (a_bounded(), (1, 4)),
        (a_bounded(scheduled=(3, None)), (3, 4)),
        (a_bounded(scheduled=(None, 8)), (1, 8)),
        (a_bounded(scheduled=(0, 0)), (0, 0)),
        (a_bounded(scheduled=(6, None)), (6, 6)),  # over the spec's max: what was said for this time goes before
        (a_bounded(scheduled=(None, 0)), (0, 0)),
        (a_bounded(scheduled=(5, 3)), (5, 5)),  # of two schedules that overlap
        (a_bounded(operator=(2, None)), (2, 4)),
        (a_bounded(operator=(None, 9), scheduled=(3, 6)), (3, 9)),  # each bound by itself
        (a_bounded(operator=(0, 2), scheduled=(3, 6)), (0, 2)),
        (a_bounded(operator=(None, 2), scheduled=(3, 6)), (2, 2)),  # an operator's before a schedule's
        (a_bounded(operator=(7, None), scheduled=(3, 6)), (7, 7)),
        (a_bounded(pin=3), (1, 4)),
        (a_bounded(pin=0), (0, 4)),
        (a_bounded(scheduled=(None, 2), pin=4), (1, 4)),
        (a_bounded(operator=(2, 3), pin=9), (2, 9)),
    ],
)
def test_each_bound_is_that_of_the_first_who_gives_one(one: ReplicaSet, bounds: tuple[int, int]) -> None:
    assert in_force(one) == bounds
    after = bounded(one)
    assert (after.min_replicas, after.max_replicas) == bounds
    assert after == bounded(after)


@pytest.mark.parametrize(("desired", "moved"), [(0, 2), (2, 2), (3, 3), (9, 3)])
def test_desired_is_moved_inside_the_bounds(desired: int, moved: int) -> None:
    assert bounded(a_bounded(operator=(2, 3), desired=desired)).desired_replicas == moved


def test_desired_is_moved_to_a_pin_and_back_inside_the_bounds_without_it() -> None:
    held = bounded(a_bounded(scheduled=(None, 2), pin=4, desired=2))
    assert held.desired_replicas == 4
    freed = bounded(replace(held, pin=None))
    assert (freed.min_replicas, freed.max_replicas, freed.desired_replicas) == (1, 2, 2)


def test_fixed_endpoints_have_no_bounds() -> None:
    external = a_spec(slurm=None, endpoints=(ExternalEndpoint("http://10.0.0.7:8000"),))
    assert in_force(a_set(0, spec=external)) == (0, 0)


def test_schedules_that_overlap_are_taken_together_whatever_their_order() -> None:
    schedules = [
        Schedule("night", "0 22 * * *", 3600, min_replicas=0, max_replicas=2),
        Schedule("lectures", "0 8 * * *", 3600, min_replicas=3),
        Schedule("exams", "0 8 * * *", 3600, max_replicas=9),
    ]
    together = ScheduledBounds(("exams", "lectures", "night"), 3, 2)
    assert taken_together(schedules) == together
    assert taken_together(reversed(schedules)) == together
    assert taken_together([]) == ScheduledBounds()
