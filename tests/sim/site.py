"""Everything that answers the product's HTTP: slurmrestd, Grafana's API, and whatever listens on the nodes."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import datetime, timedelta
from random import Random
from typing import Any

import httpx

from tests.sim.dialects import FROZEN
from tests.sim.grafana import Grafana
from tests.sim.product import REQUEST_TIMEOUT
from tests.sim.slurm import NODES, Engine, Slurm
from tests.sim.steps import Fate, Process

_NODE_OF = {address: node for node, address in NODES.items()}
_ACTED_UPON = frozenset(
    {
        Fate.DONE,
        Fate.SLOW,
        Fate.STALE,
        Fate.DIES_AFTER,
        Fate.TIMEOUT_AFTER,
        Fate.BROKEN_AFTER,
        Fate.ERROR_AFTER,
        Fate.TRUNCATED,
    }
)


class FakeSite:
    """`asks_slurm` is told of every request that reaches slurmrestd, before it acts: process, method, path, body."""

    def __init__(self, slurm: Slurm, grafana: Grafana, rng: Random, pass_time: Callable[[timedelta], None]) -> None:
        self.slurm = slurm
        self.grafana = grafana
        self.asks_slurm: Callable[[Process, httpx.Request, datetime], None] = lambda process, request, at: None
        self.answered: Callable[[Process, httpx.Request, Fate, int, bytes], None] = lambda *_: None
        self.on_composed: Callable[[Process, httpx.Request], None] = lambda *_: None
        self.blind_to_nodes = False
        self.slow_seconds: tuple[int, ...] = (4, 12, 25)
        self._rng = rng
        self._pass_time = pass_time

    def composed(self, process: Process, request: httpx.Request) -> None:
        self.on_composed(process, request)

    def words(self, request: httpx.Request) -> str:
        """Such as `slurm GET jobs`, or `slurm POST job/submit cp-a-1`."""
        host, path = request.url.host, request.url.path
        if host != "slurm":
            return f"{host}:{request.url.port or ''} {request.method} {path}"
        name = json.loads(request.content)["job"]["name"] if path.endswith("/submit") else ""
        return f"slurm {request.method} {path.split('/', 3)[3]} {name}".rstrip()

    def answer(self, process: Process, request: httpx.Request, fate: Fate, composed_at: datetime) -> httpx.Response:
        if fate in (Fate.REFUSED, Fate.NOT_CONNECTED):
            self.answered(process, request, fate, 0, b"")
        if fate is Fate.REFUSED:
            raise httpx.ConnectError("connection refused", request=request)
        if fate is Fate.NOT_CONNECTED:
            self._pass_time(timedelta(seconds=5))
            raise httpx.ConnectTimeout("no route", request=request)
        match request.url.host:
            case "slurm":
                status, content = self._ask_slurm(process, request, fate, composed_at)
            case "grafana":
                status, content = 200, json.dumps(self.grafana.active()).encode()
            case host:
                status, content = self._ask_node(host, request)
        if fate in (Fate.TIMEOUT_BEFORE, Fate.TIMEOUT_AFTER, Fate.LATE):
            self._pass_time(REQUEST_TIMEOUT)
            raise httpx.ReadTimeout("", request=request)
        if fate is Fate.BROKEN_AFTER:
            raise httpx.ReadError("connection reset", request=request)
        if fate is Fate.TRUNCATED:
            content = self._truncated(content)
        self._pass_time(timedelta(seconds=self._rng.choice(self.slow_seconds) if fate is Fate.SLOW else 0.02))
        if request.url.host == "slurm":
            self.answered(process, request, fate, status, content)
        return httpx.Response(status, content=content, request=request)

    def _ask_slurm(
        self, process: Process, request: httpx.Request, fate: Fate, composed_at: datetime
    ) -> tuple[int, bytes]:
        method, path = request.method, request.url.path
        if path.startswith(f"/slurm/{self.slurm.dialect.version}/"):
            self.asks_slurm(process, request, composed_at)
        if fate is Fate.LATE:
            due = self.slurm.now + timedelta(seconds=self._rng.choice((3, 31, 100, 200)))
            self.slurm.later(method, path, request.headers, request.content, due)
        if fate not in _ACTED_UPON:
            return 0, b""
        status, content = self.slurm.exchange(method, path, request.headers, request.content)
        if fate is Fate.STALE:
            return self.slurm.stale_list(timedelta(seconds=self._rng.randint(2, 8)))
        if fate is Fate.ERROR_AFTER:
            status, body = self.slurm.refusal(method, path.split("/", 3)[3], FROZEN)
            content = json.dumps(body).encode()
        return status, content

    def _truncated(self, content: bytes) -> bytes:
        """Cut; or a whole answer of which an entry is none, or that says that it is not whole."""
        kind = self._rng.randrange(3)
        try:
            body = json.loads(content)
        except ValueError:
            kind = 0
            body = None
        if kind == 0 or not isinstance(body, dict) or not isinstance(body.get("jobs"), list):
            return content[: self._rng.randrange(max(1, len(content)))]
        if kind == 1:
            body["jobs"] = [*body["jobs"][:1], {}]
        else:
            body["jobs"] = body["jobs"][:1]
            body["errors"] = [{"error_number": 1004, "error": "Incomplete message", "description": "", "source": ""}]
        return json.dumps(body).encode()

    # --- vLLM ----------------------------------------------------------------------------------------------

    def _ask_node(self, host: str, request: httpx.Request) -> tuple[int, bytes]:
        port = request.url.port
        here = [one for one in self.slurm.engines if (one.node, one.port) == (_NODE_OF.get(host), port)]
        serving = [one for one in here if one.serves_from is not None and one.serves_from <= self.slurm.now]
        if self.blind_to_nodes or not serving:
            raise httpx.ConnectError("connection refused", request=request)
        engine = serving[-1]
        path = request.url.path
        if path == "/metrics":
            return 200, _metrics(engine).encode()
        if request.headers.get("authorization") != f"Bearer {engine.secret}":
            return 401, b'{"error": "Unauthorized"}'
        if path == "/v1/models":
            return 200, _json({"data": [{"id": engine.model}]})
        if engine.is_frozen:
            self._pass_time(timedelta(seconds=10))
            raise httpx.ReadTimeout("", request=request)
        engine.tokens += 1
        return 200, _json({"choices": [{"text": "b"}]})


def _metrics(engine: Engine) -> str:
    return (
        f"vllm:num_requests_running {engine.in_flight}\nvllm:num_requests_waiting 0\n"
        f"vllm:generation_tokens_total {engine.tokens}\n"
    )


def _json(body: Any) -> bytes:
    return json.dumps(body).encode()
