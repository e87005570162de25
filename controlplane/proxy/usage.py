"""What tenants used: counted in memory as requests end, and stored every few seconds, exactly once.

A batch is what was counted since the one before. It is stored in one statement together with its number; whether that
worked is not always known (a connection that breaks after the commit), so it is sent with the same number until an
answer says that it is stored, now or before. Meanwhile the next batch is counted.

While the database is away no more than `most_keys` different (day, tenant, model, endpoint) are kept: what belongs to
others is not kept at all, and counted as lost. `close` stores what is left, or counts it as lost.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from datetime import date

from loguru import logger

from controlplane.db import Database, DatabaseError, usage

_Key = tuple[date, str, str, int, str | None]

_CLOSE_SECONDS = 5.0


@dataclass(frozen=True, slots=True)
class UsageOptions:
    flush_seconds: float = 5.0
    most_keys: int = 20_000  # about 8 MB


@dataclass(frozen=True, slots=True)
class _Batch:
    number: int
    counts: dict[_Key, list[int]] = field(repr=False)


class Usage:
    """Keep `run` running, and `close` it at the end. `worker`: a name that no other process ever has."""

    def __init__(self, db: Database, worker: str, options: UsageOptions | None = None) -> None:
        self._db = db
        self._worker = worker
        self._options = options or UsageOptions()
        self._counts: dict[_Key, list[int]] = {}
        self._batch: _Batch | None = None  # sent, and not known to be stored
        self._number = 0
        self._one_at_a_time = asyncio.Lock()
        self._is_failing = False
        self._month = date.min
        self._recorded: dict[str, int] = {}  # tokens of the month, by tenant
        self._stored: dict[str, int] = {}
        self.lost_requests = 0
        self.lost_tokens = 0

    def record(
        self,
        tenant: str,
        model: str,
        endpoint_id: int,
        replica: str | None,
        prompt: int,
        completion: int,
        cached: int,
        is_aborted: bool,
        today: date,
    ) -> None:
        """One request has ended. `endpoint_id` 0: it reached none. `cached`: of `prompt`, what was not computed."""
        key = (today, tenant, model, endpoint_id, replica)
        counts = self._counts.get(key)
        if counts is None:
            waiting = len(self._batch.counts) if self._batch is not None else 0
            if len(self._counts) + waiting >= self._options.most_keys:
                self.lost_requests += 1
                self.lost_tokens += prompt + completion
                return
            counts = self._counts[key] = [0, 0, 0, 0, 0]
            if today.month != self._month.month or today.year != self._month.year:
                self._turn(today)
        counts[0] += 1
        counts[1] += is_aborted
        counts[2] += prompt
        counts[3] += completion
        counts[4] += cached
        if prompt or completion:
            recorded = self._recorded
            recorded[tenant] = recorded.get(tenant, 0) + prompt + completion

    def tally(self, tenant: str, month: date) -> tuple[int, int]:
        """Prompt and completion tokens of that month that were recorded here, and those of them that were stored."""
        if month != self._month:
            return 0, 0
        return self._recorded.get(tenant, 0), self._stored.get(tenant, 0)

    async def run(self) -> None:
        """Store until cancelled."""
        while True:
            await asyncio.sleep(self._options.flush_seconds)
            await self.flush()

    async def flush(self) -> bool:
        """Store what was counted until now. Says whether that is done; what is not is kept for the next time."""
        async with self._one_at_a_time:
            return await self._flush()

    async def close(self) -> None:
        """Store all that is left. What cannot be stored within a few seconds is lost, and said so."""
        try:
            async with asyncio.timeout(_CLOSE_SECONDS):
                if await self.flush():  # what a broken flush had left
                    await self.flush()
        except TimeoutError:
            pass
        left = [*(self._batch.counts.values() if self._batch is not None else ()), *self._counts.values()]
        if left:
            self.lost_requests += sum(counts[0] for counts in left)
            self.lost_tokens += sum(counts[2] + counts[3] for counts in left)
            self._batch, self._counts = None, {}
        if self.lost_requests:
            logger.warning("usage was lost", requests=self.lost_requests, tokens=self.lost_tokens)

    async def _flush(self) -> bool:
        if self._batch is None:
            if not self._counts:
                return True
            self._number += 1
            self._batch = _Batch(self._number, self._counts)
            self._counts = {}
        batch = self._batch
        try:
            await usage.store(
                self._db, self._worker, batch.number, [usage.Row(*key, *counts) for key, counts in batch.counts.items()]
            )
        except DatabaseError as error:
            if not self._is_failing:
                logger.warning("usage cannot be stored; it is kept, and stored later", error=str(error))
            self._is_failing = True
            return False
        if self._is_failing:
            logger.info("usage is stored again", lost_requests=self.lost_requests, lost_tokens=self.lost_tokens)
        self._is_failing = False
        self._batch = None
        for (day, tenant, *_), counts in batch.counts.items():
            if day.replace(day=1) == self._month:
                self._stored[tenant] = self._stored.get(tenant, 0) + counts[2] + counts[3]
        return True

    def _turn(self, today: date) -> None:
        """A new month. A straggler of the old one counts in its day, and in no budget."""
        if today.replace(day=1) > self._month:
            self._month = today.replace(day=1)
            self._recorded, self._stored = {}, {}
