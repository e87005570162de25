"""`controlplane serve` as a process: what it says, what it serves, how it waits for others, and how it ends."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from controlplane.demo.children import free_ports
from controlplane.demo.postgres import PrivatePostgres
from tests.conftest import eventually_sync

SECONDS = 30.0
KEY_OF_UPSTREAM = "upstream-secret-0123456789"


class Serve:
    """A running `controlplane serve`, its ports, and what it has logged so far."""

    def __init__(self, directory: Path, database_url: str, *arguments: str, **more: str) -> None:
        self.web_port, self.proxy_port = free_ports(2)
        self.web = f"http://127.0.0.1:{self.web_port}"
        self.proxy = f"http://127.0.0.1:{self.proxy_port}"
        self.environment = {
            "PATH": os.environ["PATH"],
            "DATABASE_URL": database_url,
            "CONTROLPLANE_WEB__PORT": str(self.web_port),
            "CONTROLPLANE_PROXY__PORT": str(self.proxy_port),
            **more,
        }
        self._log = directory / f"serve-{self.web_port}.log"
        with self._log.open("w") as log:
            self.process = subprocess.Popen(
                [*CONTROLPLANE, "serve", *arguments], env=self.environment, stdout=log, stderr=subprocess.STDOUT
            )

    def log(self) -> str:
        return self._log.read_text()

    def events(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.log().splitlines()]

    def said(self, words: str) -> list[dict[str, Any]]:
        return [event for event in self.events() if words in event["event"]]

    def ready(self, url: str) -> httpx.Response:
        try:
            return httpx.get(f"{url}/ready")
        except httpx.TransportError:
            if self.process.poll() is not None:
                pytest.fail(f"it has ended: {self.log()}")
            raise AssertionError("does not listen yet") from None

    def wait(self) -> int:
        return self.process.wait(SECONDS)

    def command(self, *arguments: str, stdin: str | None = None) -> str:
        done = subprocess.run(
            [*CONTROLPLANE, *arguments], env=self.environment, input=stdin, capture_output=True, text=True, check=True
        )
        return done.stdout


CONTROLPLANE = [sys.executable, "-m", "controlplane.cli"]


@contextmanager
def serving(directory: Path, database_url: str, *arguments: str, **more: str) -> Iterator[Serve]:
    serve = Serve(directory, database_url, *arguments, **more)
    try:
        yield serve
    finally:
        serve.process.kill()
        serve.process.wait()


def until_ready(serve: Serve, url: str, status: int = 200) -> dict[str, Any]:
    def as_expected() -> dict[str, Any]:
        answer = serve.ready(url)
        assert answer.status_code == status, answer.text
        found: dict[str, Any] = answer.json()
        return found

    return eventually_sync(as_expected, timeout_seconds=SECONDS)


@contextmanager
def fake_vllm(tokens_per_second: int) -> Iterator[str]:
    """The URL of a server as vLLM's, which asks for a key."""
    [port] = free_ports(1)
    line = [sys.executable, "-m", "controlplane.demo.fake_vllm", "--model", "tiny", "--port", str(port)]
    line += ["--tokens-per-second", str(tokens_per_second), "--api-key", KEY_OF_UPSTREAM]
    with subprocess.Popen(line, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            yield f"http://127.0.0.1:{port}"
        finally:
            process.kill()


@contextmanager
def serving_tiny(
    directory: Path, database_url: str, *, tokens_per_second: int = 1000, **more: str
) -> Iterator[tuple[Serve, str]]:
    """Both roles, the model `tiny` routable, and a client's key."""
    with ExitStack() as stack:
        upstream = stack.enter_context(fake_vllm(tokens_per_second))
        serve = stack.enter_context(serving(directory, database_url, **more))
        spec = {"name": "box", "model": "tiny", "endpoints": [{"url": upstream, "api_key": KEY_OF_UPSTREAM}]}
        serve.command("apply", "-f", "-", stdin=json.dumps({"replica_sets": [spec]}))
        key = serve.command("keys", "create", "--tenant", "t").strip()
        until_ready(serve, serve.proxy)

        def is_routable() -> bool:
            found = json.loads(serve.command("get", "endpoints", "-o", "json"))
            return bool(found) and found[0]["is_routable"]

        eventually_sync(is_routable, timeout_seconds=SECONDS)
        yield serve, key


def chat(stream: bool, max_tokens: int) -> dict[str, Any]:
    messages = [{"role": "user", "content": "hello"}]
    return {"model": "tiny", "messages": messages, "stream": stream, "max_tokens": max_tokens, "ignore_eos": True}


# --- what does not start ---------------------------------------------------------------------------------


def test_wrong_settings_are_all_named_and_nothing_starts() -> None:
    environment = {
        "PATH": os.environ["PATH"],
        "CONTROLPLANE_PROXY__WORKERS": "0",
        "CONTROLPLANE_SLURM__TOKEN": "s3cret",
    }
    done = subprocess.run(
        [*CONTROLPLANE, "serve"], env=environment, capture_output=True, text=True, timeout=SECONDS, check=False
    )
    assert done.returncode == 2
    assert [line.split(":")[1].strip() for line in done.stderr.splitlines()] == [
        "CONTROLPLANE_PROXY__WORKERS",
        "CONTROLPLANE_SLURM__URL",
        "DATABASE_URL",
    ]
    assert "s3cret" not in done.stderr


def test_a_port_that_is_taken_is_one_sentence(database_url: str, tmp_path: Path) -> None:
    with serving(tmp_path, database_url, "--role", "control") as first:
        until_ready(first, first.web)
        done = subprocess.run(
            [*CONTROLPLANE, "serve", "--role", "control"],
            env=first.environment,
            capture_output=True,
            text=True,
            timeout=SECONDS,
            check=False,
        )
    assert done.returncode == 1
    assert f"error: the control plane cannot listen on 127.0.0.1 port {first.web_port}" in done.stderr
    assert "Traceback" not in done.stderr


# --- what is served --------------------------------------------------------------------------------------


def test_requests_flow_from_a_client_to_an_external_endpoint(database_url: str, tmp_path: Path) -> None:
    with serving_tiny(tmp_path, database_url) as (serve, key):
        answer = httpx.post(
            f"{serve.proxy}/v1/chat/completions",
            json=chat(stream=False, max_tokens=3),
            headers={"Authorization": f"Bearer {key}"},
        )
        assert answer.status_code == 200, answer.text
        assert answer.json()["usage"]["completion_tokens"] == 3
        parts = until_ready(serve, serve.web)["parts"]
        assert parts["database"]["status"] == parts["schema"]["status"] == parts["lease"]["status"] == "ok"
        assert "controlplane_lease_held 1.0" in httpx.get(f"{serve.web}/metrics").text
        serve.process.send_signal(signal.SIGTERM)
        assert serve.wait() == 0
        assert [event["event"] for event in serve.events()][-1] == "stopped"
        assert serve.said(f"serving the control plane at {serve.web}")
        assert serve.said(f"serving the proxy at {serve.proxy}")
        assert not [event for event in serve.events() if event["level"] == "error"]


@pytest.mark.parametrize("role", ["control", "proxy"])
def test_a_role_serves_its_own_port_only(database_url: str, tmp_path: Path, role: str) -> None:
    with serving(tmp_path, database_url, "--role", role) as serve:
        own, other = (serve.web, serve.proxy) if role == "control" else (serve.proxy, serve.web)
        until_ready(serve, own)
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{other}/ready")
        serve.process.send_signal(signal.SIGINT)
        assert serve.wait() == 0


# --- who is away -----------------------------------------------------------------------------------------


def test_a_database_that_is_away_is_named_once_and_waited_for(session_directory: Path, tmp_path: Path) -> None:
    with PrivatePostgres(session_directory / "postgres-away", is_durable=False) as postgres:
        url = postgres.create_database("away")
        subprocess.run([*CONTROLPLANE, "migrate"], env={**os.environ, "DATABASE_URL": url}, check=True)
        postgres.kill()
        with serving(tmp_path, url) as serve:
            parts = until_ready(serve, serve.web, 503)["parts"]
            assert parts["database"]["status"] == "unready"
            until_ready(serve, serve.proxy, 503)
            [told] = eventually_sync(lambda: serve.said("PostgreSQL does not answer"), timeout_seconds=SECONDS)
            assert "Connection refused" in told["event"]
            assert "DATABASE_URL" in told["remedy"]
            postgres.restart()
            until_ready(serve, serve.web)
            until_ready(serve, serve.proxy)
            assert eventually_sync(lambda: serve.said("PostgreSQL answers"), timeout_seconds=SECONDS)
            assert len(serve.said("PostgreSQL does not answer")) == 1
            assert not [event for event in serve.events() if event["source"].startswith("psycopg")]
            serve.process.send_signal(signal.SIGTERM)
            assert serve.wait() == 0


def test_a_schema_that_is_missing_is_named_and_waited_for(postgres: PrivatePostgres, tmp_path: Path) -> None:
    url = postgres.create_database("serve_unmigrated")
    with serving(tmp_path, url, "--role", "control") as serve:
        parts = until_ready(serve, serve.web, 503)["parts"]
        assert parts["schema"]["status"] == "unready"
        assert "controlplane migrate" in parts["schema"]["remedy"]
        [told] = eventually_sync(lambda: serve.said("lacks the migrations"), timeout_seconds=SECONDS)
        assert "controlplane migrate" in told["remedy"]
        serve.command("migrate")
        until_ready(serve, serve.web)
        assert eventually_sync(lambda: serve.said("lease taken"), timeout_seconds=SECONDS)


def test_a_slurmrestd_that_is_away_is_named_once_and_everything_else_works(database_url: str, tmp_path: Path) -> None:
    [nobody] = free_ports(1)
    slurm = {
        "CONTROLPLANE_SLURM__URL": f"http://127.0.0.1:{nobody}",
        "CONTROLPLANE_SLURM__USER_NAME": "vllm",
        "CONTROLPLANE_SLURM__TOKEN": "not-a-jwt",
        "CONTROLPLANE_SLURM__JOB_DIRECTORY": str(tmp_path),
        "CONTROLPLANE_RECONCILE__INTERVAL_SECONDS": "0.2",
    }
    with serving(tmp_path, database_url, "--role", "control", **slurm) as serve:
        until_ready(serve, serve.web)
        told = eventually_sync(lambda: serve.said("Slurm cannot be used"), timeout_seconds=SECONDS)
        assert "CONTROLPLANE_SLURM__URL" in told[0]["remedy"]
        assert until_ready(serve, serve.web)["parts"]["slurm"]["status"] == "degraded"
        lists = 'controlplane_slurm_request_seconds_count{operation="list",outcome="unreachable"}'
        eventually_sync(lambda: lists in httpx.get(f"{serve.web}/metrics").text, timeout_seconds=SECONDS)
        assert len(serve.said("Slurm cannot be used")) == 1
        serve.process.send_signal(signal.SIGTERM)
        assert serve.wait() == 0


# --- how it ends -----------------------------------------------------------------------------------------


def refuses(url: str) -> bool:
    try:
        httpx.get(url)
    except httpx.TransportError:
        return True
    return False


def test_sigterm_lets_a_stream_finish_and_takes_no_new_requests(database_url: str, tmp_path: Path) -> None:
    with serving_tiny(tmp_path, database_url, tokens_per_second=20) as (serve, key), httpx.Client() as client:
        headers = {"Authorization": f"Bearer {key}"}
        body = chat(stream=True, max_tokens=40)
        with client.stream("POST", f"{serve.proxy}/v1/chat/completions", json=body, headers=headers) as answer:
            lines = answer.iter_lines()
            assert next(lines).startswith("data: ")
            serve.process.send_signal(signal.SIGTERM)
            eventually_sync(lambda: serve.said("stopping"), timeout_seconds=SECONDS)
            eventually_sync(lambda: refuses(f"{serve.proxy}/ready"), timeout_seconds=SECONDS)
            assert "data: [DONE]" in list(lines)
        assert serve.wait() == 0


def test_the_drain_timeout_ends_what_does_not_end_by_itself(database_url: str, tmp_path: Path) -> None:
    limit = {"CONTROLPLANE_PROXY__DRAIN_TIMEOUT_SECONDS": "1"}
    with serving_tiny(tmp_path, database_url, tokens_per_second=1, **limit) as (serve, key), httpx.Client() as client:
        headers = {"Authorization": f"Bearer {key}"}
        body = chat(stream=True, max_tokens=1000)
        with client.stream("POST", f"{serve.proxy}/v1/chat/completions", json=body, headers=headers) as answer:
            assert next(answer.iter_lines()).startswith("data: ")
            serve.process.send_signal(signal.SIGTERM)
            assert serve.wait() == 0


def test_a_second_signal_ends_everything_at_once(database_url: str, tmp_path: Path) -> None:
    with serving_tiny(tmp_path, database_url, tokens_per_second=1) as (serve, key), httpx.Client() as client:
        headers = {"Authorization": f"Bearer {key}"}
        body = chat(stream=True, max_tokens=1000)
        with client.stream("POST", f"{serve.proxy}/v1/chat/completions", json=body, headers=headers) as answer:
            lines = answer.iter_lines()
            assert next(lines).startswith("data: ")
            serve.process.send_signal(signal.SIGTERM)
            eventually_sync(lambda: serve.said("stopping"), timeout_seconds=SECONDS)
            serve.process.send_signal(signal.SIGTERM)
            with pytest.raises(httpx.TransportError):
                list(lines)
        assert serve.wait() == 128 + signal.SIGTERM
        assert serve.said("stopped at once")
