"""A few of the rounds that `make kill-rounds` runs a hundred of."""

from __future__ import annotations

from pathlib import Path

from controlplane.demo.slurm_cluster import SlurmCluster
from tests.e2e.kill_rounds import SLURM_CONF, kill
from tests.e2e.slurm_matrix import release_under_test

ROUNDS = 3
SEED = 147  # of which the first three rounds kill around two submits and on the way down


async def test_killed_at_random_moments_it_comes_back_to_one_job_per_replica_and_leaves_nothing(
    session_directory: Path, database_url: str
) -> None:
    directory = session_directory / "rounds"
    directory.mkdir()
    with SlurmCluster(directory / "slurm", extra_conf=SLURM_CONF, root=release_under_test()) as slurm:
        tally = await kill(directory, slurm, database_url, rounds=ROUNDS, seed=SEED)
    assert sum(tally.kills.values()) == tally.rounds == ROUNDS
    assert tally.intended >= tally.rounds * 3
    assert tally.jobs - tally.twins <= tally.intended
    assert tally.orphans == 0
