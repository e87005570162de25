"""The data plane's routes, and what one request goes through.

A request with a prompt: who asks (`auth`), read the body, which model, may the key use it and is it routable
(`directory`), pass it on (`forward`). Models are listed from memory. This is a plain ASGI application: a framework's
request and response objects would cost as much as all of the above.

States: `/ready` is 503 until the directory was read once, and from then on 200, `degraded` while it cannot be read,
until the process stops.
Failures answer in OpenAI's shape (`errors`); each is one line in the log, without prompt or key.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Awaitable, Callable, Iterable
from random import Random
from types import MappingProxyType

from prometheus_client import CONTENT_TYPE_LATEST
from starlette.types import Receive, Scope, Send

from controlplane.clock import utc_now
from controlplane.core.types import ApiKey, RoutableEndpoint, ServedModel
from controlplane.db import Database
from controlplane.metrics import ProxyMetrics, exposition
from controlplane.proxy.access_log import AccessLog
from controlplane.proxy.auth import authenticate, may_use
from controlplane.proxy.directory import Directory, ModelState, Snapshot, retry_after_seconds, seconds_to_ready
from controlplane.proxy.errors import (
    ApiError,
    Headers,
    method_not_allowed,
    model_not_found,
    model_paused,
    model_starting,
    nothing_known_yet,
    numbers_unknown,
    unknown_route,
)
from controlplane.proxy.forward import Exchange, Forwarder
from controlplane.proxy.options import ProxyOptions
from controlplane.proxy.request import ClientLeft, ClientRequest, model_of, read_body, request_id_of
from controlplane.proxy.upstreams import Upstreams

PASSED_ON = frozenset(
    {
        "/v1/chat/completions",
        "/v1/completions",
        "/v1/embeddings",
        "/v1/responses",
        "/v1/messages",
        "/v1/rerank",
        "/v1/score",
        "/tokenize",
        "/detokenize",
    }
)
"""JSON routes whose body names a `model`: passed on and back unread otherwise."""

_JSON = b"application/json"
_FIRST_READ_SECONDS = 1.0  # so that the first request finds something; without PostgreSQL we start all the same
_LONGEST_PAUSE_WORTH_WAITING_FOR_SECONDS = 60


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
    """The data plane as an ASGI application. The caller opens and closes the database; lifespan does the rest.

    Without `scrape` this process is the only one that serves the port.
    """
    return Proxy(db, options, metrics, scrape, rng or Random())  # noqa: S311 - breaks ties, keeps no secret


class Proxy:
    def __init__(
        self, db: Database, options: ProxyOptions, metrics: ProxyMetrics, scrape: Scrape | None, rng: Random
    ) -> None:
        self._options = options
        self._metrics = metrics
        self._scrape = scrape
        self._upstreams = Upstreams(keepalive_seconds=options.keepalive_seconds, avoid_seconds=options.avoid_seconds)
        self._directory = Directory(db, refresh_seconds=options.refresh_seconds, on_read=self._follow)
        self._forwarder = Forwarder(options, self._upstreams, rng)
        self._access_log = AccessLog(options.access_log_sample, rng)
        self._is_stopping = False
        metrics.directory_age_seconds = self._directory.age_seconds

    @property
    def in_flight(self) -> MappingProxyType[str, int]:
        """Requests in flight by the endpoint's URL; endpoints without any are absent."""
        return MappingProxyType(self._upstreams.in_flight)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._live(receive, send)
        elif scope["path"].startswith("/v1/") or scope["path"] in PASSED_ON:
            await self._serve(scope, receive, send)
        else:
            await self._serve_operators(scope, send)

    # --- life ---------------------------------------------------------------------------------------------

    def stop_soon(self) -> None:
        """From now on `/ready` is 503; requests are answered as before, until lifespan ends."""
        self._is_stopping = True

    async def _live(self, receive: Receive, send: Send) -> None:
        await receive()
        async with asyncio.TaskGroup() as tasks:
            first = tasks.create_task(self._directory.refresh())
            await asyncio.wait([first], timeout=_FIRST_READ_SECONDS)
            background = [first, *map(tasks.create_task, (self._directory.run(), self._upstreams.sweep()))]
            await send({"type": "lifespan.startup.complete"})
            await receive()
            for task in background:
                task.cancel()
        await self._upstreams.close()
        self._access_log.close()
        await send({"type": "lifespan.shutdown.complete"})

    def _follow(self, snapshot: Snapshot) -> None:
        self._upstreams.keep({endpoint.url for those in snapshot.endpoints.values() for endpoint in those})

    # --- clients ------------------------------------------------------------------------------------------

    async def _serve(self, scope: Scope, receive: Receive, send: Send) -> None:
        call = _Call(request_id_of(scope["headers"]))
        try:
            if scope["path"] in PASSED_ON:
                await self._pass_on(call, scope, receive, send)
            else:
                body = self._models(call, scope)
                call.exchange.status = 200
                await _respond(send, 200, body, request_id=call.request_id)
        except ApiError as error:
            call.exchange.status = error.status
            call.code = error.code
            await _respond(send, error.status, error.body(), headers=error.headers, request_id=call.request_id)
        except ClientLeft:
            call.exchange.client_left = True
        self._record(call)

    async def _pass_on(self, call: _Call, scope: Scope, receive: Receive, send: Send) -> None:
        _allow(scope, "POST")
        headers = scope["headers"]
        _, key = self._admit(call, scope)
        body = await read_body(receive, headers, self._options.max_body_bytes)
        call.received_at = time.monotonic()
        model = model_of(body)
        self._check_route(call, key, model)
        request = ClientRequest(scope["path"].encode(), scope["query_string"], headers, body, call.request_id)
        self._metrics.in_flight[model] += 1
        try:
            await self._forwarder.forward(request, lambda: self._routable(model), call.exchange, receive, send)
        finally:
            self._metrics.in_flight[model] -= 1

    def _admit(self, call: _Call, scope: Scope) -> tuple[Snapshot, ApiKey]:
        snapshot = self._directory.snapshot
        if snapshot is None:
            raise nothing_known_yet()
        key = authenticate(scope["headers"], snapshot.keys, utc_now())
        call.tenant = key.tenant
        return snapshot, key

    def _routable(self, name: str) -> tuple[RoutableEndpoint, ...]:
        """Where the model is served now: asked anew for each try, because what was routable may be drained since."""
        snapshot = self._directory.snapshot
        return () if snapshot is None else snapshot.endpoints.get(name, ())

    def _check_route(self, call: _Call, key: ApiKey, name: str) -> None:
        """Raises ApiError that says why the model is served nowhere. A body takes its time: by what is known now."""
        snapshot = self._directory.snapshot
        model = None if snapshot is None else snapshot.models.get(name)
        if snapshot is None or model is None or not may_use(key, name):
            raise model_not_found(name)
        call.model = name
        now = utc_now()
        match snapshot.state_of(model):
            case ModelState.ROUTABLE:
                return
            case ModelState.PAUSED:
                left = (model.paused_until - now).total_seconds() if model.paused_until else None
                is_near = left is not None and left <= _LONGEST_PAUSE_WORTH_WAITING_FOR_SECONDS
                raise model_paused(name, retry_after_seconds(left) if is_near else None)
            case _:
                raise model_starting(name, retry_after_seconds(seconds_to_ready(model, now)))

    def _models(self, call: _Call, scope: Scope) -> bytes:
        """`/v1/models`, all that the key may use, and `/v1/models/{id}`; ids may contain slashes."""
        path: str = scope["path"]
        name = path.removeprefix("/v1/models/")
        if path != "/v1/models" and (name == path or not name):
            raise unknown_route(scope["method"], path)
        _allow(scope, "GET", "HEAD")
        snapshot, key = self._admit(call, scope)
        usable = {model.model: model for model in snapshot.models.values() if may_use(key, model.model)}
        if path == "/v1/models":
            return _json({"object": "list", "data": [_shown(model, snapshot) for model in usable.values()]})
        if name not in usable:
            raise model_not_found(name)
        return _json(_shown(usable[name], snapshot))

    # --- operators ----------------------------------------------------------------------------------------

    async def _serve_operators(self, scope: Scope, send: Send) -> None:
        request_id = request_id_of(scope["headers"])
        try:
            status, body, content_type = await self._operators_answer(scope)
            await _respond(send, status, body, content_type=content_type, request_id=request_id)
        except ApiError as error:
            await _respond(send, error.status, error.body(), headers=error.headers, request_id=request_id)

    async def _operators_answer(self, scope: Scope) -> tuple[int, bytes, bytes]:
        match scope["path"]:
            case "/health":
                _allow(scope, "GET", "HEAD")
                return 200, _json({"status": "ok"}), _JSON
            case "/ready":
                _allow(scope, "GET", "HEAD")
                return *self._readiness(), _JSON
            case "/metrics":
                _allow(scope, "GET", "HEAD")
                return 200, await self._metrics_text(), CONTENT_TYPE_LATEST.encode()
            case path:
                raise unknown_route(scope["method"], path)

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

    # --- afterwards ---------------------------------------------------------------------------------------

    def _record(self, call: _Call) -> None:
        """Metrics, and one line for the log. Only models that exist become label values; others count under ""."""
        exchange, metrics, now = call.exchange, self._metrics, time.monotonic()
        seconds = now - call.started_at
        metrics.ended(call.model, call.tenant, exchange.status, seconds)
        for failure in exchange.retries:
            metrics.retried(call.model, failure.value)
        if exchange.client_left:
            metrics.client_left(call.model)
        is_broken = exchange.failure is not None and exchange.first_byte_at is not None
        if is_broken:
            metrics.broke(call.model)
        if exchange.first_byte_at is not None:
            overhead_seconds = max(0.0, exchange.first_byte_at - call.received_at - exchange.waited_seconds)
            metrics.first_byte(call.model, exchange.first_byte_at - call.started_at, overhead_seconds)
        self._access_log.write(
            request_id=call.request_id,
            tenant=call.tenant,
            model=call.model,
            status=exchange.status,
            code=call.code,
            upstream=exchange.upstream,
            failure=exchange.failure and exchange.failure.value,
            retries=len(exchange.retries),
            is_broken=is_broken,
            client_left=exchange.client_left,
            seconds=seconds,
            now=now,
        )


class _Call:
    """What is known of a request while it is served."""

    __slots__ = ("code", "exchange", "model", "received_at", "request_id", "started_at", "tenant")

    def __init__(self, request_id: bytes) -> None:
        self.request_id = request_id
        self.exchange = Exchange()
        self.tenant = ""
        self.model = ""
        self.code: str | None = None
        self.started_at = self.received_at = time.monotonic()  # received: with its whole body


def _allow(scope: Scope, *methods: str) -> None:
    if scope["method"] not in methods:
        raise method_not_allowed(scope["method"], scope["path"], ", ".join(methods))


def _shown(model: ServedModel, snapshot: Snapshot) -> dict[str, object]:
    """OpenAI's model object, and what a client may want to know before it waits."""
    state = snapshot.state_of(model)
    shown: dict[str, object] = {
        "id": model.model,
        "object": "model",
        "created": int(model.created_at.timestamp()),
        "owned_by": "controlplane",
        "state": state.value,
    }
    estimate = seconds_to_ready(model, utc_now())
    if state in (ModelState.STARTING, ModelState.SCALED_TO_ZERO) and estimate is not None:
        shown["start_estimate_seconds"] = round(estimate)
    return shown


def _json(value: object) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()


async def _respond(
    send: Send,
    status: int,
    body: bytes,
    *,
    request_id: bytes,
    headers: Headers = (),
    content_type: bytes = _JSON,
) -> None:
    own: Iterable[tuple[bytes, bytes]] = (
        (b"content-type", content_type),
        (b"content-length", str(len(body)).encode()),
        (b"x-request-id", request_id),
    )
    await send({"type": "http.response.start", "status": status, "headers": [*own, *headers]})
    await send({"type": "http.response.body", "body": body})
