"""How a limit is measured, and how several workers share what is left of it without asking each other every time.

A minute slides: what counts is this minute's sum, and of the minute before the share that lies within the last 60 s,
as if it had come evenly. That needs two numbers, and is wrong by as much as it came unevenly.

Between two exchanges each worker uses its part at most. With every part given under one lock, and counted by the
others as if it were used,

    used + all parts <= limit + workers - 1

holds at any time: see `part`.
"""

from __future__ import annotations

import math

MINUTE_SECONDS = 60.0


class SlidingMinute:
    """A sum over the last 60 s. `now` in seconds, never going back; one that does counts as no time passed."""

    __slots__ = ("_before", "_current", "_minute")

    def __init__(self) -> None:
        self._minute = 0
        self._current = 0.0
        self._before = 0.0

    def add(self, amount: float, now: float) -> None:
        """Negative: of what was added before it was known how much it would be."""
        self._turn(now)
        self._current += amount

    def used(self, now: float) -> float:
        self._turn(now)
        if not self._before:
            return max(0.0, self._current)
        left_of_before = 1.0 - (now / MINUTE_SECONDS - self._minute)
        return max(0.0, self._current + self._before * min(1.0, max(0.0, left_of_before)))

    def seconds_until(self, amount: float, now: float) -> float:
        """How long until no more than `amount` is used, if nothing is added; 0 if that is so now. At most 120."""
        if self.used(now) <= amount:
            return 0.0
        to_next = (self._minute + 1) * MINUTE_SECONDS - now
        if self._current <= amount:  # in this minute, while the one before slides out
            return max(0.0, to_next - MINUTE_SECONDS * max(0.0, amount - self._current) / self._before)
        return to_next + MINUTE_SECONDS * (1.0 - max(0.0, amount) / self._current)

    def seconds_to_empty(self, now: float) -> float:
        """How long until nothing counts any more, if nothing is added. At most 120."""
        self._turn(now)
        if self._current > 0.0:
            return self.longest_seconds(now)
        return (self._minute + 1) * MINUTE_SECONDS - now if self._before else 0.0

    def longest_seconds(self, now: float) -> float:
        """How long what is added now counts."""
        return (int(now // MINUTE_SECONDS) + 2) * MINUTE_SECONDS - now

    def _turn(self, now: float) -> None:
        minute = int(now // MINUTE_SECONDS)
        if minute > self._minute:
            self._before = self._current if minute == self._minute + 1 else 0.0
            if self._before < 0.0:
                self._before = 0.0
            self._current = 0.0
            self._minute = minute


def part(limit: int, used: float, others_parts: float, workers: int, *, is_idle: bool = False) -> int:
    """How much one of `workers` may use before it asks again.

    `used`: by all, as far as they told; `others_parts`: what the others were given and have not told to be used.
    An even part of what is left, as far as the others leave it; a quarter of that where the worker `is_idle`, because
    others may need it, and asking takes little time. Where they leave nothing of what is left, yet hold
    next to nothing each, it is 1: that keeps a worker from being refused for what others will not use, and costs
    `workers - 1` above the limit at most.
    """
    left = math.floor(limit - used)
    if left < 1:
        return 0
    even = -(-left // (4 * workers if is_idle else workers))
    given = min(even, math.floor(left - others_parts))
    if given < 1:
        return 1 if others_parts <= workers - 1 else 0
    return given
