"""Offers webhook posts to a real control plane on a durable PostgreSQL, and compares what was accepted with the rows.

`make bench-webhooks`, or `python -m tests.benchmarks.webhooks --help`. slurmrestd is down; the load is another process.
The exit code is not 0 if anything that was answered 202 is not in the database as often as it was accepted.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from statistics import quantiles
from typing import Any

from controlplane.core.times import parse_time
from controlplane.core.types import ReplicaSetSpec, SlurmResources
from controlplane.db import Database, DatabaseOptions, migrate, replica_sets
from controlplane.demo.children import free_ports
from controlplane.demo.postgres import PrivatePostgres
from tests.integration.test_serve import Serve, serving, until_ready

SECRET = "benchmark-secret"
FIXTURE = Path(__file__).parents[1] / "fixtures" / "grafana" / "grafana-firing.raw"
MODELS = [f"model-{number}" for number in range(20)]
BEGAN = datetime(2026, 1, 1, tzinfo=UTC)

Key = tuple[str, datetime, str]  # fingerprint, start, status: a delivery without its source and organization


def bodies(count: int, alerts: int, rng: random.Random) -> list[dict[str, Any]]:
    """Posts of one alert, and each tenth of five.

    Most repeat an alert that is known; one in ten resolves it, and it begins anew with its next post.
    """
    template = json.loads(FIXTURE.read_bytes())
    episodes = [0] * alerts
    posts = []
    for number in range(count):
        told = []
        for which in rng.sample(range(alerts), 5 if number % 10 == 0 else 1):
            is_firing = rng.random() > 0.1
            starts_at = BEGAN + timedelta(seconds=60 * episodes[which])
            alert = {**template["alerts"][0], "fingerprint": f"{which:016x}", "startsAt": _text(starts_at)}
            alert["labels"] = {
                **alert["labels"],
                "owner": "controlplane",
                "action": "scale_up",
                "model": MODELS[which % len(MODELS)],
            }
            alert["values"] = {"A": number, "B": number, "C": 1}  # a refreshed value, as with every real repeat
            if not is_firing:
                alert |= {"status": "resolved", "endsAt": _text(starts_at + timedelta(seconds=30))}
                episodes[which] += 1
            told.append(alert)
        posts.append({**template, "alerts": told})
    return posts


def _text(time: datetime) -> str:
    return time.isoformat().replace("+00:00", "Z")


def keys(post: dict[str, Any]) -> list[Key]:
    return [(one["fingerprint"], parse_time(one["startsAt"]), one["status"]) for one in post["alerts"]]


async def prepare(url: str) -> None:
    async with Database(DatabaseOptions(url)) as db:
        for model in MODELS:
            spec = ReplicaSetSpec(model, model, max_replicas=4, slurm=SlurmResources(time_limit_seconds=3600))
            await replica_sets.apply(db, spec, actor="benchmark", now=datetime.now(UTC))


async def stored(url: str) -> tuple[Counter[Key], dict[str, str]]:
    """How often each delivery is in the database, and the status of each alert."""
    async with Database(DatabaseOptions(url)) as db, db.connection() as connection:
        cursor = await connection.execute("SELECT fingerprint, starts_at, status, deliveries FROM alert_deliveries")
        deliveries = {(r["fingerprint"], r["starts_at"], r["status"]): r["deliveries"] for r in await cursor.fetchall()}
        cursor = await connection.execute("SELECT fingerprint, status FROM alerts")
        return Counter(deliveries), {row["fingerprint"]: row["status"] for row in await cursor.fetchall()}


def offer(serve: Serve, posts: Sequence[dict[str, Any]], directory: Path, *arguments: str) -> dict[str, Any]:
    """Let the load process offer the posts; returns what it tells."""
    lines = directory / "bodies"
    lines.write_bytes(b"\n".join(json.dumps(post).encode() for post in posts))
    command = [sys.executable, "-m", "tests.benchmarks.posts", str(lines)]
    command += ["--port", str(serve.web_port), "--secret", SECRET, *arguments]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True)
    told: dict[str, Any] = json.loads(done.stdout)
    return told


def run(options: argparse.Namespace, directory: Path) -> int:
    posts = bodies(int(options.rate * options.seconds), options.alerts, random.Random(options.seed))
    [nobody] = free_ports(1)
    settings = {
        "CONTROLPLANE_WEBHOOK__HMAC_SECRETS": SECRET,
        "CONTROLPLANE_WEBHOOK__HMAC_TIMESTAMP_HEADER": "X-Grafana-Alerting-Timestamp",
        "CONTROLPLANE_SLURM__URL": f"http://127.0.0.1:{nobody}",
        "CONTROLPLANE_SLURM__USER_NAME": "vllm",
        "CONTROLPLANE_SLURM__TOKEN": "not-a-jwt",
        "CONTROLPLANE_SLURM__JOB_DIRECTORY": str(directory),
    }
    arguments = ["--rate", str(options.rate), "--connections", str(options.connections)]
    arguments += ["--fresh-connections"] if options.fresh_connections else []
    with PrivatePostgres(directory / "postgres") as postgres:
        url = postgres.create_database("benchmark")
        migrate(url)
        asyncio.run(prepare(url))
        with serving(directory, url, "--role", "control", **settings) as serve:
            until_ready(serve, serve.web)
            began = time.perf_counter()
            told = offer(serve, posts, directory, *arguments)
            whole = time.perf_counter() - began
            serve.process.send_signal(signal.SIGTERM)
            serve.wait()
        found, levels = asyncio.run(stored(url))
    return report(posts, told, found, levels, whole)


def report(
    posts: Sequence[dict[str, Any]], told: dict[str, Any], found: Counter[Key], levels: dict[str, str], whole: float
) -> int:
    accepted = Counter(key for number in told["accepted"] for key in keys(posts[number]))
    missing = sum((accepted - found).values())
    without_level = {fingerprint for fingerprint, _, _ in accepted} - levels.keys()
    refused = {status: count for status, count in sorted(told["statuses"].items()) if status != "202"}
    cuts = quantiles((1e3 * seconds for seconds in told["seconds"]), n=1000)
    cpu = resource.getrusage(resource.RUSAGE_CHILDREN)
    print(f"offered    {len(posts)} posts in {told['took']:.2f} s: {len(posts) / told['took']:.0f} a second")
    print(f"accepted   {len(told['accepted'])} (202), with {accepted.total()} alerts")
    print(f"refused    {refused or 'none'}")
    slowest = 1e3 * max(told["seconds"])
    print(f"answer     p50 {cuts[499]:.1f} ms, p99 {cuts[989]:.1f} ms, slowest {slowest:.1f} ms")
    print(f"stored     {found.total()} alerts in {len(found)} rows; {len(levels)} levels")
    print(f"missing    {missing} accepted alerts, {len(without_level)} levels")
    print(f"processor  {cpu.ru_utime + cpu.ru_stime:.1f} s of all processes, in {whole:.1f} s")
    return 1 if missing or without_level else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rate", type=float, default=1000, help="posts a second")
    parser.add_argument("--seconds", type=float, default=10)
    parser.add_argument("--alerts", type=int, default=2000, help="different alerts")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--connections", type=int, default=512, help="that the load opens at most")
    parser.add_argument("--fresh-connections", action="store_true", help="one for each post, as Grafana does")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="controlplane-benchmark-") as name:
        directory = Path(name)
        directory.chmod(0o755)  # PostgreSQL runs as another user
        return run(options, directory)


if __name__ == "__main__":
    sys.exit(main())
