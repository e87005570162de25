"""Notes which firing alerts nobody confirms any more, and says so once: they press nothing.

The rule itself is `core.scaling.presses`; this only makes it visible, in the log, the metrics and `get alerts`. The
next word about such an alert, delivered or pulled, makes it fresh again.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timedelta

from loguru import logger

from controlplane.db import Database, alerts

_MOST_NAMED = 20


@dataclass(frozen=True, slots=True)
class StalenessOptions:
    interval_seconds: float = 10.0
    stale_after: timedelta = timedelta(minutes=15)


class StalenessLoop:
    name = "staleness"

    def __init__(self, db: Database, options: StalenessOptions) -> None:
        self._db = db
        self._options = options
        self.interval_seconds = options.interval_seconds

    async def run_once(self, now: datetime) -> str | None:
        if stale := await alerts.note_stale(self._db, stale_after=self._options.stale_after, now=now):
            logger.warning(
                "alerts are stale: nobody confirms them, and they press nothing",
                count=len(stale),
                alerts=", ".join(stale[:_MOST_NAMED]),
            )
        return None
