"""Starts that failed are counted once, and not those that another process has counted."""

from __future__ import annotations

from dataclasses import replace

from prometheus_client import CollectorRegistry

from controlplane.core.types import PastReplica, Reason
from controlplane.metrics import ControlPlaneMetrics
from controlplane.reconcile.ends import EndCounter
from tests.unit.worlds import a_past, ago


def test_each_failed_start_is_counted_once_by_its_reason() -> None:
    metrics = ControlPlaneMetrics(CollectorRegistry())
    counter = EndCounter(metrics)
    ends: list[PastReplica] = []

    def end(reason: Reason, *, was_ready: bool = False) -> None:
        ends.insert(0, replace(a_past(reason, ago(0), was_ready=was_ready), name=f"cp-s-{len(ends)}"))
        for _ in range(2):  # rounds
            counter.count({"s": ends[:10], "t": []})

    def counted(reason: Reason) -> float | None:
        return metrics.registry.get_sample_value(
            "controlplane_start_failures_total", {"replica_set": "s", "reason": reason}
        )

    end(Reason.CRASHED)  # before this process had looked
    assert counted(Reason.CRASHED) is None
    for _ in range(12):
        end(Reason.CRASHED)
    end(Reason.REJECTED)
    end(Reason.CRASHED, was_ready=True)
    end(Reason.PREEMPTED)
    end(Reason.SCALED_DOWN)
    assert (counted(Reason.CRASHED), counted(Reason.REJECTED)) == (12, 1)
    assert counted(Reason.PREEMPTED) is None
