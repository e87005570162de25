"""A breaker for each endpoint: who has failed again and again is left alone for a while, then tried by one request.

    CLOSED --3 failures in a row, or no connection--> OPEN --back-off over, a request is sent--> HALF_OPEN
       ^                                               ^                                             |
       +------------------ success --------------------+--------- failure: the back-off doubles -----+

That no connection was made (refused, unreachable, or not in time) opens it at once: it is so for every request, and
the one that found out is sent elsewhere. All else may be the request's own fault, hence the three in a row.

A probe whose end is never told, because its client left, is given up after a back-off's length. Requests that began
before the breaker opened may still end; what they tell is old, and an open breaker does not listen to it. The longest
back-off is short: the control plane's probes take an endpoint that stays away off the list, and this only bridges
the time until then, or a time without a database.
"""

from __future__ import annotations

import math
from enum import StrEnum


class BreakerState(StrEnum):
    CLOSED = "closed"
    OPEN = "open"
    HALF_OPEN = "half_open"


class Breaker:
    """Times are monotonic seconds. `began` when a request is sent to the endpoint, then one of `succeeded`, `failed`.

    Neither of the two is called if the client left first.
    """

    __slots__ = (
        "_back_off_seconds",
        "_failures",
        "_failures_to_open",
        "_first_back_off_seconds",
        "_longest_back_off_seconds",
        "is_calm",
        "next_try_at",
        "state",
    )

    def __init__(
        self,
        *,
        failures_to_open: int = 3,
        first_back_off_seconds: float = 1.0,
        longest_back_off_seconds: float = 10.0,
    ) -> None:
        self._failures_to_open = failures_to_open
        self._first_back_off_seconds = first_back_off_seconds
        self._longest_back_off_seconds = longest_back_off_seconds
        self._back_off_seconds = first_back_off_seconds
        self._failures = 0  # consecutive
        self.state = BreakerState.CLOSED
        self.is_calm = True  # closed, and the last request went well: `began` and `succeeded` would change nothing
        self.next_try_at = -math.inf  # from then on a request may be sent; an attribute, for it is read at every choice

    def may_try(self, now: float) -> bool:
        """Whether a request may be sent. In an emergency one may be sent all the same: it counts as a probe."""
        return now >= self.next_try_at

    def began(self, now: float) -> None:
        if self.state is BreakerState.CLOSED:
            return
        if self.state is BreakerState.HALF_OPEN and now >= self.next_try_at:
            self._grow()  # the probe before this one has told nothing in its time
        self.state = BreakerState.HALF_OPEN
        self.next_try_at = now + self._back_off_seconds

    def succeeded(self, now: float) -> None:  # noqa: ARG002 - the other half of `failed`
        """The endpoint has begun to answer, whatever the answer is."""
        self._failures = 0
        if self.state is BreakerState.HALF_OPEN:
            self.state = BreakerState.CLOSED
            self.next_try_at = -math.inf
            self._back_off_seconds = self._first_back_off_seconds
        self.is_calm = self.state is BreakerState.CLOSED

    def failed(self, now: float, *, is_unreachable: bool = False) -> bool:
        """No answer, for a reason that may be the endpoint's. Says whether it broke now: was closed, and is open."""
        was_closed = self.state is BreakerState.CLOSED
        self.is_calm = False
        if was_closed:
            self._failures += 1
            if not is_unreachable and self._failures < self._failures_to_open:
                return False
        elif self.state is BreakerState.HALF_OPEN:
            self._grow()
        else:
            return False
        self.state = BreakerState.OPEN
        self.next_try_at = now + self._back_off_seconds
        return was_closed

    def _grow(self) -> None:
        self._back_off_seconds = min(2 * self._back_off_seconds, self._longest_back_off_seconds)
