"""Least in-flight, and the one kind of failure after which a request may be sent again."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from controlplane.core.balancing import Failure, may_retry, pick
from controlplane.core.types import RoutableEndpoint

NOW = datetime(2026, 1, 1, 12, tzinfo=UTC)
LITTLE = timedelta(seconds=1)
NAMES = ("a", "b", "c", "d")


def endpoints(names: Sequence[str]) -> list[RoutableEndpoint]:
    return [
        RoutableEndpoint(
            endpoint_id=number,
            model="m",
            replica_set="s",
            priority=100,
            url=name,
            api_key=None,
            replica=None,
            first_ready_at=datetime(2026, 1, 1, tzinfo=UTC),
            ends_at=None,
        )
        for number, name in enumerate(names)
    ]


def test_the_endpoint_with_the_fewest_requests_in_flight_is_picked() -> None:
    chosen = pick(endpoints(["a", "b", "c"]), {"a": 3, "b": 1, "c": 2}, Random(1), now=NOW)
    assert chosen is not None
    assert chosen.url == "b"


def test_an_endpoint_without_a_count_has_nothing_in_flight() -> None:
    chosen = pick(endpoints(["a", "b"]), {"a": 1}, Random(1), now=NOW)
    assert chosen is not None
    assert chosen.url == "b"


def test_ties_are_shared_out_by_chance() -> None:
    rng = Random(7)
    picked = Counter(
        chosen.url for _ in range(3000) if (chosen := pick(endpoints(["a", "b", "c"]), {"c": 1}, rng, now=NOW))
    )
    assert set(picked) == {"a", "b"}
    assert all(1350 <= count <= 1650 for count in picked.values())


def test_nothing_is_picked_when_nothing_is_routable() -> None:
    assert pick([], {}, Random(1), now=NOW) is None


def test_an_endpoint_that_ends_soon_gets_a_request_only_if_no_other_can_take_it() -> None:
    ending, lasting = (
        replace(one, yields_at=NOW + by) for one, by in zip(endpoints(["a", "b"]), (-LITTLE, LITTLE), strict=True)
    )
    for in_flight in ({}, {"b": 9}):
        assert pick([ending, lasting], in_flight, Random(1), now=NOW) == lasting
    assert pick([ending, lasting], {}, Random(1), {"b"}, now=NOW) == ending
    assert pick([ending], {}, Random(1), now=NOW) == ending
    assert pick([ending, lasting], {"a": 1, "b": 0}, Random(1), now=NOW - 2 * LITTLE) == lasting  # neither does yet


@given(
    names=st.lists(st.sampled_from(NAMES), unique=True),
    in_flight=st.dictionaries(st.sampled_from(NAMES), st.integers(0, 5)),
    excluded=st.sets(st.sampled_from(NAMES)),
    seed=st.integers(0, 9),
)
def test_what_is_picked_is_never_excluded_nor_busier_than_another_candidate(
    names: list[str], in_flight: dict[str, int], excluded: set[str], seed: int
) -> None:
    chosen = pick(endpoints(names), in_flight, Random(seed), excluded, now=NOW)
    candidates = set(names) - excluded
    if not candidates:
        assert chosen is None
    else:
        assert chosen is not None
        assert chosen.url in candidates
        assert all(in_flight.get(chosen.url, 0) <= in_flight.get(name, 0) for name in candidates)


def test_one_balancer_alone_spreads_requests_that_do_not_end_evenly() -> None:
    in_flight: Counter[str] = Counter()
    rng = Random(3)
    for _ in range(40):
        chosen = pick(endpoints(NAMES), in_flight, rng, now=NOW)
        assert chosen is not None
        in_flight[chosen.url] += 1
    assert in_flight == dict.fromkeys(NAMES, 10)


@pytest.mark.parametrize(
    ("failure", "is_allowed"),
    [
        (Failure.REFUSED, True),
        (Failure.CONNECT_TIMEOUT, True),
        (Failure.LOST, False),
        (Failure.LATE, False),
        (Failure.BROKEN, False),
    ],
)
def test_a_request_is_sent_again_only_if_no_connection_was_made(failure: Failure, is_allowed: bool) -> None:
    assert may_retry(failure) is is_allowed


def test_every_failure_has_been_thought_of() -> None:
    assert {failure.value for failure in Failure} == {"refused", "connect_timeout", "lost", "late", "broken"}
