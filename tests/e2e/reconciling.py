"""A reconciler in this process, on a real Slurm and a real PostgreSQL."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import httpx
from prometheus_client import CollectorRegistry

from controlplane.clock import utc_now
from controlplane.core.planning import PlanRules
from controlplane.core.types import Phase, Replica, ReplicaSetSpec, SlurmResources, VllmOptions
from controlplane.db import Database, DatabaseOptions, endpoints, replica_sets, replicas, slurm_jobs
from controlplane.demo.slurm_cluster import CommandFailed, SlurmCluster
from controlplane.metrics import ControlPlaneMetrics
from controlplane.reconcile.actions import ActionOptions, Actor
from controlplane.reconcile.endpoints import EndpointLoop, EndpointOptions
from controlplane.reconcile.job_logs import JobLogLoop, JobLogOptions
from controlplane.reconcile.loop import Loop, Runner, RunnerOptions
from controlplane.reconcile.probe import ProbeLimits
from controlplane.reconcile.replicas import ReplicaLoop, ReplicaOptions
from controlplane.slurm.client import SlurmClient, SlurmOptions
from controlplane.slurm.script import ScriptOptions
from controlplane.slurm.tokens import MintedToken, StaticToken, TokenSource
from tests.conftest import eventually

SPEC = ReplicaSetSpec(
    name="small",
    model="small model",
    template="fake-vllm",
    max_replicas=3,
    slurm=SlurmResources(time_limit_seconds=600, gpus_per_node=1),
    vllm=VllmOptions(args=("--tokens-per-second", "50")),
    start_timeout_seconds=60,
    drain_timeout_seconds=20,
)


RULES = PlanRules(drain_settle=timedelta(seconds=2))


@dataclass(frozen=True, slots=True)
class Reconciling:
    """What a test can see and do."""

    db: Database
    slurm: SlurmCluster
    client: SlurmClient
    instance_id: str
    calls: list[tuple[str, str]]  # operation and outcome of every call of slurmrestd

    async def scale(self, replicas_wanted: int) -> None:
        await replica_sets.scale(self.db, SPEC.name, replicas=replicas_wanted, actor="test", now=utc_now())

    async def live(self) -> tuple[Replica, ...]:
        return await replicas.load_live(self.db)

    async def until_routable(self, count: int, *, timeout_seconds: float = 30) -> None:
        async def is_so() -> bool:
            return len(await endpoints.load_routable(self.db)) == count == len(await self.live())

        await eventually(is_so, timeout_seconds=timeout_seconds)

    async def until_out_of_rotation(self) -> None:
        async def is_so() -> bool:
            return not await endpoints.load_routable(self.db)

        await eventually(is_so, timeout_seconds=20)

    async def until_ended(self, name: str, *, timeout_seconds: float = 30) -> Replica:
        async def ended() -> Replica | None:
            replica = await replicas.load(self.db, name)
            return replica if replica.phase is Phase.ENDED else None

        return await eventually(ended, timeout_seconds=timeout_seconds)

    def jobs(self) -> Mapping[str, str]:
        """What squeue shows of this set's jobs: state by job id."""
        lines = self.slurm.run("squeue", "--noheader", "--format", "%i %T %j").splitlines()
        rows = [line.split() for line in lines]
        return {job: state for job, state, name in rows if name.startswith(f"cp-{SPEC.name}-")}


@asynccontextmanager
async def reconciling(
    slurm: SlurmCluster,
    database_url: str,
    *,
    url: str | None = None,
    spec: ReplicaSetSpec = SPEC,
    orphan_grace: timedelta = timedelta(minutes=5),
    submit_grace_seconds: float | None = None,
    token_timeout_seconds: float = 10,
    rules: PlanRules = RULES,
    templates: tuple[Path, ...] = (),
) -> AsyncIterator[Reconciling]:
    """Run the reconciler until the block ends; then every job that is left is cancelled.

    `submit_grace_seconds`: with a token that outlives the test; left out, with short-lived ones that are made here.
    """
    source: TokenSource = MintedToken(slurm.jwt_key_file, slurm.user_name)
    if submit_grace_seconds is not None:
        lasting = MintedToken(slurm.jwt_key_file, slurm.user_name, timedelta(hours=1))
        source = StaticToken(await lasting.read(utc_now()))
    options = SlurmOptions(url or slurm.url, slurm.user_name, source, submit_grace_seconds=submit_grace_seconds or 120)
    metrics = ControlPlaneMetrics(CollectorRegistry())
    calls: list[tuple[str, str]] = []
    async with (
        Database(DatabaseOptions(database_url)) as db,
        SlurmClient(options, on_call=lambda operation, outcome, _: calls.append((operation, outcome))) as client,
        httpx.AsyncClient() as http,
    ):
        await replica_sets.apply(db, spec, actor="test", now=utc_now())
        async with db.connection() as connection:  # test databases are copies; on one Slurm they are installations
            await connection.execute("UPDATE installation SET instance_id = DEFAULT")
        instance_id = await slurm_jobs.instance_id(db)
        scripts = ScriptOptions(templates, shutdown_timeout_seconds=5)
        actions = ActionOptions(slurm.jobs_directory, scripts, instance_id)
        # no seed: it draws ports, and another session of tests may run beside this one
        actor = Actor(db, client, actions, utc_now, random.Random())
        options_of_rounds = ReplicaOptions(
            instance_id,
            interval_seconds=0.3,
            orphan_grace=orphan_grace,
            reservations_good_for=timedelta(seconds=1),
            rules=rules,
        )
        limits = ProbeLimits(token_timeout_seconds=token_timeout_seconds)
        looking = EndpointOptions(interval_seconds=0.3, ready_interval_seconds=0.3, limits=limits)
        probing = EndpointLoop(db, looking, utc_now, http)
        logs = JobLogLoop(db, JobLogOptions(slurm.jobs_directory, interval_seconds=0.3))
        loops: list[Loop] = [ReplicaLoop(db, client, actor, options_of_rounds, metrics, utc_now), probing, logs]
        running = asyncio.create_task(Runner(db, loops, RunnerOptions("test"), metrics, utc_now).run())
        seen = Reconciling(db, slurm, client, instance_id, calls)
        try:
            yield seen
        finally:
            running.cancel()
            with suppress(asyncio.CancelledError):
                await running
            await probing.close()
            if left := seen.jobs():
                for words in (["--signal=KILL", "--full"], []):
                    with suppress(CommandFailed):  # one of them has just ended
                        slurm.run("scancel", *words, *left)
                await eventually(lambda: not seen.jobs(), timeout_seconds=30)
