"""The one runner of all loops: interval, jitter, wake-up, lease, and one sentence per round that did something.

While another process holds the lease nothing runs here; when it expires, this one takes over. The lease saves work and
no more: a holder that was stopped and wakes up late finds every one of its writes refused by a guard.
A round that fails is logged and tried again at its next turn; that is the one place that catches every exception.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Protocol

from loguru import logger

from controlplane.db import WAKE_CHANNEL, Database, DatabaseError, DbUnavailable, leases
from controlplane.metrics import ControlPlaneMetrics

_LEASE = "reconciler"
_RETRY_SECONDS = 1.0
_SOON_SECONDS = 0.2  # between two rounds at least


class Loop(Protocol):
    """One duty. `run_once` may be cut short anywhere, and repeated."""

    @property
    def name(self) -> str: ...

    @property
    def interval_seconds(self) -> float: ...

    async def run_once(self, now: datetime) -> str | None: ...


@dataclass(frozen=True, slots=True)
class RunnerOptions:
    holder: str  # names this process among those that share the database
    lease_seconds: float = 10.0
    jitter: float = 0.1  # of the interval, so that many hosts do not act in step
    channels: Mapping[str, str] = field(default_factory=dict)  # loop -> what wakes it, if not the common channel


class Runner:
    """Runs every loop, each at its own pace, while the lease is held."""

    def __init__(
        self,
        db: Database,
        loops: Sequence[Loop],
        options: RunnerOptions,
        metrics: ControlPlaneMetrics,
        clock: Callable[[], datetime],
        rng: random.Random | None = None,
    ) -> None:
        self._db = db
        self._loops = loops
        self._options = options
        self._metrics = metrics
        self._clock = clock
        self._rng = rng or random.Random()  # noqa: S311 - spreads load, guards nothing
        self._wakes = {loop.name: asyncio.Event() for loop in loops}
        self._held = asyncio.Event()

    def wake(self, channel: str | None = None) -> None:
        """Let the loops that this channel wakes take their next round now; without one, every loop."""
        for name, event in self._wakes.items():
            if channel in (None, self._options.channels.get(name, WAKE_CHANNEL)):
                event.set()

    async def run(self) -> None:
        """Run until cancelled; then give the lease back, so that another process need not wait for it to expire."""
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._keep_lease(), name="lease")
                tasks.create_task(self._listen(), name="wake")
                for loop in self._loops:
                    tasks.create_task(self._turn(loop), name=loop.name)
        finally:
            if self._held.is_set():
                self._let_go()
                with suppress(DatabaseError):
                    await asyncio.shield(leases.give_back(self._db, _LEASE, self._options.holder))

    async def _keep_lease(self) -> None:
        lasts = timedelta(seconds=self._options.lease_seconds)
        good_until = 0.0
        while True:
            asked_at = time.monotonic()
            try:
                term = await leases.acquire(self._db, _LEASE, self._options.holder, lasts)
            except DatabaseError as error:
                if self._held.is_set() and time.monotonic() >= good_until:
                    logger.warning("lease lost: it could not be renewed in time", error=str(error))
                    self._let_go()
            else:
                if term is not None:
                    good_until = asked_at + self._options.lease_seconds
                    self._take(term)
                elif self._held.is_set():
                    logger.warning("lease lost to another control plane")
                    self._let_go()
            await asyncio.sleep(self._options.lease_seconds / 3)

    def _take(self, term: int) -> None:
        if not self._held.is_set():
            logger.info("lease taken: this control plane reconciles", holder=self._options.holder, term=term)
            self._metrics.lease_held.set(1)
            self._held.set()

    def _let_go(self) -> None:
        self._held.clear()
        self._metrics.lease_held.set(0)

    async def _listen(self) -> None:
        while True:
            with suppress(DatabaseError):
                async for channel in self._db.listen(*{WAKE_CHANNEL, *self._options.channels.values()}):
                    self.wake(channel or None)  # just connected: what was announced before is lost
            await asyncio.sleep(_RETRY_SECONDS)

    async def _turn(self, loop: Loop) -> None:
        wake = self._wakes[loop.name]
        error: str | None = None
        while True:
            await self._held.wait()
            wake.clear()
            sentence, error = await self._round(loop, error)
            pause = loop.interval_seconds * (1 + self._options.jitter * self._rng.uniform(-1, 1))
            await asyncio.sleep(_SOON_SECONDS)  # many wakes are one round: each asks Slurm for every job it has
            if sentence is not None:
                continue  # what was done usually asks for the next step
            with suppress(TimeoutError):
                # not wait_for: in Python 3.11 that can lose a cancellation
                async with asyncio.timeout(pause - _SOON_SECONDS):
                    await wake.wait()

    async def _round(self, loop: Loop, last_error: str | None) -> tuple[str | None, str | None]:
        """One round; returns its sentence and its error, in words. The same error is said once, not every round."""
        started = time.monotonic()
        try:
            sentence = await loop.run_once(self._clock())
        except Exception as error:  # noqa: BLE001 - a round's failure is the next round's business
            self._metrics.round_failures.labels(loop.name).inc()
            words = f"{type(error).__name__}: {error}"
            if words != last_error:
                expected = isinstance(error, DbUnavailable)
                logger.opt(exception=not expected).error("round failed; trying again", loop=loop.name, error=words)
            return None, words
        finally:
            self._metrics.round_seconds.labels(loop.name).observe(time.monotonic() - started)
        self._metrics.round_succeeded_timestamp.labels(loop.name).set(self._clock().timestamp())
        if last_error is not None:
            logger.info("round works again", loop=loop.name)
        if sentence:
            logger.info(sentence, loop=loop.name)
        return sentence, None
