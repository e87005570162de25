"""A whole site on one machine: Slurm, PostgreSQL, Alertmanager, Prometheus, and the control plane with its proxy.

Everything is real but the GPUs, their exporter and the model. Slurm's prolog and epilog write down which job holds
which GPU, as a site's would for dcgm-exporter. The alert rules are those of `grafana/alerts/`, made Prometheus rules;
only their durations are shortened, so that minutes become seconds. It all lives in one directory and is gone after
`stop`, or after the next `start` in the same directory when this process was killed.
"""

from __future__ import annotations

import asyncio
import secrets
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import httpx

from controlplane.clock import utc_now
from controlplane.core.types import Move, Phase, Reason, ReplicaSetSpec
from controlplane.db import Database, DatabaseOptions, keys, migrate, replica_sets, replicas, tenants
from controlplane.demo.alert_rules import Pace, convert, quickened
from controlplane.demo.children import Server, free_ports
from controlplane.demo.data_sources import DataSources, Sources
from controlplane.demo.fake_dcgm import jobs as gpu_jobs
from controlplane.demo.gpu_exporters import GpuExporterOptions, GpuExporters
from controlplane.demo.postgres import PrivatePostgres
from controlplane.demo.prometheus import Alertmanager, AlertmanagerOptions, Prometheus, PrometheusOptions
from controlplane.demo.slurm_cluster import SlurmCluster

ALERT_RULES = (
    Path(__file__).resolve().parents[2] / "grafana" / "alerts",  # a checkout
    Path(sys.prefix) / "share" / "controlplane" / "grafana" / "alerts",  # an installed package
)
RECORDING_RULES = tuple(folder.parents[1] / "prometheus" / "rules.yaml" for folder in ALERT_RULES)
_READY_SECONDS = 30.0
_BUDGET_TOKENS = 20_000_000  # of the month: to be seen, and more than the demo uses in days


@dataclass(frozen=True, slots=True)
class SiteOptions:
    replica_set: ReplicaSetSpec
    nodes: int = 4
    gpus_per_node: int = 8
    time_scale: float = 0.1  # of every duration in the alert and recording rules
    database_url: str | None = None  # None: a private server
    settings: Mapping[str, str] | None = None  # further CONTROLPLANE_* variables
    scrape_interval_seconds: int = 1


class Site(Server):
    """Up after `start`: one replica set applied, one key made, everything ready but the replicas themselves."""

    def __init__(self, directory: Path, options: SiteOptions) -> None:
        super().__init__(directory)
        self._options = options
        self._parts = ExitStack()
        self._web_port = self._proxy_port = 0
        self.database_url = ""
        self.api_key = ""
        self.operator_token = secrets.token_urlsafe(24)
        self._gpu_jobs = self.directory / "gpu-jobs"
        self.slurm = SlurmCluster(
            self.directory / "slurm",
            nodes=options.nodes,
            gpus=options.gpus_per_node,
            extra_conf=["KillWait=5", *gpu_jobs.slurm_conf(self._gpu_jobs)],
        )
        self._webhook_token = secrets.token_urlsafe(24)
        self.gpu_exporters: GpuExporters
        self._webhook_secret = secrets.token_urlsafe(24)
        self.data_sources = DataSources(self.directory / "grafana")
        self.alertmanager: Alertmanager
        self.prometheus: Prometheus

    @property
    def web_url(self) -> str:
        """The control plane's root: private, for operators, Prometheus and alerts."""
        return f"http://127.0.0.1:{self._web_port}"

    @property
    def proxy_url(self) -> str:
        """The proxy's root: public, for clients."""
        return f"http://127.0.0.1:{self._proxy_port}"

    def stop(self) -> None:
        """End everything, replicas included."""
        self.children.close()
        self._parts.close()

    def settings(self) -> dict[str, str]:
        """The environment of `controlplane` here: also what a person needs to use its command line."""
        return {
            "DATABASE_URL": self.database_url,
            "CONTROLPLANE_WEB__PORT": str(self._web_port),
            "CONTROLPLANE_PROXY__PORT": str(self._proxy_port),
            "CONTROLPLANE_WEBHOOK__BEARER_TOKENS": self._webhook_token,
            "CONTROLPLANE_WEBHOOK__HMAC_SECRETS": self._webhook_secret,
            "CONTROLPLANE_WEBHOOK__HMAC_TIMESTAMP_HEADER": "X-Grafana-Alerting-Timestamp",
            "CONTROLPLANE_OPERATOR__TOKENS": f"demo:{self.operator_token}",
            "CONTROLPLANE_SLURM__URL": self.slurm.url,
            "CONTROLPLANE_SLURM__USER_NAME": self.slurm.user_name,
            "CONTROLPLANE_SLURM__JWT_KEY_FILE": str(self.slurm.jwt_key_file),
            "CONTROLPLANE_SLURM__JOB_DIRECTORY": str(self.slurm.jobs_directory),
            "CONTROLPLANE_ALERTMANAGER__URL": self.alertmanager.url,
            "CONTROLPLANE_ALERTS__PULL_INTERVAL_SECONDS": "5",
            "CONTROLPLANE_RECONCILE__INTERVAL_SECONDS": "1",
            "CONTROLPLANE_PROXY__REFRESH_SECONDS": "1",
            "CONTROLPLANE_PROBE__INTERVAL_SECONDS": "1",
            **(self._options.settings or {}),
        }

    def _sources(self) -> Sources:
        contact_points = {
            "CONTROLPLANE_WEBHOOK_URL": f"{self.web_url}/webhooks/grafana",
            "CONTROLPLANE_WEBHOOK_HMAC_SECRET": self._webhook_secret,
            "CONTROLPLANE_WEBHOOK_BEARER_TOKEN": self._webhook_token,
        }
        scrape_interval = self.prometheus.scrape_interval_seconds
        return Sources(self.prometheus.url, scrape_interval, self.database_url, contact_points)

    def start_control_plane(self) -> None:
        """`controlplane serve`, and wait until both its halves can work."""
        self.children.start(
            "controlplane", [sys.executable, "-m", "controlplane.cli", "serve"], environment=self.settings()
        )
        self._wait_for_control_plane()

    def restart_control_plane(self) -> None:
        """As after a crash; ends it first if it still runs."""
        self.children.restart("controlplane")
        self._wait_for_control_plane()

    def _bring_up(self) -> None:
        try:
            self._bring_up_parts()
        except BaseException:
            self._parts.close()
            raise

    def _bring_up_parts(self) -> None:
        self.database_url = self._options.database_url or self._private_database()
        migrate(self.database_url)
        asyncio.run(self._prepare())
        gpu_jobs.write_scripts(self._gpu_jobs)
        self._parts.enter_context(self.slurm)
        self._web_port, self._proxy_port = free_ports(2)
        exporters = GpuExporterOptions(
            self.slurm.node_names, self._options.gpus_per_node, self._gpu_jobs, f"{self.web_url}/sd/prometheus"
        )
        self.gpu_exporters = self._parts.enter_context(GpuExporters(self.directory / "gpu-exporters", exporters))
        webhook = AlertmanagerOptions(f"{self.web_url}/webhooks/alertmanager", self._webhook_token)
        self.alertmanager = Alertmanager(self.directory / "alertmanager", webhook)
        self._parts.enter_context(self.alertmanager)
        rules = self.directory / "rules.yml"
        recording_rules = self.directory / "recording-rules.yml"
        pace = Pace(self._options.time_scale)
        rules.write_text(convert(_first_found(ALERT_RULES), pace, acting_only=True))
        recording_rules.write_text(quickened(_first_found(RECORDING_RULES), pace))
        self.prometheus = Prometheus(
            self.directory / "prometheus",
            PrometheusOptions(
                sd_url=f"{self.web_url}/sd/prometheus",
                static_targets={
                    "controlplane": [f"127.0.0.1:{self._web_port}"],
                    "proxy": [f"127.0.0.1:{self._proxy_port}"],
                },
                rule_files=[recording_rules, rules],
                scrape_interval_seconds=self._options.scrape_interval_seconds,
                alertmanager=self.alertmanager.address,
                dcgm_targets=self.gpu_exporters.addresses,
            ),
        )
        self._parts.enter_context(self.prometheus)
        self.start_control_plane()
        self._parts.callback(self.data_sources.forget)
        self.data_sources.write(self._sources())

    def _private_database(self) -> str:
        server = self._parts.enter_context(PrivatePostgres(self.directory / "postgres"))
        return server.create_database("controlplane")

    async def _prepare(self) -> None:
        now = utc_now()
        async with Database(DatabaseOptions(self.database_url)) as db:
            await replica_sets.apply(db, self._options.replica_set, actor="demo", now=now)
            await self._forget_an_earlier_site(db, now)
            self.api_key, _ = await keys.create(db, "demo", models=None, expires_at=None, actor="demo", now=now)
            budget = {"monthly_tokens": _BUDGET_TOKENS}
            await tenants.set_limits(db, "demo", budget, actor="demo", now=now)

    async def _forget_an_earlier_site(self, db: Database, now: datetime) -> None:
        """A database that was given may tell of replicas whose Slurm is gone: every site begins with an empty one."""
        spec = self._options.replica_set
        for replica in await replicas.load_live(db):
            if replica.replica_set == spec.name:
                gone = Move(replica, Phase.ENDED, Reason.LOST, "its site was taken down")
                await replicas.move(db, gone, actor="demo", now=now)
        await replica_sets.scale(db, spec.name, replicas=spec.min_replicas, actor="demo", now=now)

    def _wait_for_control_plane(self) -> None:
        def is_ready() -> bool:
            try:
                answers = [
                    httpx.get(f"{url}/ready", timeout=2, trust_env=False) for url in (self.web_url, self.proxy_url)
                ]
            except httpx.HTTPError:
                return False
            return all(answer.is_success for answer in answers)

        self.children.wait_until(
            is_ready, "the control plane is ready", needs=["controlplane"], timeout_seconds=_READY_SECONDS
        )


def _first_found(paths: Sequence[Path]) -> Path:
    return next((path for path in paths if path.exists()), paths[0])
