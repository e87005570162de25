"""The upstream and the load of the benchmarks: whole answers count, and each way not to get one is an error."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from controlplane.demo.children import MissingProgram, free_ports
from tests.benchmarks import programs
from tests.benchmarks.peers import CannotInstall, Peer
from tests.benchmarks.programs import Upstreams, load, load_command, upstreams

FOUR = ["--connections", "4", "--requests", "3"]


@pytest.fixture(scope="module")
def up(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Upstreams]:
    with upstreams(tmp_path_factory.mktemp("upstream")) as running:
        yield running


@pytest.mark.parametrize("extra", [[], ["--fresh"], ["--slowly", "500:1"], ["--sources", "3"], ["--ramp-ms", "5"]])
@pytest.mark.parametrize("kind", [[], ["--stream"], ["--stream", "--include-usage"]])
def test_whole_answers_are_good(up: Upstreams, kind: list[str], extra: list[str]) -> None:
    found = load(up.ports, [*FOUR, "--pace", "3:1:8", *kind, *extra])
    assert (found["good"], found["errors"], found["statuses"]) == (12, 0, {"200": 12})
    assert 3 <= found["ttft_ms"]["p50"] <= found["ttft_ms"]["p99"] <= found["e2e_ms"]["max"]


def test_a_paced_stream_takes_its_time(up: Upstreams) -> None:
    found = load(up.ports, ["--requests", "1", "--stream", "--pace", "20:10:5"])
    assert found["ttft_ms"]["p50"] >= 20
    assert found["e2e_ms"]["p50"] >= 20 + 4 * 10


@pytest.mark.parametrize(
    ("pace", "kind", "fault"),
    [
        ("1:1:8:e", [], "status"),
        ("1:1:8:e", ["--stream"], "status"),
        ("1:1:8:i", ["--stream"], "wrong_events"),
        ("1:1:8:b", [], "incomplete"),
        ("1:1:8:b", ["--stream"], "incomplete"),
        ("1:1:8:r", [], "incomplete"),
        ("30000:1:8", ["--stream", "--timeout-seconds", "0.05"], "timeout"),
    ],
)
def test_each_fault_of_an_upstream_is_counted(up: Upstreams, pace: str, kind: list[str], fault: str) -> None:
    found = load(up.ports, [*FOUR, "--pace", pace, *kind])
    assert (found["good"], found["errors"], found["faults"]) == (0, 12, {fault: 12})
    assert found["first_fault"]


def test_an_expected_refusal_is_good_and_any_other_answer_is_not(up: Upstreams) -> None:
    assert load(up.ports, [*FOUR, "--pace", "0:0:1:e", "--expect", "500"])["good"] == 12
    assert load(up.ports, [*FOUR, "--expect", "401"])["faults"] == {"status": 12}


def test_nobody_there_is_an_error() -> None:
    assert load(free_ports(1), FOUR)["faults"] == {"no_connection": 12}


def test_an_upstream_notices_who_leaves_and_who_stays(up: Upstreams) -> None:
    before = up.stats()["left"]
    found = load(up.ports, [*FOUR, "--stream", "--pace", "1:1000:8", "--leave-ms", "20"])
    assert (found["left"], found["good"], found["errors"]) == (12, 0, 0)
    up.disconnect()
    assert up.stats()["answering"] == 0
    assert 0 < up.stats()["left"] - before <= 12


def test_a_kept_connection_that_was_closed_is_no_error(up: Upstreams) -> None:
    before = up.stats()["requests"]
    line = load_command(up.ports, ["--requests", "2", "--pause-ms", "500"])
    with subprocess.Popen(line, stdout=subprocess.PIPE) as clients:
        up.process.wait_until(lambda: up.stats()["requests"] > before, "is asked")
        up.disconnect()
        found = json.loads(clients.communicate()[0])
    assert (found["good"], found["errors"]) == (2, 0)


def test_without_a_compiler_it_says_what_installs_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(programs, "BUILD", tmp_path)
    monkeypatch.setattr(shutil, "which", lambda *_, **__: None)
    with pytest.raises(MissingProgram, match=r"gcc and libc6-dev.*debian-packages.sh benchmarks"):
        programs.compiled("load")


def test_a_peer_that_cannot_be_installed_says_why() -> None:
    peer = Peer("nobody", "nobody==0", lambda *_: [], python="python-that-is-not-there")
    with pytest.raises(CannotInstall, match="python-that-is-not-there"):
        peer.install()
