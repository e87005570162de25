"""The reconciler on a real Slurm: it makes jobs follow what is desired, and survives what goes wrong on the way."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from datetime import timedelta

import httpx

from controlplane.clock import utc_now
from controlplane.core.planning import PlanRules
from controlplane.core.types import Phase, Reason, SlurmResources, VllmOptions
from controlplane.db import endpoints, replica_sets, replicas
from controlplane.demo.slurm_cluster import SlurmCluster
from controlplane.slurm.wire import JobRequest
from tests.conftest import eventually
from tests.e2e.reconciling import SPEC, reconciling
from tests.e2e.relay import Relay


async def test_jobs_follow_the_desired_count_up_and_down(slurm: SlurmCluster, database_url: str) -> None:
    async with reconciling(slurm, database_url) as site:
        await site.scale(3)
        await site.until_routable(3)
        assert list(site.jobs().values()) == ["RUNNING"] * 3
        await site.scale(1)
        await site.until_routable(1)
        [survivor] = await site.live()
        await eventually(lambda: list(site.jobs()) == [str(survivor.slurm_job_id)], timeout_seconds=20)
        await site.scale(0)
        await site.until_routable(0)
        await eventually(lambda: not site.jobs(), timeout_seconds=20)
        steps = await replicas.load_history(site.db)
    # every way out went through a drain, and says why
    assert {step.reason for step in steps if step.to_phase is Phase.ENDED} == {Reason.SCALED_DOWN}
    assert {step.from_phase for step in steps if step.to_phase is Phase.STOPPING} == {Phase.DRAINING}


async def test_lost_submit_answer_adopts_the_job_instead_of_submitting_again(
    slurm: SlurmCluster, database_url: str
) -> None:
    async with Relay(slurm.url) as relay:
        relay.lose_answer_to(b"/job/submit")
        async with reconciling(slurm, database_url, url=relay.url) as site:
            await site.scale(1)
            await site.until_routable(1)
            assert relay.lost == 1
            assert len(site.jobs()) == 1
            [replica] = await site.live()
            assert str(replica.slurm_job_id) in site.jobs()
            adopted = [step for step in await replicas.load_history(site.db) if step.to_phase is Phase.QUEUED]
            assert [step.message for step in adopted] == ["found by name and adopted"]


async def test_a_submit_that_made_no_job_is_sent_again_once_it_cannot_act_any_more(
    slurm: SlurmCluster, database_url: str
) -> None:
    async with Relay(slurm.url) as relay:
        relay.swallow(b"/job/submit")
        spec = replace(SPEC, min_replicas=1)
        async with reconciling(slurm, database_url, url=relay.url, spec=spec, submit_grace_seconds=3) as site:
            await site.until_routable(1)
            assert len(site.jobs()) == 1
            phases = [step.to_phase for step in await replicas.load_history(site.db)]
            assert phases[:4] == [Phase.PENDING, Phase.SUBMITTING, Phase.PENDING, Phase.SUBMITTING]


async def test_a_crashed_engine_is_replaced_though_its_job_ends_with_exit_code_zero_inside(
    slurm: SlurmCluster, database_url: str
) -> None:
    async with reconciling(slurm, database_url, spec=replace(SPEC, min_replicas=1)) as site:
        await site.until_routable(1)
        [first] = await site.live()
        [endpoint] = await endpoints.load_routable(site.db)
        headers = {"Authorization": f"Bearer {endpoint.api_key}"}
        async with httpx.AsyncClient() as http:
            await http.post(f"{endpoint.url}/fault", json={"kind": "crash"}, headers=headers)
        ended = await site.until_ended(first.name)
        assert ended.reason is Reason.CRASHED
        await site.until_routable(1)
        [second] = await site.live()
        assert second.name != first.name


async def test_a_job_cancelled_by_somebody_else_is_replaced(slurm: SlurmCluster, database_url: str) -> None:
    async with reconciling(slurm, database_url, spec=replace(SPEC, min_replicas=1)) as site:
        await site.until_routable(1)
        [first] = await site.live()
        slurm.run("scancel", str(first.slurm_job_id))
        assert (await site.until_ended(first.name)).reason is Reason.CANCELLED_OUTSIDE
        await site.until_routable(1)


async def test_a_frozen_engine_leaves_rotation_though_its_health_route_answers(
    slurm: SlurmCluster, database_url: str
) -> None:
    async with reconciling(slurm, database_url, spec=replace(SPEC, min_replicas=1), token_timeout_seconds=1) as site:
        await site.until_routable(1)
        [endpoint] = await endpoints.load_routable(site.db)
        headers = {"Authorization": f"Bearer {endpoint.api_key}"}
        async with httpx.AsyncClient() as http:
            await http.post(f"{endpoint.url}/fault", json={"kind": "freeze"}, headers=headers)
            await site.until_out_of_rotation()
            assert (await http.get(f"{endpoint.url}/health")).status_code == 200
            await http.post(f"{endpoint.url}/fault", json={"kind": "heal"}, headers=headers)
        await site.until_routable(1)


async def test_a_replica_that_never_gets_ready_is_stopped_and_says_why(slurm: SlurmCluster, database_url: str) -> None:
    spec = replace(SPEC, min_replicas=1, start_timeout_seconds=2, vllm=VllmOptions(load_seconds=60))
    async with reconciling(slurm, database_url, spec=spec) as site:
        [first] = await eventually(site.live)
        ended = await site.until_ended(first.name)
        assert ended.reason is Reason.START_TIMEOUT
        steps = await replicas.load_history(site.db, name=first.name)
        said = " ".join(step.message or "" for step in steps)
        assert "not ready 2 s after it was first looked at" in said


async def test_a_start_that_failed_is_not_tried_again_before_its_pause(slurm: SlurmCluster, database_url: str) -> None:
    broken = replace(SPEC, min_replicas=1, vllm=VllmOptions(args=("--no-such-option",)))
    async with reconciling(slurm, database_url, spec=broken) as site:
        first, *_ = await eventually(lambda: replicas.load_newest(site.db))
        ended = await site.until_ended(first.name)
        assert ended.reason is Reason.CRASHED

        async def is_second() -> bool:
            return len(await replicas.load_newest(site.db)) == 2

        await eventually(is_second, timeout_seconds=30)
        second, _ = await replicas.load_newest(site.db)
        assert second.created_at - ended.phase_since >= PlanRules().first_back_off


async def test_what_slurm_refuses_ends_rejected_with_its_words(slurm: SlurmCluster, database_url: str) -> None:
    spec = replace(SPEC, min_replicas=1, slurm=SlurmResources(time_limit_seconds=600, partition="nowhere"))
    async with reconciling(slurm, database_url, spec=spec) as site:
        first, *_ = await eventually(lambda: replicas.load_newest(site.db))
        ended = await site.until_ended(first.name)
        assert ended.reason is Reason.REJECTED
        assert ended.message is not None
        assert "partition" in ended.message.lower()


async def test_a_changed_template_rolls_replicas_without_a_moment_of_less(
    slurm: SlurmCluster, database_url: str
) -> None:
    async with reconciling(slurm, database_url, spec=replace(SPEC, min_replicas=2)) as site:
        await site.until_routable(2)
        before = {replica.name for replica in await site.live()}
        changed = replace(SPEC, min_replicas=2, vllm=VllmOptions(args=("--tokens-per-second", "60")))
        await replica_sets.apply(site.db, changed, actor="test", now=utc_now())

        fewest = 2
        async with asyncio.timeout(120):
            while before & {replica.name for replica in await site.live()} or len(await site.live()) != 2:
                fewest = min(fewest, len(await endpoints.load_routable(site.db)))
        assert fewest == 2


async def test_an_orphan_is_cancelled_after_its_grace_and_anothers_job_never(
    slurm: SlurmCluster, database_url: str
) -> None:
    async with reconciling(slurm, database_url, orphan_grace=timedelta(seconds=1)) as site:
        orphan = await site.client.submit(_bare_job(f"cp-{SPEC.name}-990", site.instance_id, slurm))
        other = await site.client.submit(_bare_job(f"cp-{SPEC.name}-1", "0" * 32, slurm))
        await eventually(lambda: str(orphan.job_id) not in site.jobs(), timeout_seconds=20)
        await site.scale(1)  # the first replica here has the name of the other installation's
        await site.until_routable(1)
        [replica] = await site.live()
        assert replica.name == f"cp-{SPEC.name}-1"
        assert replica.slurm_job_id != other.job_id
        assert str(other.job_id) in site.jobs()


async def test_while_slurm_is_away_nothing_is_lost_and_work_goes_on_when_it_is_back(
    slurm: SlurmCluster, database_url: str
) -> None:
    async with reconciling(slurm, database_url, spec=replace(SPEC, min_replicas=1)) as site:
        await site.until_routable(1)
        [first] = await site.live()
        slurm.kill("slurmrestd")
        try:
            await site.scale(2)

            async def intended() -> bool:
                return [replica.phase for replica in await site.live()] == [Phase.RUNNING, Phase.PENDING]

            await eventually(intended, timeout_seconds=20)
            assert len(await endpoints.load_routable(site.db)) == 1
        finally:
            slurm.restart("slurmrestd")
        await site.until_routable(2)
        assert first.name in {replica.name for replica in await site.live()}


def _bare_job(name: str, instance_id: str, slurm: SlurmCluster) -> JobRequest:
    return JobRequest(
        name=name,
        comment=f"{name} {instance_id}",
        script="#!/bin/sh\nsleep 60\n",
        environment={"PATH": "/usr/bin:/bin"},
        working_directory=str(slurm.jobs_directory),
        standard_output=f"{slurm.jobs_directory}/{name}-%j.out",
        resources=SlurmResources(time_limit_seconds=60),
    )
