"""Ends what an operator has set for a time: pauses, pins, bounds and freezes."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime

from controlplane.db import Database, freezes, replica_sets


@dataclass(frozen=True, slots=True)
class PauseOptions:
    interval_seconds: float = 5.0


class PauseLoop:
    name = "pauses"

    def __init__(self, db: Database, options: PauseOptions) -> None:
        self._db = db
        self.interval_seconds = options.interval_seconds

    async def run_once(self, now: datetime) -> str | None:
        done = [f"resumed {name}" for name in await replica_sets.resume_due(self._db, now)]
        done += await replica_sets.end_due(self._db, now)
        done += [f"the freeze of {whose} ended" for whose in await freezes.lift_due(self._db, now)]
        return "; ".join(done) or None
