"""Forgets what nobody will ask for again: alerts that were not confirmed for weeks, replicas that ended long ago."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timedelta

from controlplane.db import Database, alerts, decisions, nodes, replicas, usage, why


@dataclass(frozen=True, slots=True)
class JanitorOptions:
    interval_seconds: float = 3600.0
    keep_alerts_seconds: int = 30 * 86400
    keep_batches_seconds: int = 30 * 86400  # far longer than a proxy that is cut off has usage to store again
    keep_ended_seconds: int = 180 * 86400  # replicas with their histories, nodes' history, decisions, and the audit


class JanitorLoop:
    name = "janitor"

    def __init__(self, db: Database, options: JanitorOptions) -> None:
        self._db = db
        self._keep_alerts = timedelta(seconds=options.keep_alerts_seconds)
        self._keep_batches = timedelta(seconds=options.keep_batches_seconds)
        self._keep_ended = timedelta(seconds=options.keep_ended_seconds)
        self.interval_seconds = options.interval_seconds

    async def run_once(self, now: datetime) -> str | None:
        forgotten = {
            "alerts": await alerts.forget(self._db, older_than=self._keep_alerts, now=now),
            "replicas": await replicas.forget(self._db, older_than=self._keep_ended, now=now),
            "changes of nodes": await nodes.forget_history(self._db, older_than=self._keep_ended, now=now),
            "decisions": await decisions.forget(self._db, older_than=self._keep_ended, now=now),
            "proxies' numbers": await usage.forget_batches(self._db, older_than=self._keep_batches, now=now),
            "rows of histories": await why.forget(self._db, older_than=self._keep_ended, now=now),
        }
        words = [f"{count} {what}" for what, count in forgotten.items() if count]
        return f"forgot {', '.join(words)}" if words else None
