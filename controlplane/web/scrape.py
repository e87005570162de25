"""`GET /metrics`: what this process counted, and how the replicas are, read from the database when asked for.

Read at every scrape and kept nowhere, so every control plane tells the same truth. Without a database those metrics
are left out (a gap, not a zero) and `controlplane_database_up` is 0.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from datetime import datetime

from loguru import logger
from prometheus_client import CollectorRegistry, Metric
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from controlplane.core.held_requests import SOURCE as PROXY
from controlplane.core.nodes import NodeCause
from controlplane.core.pending import word_of
from controlplane.core.types import LIVE_PHASES, Phase, Replica
from controlplane.db import (
    Database,
    DatabaseError,
    alerts,
    back_offs,
    endpoints,
    nodes,
    replica_sets,
    replicas,
    slurm_jobs,
    tenants,
    usage,
)
from controlplane.metrics import ControlPlaneMetrics
from controlplane.web.payloads import Source


def routes(db: Database, metrics: ControlPlaneMetrics, clock: Callable[[], datetime]) -> list[Route]:
    async def expose(request: Request) -> Response:
        up = GaugeMetricFamily("controlplane_database_up", "1: PostgreSQL answered this scrape")
        try:
            observed = await observe(db, clock())
            up.add_metric([], 1)
        except DatabaseError as error:
            logger.warning("metrics without the database", error=str(error)[:256])
            observed = []
            up.add_metric([], 0)
        registry = CollectorRegistry()
        registry.register(_Joined(metrics.registry, [*observed, up]))
        encode, content_type = choose_encoder(request.headers.get("accept", ""))
        return Response(encode(registry), headers={"Content-Type": content_type})

    return [Route("/metrics", expose)]


async def observe(db: Database, now: datetime) -> list[Metric]:
    """The metrics that are read from the database. Raises DatabaseError."""
    sets = await replica_sets.load_all(db)
    live = await replicas.load_live(db)
    phases = Counter((one.replica_set, one.phase) for one in live)
    to_route = await endpoints.load_routable(db)
    routable = Counter(one.replica_set for one in to_route)
    overdue = Counter(one.replica_set for one in to_route if one.yields_at is not None and one.yields_at <= now)
    by_phase = GaugeMetricFamily(
        "controlplane_replicas", "Replicas that have not ended", labels=["replica_set", "phase"]
    )
    desired = GaugeMetricFamily("controlplane_replicas_desired", "Replicas wanted", labels=["replica_set", "model"])
    paused = GaugeMetricFamily(
        "controlplane_paused", "1: the set is paused, and has no replicas", labels=["replica_set"]
    )
    ready = GaugeMetricFamily(
        "controlplane_replicas_routable", "Endpoints that requests are sent to", labels=["replica_set", "model"]
    )
    for one in sets:
        for phase in Phase:
            if phase in LIVE_PHASES:
                by_phase.add_metric([one.name, phase], phases[one.name, phase])
        desired.add_metric([one.name, one.spec.model], one.desired_replicas)
        paused.add_metric([one.name], one.is_paused)
        ready.add_metric([one.name, one.spec.model], routable[one.name])
    confirmed = GaugeMetricFamily(
        "controlplane_endpoint_last_confirmed_age_seconds",
        "Since a replica's endpoint last passed a probe; absent until it first did",
        labels=["replica"],
    )
    for endpoint in await endpoints.load_live(db):
        if endpoint.replica is not None and endpoint.confirmed_at is not None:
            confirmed.add_metric([endpoint.replica], _age(endpoint.confirmed_at, now))
    late = GaugeMetricFamily(
        "controlplane_hand_over_late",
        "Endpoints that requests are sent to though their successors should serve by now",
        labels=["replica_set"],
    )
    for one in sets:
        if not one.spec.is_external:
            late.add_metric([one.name], overdue[one.name])
    pending = GaugeMetricFamily(
        "controlplane_slurm_job_pending_seconds",
        "How long the oldest of the jobs that Slurm lets wait has waited, by Slurm's reason",
        labels=["replica_set", "reason"],
    )
    oldest: dict[tuple[str, str], float] = {}
    for job in await slurm_jobs.load_pending(db):
        key = (job.replica_set, word_of(job.state_reason))
        oldest[key] = max(oldest.get(key, 0.0), _age(job.since, now))
    for (replica_set, reason), age in oldest.items():
        pending.add_metric([replica_set, reason], age)
    stale = GaugeMetricFamily(
        "controlplane_alerts_stale", "Firing alerts that nobody confirms any more", labels=["source"]
    )
    stale_by_source = await alerts.count_stale(db)
    for source in (*Source, PROXY):
        stale.add_metric([source], stale_by_source.get(source, 0))
    return [
        *(by_phase, desired, paused, ready, confirmed, late, pending, stale),
        *await _troubles(db, [one.name for one in sets]),
        *await _holdings(db, {(one.name, one.spec.model) for one in sets if not one.spec.is_external}, live, now),
        await _tenants(db, now),
    ]


async def _troubles(db: Database, names: Iterable[str]) -> list[Metric]:
    """Sets that back off, and nodes that are kept out, by why they are."""
    backing_off = GaugeMetricFamily(
        "controlplane_back_off",
        "Failed starts in a row, or jobs lost soon, that a set backs off from; 0: it does not",
        labels=["replica_set"],
    )
    pauses = await back_offs.load(db)
    for name in names:
        backing_off.add_metric([name], pauses[name].failures if name in pauses else 0)
    excluded = GaugeMetricFamily(
        "controlplane_nodes_excluded", "Nodes that are marked to be kept out of new jobs", labels=["cause"]
    )
    marked = Counter(mark.cause for mark in await nodes.load(db) if mark.is_active)
    for cause in NodeCause:
        excluded.add_metric([cause], marked[cause])
    return [backing_off, excluded]


async def _holdings(
    db: Database, sets: Iterable[tuple[str, str]], live: Iterable[Replica], now: datetime
) -> list[Metric]:
    """What the sets' jobs hold of the cluster, and for how long they may."""
    held = GaugeMetricFamily(
        "controlplane_gpus_held",
        "GPUs of the jobs that run, those that load or drain included",
        labels=["replica_set", "model"],
    )
    gpus = dict.fromkeys(sets, 0) | await usage.load_gpus_held(db)
    for labels, count in gpus.items():
        held.add_metric(labels, count)
    left = GaugeMetricFamily(
        "controlplane_replica_walltime_left_seconds",
        "Until the time limit ends the replica's job; absent until Slurm told of it",
        labels=["replica_set", "replica"],
    )
    ends = await slurm_jobs.load_ends(db)
    for one in live:
        if one.name in ends:
            left.add_metric([one.replica_set, one.name], max(0.0, (ends[one.name] - now).total_seconds()))
    return [held, left]


async def _tenants(db: Database, now: datetime) -> Metric:
    tokens = GaugeMetricFamily(
        "controlplane_tenant_tokens",
        "Tokens of the UTC month: what a tenant used of them, and what it may use, where that is bounded",
        labels=["tenant", "kind"],
    )
    for tenant in await tenants.load_all(db, now):
        tokens.add_metric([tenant.name, "used"], tenant.month_tokens)
        if tenant.limits.monthly_tokens is not None:
            tokens.add_metric([tenant.name, "budget"], tenant.limits.monthly_tokens)
    return tokens


class _Joined(Collector):
    """What a registry has, and then these."""

    def __init__(self, registry: CollectorRegistry, further: Iterable[Metric]) -> None:
        self._registry = registry
        self._further = further

    def collect(self) -> Iterator[Metric]:
        yield from self._registry.collect()
        yield from self._further


def _age(then: datetime, now: datetime) -> float:
    return max(0.0, (now - then).total_seconds())
