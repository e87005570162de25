"""The client on a real slurmrestd, over TCP with tokens and over its unix socket without."""

from __future__ import annotations

from collections.abc import AsyncIterator
from datetime import timedelta
from pathlib import Path

import pytest

from controlplane.clock import utc_now
from controlplane.core.types import JobState, SlurmJob, SlurmResources
from controlplane.demo.slurm_cluster import SlurmCluster
from controlplane.slurm.client import SlurmClient, SlurmOptions
from controlplane.slurm.errors import SlurmForbidden, SlurmRejected
from controlplane.slurm.tokens import MintedToken, StaticToken, TokenCommand, TokenFile, TokenSource
from controlplane.slurm.wire import JobRequest
from tests.conftest import eventually

NAME = "cp-client-1"
SCRIPT = '#!/bin/bash\necho "A=$A GPUS=$CUDA_VISIBLE_DEVICES"\nexec sleep 60\n'


@pytest.fixture(params=["tcp", "socket"])
async def client(request: pytest.FixtureRequest, slurm: SlurmCluster) -> AsyncIterator[SlurmClient]:
    over_tcp = SlurmOptions(slurm.url, slurm.user_name, MintedToken(slurm.jwt_key_file, slurm.user_name))
    over_socket = SlurmOptions(f"unix:{slurm.socket_path}", slurm.user_name)
    async with SlurmClient(over_tcp if request.param == "tcp" else over_socket) as client:
        yield client


def job_request(slurm: SlurmCluster, partition: str | None = None, *, gpus_per_node: int = 2) -> JobRequest:
    return JobRequest(
        name=NAME,
        comment=f"{NAME} {'0' * 32}",
        script=SCRIPT,
        environment={"PATH": "/usr/bin:/bin", "A": "b 'c' $d"},
        working_directory=str(slurm.jobs_directory),
        standard_output=f"{slurm.jobs_directory}/client-%j.out",
        resources=SlurmResources(time_limit_seconds=90, gpus_per_node=gpus_per_node, partition=partition),
    )


async def test_a_held_job_is_listed_released_and_cancelled_by_its_owner_only(
    client: SlurmClient, slurm: SlurmCluster
) -> None:
    submitted = await client.submit(job_request(slurm))

    async def job() -> SlurmJob:
        [found] = [one for one in (await client.list_jobs(utc_now())).jobs if one.job_id == submitted.job_id]
        return found

    held = await job()
    assert (held.name, held.user_name, held.comment) == (NAME, slurm.user_name, f"{NAME} {'0' * 32}")
    assert held.is_held
    assert await client.release(submitted.job_id, name=NAME)
    assert await client.release(submitted.job_id, name=NAME), "repeating is harmless"

    async def is_running() -> bool:
        return (await job()).state is JobState.RUNNING

    await eventually(is_running, timeout_seconds=20)
    assert await client.node_address((await job()).batch_host) == "127.0.0.1"
    output = slurm.jobs_directory / f"client-{submitted.job_id}.out"
    assert await eventually(lambda: output.exists() and output.read_text()) == "A=b 'c' $d GPUS=0,1\n"

    assert not await client.cancel(submitted.job_id, name="cp-client-2"), "not that job"
    assert not await client.cancel(submitted.job_id + 1000, name=NAME), "no such job"
    assert (await job()).state is JobState.RUNNING
    assert await client.cancel(submitted.job_id, name=NAME)

    async def is_over() -> bool:
        return (await job()).is_over

    await eventually(is_over, timeout_seconds=30)
    assert not await client.cancel(submitted.job_id, name=NAME), "it is over"


@pytest.mark.parametrize("client", ["socket"], indirect=True)  # Slurm takes half a minute to estimate
async def test_a_job_that_waits_for_others_to_end_has_slurms_estimate_of_its_start(
    client: SlurmClient, slurm: SlurmCluster
) -> None:
    submitted = [(await client.submit(job_request(slurm, gpus_per_node=8))).job_id for _ in range(5)]
    assert (await _jobs(client))[submitted[-1]].started_at is None, "held: no estimate"
    for job_id in submitted:
        await client.release(job_id, name=NAME)

    async def estimated() -> SlurmJob | None:
        waiting = [one for one in (await _jobs(client)).values() if one.state is JobState.PENDING]
        return waiting[0] if len(waiting) == 1 and waiting[0].started_at is not None else None

    job = await eventually(estimated, timeout_seconds=60)
    ends = [one.ends_at for one in (await _jobs(client)).values() if one.state is JobState.RUNNING]
    assert job.started_at is not None
    assert job.started_at > utc_now()
    assert min(one for one in ends if one) <= job.started_at + timedelta(seconds=1)
    for job_id in submitted:
        await client.cancel(job_id, name=NAME)

    async def are_over() -> bool:
        return all(one.is_over for one in (await _jobs(client)).values())

    await eventually(are_over, timeout_seconds=30)


async def _jobs(client: SlurmClient) -> dict[int, SlurmJob]:
    return {one.job_id: one for one in (await client.list_jobs(utc_now())).jobs}


async def test_what_slurm_refuses_is_told_apart(client: SlurmClient, slurm: SlurmCluster) -> None:
    with pytest.raises(SlurmRejected, match="partition"):
        await client.submit(job_request(slurm, partition="nowhere"))
    assert await client.get_job(999_999) is None


@pytest.mark.parametrize("way", ["value", "file", "command"])
async def test_every_way_to_a_token_opens_the_door(slurm: SlurmCluster, tmp_path: Path, way: str) -> None:
    token = await MintedToken(slurm.jwt_key_file, slurm.user_name).read(utc_now())
    path = tmp_path / "token"
    path.write_text(token + "\n")
    sources: dict[str, TokenSource] = {
        "value": StaticToken(token),
        "file": TokenFile(path),
        "command": TokenCommand(("cat", str(path))),
    }
    async with SlurmClient(SlurmOptions(slurm.url, slurm.user_name, sources[way])) as client:
        ping = await client.ping()
    assert ping.token_expires_at is not None
    assert ping.token_expires_at > utc_now()


async def test_an_expired_token_is_forbidden_and_not_a_dead_controller(slurm: SlurmCluster) -> None:
    old = await MintedToken(slurm.jwt_key_file, slurm.user_name).read(utc_now() - timedelta(hours=1))
    async with SlurmClient(SlurmOptions(slurm.url, slurm.user_name, StaticToken(old))) as client:
        with pytest.raises(SlurmForbidden, match="expired"):
            await client.list_jobs(utc_now())
