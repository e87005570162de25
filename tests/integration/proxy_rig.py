"""What the proxy's tests need around it: uvicorn on a free port, upstreams that misbehave to order, rows to route by.

Upstreams are plain sockets, because what matters here (a refusal, an early end of file, a body cut short, a connection
that closes when its client has left) lies below HTTP libraries. Whatever is waited for has a limit of `SECONDS`.
"""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field, replace
from datetime import timedelta
from itertools import count
from random import Random
from typing import Any, TypeVar, cast

import httpx
import uvicorn
from prometheus_client import CollectorRegistry

from controlplane.clock import utc_now
from controlplane.core.types import (
    ExternalEndpoint,
    Health,
    Replica,
    ReplicaSetSpec,
    RoutingPolicy,
    SlurmResources,
)
from controlplane.db import Database, DatabaseOptions, endpoints, keys, replica_sets, replicas
from controlplane.metrics import ProxyMetrics
from controlplane.proxy import Proxy, ProxyOptions, create_app

SECONDS = 5.0
MODEL = "tiny"
CHAT = "/v1/chat/completions"
QUICK = ProxyOptions(connect_timeout_seconds=0.3, refresh_seconds=30.0)

T = TypeVar("T")


async def until(ask: Callable[[], Awaitable[T]], fact: Callable[[T], object], *, seconds: float = SECONDS) -> T:
    """Ask again and again until the answer is as it should be, and return it."""
    async with asyncio.timeout(seconds):
        while True:
            answer = await ask()
            if fact(answer):
                return answer
            await asyncio.sleep(0.01)


async def until_status(ask: Callable[[], Awaitable[httpx.Response]], status: int) -> None:
    """The same, for a change that must be seen at once: within two seconds."""
    await until(ask, lambda answer: answer.status_code == status, seconds=2.0)


# --- upstreams -------------------------------------------------------------------------------------------


@dataclass
class Received:
    """A request as an upstream read it."""

    line: str
    headers: list[tuple[str, str]]
    body: bytes

    def header(self, name: str) -> list[str]:
        return [value for key, value in self.headers if key == name]


@dataclass
class Connection:
    """The upstream's end of one connection, while it answers one request."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    number: int  # of this connection, from 0

    async def send(self, *pieces: bytes) -> None:
        for piece in pieces:
            self.writer.write(piece)
            await self.writer.drain()

    async def answer(self, body: bytes, status: str = "200 OK", content_type: str = "application/json") -> None:
        head = f"HTTP/1.1 {status}\r\ncontent-type: {content_type}\r\ncontent-length: {len(body)}\r\n\r\n"
        await self.send(head.encode() + body)

    async def begin_stream(self, *extra: str) -> None:
        lines = ["HTTP/1.1 200 OK", "content-type: text/event-stream; charset=utf-8", "transfer-encoding: chunked"]
        await self.send("\r\n".join([*lines, *extra, "", ""]).encode())

    async def event(self, data: str) -> None:
        await self.chunk(f"data: {data}\n\n".encode())

    async def chunk(self, piece: bytes) -> None:
        await self.send(b"%x\r\n%b\r\n" % (len(piece), piece))

    async def end_stream(self) -> None:
        await self.send(b"0\r\n\r\n")

    async def closed_by_the_proxy(self) -> None:
        with suppress(ConnectionResetError):
            assert await self.reader.read() == b""

    def close(self) -> None:
        self.writer.close()


Script = Callable[[Received, Connection], Awaitable[None]]


@dataclass
class Upstream:
    url: str
    requests: list[Received] = field(default_factory=list)
    connections: int = 0


@asynccontextmanager
async def upstream(script: Script) -> AsyncIterator[Upstream]:
    """A server that reads requests and lets the script answer each, keeping the connection open between them."""
    running: set[asyncio.Task[Any]] = set()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        running.add(task)
        number, made.connections = made.connections, made.connections + 1
        try:
            while not writer.is_closing() and (request := await _read_request(reader)) is not None:
                made.requests.append(request)
                await script(request, Connection(reader, writer, number))
        except (ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass  # the proxy left, perhaps in the middle of a body
        finally:
            writer.close()
            running.discard(task)

    server = await asyncio.start_server(serve, "127.0.0.1", 0, backlog=1024, limit=2**22)
    made = Upstream(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}")
    try:
        yield made
    finally:
        server.close()
        for task in list(running):
            task.cancel()
        await asyncio.gather(*running)
        await server.wait_closed()


async def _read_request(reader: asyncio.StreamReader) -> Received | None:
    try:
        head = await reader.readuntil(b"\r\n\r\n")
    except asyncio.IncompleteReadError:
        return None
    line, *fields = head.decode("latin-1").rstrip("\r\n").split("\r\n")
    headers = [(name.lower(), value.strip()) for name, _, value in (text.partition(":") for text in fields)]
    if dict(headers).get("transfer-encoding") == "chunked":
        return Received(line, headers, await _read_chunks(reader))
    length = int(dict(headers).get("content-length", 0))
    return Received(line, headers, await reader.readexactly(length))


async def _read_chunks(reader: asyncio.StreamReader) -> bytes:
    pieces: list[bytes] = []
    while size := int(await reader.readline(), 16):
        pieces.append(await reader.readexactly(size))
        assert await reader.readline() == b"\r\n"
    assert await reader.readline() == b"\r\n"
    return b"".join(pieces)


@contextmanager
def refusing_url() -> Iterator[str]:
    """A port that is taken and not listened on."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{bound.getsockname()[1]}"


@contextmanager
def silent_url() -> Iterator[str]:
    """A port whose queue of connections is full: the kernel drops who knocks, as a dead node would."""
    with socket.socket() as listener, socket.socket() as first, socket.socket() as second:
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        for one in (first, second):
            one.setblocking(False)
            one.connect_ex(listener.getsockname())
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"


# --- the database ----------------------------------------------------------------------------------------


@asynccontextmanager
async def opened(url: str, *, timeout_seconds: float = SECONDS) -> AsyncIterator[Database]:
    async with Database(DatabaseOptions(url, max_connections=4, timeout_seconds=timeout_seconds)) as db:
        yield db


async def make_routable(
    db: Database, *urls: str, model: str = MODEL, api_key: str | None = None, max_in_flight: int | None = None
) -> str:
    """An external replica set whose endpoints have all passed their probes. Returns its name."""
    spec = ReplicaSetSpec(
        name="set-" + model.lower().replace("/", "-"),
        model=model,
        endpoints=tuple(ExternalEndpoint(url, api_key) for url in urls),
        routing=RoutingPolicy(max_in_flight=max_in_flight),
    )
    now = utc_now()
    await replica_sets.apply(db, spec, actor="test", now=now)
    for endpoint in await endpoints.load_live(db):
        if endpoint.url in urls:
            ready = replace(endpoint, health=Health.READY, first_ready_at=now, confirmed_at=now, passes=3)
            await endpoints.save(db, ready, seen=endpoint)
    return spec.name


async def make_scalable(db: Database, model: str) -> str:
    """A replica set that Slurm runs, without replicas. Returns its name."""
    spec = ReplicaSetSpec(name=f"set-{model}", model=model, template="t", slurm=SlurmResources(time_limit_seconds=3600))
    await replica_sets.apply(db, spec, actor="test", now=utc_now())
    return spec.name


_ports = count(20001)  # two live replicas never share one


async def start_replica(db: Database, name: str) -> Replica:
    replica_set = await replica_sets.load(db, name)
    await replica_sets.scale(db, name, replicas=replica_set.max_replicas, actor="test", now=utc_now())
    return await replicas.create(db, replica_set, port=next(_ports), secret="s" * 32, actor="test", now=utc_now())


async def make_key(db: Database, *models: str, lasts: timedelta | None = None) -> str:
    now = utc_now()
    expires_at = None if lasts is None else now + lasts
    key, _ = await keys.create(db, "tenant", models=models or None, expires_at=expires_at, actor="test", now=now)
    return key


# --- the proxy -------------------------------------------------------------------------------------------


@dataclass
class Running:
    """A proxy on a port, with a client that has a good key."""

    app: Proxy
    port: int
    client: httpx.AsyncClient
    registry: CollectorRegistry
    key: str

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def chat(self, **fields: Any) -> httpx.Response:
        return await self.client.post(CHAT, json={"model": MODEL, "messages": [], **fields})

    async def models(self) -> httpx.Response:
        return await self.client.get("/v1/models")

    async def ready(self) -> httpx.Response:
        return await self.client.get("/ready")

    async def raw(self, **fields: Any) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """A connection on which one chat request has been sent: for clients that leave."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        body = json.dumps({"model": MODEL, "messages": [], **fields}).encode()
        head = f"POST {CHAT} HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {self.key}\r\ncontent-length: {len(body)}"
        writer.write(head.encode() + b"\r\n\r\n" + body)
        await writer.drain()
        return reader, writer

    def metric(self, name: str, **labels: str) -> float:
        return self.registry.get_sample_value(name, labels) or 0.0


class _Server(uvicorn.Server):
    """uvicorn that says when it listens, is told when to stop, and leaves the signals to pytest."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.listens, self.stop = asyncio.Event(), asyncio.Event()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.listens.set()

    async def main_loop(self) -> None:
        await self.on_tick(0)
        await self.stop.wait()

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


@asynccontextmanager
async def running_proxy(db: Database, options: ProxyOptions = QUICK, *, key: str = "sk-none") -> AsyncIterator[Running]:
    registry = CollectorRegistry()
    app = create_app(db, options, ProxyMetrics(registry), rng=Random(5))
    bound = socket.socket(proto=socket.IPPROTO_TCP)  # said aloud, or asyncio leaves Nagle's delay on
    bound.bind(("127.0.0.1", 0))
    port: int = bound.getsockname()[1]
    config = uvicorn.Config(
        app, http=cast("Any", app.protocol), ws="none", lifespan="on", log_config=None, access_log=False, backlog=1024
    )
    server = _Server(config)
    serving = asyncio.create_task(server.serve(sockets=[bound]))
    limits = httpx.Limits(max_connections=None)
    headers = {"authorization": f"Bearer {key}"}
    try:
        async with asyncio.timeout(SECONDS):
            await server.listens.wait()
        async with httpx.AsyncClient(
            base_url=f"http://127.0.0.1:{port}", headers=headers, trust_env=False, timeout=SECONDS, limits=limits
        ) as client:
            yield Running(app, port, client, registry, key)
    finally:
        server.stop.set()
        async with asyncio.timeout(SECONDS):
            await serving
