"""Retries are a share of what clients ask, and a few in any case."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from controlplane.core.retry_budget import RetryBudget


def spent(budget: RetryBudget, now: float) -> int:
    """How many retries it allows at this moment, until it allows no more."""
    count = 0
    while budget.may_retry(now):
        count += 1
    return count


def test_without_requests_there_is_the_floor() -> None:
    assert spent(RetryBudget(), 5.0) == 100


def test_a_fifth_of_the_requests_of_the_last_ten_seconds_may_be_sent_again() -> None:
    budget = RetryBudget(floor_per_second=0)
    for number in range(1000):
        budget.request(100 + number / 100)
    assert spent(budget, 109.99) == 200


def test_what_is_older_than_the_window_counts_no_more() -> None:
    budget = RetryBudget(floor_per_second=0)
    for _ in range(1000):
        budget.request(100)
    assert spent(budget, 108.9) == 200
    assert spent(budget, 111.1) == 0
    budget.request(111.1)
    assert spent(budget, 111.2) == 0  # a fifth of one is none
    for _ in range(4):
        budget.request(118)
    assert spent(budget, 118) == 1
    assert spent(budget, 1e9) == 0


@given(
    st.lists(st.tuples(st.floats(0, 3), st.booleans()), max_size=300),
    st.sampled_from([0.0, 0.1, 1.0]),
)
def test_in_no_window_are_there_more_retries_than_the_budget_says(
    steps: list[tuple[float, bool]], floor: float
) -> None:
    budget = RetryBudget(floor_per_second=floor)
    now = 50.0
    requests: list[float] = []
    retries: list[float] = []
    for wait, is_request in steps:
        now += wait
        if is_request:
            requests.append(now)
            budget.request(now)
        elif budget.may_retry(now):
            retries.append(now)
            lately = [at for at in retries if at > now - 9]  # its slots remember between nine and ten seconds
            asked = [at for at in requests if at > now - 10]
            assert len(lately) <= 0.2 * len(asked) + 10 * floor
