"""Every Prometheus metric this project exposes, by name. Two classes, because two ASGI apps expose them.

What can be read from the database (replicas by phase, desired, routable) is not kept here: it is read when asked for,
so that every control plane tells the same truth, whether it holds the lease or not.
"""

from __future__ import annotations

import math

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

_FAST = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)
_SLOW = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)


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
            buckets=_SLOW,
            registry=registry,
        )
        self.slurm_request_seconds = Histogram(
            "controlplane_slurm_request_seconds",
            "Calls of slurmrestd",
            ["operation", "outcome"],
            buckets=_SLOW,
            registry=registry,
        )
        self.slurm_token_expiry_seconds = Gauge(
            "controlplane_slurm_token_expiry_seconds",
            "How long the Slurm token is still good; NaN while that is not known",
            registry=registry,
        )
        self.slurm_token_expiry_seconds.set(math.nan)
        self.round_seconds = Histogram(
            "controlplane_round_seconds", "One round of a loop", ["loop"], buckets=_SLOW, registry=registry
        )
        self.round_failures = Counter(
            "controlplane_round_failures", "Rounds that ended with an error", ["loop"], registry=registry
        )
        self.requests_cut = Counter(
            "controlplane_requests_cut",
            "Requests in flight at a replica when the deadline of its drain passed",
            ["replica_set"],
            registry=registry,
        )
        self.lease_held = Gauge("controlplane_lease_held", "1: this process reconciles", registry=registry)


class ProxyMetrics:
    def __init__(self, registry: CollectorRegistry) -> None:
        self.registry = registry
        self.requests = Counter(
            "proxy_requests", "Requests answered, by HTTP status", ["model", "tenant", "code"], registry=registry
        )
        self.request_seconds = Histogram(
            "proxy_request_seconds", "From the request to the last byte", ["model"], buckets=_SLOW, registry=registry
        )
        self.first_byte_seconds = Histogram(
            "proxy_first_byte_seconds",
            "From the request to the upstream's first byte of body",
            ["model"],
            buckets=_SLOW,
            registry=registry,
        )
        self.overhead_seconds = Histogram(
            "proxy_overhead_seconds",
            "Time before the first byte that was not spent waiting for an upstream",
            buckets=_FAST,
            registry=registry,
        )
        self.in_flight = Gauge("proxy_in_flight", "Requests sent and not yet finished", ["model"], registry=registry)
        self.upstream_retries = Counter(
            "proxy_upstream_retries", "Requests tried at another endpoint", ["model", "reason"], registry=registry
        )
        self.broken_streams = Counter(
            "proxy_broken_streams", "Answers that broke off after they had begun", ["model"], registry=registry
        )
        self.client_disconnects = Counter(
            "proxy_client_disconnects", "Clients that left before their answer ended", ["model"], registry=registry
        )
        self.directory_age_seconds = Gauge(
            "proxy_directory_age_seconds", "Since the list of endpoints and keys was last read", registry=registry
        )
