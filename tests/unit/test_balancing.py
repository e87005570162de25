"""Who gets the next request: by what is in flight, by share, by time, by breaker; and what may be sent again."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from datetime import timedelta
from random import Random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from controlplane.core.affinity import BOUND_FACTOR, FREE_IN_FLIGHT, key_of
from controlplane.core.balancing import LEAST_SHARE, Failure, Pool, may_retry, policy_of, share_of
from controlplane.core.types import RoutingPolicy
from tests.unit.upstreams import AT, NOW, Upstream, an_endpoint, an_upstream, break_for_good, loads, upstreams

LITTLE = timedelta(seconds=1)
KEYS = [key_of(str(number).encode()) for number in range(200)]


def pool(those: Sequence[Upstream], seed: int = 1, *, with_ring: bool = False) -> Pool[Upstream]:
    made = Pool(those, Random(seed), NOW, AT)
    if with_ring:
        made.form_ring(None)
    return made


def fill(
    of: Pool[Upstream], requests: int, now: float = AT, key: Callable[[int], bytes | None] = lambda _: None
) -> None:
    """Give it requests that do not end."""
    for number in range(requests):
        chosen = of.pick(key(number), (), now)
        assert chosen is not None
        chosen.in_flight += 1


# --- least in-flight of two --------------------------------------------------------------------------------


def test_of_two_endpoints_the_one_with_fewer_requests_is_picked() -> None:
    those = [an_upstream("a", 3), an_upstream("b", 1)]
    for seed in range(20):
        assert pool(those, seed).pick(None, (), AT) is those[1]


def test_equals_are_told_apart_by_chance() -> None:
    of = pool(upstreams(3))
    picked = Counter(chosen.url for _ in range(3000) if (chosen := of.pick(None, (), AT)))
    assert all(850 <= count <= 1150 for count in picked.values())
    assert len(picked) == 3


def test_nothing_is_picked_where_nothing_is_routable() -> None:
    assert pool([]).pick(None, (), AT) is None
    assert pool([], with_ring=True).pick(KEYS[0], (), AT) is None


@pytest.mark.parametrize("count", [2, 3, 8, 16])
def test_no_endpoint_gets_much_more_than_another(count: int) -> None:
    those = upstreams(count)
    fill(pool(those), 100 * count)
    assert max(loads(those)) - min(loads(those)) <= 6  # by chance alone it would be 60


@pytest.mark.parametrize("times", [1, 3, 30])
def test_an_endpoint_of_several_times_the_weight_has_so_many_times_as_many_in_flight(times: int) -> None:
    those = [*upstreams(3), an_upstream("big", routing=RoutingPolicy(weight=100 * times))]
    fill(pool(those), 100 * (3 + times))
    assert abs(those[3].in_flight - 100 * times) <= 9
    assert all(abs(count - 100) <= 6 for count in loads(those[:3]))


@given(
    counts=st.lists(st.integers(0, 5), max_size=6),
    tried=st.sets(st.integers(0, 5)),
    broken=st.sets(st.integers(0, 5)),
    seed=st.integers(0, 9),
    key=st.none() | st.sampled_from(KEYS),
)
def test_what_is_picked_was_not_tried_and_is_whole_if_one_is(
    counts: list[int], tried: set[int], broken: set[int], seed: int, key: bytes | None
) -> None:
    those = [an_upstream(str(number), count) for number, count in enumerate(counts)]
    break_for_good(*(one for number, one in enumerate(those) if number in broken))
    urls = {one.url for number, one in enumerate(those) if number in tried}
    chosen = pool(those, seed, with_ring=key is not None).pick(key, urls, AT)
    left = [one for one in those if one.url not in urls]
    assert (chosen is None) == (not left)
    if chosen is not None:
        assert chosen.url not in urls
        assert chosen.breaker.may_try(AT) or not any(one.breaker.may_try(AT) for one in left)


def test_a_request_that_failed_is_sent_to_the_least_loaded_of_the_others() -> None:
    those = [an_upstream("a", 0), an_upstream("b", 7), an_upstream("c", 5), an_upstream("d", 6)]
    for seed in range(20):
        assert pool(those, seed).pick(None, {those[0].url}, AT) is those[2]


@pytest.mark.parametrize("key", [None, *KEYS[:4]])
def test_no_endpoint_is_filled_above_what_it_takes_at_once_while_another_has_room(key: bytes | None) -> None:
    those = upstreams(4, RoutingPolicy(max_in_flight=16))
    of = pool(those, with_ring=True)
    fill(of, 64, key=lambda _: key)
    assert loads(those) == [16, 16, 16, 16]
    assert of.pick(key, (), AT) in those  # how much all may have together is not decided here
    small = [an_upstream("small", routing=RoutingPolicy(max_in_flight=5)), *upstreams(2)]
    fill(pool(small, with_ring=True), 60, key=lambda _: key)
    assert small[0].in_flight <= 5


# --- walltime and slow start --------------------------------------------------------------------------------


@pytest.mark.parametrize("key", [None, *KEYS[:8]])
def test_an_endpoint_that_ends_soon_gets_a_request_only_if_no_other_can_take_it(key: bytes | None) -> None:
    ending, lasting = an_upstream("a", yields_at=NOW - LITTLE), an_upstream("b", 2, yields_at=NOW + 60 * LITTLE)
    of = pool([ending, lasting], with_ring=True)
    assert of.pick(key, (), AT) is lasting
    assert of.pick(key, {lasting.url}, AT) is ending
    assert pool([ending], with_ring=True).pick(key, (), AT) is ending
    break_for_good(lasting)
    assert of.pick(key, (), AT) is ending


def test_an_endpoint_yields_from_its_moment_on_without_a_new_reading() -> None:
    ending, lasting = an_upstream("a", yields_at=NOW + 5 * LITTLE), an_upstream("b", 9)
    of = pool([ending, lasting])
    assert of.pick(None, (), AT + 4.9) is ending
    assert of.pick(None, (), AT + 5) is lasting


def test_where_all_end_soon_they_share_as_always() -> None:
    those = [an_upstream(name, yields_at=NOW - LITTLE) for name in "ab"]
    fill(pool(those), 40)
    assert loads(those) == [20, 20]


def test_a_share_grows_in_a_straight_line_to_the_whole_weight() -> None:
    seconds: Sequence[float] = (0, 1, 15, 29.9, 30, 99, -5)
    assert [round(share_of(100, of, 30), 1) for of in seconds] == [10, 10, 50, 99.7, 100, 100, 10]
    assert share_of(100, 0, 0) == 100
    assert LEAST_SHARE == 0.1


@pytest.mark.parametrize(("at", "expected"), [(0, 10), (15, 50), (24, 80), (30, 100), (300, 100)])
@pytest.mark.parametrize("has_affinity", [False, True])
def test_a_fresh_replica_is_not_flooded(at: float, expected: int, has_affinity: bool) -> None:
    fresh = an_upstream("fresh", first_ready_at=NOW)
    those = [*(an_upstream(str(number), 100) for number in range(3)), fresh]
    of = pool(those, with_ring=has_affinity)
    for number in range(1500):  # requests end as fast as they come, so that the three stay as full as they are
        chosen = of.pick(KEYS[number % len(KEYS)] if has_affinity else None, (), AT + at)
        if chosen is fresh:
            fresh.in_flight += 1
    if has_affinity:
        assert fresh.in_flight <= BOUND_FACTOR * (300 + fresh.in_flight + 1) * expected / (300 + expected) + 1
    else:
        assert abs(fresh.in_flight - expected) <= 1


def test_the_keys_of_a_fresh_replica_stay_where_they_were_until_it_may_have_them() -> None:
    old = [an_upstream(str(number), 100) for number in range(3)]
    before = pool(old, with_ring=True)
    fresh = an_upstream("fresh", FREE_IN_FLIGHT + 40, first_ready_at=NOW)
    after = pool([*old, fresh], with_ring=True)
    assert [after.pick(key, (), AT) for key in KEYS] == [before.pick(key, (), AT) for key in KEYS]
    moved = [key for key in KEYS if after.pick(key, (), AT + 60) is fresh]
    assert 0.1 < len(moved) / len(KEYS) < 0.4


# --- breakers ----------------------------------------------------------------------------------------------


def test_if_all_breakers_are_open_the_one_that_may_be_tried_soonest_is_and_never_twice() -> None:
    those = upstreams(3)
    for one, at in zip(those, (AT - 0.1, AT - 0.5, AT - 0.3), strict=True):
        one.breaker.failed(at, is_unreachable=True)
    for key in (None, KEYS[0]):
        of = pool(those, with_ring=key is not None)
        tried: list[str] = []
        while (chosen := of.pick(key, tried, AT)) is not None:
            tried.append(chosen.url)
        assert tried == [those[1].url, those[2].url, those[0].url]


def test_an_endpoint_is_probed_by_one_request_when_its_back_off_is_over() -> None:
    those = upstreams(2)
    those[1].in_flight = 50
    those[0].breaker.failed(AT, is_unreachable=True)
    of = pool(those)
    assert of.pick(None, (), AT + 0.9) is those[1]
    assert of.pick(None, (), AT + 1) is those[0]
    those[0].breaker.began(AT + 1)
    assert of.pick(None, (), AT + 1.1) is those[1]
    those[0].breaker.succeeded(AT + 1.2)
    assert of.pick(None, (), AT + 1.2) is those[0]


# --- affinity ----------------------------------------------------------------------------------------------


def test_the_same_key_goes_to_the_same_endpoint() -> None:
    those = upstreams(8)
    for key in KEYS:
        assert (
            len({chosen.url for seed in range(5) if (chosen := pool(those, seed, with_ring=True).pick(key, (), AT))})
            == 1
        )


def test_a_retry_goes_where_the_overflow_of_its_key_goes() -> None:
    those = upstreams(4)
    of = pool(those, with_ring=True)
    for key in KEYS[:20]:
        home = of.pick(key, (), AT)
        assert home is not None
        second = of.pick(key, {home.url}, AT)
        home.in_flight = 100
        assert of.pick(key, (), AT) is second
        home.in_flight = 0


@given(
    weights=st.lists(st.sampled_from([50, 100, 300]), min_size=1, max_size=12),
    keys=st.lists(st.integers(0, 5), min_size=1, max_size=150),
    ends=st.randoms(use_true_random=False),
)
def test_no_key_however_hot_fills_an_endpoint_above_its_bound(weights: list[int], keys: list[int], ends: Any) -> None:
    those = [an_upstream(str(number), routing=RoutingPolicy(weight=weight)) for number, weight in enumerate(weights)]
    of = pool(those, with_ring=True)
    under_way: list[Upstream] = []
    for number in keys:
        if under_way and ends.random() < 0.3:
            under_way.pop(ends.randrange(len(under_way))).in_flight -= 1
        total = len(under_way)
        chosen = of.pick(KEYS[number], (), AT)
        assert chosen is not None
        share = chosen.endpoint.weight / sum(weights)
        assert chosen.in_flight < max(FREE_IN_FLIGHT, BOUND_FACTOR * (total + 1) * share)
        chosen.in_flight += 1
        under_way.append(chosen)


def test_an_open_breaker_takes_nothing_away_from_the_bounds_of_the_others() -> None:
    those = upstreams(4)
    whole = pool(those[1:], with_ring=True)
    broken = pool(those, with_ring=True)
    break_for_good(those[0])
    for one in those[1:]:
        one.in_flight = 30
    assert [broken.pick(key, (), AT) for key in KEYS] == [whole.pick(key, (), AT) for key in KEYS]
    fill(broken, 300, key=lambda number: KEYS[number % len(KEYS)])
    assert those[0].in_flight == 0


# --- policies and failures -----------------------------------------------------------------------------------


def test_the_set_with_the_best_priority_says_how_its_model_is_routed() -> None:
    policies = [RoutingPolicy(weight=weight) for weight in (1, 2, 3)]
    those = [
        an_endpoint("a", policies[0], priority=100, replica_set="x"),
        an_endpoint("b", policies[1], priority=10, replica_set="z"),
        an_endpoint("c", policies[2], priority=10, replica_set="y"),
    ]
    assert policy_of(those) is policies[2]
    assert policy_of(those[:2]) is policies[1]


@pytest.mark.parametrize(
    ("failure", "is_allowed"),
    [
        (Failure.REFUSED, True),
        (Failure.CONNECT_TIMEOUT, True),
        (Failure.LOST, True),
        (Failure.ENGINE_FAILED, True),
        (Failure.LATE, False),
        (Failure.BROKEN, False),
    ],
)
def test_a_request_is_sent_again_unless_it_is_worked_on_or_answered(failure: Failure, is_allowed: bool) -> None:
    assert may_retry(failure) is is_allowed


@pytest.mark.parametrize("failure", [Failure.LOST, Failure.ENGINE_FAILED])
@pytest.mark.parametrize("before", [Failure.LOST, Failure.ENGINE_FAILED])
def test_what_may_have_killed_an_engine_is_sent_again_once(failure: Failure, before: Failure) -> None:
    assert may_retry(failure, (Failure.REFUSED, Failure.CONNECT_TIMEOUT))
    assert not may_retry(failure, (before,))


@pytest.mark.parametrize("failure", Failure)
def test_what_an_upstream_may_keep_is_sent_again_only_if_no_connection_was_made(failure: Failure) -> None:
    is_allowed = may_retry(failure, is_repeatable=False)
    assert is_allowed is (failure in (Failure.REFUSED, Failure.CONNECT_TIMEOUT))


def test_what_no_connection_was_made_for_is_always_sent_again() -> None:
    assert may_retry(Failure.REFUSED, tuple(Failure), is_repeatable=False)


def test_every_failure_has_been_thought_of() -> None:
    names = {failure.value for failure in Failure}
    assert names == {"refused", "connect_timeout", "lost", "late", "engine_failed", "broken"}
