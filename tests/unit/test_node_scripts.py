"""What runs on compute nodes before and after a job: who has which GPU, and what killed replicas leave behind."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[2] / "sbatch" / "node"


class Node:
    """A node's folders, and its prolog and epilog as slurmd runs them: with its own few variables and nothing else."""

    def __init__(self, directory: Path) -> None:
        self.mapping, self.scratch = directory / "jobs", directory / "scratch"
        self.mig_names = directory / "mig-names"
        self.scratch.mkdir(exist_ok=True)

    def start(self, script: str, **variables: str) -> subprocess.Popen[str]:
        environment = {
            "DCGM_HPC_JOB_MAPPING_DIR": str(self.mapping),
            "DCGM_MIG_NAMES_FILE": str(self.mig_names),
            "REPLICA_SCRATCH_DIRS": str(self.scratch),
            **variables,
        }
        return subprocess.Popen(
            [SCRIPTS / script], env=environment, cwd="/", stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )

    def run(self, script: str, **variables: str) -> str:
        """What it said. It must end with 0 whatever happens: otherwise Slurm drains the node."""
        process = self.start(script, **variables)
        said = process.communicate(timeout=30)[0]
        assert process.returncode == 0, said
        return said

    def prolog(self, job_id: int, gpus: str) -> str:
        return self.run("prolog.sh", SLURM_JOB_ID=str(job_id), SLURM_JOB_GPUS=gpus)

    def epilog(self, job_id: int) -> str:
        return self.run("epilog.sh", SLURM_JOB_ID=str(job_id))

    def told(self) -> dict[str, str]:
        """What dcgm-exporter would read: it takes names that are an index, or an index and an instance."""
        files = self.mapping.iterdir() if self.mapping.exists() else iter(())
        return {one.name: one.read_text() for one in files if not one.name.startswith(".")}


@pytest.fixture
def node(tmp_path: Path) -> Node:
    return Node(tmp_path)


@pytest.mark.parametrize(
    ("gpus", "files"),
    [
        ("0", ["0"]),
        ("0,1,5", ["0", "1", "5"]),
        ("2-4", ["2", "3", "4"]),
        ("0-1,07", ["0", "1", "7"]),
        ("", []),
        ("x,../../etc/passwd,$(id)", []),
    ],
)
def test_a_job_is_told_of_each_of_its_gpus_until_it_ends(node: Node, gpus: str, files: list[str]) -> None:
    assert node.prolog(4711, gpus) == ""
    assert node.told() == dict.fromkeys(files, "4711\n")
    assert node.epilog(4711) == ""
    assert node.told() == {}, "an empty file would hide the GPU"


def test_jobs_that_share_a_gpu_each_have_a_line(node: Node) -> None:
    for job_id, gpus in ((12, "0,1"), (1, "0"), (2, "1")):
        node.prolog(job_id, gpus)
    assert node.told() == {"0": "12\n1\n", "1": "12\n2\n"}
    node.epilog(1)
    assert node.told() == {"0": "12\n", "1": "12\n2\n"}, "job 12 is another than 1 and 2"
    node.epilog(12)
    assert node.told() == {"1": "2\n"}


def test_what_runs_twice_changes_nothing(node: Node) -> None:
    for _ in range(2):
        node.prolog(7, "3")
    assert node.told() == {"3": "7\n"}
    for _ in range(2):
        assert node.epilog(7) == ""
    assert node.told() == {}


def test_mig_instances_are_named_as_dcgm_names_them(node: Node) -> None:
    node.mig_names.write_text("# Slurm DCGM\n0 0.1\n1 0.2\n2 1\n3 ../x\n")
    node.prolog(9, "1-3")
    assert node.told() == {"0.2": "9\n", "1": "9\n", "3": "9\n"}
    node.epilog(9)
    assert node.told() == {}


def test_jobs_that_begin_and_end_at_once_lose_nothing(node: Node) -> None:
    node.mapping.mkdir()
    (node.mapping / "0").write_text("1\n")
    started = [node.start("prolog.sh", SLURM_JOB_ID=str(100 + n), SLURM_JOB_GPUS="0-1") for n in range(12)]
    started.append(node.start("epilog.sh", SLURM_JOB_ID="1"))
    said = [process.communicate(timeout=60)[0] for process in started]
    assert said == [""] * len(said)
    begun = [str(100 + n) for n in range(12)]
    assert {name: sorted(text.split()) for name, text in node.told().items()} == {"0": begun, "1": begun}


def test_neither_fails_for_want_of_a_folder_a_job_or_a_right(node: Node) -> None:
    assert node.run("prolog.sh") == ""
    assert node.run("epilog.sh") == ""
    assert node.epilog(5) == ""
    node.mapping.write_text("a file is where the folder should be")
    assert "job 5 is missing in" in node.prolog(5, "0")
    assert node.epilog(5) == ""


def leave(node: Node, name: str) -> Path:
    left = node.scratch / name
    (left / "cache").mkdir(parents=True)
    (left / "cache" / "graph").write_text("compiled")
    return left


def test_the_epilog_removes_the_working_directory_of_its_job_and_of_no_other(node: Node) -> None:
    mine, other = leave(node, "replica.4711.abcDEF1234"), leave(node, "replica.471.abcDEF1234")
    similar = leave(node, "replica.4711.abcDEF12345")
    outside = leave(node, "elsewhere")
    (mine / "cache" / "link").symlink_to(outside)
    linked = node.scratch / "replica.4711.0000000000"
    linked.symlink_to(outside)
    assert node.epilog(4711) == ""
    assert not mine.exists()
    assert other.exists()
    assert similar.exists()
    assert (outside / "cache" / "graph").read_text() == "compiled"
    assert linked.is_symlink(), "a link of that name is nobody's working directory"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a directory to somebody else")
def test_the_epilog_has_no_more_rights_in_a_directory_than_its_owner(session_directory: Path) -> None:
    node = Node(session_directory)  # pytest's own folders are closed to others
    node.scratch.chmod(0o1777)
    mine = leave(node, "replica.1.abcDEF1234")
    for path in (mine, *mine.rglob("*")):
        os.chown(path, 65534, 65534)
    kept = leave(node, "replica.1.rootsFile1") / "cache" / "graph"
    os.chown(kept.parents[1], 65534, 65534)  # the folders below and what is in them are root's
    node.epilog(1)
    assert kept.exists()
    assert not mine.exists()
