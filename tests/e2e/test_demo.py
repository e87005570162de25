"""The demo, run as a person would: the whole loop on real servers, and nothing left behind."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

PATIENCE_SECONDS = 300


def processes_that_mention(text: str) -> list[str]:
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal() and int(entry.name) != os.getpid():
            try:
                line = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            except OSError:
                continue  # it has ended meanwhile
            if text in line:
                found.append(line)
    return found


@pytest.mark.slow
def test_the_demo_shows_the_whole_loop_and_leaves_no_process_behind(session_directory: Path) -> None:
    directory = session_directory / "demo"
    command = [sys.executable, "-m", "controlplane.cli", "demo", "--plain", "--directory", str(directory)]
    environment = {name: value for name, value in os.environ.items() if name != "DATABASE_URL"}
    done = subprocess.run(
        command, capture_output=True, text=True, env=environment, timeout=PATIENCE_SECONDS, check=False
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert "All of it was shown." in done.stdout
    assert "0 failed, 0 broken" in done.stdout
    assert "3 at most, 1 at the end" in done.stdout
    assert "alert to sbatch" in done.stdout
    _, _, why = " ".join(done.stdout.split()).partition("controlplane why cp-demo-")
    assert re.search(r" alert [A-Z][\w ]+ \(scale_up\): ", why), why
    assert re.search(r" decision SCALED_UP, (1 -> 2|2 -> 3): [A-Z]", why), why
    assert re.search(
        r" job (\d+) RUNNING on n\d .+ endpoint READY at http.+ end ENDED, SCALED_DOWN: job \1 ended", why
    ), why
    assert processes_that_mention(str(directory)) == []
