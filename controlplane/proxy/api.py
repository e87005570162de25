"""The data plane as uvicorn runs it: an HTTP protocol for what carries prompts, and an ASGI application for the rest.

Reading order: `protocol` (a client's connection), `call` (one request), `upstreams` (connections to endpoints). Here
are the model lists, what operators ask, and the life of what all requests share. Models are listed from memory.

States: `/ready` is 503 until the directory was read once, and from then on 200, `degraded` while it cannot be read,
until the process stops. Failures answer in OpenAI's shape (`errors`).
"""

from __future__ import annotations

import asyncio
import gc
import json
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from functools import partial
from random import Random

from prometheus_client import CONTENT_TYPE_LATEST
from starlette.types import Receive, Scope, Send

from controlplane.clock import utc_now
from controlplane.core.retry_budget import RetryBudget
from controlplane.db import Database, process_name
from controlplane.metrics import ProxyMetrics, exposition
from controlplane.proxy.access_log import AccessLog
from controlplane.proxy.auth import authenticate, credential_of
from controlplane.proxy.directory import Directory, Snapshot
from controlplane.proxy.errors import (
    ApiError,
    Headers,
    method_not_allowed,
    nothing_known_yet,
    numbers_unknown,
    unknown_route,
)
from controlplane.proxy.limits import Limits
from controlplane.proxy.models import model_list, one_model
from controlplane.proxy.options import ProxyOptions
from controlplane.proxy.plane import Plane
from controlplane.proxy.pressure import HeldPressure
from controlplane.proxy.protocol import FORM_ROUTES, ROUTES, ClientConnection
from controlplane.proxy.request import header, request_id_of
from controlplane.proxy.routing import Router
from controlplane.proxy.upstreams import Upstreams
from controlplane.proxy.usage import Usage
from controlplane.proxy.waiting import WaitingRooms

_JSON = b"application/json"
_COLLECTED_AFTER = (20_000, 20, 50)  # new objects, and collections of those that were left; Python's own: 700, 10, 10
_FIRST_READ_SECONDS = 1.0  # so that the first request finds something; without PostgreSQL we start all the same


Scrape = Callable[[], Awaitable[bytes | None]]
"""Prometheus' text of all processes that serve this port; None: whoever adds them up does not answer."""


def create_app(
    db: Database,
    options: ProxyOptions,
    metrics: ProxyMetrics,
    *,
    scrape: Scrape | None = None,
    rng: Random | None = None,
) -> Proxy:
    """The data plane. The caller opens and closes the database, and gives `Proxy.protocol` to uvicorn as `http`.

    Without `scrape` this process is the only one that serves the port.
    """
    return Proxy(db, options, metrics, scrape, rng or Random())  # noqa: S311 - breaks ties, keeps no secret


class Proxy:
    def __init__(
        self, db: Database, options: ProxyOptions, metrics: ProxyMetrics, scrape: Scrape | None, rng: Random
    ) -> None:
        worker = process_name()  # what it told the database is told from others' by it
        self._options = options
        self._metrics = metrics
        self._scrape = scrape
        self._is_stopping = False
        self._usage = Usage(db, worker)
        self._limits = Limits(db, worker, tally=self._usage.tally)
        self._directory = Directory(
            db,
            refresh_seconds=options.refresh_seconds,
            on_read=self._follow,
            on_worker=self._limits.worker_joined,
        )
        upstreams = Upstreams(keepalive_seconds=options.keepalive_seconds)
        self._rooms = WaitingRooms(
            options.waiting,
            live_workers=lambda: self._limits.workers,
            in_flight_of=upstreams.in_flight_of,
            weight_of=self._weight_of,
        )
        self._pressure = HeldPressure(db, self._rooms, worker=worker)
        self._access_log = AccessLog(options.access_log_sample, rng)
        self._plane = Plane(
            options=options,
            directory=self._directory,
            upstreams=upstreams,
            router=Router(rng),
            retries=RetryBudget(),
            rooms=self._rooms,
            limits=self._limits,
            usage=self._usage,
            metrics=metrics,
            log=self._access_log,
        )
        self.protocol = partial(ClientConnection, plane=self._plane)
        """What uvicorn shall make of each connection: its `http`."""
        metrics.directory_age_seconds = self._directory.age_seconds
        metrics.held_requests = lambda: self._rooms.waiting
        metrics.limited_requests = lambda: self._limits.refused
        metrics.usage_lost = lambda: {"requests": self._usage.lost_requests, "tokens": self._usage.lost_tokens}
        metrics.upstream_connections = upstreams.connections

    def _weight_of(self, tenant: str) -> float:
        snapshot = self._directory.snapshot
        limits = None if snapshot is None else snapshot.tenants.get(tenant)
        return 1.0 if limits is None else limits.weight

    @property
    def in_flight(self) -> Counter[str]:
        """Requests in flight by the endpoint's URL; endpoints without any are absent."""
        return self._plane.upstreams.in_flight

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._live(receive, send)
            return
        answer = _Answer(scope)
        try:
            await self._answer(scope, answer)
        except ApiError as error:
            answer.status, answer.body, answer.content_type = error.status, error.body(), _JSON
            answer.headers = error.headers
        await answer.send(send)
        if scope["path"].startswith("/v1/"):
            self._metrics.ended("", answer.tenant, answer.status, time.monotonic() - answer.started_at)

    # --- life ---------------------------------------------------------------------------------------------

    def stop_soon(self) -> None:
        """From now on `/ready` is 503; requests are answered as before, until lifespan ends."""
        self._is_stopping = True

    async def _live(self, receive: Receive, send: Send) -> None:
        await receive()
        async with asyncio.TaskGroup() as tasks:
            first = tasks.create_task(self._read_first())
            await asyncio.wait([first], timeout=_FIRST_READ_SECONDS)
            _collect_seldom()
            duties = (self._directory.run, self._limits.run, self._usage.run, self._pressure.run, self._tick)
            background = [first, *(tasks.create_task(duty()) for duty in duties)]
            await send({"type": "lifespan.startup.complete"})
            await receive()
            for task in background:
                task.cancel()
        self._plane.upstreams.close()
        await self._pressure.close()
        await self._limits.close()
        await self._usage.close()
        self._access_log.close()
        await send({"type": "lifespan.shutdown.complete"})

    async def _read_first(self) -> None:
        if await self._directory.refresh():
            await self._limits.exchange()  # how much of the month is spent

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(self._options.tick_seconds)
            self._plane.tick()

    def _follow(self, snapshot: Snapshot) -> None:
        upstreams = self._plane.upstreams.follow(snapshot.endpoints)
        now = time.monotonic()
        self._plane.router.follow(upstreams, snapshot.routing, utc_now(), now)
        self._limits.follow(snapshot.tenants, now)
        self._rooms.follow(snapshot, now)

    # --- answers ------------------------------------------------------------------------------------------

    async def _answer(self, scope: Scope, answer: _Answer) -> None:
        """Raises ApiError."""
        match scope["path"]:
            case "/health":
                _allow(scope, "GET", "HEAD")
                answer.body = _json({"status": "ok"})
            case "/ready":
                _allow(scope, "GET", "HEAD")
                answer.status, answer.body = self._readiness()
            case "/metrics":
                _allow(scope, "GET", "HEAD")
                answer.body = await self._metrics_text()
                answer.content_type = CONTENT_TYPE_LATEST.encode()
            case path if path == "/v1/models" or (path.startswith("/v1/models/") and path != "/v1/models/"):
                _allow(scope, "GET", "HEAD")
                answer.body = self._models(scope, answer)
            case path if path.encode() in ROUTES | FORM_ROUTES:
                raise method_not_allowed(scope["method"], path, "POST")
            case path:
                raise unknown_route(scope["method"], path)

    def _models(self, scope: Scope, answer: _Answer) -> bytes:
        """`/v1/models`, all that the key may use, and `/v1/models/{id}`; ids may contain slashes."""
        snapshot = self._directory.snapshot
        if snapshot is None:
            raise nothing_known_yet()
        headers = scope["headers"]
        key = authenticate(
            credential_of(header(headers, b"authorization"), header(headers, b"x-api-key")), snapshot.keys
        )
        answer.tenant = key.tenant
        path: str = scope["path"]
        if path == "/v1/models":
            return model_list(snapshot, key, utc_now())
        return one_model(path.removeprefix("/v1/models/"), snapshot, key, utc_now())

    async def _metrics_text(self) -> bytes:
        if self._scrape is None:  # in a thread: with many models and tenants it takes longer than a stream should wait
            return await asyncio.to_thread(exposition, self._metrics.snapshot())
        text = await self._scrape()
        if text is None:
            raise numbers_unknown()
        return text

    def _readiness(self) -> tuple[int, bytes]:
        if self._is_stopping:
            return 503, _json({"status": "stopping", "message": "This process ends once its answers are given."})
        problem = self._directory.problem()
        if self._directory.snapshot is None:
            return 503, _json({"status": "unready", "message": problem})
        if problem is not None:
            return 200, _json({"status": "degraded", "message": problem})
        return 200, _json({"status": "ready"})


def _collect_seldom() -> None:
    """Keep Python's collector of cycles from stopping every stream for tens of milliseconds.

    What was made by now, mostly code, stays for ever and need not be looked through. Of requests and connections hardly
    anything is left to collect: their cycles are broken when they end.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(*_COLLECTED_AFTER)


def _allow(scope: Scope, *methods: str) -> None:
    if scope["method"] not in methods:
        raise method_not_allowed(scope["method"], scope["path"], ", ".join(methods))


def _json(value: object) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()


class _Answer:
    """What is answered at once, out of memory."""

    def __init__(self, scope: Scope) -> None:
        self.started_at = time.monotonic()
        self.tenant = ""
        self.status = 200
        self.body = b""
        self.content_type = _JSON
        self.headers: Headers = ()
        self._request_id = request_id_of(header(scope["headers"], b"x-request-id"))

    async def send(self, send: Send) -> None:
        own: Headers = (
            (b"content-type", self.content_type),
            (b"content-length", str(len(self.body)).encode()),
            (b"x-request-id", self._request_id),
        )
        await send({"type": "http.response.start", "status": self.status, "headers": [*own, *self.headers]})
        await send({"type": "http.response.body", "body": self.body})
