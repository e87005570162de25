"""A key keeps its endpoint as long as it can, and no endpoint is filled above its bound because of that."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from controlplane.core.affinity import BOUND_FACTOR, FREE_IN_FLIGHT, POINTS, Ring, bound, key_of, points_of

KEYS = [key_of(str(number).encode()) for number in range(4000)]


def ring(*names: str) -> Ring:
    return Ring(dict.fromkeys(names, POINTS))


def homes(of: Ring) -> list[str]:
    names = list(of.members)
    return [names[next(of.walk(key))] for key in KEYS]


def test_every_walk_meets_every_member_once() -> None:
    there = ring("a", "b", "c", "d")
    for key in (*KEYS[:200], bytes(8), b"\xff" * 8):
        assert sorted(there.walk(key)) == [0, 1, 2, 3]


def test_an_empty_ring_leads_nowhere() -> None:
    assert list(Ring({}).walk(KEYS[0])) == []


@pytest.mark.parametrize("count", [2, 4, 8, 16])
def test_keys_are_shared_out_about_evenly(count: int) -> None:
    shares = Counter(homes(ring(*(f"cp-s-{number}" for number in range(count)))))
    assert len(shares) == count
    assert max(shares.values()) < 1.4 * len(KEYS) / count
    assert min(shares.values()) > 0.6 * len(KEYS) / count


@pytest.mark.parametrize("count", [2, 4, 8, 16])
def test_one_member_more_moves_only_its_own_part_of_the_keys(count: int) -> None:
    names = [f"cp-s-{number}" for number in range(count + 1)]
    before, after = homes(ring(*names[:-1])), homes(ring(*names))
    moved = [(was, now) for was, now in zip(before, after, strict=True) if was != now]
    assert {now for _, now in moved} == {names[-1]}  # nothing moves between those that were there
    assert 0.6 / (count + 1) < len(moved) / len(KEYS) < 1.4 / (count + 1)


def test_the_keys_of_a_member_that_left_go_where_their_overflow_went() -> None:
    whole, less = ring("a", "b", "c", "d"), ring("a", "b", "d")
    for key in KEYS[:500]:
        way = [list(whole.members)[at] for at in whole.walk(key)]
        assert [list(less.members)[at] for at in less.walk(key)] == [name for name in way if name != "c"]


def test_a_member_of_a_third_of_the_weight_has_a_third_of_the_keys() -> None:
    light = points_of(100, 300)
    shares = Counter(homes(Ring({"heavy": points_of(300, 300), "light": light})))
    assert 0.18 < shares["light"] / len(KEYS) < 0.32
    assert points_of(1, 10_000) > 0


def test_every_process_finds_the_same_home() -> None:
    program = (
        "from controlplane.core.affinity import Ring, key_of; "
        "print([next(Ring({'a': 128, 'b': 128, 'c': 128}).walk(key_of(b'%d' % i))) for i in range(50)])"
    )
    here = [next(ring("a", "b", "c").walk(key_of(b"%d" % i))) for i in range(50)]
    for seed in ("1", "2"):
        there = subprocess.run(
            [sys.executable, "-c", program], env={"PYTHONHASHSEED": seed}, capture_output=True, text=True, check=True
        )
        assert there.stdout.strip() == str(here)


def test_parts_of_a_key_do_not_run_into_each_other() -> None:
    assert key_of(b"ab", b"c") != key_of(b"a", b"bc")
    assert key_of(b"a") != key_of(b"a", b"")
    assert key_of(b"a", memoryview(b"b")) == key_of(b"a", b"b")


@given(
    in_flight=st.lists(st.integers(0, 60), min_size=1, max_size=16),
    seed=st.integers(0, 5),
)
def test_some_endpoint_is_always_below_its_bound(in_flight: list[int], seed: int) -> None:
    shares = [Random(seed).choice([10.0, 100.0, 300.0]) for _ in in_flight]
    assert any(
        count < bound(sum(in_flight), share, sum(shares)) for count, share in zip(in_flight, shares, strict=True)
    )


def test_the_bound_is_a_quarter_above_the_share_but_never_less_than_what_is_no_load() -> None:
    assert bound(99, 1, 4) == BOUND_FACTOR * 100 / 4
    assert bound(99, 1, 1000) == bound(0, 1, 1) == FREE_IN_FLIGHT
