"""Who passes on a request now, who waits, whose turn it is, and when waiting ends."""

from __future__ import annotations

import itertools
import random
from contextlib import suppress
from statistics import quantiles

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from controlplane.core.seats import REMEMBERED_SECONDS
from controlplane.proxy.directory import Snapshot
from controlplane.proxy.errors import ApiError
from controlplane.proxy.waiting import WaitingOptions, Waits
from tests.unit.waiting_rig import MODEL, Rig, Visit, a_rig, a_snapshot, an_endpoint

ONE = a_snapshot(an_endpoint(1))
TWO = a_snapshot(an_endpoint(1), an_endpoint(2))
NONE = a_snapshot()


def told(visit: Visit) -> tuple[int, str | None, dict[bytes, bytes]]:
    assert visit.refusal is not None
    return visit.refusal.status, visit.refusal.code, dict(visit.refusal.headers)


def refusal(rig: Rig, tenant: str = "t") -> tuple[int, str | None]:
    with pytest.raises(ApiError) as refused:
        rig.visit(tenant)
    return refused.value.status, refused.value.code


# --- seats -------------------------------------------------------------------------------------------------


def test_one_tenant_alone_fills_what_the_replicas_run_at_once_and_no_more() -> None:
    rig = a_rig(seats=4)
    rig.follow(TWO)
    visits = [rig.visit() for _ in range(9)]
    assert [visit.waiting is None for visit in visits] == [True] * 8 + [False]


def test_a_newcomer_gets_in_at_once_while_a_greedy_tenant_fills_the_replicas() -> None:
    rig = a_rig(seats=8)
    rig.follow(ONE)
    greedy = [rig.visit("greedy") for _ in range(20)]
    assert [rig.visit("light").waiting is None for _ in range(3)] == [True, True, False]
    rig.leave(greedy[0])
    rig.time.pass_()
    assert [visit.tenant for visit in rig.seated].count("light") == 3, "the seat goes to whoever holds fewer"
    assert rig.rooms.queued == {MODEL: 12}


def test_where_another_came_lately_a_fifth_is_kept_free_for_it_and_after_a_while_no_more() -> None:
    rig = a_rig(seats=10)
    rig.follow(ONE)
    greedy = [rig.visit("greedy") for _ in range(10)]
    rig.leave(rig.visit("light"))
    for visit in greedy[:5]:
        rig.leave(visit)
    assert [rig.visit("greedy").waiting is None for _ in range(4)] == [True] * 3 + [False], "eight of the ten"
    rig.leave(rig.visit("light"))
    rig.time.pass_(200)
    rig.follow(ONE)
    assert len(rig.seated) == 8
    rig.time.pass_(REMEMBERED_SECONDS)
    rig.follow(ONE)
    assert [rig.visit("greedy").waiting is None for _ in range(3)] == [True] * 2 + [False], "it is alone again"


def test_two_greedy_tenants_fill_what_the_replicas_run() -> None:
    rig = a_rig(seats=10)
    rig.follow(ONE)
    for _ in range(20):
        rig.visit("one")
        rig.visit("other")
    assert [visit.tenant for visit in rig.seated].count("one") == 5
    assert len(rig.seated) == 10


def test_seats_are_shared_out_among_the_live_workers() -> None:
    workers = 2
    rig = a_rig(seats=5, workers=lambda: workers)
    rig.follow(TWO)
    visits = [rig.visit() for _ in range(10)]
    assert len(rig.seated) == 5
    workers = 1
    rig.time.pass_(1)  # the next sweep notices
    assert [visit.seated_at for visit in visits] == [0.0] * 5 + [0.25] * 5


def test_many_workers_have_a_seat_each_at_least() -> None:
    rig = a_rig(seats=1, workers=lambda: 8)
    rig.follow(ONE)
    assert rig.visit().waiting is None


def test_requests_on_an_endpoint_that_leaves_take_no_seat_from_the_others() -> None:
    in_flight = {"http://n1": 4}
    rig = a_rig(seats=4, in_flight_of=lambda url: in_flight.get(url, 0))
    rig.follow(ONE)
    old = [rig.visit() for _ in range(4)]
    rig.follow(a_snapshot(an_endpoint(2)))
    assert [rig.visit().waiting is None for _ in range(5)] == [True] * 4 + [False]
    for _ in range(4):
        in_flight["http://n1"] -= 1
        rig.leave(old.pop())
        rig.time.pass_()
    rig.time.pass_(1)
    assert len(rig.seated) == 4, "what has left leaves no seats behind"


def test_a_model_that_nobody_serves_has_no_seat() -> None:
    rig = a_rig()
    rig.follow(ONE)
    assert not rig.rooms.enter("other", "t")
    with pytest.raises(ApiError) as refused:
        rig.rooms.wait("other", "t", lambda: None, lambda _: None, 0.0, is_stream=True)
    assert refused.value.code == "model_not_found"


# --- turns -------------------------------------------------------------------------------------------------


def test_within_a_tenant_whoever_came_first_goes_first() -> None:
    rig = a_rig(seats=1)
    rig.follow(ONE)
    first, *others = (rig.visit() for _ in range(5))
    for visit in (first, *others):
        assert rig.seated == [visit]
        rig.leave(visit)
        rig.time.pass_()


def test_whoever_comes_while_others_of_its_tenant_wait_does_not_pass_them() -> None:
    rig = a_rig(seats=4)
    rig.follow(NONE)
    waiting = rig.visit()
    rig.follow(ONE)  # its turn is due, and not called yet
    assert rig.visit().waiting is None, "there is a seat for both"
    rig.time.pass_()
    assert waiting.seated_at == 0.0


def test_with_one_seat_two_tenants_take_turns_however_many_one_has_waiting() -> None:
    rig = a_rig(seats=1)
    rig.follow(ONE)
    rig.visit("greedy")
    for _ in range(100):
        rig.visit("greedy")
    order: list[str] = []
    for _ in range(3):
        rig.visit("light")
    while len(order) < 9:
        visit = rig.seated[0]
        order.append(visit.tenant)
        rig.leave(visit)
        rig.time.pass_()
    assert order.count("light") == 3
    assert max(len([*run]) for _, run in itertools.groupby(order[1:7])) <= 2


def test_a_tenant_of_twice_the_weight_holds_twice_the_seats() -> None:
    rig = a_rig(seats=30, weights={"heavy": 2.0})
    rig.follow(ONE)
    rng = random.Random(1)
    for _ in range(100):
        rig.visit("heavy")
        rig.visit("plain")
    for _ in range(300):
        gone = rng.choice(rig.seated)
        rig.leave(gone)
        rig.visit(gone.tenant)
        rig.time.pass_()
    held = [visit.tenant for visit in rig.seated]
    assert held.count("heavy") == pytest.approx(20, abs=1)


def test_a_weight_that_is_changed_holds_from_then_on() -> None:
    weights = {"heavy": 1.0}
    rig = a_rig(seats=30, weights=weights)
    rig.follow(ONE)
    for _ in range(100):
        rig.visit("heavy")
        rig.visit("plain")
    weights["heavy"] = 2.0
    rig.follow(ONE)
    rng = random.Random(1)
    for _ in range(300):
        gone = rng.choice(rig.seated)
        rig.leave(gone)
        rig.visit(gone.tenant)
        rig.time.pass_()
    assert [visit.tenant for visit in rig.seated].count("heavy") == pytest.approx(20, abs=1)


def light_waits(rng: random.Random, *, is_greedy_there: bool) -> list[float]:
    """A tenant that asks now and then, at a replica with 64 seats; and one that always has 500 requests, or none."""
    rig = a_rig(seats=64)
    rig.follow(ONE)

    def serve(visit: Visit) -> None:
        # the engine starts what it has a seat for at once, and the rest as seats get free: ours are a quarter more
        queue_ahead = max(0, len(rig.seated) - 64)
        seconds = rng.expovariate(1 / 2.0) + queue_ahead * 2.0 / 64
        rig.time.call_later(seconds, lambda: end(visit))

    def end(visit: Visit) -> None:
        rig.leave(visit)
        if visit.tenant == "light":
            done.append(rig.time.now - visit.at)
        else:
            rig.visit("greedy", on_turn=serve)

    done: list[float] = []
    if is_greedy_there:
        for _ in range(500):
            rig.visit("greedy", on_turn=serve)
    for _ in range(2000):
        rig.time.pass_(rng.expovariate(4.0))
        rig.visit("light", on_turn=serve)
    rig.time.pass_(30)
    return done


def test_a_greedy_tenant_of_500_does_not_make_a_light_one_wait() -> None:
    alone = light_waits(random.Random(7), is_greedy_there=False)
    beside = light_waits(random.Random(7), is_greedy_there=True)
    assert len(alone) == len(beside) == 2000
    assert quantiles(beside, n=20)[-1] <= 1.2 * quantiles(alone, n=20)[-1]


# --- bounds ------------------------------------------------------------------------------------------------


def test_a_room_that_is_full_refuses_at_once_and_says_when_to_come_again() -> None:
    rig = a_rig(WaitingOptions(max_waiting_per_model=4, max_waiting_per_tenant=3))
    rig.follow(NONE)
    for tenant in ("a", "a", "a"):
        rig.visit(tenant)
    assert refusal(rig, "a") == (429, "queue_full")
    last = rig.visit("b")
    assert refusal(rig, "b") == (429, "queue_full")
    assert last.waiting is not None
    last.waiting.leave()
    assert rig.visit("b").waiting is not None


def test_the_defaults_let_200_wait_for_a_first_replica_and_one_tenant_have_500_requests() -> None:
    rig = a_rig(seats=256)
    rig.follow(NONE)
    visits = [rig.visit() for _ in range(200)]
    rig.follow(ONE)
    rig.time.pass_()
    assert all(visit.seated_at is not None for visit in visits)
    assert [rig.visit().refusal for _ in range(300)] == [None] * 300


# --- how long ----------------------------------------------------------------------------------------------


def test_when_the_time_to_hold_is_over_the_estimate_is_told() -> None:
    rig = a_rig()
    rig.follow(a_snapshot(start_seconds_p95=90.0))
    stream, plain = rig.visit(), rig.visit(is_stream=False)
    rig.time.pass_(49.9)
    assert plain.refusal is None
    rig.time.pass_(1)
    assert told(plain) == (503, "model_starting", {b"retry-after": b"60"})
    rig.time.pass_(548)
    assert stream.refusal is None
    rig.time.pass_(2)
    assert told(stream)[:2] == (503, "model_starting")
    assert rig.time.is_idle, "no timer runs while nobody waits"


def test_when_the_time_to_queue_is_over_the_queue_is_full() -> None:
    rig = a_rig(seats=1)
    rig.follow(ONE)
    rig.visit()
    waiting, plain = rig.visit(), rig.visit(is_stream=False)
    rig.time.pass_(50.5)
    assert told(plain)[:2] == (429, "queue_full")
    rig.time.pass_(10)
    assert told(waiting) == (429, "queue_full", {b"retry-after": b"5"})
    assert waiting.refused_at == pytest.approx(60.25, abs=0.3)


def test_who_was_held_has_the_whole_time_to_queue_once_a_replica_serves() -> None:
    rig = a_rig(seats=1)
    rig.follow(NONE)
    first, second = rig.visit(), rig.visit()
    rig.time.pass_(300)
    rig.follow(ONE)
    rig.time.pass_(59)
    assert (first.seated_at, second.refusal) == (300.0, None)
    rig.time.pass_(2)
    assert told(second)[:2] == (429, "queue_full")


def test_those_who_wait_are_let_in_when_an_endpoint_becomes_routable_as_far_as_there_are_seats() -> None:
    rig = a_rig(seats=3)
    rig.follow(NONE)
    visits = [rig.visit(tenant) for tenant in ("a", "a", "a", "b", "b", "b")]
    rig.follow(ONE)
    rig.time.pass_()
    seated = [visit for visit in visits if visit.seated_at is not None]
    assert len(seated) == 4, "three seats, and one of the reserve"
    assert sorted(visit.tenant for visit in seated) == ["a", "a", "b", "b"]
    assert visits[0] in seated
    assert visits[3] in seated


# --- models that will not come -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("snapshot", "status", "code"),
    [
        (a_snapshot(is_paused=True), 503, "model_paused"),
        (a_snapshot(can_start=False), 503, "model_starting"),
        (Snapshot({}, {}, {}), 404, "model_not_found"),
    ],
)
def test_who_waits_for_what_will_not_come_is_told_at_once(snapshot: Snapshot, status: int, code: str) -> None:
    rig = a_rig()
    rig.follow(NONE)
    waiting = rig.visit()
    rig.follow(snapshot)
    rig.time.pass_()
    assert told(waiting)[:2] == (status, code)
    assert refusal(rig) == (status, code)
    assert not rig.rooms.held


def test_a_model_that_comes_back_is_served_again_and_its_old_seats_can_be_given_back() -> None:
    rig = a_rig(seats=1)
    rig.follow(ONE)
    old = rig.visit()
    rig.follow(Snapshot({}, {}, {}))
    rig.follow(ONE)
    waiting = rig.visit()
    rig.leave(old)
    rig.time.pass_()
    assert waiting.seated_at is not None


# --- what is asked for -------------------------------------------------------------------------------------


def test_of_a_model_that_is_known_it_is_told_that_nobody_waits() -> None:
    rig = a_rig()
    assert rig.rooms.waiting == {}
    rig.follow(NONE)
    assert rig.rooms.waiting == {MODEL: 0}


def test_whoever_rests_until_somebody_waits_hears_of_a_queue() -> None:
    rig = a_rig(seats=1)
    queues: list[float] = []
    rig.rooms.on_queue = lambda: queues.append(rig.time.now)
    rig.follow(ONE)
    first = rig.visit()
    assert queues == []
    rig.visit()
    rig.visit()
    assert queues == [0.0]
    rig.time.pass_(1)
    rig.leave(first)
    assert queues == [0.0], "it is the same queue still"


def test_a_hold_asks_for_a_replica_at_once_and_a_queue_when_it_has_lasted() -> None:
    rig = a_rig(seats=1)
    changes: list[float] = []
    rig.rooms.on_hold = lambda: changes.append(rig.time.now)
    rig.follow(NONE)
    rig.visit()
    rig.visit()
    assert changes == [0.0]
    assert rig.rooms.asks(0.0) == {MODEL: Waits(held=2)}
    assert (rig.rooms.held, rig.rooms.queued, rig.rooms.waiting) == ({MODEL: 2}, {}, {MODEL: 2})
    rig.time.pass_(10)
    rig.follow(ONE)
    assert (rig.rooms.held, rig.rooms.queued, rig.rooms.waiting) == ({}, {MODEL: 1}, {MODEL: 1})
    assert rig.rooms.asks(14.9) == {}
    assert rig.rooms.asks(15.0) == {MODEL: Waits(queued=1)}


def test_a_queue_that_was_empty_in_between_has_not_lasted() -> None:
    rig = a_rig(seats=1)
    rig.follow(ONE)
    first, second = rig.visit(), rig.visit()
    rig.time.pass_(4)
    rig.leave(first)
    rig.time.pass_()
    assert second.seated_at == 4.0
    rig.visit()
    assert rig.rooms.asks(8.0) == {}
    assert rig.rooms.asks(9.0) == {MODEL: Waits(queued=1)}


# --- leaving -----------------------------------------------------------------------------------------------


def test_who_leaves_when_its_turn_is_due_gives_its_seat_to_the_next() -> None:
    rig = a_rig(seats=1)
    rig.follow(ONE)
    first, second, third = rig.visit(), rig.visit(), rig.visit()
    rig.leave(first)
    assert second.waiting is not None
    second.waiting.leave()
    second.waiting.leave()
    rig.time.pass_()
    assert (second.seated_at, third.seated_at) == (None, 0.0)


class Rooms(RuleBasedStateMachine):
    """Any order of coming, leaving in any state, replicas that come and go, and time: no seat is lost or doubled."""

    def __init__(self) -> None:
        super().__init__()
        self.rig = a_rig(WaitingOptions(max_waiting_per_model=6, max_waiting_per_tenant=4), seats=2)
        self.visits: list[Visit] = []
        self.endpoints = 0
        self.rig.follow(NONE)

    @rule(tenant=st.sampled_from("abc"), is_stream=st.booleans())
    def come(self, tenant: str, is_stream: bool) -> None:
        with suppress(ApiError):
            self.visits.append(self.rig.visit(tenant, is_stream=is_stream))

    @precondition(lambda self: self.visits)
    @rule(data=st.data())
    def go(self, data: st.DataObject) -> None:
        visit = data.draw(st.sampled_from(self.visits))
        self.visits.remove(visit)
        if visit.waiting is not None:
            visit.waiting.leave()
            visit.waiting.leave()
        if visit in self.rig.seated:
            self.rig.leave(visit)

    @rule(count=st.integers(0, 3))
    def scale(self, count: int) -> None:
        self.endpoints = count
        self.rig.follow(a_snapshot(*map(an_endpoint, range(count))))

    @rule(snapshot=st.sampled_from([a_snapshot(is_paused=True), Snapshot({}, {}, {})]))
    def refuse(self, snapshot: Snapshot) -> None:
        self.endpoints = 0
        self.rig.follow(snapshot)

    @rule(seconds=st.sampled_from([0.0, 0.3, 70.0]))
    def wait(self, seconds: float) -> None:
        self.rig.time.pass_(seconds)

    @invariant()
    def every_seat_has_its_request(self) -> None:
        room = self.rig.rooms._rooms.get(MODEL)
        if room is None:
            assert not self.rig.seated
            return
        turns = sum(
            1
            for visit in self.visits
            if visit.waiting is not None and visit.waiting._state.name == "TURN" and visit.seated_at is None
        )
        waiting = sum(1 for visit in self.visits if visit.waiting and visit.waiting._state.name == "WAITING")
        seats, guests = room.seats, room.seats._guests.values()
        assert seats.taken == len(self.rig.seated) + turns == sum(one.seats for one in guests)
        assert seats.waiting == waiting == sum(len(one.line) for one in guests)
        assert seats._weights == pytest.approx(sum(one.weight for one in guests))
        assert not (seats.waiting and seats.taken < seats.open), "nobody waits while there is a seat for anybody"
        assert seats.open == (seats.runs if len(guests) < 2 else seats.runs - seats.runs // 5)

    def teardown(self) -> None:
        self.rig.time.pass_()
        while self.rig.seated:
            self.rig.leave(self.rig.seated[0])
            self.rig.time.pass_()
        self.rig.follow(Snapshot({}, {}, {}))
        self.rig.time.pass_(1)
        assert self.rig.time.is_idle
        assert MODEL not in self.rig.rooms._rooms, "no seat was lost"


Rooms.TestCase.settings = settings(max_examples=200, stateful_step_count=40, deadline=None)
TestRooms = Rooms.TestCase
