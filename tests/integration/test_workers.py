"""The proxy in several processes: one port, one scrape, and what becomes of connections when a worker or all end."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.conftest import eventually, eventually_sync
from tests.integration.test_serve import CONTROLPLANE, SECONDS, Serve, chat, refuses, serving, serving_tiny

WORKERS = 3
CHAT = "/v1/chat/completions"


@contextmanager
def serving_workers(
    directory: Path, database_url: str, *, tokens_per_second: int = 1000, **more: str
) -> Iterator[tuple[Serve, str]]:
    """Both roles with three workers that are all there, the model `tiny` routable, and a client's key."""
    more = {"CONTROLPLANE_PROXY__WORKERS": str(WORKERS), **more}
    with serving_tiny(directory, database_url, tokens_per_second=tokens_per_second, **more) as (serve, key):
        eventually_sync(lambda: has_served(serve, WORKERS), timeout_seconds=SECONDS)
        yield serve, key


def workers_of(serve: Serve) -> set[int]:
    """The process ids of its workers."""
    children = Path(f"/proc/{serve.process.pid}/task/{serve.process.pid}/children").read_text()
    return {int(pid) for pid in children.split()}


def metric(serve: Serve, name: str, **labels: str) -> float:
    """One sample of one scrape; 0 where there is none."""
    found = httpx.get(f"{serve.proxy}/metrics")
    assert found.status_code == 200, found.text
    samples = [sample for family in text_string_to_metric_families(found.text) for sample in family.samples]
    return sum(one.value for one in samples if one.name == name and labels.items() <= one.labels.items())


def has_served(serve: Serve, count: int) -> bool:
    """Whether so many workers have begun to serve, those included that are gone."""
    return len(serve.said("serving the proxy")) == count


def is_gone(pid: int) -> bool:
    return not Path(f"/proc/{pid}").exists()


def ask(serve: Serve, key: str, count: int) -> None:
    """So many requests, each on a connection of its own."""
    for _ in range(count):
        answer = httpx.post(f"{serve.proxy}{CHAT}", json=chat(stream=False, max_tokens=1), headers=bearer(key))
        assert answer.status_code == 200, answer.text


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


# --- one port, one scrape --------------------------------------------------------------------------------


def test_one_scrape_tells_of_all_workers_and_no_counter_falls_when_one_is_killed(
    database_url: str, tmp_path: Path
) -> None:
    with serving_workers(tmp_path, database_url) as (serve, key):
        ask(serve, key, 40)
        assert metric(serve, "proxy_workers") == WORKERS
        assert metric(serve, "proxy_requests_total", model="tiny", code="200") == 40
        assert metric(serve, "proxy_request_seconds_count", model="tiny") == 40
        before = workers_of(serve)
        [killed] = list(before)[:1]
        os.kill(killed, signal.SIGKILL)
        [told] = eventually_sync(lambda: serve.said("another takes its place"), timeout_seconds=SECONDS)
        assert "SIGKILL" in told["event"]
        assert told["pid"] == killed
        eventually_sync(lambda: has_served(serve, WORKERS + 1), timeout_seconds=SECONDS)
        assert len(workers_of(serve) - before) == 1
        assert metric(serve, "proxy_workers") == WORKERS
        assert metric(serve, "proxy_requests_total", model="tiny", code="200") == 40
        ask(serve, key, 10)
        assert metric(serve, "proxy_requests_total", model="tiny", code="200") == 50
        assert metric(serve, "proxy_in_flight", model="tiny") == 0


def test_a_worker_that_hangs_is_counted_as_it_was_and_delays_no_scrape(database_url: str, tmp_path: Path) -> None:
    with serving_workers(tmp_path, database_url) as (serve, key), ExitStack() as stack:
        ask(serve, key, 20)
        assert metric(serve, "proxy_requests_total", code="200") == 20
        clients = [stack.enter_context(httpx.Client(base_url=serve.proxy)) for _ in range(15)]
        for client in clients:
            assert client.get("/health").status_code == 200
        [frozen] = list(workers_of(serve))[:1]
        os.kill(frozen, signal.SIGSTOP)
        try:
            answers = []
            for client in clients:
                with suppress(httpx.ReadTimeout):  # those that have the frozen one
                    answers.append(client.get("/metrics", timeout=1).text)
        finally:
            os.kill(frozen, signal.SIGCONT)
        assert answers
        for answer in answers:
            assert 'proxy_requests_total{code="200",model="tiny",tenant="t"} 20.0' in answer


def test_no_secret_is_on_a_workers_command_line(database_url: str, tmp_path: Path) -> None:
    with serving_workers(tmp_path, database_url) as (serve, _):
        for pid in workers_of(serve):
            line = Path(f"/proc/{pid}/cmdline").read_bytes()
            assert b"controlplane.workers" in line
            assert b"postgresql" not in line


def test_the_databases_state_is_said_once_and_not_by_every_worker(database_url: str, tmp_path: Path) -> None:
    with serving_workers(tmp_path, database_url) as (serve, _):
        assert len(serve.said("PostgreSQL answers")) == 1
        assert sorted(event["worker"] for event in serve.said("serving the proxy")) == [1, 2, 3]


def test_a_port_that_another_supervisor_has_is_one_sentence(database_url: str, tmp_path: Path) -> None:
    with serving_workers(tmp_path, database_url) as (serve, _):
        done = subprocess.run(
            [*CONTROLPLANE, "serve", "--role", "proxy", "--workers", "2"],
            env=serve.environment,
            capture_output=True,
            text=True,
            timeout=SECONDS,
            check=False,
        )
    assert done.returncode == 1
    assert f"error: the proxy cannot listen on 127.0.0.1 port {serve.proxy_port}" in done.stderr
    assert "Traceback" not in done.stderr
    assert "serving" not in done.stderr


# --- how workers end -------------------------------------------------------------------------------------


async def new_connections(serve: Serve, until: asyncio.Event) -> Counter[str]:
    """Clients that each connect, ask once and leave, until told; what became of their requests."""
    seen: Counter[str] = Counter()

    async def client() -> None:
        while not until.is_set():
            try:
                reader, writer = await asyncio.open_connection("127.0.0.1", serve.proxy_port)
                writer.write(b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n")
                line = await asyncio.wait_for(reader.readline(), SECONDS)
                seen[line.decode().strip() or "closed"] += 1
                writer.close()
            except OSError as error:
                seen[type(error).__name__] += 1

    async with asyncio.TaskGroup() as tasks:
        for _ in range(20):
            tasks.create_task(client())
    return seen


def test_a_worker_that_is_told_to_stop_loses_no_connection(database_url: str, tmp_path: Path) -> None:
    with serving_workers(tmp_path, database_url) as (serve, _):

        async def roll() -> Counter[str]:
            done = asyncio.Event()
            asking = asyncio.create_task(new_connections(serve, done))
            for number, pid in enumerate(sorted(workers_of(serve)), 1):
                os.kill(pid, signal.SIGTERM)
                await eventually(partial(has_served, serve, WORKERS + number), timeout_seconds=SECONDS)
                await eventually(partial(is_gone, pid), timeout_seconds=SECONDS)
            done.set()
            return await asking

        seen = asyncio.run(roll())
        assert seen.keys() == {"HTTP/1.1 200 OK"}
        assert seen.total() > 100
        assert len(serve.said("stops; another takes its place")) == WORKERS
        assert metric(serve, "proxy_workers") == WORKERS


async def streams(serve: Serve, key: str, count: int, once_running: Callable[[], None]) -> list[list[str]]:
    """The lines of so many streams; `once_running` is called when all have begun."""
    begun = asyncio.Semaphore(0)

    async with httpx.AsyncClient(timeout=SECONDS, limits=httpx.Limits(max_connections=None)) as client:

        async def one() -> list[str]:
            body = chat(stream=True, max_tokens=40)
            async with client.stream("POST", f"{serve.proxy}{CHAT}", json=body, headers=bearer(key)) as answer:
                lines: list[str] = []
                async for line in answer.aiter_lines():
                    if not lines:
                        begun.release()
                    lines.append(line)
                return lines

        async with asyncio.TaskGroup() as tasks:
            running = [tasks.create_task(one()) for _ in range(count)]
            for _ in running:
                await begun.acquire()
            once_running()
    return [task.result() for task in running]


def test_sigterm_under_running_streams_breaks_none_and_refuses_new_ones(database_url: str, tmp_path: Path) -> None:
    with serving_workers(tmp_path, database_url, tokens_per_second=20) as (serve, key):
        found = asyncio.run(streams(serve, key, 30, lambda: serve.process.send_signal(signal.SIGTERM)))
        assert all("data: [DONE]" in lines for lines in found)
        assert refuses(f"{serve.proxy}/health")
        assert serve.wait() == 0
        assert serve.events()[-1]["event"] == "stopped"
        assert "worker" not in serve.events()[-1]


def test_a_signal_to_the_whole_group_counts_once(database_url: str, tmp_path: Path) -> None:
    with serving_workers(tmp_path, database_url, tokens_per_second=20) as (serve, key):

        def signal_all() -> None:  # as systemd does
            for pid in [*workers_of(serve), serve.process.pid]:
                os.kill(pid, signal.SIGTERM)

        found = asyncio.run(streams(serve, key, 10, signal_all))
        assert all("data: [DONE]" in lines for lines in found)
        assert serve.wait() == 0


def test_a_second_signal_ends_every_worker_at_once(database_url: str, tmp_path: Path) -> None:
    with serving_workers(tmp_path, database_url, tokens_per_second=1) as (serve, key):
        with one_endless_stream(serve, key) as lines:
            pids = workers_of(serve)
            serve.process.send_signal(signal.SIGTERM)
            eventually_sync(lambda: serve.said("stopping"), timeout_seconds=SECONDS)
            serve.process.send_signal(signal.SIGTERM)
            with pytest.raises(httpx.TransportError):
                list(lines)
        assert serve.wait() == 128 + signal.SIGTERM
        assert all(map(is_gone, pids))


@contextmanager
def one_endless_stream(serve: Serve, key: str) -> Iterator[Iterator[str]]:
    """A stream that has begun; its lines."""
    body = chat(stream=True, max_tokens=1000)
    with (
        httpx.Client(timeout=SECONDS) as client,
        client.stream("POST", f"{serve.proxy}{CHAT}", json=body, headers=bearer(key)) as answer,
    ):
        lines = answer.iter_lines()
        assert next(lines).startswith("data: ")
        yield lines


def test_the_drain_timeout_ends_what_does_not_end_by_itself(database_url: str, tmp_path: Path) -> None:
    limit = {"CONTROLPLANE_PROXY__DRAIN_TIMEOUT_SECONDS": "1"}
    with (
        serving_workers(tmp_path, database_url, tokens_per_second=1, **limit) as (serve, key),
        one_endless_stream(serve, key),
    ):
        serve.process.send_signal(signal.SIGTERM)
        assert serve.wait() == 0
        assert not serve.said("did not end in time")


def test_a_worker_that_hangs_at_the_end_is_killed_and_the_exit_code_tells(database_url: str, tmp_path: Path) -> None:
    limit = {"CONTROLPLANE_PROXY__DRAIN_TIMEOUT_SECONDS": "1"}
    with serving_workers(tmp_path, database_url, tokens_per_second=1000, **limit) as (serve, _):
        [frozen] = list(workers_of(serve))[:1]
        os.kill(frozen, signal.SIGSTOP)
        serve.process.send_signal(signal.SIGTERM)
        assert serve.wait() == 1
        [told] = serve.said("did not end in time")
        assert told["pid"] == frozen
        assert is_gone(frozen)


def test_workers_whose_supervisor_is_killed_finish_their_streams_and_end(database_url: str, tmp_path: Path) -> None:
    with serving_workers(tmp_path, database_url, tokens_per_second=20) as (serve, key):
        pids = workers_of(serve)
        assert len(pids) == WORKERS
        found = asyncio.run(streams(serve, key, 10, serve.process.kill))
        assert all("data: [DONE]" in lines for lines in found)
        serve.process.wait()
        eventually_sync(lambda: all(map(is_gone, pids)), timeout_seconds=SECONDS)
        assert len(serve.said("the supervisor is gone")) == WORKERS


def test_workers_that_cannot_start_are_tried_again_less_and_less_often(database_url: str, tmp_path: Path) -> None:
    secret = tmp_path / "database-url"
    secret.write_text(database_url)
    more = {"DATABASE_URL": "", "DATABASE_URL_FILE": str(secret)}
    with serving(tmp_path, database_url, "--role", "proxy", "--workers", "2", **more) as serve:
        eventually_sync(lambda: has_served(serve, 2), timeout_seconds=SECONDS)
        secret.unlink()
        [first, _] = sorted(workers_of(serve))
        os.kill(first, signal.SIGKILL)

        def last_pause() -> float:
            lines = (line for line in serve.log().splitlines() if "another takes its place" in line)
            return max((float(line.split('"pause_seconds": ')[1].rstrip("}")) for line in lines), default=0)

        eventually_sync(lambda: last_pause() >= 1, timeout_seconds=SECONDS)
        assert httpx.get(f"{serve.proxy}/health").status_code == 200  # the other one has all connections meanwhile
        secret.write_text(database_url)
        eventually_sync(lambda: serve.log().count("serving the proxy") == 3, timeout_seconds=SECONDS)
        serve.process.send_signal(signal.SIGTERM)
        assert serve.wait() == 0


# --- one process alone -----------------------------------------------------------------------------------


def test_who_has_connected_and_not_asked_yet_is_heard_out_and_told_that_it_stops(
    database_url: str, tmp_path: Path
) -> None:
    with serving(tmp_path, database_url, "--role", "proxy") as serve:
        eventually_sync(lambda: serve.said("serving the proxy"), timeout_seconds=SECONDS)
        with socket.create_connection(("127.0.0.1", serve.proxy_port), timeout=SECONDS) as client:
            serve.process.send_signal(signal.SIGTERM)
            eventually_sync(lambda: serve.said("stopping"), timeout_seconds=SECONDS)
            client.sendall(b"GET /ready HTTP/1.1\r\nhost: x\r\n\r\n")
            answer = b""
            while part := client.recv(65536):
                answer += part
        assert answer.startswith(b"HTTP/1.1 503")
        assert b'"status":"stopping"' in answer
        assert b"connection: close" in answer
        assert serve.wait() == 0
