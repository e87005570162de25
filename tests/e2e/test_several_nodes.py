"""A replica on two nodes of a real Slurm: it serves as one, and what becomes of one rank becomes of all of it.

All nodes are this machine, so that a test finds each rank among its processes, and ends it there.
"""

from __future__ import annotations

import asyncio
import os
import signal
from dataclasses import dataclass, replace
from pathlib import Path

import httpx
import pytest

from controlplane.clock import utc_now
from controlplane.core.types import Reason, Replica, SlurmResources
from controlplane.db import endpoints, nodes
from controlplane.demo.slurm_cluster import SlurmCluster
from controlplane.reconcile.job_logs import log_path
from tests.conftest import eventually
from tests.e2e.reconciling import SPEC, Reconciling, reconciling

TWO = replace(SPEC, slurm=SlurmResources(time_limit_seconds=600, nodes=2, gpus_per_node=2))
OUT_OF_ROTATION_SECONDS = 30.0  # what is promised for a replica that has lost a rank
GONE_SECONDS = 30.0


@dataclass(frozen=True, slots=True)
class Process:
    """One process of a job."""

    pid: int
    arguments: tuple[str, ...]
    environment: dict[str, str]

    @property
    def rank(self) -> int | None:
        """None: it is no server."""
        if "--node-rank" not in self.arguments:
            return None
        return int(self.arguments[self.arguments.index("--node-rank") + 1])


def processes_of(slurm: SlurmCluster, replica: Replica) -> list[Process]:
    """All that run for this replica's job, on whichever node."""
    found: list[Process] = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            arguments = tuple((folder / "cmdline").read_text().split("\0")[:-1])
            words = [word.partition("=") for word in (folder / "environ").read_text().split("\0")]
        except OSError:
            continue  # it has ended
        environment = {name: value for name, _, value in words}
        job_id, conf = environment.get("SLURM_JOB_ID"), environment.get("SLURM_CONF")
        if (job_id, conf) == (str(replica.slurm_job_id), str(slurm.conf_file)):
            found.append(Process(int(folder.name), arguments, environment))
    return found


def ranks_of(slurm: SlurmCluster, replica: Replica) -> dict[int, Process]:
    return {one.rank: one for one in processes_of(slurm, replica) if one.rank is not None}


def log_of(slurm: SlurmCluster, replica: Replica) -> str:
    return Path(log_path(slurm.jobs_directory, replica.name, replica.slurm_job_id or 0, SPEC.model)).read_text()


async def served(site: Reconciling, *, other_than: Replica | None = None) -> Replica:
    async def one() -> Replica | None:
        routable = {endpoint.replica for endpoint in await endpoints.load_routable(site.db)}
        live = [replica for replica in await site.live() if replica != other_than and replica.name in routable]
        return live[0] if live else None

    return await eventually(one, timeout_seconds=90)


async def until_gone(slurm: SlurmCluster, replica: Replica) -> None:
    await eventually(lambda: not processes_of(slurm, replica), timeout_seconds=GONE_SECONDS)


@pytest.fixture
def temporary(slurm: SlurmCluster) -> Path:
    """Where the ranks' working directories are."""
    folder = slurm.jobs_directory / "tmp"
    folder.mkdir(exist_ok=True)
    folder.chmod(0o1777)
    return folder


def in_folder(folder: Path) -> dict[str, str]:
    return {"TMPDIR": str(folder)}


def held_by(folder: Path) -> int:
    return len(list(folder.iterdir()))


async def test_a_replica_on_two_nodes_serves_as_one_and_leaves_nothing_when_it_is_drained(
    slurm: SlurmCluster, database_url: str, temporary: Path
) -> None:
    spec = replace(TWO, vllm=replace(TWO.vllm, environment=in_folder(temporary)))
    async with reconciling(slurm, database_url, spec=spec) as site:
        await site.scale(1)
        replica = await served(site)
        ranks = ranks_of(slurm, replica)
        assert sorted(ranks) == [0, 1]
        where = [ranks[rank].environment["SLURMD_NODENAME"] for rank in (0, 1)]
        assert where == slurm.run("scontrol", "show", "hostnames", await node_list(site, replica)).split()
        assert [ranks[rank].environment["CUDA_VISIBLE_DEVICES"] for rank in (0, 1)] == ["0,1", "0,1"]
        assert held_by(temporary) == 2

        [target] = await endpoints.load_targets(site.db)
        assert (target.url, target.node) == (f"http://127.0.0.1:{replica.port}", where[0]), "it is the leader's"
        assert all(replica.secret not in word for one in processes_of(slurm, replica) for word in one.arguments)
        async with asyncio.timeout(10), httpx.AsyncClient() as http:
            headers = {"Authorization": f"Bearer {replica.secret}"}
            body = {"model": SPEC.model, "prompt": "a", "max_tokens": 3}
            answer = await http.post(f"{target.url}/v1/completions", json=body, headers=headers)
        assert answer.status_code == 200

        await site.scale(0)
        ended = await site.until_ended(replica.name, timeout_seconds=60)
        assert (ended.reason, ended.cut_requests) == (Reason.SCALED_DOWN, None)
        await until_gone(slurm, replica)
        assert held_by(temporary) == 0


async def node_list(site: Reconciling, replica: Replica) -> str:
    job = await site.client.get_job(replica.slurm_job_id or 0)
    assert job is not None
    return job.nodes


@pytest.mark.parametrize("rank", [0, 1])
async def test_a_rank_that_is_killed_takes_the_whole_job_with_it_and_is_replaced(
    slurm: SlurmCluster, database_url: str, rank: int
) -> None:
    async with reconciling(slurm, database_url, spec=TWO) as site:
        await site.scale(1)
        replica = await served(site)
        os.kill(ranks_of(slurm, replica)[rank].pid, signal.SIGKILL)

        async def is_out() -> bool:
            return replica.name not in {one.replica for one in await endpoints.load_routable(site.db)}

        await eventually(is_out, timeout_seconds=OUT_OF_ROTATION_SECONDS)
        await until_gone(slurm, replica)
        ended = await site.until_ended(replica.name, timeout_seconds=60)
        assert ended.reason is Reason.CRASHED, "vLLM's leader exits with 0 when a follower is gone"
        successor = await served(site, other_than=replica)
        assert sorted(ranks_of(slurm, successor)) == [0, 1]
        if rank == 1:
            assert "rank 1 of 2 ended, with exit code 137" in log_of(slurm, replica)


async def test_a_follower_that_is_lost_ends_a_leader_that_does_not_notice(
    slurm: SlurmCluster, database_url: str
) -> None:
    async with reconciling(slurm, database_url, spec=TWO) as site:
        await site.scale(1)
        replica = await served(site)
        ranks = ranks_of(slurm, replica)
        os.kill(ranks[0].pid, signal.SIGSTOP)
        os.kill(ranks[1].pid, signal.SIGKILL)
        await until_gone(slurm, replica)
        assert (await site.until_ended(replica.name, timeout_seconds=60)).reason is Reason.CRASHED


async def test_a_cancel_from_outside_leaves_nothing_and_is_replaced(
    slurm: SlurmCluster, database_url: str, temporary: Path
) -> None:
    spec = replace(TWO, vllm=replace(TWO.vllm, environment=in_folder(temporary)))
    async with reconciling(slurm, database_url, spec=spec) as site:
        await site.scale(1)
        replica = await served(site)
        slurm.run("scancel", str(replica.slurm_job_id))
        assert (await site.until_ended(replica.name, timeout_seconds=60)).reason is Reason.CANCELLED_OUTSIDE
        await until_gone(slurm, replica)
        successor = await served(site, other_than=replica)
        assert held_by(temporary) == len(ranks_of(slurm, successor)) == 2


@pytest.mark.parametrize("flag", ["--batch", "--full"])
async def test_a_warning_lets_streams_end_before_any_rank_does(
    slurm: SlurmCluster, database_url: str, flag: str
) -> None:
    """Whether it reaches the batch shell alone or, as on old releases, every process of the job."""
    spec = replace(TWO, vllm=replace(TWO.vllm, args=("--tokens-per-second", "20")))
    async with reconciling(slurm, database_url, spec=spec) as site:
        await site.scale(1)
        replica = await served(site)
        url = (await endpoints.load_targets(site.db))[0].url
        body = {"model": SPEC.model, "prompt": "a", "max_tokens": 50, "ignore_eos": True, "stream": True}
        headers = {"Authorization": f"Bearer {replica.secret}"}
        async with (
            httpx.AsyncClient(timeout=30) as http,
            http.stream("POST", f"{url}/v1/completions", json=body, headers=headers) as answer,
        ):
            lines = answer.aiter_lines()
            first = await anext(lines)
            slurm.run("scancel", "--signal=USR1", flag, str(replica.slurm_job_id))
            events = [first, *[line async for line in lines]]
        assert [line for line in events if line][-1] == "data: [DONE]"
        assert not [line for line in events if "error" in line]
        await until_gone(slurm, replica)
        assert "replica: stopped as asked" in log_of(slurm, replica)


async def test_a_node_that_a_replica_only_has_a_part_of_can_be_drained(slurm: SlurmCluster, database_url: str) -> None:
    async with reconciling(slurm, database_url, spec=TWO) as site:
        await site.scale(1)
        replica = await served(site)
        follower = ranks_of(slurm, replica)[1].environment["SLURMD_NODENAME"]
        await nodes.drain(site.db, follower, actor="test", reason="a cable", now=utc_now())
        try:
            assert (await site.until_ended(replica.name, timeout_seconds=90)).reason is Reason.NODE_DRAINED
            successor = await served(site, other_than=replica)
            held = {one.environment["SLURMD_NODENAME"] for one in ranks_of(slurm, successor).values()}
            assert len(held) == 2
            assert follower not in held
        finally:
            await nodes.undrain(site.db, follower, actor="test", now=utc_now())
