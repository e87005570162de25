"""Probes every live endpoint, side by side: one that hangs delays nobody.

An endpoint that is starting, failing or draining is looked at every round; one that serves, less often.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime, timedelta

import httpx
from loguru import logger

from controlplane.core.health import HealthRules, observe
from controlplane.core.types import Endpoint, Health
from controlplane.db import Database, DatabaseError, endpoints
from controlplane.reconcile.probe import ProbeLimits, probe


@dataclass(frozen=True, slots=True)
class EndpointOptions:
    interval_seconds: float = 1.0
    ready_interval_seconds: float = 5.0  # between looks at an endpoint that serves
    limits: ProbeLimits = field(default_factory=ProbeLimits)
    rules: HealthRules = field(default_factory=HealthRules)


class EndpointLoop:
    name = "endpoints"

    def __init__(
        self, db: Database, options: EndpointOptions, clock: Callable[[], datetime], http: httpx.AsyncClient
    ) -> None:
        self._db = db
        self._options = options
        self._clock = clock
        self._http = http
        self._due: dict[int, datetime] = {}
        self._looks: dict[int, asyncio.Task[None]] = {}
        self.interval_seconds = options.interval_seconds

    async def run_once(self, now: datetime) -> str | None:
        """Begin the looks that are due; each writes its own result."""
        live = await endpoints.load_live(self._db)
        self._forget_all_but({endpoint.id for endpoint in live})
        for endpoint in live:
            is_due = endpoint.is_draining or self._due.get(endpoint.id, now) <= now
            if is_due and endpoint.id not in self._looks:
                self._looks[endpoint.id] = asyncio.create_task(self._look(endpoint))
        return None

    async def close(self) -> None:
        """End the looks that are under way."""
        looks = list(self._looks.values())
        for look in looks:
            look.cancel()
        await asyncio.gather(*looks, return_exceptions=True)

    def _forget_all_but(self, live: set[int]) -> None:
        for gone in self._due.keys() - live:
            del self._due[gone]
        for gone in self._looks.keys() - live:
            self._looks[gone].cancel()

    async def _look(self, before: Endpoint) -> None:
        try:
            await self._look_once(before)
        finally:
            self._looks.pop(before.id, None)

    async def _look_once(self, before: Endpoint) -> None:
        result = await probe(self._http, before, before.probe, self._options.limits)
        now = self._clock()
        after = observe(before, result, now=now, rules=self._options.rules)
        if after.health is Health.READY and after.fails == 0:
            self._due[before.id] = now + timedelta(seconds=self._options.ready_interval_seconds)
        try:
            await endpoints.save(self._db, after, seen=before)
            if after.health is not before.health:
                await self._db.wake()
        except DatabaseError as error:
            logger.warning("a probe's result could not be kept", endpoint=before.url, error=str(error))
            return
        if after.health is not before.health:
            sentence = "endpoint is ready" if after.health is Health.READY else "endpoint fails"
            logger.info(sentence, endpoint=before.url, replica=before.replica, why=after.message)
