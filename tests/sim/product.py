"""How the product is put together here: the only file of the simulation that calls its constructors.

One `ControlPlane` is what `app` makes of one process, without the runner: its rounds are taken by the world, which
knows no lease. What a lease would have kept apart may happen at the same time here, always.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import jwt
from prometheus_client import CollectorRegistry
from starlette.applications import Starlette

from controlplane import web
from controlplane.core.planning import PlanRules
from controlplane.core.types import HandOver, ReplicaSetSpec, ScaleDown, ScaleUp, SlurmResources, VllmOptions
from controlplane.db import Database
from controlplane.metrics import ControlPlaneMetrics
from controlplane.reconcile.actions import ActionOptions, Actor
from controlplane.reconcile.alerts import AlertPullLoop, AlertPullOptions, AlertSource
from controlplane.reconcile.endpoints import EndpointLoop, EndpointOptions
from controlplane.reconcile.pauses import PauseLoop, PauseOptions
from controlplane.reconcile.replicas import ReplicaLoop, ReplicaOptions
from controlplane.reconcile.staleness import StalenessLoop, StalenessOptions
from controlplane.slurm.client import SlurmClient, SlurmOptions
from controlplane.slurm.script import ScriptOptions
from tests.sim.slurm import US

SCRIPTS = ScriptOptions(template_directories=(Path(__file__).parent,))
STALE_AFTER = timedelta(minutes=5)
ORPHAN_GRACE = timedelta(minutes=5)
RULES = PlanRules(longest_back_off=timedelta(minutes=2))
ORG_ID = 1
WEBHOOK_TOKEN, OPERATOR, OPERATOR_TOKEN = "webhook-token", "ann", "operator-token"
REQUEST_TIMEOUT = timedelta(seconds=30)
_KEY = "k" * 32
_METRICS = ControlPlaneMetrics(CollectorRegistry())


@dataclass(slots=True)
class Token:
    """A token made for each request if `lifetime` is given; else one that somebody renews, or forgets to renew."""

    lifetime: timedelta | None
    good_until: datetime | None = None  # of one that is renewed; None: for ever

    async def read(self, now: datetime) -> str:
        expires_at = now + self.lifetime if self.lifetime else self.good_until
        claims: dict[str, object] = {"sun": US}
        if expires_at is not None:
            claims["exp"] = int(expires_at.timestamp())
        return jwt.encode(claims, _KEY)


@dataclass(slots=True)
class ControlPlane:
    replicas: ReplicaLoop
    endpoints: EndpointLoop
    alerts: AlertPullLoop
    pauses: PauseLoop
    staleness: StalenessLoop


def a_spec(name: str, model: str, *, image: str = "one", **changes: Any) -> ReplicaSetSpec:
    """With times short enough that a life sees them pass."""
    whole: dict[str, Any] = {
        "name": name,
        "model": model,
        "template": "simulated",
        "max_replicas": 3,
        "slurm": resources(3600),
        "vllm": VllmOptions(image=image),
        "scale_up": ScaleUp(cooldown_seconds=15),
        "scale_down": ScaleDown(cooldown_seconds=15, stabilization_window_seconds=30),
        "hand_over": HandOver(margin_seconds=40, default_lead_seconds=60),
        "start_timeout_seconds": 90,
        "drain_timeout_seconds": 60,
        "unhealthy_timeout_seconds": 30,
    }
    return ReplicaSetSpec(**{**whole, **changes})


def resources(time_limit_seconds: int) -> SlurmResources:
    return SlurmResources(time_limit_seconds=time_limit_seconds, gpus_per_node=1, min_time_limit_seconds=120)


def control_plane(
    db: Database,
    wire: httpx.AsyncBaseTransport,
    token: Token,
    instance_id: str,
    clock: Callable[[], datetime],
    rng: random.Random,
) -> ControlPlane:
    """A fresh process: it remembers nothing."""
    slurm = SlurmClient(SlurmOptions("http://slurm", US, token_source=token), clock=clock, network=wire)
    http = httpx.AsyncClient(transport=wire, trust_env=False)
    # few ports, so that a replica could meet what an earlier one left on its port; enough for those that rest
    actions = ActionOptions(Path("/jobs"), SCRIPTS, instance_id, first_port=20000, last_port=20029)
    options = ReplicaOptions(instance_id, stale_after=STALE_AFTER, orphan_grace=ORPHAN_GRACE, rules=RULES)
    actor = Actor(db, slurm, actions, clock, rng)
    sources = AlertPullOptions([AlertSource("grafana", "http://grafana", org_id=ORG_ID)], absence_seconds=30)
    return ControlPlane(
        replicas=ReplicaLoop(db, slurm, actor, options, _METRICS, clock),
        endpoints=EndpointLoop(db, EndpointOptions(), clock, http),
        alerts=AlertPullLoop(db, sources, http),
        pauses=PauseLoop(db, PauseOptions()),
        staleness=StalenessLoop(db, StalenessOptions(stale_after=STALE_AFTER)),
    )


def web_app(db: Database, clock: Callable[[], datetime]) -> Starlette:
    """Where webhooks and operators come in."""
    options = web.WebOptions(
        webhook=web.WebhookCredentials(bearer_tokens=(WEBHOOK_TOKEN,)),
        operators=(web.OperatorToken(OPERATOR, OPERATOR_TOKEN),),
        script=SCRIPTS,
    )
    return web.create_app(db, options, _METRICS, slurm_status=lambda: None, clock=clock)
