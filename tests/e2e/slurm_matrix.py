"""The tests that talk to Slurm, on every release that can be had: this machine's own, and two of Debian's later ones.

Run as `make test-slurm-matrix`. The later releases come by debootstrap (`controlplane.demo.slurm_root`), once; from
then on they are in a folder, which `CONTROLPLANE_SLURM_ROOTS` can name. Ends with 1 if a test fails anywhere or a
release cannot be had, and says which.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from controlplane.demo.children import SYSTEM_PATH
from controlplane.demo.slurm_root import NoSuchRoot, SlurmRoot, made

ROOT_VARIABLE = "CONTROLPLANE_TESTS_SLURM_ROOT"
SUITES = (None, "trixie", "sid")  # of Debian; None: this machine's own
FOLDER = Path(__file__).parent
TESTS = (
    "test_slurm_client.py",
    "test_reconciler.py",
    "test_real_faults.py",
    "test_drains.py",
    "test_kill_rounds.py",
    "test_several_nodes.py",
)


def release_under_test() -> SlurmRoot | None:
    """Where the Slurm is that this test session uses; None: it is this machine's own."""
    path = os.environ.get(ROOT_VARIABLE)
    return SlurmRoot(Path(path)) if path else None


def main() -> int:
    summary: list[str] = []
    is_whole = True
    for suite in SUITES:
        try:
            root = None if suite is None else made(suite)
        except NoSuchRoot as error:
            print(error, file=sys.stderr)
            summary.append(f"{suite}: {str(error).splitlines()[0]}")
            is_whole = False
            continue
        release = _release(root)
        print(f"=== {release} ===", flush=True)
        code, last = _tests(root)
        summary.append(f"{release}: {last}")
        is_whole = is_whole and code == 0
    print("=== the matrix ===", *summary, sep="\n")
    return 0 if is_whole else 1


def _release(root: SlurmRoot | None) -> str:
    line = ["slurmctld", "-V"] if root is None else root.command(["slurmctld", "-V"], [])
    said = subprocess.run(line, env={"PATH": SYSTEM_PATH}, capture_output=True, text=True, check=True).stdout.split()[1]
    return f"Slurm {said} ({'this machine' if root is None else f'Debian {root.path.name}'})"


def _tests(root: SlurmRoot | None) -> tuple[int, str]:
    """Run them; returns pytest's exit code and its last line."""
    environment = {**os.environ, ROOT_VARIABLE: "" if root is None else str(root.path)}
    command = [sys.executable, "-m", "pytest", "-q", "--durations=5", *(str(FOLDER / name) for name in TESTS)]
    last = ""
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as tests:
        assert tests.stdout is not None  # it was asked for
        for line in tests.stdout:
            print(line, end="", flush=True)
            last = line.strip() or last
    return tests.returncode, re.sub(r"^=+ | =+$", "", last)


if __name__ == "__main__":
    sys.exit(main())
