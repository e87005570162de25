"""What a running process depends on outside itself: whether PostgreSQL and slurmrestd are there, said when it changes.

Nothing here gives up: each is asked again and again. What is missing is one line in the log when it goes and one when
it is back, and `/ready` tells it at any time.
"""

from __future__ import annotations

import asyncio
import math

from loguru import logger

from controlplane.clock import utc_now
from controlplane.db import Database, DatabaseError, DbUnavailable, missing_migrations
from controlplane.metrics import ControlPlaneMetrics
from controlplane.slurm.client import SlurmClient
from controlplane.slurm.errors import SlurmError, SlurmForbidden
from controlplane.web import Part, PartStatus

_DATABASE_SECONDS = 10.0  # while all is well: what needs it notices earlier, and says so
_DATABASE_AWAY_SECONDS = 2.0
_POOL_SECONDS = 0.5  # all its connections may be in use
_SLURM_SECONDS = 10.0


class DatabaseWatch:
    """`ready` is set once PostgreSQL has answered and its schema is this version's."""

    def __init__(self, db: Database) -> None:
        self._db = db
        self.ready = asyncio.Event()

    async def run(self) -> None:
        """Until cancelled."""
        before: str | None = ""
        while True:
            kind, sentence, remedy = await self._look()
            if kind != before:
                if kind is None:
                    logger.info(sentence)
                else:
                    logger.error(sentence, remedy=remedy)
                before = kind
            if kind is None:
                self.ready.set()
            await asyncio.sleep(_DATABASE_SECONDS if kind is None else _DATABASE_AWAY_SECONDS)

    async def _look(self) -> tuple[str | None, str, str]:
        try:
            missing = await self._missing()
        except DbUnavailable as error:
            remedy = "see that PostgreSQL runs and that DATABASE_URL is right; trying again until it answers"
            return "away", f"PostgreSQL does not answer: {error}", remedy
        except DatabaseError as error:
            return "refuses", f"PostgreSQL refuses: {error}", "trying again until it does not"
        if missing:
            remedy = "run `controlplane migrate`; waiting until that is done"
            return "schema", f"the database lacks the migrations {', '.join(missing)}", remedy
        return None, "PostgreSQL answers and its schema is current", ""

    async def _missing(self) -> list[str]:
        """Raises DatabaseError, with the reason."""
        try:
            return await missing_migrations(self._db, timeout_seconds=_POOL_SECONDS)
        except DbUnavailable:  # the pool cannot say why; a new connection costs too much to ask by one each time
            await self._db.ping()
            return await missing_migrations(self._db)


class SlurmWatch:
    """`part` is how Slurm was when it was asked last."""

    def __init__(self, slurm: SlurmClient, metrics: ControlPlaneMetrics) -> None:
        self._slurm = slurm
        self._metrics = metrics
        self.part = Part(PartStatus.DEGRADED, "slurmrestd has not answered yet")

    async def run(self) -> None:
        """Until cancelled."""
        outcome_before = ""
        while True:
            outcome = await self._look()
            if outcome != outcome_before:
                if self.part.status is PartStatus.OK:
                    logger.info(self.part.message)
                else:
                    logger.error(self.part.message, remedy=self.part.remedy)
                outcome_before = outcome
            await asyncio.sleep(_SLURM_SECONDS)

    async def _look(self) -> str:
        try:
            ping = await self._slurm.ping()
        except SlurmError as error:
            self._metrics.slurm_token_expiry_seconds.set(math.nan)
            self.part = Part(PartStatus.DEGRADED, f"Slurm cannot be used: {error}", remedy_for(error))
            return error.outcome
        expires_at = ping.token_expires_at
        left = math.nan if expires_at is None else (expires_at - utc_now()).total_seconds()
        self._metrics.slurm_token_expiry_seconds.set(left)
        self.part = Part(PartStatus.OK, f"Slurm {ping.release} answers, API {ping.api_version}")
        return "ok"


def remedy_for(error: SlurmError) -> str:
    """What an operator can do about Slurm's not answering as it should."""
    if isinstance(error, SlurmForbidden):
        return "renew the Slurm token, and see that it belongs to CONTROLPLANE_SLURM__USER_NAME"
    return (
        "see that slurmrestd and slurmctld run, that CONTROLPLANE_SLURM__URL is right, and that the token is good: "
        "Slurm 22.05 answers a bad one as if its controller were dead"
    )
