"""Slurm's own prolog and epilog tell the GPU exporter which job holds which GPU."""

from __future__ import annotations

from pathlib import Path

from controlplane.demo.fake_dcgm import jobs
from controlplane.demo.slurm_cluster import SlurmCluster
from tests.conftest import eventually_sync


def test_a_jobs_gpus_are_told_while_it_runs_and_no_longer(session_directory: Path) -> None:
    directory = session_directory / "gpu-jobs"
    jobs.write_scripts(directory)
    # the indices that a job is given are counted by node, so that both jobs get index 0 on theirs
    with SlurmCluster(session_directory / "gpus", nodes=2, gpus=4, extra_conf=jobs.slurm_conf(directory)) as cluster:
        script = cluster.jobs_directory / "script"
        script.write_text("#!/bin/sh\nexec sleep 600\n")

        def submit(node: str, *gpus: str) -> str:
            where = ["--chdir", str(cluster.jobs_directory), "--nodelist", node, *gpus]
            return cluster.run("sbatch", "--parsable", *where, str(script)).strip()

        with_two, with_one = submit("n1", "--gres=gpu:2"), submit("n2", "--gres=gpu:1")
        eventually_sync(lambda: jobs.read(directory / "n1") == {0: [with_two], 1: [with_two]}, timeout_seconds=30)
        eventually_sync(lambda: jobs.read(directory / "n2") == {0: [with_one]}, timeout_seconds=30)
        cluster.run("scancel", with_two)
        eventually_sync(lambda: jobs.read(directory / "n1") == {}, timeout_seconds=30)
        assert jobs.read(directory / "n2") == {0: [with_one]}
        assert cluster.is_ready(), "a prolog or an epilog that fails drains its node"
        assert "drain" not in cluster.run("sinfo", "--noheader", "--format", "%T")
