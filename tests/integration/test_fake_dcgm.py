"""The stand-in for dcgm-exporter as a process, read as Prometheus reads it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import httpx
import pytest
from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families

from controlplane.demo.children import free_ports, is_listening
from controlplane.demo.fake_dcgm import jobs
from tests.conftest import eventually_sync


def families(text: str) -> dict[str, Metric]:
    return {family.name: family for family in text_string_to_metric_families(text)}


# --- Slurm's scripts ------------------------------------------------------------------------------------------


def run_script(directory: Path, name: str, **environment: str) -> None:
    subprocess.run([directory / f"{name}.sh"], env={"PATH": "/usr/bin:/bin", **environment}, check=True)


def test_the_prolog_writes_down_a_jobs_gpus_and_the_epilog_forgets_them(tmp_path: Path) -> None:
    directory = tmp_path / "gpu-jobs"
    jobs.write_scripts(directory)
    scripts = [f"Prolog={directory}/prolog.sh", f"Epilog={directory}/epilog.sh"]
    assert jobs.slurm_conf(directory) == ["PrologFlags=Alloc", *scripts]
    run_script(directory, "epilog", SLURMD_NODENAME="n1", SLURM_JOB_ID="6")  # there is nothing to forget: no error
    run_script(directory, "prolog", SLURMD_NODENAME="n1", SLURM_JOB_ID="7", SLURM_JOB_GPUS="2,3")
    run_script(directory, "prolog", SLURMD_NODENAME="n2", SLURM_JOB_ID="7", SLURM_JOB_GPUS="0")
    run_script(directory, "prolog", SLURMD_NODENAME="n1", SLURM_JOB_ID="77", SLURM_JOB_GPUS="3")  # a shared GPU
    run_script(directory, "prolog", SLURMD_NODENAME="n1", SLURM_JOB_ID="78")  # a job without GPUs
    assert jobs.read(directory / "n1") == {2: ["7"], 3: ["7", "77"]}
    assert jobs.read(directory / "n2") == {0: ["7"]}
    run_script(directory, "epilog", SLURMD_NODENAME="n1", SLURM_JOB_ID="7")
    assert jobs.read(directory / "n1") == {3: ["77"]}
    assert jobs.read(directory / "n2") == {0: ["7"]}
    assert jobs.read(directory / "n9") == {}


def test_the_epilog_leaves_alone_what_jobs_of_other_clusters_have_on_this_host(tmp_path: Path) -> None:
    directory = tmp_path / "gpu jobs"
    jobs.write_scripts(directory)
    job_id = str(2**40 + os.getpid())
    other = Path(tempfile.mkdtemp(prefix=f"replica.{job_id}.", suffix="XX", dir="/tmp"))
    assert len(other.name.rpartition(".")[2]) == 10, "as the job scripts name theirs"
    try:
        run_script(directory, "epilog", SLURMD_NODENAME="n1", SLURM_JOB_ID=job_id)
        assert other.exists()
    finally:
        other.rmdir()


# --- the process ----------------------------------------------------------------------------------------------


class Replica:
    """A control plane that discovers one replica, and that replica, in one server."""

    def __init__(self) -> None:
        self.running = 0
        replica = self

        class Answers(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                port = replica.server.server_address[1]
                text = f'vllm:num_requests_running{{engine="0"}} {replica.running}\n'
                if self.path == "/sd":
                    text = f'[{{"targets": ["127.0.0.1:{port}"], "labels": {{"slurm_job_id": "4711"}}}}]'
                self.send_response(200)
                self.end_headers()
                self.wfile.write(text.encode())

            def log_message(self, format: str, *args: object) -> None: ...  # noqa: A002

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Answers)
        Thread(target=self.server.serve_forever, daemon=True).start()

    @property
    def sd_url(self) -> str:
        return f"http://127.0.0.1:{self.server.server_address[1]}/sd"


@pytest.fixture
def replica() -> Iterator[Replica]:
    up = Replica()
    yield up
    up.server.shutdown()
    up.server.server_close()


def test_job_labels_and_load_appear_and_vanish_on_the_node_where_the_job_is(tmp_path: Path, replica: Replica) -> None:
    directory = tmp_path / "gpu-jobs"
    jobs.write_scripts(directory)
    ports = dict(zip(("n1", "n2"), free_ports(2), strict=True))
    command = [sys.executable, "-m", "controlplane.demo.fake_dcgm", "--gpus", "4", "--jobs", str(directory)]
    command += ["--replicas", replica.sd_url, *(f"--node={node}={port}" for node, port in ports.items())]
    process = subprocess.Popen(command)
    try:
        eventually_sync(lambda: all(is_listening(port) for port in ports.values()), timeout_seconds=20)

        def utilisation(node: str) -> dict[str, tuple[str | None, float]]:
            text = httpx.get(f"http://127.0.0.1:{ports[node]}/metrics", trust_env=False).text
            samples = families(text)["DCGM_FI_DEV_GPU_UTIL"].samples
            assert {sample.labels["Hostname"] for sample in samples} == {node}
            return {sample.labels["gpu"]: (sample.labels.get("hpc_job"), sample.value) for sample in samples}

        nobody: dict[str, tuple[str | None, float]] = {str(index): (None, 0) for index in range(4)}
        assert utilisation("n1") == nobody
        run_script(directory, "prolog", SLURMD_NODENAME="n1", SLURM_JOB_ID="4711", SLURM_JOB_GPUS="1,2")
        assert utilisation("n1") == {**nobody, "1": ("4711", 0), "2": ("4711", 0)}
        replica.running = 12
        eventually_sync(lambda: utilisation("n1")["1"] == ("4711", 100), timeout_seconds=20)
        assert utilisation("n1")["0"] == (None, 0)
        assert utilisation("n2") == nobody
        run_script(directory, "epilog", SLURMD_NODENAME="n1", SLURM_JOB_ID="4711")
        assert utilisation("n1") == nobody

        url = f"http://127.0.0.1:{ports['n2']}"
        assert httpx.post(f"{url}/fault", json={"gpu": 3, "xid": 79}, trust_env=False).status_code == 204
        assert httpx.post(f"{url}/fault", json={"gpu": 4, "xid": 79}, trust_env=False).status_code == 400
        counted = families(httpx.get(f"{url}/metrics", trust_env=False).text)["DCGM_EXP_XID_ERRORS_COUNT"].samples
        assert {(one.labels["gpu"], one.labels.get("xid"), one.value) for one in counted if one.value} == {
            ("3", "79", 1)
        }
    finally:
        process.terminate()
        assert process.wait(20) == -signal.SIGTERM  # uvicorn tells itself again, once it has ended
