"""What a request's affinity goes by, how the router follows the directory, and what it is good for."""

from __future__ import annotations

import json
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import timedelta
from itertools import pairwise
from random import Random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from controlplane.core.affinity import key_of
from controlplane.core.types import ChooseBy, RoutingPolicy
from controlplane.proxy.routing import Router, beginning_of
from tests.unit.prefix_caches import Outcome, replay
from tests.unit.upstreams import AT, NOW, Upstream, an_upstream, loads, upstreams

PREFIX = RoutingPolicy(ChooseBy.PREFIX)
SESSION = RoutingPolicy(ChooseBy.SESSION)
SYSTEM = {"role": "system", "content": "You are kind."}
FIRST = {"role": "user", "content": "Who was Noether?"}
LATER = [{"role": "assistant", "content": "A mathematician."}, {"role": "user", "content": "Where did she live?"}]


def body(**fields: Any) -> bytes:
    return json.dumps({"model": "m", "stream": True, "temperature": 0.5, **fields}).encode()


def router(policy: RoutingPolicy, those: Sequence[Upstream], model: str = "m") -> Router[Upstream]:
    made: Router[Upstream] = Router(Random(1))
    made.follow({model: those}, {model: policy}, NOW, AT)
    return made


# --- the conversation's beginning ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("one", "other"),
    [
        pytest.param({"messages": [SYSTEM, FIRST]}, {"messages": [SYSTEM, FIRST, *LATER], "max_tokens": 3}, id="turns"),
        pytest.param({"messages": [FIRST]}, {"messages": [FIRST, *LATER]}, id="turns without a system prompt"),
        pytest.param(
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}]}]},
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}]}, *LATER]},
            id="a content of parts",
        ),
        pytest.param(
            {"system": "kind", "messages": [FIRST]}, {"system": "kind", "messages": [FIRST, *LATER]}, id="messages API"
        ),
        pytest.param(
            {"instructions": "kind", "input": [FIRST]},
            {"input": [FIRST, *LATER], "instructions": "kind"},
            id="responses API",
        ),
        pytest.param({"prompt": "a" * 300}, {"prompt": "a" * 500}, id="a prompt that grows"),
        pytest.param({"input": "a" * 300}, {"input": "a" * 500}, id="an input that grows"),
        pytest.param({"prompt": list(range(200))}, {"prompt": list(range(300))}, id="tokens"),
        pytest.param(
            {"messages": [{"role": "user", "content": "a" * 20_000}]},
            {"messages": [{"role": "user", "content": "a" * 30_000}]},
            id="more than is compared",
        ),
    ],
)
def test_requests_that_begin_alike_have_one_key(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert beginning_of(body(**one)) is not None
    assert beginning_of(body(**one)) == beginning_of(body(**other))


@pytest.mark.parametrize(
    ("one", "other"),
    [
        pytest.param({"messages": [SYSTEM, FIRST]}, {"messages": [SYSTEM, LATER[1]]}, id="another question"),
        pytest.param({"messages": [SYSTEM, FIRST]}, {"messages": [FIRST]}, id="no system prompt"),
        pytest.param({"system": "a", "messages": [FIRST]}, {"system": "b", "messages": [FIRST]}, id="another system"),
        pytest.param({"prompt": "a"}, {"prompt": "b"}, id="another prompt"),
        pytest.param({"prompt": "a" * 200 + "b"}, {"prompt": "a" * 200 + "c"}, id="a prompt that differs early enough"),
        pytest.param({"instructions": "a", "input": "x"}, {"instructions": "b", "input": "x"}, id="other instructions"),
    ],
)
def test_requests_that_begin_otherwise_have_other_keys(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert beginning_of(body(**one)) != beginning_of(body(**other))


@pytest.mark.parametrize(
    "unreadable",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"\xff\xfe",
        body(),
        body(messages=[]),
        body(messages="no list"),
        body(messages=None),
        body(messages=["no message"]),
        body(messages=[{"role": 7}]),
        body(input=["one text", "another text"]),
        b'{"prompt": ' + b"[" * 100_000,
    ],
)
def test_a_body_without_a_beginning_has_no_key(unreadable: bytes) -> None:
    assert beginning_of(unreadable) is None


DOCUMENTS = st.recursive(
    st.none() | st.text() | st.integers(),
    lambda inner: (
        st.lists(inner)
        | st.dictionaries(st.sampled_from(["messages", "input", "prompt", "role", "content", "system"]), inner)
    ),
)


@given(st.binary(max_size=200) | DOCUMENTS.map(lambda document: json.dumps(document).encode()))
def test_no_body_whatever_raises(anything: bytes) -> None:
    beginning_of(anything)


# --- affinity by policy -------------------------------------------------------------------------------------


def test_by_session_the_header_decides_and_where_it_is_missing_the_beginning() -> None:
    of = router(replace(SESSION, session_header="x-chat"), upstreams(3))
    asked = body(messages=[SYSTEM, FIRST])
    assert of.affinity_of("m", [(b"accept", b"*/*"), (b"x-chat", b"7")], asked) == key_of(b"7")
    assert of.affinity_of("m", [(b"x-chat", b"7")], b"not read") == key_of(b"7")
    for headers in ([], [(b"x-chat", b"")], [(b"x-session-id", b"7")]):
        assert of.affinity_of("m", headers, asked) == beginning_of(asked)


def test_by_prefix_no_header_decides() -> None:
    asked = body(messages=[SYSTEM, FIRST])
    of = router(PREFIX, upstreams(3))
    assert of.affinity_of("m", [(b"x-session-id", b"7")], asked) == beginning_of(asked)


@pytest.mark.parametrize(
    ("policy", "count", "wants"),
    [
        (PREFIX, 2, True),
        (SESSION, 2, True),
        (PREFIX, 1, False),  # there is nothing to choose, so nothing to read
        (RoutingPolicy(), 2, False),
    ],
)
def test_a_body_is_read_only_where_it_can_decide(policy: RoutingPolicy, count: int, wants: bool) -> None:
    of = router(policy, upstreams(count))
    assert of.wants_affinity("m") is wants
    assert not of.wants_affinity("another")


# --- following the directory --------------------------------------------------------------------------------


def test_a_model_that_is_not_there_has_no_upstream() -> None:
    of = router(RoutingPolicy(), upstreams(2))
    assert of.pick("another", None, (), AT) is None
    of.follow({}, {}, NOW, AT)
    assert of.pick("m", None, (), AT) is None


def test_models_do_not_share_upstreams_or_policies() -> None:
    one, other = an_upstream("one"), an_upstream("other")
    of: Router[Upstream] = Router(Random(1))
    of.follow({"m": [one], "n": [other]}, {"m": PREFIX}, NOW, AT)
    for affinity in (None, b"12345678"):
        assert of.pick("m", affinity, (), AT) is one
        assert of.pick("n", affinity, (), AT) is other


def test_a_key_stays_at_home_when_the_directory_is_read_again() -> None:
    those = upstreams(4)
    of = router(PREFIX, those)
    keys = [key_of(bytes([number])) for number in range(100)]
    before = [of.pick("m", key, (), AT) for key in keys]
    of.follow({"m": those[::-1]}, {"m": PREFIX}, NOW + timedelta(hours=1), AT + 3600)
    assert [of.pick("m", key, (), AT + 3600) for key in keys] == before
    of.follow({"m": those[:3]}, {"m": PREFIX}, NOW + timedelta(hours=2), AT + 7200)
    after = [of.pick("m", key, (), AT + 7200) for key in keys]
    assert all(was is now for was, now in zip(before, after, strict=True) if was is not those[3])


def test_a_new_policy_and_a_new_weight_are_followed() -> None:
    light, heavy = an_upstream("light"), an_upstream("heavy")
    of = router(PREFIX, [light, heavy])
    heavy.endpoint = replace(heavy.endpoint, routing=RoutingPolicy(weight=300))
    of.follow({"m": [light, heavy]}, {"m": RoutingPolicy()}, NOW, AT)
    assert not of.wants_affinity("m")
    for _ in range(40):
        chosen = of.pick("m", None, (), AT)
        assert chosen is not None
        chosen.in_flight += 1
    assert loads([light, heavy]) == [10, 30]


def test_two_proxies_agree_on_the_home_of_every_key() -> None:
    one, other = router(PREFIX, upstreams(5)), router(PREFIX, upstreams(5)[::-1])
    homes: Counter[str] = Counter()
    for number in range(200):
        key = key_of(b"%d" % number)
        here, there = one.pick("m", key, (), AT), other.pick("m", key, (), AT)
        assert here is not None
        assert there is not None
        assert here.url == there.url
        homes[here.url] += 1
    assert len(homes) == 5


# --- an endpoint that is gone -------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", [RoutingPolicy(), SESSION])
def test_an_endpoint_that_is_gone_costs_a_few_requests_a_second_try_and_no_request_its_answer(
    policy: RoutingPolicy,
) -> None:
    """A minute of 200 requests a second, each of half a second, of which none may meet the dead one twice."""
    those = upstreams(4, policy)
    of, gone = router(policy, those), those[2]
    under_way: deque[tuple[float, Upstream]] = deque()
    refused_at: list[float] = []
    for number in range(12_000):
        now = AT + number / 200
        while under_way and under_way[0][0] <= now:
            ended = under_way.popleft()[1]
            ended.in_flight -= 1
            ended.breaker.succeeded(now)
        tried: list[str] = []
        key = key_of(b"%d" % (number % 50)) if of.wants_affinity("m") else None
        while (chosen := of.pick("m", key, tried, now)) is gone:
            gone.breaker.began(now)
            gone.breaker.failed(now, is_unreachable=True)
            refused_at.append(now)
            tried.append(gone.url)
        assert chosen is not None
        chosen.breaker.began(now)
        chosen.in_flight += 1
        under_way.append((now + 0.5, chosen))
    assert 5 <= len(refused_at) <= 10
    waits = [later - earlier for earlier, later in pairwise(refused_at)]
    assert all(wait >= back_off - 1e-6 for wait, back_off in zip(waits, (1, 2, 4, 8, 10, 10, 10, 10, 10), strict=False))
    others = [one.in_flight for one in those if one is not gone]
    assert max(others) - min(others) <= 12


# --- what it is good for ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def outcomes() -> Mapping[ChooseBy, Outcome]:
    return {by: replay(RoutingPolicy(by)) for by in ChooseBy}


def test_conversations_find_the_cache_warm_far_more_often_by_affinity(outcomes: Mapping[ChooseBy, Outcome]) -> None:
    by_chance = outcomes[ChooseBy.LEAST_IN_FLIGHT]
    for by in (ChooseBy.PREFIX, ChooseBy.SESSION):
        assert outcomes[by].turns == by_chance.turns
        assert outcomes[by].hit_ratio > 2 * by_chance.hit_ratio
        assert outcomes[by].hit_ratio > 0.65


def test_affinity_is_not_paid_for_in_slow_answers_or_full_replicas(outcomes: Mapping[ChooseBy, Outcome]) -> None:
    by_chance = outcomes[ChooseBy.LEAST_IN_FLIGHT]
    for by in (ChooseBy.PREFIX, ChooseBy.SESSION):
        assert outcomes[by].first_token_p95_seconds < 0.75 * by_chance.first_token_p95_seconds
        assert outcomes[by].worst_share < 1.35  # of what each would have if all had the same
