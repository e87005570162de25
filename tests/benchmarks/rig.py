"""Our proxy as it is measured: a PostgreSQL of its own, a set with fixed endpoints, keys, limits, and one worker.

Endpoints are written down as READY, because only the data plane is started: there is nobody who would probe them. All
else is as it would be at a site: keys are looked up, limits are counted (as far as this version has them; so high that
they never bind), metrics are on. `root` is another checkout whose proxy is measured, with its own `.venv`.
"""

from __future__ import annotations

import hashlib
import json
import re
import secrets
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import psycopg

from controlplane.demo.children import SYSTEM_PATH, free_ports
from controlplane.demo.postgres import PrivatePostgres
from tests.benchmarks.programs import BenchmarkFailed, Process, running

MODEL = "bench"
TENANT = "bench"
HERE = Path(__file__).parents[2]

_MOST_IN_FLIGHT = 100_000  # of an upstream: what nginx and haproxy pass on at once is not held back by us either
_LIMITS = {
    "requests-per-minute": 1_000_000_000,
    "tokens-per-minute": 1_000_000_000,
    "max-concurrent": 1_000_000,
    "monthly-tokens": 1_000_000_000_000,
}


def make_keys(count: int) -> list[str]:
    return ["sk-" + secrets.token_urlsafe(32) for _ in range(count)]


@dataclass(frozen=True, slots=True)
class Site:
    """A database with everything in it that the proxy reads, and the command line of the version that is measured."""

    root: Path
    directory: Path
    database_url: str

    def command(self, *arguments: str, stdin: str | None = None) -> str:
        done = self._run(*arguments, stdin=stdin)
        if done.returncode != 0:
            raise BenchmarkFailed(f"controlplane {' '.join(arguments)}: {done.stderr.strip()[-1000:]}")
        return done.stdout

    def prepare(
        self, models: Mapping[str, Sequence[int]], keys: Sequence[str], max_in_flight: Mapping[str, int]
    ) -> list[str]:
        """Migrate, apply a set a model, make keys and limits; returns the limits that this version knows."""
        self.command("migrate")
        specs: list[dict[str, object]] = [
            {"name": model, "model": model, "endpoints": [{"url": f"http://127.0.0.1:{port}"} for port in ports]}
            for model, ports in models.items()
        ]
        if "max_in_flight" in (self.root / "docs" / "replica-sets.schema.json").read_text():
            for spec in specs:
                spec["routing"] = {"max_in_flight": max_in_flight.get(str(spec["model"]), _MOST_IN_FLIGHT)}
        self.command("apply", "-f", "-", stdin=json.dumps({"replica_sets": specs}))
        with psycopg.connect(self.database_url) as connection:
            connection.execute("INSERT INTO tenants (name) VALUES (%s) ON CONFLICT DO NOTHING", (TENANT,))
            connection.cursor().executemany(
                "INSERT INTO api_keys (tenant, prefix, key_hash, created_at) VALUES (%s, %s, %s, now())",
                [(TENANT, key[:11], hashlib.sha256(key.encode()).digest()) for key in keys],
            )
            ready = connection.execute(
                "UPDATE endpoints SET health = 'READY', passes = 3, first_ready_at = now(), confirmed_at = now()"
            )
            assert ready.rowcount == sum(map(len, models.values()))
        return self._set_limits()

    def _set_limits(self) -> list[str]:
        help_text = self._run("tenants", "set", "--help")
        known = set(re.findall(r"--([a-z-]+)", help_text.stdout)) if help_text.returncode == 0 else set()
        chosen = {name: limit for name, limit in _LIMITS.items() if name in known}
        if chosen:
            options = [word for name, limit in chosen.items() for word in (f"--{name}", str(limit))]
            self.command("tenants", "set", TENANT, *options)
        return list(chosen)

    def serve(self, port: int, core: int | None = None) -> Process:
        return Process(
            [*self._python(), "serve", "--role", "proxy"],
            self.directory / "controlplane.log",
            core=core,
            environment={**self._environment(), "CONTROLPLANE_PROXY__PORT": str(port)},
            directory=self.root,
        )

    def _run(self, *arguments: str, stdin: str | None = None) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*self._python(), *arguments],
            env=self._environment(),
            cwd=self.root,
            input=stdin,
            capture_output=True,
            text=True,
            check=False,
        )

    def _python(self) -> list[str]:
        own = self.root / ".venv" / "bin" / "python"
        if self.root != HERE and not own.exists():
            raise BenchmarkFailed(f"{self.root} has no .venv; `make setup` makes one there")
        return [sys.executable if self.root == HERE else str(own), "-m", "controlplane.cli"]

    def _environment(self) -> dict[str, str]:
        return {"PATH": SYSTEM_PATH, "LC_ALL": "C.UTF-8", "COLUMNS": "200", "DATABASE_URL": self.database_url}


@dataclass(frozen=True, slots=True)
class Proxy:
    """Our proxy, ready."""

    site: Site
    process: Process
    port: int
    keys: Path
    limits: list[str]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"


@contextmanager
def our_proxy(
    directory: Path,
    models: Mapping[str, Sequence[int]],
    keys: Sequence[str],
    *,
    core: int | None = None,
    root: Path = HERE,
    max_in_flight: Mapping[str, int] | None = None,
) -> Iterator[Proxy]:
    """Start all of it in the directory, which other users must be able to enter.

    `models` says on which ports each is served; `max_in_flight` how many requests each of these takes at once, where
    that shall be few.
    """
    with PrivatePostgres(directory / "postgres", is_durable=False) as postgres:
        site = Site(root.resolve(), directory, postgres.create_database("bench"))
        limits = site.prepare(models, keys, max_in_flight or {})
        key_file = directory / "keys.txt"
        key_file.write_text("".join(f"{key}\n" for key in keys))
        [port] = free_ports(1)
        with running(site.serve(port, core)) as process:
            process.wait_listening(port)
            process.wait_until(lambda: _is_ready(port), "is ready")
            yield Proxy(site, process, port, key_file, limits)


def _is_ready(port: int) -> bool:
    answer = httpx.get(f"http://127.0.0.1:{port}/ready", trust_env=False)
    return answer.status_code == 200 and answer.json()["status"] == "ready"
