"""One line a request in the log: failures always, what went well sampled or not at all.

A line costs more than passing a request on, so a flood of failures must not become a flood of lines: of each level at
most so many are written a second, and the others are counted in one line, which comes with the next request after that
second, or with `close`. Nothing of a prompt, an answer or a key is ever given to this.
"""

from __future__ import annotations

from random import Random

from loguru import logger

MOST_FAILURES_A_SECOND = 50


class AccessLog:
    """`sample`: which share of the requests that went well is logged, 0 to 1."""

    def __init__(self, sample: float, rng: Random, *, most_failures_a_second: int = MOST_FAILURES_A_SECOND) -> None:
        self._sample = sample
        self._draw = rng.random
        self._ours = _Flood("WARNING", most_failures_a_second)
        self._clients = _Flood("INFO", most_failures_a_second)  # apart, so that bad clients do not hide our failures
        self._is_flooded = False

    @property
    def is_quiet(self) -> bool:
        """A request that went well need not be told."""
        return not self._sample and not self._is_flooded

    def write(
        self,
        *,
        request_id: bytes,
        tenant: str,
        model: str,
        status: int,
        code: str | None,
        upstream: str | None,
        failure: str | None,
        retries: int,
        is_broken: bool,
        client_left: bool,
        seconds: float,
        now: float,
    ) -> None:
        """A request is over. `is_broken`: its answer broke off; `seconds`: how long it took; `now`: monotonic."""
        if self._is_flooded:
            self._tell(now)
        flood = None
        if is_broken or (status >= 500 and not client_left):
            flood = self._ours
        elif status >= 400 and not client_left:
            flood = self._clients
        elif not self._sample or self._draw() >= self._sample:
            return
        if flood is not None and not flood.has_room(now):
            self._is_flooded = True
            return
        logger.log(
            "INFO" if flood is None else flood.level,
            "request ended" if flood is None else "request failed",
            request_id=request_id.decode(),
            tenant=tenant,
            model=model,
            status=status,
            code=code,
            upstream=upstream,
            failure=failure,
            retries=retries,
            client_left=client_left,
            seconds=round(seconds, 3),
        )

    def close(self) -> None:
        """Tell what was left out and not told yet."""
        self._tell(float("inf"))

    def _tell(self, now: float) -> None:
        for flood in (self._ours, self._clients):
            if count := flood.left_out(now):
                logger.log(flood.level, "more requests failed than are logged", count=count)
        self._is_flooded = self._ours.is_flooded or self._clients.is_flooded


class _Flood:
    """How many lines of one level this second had, and how many it was spared."""

    __slots__ = ("_ends_at", "_left_out", "_most", "_written", "level")

    def __init__(self, level: str, most_a_second: int) -> None:
        self.level = level
        self._most = most_a_second
        self._ends_at = float("-inf")
        self._written = self._left_out = 0

    @property
    def is_flooded(self) -> bool:
        return self._left_out > 0

    def has_room(self, now: float) -> bool:
        if now >= self._ends_at:
            self._ends_at = now + 1
            self._written = 0
        if self._written < self._most:
            self._written += 1
            return True
        self._left_out += 1
        return False

    def left_out(self, now: float) -> int:
        """How many, once the second is over; then they are told."""
        if now < self._ends_at:
            return 0
        count, self._left_out = self._left_out, 0
        return count
