"""What the chart's pods would run, run here: their arguments, environments and secret files, on a real PostgreSQL."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx
import psycopg
import pytest

from controlplane.demo.children import free_ports
from controlplane.demo.postgres import PrivatePostgres
from tests.conftest import eventually_sync
from tests.unit.helm_chart import Document, Release, render

SECRETS = "/run/secrets/controlplane"
SECONDS = 90.0  # several interpreters start at once, on a machine that may be busy


def values(database_url: str) -> dict[str, Any]:
    return {
        "settings": {
            "CONTROLPLANE_SLURM__URL": "http://127.0.0.1:9",  # nobody: degraded is not unready
            "CONTROLPLANE_SLURM__USER_NAME": "llm",
            "CONTROLPLANE_SLURM__JOB_DIRECTORY": "/scratch/llm",
            "CONTROLPLANE_PROXY__WORKERS": 2,
            "CONTROLPLANE_PROXY__DRAIN_TIMEOUT_SECONDS": 1.5,
        },
        "secrets": {
            "databaseUrl": {"value": database_url},
            "webhookHmacSecrets": {"value": "for-trying-out-hmac"},
            "operatorTokens": {"value": "ann:for-trying-out-operator"},
            "slurmToken": {"value": "for-trying-out-slurm"},
        },
        "replicaSets": [
            {
                "name": "qwen3-8b",
                "model": "qwen3-8b",
                "min_replicas": 0,
                "slurm": {"partition": "gpu", "gpus_per_node": 1, "time_limit_seconds": 43200},
                "vllm": {"image": "/software/vllm.sif", "model_path": "/models/Qwen3-8B"},
            }
        ],
    }


class Pod:
    """A pod's files, and its containers' processes; ports are this test's, and listen on this host only."""

    def __init__(self, release: Release, pod: Document, directory: Path, web_port: int, proxy_port: int) -> None:
        self._release, self._spec, self._directory = release, pod["spec"], directory
        self._ports = {"CONTROLPLANE_WEB__PORT": str(web_port), "CONTROLPLANE_PROXY__PORT": str(proxy_port)}
        secret = {name: text for one in release.of_kind("Secret") for name, text in one["stringData"].items()}
        directory.mkdir()
        for volume in self._spec["volumes"]:
            for source in volume.get("projected", {}).get("sources", []):
                for item in source["secret"]["items"]:
                    (directory / item["path"]).write_text(secret[item["key"]] + "\n")  # as `kubectl` has it of editors
            if volume["name"] == "sets":
                (directory / "sets.yaml").write_text(self._map(volume["configMap"]["name"])["sets.yaml"])

    def _map(self, name: str) -> dict[str, str]:
        found = next(one for one in self._release.of_kind("ConfigMap") if one["metadata"]["name"] == name)
        data: dict[str, str] = found["data"]
        return data

    def start(self, kind: str = "containers") -> subprocess.Popen[str]:
        (container,) = self._spec[kind]
        environment = {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "HOME": "/nonexistent"}
        for source in container.get("envFrom", []):
            environment |= self._map(source["configMapRef"]["name"])
            environment |= self._ports
        for one in container["env"]:
            environment[one["name"]] = one["value"].replace(SECRETS, str(self._directory))
        for name in environment:
            if name.endswith("__HOST"):
                environment[name] = "127.0.0.1"
        words = container.get("command") or ["controlplane", *container["args"]]
        words = [one.replace("/etc/controlplane/sets", str(self._directory)) for one in words]
        return subprocess.Popen(
            words, env=environment, cwd="/", stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )

    def run(self, kind: str = "containers") -> str:
        process = self.start(kind)
        said, _ = process.communicate(timeout=SECONDS)
        assert process.returncode == 0, said
        return said


@contextmanager
def running(pod: Pod, kind: str = "containers") -> Iterator[subprocess.Popen[str]]:
    process = pod.start(kind)
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def answers(url: str, status: int) -> dict[str, Any]:
    def answer() -> httpx.Response:
        try:
            found = httpx.get(url)
        except httpx.TransportError as error:
            raise AssertionError(str(error)) from None
        assert found.status_code == status, found.text
        return found

    found: dict[str, Any] = eventually_sync(answer, timeout_seconds=SECONDS).json()
    return found


@pytest.fixture
def empty_database(postgres: PrivatePostgres) -> Iterator[str]:
    yield postgres.create_database("first_installation")
    postgres.drop_database("first_installation")


def test_pods_and_jobs_of_a_first_installation_wait_for_each_other_and_then_serve(
    empty_database: str, tmp_path: Path
) -> None:
    release = render(values(empty_database))
    web_port, proxy_port = free_ports(2)
    web, proxy = f"http://127.0.0.1:{web_port}", f"http://127.0.0.1:{proxy_port}"

    def pod(kind: str, name: str) -> Pod:
        template = release.one(kind, name)["spec"]["template"]
        return Pod(release, template, tmp_path / name, web_port, proxy_port)

    with ExitStack() as stack:
        control_plane = stack.enter_context(running(pod("Deployment", "control-plane")))
        front = stack.enter_context(running(pod("Deployment", "proxy")))
        apply = pod("Job", "apply")
        waiting = stack.enter_context(running(apply, "initContainers"))
        assert answers(f"{web}/health", 200) == {"status": "ok"}
        assert answers(f"{web}/ready", 503)["status"] == "unready"
        answers(f"{proxy}/health", 200)
        assert waiting.poll() is None

        assert "applied 0001.initial" in pod("Job", "migrate").run()
        waiting.communicate(timeout=SECONDS)
        assert waiting.returncode == 0
        assert "qwen3-8b" in apply.run()
        assert answers(f"{web}/ready", 200)["status"] == "degraded"  # Slurm is away
        answers(f"{proxy}/ready", 200)
        operator = {"Authorization": "Bearer for-trying-out-operator"}
        assert httpx.get(f"{web}/api/v1/replica-sets", headers=operator).status_code == 200

        for process in (control_plane, front):
            process.terminate()
            process.communicate(timeout=SECONDS)
            assert process.returncode == 0


def test_sets_are_applied_only_to_a_schema_of_this_version(database_url: str, tmp_path: Path) -> None:
    """An older one may look well enough: its tables are there."""
    release = render(values(database_url))
    apply = Pod(release, release.one("Job", "apply")["spec"]["template"], tmp_path / "apply", *free_ports(2))
    with psycopg.connect(database_url, autocommit=True) as connection:
        newest = "SELECT max(migration_id) FROM _yoyo_migration"
        (gone,) = connection.execute(newest).fetchone() or ("",)
        connection.execute("CREATE TABLE kept AS SELECT * FROM _yoyo_migration WHERE migration_id = %s", (gone,))
        connection.execute("DELETE FROM _yoyo_migration WHERE migration_id = %s", (gone,))
        with running(apply, "initContainers") as waiting:
            assert waiting.stdout is not None
            said = eventually_sync(lambda: next(line for line in waiting.stdout or () if "migrations" in line))
            assert gone in said
            assert waiting.poll() is None
            connection.execute("INSERT INTO _yoyo_migration SELECT * FROM kept")
            waiting.communicate(timeout=SECONDS)
            assert waiting.returncode == 0
