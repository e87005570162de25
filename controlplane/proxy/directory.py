"""What there is: routable endpoints, served models and good keys, read from the database and kept in memory.

Everything is read at the start, whenever the database announces a change, and every `refresh_seconds`, in case an
announcement was lost. While PostgreSQL is away the last list stays in force: requests go on, `age_seconds` grows and
`problem` says so. Nothing is known until the first read; from then on something always is.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum

from loguru import logger

from controlplane.clock import utc_now
from controlplane.core.balancing import policy_of
from controlplane.core.types import ApiKey, RoutableEndpoint, RoutingPolicy, ServedModel, TenantLimits
from controlplane.db import ENDPOINTS_CHANNEL, WORKERS_CHANNEL, Database, DatabaseError, directory

_FIRST_WAIT_SECONDS, _LONGEST_WAIT_SECONDS = 0.1, 5.0


class ModelState(StrEnum):
    ROUTABLE = "routable"
    STARTING = "starting"
    SCALED_TO_ZERO = "scaled_to_zero"
    PAUSED = "paused"


@dataclass(frozen=True, slots=True)
class Snapshot:
    """One read of the database."""

    models: Mapping[str, ServedModel]
    endpoints: Mapping[str, tuple[RoutableEndpoint, ...]]  # by model; a model without any is absent
    keys: Mapping[bytes, ApiKey]  # by hash
    routing: Mapping[str, RoutingPolicy] = field(default_factory=dict)  # by model, of those that have endpoints
    tenants: Mapping[str, TenantLimits] = field(default_factory=dict)  # every one

    def state_of(self, model: ServedModel) -> ModelState:
        if model.model in self.endpoints:
            return ModelState.ROUTABLE
        if model.is_paused:
            return ModelState.PAUSED
        return ModelState.SCALED_TO_ZERO if model.starting_since is None else ModelState.STARTING


def seconds_to_ready(model: ServedModel, now: datetime) -> float | None:
    """How long until the replica that is starting, or one that were started now, serves.

    Of a job that runs: 95 of 100 loads of this model took no longer. Of one that waits: from when Slurm says that it
    will run, if it says so. Otherwise 95 of 100 whole starts took no longer. None: never measured, or this start takes
    longer than they did.
    """
    load = model.load_seconds_p95
    if load is not None and model.loading_since is not None:
        left = load - (now - model.loading_since).total_seconds()
        if left > 0:
            return left
    if load is not None and model.expected_start_at is not None:
        return max(0.0, (model.expected_start_at - now).total_seconds()) + load
    if model.start_seconds_p95 is None:
        return None
    if model.starting_since is None:
        return model.start_seconds_p95
    left = model.start_seconds_p95 - (now - model.starting_since).total_seconds()
    return left if left > 0 else None


class Directory:
    """Holds the newest snapshot. `refresh` reads once; `run` keeps it fresh until it is cancelled."""

    def __init__(
        self,
        db: Database,
        *,
        refresh_seconds: float,
        on_read: Callable[[Snapshot], None],
        on_worker: Callable[[], None] = lambda: None,
    ) -> None:
        """`on_worker` is called when another worker may have joined: it is heard of over the same connection."""
        self._db = db
        self._refresh_seconds = refresh_seconds
        self._on_read = on_read
        self._on_worker = on_worker
        self._wake = asyncio.Event()
        self._one_at_a_time = asyncio.Lock()  # an older read must not overwrite a newer one
        self._read_at = time.monotonic()  # until the first read: since when it has been tried
        self._is_failing = False
        self.snapshot: Snapshot | None = None

    def age_seconds(self) -> float:
        """Since the newest complete read; before the first one, since the start."""
        return time.monotonic() - self._read_at

    def problem(self) -> str | None:
        """What keeps the list from being fresh, as a sentence; None when nothing does."""
        age = self.age_seconds()
        if self.snapshot is None:
            return f"PostgreSQL could not be read for {age:.0f} s: neither models nor keys are known."
        if self._is_failing or age > 3 * self._refresh_seconds:
            return f"PostgreSQL cannot be read: the endpoints and keys in use are {age:.0f} s old."
        return None

    async def run(self) -> None:
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._refresh_when_due())
            tasks.create_task(self._listen())

    async def refresh(self) -> bool:
        """Read everything; on failure keep what is known. Says whether it could be read."""
        async with self._one_at_a_time:
            started = time.monotonic()
            try:
                snapshot = await _read(self._db, utc_now())
            except DatabaseError as error:
                if not self._is_failing:
                    logger.warning("the directory cannot be read; the last one stays in use", error=str(error))
                self._is_failing = True
                return False
            if self._is_failing:
                logger.info("the directory can be read again", age_seconds=round(self.age_seconds(), 1))
            self._is_failing = False
            self._read_at = started
            self.snapshot = snapshot
            self._on_read(snapshot)
            return True

    async def _refresh_when_due(self) -> None:
        while True:
            try:
                async with asyncio.timeout(self._refresh_seconds):
                    await self._wake.wait()
            except TimeoutError:
                pass
            self._wake.clear()  # before reading: what is announced while we read is read again
            await self.refresh()

    async def _listen(self) -> None:
        is_deaf = False
        wait_seconds = _FIRST_WAIT_SECONDS
        while True:
            try:
                async for channel in self._db.listen(ENDPOINTS_CHANNEL, WORKERS_CHANNEL):
                    is_deaf = False
                    wait_seconds = _FIRST_WAIT_SECONDS
                    if channel != WORKERS_CHANNEL:
                        self._wake.set()
                    if channel != ENDPOINTS_CHANNEL:
                        self._on_worker()
            except DatabaseError as error:
                # A database that is away is the read's to report; it is one outage, hence one line. One that was away
                # and can be read by now may be listened to by now as well: if not, that is said next time.
                was_away = self._is_failing
                if await self.refresh() and not (was_away or is_deaf):
                    logger.warning(
                        "the directory is not told of changes", error=str(error), reads_every=self._refresh_seconds
                    )
                    is_deaf = True
            await asyncio.sleep(wait_seconds)
            wait_seconds = min(2 * wait_seconds, _LONGEST_WAIT_SECONDS)


def retry_after_seconds(estimate: float | None, *, default: int = 30) -> int:
    """An estimate as a `Retry-After`: whole seconds, 1 to 60."""
    return max(1, min(60, default if estimate is None else math.ceil(estimate)))


async def _read(db: Database, now: datetime) -> Snapshot:
    listed = await directory.read(db, now)
    routable: dict[str, list[RoutableEndpoint]] = defaultdict(list)
    for endpoint in listed.endpoints:
        routable[endpoint.model].append(endpoint)
    return Snapshot(
        models={model.model: model for model in listed.models},
        endpoints={model: tuple(those) for model, those in routable.items()},
        keys={key.key_hash: key for key in listed.keys},
        routing={model: policy_of(those) for model, those in routable.items()},
        tenants=listed.limits,
    )
