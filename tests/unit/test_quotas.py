"""A minute that slides, and parts that never add up to more than the limit and one request for each other worker."""

from __future__ import annotations

import math
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from controlplane.core.quotas import SlidingMinute, part


def test_what_is_added_counts_for_a_minute_and_then_slides_out() -> None:
    minute = SlidingMinute()
    minute.add(60, 120.0)
    assert minute.used(179.9) == 60
    assert minute.used(180.0) == 60
    assert minute.used(210.0) == pytest.approx(30)
    assert minute.used(239.0) == pytest.approx(1)
    assert minute.used(240.0) == 0


def test_the_minute_before_counts_by_what_of_it_is_in_the_last_sixty_seconds() -> None:
    minute = SlidingMinute()
    minute.add(40, 30.0)
    minute.add(10, 75.0)
    assert minute.used(75.0) == pytest.approx(10 + 40 * 0.75)


def test_a_minute_in_which_nothing_came_is_not_taken_for_the_one_before() -> None:
    minute = SlidingMinute()
    minute.add(40, 30.0)
    assert minute.used(121.0) == 0


def test_what_is_given_back_later_than_it_was_taken_never_makes_the_sum_negative() -> None:
    minute = SlidingMinute()
    minute.add(1000, 59.0)
    minute.add(-990, 119.0)
    assert minute.used(119.0) == 0
    minute.add(5, 121.0)
    assert minute.used(121.0) == 5


def test_a_clock_that_goes_back_counts_as_no_time_passed() -> None:
    minute = SlidingMinute()
    minute.add(5, 120.0)
    minute.add(5, 60.0)
    assert minute.used(60.0) == 10


@given(st.lists(st.tuples(st.floats(0, 119), st.integers(1, 50)), min_size=1, max_size=20), st.integers(0, 200))
def test_the_time_to_wait_is_the_first_at_which_so_little_is_used(added: list[tuple[float, int]], amount: int) -> None:
    minute = SlidingMinute()
    for at, count in sorted(added):
        minute.add(count, at)
    now = max(at for at, _ in added)
    before = minute.used(now)
    wait = minute.seconds_until(amount, now)
    assert minute.seconds_to_empty(now) >= wait - 1e-6
    assert (wait == 0) == (before <= amount)
    assert minute.used(now + wait) <= amount + 1e-6


def test_a_part_is_an_even_one_of_what_is_left_as_far_as_the_others_leave_it() -> None:
    assert part(60, 0, 40, 3) == 20
    assert part(60, 30, 0, 3) == 10
    assert part(60, 30, 25, 3) == 5
    assert part(60, 30, 30, 3) == 0  # the others have it, and will give it back when they ask
    assert part(60, 60, 0, 3) == 0
    assert part(60, 70, 0, 3) == 0
    assert part(60, 0, 0, 1) == 60
    assert part(60, 0, 0, 3, is_idle=True) == 5
    assert part(2, 0, 0, 3, is_idle=True) == 1


def test_the_last_one_is_not_kept_from_a_worker_because_each_other_holds_one() -> None:
    assert part(60, 58, 2, 3) == 1
    assert part(60, 58, 3, 3) == 0


@settings(max_examples=300)
@given(st.integers(1, 40), st.integers(1, 5), st.integers(0, 2**32), st.integers(1, 400))
def test_whoever_asks_when_at_most_one_request_for_each_other_worker_is_too_much(
    limit: int, workers: int, seed: int, steps: int
) -> None:
    """Workers use and ask in any order; what they tell is as old as their last question."""
    rng = Random(seed)
    left = [math.ceil(limit / workers)] * workers  # before anybody has asked
    used = [0] * workers
    told_used = [0] * workers
    told_part = left[:]
    for _ in range(steps):
        one = rng.randrange(workers)
        if rng.random() < 0.7:
            if left[one] >= 1:
                left[one] -= 1
                used[one] += 1
        else:
            others = sum(told_part) - told_part[one]
            left[one] = part(
                limit, used[one] + sum(told_used) - told_used[one], others, workers, is_idle=rng.random() < 0.5
            )
            told_used[one], told_part[one] = used[one], left[one]
        assert sum(used) <= limit + workers - 1
    for _ in range(3 * limit * workers):  # and nothing is kept back in the end
        for one in range(workers):
            others = sum(told_part) - told_part[one]
            left[one] = part(limit, used[one] + sum(told_used) - told_used[one], others, workers)
            used[one] += min(left[one], 1)
            told_used[one], told_part[one] = used[one], max(0, left[one] - 1)
    assert sum(used) >= limit
