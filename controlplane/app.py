"""The composition root: what each room is given of the settings, and what is started for each role. No logic.

`serve` starts whoever is away: `dependencies` says so, and the loops begin once the database is there.
"""

from __future__ import annotations

import asyncio
import socket
from contextlib import AsyncExitStack
from dataclasses import replace
from datetime import timedelta
from enum import StrEnum
from random import SystemRandom

import httpx
import uvloop
from prometheus_client import CollectorRegistry

from controlplane import proxy, web
from controlplane.clock import utc_now
from controlplane.core.nodes import NodeRules
from controlplane.core.planning import PlanRules
from controlplane.db import PULL_CHANNEL, Database, DatabaseError, DatabaseOptions, process_name, slurm_jobs
from controlplane.dependencies import DatabaseWatch, SlurmWatch
from controlplane.metrics import ControlPlaneMetrics, ProxyMetrics
from controlplane.reconcile.actions import ActionOptions, Actor
from controlplane.reconcile.alerts import AlertPullLoop, AlertPullOptions, AlertSource
from controlplane.reconcile.endpoints import EndpointLoop, EndpointOptions
from controlplane.reconcile.janitor import JanitorLoop, JanitorOptions
from controlplane.reconcile.job_logs import JobLogLoop, JobLogOptions
from controlplane.reconcile.loop import Loop, Runner, RunnerOptions
from controlplane.reconcile.pauses import PauseLoop, PauseOptions
from controlplane.reconcile.probe import ProbeLimits
from controlplane.reconcile.replicas import ReplicaLoop, ReplicaOptions
from controlplane.reconcile.staleness import StalenessLoop, StalenessOptions
from controlplane.servers import Duty, Server, Service, run_until_stopped
from controlplane.settings import Settings
from controlplane.slurm.client import SlurmClient, SlurmOptions
from controlplane.slurm.script import ScriptOptions
from controlplane.slurm.tokens import MintedToken, StaticToken, TokenCommand, TokenFile, TokenSource
from controlplane.workers import Link, Supervisor

_RETRY_SECONDS = 1.0
_WORKER_CONNECTIONS = 4
_READ_TIME = timedelta(seconds=2)  # how long a proxy's full read may take


class Role(StrEnum):
    ALL = "all"
    CONTROL = "control"
    PROXY = "proxy"


def serve(settings: Settings, role: Role, *, workers: int = 1) -> int:
    """Serve until a signal says to stop; returns the process's exit code. Raises CannotListen.

    With more than one worker the proxy is served by processes of its own, which this one supervises.
    """
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(_serve(settings, role, workers))


def serve_worker(settings: Settings, listening: socket.socket, channel: socket.socket) -> int:
    """Serve the proxy as one of several processes; returns the process's exit code."""
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(_serve_worker(settings, listening, channel))


async def _serve(settings: Settings, role: Role, workers: int) -> int:
    supervisor = None
    async with AsyncExitStack() as stack:
        db = await stack.enter_async_context(Database(database_options(settings)))
        database = DatabaseWatch(db)
        services: list[Service] = []
        duties: list[Duty] = [database.run]
        if role is not Role.PROXY:
            metrics = ControlPlaneMetrics(CollectorRegistry())
            slurm = slurm_client(settings, metrics)
            http = await stack.enter_async_context(probing_client())
            watch = None
            if slurm is not None:
                await stack.enter_async_context(slurm)
                watch = SlurmWatch(slurm, metrics)
                duties.append(watch.run)
            services.append(_control_server(settings, db, metrics, watch))
            duties.append(lambda: _reconcile(settings, db, database, slurm, http, metrics))
        if role is not Role.CONTROL and workers > 1:
            supervisor = Supervisor(
                host=settings.proxy.host,
                port=settings.proxy.port,
                count=workers,
                drain_timeout_seconds=settings.proxy.drain_timeout_seconds,
            )
            services.append(supervisor)
        elif role is not Role.CONTROL:
            services.append(_proxy_server(settings, db, ProxyMetrics()))
        code = await run_until_stopped(services, duties)
    return code if supervisor is None or supervisor.is_clean else code or 1


async def _serve_worker(settings: Settings, listening: socket.socket, channel: socket.socket) -> int:
    metrics = ProxyMetrics()
    link = await Link.over(channel, metrics.snapshot)
    async with asyncio.TaskGroup() as tasks:
        linked = tasks.create_task(link.run())
        async with Database(worker_database_options(settings)) as db:
            server = _proxy_server(settings, db, metrics, listening, link)
            code = await run_until_stopped([server], [], told_to_stop=link.told_to_stop)
        linked.cancel()
    await link.close()
    return code


def _control_server(settings: Settings, db: Database, metrics: ControlPlaneMetrics, watch: SlurmWatch | None) -> Server:
    app = web.create_app(db, web_options(settings), metrics, slurm_status=lambda: watch.part if watch else None)
    return Server(
        "control plane",
        app,
        host=settings.web.host,
        port=settings.web.port,
        drain_timeout_seconds=settings.database.statement_timeout_seconds,
    )


def _proxy_server(
    settings: Settings,
    db: Database,
    metrics: ProxyMetrics,
    listening: socket.socket | None = None,
    link: Link | None = None,
) -> Server:
    """On an address of its own; a worker is given a socket that listens, and a link to its supervisor."""
    scrape = None if link is None else link.total
    data_plane = proxy.create_app(db, proxy_options(settings), metrics, scrape=scrape)

    def on_stop() -> None:
        data_plane.stop_soon()
        if link is not None:
            link.stops()

    server = Server(
        "proxy",
        data_plane,
        host=settings.proxy.host,
        port=settings.proxy.port,
        drain_timeout_seconds=settings.proxy.drain_timeout_seconds,
        listening=listening,
        on_stop=on_stop,
        protocol=data_plane.protocol,
    )
    metrics.open_connections = lambda: len(server.server_state.connections)
    return server


async def _reconcile(
    settings: Settings,
    db: Database,
    database: DatabaseWatch,
    slurm: SlurmClient | None,
    http: httpx.AsyncClient,
    metrics: ControlPlaneMetrics,
) -> None:
    await database.ready.wait()
    endpoint_loop = EndpointLoop(db, endpoint_options(settings), utc_now, http)
    loops: list[Loop] = [endpoint_loop, PauseLoop(db, PauseOptions()), JanitorLoop(db, JanitorOptions())]
    loops.append(StalenessLoop(db, StalenessOptions(stale_after=stale_after(settings))))
    if sources := alert_sources(settings):
        loops.append(AlertPullLoop(db, pull_options(settings, sources), http))
    if slurm is not None:
        instance_id = await _instance_id(db)
        actor = Actor(db, slurm, action_options(settings, instance_id), utc_now, SystemRandom())
        loops.append(ReplicaLoop(db, slurm, actor, replica_options(settings, instance_id), metrics, utc_now))
        assert settings.slurm.job_directory is not None  # settings insist on it where there is a Slurm
        loops.append(JobLogLoop(db, JobLogOptions(settings.slurm.job_directory)))
    options = RunnerOptions(
        process_name(), settings.reconcile.lease_seconds, channels={AlertPullLoop.name: PULL_CHANNEL}
    )
    try:
        await Runner(db, loops, options, metrics, utc_now).run()
    finally:
        await endpoint_loop.close()


async def _instance_id(db: Database) -> str:
    while True:
        try:
            return await slurm_jobs.instance_id(db)
        except DatabaseError:  # DatabaseWatch says so
            await asyncio.sleep(_RETRY_SECONDS)


def probing_client() -> httpx.AsyncClient:
    """Without httpx's limit of 100 connections: those that hang must not keep the others from being looked at."""
    return httpx.AsyncClient(trust_env=False, limits=httpx.Limits(max_connections=None, max_keepalive_connections=100))


# --- what each room is given -----------------------------------------------------------------------------


def database_options(settings: Settings) -> DatabaseOptions:
    return DatabaseOptions(
        url=settings.database_url.get_secret_value(),
        max_connections=settings.database.max_connections,
        timeout_seconds=settings.database.timeout_seconds,
        statement_timeout_seconds=settings.database.statement_timeout_seconds,
    )


def worker_database_options(settings: Settings) -> DatabaseOptions:
    """A worker reads its directory, listens and writes usage: a few connections do, and there are many workers."""
    options = database_options(settings)
    return replace(options, max_connections=min(options.max_connections, _WORKER_CONNECTIONS))


def web_options(settings: Settings) -> web.WebOptions:
    webhook = settings.webhook
    return web.WebOptions(
        webhook=web.WebhookCredentials(
            bearer_tokens=tuple(token.get_secret_value() for token in webhook.bearer_tokens),
            basic_credentials=tuple(f"{one.name}:{one.secret.get_secret_value()}" for one in webhook.basic_credentials),
            hmac_secrets=tuple(secret.get_secret_value() for secret in webhook.hmac_secrets),
            hmac_header=webhook.hmac_header,
            hmac_timestamp_header=webhook.hmac_timestamp_header,
        ),
        operators=tuple(web.OperatorToken(one.name, one.secret.get_secret_value()) for one in settings.operator.tokens),
        script=script_options(settings),
        max_body_bytes=webhook.max_body_bytes,
        max_waiting=webhook.max_waiting,
    )


def proxy_options(settings: Settings) -> proxy.ProxyOptions:
    chosen = settings.proxy
    return proxy.ProxyOptions(
        max_body_bytes=chosen.max_body_bytes,
        refresh_seconds=chosen.refresh_seconds,
        connect_timeout_seconds=chosen.connect_timeout_seconds,
        first_byte_timeout_seconds=chosen.first_byte_timeout_seconds,
        idle_timeout_seconds=chosen.idle_timeout_seconds,
        waiting=proxy.WaitingOptions(
            hold_seconds=chosen.hold_seconds,
            hold_seconds_without_stream=chosen.hold_seconds_without_stream,
            queue_seconds=chosen.queue_seconds,
            queue_pressure_seconds=chosen.queue_pressure_seconds,
            max_waiting_per_model=chosen.max_waiting_per_model,
            max_waiting_per_tenant=chosen.max_waiting_per_tenant,
        ),
        access_log_sample=chosen.access_log_sample,
    )


def endpoint_options(settings: Settings) -> EndpointOptions:
    probe = settings.probe
    limits = ProbeLimits(timeout_seconds=probe.timeout_seconds, token_timeout_seconds=probe.completion_timeout_seconds)
    return EndpointOptions(ready_interval_seconds=probe.interval_seconds, limits=limits)


def alert_sources(settings: Settings) -> list[AlertSource]:
    """Where active alerts are pulled from; none: webhooks have to do."""
    sources = []
    if (grafana := settings.grafana).url is not None:
        token = grafana.token.get_secret_value() if grafana.token else None
        sources.append(AlertSource("grafana", grafana.url, token, grafana.org_id))
    if settings.alertmanager.url is not None:
        sources.append(AlertSource("alertmanager", settings.alertmanager.url))
    return sources


def pull_options(settings: Settings, sources: list[AlertSource]) -> AlertPullOptions:
    chosen = settings.alerts
    return AlertPullOptions(
        sources, interval_seconds=chosen.pull_interval_seconds, absence_seconds=chosen.absence_seconds
    )


def stale_after(settings: Settings) -> timedelta:
    return timedelta(seconds=settings.alerts.stale_after_seconds)


def replica_options(settings: Settings, instance_id: str) -> ReplicaOptions:
    # a proxy that an announcement does not reach hears of a drain by its next full read, and what it chose just before
    # may still have to connect
    drain_settle = (
        timedelta(seconds=settings.proxy.refresh_seconds + settings.proxy.connect_timeout_seconds) + _READ_TIME
    )
    return ReplicaOptions(
        instance_id,
        interval_seconds=settings.reconcile.interval_seconds,
        stale_after=stale_after(settings),
        rules=PlanRules(drain_settle=drain_settle),
        nodes=node_rules(settings),
    )


def node_rules(settings: Settings) -> NodeRules:
    chosen = settings.nodes
    return NodeRules(
        failed_starts=chosen.failed_starts,
        first_exclusion=timedelta(seconds=chosen.first_exclusion_seconds),
        longest_exclusion=timedelta(seconds=chosen.longest_exclusion_seconds),
        most_excluded_share=chosen.most_excluded_share,
    )


def action_options(settings: Settings, instance_id: str) -> ActionOptions:
    scripts, job_directory = script_options(settings), settings.slurm.job_directory
    assert scripts is not None  # settings insist on both where there is a Slurm
    assert job_directory is not None
    first_port, last_port = settings.slurm.port_range
    return ActionOptions(job_directory, scripts, instance_id, first_port, last_port)


def script_options(settings: Settings) -> ScriptOptions | None:
    """How job scripts are made; None where there is no Slurm to run them."""
    if settings.slurm.url is None:
        return None
    directory = settings.slurm.template_directory
    return ScriptOptions(template_directories=(directory,) if directory else ())


def slurm_client(settings: Settings, metrics: ControlPlaneMetrics) -> SlurmClient | None:
    """A client that measures its calls; None where no Slurm is set."""
    slurm = settings.slurm
    if slurm.url is None:
        return None
    assert slurm.user_name is not None  # settings insist on it where there is a Slurm
    options = SlurmOptions(
        url=slurm.url,
        user_name=slurm.user_name,
        token_source=token_source(settings),
        user_id=slurm.user_id,
        api_version=slurm.api_version,
        timeout_seconds=slurm.timeout_seconds,
        submit_grace_seconds=slurm.submit_grace_seconds,
    )

    def measure(operation: str, outcome: str, seconds: float) -> None:
        metrics.slurm_request_seconds.labels(operation, outcome).observe(seconds)

    return SlurmClient(options, clock=utc_now, on_call=measure)


def token_source(settings: Settings) -> TokenSource | None:
    """The one way to a token that is set; None: slurmrestd's socket asks for none."""
    slurm = settings.slurm
    if slurm.token is not None:
        return StaticToken(slurm.token.get_secret_value())
    if slurm.token_file is not None:
        return TokenFile(slurm.token_file)
    if slurm.token_command is not None:
        return TokenCommand(slurm.token_command)
    if slurm.jwt_key_file is not None and slurm.user_name is not None:
        return MintedToken(slurm.jwt_key_file, slurm.user_name)
    return None
