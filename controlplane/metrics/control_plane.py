"""The control plane's metrics, by name.

What can be read from the database (replicas by phase, desired, routable) is not kept here: it is read when asked for,
so that every control plane tells the same truth, whether it holds the lease or not.
"""

from __future__ import annotations

import math

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from controlplane.metrics.numbers import SLOW_BUCKETS


class ControlPlaneMetrics:
    def __init__(self, registry: CollectorRegistry) -> None:
        self.registry = registry
        self.alerts = Counter(
            "controlplane_alerts",
            "Alerts that arrived, by what became of them",
            ["source", "outcome"],
            registry=registry,
        )
        self.decisions = Counter(
            "controlplane_decisions", "Scaling decisions", ["replica_set", "reason"], registry=registry
        )
        self.start_failures = Counter(
            "controlplane_start_failures",
            "Replicas that ended without ever having been ready, by why",
            ["replica_set", "reason"],
            registry=registry,
        )
        self.alert_to_submit_seconds = Histogram(
            "controlplane_alert_to_submit_seconds",
            "From an alert's start to Slurm's answer to the submit that it caused",
            buckets=SLOW_BUCKETS,
            registry=registry,
        )
        self.slurm_request_seconds = Histogram(
            "controlplane_slurm_request_seconds",
            "Calls of slurmrestd",
            ["operation", "outcome"],
            buckets=SLOW_BUCKETS,
            registry=registry,
        )
        self.slurm_token_expiry_seconds = Gauge(
            "controlplane_slurm_token_expiry_seconds",
            "How long the Slurm token is still good; NaN while that is not known",
            registry=registry,
        )
        self.slurm_token_expiry_seconds.set(math.nan)
        self.round_seconds = Histogram(
            "controlplane_round_seconds", "One round of a loop", ["loop"], buckets=SLOW_BUCKETS, registry=registry
        )
        self.round_failures = Counter(
            "controlplane_round_failures", "Rounds that ended with an error", ["loop"], registry=registry
        )
        self.round_succeeded_timestamp = Gauge(
            "controlplane_round_succeeded_timestamp_seconds",
            "When this process last ended a round of a loop without an error, in Unix time",
            ["loop"],
            registry=registry,
        )
        self.requests_cut = Counter(
            "controlplane_requests_cut",
            "Requests in flight at a replica when the deadline of its drain passed",
            ["replica_set"],
            registry=registry,
        )
        self.lease_held = Gauge("controlplane_lease_held", "1: this process reconciles", registry=registry)
