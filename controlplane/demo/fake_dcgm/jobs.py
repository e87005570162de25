"""Which job holds which GPU: files named by a GPU's index, with the ids of its jobs, a line each.

It is the form of dcgm-exporter's `--hpc-job-mapping-dir`. Slurm's prolog writes them where a job's GPUs are, its epilog
takes them away: those of `sbatch/node/`, as on a site. A site has one folder on each node; here, where all nodes are
one host, each node has its own.

Failure behaviour: a file that vanishes while it is read is one that is not there; neither script ever fails, because
Slurm drains a node whose prolog does.
"""

from __future__ import annotations

import shlex
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

NODE_SCRIPTS = (
    Path(__file__).resolve().parents[3] / "sbatch" / "node",  # a checkout
    Path(sys.prefix) / "share" / "controlplane" / "sbatch" / "node",  # an installed package
)
# The epilog looks for what killed replicas left by a job's id alone, and other clusters of this host count jobs, too:
# so it is shown a folder in which nobody works.
_WRAPPER = """\
#!/bin/bash
export DCGM_HPC_JOB_MAPPING_DIR={directory}/"$SLURMD_NODENAME" REPLICA_SCRATCH_DIRS=/nonexistent
exec /bin/bash {script}
"""


def slurm_conf(directory: Path) -> list[str]:
    """What slurm.conf has to say of the scripts that `write_scripts` makes there."""
    return ["PrologFlags=Alloc", *(f"{kind}={_wrapper(directory, kind)}" for kind in ("Prolog", "Epilog"))]


def write_scripts(directory: Path) -> None:
    """Make the folder anew, and in it what calls the prolog and the epilog for each node."""
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir()
    shipped = next((folder for folder in NODE_SCRIPTS if folder.exists()), NODE_SCRIPTS[0])
    for kind in ("Prolog", "Epilog"):
        path, script = _wrapper(directory, kind), shipped / f"{kind.lower()}.sh"
        path.write_text(_WRAPPER.format(directory=shlex.quote(str(directory)), script=shlex.quote(str(script))))
        path.chmod(0o755)


def read(directory: Path) -> dict[int, Sequence[str]]:
    """The jobs of each GPU's index, of one node's folder; empty if there is none."""
    jobs: dict[int, Sequence[str]] = {}
    for path in sorted(directory.glob("[0-9]*")):
        try:
            jobs[int(path.name)] = path.read_text().split()
        except (OSError, ValueError):
            continue
    return {index: held_by for index, held_by in jobs.items() if held_by}


def _wrapper(directory: Path, kind: str) -> Path:
    return directory / f"{kind.lower()}.sh"
