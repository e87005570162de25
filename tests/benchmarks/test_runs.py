"""Each benchmark of the proxy once, so small that it measures nothing: it runs, finds no errors, and says so.

They are processes of their own, because they choose the cores that they run on.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

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


def test_idle_streams_are_held_and_end() -> None:
    done = run("idle_streams", "--streams", "50", "--idle-seconds", "1", "--ramp-seconds", "0.2")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "50 idle at once" in done.stdout
    assert "ended well   50; errors: 0" in done.stdout


def test_the_soak_tells_what_holds() -> None:
    done = run("soak", "--minutes", "0.05")
    facts = [line for line in done.stdout.splitlines() if line.startswith(("holds", "BROKEN"))]
    assert len(facts) == 8, done.stderr
    # in three seconds the memory has not settled
    assert [fact for fact in facts if fact.startswith("BROKEN") and "memory" not in fact] == [], done.stdout
