"""Each benchmark of the proxy once, so small that it measures nothing: it runs, finds no errors, and says so.

They are processes of their own, because they choose the cores that they run on.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.benchmarks.idle_streams import FILES_BESIDES, split

ROOT = Path(__file__).parents[2]


def run(module: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-m", f"tests.benchmarks.{module}", *arguments]
    return subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=240, check=False)


def test_the_proxy_is_measured_beside_the_others() -> None:
    done = run("proxy", "--tiny", "--rounds", "1", "--keys", "20")
    assert done.returncode in (0, 1), done.stderr  # bounds mean nothing here
    assert "kept   errors: 0.00" in done.stdout, done.stderr
    lines = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in done.stdout.splitlines() if line[:1] == "|"
    ]
    assert lines[0] == ["", "direct", "nginx", "haproxy", "controlplane"]
    assert lines[-1] == ["errors", "0", "0", "0", "0"]
    assert len(lines) == 20
    assert not [line for line in lines[2:] if "-" in line]


def test_what_answers_nothing_is_no_result(tmp_path: Path) -> None:
    """A checkout without a proxy in it: the benchmark must say that it has failed, not print an empty table."""
    done = run("proxy", "--tiny", "--rounds", "1", "--root", str(tmp_path))
    assert done.returncode not in (0, 1)
    assert "|" not in done.stdout


@pytest.mark.parametrize(
    ("asked", "files", "passed_on", "waiting"),
    [(10_000, 30_000, 10_000, 0), (10_000, 20_000, 9800, 200), (10_000, 19_900, 9700, 300), (10_000, 1024, 212, 400)],
)
def test_where_open_files_are_too_few_the_last_streams_wait(
    asked: int, files: int, passed_on: int, waiting: int
) -> None:
    parts = split(asked, files)
    assert (parts.passed_on, parts.waiting) == (passed_on, waiting)
    assert 2 * parts.passed_on + parts.waiting <= files - FILES_BESIDES


@pytest.mark.parametrize("extra", [[], ["--open-files", "290"]])
def test_idle_streams_are_held_and_end(extra: list[str]) -> None:
    done = run("idle_streams", "--streams", "50", "--idle-seconds", "1", "--ramp-seconds", "0.2", *extra)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "50 of 50 asked for" in done.stdout
    assert f"{10 if extra else 0} waiting for a place" in done.stdout
    assert "ended well   50; errors: 0" in done.stdout


def test_the_soak_tells_what_holds() -> None:
    done = run("soak", "--minutes", "0.05")
    facts = [line for line in done.stdout.splitlines() if line.startswith(("holds", "BROKEN"))]
    assert len(facts) == 8, done.stderr
    # in three seconds the memory has not settled
    assert [fact for fact in facts if fact.startswith("BROKEN") and "memory" not in fact] == [], done.stdout
