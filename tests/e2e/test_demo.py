"""The demo, run as a person would: the whole loop on real servers, the dashboards on it, and nothing left behind.

It is run once, with `--keep`: when its story is told, every query of every dashboard is asked, as Grafana asks it, of
the Prometheus that scraped the demo and of its PostgreSQL, over the data sources that the demo wrote down for Grafana.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import httpx
import psycopg
import pytest

from tests.conftest import eventually_sync
from tests.e2e.filling import Window
from tests.e2e.grafana import asked, environment, provisioned
from tests.e2e.panels import answers, unexpected
from tests.e2e.rightly_empty import NEVER, SOMETIMES

PATIENCE_SECONDS = 300
END_SECONDS = 60
BOARDS = sorted((Path(__file__).parents[2] / "grafana" / "dashboards").glob("*.json"))
STAYS = "everything stays up until Ctrl-C"

pytestmark = pytest.mark.slow


@dataclass(frozen=True)
class Kept:
    """The demo after its story, still up."""

    directory: Path
    process: subprocess.Popen[bytes]
    output: Path
    began: datetime

    @property
    def said(self) -> str:
        return self.output.read_text()


@pytest.fixture(scope="module")
def kept(session_directory: Path) -> Iterator[Kept]:
    directory, output = session_directory / "demo", session_directory / "demo.out"
    command = [sys.executable, "-m", "controlplane.cli", "demo", "--plain", "--keep", "--directory", str(directory)]
    given = {name: value for name, value in os.environ.items() if name != "DATABASE_URL"}
    began = datetime.now(UTC)
    with output.open("wb") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=given)
    try:
        eventually_sync(
            lambda: STAYS in output.read_text() or process.poll() is not None, timeout_seconds=PATIENCE_SECONDS
        )
        assert STAYS in output.read_text(), output.read_text()[-4000:]
        yield Kept(directory, process, output, began)
    finally:
        if process.poll() is None:
            process.terminate()
            process.wait(END_SECONDS)


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


def test_the_demo_shows_the_whole_loop(kept: Kept) -> None:
    said = kept.said
    assert "All of it was shown." in said, said[-4000:]
    assert "0 failed, 0 broken" in said
    assert "3 at most, 1 at the end" in said
    assert "alert to sbatch" in said
    _, _, why = " ".join(said.split()).partition("controlplane why cp-demo-")
    assert re.search(r" alert [A-Z][\w ]+ \(scale_up\): ", why), why
    assert re.search(r" decision SCALED_UP, (1 -> 2|2 -> 3): [A-Z]", why), why
    assert re.search(
        r" job (\d+) RUNNING on n\d .+ endpoint READY at http.+ end ENDED, SCALED_DOWN: job \1 ended", why
    ), why


def test_a_kept_demo_writes_down_what_a_grafana_needs(kept: Kept) -> None:
    directory = kept.directory / "grafana"
    variables, sources = environment(directory), provisioned(directory)
    assert (directory / "environment").stat().st_mode & 0o777 == 0o600
    files = "".join(path.read_text() for path in directory.rglob("*.yaml"))
    for name in ("GRAFANA_POSTGRES_PASSWORD", "CONTROLPLANE_WEBHOOK_HMAC_SECRET", "CONTROLPLANE_WEBHOOK_BEARER_TOKEN"):
        assert len(variables[name]) > 20
        assert variables[name] not in files + kept.said.partition("for Grafana 12")[2]
    shown = kept.said.partition("for Grafana 12")[2]
    assert f"set -a; . {directory}/environment; grafana server" in shown
    assert "Loki         none" in shown
    with psycopg.connect(sources.postgres, autocommit=True) as connection:
        assert connection.execute("SELECT count(*) FROM grafana.decisions").fetchone() != (0,)
        with pytest.raises(psycopg.errors.InsufficientPrivilege):
            connection.execute("SELECT * FROM replicas")
    # the contact point's address and one of its credentials are right: the body is at fault, and not who sends it
    answer = httpx.post(
        variables["CONTROLPLANE_WEBHOOK_URL"],
        headers={"Authorization": f"Bearer {variables['CONTROLPLANE_WEBHOOK_BEARER_TOKEN']}"},
        content=b"{}",
        trust_env=False,
    )
    assert answer.status_code == 400, answer.text


@pytest.mark.parametrize("path", BOARDS, ids=lambda path: path.stem)
def test_every_query_of_a_dashboard_returns_something(kept: Kept, path: Path) -> None:
    sources = provisioned(kept.directory / "grafana")
    window = Window(kept.began, datetime.now(UTC), timedelta(seconds=sources.scrape_interval_seconds))
    with asked(sources, window) as rig:
        answered = answers(json.loads(path.read_text()), rig, window)
    assert answered.has_data
    found = unexpected(answered, NEVER, SOMETIMES)
    assert not found, "\n".join(found)


def test_what_is_listed_as_rightly_empty_is_of_a_dashboard_that_is_there() -> None:
    assert not NEVER.keys() & SOMETIMES.keys()
    boards = {path.stem for path in BOARDS}
    assert not boards or {name.partition(" / ")[0] for name in (*NEVER, *SOMETIMES)} <= boards


def test_a_kept_demo_ends_when_asked_as_its_story_did_and_leaves_no_process_behind(kept: Kept) -> None:
    kept.process.send_signal(signal.SIGTERM)
    assert kept.process.wait(END_SECONDS) == 0
    assert processes_that_mention(str(kept.directory)) == []
