"""Which job holds which GPU: files named by a GPU's index, with the ids of its jobs, a line each.

It is the form of dcgm-exporter's `--hpc-job-mapping-dir`. Slurm's prolog writes them where a job's GPUs are, its epilog
takes them away. A site has one folder on each node; here, where all nodes are one host, each node has its own.

Failure behaviour: a file that vanishes while it is read is one that is not there; neither script ever fails, because
Slurm drains a node whose prolog does.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

_PROLOG = """\
#!/bin/sh
# for dcgm-exporter: which job holds which GPU of this node
folder={directory}/$SLURMD_NODENAME
mkdir -p "$folder"
for gpu in $(echo "$SLURM_JOB_GPUS" | tr ',' ' '); do echo "$SLURM_JOB_ID" >>"$folder/$gpu"; done
exit 0
"""
_EPILOG = """\
#!/bin/sh
# the job is over: its line goes from each GPU's file, and a file without a line goes, too
for file in {directory}/"$SLURMD_NODENAME"/*; do
  [ -f "$file" ] || continue
  left=$(grep -vx "$SLURM_JOB_ID" "$file")
  if [ -n "$left" ]; then echo "$left" >"$file"; else rm -f "$file"; fi
done
exit 0
"""


def slurm_conf(directory: Path) -> list[str]:
    """What slurm.conf has to say of the scripts that `write_scripts` makes there."""
    return [f"{name}={path}" for name, path, _ in _scripts(directory)]


def write_scripts(directory: Path) -> None:
    """Make the folder anew, and in it the prolog and the epilog."""
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir()
    for _, path, script in _scripts(directory):
        path.write_text(script)
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


def _scripts(directory: Path) -> list[tuple[str, Path, str]]:
    scripts = (("Prolog", _PROLOG), ("Epilog", _EPILOG))
    return [(name, directory / f"{name.lower()}.sh", text.format(directory=directory)) for name, text in scripts]
