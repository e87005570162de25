"""Seats by themselves: what is kept free, for whom, and for how long. Whose turn it is, `test_waiting` shows."""

from __future__ import annotations

from random import Random

import pytest

from controlplane.core.seats import REMEMBERED_SECONDS, Seats


def seats_for(runs: int, *tenants: str, leaving: int = 0) -> Seats[object]:
    """So many run at once, and these tenants came lately."""
    seats: Seats[object] = Seats(lambda _: 1.0)
    seats.fit(runs, leaving=leaving)
    for tenant in tenants:
        seats.guest(tenant)
    return seats


def taken_by(seats: Seats[object], tenant: str, *, at_most: int = 1000) -> int:
    return next((count for count in range(at_most) if not seats.enter(tenant)), at_most)


@pytest.mark.parametrize(("runs", "kept"), [(1, 0), (2, 0), (3, 0), (4, 0), (5, 1), (10, 2), (64, 12)])
def test_a_fifth_is_kept_free_where_others_came_lately(runs: int, kept: int) -> None:
    assert taken_by(seats_for(runs, "greedy"), "greedy") == runs
    assert taken_by(seats_for(runs, "greedy", "light"), "greedy") == runs - kept


@pytest.mark.parametrize("leaving", [1, 10, 100])
def test_what_leaves_takes_no_seat_from_those_who_come(leaving: int) -> None:
    staying, both = (seats_for(10, "a", "b", leaving=count) for count in (0, leaving))
    for _ in range(leaving):
        assert both.enter("a")  # are in flight where nobody is sent any more
    assert taken_by(both, "a") == taken_by(staying, "a") == 8


def test_who_comes_now_and_then_is_expected_back_though_nobody_ever_finds_it_here() -> None:
    seats = seats_for(10, "greedy", "light")
    assert seats.enter("greedy")
    now = 0.0
    while now < 2 * REMEMBERED_SECONDS:
        assert seats.enter("light")
        seats.leave(seats.guest("light"))
        seats.weigh(now)
        assert seats.open == 8, now
        now += 5.0


def test_who_does_not_come_any_more_is_forgotten_and_nothing_is_kept_for_it() -> None:
    seats = seats_for(10, "greedy", "light")
    for _ in range(8):
        assert seats.enter("greedy")
    for now in range(0, int(REMEMBERED_SECONDS) + 5, 5):
        seats.weigh(float(now))
    assert taken_by(seats, "greedy") == 2


@pytest.mark.parametrize("seed", range(30))
def test_whatever_happens_no_more_are_let_in_than_there_are_seats_and_nobody_waits_for_a_seat_that_is_free(
    seed: int,
) -> None:
    rng = Random(seed)
    weights = {name: rng.choice([0.5, 1.0, 3.0]) for name in "abcd"}
    seats: Seats[object] = Seats(weights.__getitem__)
    held: list[str] = []
    lines: dict[object, str] = {}
    now = 0.0

    def settle() -> None:
        while (one := seats.next_turn()) is not None:
            held.append(lines.pop(one))
        assert seats.taken == len(held)
        assert seats.waiting == len(lines)
        if lines:
            assert seats.taken >= seats.open, "a seat for anybody is free, and somebody waits"

    for _ in range(400):
        match rng.randrange(5):
            case 0:
                seats.fit(rng.choice([0, 1, 2, 3, 4, 5, 20]), leaving=rng.choice([0, 0, 3]))
            case 1 if held:
                seats.leave(seats.guest(held.pop(rng.randrange(len(held)))))
            case 2:
                now += rng.choice([1.0, 5.0, REMEMBERED_SECONDS])
                seats.weigh(now)
            case _:
                tenant = rng.choice("abcd")
                before = seats.taken
                if seats.enter(tenant):
                    assert before < seats.most
                    held.append(tenant)
                else:
                    lines[one := object()] = tenant
                    seats.line_up(seats.guest(tenant), one)
        settle()
