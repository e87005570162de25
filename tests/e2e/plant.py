"""Control planes and proxies as processes of their own, on a real Slurm and a real database, for faults and load."""

from __future__ import annotations

import asyncio
import signal
import sys
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import httpx

from controlplane.clock import utc_now
from controlplane.core.lifecycle import is_anothers
from controlplane.core.types import JobState, ReplicaSetSpec, SlurmJob, SlurmResources, VllmOptions
from controlplane.db import Database, DatabaseOptions, keys, migrate, slurm_jobs
from controlplane.demo.children import Server, free_ports
from controlplane.demo.slurm_cluster import SlurmCluster
from controlplane.slurm.client import SlurmClient, SlurmOptions

SPEC = ReplicaSetSpec(
    name="plant",
    model="plant model",
    template="fake-vllm",
    max_replicas=3,
    slurm=SlurmResources(time_limit_seconds=1200, gpus_per_node=1),
    vllm=VllmOptions(args=("--max-num-seqs", "64", "--tokens-per-second", "10")),
    start_timeout_seconds=60,
    drain_timeout_seconds=120,
)
SHORT_WAITS = ("MessageTimeout=4", "KillWait=2")
"""For slurm.conf: who does not answer is given up soon, and a cancelled job is not left ten seconds to end."""

_READY_SECONDS = 60.0

Role = Literal["control", "proxy"]


@dataclass(frozen=True, slots=True)
class _Process:
    role: Role
    url: str


class Plant(Server):
    """Empty after `start`; `serve` adds a process. Names are the caller's.

    Everything is quick: rounds, probes and leases take a second or two, so that a drain waits three for the proxies.
    """

    def __init__(
        self, directory: Path, slurm: SlurmCluster, database_url: str, settings: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(directory)
        self.slurm = slurm
        self.database_url = database_url
        self.api_key = ""
        self._settings = dict(settings or {})
        self._processes: dict[str, _Process] = {}

    def serve(self, name: str, role: Role, settings: Mapping[str, str] | None = None) -> None:
        """Start `controlplane serve`, and wait until it can work."""
        web_port, proxy_port = free_ports(2)
        ports = {"CONTROLPLANE_WEB__PORT": str(web_port), "CONTROLPLANE_PROXY__PORT": str(proxy_port)}
        url = f"http://127.0.0.1:{web_port if role == 'control' else proxy_port}"
        self._processes[name] = _Process(role, url)
        command = [sys.executable, "-m", "controlplane.cli", "serve", "--role", role]
        environment = {**self.settings(), **ports, **(settings or {})}
        self.children.start(name, command, environment=environment)
        self._wait_until_ready(name)

    def settings(self) -> dict[str, str]:
        return {
            "DATABASE_URL": self.database_url,
            "CONTROLPLANE_SLURM__URL": self.slurm.url,
            "CONTROLPLANE_SLURM__USER_NAME": self.slurm.user_name,
            "CONTROLPLANE_SLURM__JWT_KEY_FILE": str(self.slurm.jwt_key_file),
            "CONTROLPLANE_SLURM__JOB_DIRECTORY": str(self.slurm.jobs_directory),
            "CONTROLPLANE_RECONCILE__INTERVAL_SECONDS": "1",
            "CONTROLPLANE_RECONCILE__LEASE_SECONDS": "2",
            "CONTROLPLANE_PROBE__INTERVAL_SECONDS": "1",
            "CONTROLPLANE_PROXY__REFRESH_SECONDS": "0.5",
            "CONTROLPLANE_PROXY__CONNECT_TIMEOUT_SECONDS": "0.5",
            **self._settings,
        }

    def url(self, name: str) -> str:
        return self._processes[name].url

    def kill(self, name: str) -> None:
        self.children.kill(name)

    def freeze(self, name: str) -> None:
        """It stands still, wherever it is, and keeps what it holds."""
        self.children.kill(name, signal.SIGSTOP)

    def wake(self, name: str) -> None:
        self.children.kill(name, signal.SIGCONT)

    def restart(self, name: str) -> None:
        """As after a crash; ends it first if it still runs."""
        self.children.restart(name)
        self._wait_until_ready(name)

    def said(self, name: str, sentence: str) -> bool:
        """Did this process log the sentence?"""
        return sentence in self.children.log_file(name).read_text()

    def metric(self, name: str, sample: str) -> float:
        """The value of a sample such as `controlplane_lease_held` at the process's `/metrics`; 0 if it is not there."""
        for line in httpx.get(f"{self.url(name)}/metrics", timeout=5, trust_env=False).text.splitlines():
            if line.startswith(f"{sample} "):
                return float(line.removeprefix(sample))
        return 0.0

    def _bring_up(self) -> None:
        self._processes.clear()
        migrate(self.database_url)
        asyncio.run(self._prepare())

    async def _prepare(self) -> None:
        async with Database(DatabaseOptions(self.database_url)) as db:
            async with db.connection() as connection:  # test databases are copies; on one Slurm they are installations
                await connection.execute("UPDATE installation SET instance_id = DEFAULT")
            self.api_key, _ = await keys.create(db, "plant", models=None, expires_at=None, actor="test", now=utc_now())

    def _wait_until_ready(self, name: str) -> None:
        def is_ready() -> bool:
            try:
                return httpx.get(f"{self.url(name)}/ready", timeout=2, trust_env=False).is_success
            except httpx.HTTPError:
                return False

        self.children.wait_until(is_ready, f"{name} is ready", needs=[name], timeout_seconds=_READY_SECONDS)


async def jobs_of(slurm: SlurmCluster, db: Database) -> list[SlurmJob]:
    """Every job of this database's installation that Slurm still knows, ended ones included (for five minutes)."""
    instance_id = await slurm_jobs.instance_id(db)
    async with SlurmClient(SlurmOptions(f"unix:{slurm.socket_path}", slurm.user_name)) as client:
        listed = await client.list_jobs(utc_now())
    return [job for job in listed.jobs if not is_anothers(job, instance_id)]


def living(jobs: list[SlurmJob]) -> list[SlurmJob]:
    return [job for job in jobs if not job.is_over and job.state is not JobState.COMPLETING]


def twins(jobs: list[SlurmJob]) -> list[SlurmJob]:
    """Of jobs that share a name, all but the one that ran, or the first. Fails if two of them have run."""
    found: list[SlurmJob] = []
    for name, count in Counter(job.name for job in jobs).items():
        if count > 1:
            namesakes = sorted((job for job in jobs if job.name == name), key=lambda job: (not _ran(job), job.job_id))
            assert sum(map(_ran, namesakes)) <= 1, f"two jobs of one name have run: {namesakes}"
            found += namesakes[1:]
    return found


def _ran(job: SlurmJob) -> bool:
    return job.state is JobState.RUNNING or bool(job.nodes)
