"""The fake on several nodes: each rank a process, as a job's template starts them."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Callable, Iterator

import httpx
import pytest

from controlplane.demo.children import free_ports
from tests.conftest import eventually_sync

NOTICED_SECONDS = 5.0


class Ranks:
    """Three ranks, started one by one."""

    def __init__(self) -> None:
        self.port, self.master_port = free_ports(2)
        self.processes: dict[int, subprocess.Popen[bytes]] = {}

    def start(self, rank: int, *arguments: str) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "controlplane.demo.fake_vllm", "--model", "m", "--port", str(self.port)]
        command += ["--nnodes", "3", "--node-rank", str(rank), "--master-port", str(self.master_port), *arguments]
        self.processes[rank] = subprocess.Popen([*command, *(["--headless"] if rank else [])])
        return self.processes[rank]

    def serves(self) -> bool:
        try:
            return httpx.get(f"http://127.0.0.1:{self.port}/health", trust_env=False).is_success
        except httpx.HTTPError:
            return False


@pytest.fixture
def ranks() -> Iterator[Ranks]:
    three = Ranks()
    yield three
    for process in three.processes.values():
        process.kill()
        process.wait()


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0)])
def test_the_leader_serves_when_every_follower_has_come_in_whatever_order(ranks: Ranks, order: tuple[int, ...]) -> None:
    for rank in order[:-1]:
        ranks.start(rank)
    assert not ranks.serves()
    ranks.start(order[-1])
    eventually_sync(ranks.serves)
    assert [process.poll() for process in ranks.processes.values()] == [None] * 3


@pytest.fixture
def serving(ranks: Ranks) -> Ranks:
    for rank in range(3):
        ranks.start(rank)
    eventually_sync(ranks.serves)
    return ranks


def test_a_follower_that_is_gone_ends_the_leader_with_exit_code_0_and_the_other_follower_stays(serving: Ranks) -> None:
    serving.processes[2].kill()
    assert serving.processes[0].wait(NOTICED_SECONDS) == 0
    assert serving.processes[1].poll() is None


@pytest.mark.parametrize("end", [subprocess.Popen.kill, subprocess.Popen.terminate])
def test_followers_outlive_their_leader_until_they_are_told_to_stop(
    serving: Ranks, end: Callable[[subprocess.Popen[bytes]], None]
) -> None:
    end(serving.processes[0])
    serving.processes[0].wait(NOTICED_SECONDS)
    followers = [serving.processes[rank] for rank in (1, 2)]
    assert [process.poll() for process in followers] == [None, None]
    for process in followers:
        process.send_signal(signal.SIGTERM)
    assert [process.wait(NOTICED_SECONDS) for process in followers] == [0, 0]


@pytest.mark.parametrize("arguments", [["--nnodes", "2", "--node-rank", "2", "--headless"], ["--headless"]])
def test_a_rank_that_cannot_be_is_refused(arguments: list[str]) -> None:
    command = [sys.executable, "-m", "controlplane.demo.fake_vllm", "--model", "m", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "--node-rank must be less than --nnodes" in done.stderr
