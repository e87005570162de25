"""Which endpoint gets the next request, and whether a request that failed there may be sent to another one.

Requests in flight are what is compared: the work of one request differs a thousandfold between prompts, so that taking
turns would pile the long ones up somewhere; counting what is unfinished does not. They are compared by *share*: an
endpoint of twice the weight may have twice as many, and one that has just become ready few at first, because its
engine still captures graphs and its cache is empty.

Of two endpoints that chance names, the one with less to do is taken. That is nearly as even as the least of all
(Mitzenmacher, The Power of Two Choices, 2001), costs the same for any number, and keeps proxies that count apart from
all choosing the same one. An endpoint whose walltime is about to end gets new requests only if no other can take
them: a request that it is given may not find the time to finish. One that has as much as it takes at once is passed
over while another has room, and so is one whose breaker is open; if all are open, the one that may be tried soonest
is tried, because a sure refusal helps nobody.
"""

from __future__ import annotations

import math
from bisect import bisect
from collections.abc import Callable, Collection, Sequence
from datetime import datetime
from enum import StrEnum
from itertools import accumulate
from random import Random
from typing import Generic, Protocol, TypeVar

from controlplane.core.affinity import Ring, bound, points_of
from controlplane.core.breaker import Breaker
from controlplane.core.types import RoutableEndpoint, RoutingPolicy


class Failure(StrEnum):
    """How far a request had got at the upstream that failed it."""

    REFUSED = "refused"  # no connection was made: refused, unreachable, name or certificate wrong
    CONNECT_TIMEOUT = "connect_timeout"  # no connection was made in time
    LOST = "lost"  # connected, then closed without an answer: the request may have been received
    LATE = "late"  # connected, and no byte of the answer in time: it is probably being worked on
    ENGINE_FAILED = "engine_failed"  # answered with 500, 502, 503 or 504, or with an error as a stream's first event
    BROKEN = "broken"  # the answer ended before its end


_NOTHING_WAS_SENT = frozenset({Failure.REFUSED, Failure.CONNECT_TIMEOUT})
_NOTHING_WAS_DONE = frozenset({Failure.LOST, Failure.ENGINE_FAILED})

LEAST_SHARE = 0.1
"""Of a fresh replica's whole share: with nothing at all it would never warm up."""

_SHARES_GROW_EVERY_SECONDS = 1.0


class Candidate(Protocol):
    """An endpoint as one proxy sees it."""

    @property
    def url(self) -> str: ...
    @property
    def endpoint(self) -> RoutableEndpoint: ...
    @property
    def in_flight(self) -> int: ...
    @property
    def breaker(self) -> Breaker: ...


C = TypeVar("C", bound=Candidate)


def share_of(weight: int, ready_for_seconds: float, slow_start_seconds: float) -> float:
    """How much an endpoint may take, compared with others; grows for the first seconds after it became ready."""
    if ready_for_seconds >= slow_start_seconds:
        return weight
    return weight * max(LEAST_SHARE, ready_for_seconds / slow_start_seconds)


def policy_of(endpoints: Sequence[RoutableEndpoint]) -> RoutingPolicy:
    """Of the sets that serve one model, the policy of the one with the best priority; then by name."""
    return min(endpoints, key=lambda one: (one.priority, one.replica_set)).routing


class Pool(Generic[C]):
    """The endpoints of one model, as of one reading of the directory.

    `now` and `at` are the same moment, by the wall clock and by the monotonic one; all later moments are monotonic.
    """

    __slots__ = ("_last", "_on_ring", "_random", "_reach", "_seats", "_settled_until", "_yield", "ring")

    def __init__(self, candidates: Sequence[C], rng: Random, now: datetime, at: float) -> None:
        self._random: Callable[[], float] = rng.random
        self._seats = [_Seat(candidate, now, at) for candidate in candidates]
        self._last: list[_Seat[C]] = []
        self._yield: list[_Seat[C]] = []  # take new requests only if none of those that last can
        self._reach: list[float] | None = None  # of those that last, their shares added up; None: all are equal
        self._settled_until = -math.inf
        self._on_ring: list[_Seat[C]] = []
        self.ring: Ring | None = None

    def form_ring(self, known: Ring | None) -> None:
        """For affinity. `known`: the one of before; it is kept if it has the same members."""
        by_name = {seat.name: seat for seat in self._seats}
        heaviest = max((seat.weight for seat in self._seats), default=1)
        members = {name: points_of(by_name[name].weight, heaviest) for name in sorted(by_name)}
        self.ring = known if known is not None and known.members == members else Ring(members)
        self._on_ring = [by_name[name] for name in members]

    def pick(self, affinity: bytes | None, tried: Collection[str], now: float) -> C | None:
        """An endpoint for one more request; None: all of them have been tried. `tried` goes by URL."""
        if now >= self._settled_until:
            self._settle(now)
        chosen: C | None = None
        if affinity is not None and self.ring is not None:
            chosen = self._near(self.ring, affinity, tried, now)
        elif not tried:
            chosen = self._of_two(now)
        return self._of_all(tried, now) if chosen is None else chosen

    def _of_two(self, now: float) -> C | None:
        """None if one of the two must not be tried now, or is full: then all are looked at."""
        seats = self._last
        count = len(seats)
        if count < 2:
            return None
        reach = self._reach
        if reach is None:
            first = int(self._random() * count)
            second = int(self._random() * (count - 1))
            second += second >= first
        else:  # by share, or chance would name a heavy one too seldom
            first = bisect(reach, self._random() * reach[-1], 0, count - 1)
            share = seats[first].share
            place = self._random() * (reach[-1] - share)  # on what is left without the first
            second = bisect(reach, place if place < reach[first] - share else place + share, 0, count - 1)
        one, other = seats[first], seats[second]
        left, right = one.candidate, other.candidate
        if left.breaker.next_try_at > now or right.breaker.next_try_at > now:
            return None
        if (left.in_flight + 1) * other.share > (right.in_flight + 1) * one.share:
            one, left = other, right
        return left if left.in_flight < one.most else None

    def _near(self, ring: Ring, affinity: bytes, tried: Collection[str], now: float) -> C | None:
        """The first on the key's way that is below its bound. None if none may be tried now, or all are full."""
        in_flight = 0
        shares = 0.0
        for seat in self._last:
            candidate = seat.candidate
            if candidate.breaker.next_try_at <= now:
                in_flight += candidate.in_flight
                shares += seat.share
        if not shares:
            return None
        for owner in ring.walk(affinity):
            seat = self._on_ring[owner]
            candidate = seat.candidate
            if (
                candidate.in_flight < bound(in_flight, seat.share, shares)
                and candidate.in_flight < seat.most
                and seat.lasts
                and candidate.breaker.next_try_at <= now
                and candidate.url not in tried
            ):
                return candidate
        return None

    def _of_all(self, tried: Collection[str], now: float) -> C | None:
        """The least loaded that has room, else that may be tried, else the one that may be tried soonest."""
        for seats, may_be_full in ((self._last, False), (self._yield, False), (self._last, True), (self._yield, True)):
            best: _Seat[C] | None = None
            least, equals = math.inf, 0
            for seat in seats:
                candidate = seat.candidate
                if candidate.breaker.next_try_at > now or candidate.url in tried:
                    continue
                if candidate.in_flight >= seat.most and not may_be_full:
                    continue
                load = (candidate.in_flight + 1) / seat.share
                if load < least:
                    best, least, equals = seat, load, 1
                elif load == least:
                    equals += 1
                    if self._random() * equals < 1:
                        best = seat
            if best is not None:
                return best.candidate
        left = [seat.candidate for seat in self._seats if seat.candidate.url not in tried]
        return min(left, key=lambda one: (one.breaker.next_try_at, one.in_flight), default=None)

    def _settle(self, now: float) -> None:
        """Find out who yields and who is fresh, until the next of them changes."""
        until = math.inf
        for seat in self._seats:
            seat.lasts = now < seat.yields_at
            if seat.lasts:
                until = min(until, seat.yields_at)
            seat.share = share_of(seat.weight, now - seat.ready_at, seat.slow_start_seconds)
            if seat.share < seat.weight:
                until = min(until, now + _SHARES_GROW_EVERY_SECONDS)
        if not any(seat.lasts for seat in self._seats):
            for seat in self._seats:
                seat.lasts = True  # until the next reading: then all are equal
        self._last = [seat for seat in self._seats if seat.lasts]
        self._yield = [seat for seat in self._seats if not seat.lasts]
        shares = [seat.share for seat in self._last]
        self._reach = None if len(set(shares)) < 2 else list(accumulate(shares))
        self._settled_until = until


class _Seat(Generic[C]):
    """What is asked of one candidate at every choice, made ready."""

    __slots__ = ("candidate", "lasts", "most", "name", "ready_at", "share", "slow_start_seconds", "weight", "yields_at")

    def __init__(self, candidate: C, now: datetime, at: float) -> None:
        endpoint = candidate.endpoint
        yields_at = endpoint.yields_at
        self.candidate = candidate
        self.name = endpoint.replica or endpoint.url
        self.weight = endpoint.routing.weight
        self.slow_start_seconds = endpoint.routing.slow_start_seconds
        self.ready_at = at + (endpoint.first_ready_at - now).total_seconds()
        self.yields_at = math.inf if yields_at is None else at + (yields_at - now).total_seconds()
        self.most = math.inf if endpoint.max_in_flight is None else endpoint.max_in_flight
        self.share = float(self.weight)
        self.lasts = True


def may_retry(failure: Failure, before: Collection[Failure] = (), *, is_repeatable: bool = True) -> bool:
    """Whether the same request may be sent to another endpoint; `before`: the failures that it was sent again for.

    Always where certainly none of it was received. Where the engine failed, or its connection ended without a byte of
    an answer, generation ends with it, and OpenAI's own clients would ask again: once, because a request that kills
    engines must not be handed round; and not if the upstream may keep something of it (`is_repeatable`). One that is
    late is being worked on.
    """
    if failure in _NOTHING_WAS_SENT:
        return True
    return failure in _NOTHING_WAS_DONE and is_repeatable and _NOTHING_WAS_DONE.isdisjoint(before)
