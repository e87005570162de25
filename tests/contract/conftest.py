"""A slurmrestd on a real loopback socket that replays recorded answers, or gives up in scripted ways."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from controlplane.slurm.client import SlurmClient, SlurmOptions
from controlplane.slurm.tokens import StaticToken

FIXTURES = Path(__file__).parents[1] / "fixtures" / "slurmrestd"


@dataclass(frozen=True, slots=True)
class Exchange:
    """One recorded request and its answer."""

    method: str
    path: str
    request: Any
    status: int
    body: Any


@dataclass(frozen=True, slots=True)
class Recording:
    """All that was recorded of one release through one API version."""

    name: str

    @property
    def release(self) -> str:
        return self.name.removeprefix("slurm-").split("_")[0]

    @property
    def version(self) -> str:
        return self.name.split("_")[1]

    @property
    def is_tagged(self) -> bool:
        return self.version != "v0.0.38"

    def exchanges(self) -> dict[str, Exchange]:
        return _exchanges(FIXTURES / f"{self.name}.json")

    def __getitem__(self, name: str) -> Exchange:
        return self.exchanges()[name]


@cache
def _exchanges(path: Path) -> dict[str, Exchange]:
    return {name: Exchange(**entry) for name, entry in json.loads(path.read_text()).items()}


RECORDINGS = tuple(Recording(path.stem) for path in sorted(FIXTURES.glob("slurm-*.json")))


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "recorded(*names): run with every `recording` that holds all of these exchanges")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    marker = metafunc.definition.get_closest_marker("recorded")
    if marker is not None:
        fitting = [recording for recording in RECORDINGS if recording.exchanges().keys() >= set(marker.args)]
        assert fitting, f"nowhere recorded: {marker.args}"
        metafunc.parametrize("recording", fitting, ids=lambda recording: recording.name)


@dataclass(frozen=True, slots=True)
class Request:
    method: str
    path: str  # behind /slurm/<version>/
    version: str
    headers: dict[str, str]
    body: Any


Reply = tuple[int, Any] | None
"""HTTP status and body (text where it is a string); None breaks the connection without an answer."""

UNKNOWN_PATH: Reply = (404, "Unable find requested URL. Please view /openapi/v3 for API reference.")


@dataclass(slots=True)
class Slurmrestd:
    """Answers what it was told to; everything else is an unknown path."""

    url: str
    versions: set[str] = field(default_factory=lambda: {"v0.0.42"})
    requests: list[Request] = field(default_factory=list)
    missing_bytes: int = 0  # how many bytes before its end an answer breaks off
    _replies: dict[tuple[str, str], list[Reply]] = field(default_factory=dict)

    def answer(self, method: str, path: str, *replies: Reply) -> None:
        """Give these replies to this request, one after the other; the last one for ever."""
        self._replies[method, path] = list(replies)

    def replay(self, recording: Recording, *names: str) -> None:
        """Answer the recorded requests as recorded; of the same request, in the order of the names."""
        self.versions = {recording.version}
        grouped: dict[tuple[str, str], list[Reply]] = {}
        for exchange in (recording[name] for name in names):
            path = exchange.path.split(f"/{recording.version}/")[1]
            grouped.setdefault((exchange.method, path), []).append((exchange.status, exchange.body))
        self._replies |= grouped

    def asked(self) -> list[str]:
        """`METHOD path` of what was asked, without what was asked only to find the version."""
        return [f"{request.method} {request.path}" for request in self.requests if request.path != "ping"]

    async def converse(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
        method, target, _ = head[0].split(" ")
        headers = {name.lower(): value for name, value in (line.split(": ", 1) for line in head[1:] if line)}
        content = await reader.readexactly(int(headers.get("content-length", "0")))
        _, _, version, path = target.split("/", 3)
        self.requests.append(Request(method, path, version, headers, json.loads(content) if content else None))
        replies = self._replies.get((method, path), [UNKNOWN_PATH])
        reply = UNKNOWN_PATH
        if version in self.versions:
            reply = replies.pop(0) if len(replies) > 1 else replies[0]
        if reply is not None:
            raw = _http(*reply)
            writer.write(raw[: len(raw) - self.missing_bytes])
        writer.close()
        await writer.wait_closed()


def _http(status: int, body: Any) -> bytes:
    content = (body if isinstance(body, str) else json.dumps(body)).encode()
    kind = "text/plain" if isinstance(body, str) else "application/json"
    lines = (f"HTTP/1.1 {status} X", f"Content-Type: {kind}", f"Content-Length: {len(content)}", "Connection: Close")
    return "\r\n".join((*lines, "", "")).encode() + content


@pytest.fixture
async def slurmrestd() -> AsyncIterator[Slurmrestd]:
    fake = Slurmrestd("")
    server = await asyncio.start_server(fake.converse, "127.0.0.1", 0)
    host, port = server.sockets[0].getsockname()
    fake.url = f"http://{host}:{port}"
    async with server:
        yield fake


@pytest.fixture
def outcomes() -> list[tuple[str, str]]:
    """(operation, outcome) of every call that `client` reports."""
    return []


@pytest.fixture
async def client(slurmrestd: Slurmrestd, outcomes: list[tuple[str, str]]) -> AsyncIterator[SlurmClient]:
    options = SlurmOptions(slurmrestd.url, "www-data", StaticToken("opaque-token"))

    def on_call(operation: str, outcome: str, seconds: float) -> None:
        assert seconds >= 0
        outcomes.append((operation, outcome))

    async with SlurmClient(options, on_call=on_call) as client:
        yield client
