"""Counts the starts that failed, each one once, by set and reason.

Kept in memory: what ended before this process began is another one's to have counted.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from controlplane.core.back_off import failed_to_start
from controlplane.core.types import PastReplica
from controlplane.metrics import ControlPlaneMetrics


class EndCounter:
    def __init__(self, metrics: ControlPlaneMetrics) -> None:
        self._metrics = metrics
        self._known: frozenset[str] | None = None

    def count(self, past: Mapping[str, Iterable[PastReplica]]) -> None:
        """Given the newest ends of every set, count those that were not among them before."""
        ended = {one.name: one for ends in past.values() for one in ends}
        for name, one in ended.items():
            if self._known is not None and name not in self._known and failed_to_start(one):
                self._metrics.start_failures.labels(one.replica_set, one.reason).inc()
        self._known = frozenset(ended)
