"""Asks for a replica while requests wait: tells the database what this worker keeps waiting.

The control plane acts on it. A hold is told at once, a queue when it has lasted (`WaitingRooms.asks`). It is told again
every few seconds while anything waits, and once more when nothing does. `core.held_requests` says what becomes of it.

Failure: while PostgreSQL is away nothing is asked for, requests wait on, and it is tried again every second; that is
one line in the log. A worker that is killed is forgotten after `GOOD_FOR`.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from datetime import datetime

from loguru import logger

from controlplane.clock import utc_now
from controlplane.db import Database, DatabaseError, held_requests, process_name
from controlplane.proxy.waiting import WaitingRooms

_REFRESH_SECONDS = 5.0
_IDLE_SECONDS = 30.0  # between two looks for what workers left that are gone
_RETRY_SECONDS = 1.0
_LEAST_SECONDS = 0.5  # between two tellings: those who come and go in a moment are one
_TICK_SECONDS = 0.5  # between two looks at rooms in which somebody waits: for a queue that has lasted, or has ended


class HeldPressure:
    """Run `run` while the rooms are used, and `close` it after."""

    def __init__(
        self,
        db: Database,
        rooms: WaitingRooms,
        *,
        worker: str | None = None,
        clock: Callable[[], float] = time.monotonic,
        utc_clock: Callable[[], datetime] = utc_now,
    ) -> None:
        """`worker`: names this worker among all of all hosts."""
        self._db = db
        self._rooms = rooms
        self._worker = worker or process_name()
        self._clock = clock
        self._utc_clock = utc_clock
        self._wake = asyncio.Event()
        self._told: dict[str, bool] | None = None  # by model: is it a hold? None: not known
        self._told_at = -_IDLE_SECONDS
        self._is_failing = False
        self._is_resting = False
        rooms.on_hold = self._wake.set
        rooms.on_queue = self._queue_began

    async def run(self) -> None:
        while True:
            pause = await self._turn()
            self._is_resting = not self._told and not any(self._rooms.waiting.values())
            if not self._is_resting:
                pause = min(pause, _TICK_SECONDS)
            try:
                async with asyncio.timeout(pause):
                    await self._wake.wait()
            except TimeoutError:
                pass
            else:
                self._wake.clear()

    async def close(self) -> None:
        """Nothing waits here any more."""
        if self._told:
            try:
                await held_requests.tell(self._db, self._worker, {}, now=self._utc_clock())
            except DatabaseError as error:
                logger.warning("held requests could not be told", error=str(error))

    def _queue_began(self) -> None:
        if self._is_resting:
            self._is_resting = False
            self._wake.set()

    async def _turn(self) -> float:
        """Tell, if it is time to. Returns in how many seconds to look again, if nothing happens."""
        now = self._clock()
        asks = self._rooms.asks(now)
        asked = {model: bool(one.held) for model, one in asks.items()}
        since = now - self._told_at
        if self._is_failing:
            due_in = _RETRY_SECONDS - since
        elif asked != self._told:
            due_in = _LEAST_SECONDS - since
        else:
            due_in = (_REFRESH_SECONDS if asked else _IDLE_SECONDS) - since
        if due_in > 0:
            return due_in
        self._told_at = now
        waiting = {model: (one.held, one.queued) for model, one in asks.items()}
        try:
            told = await held_requests.tell(self._db, self._worker, waiting, now=self._utc_clock())
        except DatabaseError as error:
            if not self._is_failing:
                logger.warning("held requests cannot be told: no replica is asked for", error=str(error))
            self._is_failing = True
            self._told = None
        else:
            self._is_failing = False
            self._told = asked
            if told.raised:
                logger.info("requests wait: a replica is asked for", models=", ".join(told.raised))
            if told.resolved:
                logger.info("no requests wait any more", models=", ".join(told.resolved))
        return _TICK_SECONDS
