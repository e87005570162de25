"""A replica's secret, a prompt and the cluster's key, on a real Slurm: what others can see holds none of them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import httpx
import pytest

from controlplane.clock import utc_now
from controlplane.core.types import VllmOptions
from controlplane.db import Database, DatabaseOptions, replica_sets, replicas
from controlplane.demo.slurm_cluster import SlurmCluster
from tests.conftest import eventually
from tests.e2e.plant import SPEC, Plant
from tests.integration.canaries import Canaries, columns_with, command_lines

OPERATOR = "ann-token-of-the-canaries"


@pytest.fixture
def plant(slurm: SlurmCluster, database_url: str, session_directory: Path) -> Iterator[Plant]:
    settings = {"CONTROLPLANE_LOG__LEVEL": "debug", "CONTROLPLANE_OPERATOR__TOKENS": f"ann:{OPERATOR}"}
    with Plant(session_directory / "canaries", slurm, database_url, settings) as made:
        made.serve("control", "control")
        made.serve("proxy", "proxy", {"CONTROLPLANE_PROXY__ACCESS_LOG_SAMPLE": "1"})
        yield made


async def test_a_running_replica_shows_its_secret_to_nobody(plant: Plant) -> None:
    slurm, database_url = plant.slurm, plant.database_url
    said: dict[str, str] = {}
    canaries = Canaries(operator=OPERATOR)
    spec = replace(SPEC, min_replicas=1, vllm=VllmOptions(environment={"HF_TOKEN": canaries["hf_token"]}))
    async with Database(DatabaseOptions(database_url)) as db:
        await replica_sets.apply(db, spec, actor="test", now=utc_now())
        body = {"model": SPEC.model, "messages": [{"role": "user", "content": canaries["prompt"]}], "max_tokens": 3}
        headers = {"authorization": f"Bearer {plant.api_key}"}
        async with httpx.AsyncClient(timeout=60, trust_env=False) as client:
            answer = await client.post(f"{plant.url('proxy')}/v1/chat/completions", headers=headers, json=body)
            assert answer.status_code == 200, answer.text
            [replica] = await replicas.load_live(db)
            canaries["replica_secret"], canaries["client_key"] = replica.secret, plant.api_key
            canaries["jwt_key"] = slurm.jwt_key_file.read_bytes().hex()
            for path in ("replicas", "endpoints", f"replicas/{replica.name}/why", "audit"):
                url = f"{plant.url('control')}/api/v1/{path}"
                shown = await client.get(url, headers={"authorization": f"Bearer {OPERATOR}"})
                assert shown.status_code == 200
                said[path] = shown.text
            for path in ("/metrics", "/sd/prometheus", "/ready"):
                said[path] = (await client.get(plant.url("control") + path)).text
        job_id = str(replica.slurm_job_id)
        said["what Slurm shows of the job"] = slurm.run("scontrol", "show", "job", job_id)
        said["the script"] = slurm.run("scontrol", "write", "batch_script", job_id, "-")
        said["arguments"] = "\n".join(command_lines().values())
        said["the job's log"] = await eventually(lambda: _log_of(slurm, replica.name))
        plant.kill("control")  # or it would replace what is cancelled, and leave a job to the next test
        slurm.run("scancel", job_id)
        await eventually(lambda: not slurm.run("squeue", "--noheader", "--name", replica.name), timeout_seconds=60)
    for name in ("control", "proxy"):
        said[f"log of {name}"] = plant.children.log_file(name).read_text()
    assert "fake_vllm" in said["arguments"]
    assert "request ended" in said["log of proxy"]
    assert {place: found for place, text in said.items() if (found := canaries.found_in(text))} == {}
    assert columns_with(database_url, canaries["replica_secret"]) == {"replicas.secret", "endpoints.api_key"}
    assert not columns_with(database_url, canaries["prompt"])


def _log_of(slurm: SlurmCluster, name: str) -> str:
    [file] = slurm.jobs_directory.glob(f"{name}-*.*.out")
    return file.read_text()
