"""Puts replica sets back into service when the pause that an operator set for a time has ended."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime

from controlplane.db import Database, replica_sets


@dataclass(frozen=True, slots=True)
class PauseOptions:
    interval_seconds: float = 5.0


class PauseLoop:
    name = "pauses"

    def __init__(self, db: Database, options: PauseOptions) -> None:
        self._db = db
        self.interval_seconds = options.interval_seconds

    async def run_once(self, now: datetime) -> str | None:
        resumed = await replica_sets.resume_due(self._db, now)
        return f"resumed {', '.join(resumed)}" if resumed else None
