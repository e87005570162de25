"""How many requests may be sent a second time: a share of those of the last seconds, and a few in any case.

When most of what is tried fails, retries double the load of what is left, and then that fails, too. A share bounds
what they add; counting retries per request, as most do, does not. The numbers are Finagle's (a fifth, ten a second,
over ten seconds); Envoy and Linkerd have the same fifth. The floor lets a quiet model be retried at all.

It is asked before what may have cost an engine something is done again. A refused connection cost nothing, and that no
endpoint is tried twice bounds such retries already. Each proxy process has its own budget, of its own requests.
"""

from __future__ import annotations

_SLOTS = 10


class RetryBudget:
    """Call `request` once for each client's request, and `may_retry` before each further try. `now` is monotonic."""

    __slots__ = ("_floor", "_requests", "_retries", "_share", "_slot", "_slot_ends_at", "_slot_seconds")

    def __init__(self, *, share: float = 0.2, floor_per_second: float = 10.0, window_seconds: float = 10.0) -> None:
        self._share = share
        self._floor = floor_per_second * window_seconds
        self._slot_seconds = window_seconds / _SLOTS
        self._requests = [0] * _SLOTS
        self._retries = [0] * _SLOTS
        self._slot = 0
        self._slot_ends_at = 0.0

    def request(self, now: float) -> None:
        if now >= self._slot_ends_at:
            self._turn(now)
        self._requests[self._slot] += 1

    def may_retry(self, now: float) -> bool:
        """Whether the budget allows one more; if so, it is spent."""
        if now >= self._slot_ends_at:
            self._turn(now)
        if sum(self._retries) + 1 > self._share * sum(self._requests) + self._floor:
            return False
        self._retries[self._slot] += 1
        return True

    def _turn(self, now: float) -> None:
        """Forget what is older than the window."""
        passed = int((now - self._slot_ends_at) / self._slot_seconds) + 1
        for _ in range(min(passed, _SLOTS)):
            self._slot = (self._slot + 1) % _SLOTS
            self._requests[self._slot] = self._retries[self._slot] = 0
        self._slot_ends_at += passed * self._slot_seconds
