"""Targets for Prometheus, health, readiness and metrics, read from a real PostgreSQL."""

from __future__ import annotations

from collections.abc import AsyncIterator
from datetime import timedelta

import pytest
from prometheus_client.parser import text_string_to_metric_families

from controlplane.clock import utc_now
from controlplane.core.types import ExternalEndpoint, HandOver, JobState, Phase, ReplicaSetSpec, SlurmResources
from controlplane.db import Database, DatabaseOptions, directory, endpoints, keys, leases, replica_sets, tenants, usage
from controlplane.db.endpoints import Target
from controlplane.web import Part, PartStatus
from controlplane.web.service_discovery import target_group
from tests.integration.db_rows import NOW, make_ready, make_replica, make_set, observe, opened
from tests.integration.web_rig import WebRig


@pytest.fixture
async def rig(database_url: str) -> AsyncIterator[WebRig]:
    async with opened(database_url) as db:
        yield WebRig(db)


async def scraped(rig: WebRig) -> dict[tuple[str, tuple[str, ...]], float]:
    """Values by the metric's name and its labels' values, in the order of the labels' names."""
    answer = await rig.ask("GET", "/metrics", headers={})
    assert answer.status_code == 200
    assert answer.headers["content-type"].startswith("text/plain")
    return {
        (sample.name, tuple(value for _, value in sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(answer.text)
        for sample in family.samples
    }


async def test_a_replica_serves_the_model_it_was_started_for_whatever_its_set_is_to_serve_now(rig: WebRig) -> None:
    replica = await make_replica(rig.db, await make_set(rig.db), Phase.RUNNING)
    await make_ready(rig.db, replica, "http://n1:20000")
    await make_set(rig.db, model="renamed")
    assert [one.model for one in await endpoints.load_routable(rig.db)] == ["m"]
    assert [one.model for one in await endpoints.load_live(rig.db)] == ["m"]
    assert [(one.model, one.routable) for one in (await directory.read(rig.db, utc_now())).models] == [("renamed", 0)]


async def test_a_replica_is_probed_as_it_was_started_to_be_whatever_its_set_says_now(rig: WebRig) -> None:
    replica = await make_replica(rig.db, await make_set(rig.db), Phase.RUNNING)
    await make_ready(rig.db, replica, "http://n1:20000")
    await make_set(rig.db, probe="embedding")
    assert [one.probe for one in await endpoints.load_live(rig.db)] == ["completion"]


async def test_prometheus_is_given_every_live_endpoint_with_its_labels(rig: WebRig) -> None:
    replica = await make_replica(rig.db, await make_set(rig.db), Phase.RUNNING)
    await make_ready(rig.db, replica, "http://n1:20000")
    box = ReplicaSetSpec("box", "gemma", endpoints=(ExternalEndpoint("https://[fd00::1]", "k"),))
    await replica_sets.apply(rig.db, box, actor="ann", now=NOW)
    answer = await rig.ask("GET", "/sd/prometheus", headers={})
    assert answer.json() == [
        {
            "targets": ["n1:20000"],
            "labels": {
                "model": "m",
                "replica_set": "a",
                "replica": replica.name,
                "node": "n1",
                "slurm_job_id": str(replica.slurm_job_id),
            },
        },
        {
            "targets": ["[fd00::1]:443"],
            "labels": {
                "model": "gemma",
                "replica_set": "box",
                "replica": "",
                "node": "",
                "slurm_job_id": "",
                "__scheme__": "https",
            },
        },
    ]


@pytest.mark.parametrize(
    ("url", "target"),
    [("http://h", "h:80"), ("http://10.0.0.1:8000", "10.0.0.1:8000"), ("https://h:8443", "h:8443")],
)
def test_a_target_always_has_its_port(url: str, target: str) -> None:
    assert target_group(Target(url, "m", "a", "", "", None))["targets"] == [target]


async def test_metrics_tell_what_the_database_knows_at_the_scrape(rig: WebRig) -> None:
    a = await make_set(rig.db)
    running = await make_replica(rig.db, a, Phase.RUNNING)
    queued = [await make_replica(rig.db, a, Phase.QUEUED) for _ in range(2)]
    await make_replica(rig.db, a, Phase.ENDED)
    await make_ready(rig.db, running, "http://n1:20000")
    await observe(rig.db, queued[0], JobState.PENDING, state_reason="Resources")
    await observe(rig.db, queued[1], JobState.PENDING, state_reason="ReqNodeNotAvail, UnavailableNodes:n[1-9]")
    rig.metrics.alerts.labels("grafana", "accepted").inc(3)
    rig.now = NOW + timedelta(seconds=90)
    found = await scraped(rig)
    expected = {
        ("controlplane_replicas", ("RUNNING", "a")): 1,
        ("controlplane_replicas", ("QUEUED", "a")): 2,
        ("controlplane_replicas", ("PENDING", "a")): 0,
        ("controlplane_replicas_desired", ("m", "a")): 4,
        ("controlplane_replicas_routable", ("m", "a")): 1,
        ("controlplane_endpoint_last_confirmed_age_seconds", (running.name,)): 90,
        ("controlplane_slurm_job_pending_seconds", ("Resources", "a")): 90,
        ("controlplane_slurm_job_pending_seconds", ("ReqNodeNotAvail", "a")): 90,
        ("controlplane_alerts_total", ("accepted", "grafana")): 3,
        ("controlplane_database_up", ()): 1,
    }
    assert {key: found.get(key) for key in expected} == expected
    assert ("controlplane_replicas", ("ENDED", "a")) not in found


async def test_an_endpoint_that_serves_within_the_margin_of_its_walltimes_end_is_a_late_hand_over(rig: WebRig) -> None:
    a = await make_set(rig.db, hand_over=HandOver(margin_seconds=60))
    for number, left in enumerate((30, 90)):
        replica = await make_replica(rig.db, a, Phase.RUNNING)
        await make_ready(rig.db, replica, f"http://n{number}:20000", ends_at=NOW + timedelta(seconds=600 + left))
    rig.now = NOW + timedelta(seconds=600)
    assert (await scraped(rig))["controlplane_hand_over_late", ("a",)] == 1


async def test_metrics_tell_what_jobs_hold_and_for_how_long_they_may(rig: WebRig) -> None:
    a = await make_set(rig.db, slurm=SlurmResources(time_limit_seconds=3600, nodes=2, gpus_per_node=4))
    await make_set(rig.db, "b", model="other")
    running, draining = [await make_replica(rig.db, a, phase) for phase in (Phase.RUNNING, Phase.DRAINING)]
    await make_set(rig.db, model="renamed", slurm=a.spec.slurm)
    ends_at = NOW + timedelta(seconds=600)
    for one in (running, draining):
        await observe(rig.db, one, JobState.RUNNING, started_at=NOW, ends_at=ends_at)
    waiting = await make_replica(rig.db, await replica_sets.load(rig.db, "b"), Phase.QUEUED)
    await observe(rig.db, waiting, JobState.PENDING)
    rig.now = NOW + timedelta(seconds=90)
    found = await scraped(rig)
    held = {labels: value for (name, labels), value in found.items() if name == "controlplane_gpus_held"}
    assert held == {("m", "a"): 16, ("renamed", "a"): 0, ("other", "b"): 0}
    left = {labels: value for (name, labels), value in found.items() if name.startswith("controlplane_replica_wall")}
    assert left == {(running.name, "a"): 510, (draining.name, "a"): 510}
    rig.now = ends_at + timedelta(seconds=5)
    assert (await scraped(rig))["controlplane_replica_walltime_left_seconds", (running.name, "a")] == 0
    await observe(rig.db, running, JobState.COMPLETED, started_at=NOW, ends_at=ends_at)
    assert (await scraped(rig))["controlplane_gpus_held", ("m", "a")] == 8


async def test_metrics_tell_what_tenants_used_of_their_month(rig: WebRig) -> None:
    for tenant in ("lab", "guests"):
        await keys.create(rig.db, tenant, models=None, expires_at=None, actor="ann", now=NOW)
    await tenants.set_limits(rig.db, "lab", {"monthly_tokens": 500}, actor="ann", now=NOW)
    row = usage.Row(NOW.date(), "lab", "m", 0, None, 1, 0, 70, 30, 20)
    assert await usage.store(rig.db, "w", 1, [row])
    found = await scraped(rig)
    tokens = {labels: value for (name, labels), value in found.items() if name == "controlplane_tenant_tokens"}
    assert tokens == {("used", "lab"): 100, ("budget", "lab"): 500, ("used", "guests"): 0}
    rig.now = NOW + timedelta(days=31)
    assert (await scraped(rig))["controlplane_tenant_tokens", ("used", "lab")] == 0


async def test_metrics_tell_which_sets_are_paused(rig: WebRig) -> None:
    for name in ("a", "b"):
        await make_set(rig.db, name)
    await replica_sets.pause(rig.db, "b", actor="ann", now=NOW)
    found = await scraped(rig)
    assert (found["controlplane_paused", ("a",)], found["controlplane_paused", ("b",)]) == (0, 1)


async def test_a_set_scaled_to_zero_is_there_with_zeros(rig: WebRig) -> None:
    await make_set(rig.db)
    found = await scraped(rig)
    assert found["controlplane_replicas_routable", ("m", "a")] == 0
    assert sum(value for (name, _), value in found.items() if name == "controlplane_replicas") == 0


async def test_a_prometheus_that_asks_for_openmetrics_gets_one_document(rig: WebRig) -> None:
    answer = await rig.ask("GET", "/metrics", headers={"Accept": "application/openmetrics-text; version=1.0.0"})
    assert answer.headers["content-type"].startswith("application/openmetrics-text")
    assert answer.text.count("# EOF") == 1
    assert answer.text.endswith("# EOF\n")


async def test_ready_names_each_part_and_a_degraded_one_is_not_unready(rig: WebRig) -> None:
    answer = await rig.ask("GET", "/ready", headers={})
    assert (answer.status_code, answer.json()["status"]) == (200, "degraded")
    assert answer.json()["parts"]["lease"]["remedy"]
    await leases.acquire(rig.db, "reconcile", "host-1", timedelta(minutes=10))
    answer = await rig.ask("GET", "/ready", headers={})
    assert (answer.status_code, answer.json()["status"]) == (200, "ready")
    assert answer.json()["parts"]["lease"]["message"] == "reconcile: host-1, term 1"
    rig.slurm = Part(PartStatus.DEGRADED, "slurmrestd does not answer", "see that it runs")
    answer = await rig.ask("GET", "/ready", headers={})
    assert (answer.status_code, answer.json()["status"]) == (200, "degraded")
    assert answer.json()["parts"]["slurm"]["remedy"] == "see that it runs"


async def test_a_database_of_another_schema_is_unready_and_says_what_to_run(rig: WebRig) -> None:
    async with rig.db.connection() as connection:
        await connection.execute("DELETE FROM _yoyo_migration")
    answer = await rig.ask("GET", "/ready", headers={})
    assert (answer.status_code, answer.json()["status"]) == (503, "unready")
    assert "controlplane migrate" in answer.json()["parts"]["schema"]["remedy"]


async def test_without_postgresql_the_process_is_alive_unready_and_still_scraped(free_port: int) -> None:
    url = f"postgresql://user:password@127.0.0.1:{free_port}/x"
    async with Database(DatabaseOptions(url=url, timeout_seconds=0.2)) as db:
        rig = WebRig(db)
        assert (await rig.ask("GET", "/health", headers={})).json() == {"status": "ok"}
        answer = await rig.ask("GET", "/ready", headers={})
        assert (answer.status_code, answer.json()["status"]) == (503, "unready")
        assert "DATABASE_URL" in answer.json()["parts"]["database"]["remedy"]
        assert "password" not in answer.text
        assert (await rig.ask("GET", "/sd/prometheus", headers={})).status_code == 503
        found = await scraped(rig)
        assert found["controlplane_database_up", ()] == 0
        assert not any(name == "controlplane_replicas" for name, _ in found)
