"""Forgets what nobody will ask for again: alerts and deliveries that were not confirmed for weeks."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timedelta

from controlplane.db import Database, alerts


@dataclass(frozen=True, slots=True)
class JanitorOptions:
    interval_seconds: float = 3600.0
    keep_alerts_seconds: int = 30 * 86400


class JanitorLoop:
    name = "janitor"

    def __init__(self, db: Database, options: JanitorOptions) -> None:
        self._db = db
        self._keep_alerts = timedelta(seconds=options.keep_alerts_seconds)
        self.interval_seconds = options.interval_seconds

    async def run_once(self, now: datetime) -> str | None:
        forgotten = await alerts.forget(self._db, older_than=self._keep_alerts, now=now)
        return f"forgot {forgotten} alerts" if forgotten else None
