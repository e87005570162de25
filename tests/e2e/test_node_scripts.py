"""The shipped prolog and epilog, run by a real slurmd around a real job."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from controlplane.demo.slurm_cluster import CommandFailed, SlurmCluster
from tests.conftest import eventually_sync
from tests.e2e.slurm_matrix import release_under_test

SCRIPTS = Path(__file__).parents[2] / "sbatch" / "node"
WRAPPER = """#!/bin/bash
export DCGM_HPC_JOB_MAPPING_DIR={directory}/gpus REPLICA_SCRATCH_DIRS={directory}/scratch
source {directory}/{script}
"""
JOB = """#!/bin/bash
work=$(mktemp -d {directory}/scratch/replica.$SLURM_JOB_ID.XXXXXXXXXX)
touch "$work/cache"
sleep 300
"""


class Node:
    """A cluster of one node with the two scripts, and the folders that they work in."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        (directory / "scratch").mkdir(parents=True)
        (directory / "scratch").chmod(0o1777)
        for script in ("prolog.sh", "epilog.sh"):
            (directory / script).write_bytes((SCRIPTS / script).read_bytes())
            wrapper = directory / f"slurm-{script}"
            wrapper.write_text(WRAPPER.format(directory=directory, script=script))
            wrapper.chmod(0o755)
        conf = [f"{kind}={directory}/slurm-{kind.lower()}.sh" for kind in ("Prolog", "Epilog")]
        self.slurm = SlurmCluster(
            directory / "slurm", nodes=1, extra_conf=[*conf, "PrologFlags=Alloc"], root=release_under_test()
        )

    def submit(self, gpus: int) -> str:
        job = self.slurm.jobs_directory / "job.sh"
        job.write_text(JOB.format(directory=self.directory))
        line = ["--parsable", f"--uid={self.slurm.user_name}", f"--gres=gpu:{gpus}", "--chdir=/", "--output=/dev/null"]
        return self.slurm.run("sbatch", *line, str(job)).strip()

    def told(self) -> dict[str, str]:
        found = {}
        with suppress(FileNotFoundError):  # a file may go while they are listed
            found = {one.name: one.read_text() for one in (self.directory / "gpus").glob("[0-9]*")}
        return found

    def left(self, job_id: str) -> list[Path]:
        return list((self.directory / "scratch").glob(f"replica.{job_id}.*"))

    def state(self) -> str:
        return self.slurm.run("sinfo", "--noheader", "--format", "%T").strip()


@pytest.fixture
def node(session_directory: Path) -> Iterator[Node]:
    made = Node(session_directory / "node")
    with made.slurm:
        yield made


def test_a_killed_job_was_told_of_its_gpus_and_leaves_nothing_behind(node: Node) -> None:
    if release_under_test() is not None:
        pytest.skip("the scripts lie outside of the other release's root")
    jobs = [node.submit(2), node.submit(1)]
    expected = {"0": f"{jobs[0]}\n", "1": f"{jobs[0]}\n", "2": f"{jobs[1]}\n"}
    eventually_sync(lambda: node.told() == expected and all(map(node.left, jobs)), timeout_seconds=30)
    node.slurm.run("scancel", "--signal=KILL", "--full", jobs[0])
    eventually_sync(lambda: node.told() == {"2": f"{jobs[1]}\n"} and not node.left(jobs[0]), timeout_seconds=30)
    assert node.left(jobs[1]), "the other job still works there"
    with suppress(CommandFailed):
        node.slurm.run("scancel", jobs[1])
    eventually_sync(lambda: node.told() == {} and not node.left(jobs[1]), timeout_seconds=60)
    assert eventually_sync(lambda: node.state() == "idle", timeout_seconds=30), "neither script drained the node"
