"""The fake's life from a bound socket to its exit: listening, SIGTERM, crash.

| event | requests inside | new requests | process |
|---|---|---|---|
| SIGTERM, shutdown timeout 0 | hang without a byte until their clients leave | 500, soon refused | exits 0 after that |
| SIGTERM, timeout N | finish; what has not after N seconds hangs as above | 500, `/health` stays 200 | exits 0 |
| second SIGTERM | cut | refused | exits 130 |
| crash | 500, or an error event in the stream | 500, soon refused | exits 0 |

SIGINT is SIGTERM. The behaviour, exit code 0 after a crash included, is that of vLLM 0.32.
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import uvicorn

from controlplane.demo.fake_vllm.api import ApiOptions, FakeVllm
from controlplane.demo.fake_vllm.engine import Engine, EngineOptions
from controlplane.demo.fake_vllm.faults import FaultPlan, Faults
from controlplane.demo.fake_vllm.metrics import VllmMetrics
from controlplane.demo.fake_vllm.ranks import watch

_KEEP_ALIVE_SECONDS = 5
_INTERRUPTED = 130


@dataclass(frozen=True, slots=True)
class ServerOptions:
    """All that one fake needs once its socket is bound."""

    api: ApiOptions
    engine: EngineOptions
    shutdown_timeout_seconds: float
    fault_plan: FaultPlan


class _Server(uvicorn.Server):
    """uvicorn without its own signal handlers."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


async def serve(options: ServerOptions, bound: socket.socket, followers: Sequence[socket.socket] = ()) -> None:
    """Listen on `bound` and serve until SIGTERM or a crash has ended it. Raises OSError if it cannot listen.

    `followers`: the connections of the other ranks; the end of one of them is a crash.
    """
    loop = asyncio.get_running_loop()
    model = options.api.model
    seen = VllmMetrics(model.names[0], model.max_model_len)
    engine = Engine(options.engine, seen)

    def leave() -> None:
        server.should_exit = True

    faults = Faults(engine, leave, options.fault_plan.error_rate)
    app = FakeVllm(options.api, engine, seen, faults)
    server = _Server(
        uvicorn.Config(
            app,
            http="httptools",
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            timeout_keep_alive=_KEEP_ALIVE_SECONDS,
        )
    )

    async def shut_down() -> None:
        engine.drain()
        try:
            await asyncio.wait_for(engine.wait_until_idle(), options.shutdown_timeout_seconds)
        except TimeoutError:
            engine.halt()
        leave()

    shutdowns: list[asyncio.Task[None]] = []

    def terminate() -> None:
        if shutdowns:
            os._exit(_INTERRUPTED)
        print("Shutting down", flush=True)
        shutdowns.append(loop.create_task(shut_down()))

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, terminate)
    if options.fault_plan.crash_after_seconds is not None:
        loop.call_later(options.fault_plan.crash_after_seconds, faults.crash)
    watch(followers, faults.crash)
    ticker = loop.create_task(engine.run())
    print(f"Serving {model.names[0]} on {bound.getsockname()}", flush=True)
    await server.serve(sockets=[bound])
    ticker.cancel()
    print("Application shutdown complete.", flush=True)
