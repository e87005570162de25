"""A real vLLM on the CPU, on two nodes of a real Slurm: it serves, and one killed rank has the whole job replaced.

Runs only where `VLLM_VENV` names a virtual environment with a vLLM for the CPU, and `VLLM_MODEL` the directory of a
small model, both readable for everybody: they take gigabytes, and a start takes most of a minute. What is tried here
of every rank's end is tried with the stand-in each time, in `test_several_nodes`.
"""

from __future__ import annotations

import os
import signal
import time
from dataclasses import replace

import httpx
import pytest
from loguru import logger

from controlplane.core.types import Reason, Replica, SlurmResources, VllmOptions
from controlplane.db import endpoints
from controlplane.demo.slurm_cluster import SlurmCluster
from tests.conftest import eventually
from tests.e2e.reconciling import SPEC, Reconciling, reconciling
from tests.e2e.test_several_nodes import log_of, processes_of, ranks_of

VENV, MODEL = os.environ.get("VLLM_VENV", ""), os.environ.get("VLLM_MODEL", "")
pytestmark = pytest.mark.skipif(not (VENV and MODEL), reason="VLLM_VENV and VLLM_MODEL name no vLLM to try")

ON_THE_CPU = {
    "REPLICA_INTERFACE": "lo",
    "REPLICA_HOST": "127.0.0.1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
}
ARGS = (
    *("--tensor-parallel-size", "2", "--load-format", "dummy", "--dtype", "bfloat16", "--enforce-eager"),
    *("--max-model-len", "2048", "--kv-cache-memory-bytes", "64M", "--max-num-seqs", "4"),
)
TWO = replace(
    SPEC,
    template="vllm-venv",
    slurm=SlurmResources(time_limit_seconds=3600, nodes=2, gpus_per_node=1),
    vllm=VllmOptions(image=VENV, model_path=MODEL, args=ARGS, environment=ON_THE_CPU),
    start_timeout_seconds=400,
)
START_SECONDS = 400.0  # the machine may be busy
OUT_OF_ROTATION_SECONDS = 30.0


async def served(slurm: SlurmCluster, site: Reconciling, *, other_than: Replica | None = None) -> Replica:
    async def one() -> Replica | None:
        routable = {endpoint.replica for endpoint in await endpoints.load_routable(site.db)}
        live = [replica for replica in await site.live() if replica != other_than and replica.name in routable]
        return live[0] if live else None

    began = time.monotonic()
    replica = await eventually(one, timeout_seconds=START_SECONDS)
    logger.info(f"{replica.name} serves after {time.monotonic() - began:.1f} s")
    return replica


async def generate(site: Reconciling, replica: Replica, tokens: int = 5) -> httpx.Response:
    [target] = [one for one in await endpoints.load_targets(site.db) if one.replica == replica.name]
    async with httpx.AsyncClient(timeout=60) as http:
        body = {"model": SPEC.model, "prompt": "a", "max_tokens": tokens, "ignore_eos": True}
        headers = {"Authorization": f"Bearer {replica.secret}"}
        return await http.post(f"{target.url}/v1/completions", json=body, headers=headers)


@pytest.mark.parametrize("rank", [1, 0])
async def test_tensor_parallel_over_two_nodes_serves_and_a_killed_rank_is_replaced_with_the_whole_job(
    slurm: SlurmCluster, database_url: str, rank: int
) -> None:
    async with reconciling(slurm, database_url, spec=TWO, token_timeout_seconds=20) as site:
        await site.scale(1)
        replica = await served(slurm, site)
        assert (await generate(site, replica)).status_code == 200
        assert sorted(ranks_of(slurm, replica)) == [0, 1]
        assert all(replica.secret not in word for one in processes_of(slurm, replica) for word in one.arguments)

        killed = time.monotonic()
        os.kill(ranks_of(slurm, replica)[rank].pid, signal.SIGKILL)

        async def is_out() -> bool:
            return replica.name not in {one.replica for one in await endpoints.load_routable(site.db)}

        await eventually(is_out, timeout_seconds=OUT_OF_ROTATION_SECONDS)
        logger.info(f"rank {rank} killed: out of rotation after {time.monotonic() - killed:.1f} s")
        await eventually(lambda: not processes_of(slurm, replica), timeout_seconds=60)
        logger.info(f"rank {rank} killed: the whole job gone after {time.monotonic() - killed:.1f} s")
        assert (await site.until_ended(replica.name, timeout_seconds=60)).reason is Reason.CRASHED
        logger.info(log_of(slurm, replica)[-3000:])
        successor = await served(slurm, site, other_than=replica)
        logger.info(f"rank {rank} killed: replaced after {time.monotonic() - killed:.1f} s")
        assert (await generate(site, successor)).status_code == 200

        stopped = time.monotonic()
        await site.scale(0)
        ended = await site.until_ended(successor.name, timeout_seconds=120)
        assert (ended.reason, ended.cut_requests) == (Reason.SCALED_DOWN, None)
        await eventually(lambda: not processes_of(slurm, successor), timeout_seconds=60)
        logger.info(f"drained, and nothing left, after {time.monotonic() - stopped:.1f} s")
