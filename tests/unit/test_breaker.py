"""When an endpoint is left alone, for how long, and who may try it again."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from controlplane.core.breaker import Breaker, BreakerState

CLOSED, OPEN, HALF_OPEN = BreakerState.CLOSED, BreakerState.OPEN, BreakerState.HALF_OPEN

TABLE = [
    # what happens, each at its second; the state afterwards; from when on a request may be sent
    ("nothing happens", [], CLOSED, -math.inf),
    ("failures are too few", [(1, "failed"), (2, "failed")], CLOSED, -math.inf),
    ("three fail in a row", [(1, "failed"), (2, "failed"), (3, "failed")], OPEN, 4),
    ("a success between", [(1, "failed"), (2, "failed"), (3, "succeeded"), (4, "failed")], CLOSED, -math.inf),
    ("no connection is made", [(5, "unreachable")], OPEN, 6),
    ("others that had begun fail, too", [(5, "unreachable"), (5.5, "unreachable"), (5.9, "failed")], OPEN, 6),
    ("an old request succeeds", [(5, "unreachable"), (5.5, "succeeded")], OPEN, 6),
    ("a probe is sent", [(5, "unreachable"), (6, "began")], HALF_OPEN, 7),
    ("the probe succeeds", [(5, "unreachable"), (6, "began"), (6.1, "succeeded")], CLOSED, -math.inf),
    ("the probe fails", [(5, "unreachable"), (6, "began"), (6.5, "failed")], OPEN, 8.5),
    (
        "two sent in an emergency fail",
        [(0, "unreachable"), (0, "began"), (0, "began"), (1, "failed"), (1, "failed")],
        OPEN,
        3,
    ),
    ("one sent in an emergency succeeds", [(0, "unreachable"), (0.1, "began"), (0.2, "succeeded")], CLOSED, -math.inf),
    ("the probe's client leaves", [(5, "unreachable"), (6, "began"), (7, "began")], HALF_OPEN, 9),
    (
        "it breaks again after it was whole",
        [(0, "unreachable"), (1, "began"), (2, "failed"), (4, "began"), (5, "succeeded"), (6, "unreachable")],
        OPEN,
        7,
    ),
]  # fmt: skip


def live(breaker: Breaker, events: list[tuple[float, str]]) -> list[bool]:
    """What each event said of itself."""
    said = []
    for at, event in events:
        match event:
            case "began":
                breaker.began(at)
            case "succeeded":
                breaker.succeeded(at)
            case _:
                said.append(breaker.failed(at, is_unreachable=event == "unreachable"))
    return said


@pytest.mark.parametrize(("events", "state", "next_try_at"), [row[1:] for row in TABLE], ids=[row[0] for row in TABLE])
def test_a_breaker_goes_through_its_states(
    events: list[tuple[float, str]], state: BreakerState, next_try_at: float
) -> None:
    breaker = Breaker()
    live(breaker, events)
    assert (breaker.state, breaker.next_try_at) == (state, next_try_at)
    assert breaker.may_try(next_try_at)
    assert state is CLOSED or not breaker.may_try(math.nextafter(next_try_at, -math.inf))


def test_while_a_probe_is_under_way_nobody_else_tries() -> None:
    breaker = Breaker()
    breaker.failed(0, is_unreachable=True)
    assert breaker.may_try(1)
    breaker.began(1)
    assert not breaker.may_try(1)
    assert not breaker.may_try(1.9)
    breaker.succeeded(1.9)
    assert breaker.may_try(1.9)


def test_the_back_off_doubles_up_to_its_end_and_begins_anew_after_a_success() -> None:
    breaker, now, waits = Breaker(), 0.0, []
    breaker.failed(now, is_unreachable=True)
    for _ in range(6):
        waits.append(breaker.next_try_at - now)
        now = breaker.next_try_at
        breaker.began(now)
        breaker.failed(now)
    assert waits == [1, 2, 4, 8, 10, 10]
    breaker.began(now + 10)
    breaker.succeeded(now + 10)
    breaker.failed(now + 11, is_unreachable=True)
    assert breaker.next_try_at == now + 12


def test_it_says_once_that_it_broke() -> None:
    breaker = Breaker()
    events = [(1, "failed"), (1, "failed"), (1, "failed"), (1, "failed"), (2, "began"), (2, "failed")]
    assert live(breaker, [(float(at), event) for at, event in events]) == [False, False, True, False, False]


@given(
    st.lists(st.tuples(st.floats(0, 20), st.sampled_from(["began", "succeeded", "failed", "unreachable"])), max_size=40)
)
def test_whatever_happens_it_may_be_tried_again_within_the_longest_back_off(steps: list[tuple[float, str]]) -> None:
    breaker, now = Breaker(), 0.0
    for wait, event in steps:
        now += wait
        live(breaker, [(now, event)])
        assert breaker.may_try(now + 10)
        assert (breaker.state is CLOSED) == (breaker.next_try_at == -math.inf)
    breaker.began(now + 10)
    breaker.succeeded(now + 10)
    assert breaker.state is CLOSED
